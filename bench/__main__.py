# SPDX-License-Identifier: MIT
"""Measurements, each against what one would run otherwise, on the same input; from the repository root.

    python -m bench --help                       the commands
    python -m bench step --threads 1             a training step, and where its time goes
    python -m bench sample --plot sample.png     also as a figure

The candidates take turns in one process, and a ratio is the median over the turns with its quartiles. With --threads 1
the clock is the CPU time, which other work on the machine disturbs least; still, trust ratios more than milliseconds.
docs/benchmarks.md holds the published figures. Torch and the file of a command are imported only to run it.
"""
import argparse
import importlib
import importlib.util
import os

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
    "picture": "truth beside prediction on held-back rooms, as an image"}
REPEATS = {"step": 9, "gpu": 7, "loader": 5, "encode": 9, "sample": 9, "sparse": 15}  # the others measure once


def parse_args(argv=None):
    """The command and its options."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = {}
    for name, summary in COMMANDS.items():
        options[name] = command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(device="cpu", plot=None)
        if name not in ("ap", "loader"):  # which run on the CPU alone
            command.add_argument("--device", choices=("cpu", "cuda"), help="default: %(default)s")
        if name not in ("gpu", "speedrun", "meaning", "picture"):  # which have no figures to draw
            command.add_argument("--plot", metavar="PATH", help="also draw the figures, into this PNG file (stability: "
                                 "two files in this folder); needs matplotlib")
        command.add_argument("--threads", type=int, default=1 if name in ("stability", "meaning") else os.cpu_count(),
                             help="CPU threads (default: %(default)s)")
        if name in REPEATS:
            command.add_argument("--repeats", type=int, default=REPEATS[name], help="turns, at least 2 "
                                 "(default: %(default)s)")

    options["speedrun"].add_argument("--target", type=float, default=0.6, help="mIoU (default: %(default)s)")
    options["speedrun"].add_argument("--options", default="", help="more options of train.py, in one string")
    options["encode"].add_argument("--batch", type=int, help="images (default: 4, on a GPU 256)")
    options["scale"].add_argument("--max-points", type=int, default=1_000_000, help="of the largest scene "
                                  "(default: %(default)s)")
    options["step"].add_argument("--scenes", type=int, help="per batch (default: that of train.py, 1 for "
                                 "Res16UNet34C, 8 on a GPU)")
    options["step"].add_argument("--compile", action="store_true", help="also a step with train.py --compile")
    command = options["gpu"]
    command.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="scenes per batch (default: "
                         "1 4 8 16 32)")
    command.add_argument("--options", default="", help="more options of train.py, in one string")
    command.add_argument("--of", metavar="RUN", help="print what this finished run logged about its speed instead")
    command = options["stability"]
    command.add_argument("--quick", action="store_true", help="a smoke test: two draws, two tiny trainings")
    command.add_argument("--seeds", type=int, default=3, help="trainings per setting (default: %(default)s)")
    command.add_argument("--out", default="runs/stability", help="folder of stability.json; a training that it holds "
                         "with the same options is not repeated (default: %(default)s)")
    command = options["meaning"]
    command.add_argument("--seeds", type=int, default=3, help="trainings per setting (default: %(default)s)")
    command.add_argument("--tower", default=".cache/meaning/tower", help="folder of the small CLIP model; "
                         "trained if it is not there (default: %(default)s)")
    command.add_argument("--out", default="runs/meaning", help="folder of meaning.json; a training that it "
                         "holds with the same options is not repeated (default: %(default)s)")
    options["picture"].add_argument("--checkpoint", default="best.pt", help="of a training on the built-in rooms "
                                    "(default: %(default)s)")
    options["picture"].add_argument("--frames", type=int, nargs="+", default=[0, 5], help="which of 12 validation frames "
                                    "(default: 0 5)")
    options["picture"].add_argument("--cloud", metavar="FILE.ply", help="a cloud of predict.py instead")
    options["picture"].add_argument("--out", help="PNG file (default: docs/prediction.png, "
                                    "with --cloud docs/cloud.png)")

    args = parser.parse_args(argv)
    if getattr(args, "repeats", 2) < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    return args


def main(argv=None):
    """Runs one command and, if asked to, draws the panels that it returns."""
    args = parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    import torch
    from bench.timing import chart
    from support.runtime import configure_device
    torch.set_num_threads(args.threads)
    configure_device(torch.device(args.device))
    panels = importlib.import_module(f"bench.{args.command}").run(args)
    if args.plot and panels:  # stability draws its own
        chart(args.plot, panels)


if __name__ == "__main__":
    main()
