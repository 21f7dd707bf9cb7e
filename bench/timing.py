# SPDX-License-Identifier: MIT
"""What the measurements share: a clock, candidates that take turns, the memory of a fresh process, a chart.

Imports torch, and matplotlib if a chart is asked for.
"""
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def now(device="cpu"):
    """Seconds: CPU time if torch uses one thread, because other work disturbs it least, else wall time.

    On a GPU it first waits until all queued work is done.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    if device == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def turns(candidates, repeats, device="cpu"):
    """{name: function} -> {name: seconds of each repeat}; they take turns, after a first one to warm up."""
    seconds = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, function in candidates.items():
            start = now(device)
            function()
            spent = now(device) - start
            if repeat:
                seconds[name].append(spent)
    return seconds


def median(seconds):
    """{name: median} of the result of `turns`."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds, name, base):
    """Time of one candidate over that of another, turn by turn, as "median (quartile to quartile)"."""
    ratios = [x / y for x, y in zip(seconds[name], seconds[base])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def exponent(sizes, values):
    """Slope of the line through the logarithms: 1 if values grow in proportion to sizes."""
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope


def machine(device):
    """The device as it is printed beside a figure."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, threads {torch.get_num_threads()}"


def resident_peak():
    """GiB that this process has held at most; on Linux ru_maxrss would count its parent, too."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30
    _, _, rest = Path("/proc/self/status").read_text().partition("VmHWM:")
    return int(rest.split()[0]) / 2 ** 20


FRESH_PROCESS = """
import importlib, json, sys, torch
from bench.timing import resident_peak
module, name, threads, args = json.loads(sys.argv[1])
function = getattr(importlib.import_module(module), name)
torch.set_num_threads(threads)
before = resident_peak()
print(json.dumps([function(*args), before, resident_peak()]))
"""


def in_fresh_process(function, *args):
    """Runs function(*args) in a new process -> its result, and the peak of resident GiB before and after.

    function: importable by name. Arguments and result: whatever JSON holds.
    """
    job = json.dumps([function.__module__, function.__name__, torch.get_num_threads(), args])
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, job], cwd=root, stdout=subprocess.PIPE,
                          text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def chart(path, panels):
    """Draws {title: {name: number}} as bars, {title: {name: (sizes, values)}} as lines on logarithmic axes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    has_lines = [any(isinstance(value, tuple) for value in series.values()) for series in panels.values()]
    heights = [2.6 if lines else 0.5 + 0.3 * len(series) for lines, series in zip(has_lines, panels.values())]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, sum(heights) + 0.5), layout="constrained",
                                squeeze=False, height_ratios=heights)
    for axis, lines, (title, series) in zip(axes[:, 0], has_lines, panels.items()):
        axis.set_title(title, fontsize=9, loc="left")
        for name, value in series.items():
            if lines:
                axis.loglog(*value, "o-", label=name)
            else:
                axis.bar_label(axis.barh(name, value, color="C0"), fmt=" %.3g", fontsize=8)
        if lines:
            axis.legend(fontsize=8)
        else:
            axis.invert_yaxis()
            axis.margins(x=0.12)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drawn: {path}")
