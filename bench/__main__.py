# SPDX-License-Identifier: MIT
"""Measurements, each against what one would run otherwise, on the same input; from the repository root.

    python -m bench --help                       the commands
    python -m bench step --threads 1             a training step, and where its time goes
    python -m bench sample --plot sample.png     also as a figure

The candidates take turns in one process, and a ratio is the median over the turns with its quartiles.
With --threads 1 the clock is the CPU time, which other work on the machine disturbs least; still, trust
ratios more than milliseconds. docs/benchmarks.md holds the published figures. Torch and the file of a
command are imported only to run it.
"""
import argparse
import importlib
import importlib.util
import os
import sys

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
    parser = argparse.ArgumentParser("python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {}
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(device="cpu", plot=None)
        add[name] = command.add_argument
        if name not in ON_CPU:
            add[name]("--device", choices=("cpu", "cuda"), help="where to measure")
        if name not in NO_FIGURES:
            add[name]("--plot", metavar="PATH", help="also draw the figures, into this PNG file; "
                      "needs matplotlib")
        threads = 1 if name in TRAININGS else os.cpu_count()
        add[name]("--threads", type=int, default=threads, help="CPU threads")
        if name in REPEATS:
            add[name]("--repeats", type=int, default=REPEATS[name], help="turns, at least 2")
        add[name]("--debug", action="store_true", help="show the traceback of an error")

    add["speedrun"]("--target", type=float, default=0.6, help="mIoU")
    add["speedrun"]("--options", default="", help="more options of train.py, in one string")
    add["encode"]("--batch", type=int, help="images; not given: 4, on a GPU 256")
    add["scale"]("--max-points", type=int, default=1_000_000, help="of the largest scene")
    add["step"]("--scenes", type=int, help="per batch; not given: that of train.py, 1 for Res16UNet34C, "
                "8 on a GPU")
    add["step"]("--compile", action="store_true", help="also a step with train.py --compile")
    add["gpu"]("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="scenes per batch")
    add["gpu"]("--options", default="", help="more options of train.py, in one string")
    add["gpu"]("--of", metavar="RUN", help="print what this finished run logged about its speed instead")
    add["stability"]("--quick", action="store_true", help="a smoke test: two draws, two tiny trainings")
    for name in TRAININGS:
        add[name]("--seeds", type=int, default=3, help="trainings per setting")
        add[name]("--out", default=f"runs/{name}", help=f"folder of {name}.json; a training that it holds "
                  "with the same options is not repeated")
    add["meaning"]("--tower", default=".cache/meaning/tower", help="folder of the small CLIP model; "
                   "trained if it is not there")
    add["check"]("--seeds", type=int, default=2, help="of rooms, and of walks through rooms")
    add["check"]("--only", default="", help="sets with this in their title: rooms, walk or ycbv")
    add["picture"]("--checkpoint", default="best.pt", help="of a training on the built-in rooms")
    add["picture"]("--frames", type=int, nargs="+", default=[0, 5], help="which of 12 validation frames")
    add["picture"]("--cloud", metavar="FILE.ply", help="a cloud of predict.py instead")
    add["picture"]("--out", help="PNG file; not given: docs/prediction.png, with --cloud docs/cloud.png")

    args = parser.parse_args(argv)
    if getattr(args, "repeats", 2) < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    """Runs one command and, if asked to, draws the panels that it returns."""
    args = parse_args(argv)
    import torch
    from bench.timing import chart
    from support.runtime import configure_device, run_command
    torch.set_num_threads(args.threads)
    configure_device(torch.device(args.device))

    def measure():
        panels = importlib.import_module(f"bench.{args.command}").run(args)
        if args.plot and panels:  # stability draws its own
            chart(args.plot, panels)

    run_command(measure)


if __name__ == "__main__":
    sys.argv[0] = "python -m bench"  # in errors
    main()
