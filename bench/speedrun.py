# SPDX-License-Identifier: MIT
"""`python -m bench speedrun`: seconds from the start to a mIoU of 0.60 on the built-in rooms.

A training by train.py with a short schedule, from an empty cache, so that reading, encoding and evaluations
count. Imports train.
"""
import subprocess
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from bench.timing import machine

OPTIONS = ("--clip-pretrained none --clip-warmup=-1 --clip-weights 0,0.01 --num-points 1024 "
           "--epochs 15 --eval-every 15 --image-size 144,192")


def run(args):
    """Prints seconds and mIoU of every evaluation, and the first that reaches the target."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        train.main([*OPTIONS.split(), "--device", args.device, "--cache", f"{folder}/cache",
                    "--runs", f"{folder}/runs", *args.options.split()])
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
        scores = [(event.wall_time - start, event.value) for event in events.Scalars("val/miou")]
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    print(f"commit {commit or 'unknown'}, {machine(args.device)}, {OPTIONS} {args.options}")
    for seconds, miou in scores:
        print(f"{seconds:7.0f} s  mIoU {miou:.3f}")
    reached = [f"{seconds:.0f} s" for seconds, miou in scores if miou >= args.target]
    print(f"mIoU {args.target}: {(reached or ['not reached'])[0]}")
