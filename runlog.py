# SPDX-License-Identifier: MIT
"""What a run writes to TensorBoard: averages over a window of steps, texts, and visualizations of a sample.

A number that is added in every step is averaged from one log to the next; docs/tensorboard.md explains every tag.
Tensors stay on their device until a log is due, and then go to the host in one copy.

TensorBoard may fail, the training may not: an OSError of the writer (a full disk, a folder that is gone) is reported
once, and the writer is opened again at a later log.

Imports torch and, where a log is opened, tensorboard.
"""
import colorsys
import resource
import sys
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F


class RunLog:
    """Collects what a step reports, and writes it every `log_every` steps.

    folder: of the run, or None to write nothing (the other processes, benchmarks). purge_step: when a run is resumed,
    the step from which on old entries are dropped. modules: {name: nn.Module} whose gradient norms are logged.
    mean_over_processes: averages a tensor over all processes; every process calls it equally often. report: takes a
    text about a writer that fails.
    """

    def __init__(self, folder=None, log_every=10, purge_step=None, modules=None, mean_over_processes=None,
                 report=print):
        self.folder = folder
        self.writer = None
        self.report = report
        self.failed = False
        self.log_every = log_every
        self.modules = modules or {}
        self.mean_over_processes = mean_over_processes or (lambda values: values)
        self.window = defaultdict(list)  # 0-d tensors
        self.host_window = defaultdict(list)  # numbers of this process
        self.step = 0
        self.due = False
        self.open_writer(purge_step)

    def open_writer(self, purge_step=None):
        """Opens TensorBoard's file if there is a folder and it is not open."""
        if self.folder is None or self.writer is not None:
            return
        from torch.utils.tensorboard import SummaryWriter
        try:
            self.writer = SummaryWriter(self.folder, purge_step=purge_step)
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        self.writer = None
        if not self.failed:
            self.report(f"TensorBoard cannot write to {self.folder}: {error}. The training goes on without.")
        self.failed = True

    def call(self, method, *args):
        """Calls a method of the writer, if there is one."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except OSError as error:  # of this call, or of an earlier one: the writer works in a thread of its own
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
        """Writes the averages of the window and `latest`, {name: value of this step alone}, and begins a new window.

        Every process must call it. Returns the averages as {name: float}.
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
        """images: {name: (3, H, W) in [0, 1]}."""
        for name, image in images.items():
            self.call("add_image", name, image, self.step)

    def close(self):
        self.call("close")


def peak_memory_gib(device):
    """GiB held at most so far: of the GPU, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ---------------------------------------------------------------------------------------------- visualizations


def palette(count):
    """`count` RGB colours in [0, 1], far apart in hue -> (count, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.4 * (i % 2), 1 - 0.25 * (i % 3))
                         for i in range(count)]).view(-1, 3)


def splat(image: Tensor, uv: Tensor, colors: Tensor, radius=1) -> Tensor:
    """A darkened copy of an image with a square painted around every point.

    image (3, H, W) in [0, 1], uv (n, 2) pixels, colors (n, 3); a square has 2 * radius + 1 pixels a side and is cut at
    the border of the image.
    """
    image = image * 0.4
    h, w = image.shape[1:]
    u, v = uv.round().long().unbind(1)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            inside = (v + dy >= 0) & (v + dy < h) & (u + dx >= 0) & (u + dx < w)
            image[:, v[inside] + dy, u[inside] + dx] = colors[inside].T.to(image)
    return image


def pca_colors(feats: Tensor) -> Tensor:
    """feats (n, C >= 3) -> (n, 3) in [0, 1]: the three directions of most variance.

    Each is scaled to its 2nd to 98th percentile; everything is black if an entry is not finite.
    """
    if len(feats) == 0 or not feats.isfinite().all():
        return torch.zeros(len(feats), 3, device=feats.device)
    feats = feats.float() - feats.float().mean(0)
    _, directions = torch.linalg.eigh(feats.T @ feats)  # ascending; unlike pca_lowrank it draws no random numbers
    feats = feats @ directions[:, -3:].flip(1)
    low = torch.quantile(feats, 0.02, dim=0)
    high = torch.quantile(feats, 0.98, dim=0)
    return ((feats - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def visualizations(image, uv, depth, labels, fused, clip_map):
    """Named images (3, H, W) in [0, 1] that show the points of one view of one sample.

    image (3, H, W); of the n >= 0 points that the view sees: uv (n, 2), depth (n,), labels {name: (n,) int64, -1 =
    none}, fused (n, C); clip_map (C', Hf, Wf) or None. Depth is shown by rank, from red (near) to blue (far).
    """
    far = (depth.argsort().argsort() / max(1, len(depth) - 1))[:, None]
    named = {"input_points": splat(image, uv, torch.cat([1 - far, far * 0.6, far], 1), radius=0),
             "fused_pca": splat(image, uv, pca_colors(fused))}
    for name, index in labels.items():
        colors = palette(256).to(index.device)[index % 256]
        named[name] = splat(image, uv, colors.where(index[:, None] >= 0, 0.4))
    if clip_map is not None:
        cells = pca_colors(clip_map.flatten(1).T).T.unflatten(1, clip_map.shape[1:])  # (3, Hf, Wf)
        named["clip_pca"] = F.interpolate(cells[None], size=image.shape[1:], mode="nearest")[0]
    return named
