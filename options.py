# SPDX-License-Identifier: MIT
"""The command line of train.py: every option, its default and its check.

Imports the warm-up schedule and the names of the CLIP losses from losses.py, and reads the options of a checkpoint.
"""
import argparse

import torch

from checkpoint import STEP_FIELDS, read_checkpoint
from losses import CLIP_LOSSES, CONTRASTIVE, clip_loss_weight

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def int_list(text):
    """"10,20" -> (10, 20)."""
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 10,20, got {text!r}") from None


def float_list(text):
    """"0,0.001,0.01" -> (0.0, 0.001, 0.01)."""
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,0.001,0.01, got {text!r}") from None


def image_size(text):
    """"240,320" -> (240, 320)."""
    size = int_list(text)
    if len(size) != 2 or min(size) <= 0:
        raise argparse.ArgumentTypeError(f"expected height,width such as 240,320, got {text!r}")
    return size


def build_parser():
    """The one source of every default."""
    parser = argparse.ArgumentParser("train.py", description="Trains 3D scene segmentation with "
                                     "frozen CLIP features fused in.")
    g = parser.add_argument_group("data")
    g.add_argument("--data", default="rooms", help="'rooms' (built in) or a folder in ScanNet's exported 2D layout")
    g.add_argument("--classes", help="class list, lines 'id name' (default: classes.txt in the data folder)")
    g.add_argument("--scans", help="folder of ScanNet's whole scans: points from there, views from --data")
    g.add_argument("--label-map", help="scannetv2-labels.combined.tsv: class ids of --scans are that table's, "
                   "as in ScanNet200")
    g.add_argument("--train-split", help="file of scenes or scene/frame entries; needed for a data folder")
    g.add_argument("--val-split", help="likewise")
    g.add_argument("--rooms", type=int, default=32, help="built-in training rooms; validation has 3 for every 8")
    g.add_argument("--frames-per-room", type=int, default=4, help="pictures taken in each of them")
    g.add_argument("--points", type=int, default=4096, help="points drawn per sample")
    g.add_argument("--views", type=int, default=1, help="frames that make one sample")
    g.add_argument("--image-size", type=image_size, default=(240, 320), help="height,width that CLIP sees; multiples "
                   "of its patch")
    g.add_argument("--no-color", action="store_true", help="hide the points' colours from the 3D encoder")
    g.add_argument("--no-augment", action="store_true", help="no 3D augmentation")
    g.add_argument("--superpoints", type=int, default=128, help="per frame, for instances; 0: cubes of 4 voxels a side "
                   "serve")
    g.add_argument("--superpoint-cache", default=".cache/superpoints", help="folder where they are kept")
    g.add_argument("--workers", type=int, default=2, help="data-loading processes; 0: none")

    g = parser.add_argument_group("model")
    g.add_argument("--backbone", choices=("small", "res16unet34c"), default="small", help="the 3D encoder")
    g.add_argument("--voxel-size", type=float, default=0.08, help="metres")
    g.add_argument("--init-3d", metavar="CHECKPOINT", help="trained Res16UNet34C weights (ESAM, Mask3D, OpenScene)")
    g.add_argument("--no-clip", action="store_true", help="the 3D baseline: no pictures, no fusion, no CLIP loss")
    g.add_argument("--no-instances", action="store_true", help="semantics only (default: instances too, where the data "
                   "has their labels)")
    g.add_argument("--min-instance-points", type=int, default=100, help="smaller instances are neither predicted nor "
                   "scored")
    g.add_argument("--clip-model", default="ViT-B-16", help="an open_clip vision transformer")
    g.add_argument("--clip-pretrained", default="openai", help="open_clip tag, checkpoint file, or 'none': random")
    g.add_argument("--clip-blocks", type=int, default=0, help="last transformer blocks of CLIP to train; 0: frozen")
    g.add_argument("--clip-cache", default=".cache/clip", help="folder of encoded pictures; 'none': encode every time")
    g.add_argument("--depth-tolerance", type=float, default=0.05, help="metres a point may lie behind the depth image "
                   "and still be seen")

    g = parser.add_argument_group("loss")
    g.add_argument("--semantic-weight", type=float, help="default: 0.5 without CLIP, 0.4 with it")
    g.add_argument("--instance-weight", type=float, default=1.0, help="of the instance criterion")
    g.add_argument("--clip-warmup", type=int_list, default=(10, 20), help="epochs after which the CLIP loss's weight "
                   "changes; '--clip-warmup=-1 --clip-weights 0,W': W throughout")
    g.add_argument("--clip-weights", type=float_list, default=(0.0, 0.001, 0.01), help="its weight up to the first, "
                   "up to the second ..., and after the last of them")
    g.add_argument("--clip-loss", choices=tuple(CLIP_LOSSES), default="sigmoid", help="-log sigmoid(cos / t), 1 - cos, "
                   "or against the targets of other scenes or points: sigmoid or softmax")
    g.add_argument("--clip-target", choices=("global", "point"), default="global", help="the scene's CLIP feature, or "
                   "the one at the point")
    g.add_argument("--temperature", type=float, default=0.07, help="of the CLIP loss; floored at 0.1")
    g.add_argument("--gradient-flow-ratio", type=float, default=0.0, help="share of the CLIP loss's gradient that "
                   "reaches its target, 0 to 1; no effect on a frozen one")
    g.add_argument("--isolate-clip", action="store_true", help="CLIP loss weight 0 throughout: trains as without it, "
                   "to the bit")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=24, help="passes over the training samples")
    g.add_argument("--batch-size", type=int, default=4, help="samples per process and step")
    g.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    g.add_argument("--lr", type=float, default=2e-3, help="AdamW's highest learning rate")
    g.add_argument("--lr-3d", type=float, default=1.0, help="factor on the 3D encoder's learning rate")
    g.add_argument("--lr-clip", type=float, default=0.01, help="factor on freed CLIP blocks' learning rate")
    g.add_argument("--weight-decay", type=float, default=0.05, help="AdamW's, on matrices; 0: none")
    g.add_argument("--schedule", choices=("poly", "cosine"), default="poly", help="poly: (1 - t)^0.9")
    g.add_argument("--lr-warmup", type=int, default=50, help="optimiser steps of linear warm-up; 0: none")
    g.add_argument("--clip-norm", type=float, default=10.0, help="largest gradient norm")
    g.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off", help="autocast type")
    g.add_argument("--compile", action="store_true", help="torch.compile for the tower, the gate and the heads")
    g.add_argument("--seed", type=int, default=0, help="of weights, draws and augmentation")
    g.add_argument("--device", help="default: cuda where there is one, else cpu")

    g = parser.add_argument_group("run")
    g.add_argument("--runs", default="runs", help="folder that TensorBoard watches")
    g.add_argument("--name", help="run name (default: bifusion or baseline)")
    g.add_argument("--log-every", type=int, default=10, help="optimiser steps between entries in TensorBoard")
    g.add_argument("--eval-every", type=int, default=5, help="epochs between evaluations; each writes last.pt")
    g.add_argument("--max-bad-steps", type=int, default=10, help="the run ends after so many steps in a row "
                   "with a loss or gradient that is not finite; so many are saved in all")
    g.add_argument("--diagnose", type=int, default=0, metavar="K", help="optimiser steps between entries under "
                   "diagnose/; 0: none")
    g.add_argument("--resume", metavar="CHECKPOINT", help="go on from a last.pt; other options may be changed")
    g.add_argument("--eval", metavar="CHECKPOINT", help="evaluate only")
    g.add_argument("--replay", metavar="FILE", help="run a saved bad_step_N.pt again, under anomaly detection")
    return parser


