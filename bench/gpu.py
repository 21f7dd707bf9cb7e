# SPDX-License-Identifier: MIT
"""`python -m bench gpu`: the training step by batch size and dtype, as a Markdown table.

`python -m bench gpu --of RUN` prints instead what a finished run logged. bench/gpu.sh calls both.
Imports train, and its siblings bench.step and bench.timing.
"""
import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from bench.step import NETWORKS, Step, setup
from bench.timing import machine, now

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TAGS = ("speed/samples_per_s", "speed/data_wait", "memory/peak_gib", "guard/bad_steps",
        "amp/skipped_steps")


def waits_and_kernels(call):
    """How often the host waits for the device in call(), and how many kernels it queues."""
    with torch.profiler.profile() as profiler:
        call()
    events = profiler.events()
    waits = sum(event.name in WAITS for event in events)
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    return waits, kernels


def measure(step, batch, repeats, device):
    """Median milliseconds of a step, its peak in GiB, waits and kernels; - if there is no GPU to tell."""
    for _ in range(2):
        step(batch)
    spent = []
    for _ in range(repeats):
        start = now(device)
        step(batch)
        spent.append(now(device) - start)
    milliseconds = statistics.median(spent) * 1e3
    if device == "cpu":
        return milliseconds, "-", "-", "-"
    torch.cuda.reset_peak_memory_stats()
    waits, kernels = waits_and_kernels(lambda: step(batch))
    return milliseconds, f"{torch.cuda.max_memory_allocated() / 2 ** 30:.2f}", waits, kernels


def print_run(folder):
    """The mean of what a run logged about its speed, and the last of what it counted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    if folder.is_dir():
        events.Reload()
    if TAGS[0] not in events.Tags()["scalars"]:
        raise FileNotFoundError(f"--of {folder}: not the folder of a run that has logged its speed")
    print(f"| tag | value |\n| --- | --- |\n| steps | {events.Scalars(TAGS[0])[-1].step} |")
    for tag in TAGS:
        values = [event.value for event in events.Scalars(tag)]
        value = statistics.mean(values[1:] or values) if tag.startswith("speed/") else values[-1]
        print(f"| `{tag}` | {value:.4g} |")


def run(args):
    if args.of:
        return print_run(Path(args.of))
    print(f"{machine(args.device)}, torch {torch.__version__}\n")
    print("| network | dtype | scenes | ms per step | scenes per second | peak GiB | waits | kernels |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            parts = setup(network, args.device, folder, max(args.batches), args.options.split())
            options, tower, num_classes, make_batch = parts
            batches = [(scenes, make_batch(scenes)) for scenes in args.batches]
        for scenes, batch in batches:
            for amp in ("off", "bf16"):
                step = Step(argparse.Namespace(**{**vars(options), "amp": amp}), tower, num_classes)
                spent, *counts = measure(step, batch, args.repeats, args.device)
                row = [network, amp, scenes, f"{spent:.1f}", f"{scenes / spent * 1e3:.1f}", *counts]
                print("|", " | ".join(map(str, row)), "|", flush=True)
