# SPDX-License-Identifier: MIT
"""What a run writes to TensorBoard: averages over a window of steps, texts, images and clouds.

A number that is added in every step is averaged from one log to the next; docs/tensorboard.md explains
every tag. Tensors stay on their device until a log is due, and then go to the host in one copy.

TensorBoard may fail, the training may not: an error of the writer (a full disk, a folder that is gone)
is reported once, and the writer is opened again at a later log.

Imports torch, numpy, tqdm and, when a log is opened, tensorboard.
"""
import hashlib
import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

RETRY_SECONDS = 60  # between attempts to open a writer again
LINE_SECONDS = 180  # between lines about the progress, without a terminal


class RunLog:
    """Collects what a step reports, and writes it every `log_every` steps.

    folder: of the run, or None to write nothing (the other processes, benchmarks). modules: {name:
    nn.Module} whose gradient norms are logged. mean_over_processes: averages a tensor over all processes;
    every process calls it equally often. report: takes a text about a writer that fails. step: the last
    one before a resumed run; what the folder holds of later steps is not shown any more.
    """

    def __init__(self, folder=None, log_every=10, modules=None, mean_over_processes=None, report=print, step=0):
        self.folder = folder
        self.writer = None
        self.report = report
        self.failed = False
        self.retry_at = -math.inf
        self.written = {}  # what each tag of images and clouds shows by now
        self.log_every = log_every
        self.modules = modules or {}
        self.mean_over_processes = mean_over_processes or (lambda values: values)
        self.window = defaultdict(list)  # 0-d tensors
        self.host_window = defaultdict(list)  # numbers of this process
        self.step = step
        self.due = False
        self.open_writer()

    def open_writer(self):
        """Opens TensorBoard's file if there is a folder, it is not open, and it did not fail just now."""
        if self.folder is None or self.writer is not None or time.monotonic() < self.retry_at:
            return
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:  # fails here, and not in the writer's thread
                file.write(bytes(2 ** 16))
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
            self.written.clear()
        except Exception as error:  # whatever is wrong with TensorBoard: the training is worth more
            self.give_up(error)

    def give_up(self, error):
        self.writer = None
        self.retry_at = time.monotonic() + RETRY_SECONDS
        if not self.failed:
            self.report(f"TensorBoard cannot write to {self.folder}: {error}. The training goes on without.")
        self.failed = True

    def call(self, method, *args, **options):
        """Calls a method of the writer, if there is one.

        The writer works in a thread of its own: what goes wrong there is raised by a later call, and
        what was queued until then is lost.
        """
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args, **options)
        except Exception as error:
            self.give_up(error)

    def begin_step(self, step, last=False):
        """step: number of this optimizer step, from 1; the last one of a run is always written."""
        self.step = step
        self.due = step % self.log_every == 0 or last
        if self.due:
            self.open_writer()

    def add(self, name, value):
        """A 0-d tensor, averaged over window and processes, or a number, averaged over the window."""
        if isinstance(value, Tensor):
            self.window[name].append(value.detach())
        else:
            self.host_window[name].append(value)

    def add_losses(self, terms, weighted):
        """terms: {name: raw 0-d tensor}; weighted: {name: what it adds to the total}."""
        self.add("loss/total", sum(weighted.values()))
        for name in terms:
            self.add(f"loss/{name}", terms[name])
            self.add(f"weighted/{name}", weighted[name])

    def add_gradient_norms(self):
        """Norm of the gradient of each module, in steps that are written."""
        if not self.due or self.writer is None:
            return
        for name, module in self.modules.items():
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                self.add_scalar(f"grad/{name}", torch.stack(torch._foreach_norm(grads)).norm())

    def write(self, latest):
        """Writes the averages of the window, {name: float}, and `latest`, values of this step alone.

        Begins a new window and returns the averages. Every process must call it.
        """
        means = [torch.stack(values).float().mean() for values in self.window.values()]
        values = self.mean_over_processes(torch.stack(means)).tolist()  # one copy to the host
        averages = dict(zip(self.window, values))
        averages |= {name: sum(values) / len(values) for name, values in self.host_window.items()}
        for name, value in {**averages, **latest}.items():
            self.add_scalar(name, value)
        self.window.clear()
        self.host_window.clear()
        return averages

    def add_scalar(self, name, value):
        self.call("add_scalar", name, value, self.step)

    def add_text(self, name, text):
        self.call("add_text", name, text.replace("\n", "  \n"), self.step)
        self.call("flush")

    def add_table(self, name, values):
        """A dict as a table in the text tab."""
        rows = [f"| {key} | {value} |" for key, value in sorted(values.items())]
        self.call("add_text", name, "\n".join(["| option | value |", "| --- | --- |", *rows]), self.step)

    def add_histogram(self, name, values):
        if len(values) and values.isfinite().all():  # TensorBoard refuses others
            self.call("add_histogram", name, values, self.step)

    def add_images(self, images):
        """images: {tag: (3, H, W)}. What a tag shows already is not written again."""
        for tag, image in images.items():
            image = (image * 255).round().to(torch.uint8).cpu().numpy()
            if self.is_new(tag, image):
                self.call("add_image", tag, image, self.step)

    def add_clouds(self, clouds):
        """clouds: {tag: (points (N, 3) with z up, colors (N, 3))}, as `add_images`."""
        for tag, (points, colors) in clouds.items():
            if len(points) == 0:
                continue
            points = points.float().cpu()[:, [0, 2, 1]].numpy() * np.float32([1, 1, -1])  # three.js has y up
            colors = (colors * 255).round().to(torch.uint8).cpu().numpy()
            if self.is_new(tag, points, colors):
                self.call("add_mesh", tag, points[None], colors[None], None, mesh_scene(points), self.step)

    def is_new(self, tag, *arrays):
        """Whether arrays differ from those of the last call for this tag."""
        digest = hashlib.sha1(b"".join(array.tobytes() for array in arrays)).digest()
        is_new = self.written.get(tag) != digest
        self.written[tag] = digest
        return is_new

    def close(self):
        self.call("close")