def parse_args(argv=None):
    """Options of the command line; those of a checkpoint to resume or evaluate stand in for what is not given."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if sum(map(bool, (args.resume, args.eval, args.replay))) > 1:
        parser.error("--resume, --eval and --replay exclude each other")
    if args.resume or args.eval or args.replay:
        config = (read_checkpoint(args.replay, STEP_FIELDS) if args.replay else
                  read_checkpoint(args.resume or args.eval))["config"]
        parser.set_defaults(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
                               if k not in ("resume", "eval", "replay", "device")})
        args = parser.parse_args(argv)
    for name in ("points", "views", "epochs", "batch_size", "accumulate", "log_every", "eval_every",
                 "max_bad_steps", "rooms", "frames_per_room", "min_instance_points"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.data == "rooms" and args.scans:
        parser.error("--scans holds points alone: give --data, the folder of their frames, too")
    if args.label_map and not args.scans:
        parser.error("--label-map is of --scans: label images already hold that table's ids")
    for name in ("voxel_size", "instance_weight", "clip_norm", "lr"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be finite and above 0, got {getattr(args, name)}")
    for name in ("lr_3d", "lr_clip", "weight_decay", "depth_tolerance", "temperature"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be finite and at least 0, got {getattr(args, name)}")
    if not 0 <= args.gradient_flow_ratio <= 1:
        parser.error(f"--gradient-flow-ratio must be from 0 to 1, got {args.gradient_flow_ratio}")
    if args.compile and args.diagnose:
        parser.error("--diagnose goes backward twice through one graph, which --compile does not allow")
    for name in ("seed", "diagnose", "workers", "superpoints", "lr_warmup"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(args, name)}")
    if not all(0 <= weight < float("inf") for weight in args.clip_weights):
        parser.error(f"--clip-weights must be finite and at least 0, got {args.clip_weights}")
    if args.init_3d and args.backbone != "res16unet34c":
        parser.error("--init-3d holds Res16UNet34C weights: give --backbone res16unet34c too")
    try:
        clip_loss_weight(0, args.clip_warmup, args.clip_weights)
    except ValueError as error:
        parser.error(f"--clip-warmup, --clip-weights: {error}")
    if args.isolate_clip:
        args.clip_weights, args.gradient_flow_ratio = (0.0,) * len(args.clip_weights), 0.0
    alone = args.batch_size == 1 and args.clip_target == "global" and not (args.no_clip or args.eval)
    if args.clip_loss in CONTRASTIVE and alone and max(args.clip_weights) > 0:
        parser.error(f"--clip-loss {args.clip_loss} takes its negatives from the other scenes of a batch: give "
                     "--batch-size 2 or more, or --clip-target point")
    if args.semantic_weight is None:
        args.semantic_weight = 0.5 if args.no_clip else 0.4
    if not args.semantic_weight > 0:
        parser.error(f"--semantic-weight must be above 0, got {args.semantic_weight}")
    return args
