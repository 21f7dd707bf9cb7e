# SPDX-License-Identifier: MIT
"""Measurements, each against what one would run otherwise, on the same input; from the repository root.

    python -m bench --help                       the commands
    python -m bench step --threads 1             a training step, and where its time goes
    python -m bench sample --plot sample.png     also as a figure

The candidates take turns in one process, and a ratio is the median over the turns with its quartiles.
With --threads 1 the clock is the CPU time, which other work on the machine disturbs least; still, trust
ratios more than milliseconds. docs/benchmarks.md holds the published figures. The file of a command is
imported only to run it.
"""
import argparse
import importlib
import importlib.util
import os
import sys

import torch

from bench.timing import chart
from support.distributed import setup
from support.runtime import (Parser, configure_device, number_in, png_file, positive_int, run_command,
                             writable_folder)

COMMANDS = {
    "step": "a training step against the 3D baseline's, and where its time goes",
    "gpu": "the training step by batch size and dtype: rate, memory, waits, kernels",
    "loader": "frames per second and worker, against a plain loader",
    "scale": "projection, sampling and gate for 10,000 to 1,000,000 points",
    "encode": "spatial and global CLIP features, against open_clip's encode_image",
    "sample": "bilinear features of points, against a loop of grid_sample",
    "sparse": "sparse convolution against spconv; Res16UNet34C: step, maps, memory, growth",
    "volt": "a training step of Volt-S and of Res16UNet34C: operators, FLOP, bytes, seconds",
    "ap": "ScanNet's average precision of 100 large scenes",
    "speedrun": "seconds to a mIoU of 0.60 on the built-in rooms",
    "stability": "the study of CLIP consistency losses on hostile features",
    "meaning": "what CLIP's meaning is worth, with a small tower trained here",
    "check": "how often check.py errs, on clean data sets and on planted faults",
    "picture": "truth beside prediction on held-back rooms, as an image"}
REPEATS = {"step": 9, "gpu": 7, "loader": 5, "encode": 9, "sample": 9, "sparse": 15}  # else: once
ON_CPU = ("ap", "loader", "check")  # these do not know a GPU
NO_FIGURES = ("gpu", "speedrun", "meaning", "picture", "check")
TRAININGS = ("stability", "meaning")  # these run many; their bits depend on the threads


def parse_args(argv=None):
    """The command and its options."""
    parser = Parser("python -m bench", __doc__, argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {}
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(device="cpu", plot=None)
        add[name] = command.add_argument
        if name not in ON_CPU:
            add[name]("--device", choices=("cpu", "cuda"), help="where to measure")
        if name not in NO_FIGURES:
            add[name]("--plot", metavar="FILE.png", type=png_file, help="also draw the figures; needs "
                      "matplotlib")
        threads = 1 if name in TRAININGS else os.cpu_count()
        add[name]("--threads", type=number_in(int, 1, 1024), default=threads, help="CPU threads")
        if name in REPEATS:
            add[name]("--repeats", type=number_in(int, 2), default=REPEATS[name], help="turns")

    add["speedrun"]("--target", type=number_in(float, 0.0, 1.0), default=0.6, help="mIoU")
    add["speedrun"]("--options", default="", help="more options of train.py, in one string")
    add["encode"]("--batch", type=positive_int, help="images; not given: 4, on a GPU 256")
    add["scale"]("--max-points", type=number_in(int, 11_000), default=1_000_000, help="of the largest scene")
    add["step"]("--scenes", type=positive_int, help="per batch; not given: that of train.py, 1 for "
                "Res16UNet34C, 8 on a GPU")
    add["step"]("--compile", action="store_true", help="also a step with train.py --compile")
    add["gpu"]("--batches", type=positive_int, nargs="+", default=[1, 4, 8, 16, 32], help="scenes per batch")
    add["gpu"]("--options", default="", help="more options of train.py, in one string")
    add["gpu"]("--of", metavar="RUN", help="print what this finished run logged about its speed instead")
    add["stability"]("--quick", action="store_true", help="a smoke test: two draws, two tiny trainings")
    for name in TRAININGS:
        add[name]("--seeds", type=positive_int, default=3, help="trainings per setting")
        add[name]("--out", type=writable_folder, default=f"runs/{name}", help=f"folder of {name}.json; a "
                  "training that it holds with the same options is not repeated")
    add["meaning"]("--tower", type=writable_folder, default=".cache/meaning/tower", help="folder of the "
                   "small CLIP model; trained if it is not there")
    add["check"]("--seeds", type=positive_int, default=2, help="of rooms, and of walks through rooms")
    add["check"]("--only", default="", help="sets with this in their title: rooms, walk or ycbv")
    add["picture"]("--checkpoint", default="best.pt", help="of a training on the built-in rooms")
    add["picture"]("--frames", type=number_in(int, 0, 11), nargs="+", default=[0, 5],
                   help="which of 12 validation frames")
    add["picture"]("--cloud", metavar="FILE.ply", help="a cloud of predict.py instead")
    add["picture"]("--out", metavar="FILE.png", type=png_file,
                   help="not given: docs/prediction.png, with --cloud docs/cloud.png")

    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    """Runs one command and, if asked to, draws the panels that it returns."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)

    def measure():
        setup(args.device)  # an error if there is no such device
        configure_device(torch.device(args.device))
        panels = importlib.import_module(f"bench.{args.command}").run(args)
        if args.plot and panels:  # stability draws its own
            chart(args.plot, panels)

    run_command(measure)


if __name__ == "__main__":
    sys.argv[0] = "python -m bench"  # in errors
    main()