def peak_memory_gib(device):
    """GiB held at most so far: of the GPU, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def mesh_scene(points):
    """How TensorBoard's mesh view shows points (N, 3) with y up: obliquely from above, as squares."""
    low, high = points.min(0), points.max(0)
    extent = high - low
    center = (low + high) / 2
    radius = max(float(np.linalg.norm(extent)) / 2, 1e-3)
    area = 2 * float(extent @ np.roll(extent, 1))  # of the bounding box
    size = max(1.2 * math.sqrt(area / len(points)), radius / 60)
    towards = np.float32([0.45, 0.75, 0.5])  # from the center to the camera
    position = center + 1.7 * radius * towards / np.linalg.norm(towards)
    return {"material": {"cls": "PointsMaterial", "size": size},
            "camera": {"cls": "PerspectiveCamera", "fov": 60, "near": radius / 100, "far": radius * 100,
                       "position": position.tolist(), "lookAt": center.tolist()}}


class ProgressBar:
    """A progress bar on a terminal; elsewhere, in a log say, a line every LINE_SECONDS.

    total, initial: samples. enabled: false in the other processes, which show nothing.
    """

    def __init__(self, total, initial=0, enabled=True):
        self.total, self.done, self.initial = total, initial, initial
        self.enabled = enabled
        self.values = {}  # shown beside it
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=initial, unit="sample", smoothing=0.05, dynamic_ncols=True)

    def show(self, **values):
        """Numbers that stand beside the bar from now on."""
        self.values |= {name: f"{value:.3f}" for name, value in values.items()}
        if self.bar is not None:
            self.bar.set_postfix(**self.values)

    def update(self, samples):
        self.done += samples
        if self.bar is not None:
            self.bar.update(samples)
        elif self.enabled and time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            print(self.line(self.last_line - self.started), flush=True)

    def line(self, seconds):
        """What the bar says after so many seconds, as text."""
        rate = (self.done - self.initial) / seconds
        values = "".join(f", {name} {value}" for name, value in self.values.items())
        return (f"{self.done} of {self.total} samples{values}, {rate:.2f} samples per second, "
                f"{(self.total - self.done) / rate / 60:.0f} minutes left")

    def close(self):
        if self.bar is not None:
            self.bar.close()
