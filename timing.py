# SPDX-License-Identifier: MIT
"""What the benchmarks share: candidates that take turns, the peak of a process of its own, a chart.

Imports torch, and matplotlib where a chart is asked for.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def now(device="cpu"):
    """Seconds on the clock that other work on the machine disturbs least: of one thread the CPU time, else the wall's.

    On a GPU, once all that was asked of it is done.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def turns(candidates, repeats, device="cpu"):
    """{name: seconds of each repeat} of {name: function}, after one warm-up, the candidates taking turns."""
    seconds = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, function in candidates.items():
            start = now(device)
            function()
            if repeat:
                seconds[name].append(now(device) - start)
            else:
                now(device)
    return seconds


def median(seconds):
    """{name: median} of what `turns` gives."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds, name, base):
    """"1.23 (1.20 to 1.27)": median and quartiles over the turns of the time of one candidate over that of another."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(seconds[name], seconds[base])], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def exponent(sizes, values):
    """Slope of a straight line through the logarithms: 1 where a value grows as its size does."""
    return statistics.linear_regression(*(torch.tensor(x).log().tolist() for x in (sizes, values))).slope


def where(device):
    """The machine's part in a figure."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads {torch.get_num_threads()}"


def resident_peak():
    """GiB that this process has held at most; unlike ru_maxrss it knows nothing of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2 ** 20


ALONE = """
import importlib, json, sys, torch
from timing import resident_peak
module, name, threads, args = json.loads(sys.argv[1])
function = getattr(importlib.import_module(module), name)
torch.set_num_threads(threads)
before = resident_peak()
print(json.dumps([function(*args), before, resident_peak()]))
"""


def alone(function, *args):
    """function(*args) in a process of its own -> what it returns, and the GiB resident at most before it and after.

    A function of a module beside this one; arguments and result are such as JSON holds.
    """
    job = json.dumps([function.__module__, function.__name__, torch.get_num_threads(), args])
    run = subprocess.run([sys.executable, "-c", ALONE, job], cwd=Path(__file__).parent, stdout=subprocess.PIPE,
                         text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def require_matplotlib():
    """Ends the program with one line where a chart cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def chart(path, panels):
    """Draws {title: {name: number}} as bars and {title: {name: (sizes, values)}} as lines on logarithmic axes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    heights = [2.6 if any(isinstance(value, tuple) for value in series.values()) else 0.5 + 0.3 * len(series)
               for series in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, sum(heights) + 0.5), layout="constrained", squeeze=False,
                                height_ratios=heights)
    for axis, (title, series) in zip(axes[:, 0], panels.items()):
        axis.set_title(title, fontsize=9, loc="left")
        for name, value in series.items():
            if isinstance(value, tuple):
                axis.loglog(*value, "o-", label=name)
            else:
                axis.bar_label(axis.barh(name, value, color="C0"), fmt=" %.3g", fontsize=8)
        if any(isinstance(value, tuple) for value in series.values()):
            axis.legend(fontsize=8)
        else:
            axis.invert_yaxis()
            axis.margins(x=0.12)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drawn: {path}")
