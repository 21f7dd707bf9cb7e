# SPDX-License-Identifier: MIT
"""Trains 3D scene segmentation with frozen CLIP features fused in.

    python train.py --clip-warmup 10,20                                the built-in rooms, no download
    python train.py --data SCANS --train-split train.txt --val-split val.txt --voxel-size 0.02
    python train.py --no-clip                                          the 3D baseline
    python train.py --resume runs/NAME/last.pt                         go on
    python train.py --eval runs/NAME/best.pt                           score only
    python train.py --replay runs/NAME/bad_step_N.pt                   run a non-finite step again
    torchrun --nproc-per-node 4 train.py --amp bf16                    one node with 4 GPUs
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --amp bf16
    tensorboard --logdir runs

The file reads from top to bottom: the options, the parts of a run, one training step, and `main`, setup
and loop. To change the network see model.py; a loss term is one entry of `loss_weights` and one of
`compute_losses`; a data set is one line of `open_frames` in sources/open.py; the schedule is
`lr_factor`.
"""
import itertools
import json
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from check import quick_check, unknowns
from data import PointDataset, SceneDataset, check_frames, to_device, up_rotation, upright
from evaluate import evaluate, format_metrics, log_metrics, visualize
from losses import (CLIP_LOSSES, INSTANCE_WEIGHTS, ClipConsCriterion, InstanceCriterion, SemanticCriterion,
                    clip_loss_weight, lovasz_loss)
from model import (BACKBONES, batches_for, build_model, build_tower, compile_parts, count_features, fingerprint_of,
                   gate_name, load_weights, logged_modules, open_backbone, restore_model)
from sources.open import open_frames, open_scans
from sources.scannet import check_splits
from sparse_unet import COLORS
from superpoints import VERSION, oversegment
from support.average import MovingAverage
from support.cache import FeatureCache, Store, SuperpointCache, content_key
from support.checkpoint import (STEP_FIELDS, goes_on_in_place, lock_folder, read_checkpoint, run_folder,
                                write_atomically, write_or_warn)
from support.diagnose import NonFiniteGuard, fusion_statistics, grouped, replay_step, term_statistics
from support.distributed import (ResumableSampler, average_buffers, average_gradients, gather_objects,
                                 leave_processes, setup, synchronize_batch_norm, world_mean)
from support.queries import TextQueries
from support.runlog import ProgressBar, RunLog, peak_memory_gib
from support.runtime import (Console, Parser, StopRequest, checked_by, choose_threads, configure_device,
                             image_size, init_worker, list_of, loader_options, mean_std, nonnegative_float,
                             nonnegative_int, number_in, positive_float, positive_int, run_command)

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DATA_OPTIONS = ("data", "classes", "scans", "label_map", "train_split", "val_split", "rooms",
                "frames_per_room", "class_ids")
LR_CLIP = 0.01  # learning rate multiplier of trained CLIP blocks

# ---------------------------------------------------------------------------------------------- options


def build_parser():
    """The one source of every default."""
    parser = Parser("train.py", "Trains 3D scene segmentation with frozen CLIP features fused in.")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="rooms", help="'rooms' (built in) or a folder in ScanNet's exported 2D "
        "layout")
    add("--classes", help="class list, one 'id name' pair per line; not given: classes.txt in the "
        "folder")
    add("--scans", help="folder of whole ScanNet scans: points from there, views from --data")
    add("--label-map", help="scannetv2-labels.combined.tsv: for scans if the class list holds that "
        "table's ids (ScanNet200), for exported frames if it holds those of NYU40 (ScanNet20)")
    add("--train-split", help="file with one scene or scene/frame per line; needed for a data folder")
    add("--val-split", help="the same for validation")
    add("--rooms", type=positive_int, default=32, help="built-in training rooms")
    add("--val-rooms", type=positive_int, help="built-in validation rooms; not given: 3 per 8 training rooms")
    add("--frames-per-room", type=positive_int, default=4, help="images taken in each room")
    add("--num-points", type=positive_int, default=4096, help="points drawn per sample")
    add("--num-views", type=positive_int, default=1, help="frames per sample")
    add("--image-size", type=image_size, default=(240, 320), help="height,width that CLIP sees, "
        "multiples of its patch size")
    add("--up", type=checked_by(up_rotation), default="z", help="axis of the data's world that points "
        "up, z, -y, ... or a vector x,y,z; negative ones as --up=-y")
    add("--no-check", action="store_true", help="train although the cameras or depth look wrong, see "
        "docs/check.md")
    add("--no-color", action="store_true", help="hide the points' colors from the 3D encoder")
    add("--normals", action="store_true", help="show the 3D encoder the surface's normals, too: of depth, "
        "or of the meshes of --scans")
    add("--superpoints", type=nonnegative_int, default=128, help="superpoints per frame, for "
        "instances; 0: cubes of 4 voxels stand in for them")
    add("--cache", default=".cache", help="folder for CLIP features and superpoints; 'none': compute "
        "them every time")
    add("--workers", type=nonnegative_int, default=2, help="data-loading processes; 0: load in the "
        "loop")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=tuple(BACKBONES), help="the 3D encoder; not given: small, or the network "
        "of --init-3d")
    add("--colors", choices=tuple(COLORS), help="what the 3D encoder sees of the points' colors, see "
        "docs/backbones.md; not given: signed, or as the weights of --init-3d were trained")
    add("--voxel-size", type=number_in(float, 0.001, 1.0), default=0.08, help="meters")
    add("--init-3d", metavar="CHECKPOINT", help="trained weights of the 3D encoder: of ESAM, "
        "oneformer3d, Mask3D, UnScene3D, LanguageGroundedSemseg, OpenScene, or of a run")
    add("--drop-path", type=number_in(float, 0.0, 0.9), default=0.0, help="of volt-*: how often the last "
        "block is skipped for a token; the others less, the first never")
    add("--no-clip", action="store_true", help="the 3D baseline: no images, no fusion, no CLIP loss")
    add("--no-instances", action="store_true", help="semantics only, even if the data has instance "
        "labels")
    add("--min-instance-points", type=positive_int, default=100, help="smaller instances are neither "
        "predicted nor scored")
    add("--clip-model", default="ViT-B-16", help="an open_clip vision transformer")
    add("--clip-pretrained", default="openai", help="open_clip tag, checkpoint file, or 'none': random")
    add("--clip-mean-std", type=mean_std, metavar="NUMBERS|TAG", help="scaling of images that CLIP "
        "weights from a file were trained with: 3 means and 3 standard deviations, or an open_clip tag "
        "that has it; needed if the tags of the model disagree")
    add("--clip-blocks", type=nonnegative_int, default=0, help="last transformer blocks of CLIP to "
        "train; 0: frozen")

    add = parser.add_argument_group("loss").add_argument
    add("--semantic-weight", type=nonnegative_float, help="weight of the semantic loss; 0: labels train "
        "nothing, see docs/losses.md; not given: 0.4, and 0.5 with --no-clip")
    add("--mix", type=number_in(float, 0.0, 1.0), default=0.0, metavar="P", help="how often the 3D encoder sees "
        "two samples of a batch as one scene (Mix3D)")
    add("--label-smoothing", type=number_in(float, 0.0, 0.9), default=0.0, help="share of a point's label "
        "that the semantic loss spreads over all classes")
    add("--lovasz", type=nonnegative_float, default=0.0, metavar="W", help="weight of the Lovasz-softmax "
        "loss, which follows the IoU; 0: none")
    add("--clip-warmup", type=list_of(int), default=(10, 20), help="last epoch, from 0, of each weight "
        "of the CLIP loss but the last; '--clip-warmup=-1 --clip-weights 0,W': W throughout")
    add("--clip-weights", type=list_of(nonnegative_float), default=(0.0, 0.001, 0.01),
        help="the weights: 0 for epochs 0 to 10, 0.001 for 11 to 20, 0.01 from 21 on")
    add("--clip-loss", choices=CLIP_LOSSES, default="sigmoid", help="form of the CLIP loss, see "
        "docs/losses.md")
    add("--clip-target", choices=("global", "point"), default="global", help="tie a point to the CLIP "
        "feature of its scene, or to the one that it projects to")
    add("--temperature", type=nonnegative_float, default=0.07, help="of the CLIP loss; floored at 0.1")
    add("--isolate-clip", action="store_true", help="weight 0 throughout: trains bit-exactly as "
        "without the CLIP loss")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive_int, default=24, help="passes over the training samples")
    add("--batch-size", type=positive_int, default=4, help="samples per process and micro-batch")
    add("--grad-accum", type=positive_int, default=1, help="micro-batches per optimizer step")
    add("--lr", type=positive_float, default=2e-3, help="peak learning rate of AdamW")
    add("--lr-3d", type=nonnegative_float, default=1.0, help="multiplier for the 3D encoder")
    add("--weight-decay", type=nonnegative_float, default=0.05, help="on matrices; 0: none")
    add("--lr-warmup", type=nonnegative_int, default=50, help="optimizer steps of linear warm-up; 0: "
        "none")
    add("--ema", type=number_in(float, 0.0, 0.99999), default=0.0, metavar="DECAY", help="evaluate the moving "
        "average of all weights, with a decay per step such as 0.999; 0: the last weights")
    add("--max-grad-norm", type=positive_float, default=10.0, help="larger gradients are scaled down "
        "to it")
    add("--amp", choices=tuple(AMP_DTYPES), default="off", help="autocast dtype; bf16 is recommended "
        "on a GPU")
    add("--compile", action="store_true", help="torch.compile for the tower, the gate and the heads")
    add("--seed", type=nonnegative_int, default=0, help="of weights, sampling and augmentation")
    add("--deterministic", action="store_true", help="on a GPU: the same numbers in every run, as "
        "always on a CPU; slower, see docs/gpus.md")
    add("--device", help="not given: cuda if there is one, else cpu")

    add = parser.add_argument_group("run").add_argument
    add("--runs", default="runs", help="folder that TensorBoard watches")
    add("--name", help="name of the run; not given: bifusion or baseline")
    add("--log-every", type=positive_int, default=10, help="optimizer steps between TensorBoard "
        "entries")
    add("--eval-every", type=positive_int, default=5, help="epochs between evaluations; best.pt is "
        "written at the best of them")
    add("--save-every", type=nonnegative_int, default=0, metavar="N", help="optimizer steps between "
        "writings of last.pt; 0: once per epoch")
    add("--diagnose", type=nonnegative_int, default=0, metavar="K", help="optimizer steps between "
        "entries under diagnose/, see docs/diagnostics.md; 0: none")
    add("--resume", metavar="CHECKPOINT", help="go on from a last.pt, with its options if none are "
        "given")
    add("--eval", metavar="CHECKPOINT", help="score only")
    add("--replay", metavar="FILE", help="run the non-finite step of a bad_step_N.pt again, see "
        "docs/diagnostics.md")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


# what a checkpoint does not carry over: where things are written, and what was asked of this one start
NOT_IN_CONFIG = ("cache", "runs", "name", "resume", "eval", "replay", "device", "debug")


def parse_args(argv=None, defaults=None):
    """The options of a run. defaults: the config of a checkpoint, which stands in for options that are
    not given.
    """
    parser = build_parser()
    for action in parser._actions if defaults else ():
        value = defaults.get(action.dest)
        if value is None or action.dest in (*NOT_IN_CONFIG, "init_3d"):  # those weights are in the checkpoint
            continue
        if action.choices and value not in action.choices:
            parser.error(f"the checkpoint's config has {value!r} for {action.option_strings[0]}")
        if action.type:  # as text, so that argparse checks it like an option that is given
            value = re.sub(r"[][() ]|,\)", "", str(value))
        parser.set_defaults(**{action.dest: value})
    args = parser.parse_args(argv)
    check_options(args, parser.error)

    if args.isolate_clip:
        args.clip_weights = (0.0,) * len(args.clip_weights)
    if args.semantic_weight is None:
        args.semantic_weight = 0.5 if args.no_clip else 0.4
    if args.val_rooms is None:
        args.val_rooms = -(-args.rooms * 3 // 8)
    if not args.init_3d:
        args.backbone = args.backbone or "small"
        args.colors = args.colors or "signed"
    return args


def check_options(args, error):
    """Calls error(text) if options exclude each other or name what cannot be used."""
    if sum(map(bool, (args.resume, args.eval, args.replay))) > 1:
        error("--resume, --eval and --replay exclude each other")
    if args.data == "rooms" and args.scans:
        error("--scans holds only points: give --data, the folder of their frames, too")
    if args.data == "rooms" and args.label_map:
        error("--label-map belongs to scans and exported frames, and --data is rooms")
    if args.drop_path and not (args.backbone or "").startswith("volt-"):
        error("--drop-path is for --backbone volt-small, volt-small-plain or volt-base")
    if args.normals and args.colors == "ones":
        error("--colors ones hides all features of a point, its normal, too: give no --normals")
    if args.init_3d and (args.resume or args.eval):
        error("--init-3d begins a run; the weights of a checkpoint are in it")
    if args.init_3d and not Path(args.init_3d).is_file():
        error(f"--init-3d {args.init_3d}: no such file")
    if args.compile and args.diagnose:
        error("--diagnose runs two backward passes through one graph, which --compile does not allow")
    try:
        clip_loss_weight(0, args.clip_warmup, args.clip_weights)
    except ValueError as problem:
        error(f"--clip-warmup, --clip-weights: {problem}")
    clip_is_on = max(args.clip_weights) > 0 and not args.no_clip and not args.isolate_clip
    if args.semantic_weight == 0 and not args.lovasz:
        if not clip_is_on:
            error("--semantic-weight 0 leaves no loss: give the CLIP loss a weight, or --lovasz")
        if not args.no_instances:
            error("--semantic-weight 0 trains no classes, and instances have one each: give --no-instances")
    is_alone = args.batch_size == 1 and args.clip_target == "global"
    if args.clip_loss == "infonce" and is_alone and clip_is_on:
        error("--clip-loss infonce takes its negatives from the other scenes of a batch: give --batch-size 2 "
              "or more, or --clip-target point")
    for option, folder in (("--runs", args.runs), ("--cache", args.cache)):
        paths = (Path(folder), *Path(folder).absolute().parents)
        existing = next(path for path in paths if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            error(f"{option} {folder}: {existing} is not a folder that can be written to")


# --------------------------------------------------------------------------------------- parts of a run


def build_datasets(args):
    """Training and validation set, class names, and whether instances are trained."""
    splits = (args.train_split, args.val_split)
    counts = [(rooms, args.frames_per_room) for rooms in (args.rooms, args.val_rooms)]
    if args.data == "rooms":
        splits = ("train", "val")
    elif None in splits:
        raise ValueError(f"--data {args.data} needs --train-split FILE and --val-split FILE")
    labels = args.classes, args.label_map
    scans = None
    if args.scans:
        opened = [open_scans(args.scans, args.data, split, *labels, normals=args.normals) for split in splits]
        scans, frames = zip(*opened)
        check_splits(scans, ())
        check_splits(frames, ())
        scans = [upright(part, args.up) for part in scans]
    else:
        needed = None if trains_clip_loss(args) else True
        frames = [open_frames(args.data, split, *labels, labels=needed, rooms=rooms)
                  for split, rooms in zip(splits, counts)]
        if not frames[0].class_names:
            raise FileNotFoundError(f"--data {args.data}: no class list (classes.txt, or --classes FILE), which is "
                                    "needed even without labels; captures can have none")
        check_splits(frames, () if args.no_instances else ("instance-filt",))
    frames = [upright(part, args.up) for part in frames]

    options = dict(num_points=args.num_points, image_size=args.image_size, num_views=args.num_views,
                   color=not args.no_color, images=not args.no_clip, seed=args.seed, normals=args.normals,
                   voxel_size=min(args.voxel_size, 0.02))  # of elastic augmentation, at most that much
    if scans:
        sets = [SceneDataset(*sources, augment=augment, **options)
                for *sources, augment in zip(scans, frames, (True, False))]
        return *sets, scans[0].class_names, not args.no_instances
    sets = [PointDataset(part, augment=augment, **options)
            for part, augment in zip(frames, (True, False))]
    instances = not args.no_instances and all(part[0].get("instance") is not None for part in frames)
    if instances and args.superpoints:
        cache = SuperpointCache(cache_folder(args), partial(oversegment, count=args.superpoints),
                                f"superpoints {VERSION} {args.superpoints}")
        for dataset in sets:
            dataset.superpoints = cache
    return *sets, frames[0].class_names, instances


def class_ids_of(dataset, class_names):
    """The data's ids of the classes, for the files that predict.py writes; from 1 on if it has none."""
    labelled = getattr(dataset, "scenes", dataset.frames)
    return list(getattr(labelled, "class_ids", range(1, len(class_names) + 1)))


def describe(train_set, val_set, class_names):
    """What was opened and what was not taken, as text."""
    lines = [f"{len(train_set)} training and {len(val_set)} validation samples, {len(class_names)} classes"]
    for dataset, name in ((train_set, "training"), (val_set, "validation")):
        skipped = getattr(dataset.frames, "num_skipped", 0)
        left_out = dict(getattr(dataset.frames, "left_out", {}))
        if skipped:
            left_out["frames with a lost pose"] = skipped
        without = sum("label-filt" not in kinds for kinds in getattr(dataset.frames, "folders", {}).values())
        if without:
            left_out["scenes' labels, which do not exist"] = without
        if left_out:
            lines.append(f"{name}, left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items()))
    return "\n".join(lines)


def cache_folder(args):
    """The folder of --cache, or None."""
    return None if args.cache == "none" else args.cache


def read_every_frame(datasets, args, rank, world_size, console):
    """The number of labelled points of each data set. Samples without any depth are left out.

    Fails, before the run's folder is made, if a file is broken, a camera wrong, or labels are missing: only if the
    CLIP loss trains may the training set be without any, and then the validation set, too.

    Frames that the cache remembers, with the size and time of their files, are not read again.
    """
    store = Store(args.cache, "frames") if cache_folder(args) else None
    counts = []
    for dataset in datasets:
        found = check_frames(dataset, store, rank, world_size, **loader_options(args.workers))
        labelled, blank = zip(*gather_objects(found, world_size))
        blank = sum(blank, [])
        if blank:
            console.print(f"{len(blank)} of {len(dataset)} samples have no depth and are left out")
            dataset.leave_out(blank)
        needs_labels = args.eval or any(counts) or not trains_clip_loss(args)
        if sum(labelled) == 0 and needs_labels:
            raise ValueError(f"{args.data}: no point of the {len(dataset)} samples of a split has a label of the class "
                             "list; only training with a CLIP loss can do without (--clip-weights, --clip-warmup)")
        counts.append(sum(labelled))
        if rank == 0 and not args.no_check:
            check_cameras(dataset, store, args, console)
    return counts


def check_cameras(dataset, store, args, console):
    """The quick part of check.py, once for unchanged files."""
    signature = dataset.signature(range(len(dataset)))
    key = content_key("cameras", signature) if store is not None and signature is not None else None
    if key is not None and store.get(key) is not None:
        return
    frames = getattr(dataset.frames, "source", dataset.frames)  # as in the files, not turned upright
    rows = quick_check(frames, args.up)
    faults = [f"{row.test}: {row.words}" for row in rows if row.verdict == "WRONG"]
    if faults:
        raise ValueError(f"{args.data}: {' '.join(faults)} `python check.py {args.data} --up={args.up}` "
                         "tells more; --no-check insists")
    for text in unknowns(rows):
        console.print(text)
    if key is not None:
        store.put(key, b"right")


def open_tower(args, config, log_warning):
    """The CLIP tower of the options; the built-in rooms fall back on a random one if its weights cannot
    be had.
    """
    try:
        return build_tower(config)
    except FileNotFoundError as error:
        if args.data != "rooms":
            raise FileNotFoundError(f"{error} (--clip-pretrained, --clip-model)") from None
        log_warning(f"CLIP IS RANDOMLY INITIALISED: {error}. The built-in rooms train with a random tower, "
                    "which shows colors and textures but no meaning: good for trying things out, not for "
                    "results.")
        config["clip_pretrained"] = args.clip_pretrained = "none"  # what the checkpoint will say
        return build_tower(config)


def trains_clip_loss(args):
    """Whether the CLIP loss has a weight in any epoch of this run."""
    return not args.no_clip and any(loss_weights(args, epoch)["clip"] for epoch in range(args.epochs))


@torch.no_grad()
def classify_by_name(model, class_names):
    """Makes CLIP's embeddings of the class names the classifier, not to be trained: a point takes the class whose name
    its fused feature is nearest to.
    """
    queries = TextQueries(model.fusion.encoder_2d, [[name] for name in class_names], "fused")
    model.head.weight.copy_(queries.embedding[:len(class_names)])
    model.head.bias.zero_()
    model.head.requires_grad_(False)


def needs_dense(args):
    """Whether the CLIP loss ties points to dense features."""
    return args.clip_target == "point" and max(args.clip_weights) > 0 and not args.no_clip


def check_tower(tower, args):
    """Fails before the training starts if the loss needs dense features and the tower has none."""
    if not needs_dense(args):
        return
    if not hasattr(tower, "encode_with_dense"):
        raise ValueError(f"--clip-target point needs dense features, and the tower {type(tower).__name__} has no "
                         "encode_with_dense")
    tower.encode_with_dense(torch.zeros(1, 3, *tower.image_size))


def cache_features(tower, datasets, args, device, rank, world_size):
    """A frozen tower encodes every image once; from then on the samples of the data sets hold its
    features.
    """
    owner, encode = f"clip {tower.fingerprint()}", tower.encode
    if needs_dense(args):
        owner, encode = f"{owner} with dense features", tower.encode_with_dense
    cache = FeatureCache(args.cache, owner, lambda images: encode(images.to(device)),
                         workers=args.workers, worker_init_fn=init_worker)
    for dataset in datasets:
        cache.build(dataset.images_only, rank, world_size)
        dataset.feature_cache = cache
    gather_objects(None, world_size)  # wait for the others


def data_loader(dataset, sampler, args, device, collate_fn):
    """Batches of the samples that `sampler` names; collate_fn: of `model.batches_for`."""
    return DataLoader(dataset, args.batch_size, sampler=sampler, collate_fn=collate_fn,
                      persistent_workers=args.workers > 0, pin_memory=device.type == "cuda",
                      **loader_options(args.workers))


def build_criteria(args, clip_criterion=None):
    """The loss functions; their weights are in `loss_weights`. clip_criterion: in the place of
    ClipConsCriterion.
    """
    clip = clip_criterion or ClipConsCriterion(1.0, args.temperature, variant=args.clip_loss,
                                               world_mean=world_mean)
    return {"semantic": SemanticCriterion(world_mean=world_mean, label_smoothing=args.label_smoothing),
            "instance": InstanceCriterion(world_mean=world_mean),
            "clip": clip}


def loss_weights(args, epoch):
    """The weight of every loss term in an epoch."""
    return {"semantic": args.semantic_weight, "lovasz": args.lovasz,
            **{f"instance_{name}": weight for name, weight in INSTANCE_WEIGHTS.items()},
            "clip": clip_loss_weight(epoch, args.clip_warmup, args.clip_weights)}


def compute_losses(model, batch, criteria, weights, amp_dtype=torch.float32, dense_target=False):
    """One forward pass -> the model's output, {name: raw loss}, and the counts of the CLIP loss, or
    None.

    A CLIP term of weight 0 is not computed. dense_target: it ties points to dense features, not to
    their scene's. Every process must return the same terms, whatever its batch: multiply by 0 instead
    of leaving one out.
    """
    device = batch["points"].device
    clip_is_on = model.fusion.encoder_2d is not None and weights["clip"] > 0
    torch.manual_seed(batch["seed"][0])  # what the network draws, drop path say, can repeat
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        out = model(batch, with_dense=dense_target and clip_is_on)
    terms = {"semantic": criteria["semantic"](out["logits"], batch["labels"])}
    if weights.get("lovasz"):  # steps saved by older versions have no such weight
        terms["lovasz"] = lovasz_loss(out["logits"], batch["labels"])
    if model.decoder is not None:
        for name, term in criteria["instance"](out["decoder"], batch["targets"]).items():
            terms[f"instance_{name}"] = term
    counts = None
    if clip_is_on:
        target = out["clip_dense"] if dense_target else out["clip_global"]
        batch_idx = None if dense_target else batch["batch"]
        # random draws of a step depend on its samples alone, so that they can repeat
        seed = batch["seed"][0]
        terms["clip"], counts = criteria["clip"](out["feat_fusion"], target, batch_idx, out["valid"], seed)
    return out, terms, counts


def weight_terms(terms, weights):
    """{name: what the term adds to the total loss}."""
    for name in terms:
        if name not in weights or name == "total":
            raise ValueError(f"loss term {name!r} needs a weight in loss_weights, and a name other than "
                             "total")
    return {name: weights[name] * term for name, term in terms.items()}


def parameter_groups(model, args):
    """AdamW groups: one per part of the model, split by whether weight decay applies (not to 1-d
    tensors).
    """
    parts = {"fusion.encoder_3d.": ("encoder_3d", args.lr_3d),
             "fusion.encoder_2d.trainable.": ("clip", LR_CLIP),
             "fusion.": ("fusion", 1.0), "": ("head", 1.0)}  # the first prefix that fits
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, lr_mult = next(parts[prefix] for prefix in parts if name.startswith(prefix))
        is_matrix = parameter.dim() > 1
        weight_decay = args.weight_decay if is_matrix else 0.0
        group = groups.setdefault((part, is_matrix), {
            "params": [], "name": part, "lr_mult": lr_mult, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer, lr):
    """Every group gets the learning rate times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def load_optimizer(optimizer, scaler, state):
    """Loads their states from a checkpoint, but keeps the multipliers and weight decay of this run."""
    keys = ("lr_mult", "weight_decay")
    own = [{key: group[key] for key in keys} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, options in zip(optimizer.param_groups, own):
        group.update(options)
    if state["scaler"]:  # empty if the checkpoint was written without fp16
        scaler.load_state_dict(state["scaler"])


def resume_position(state, steps_per_epoch, global_batch):
    """(epoch, step within it) at which a checkpoint goes on, after the samples that its epoch has seen
    so far.
    """
    samples = state["next_step"] * state["global_batch"]
    if state["global_batch"] == global_batch:
        return state["epoch"], state["next_step"]
    return state["epoch"], min(samples // global_batch, steps_per_epoch)


def warn_of_changes(state, config, lr, console):
    """What makes a resumed run another one than that of its checkpoint."""
    changed = [key for key in DATA_OPTIONS if state["config"].get(key) != config[key]]
    if changed:
        console.warn(f"the checkpoint was trained on other data: {', '.join(changed)} differ")
    if not math.isclose(lr, state["next_lr"], rel_tol=1e-6):
        console.warn(f"the learning rate goes on from {state['next_lr']:.3g} to {lr:.3g}: the options, the "
                     "global batch or the number of processes have changed")


def lr_factor(step, total_steps, warmup):
    """Factor on the learning rate at optimizer step `step`: linear warm-up times polynomial decay to 0.

    A warm-up that is longer than the run never reaches the peak.
    """
    decay = max(0.0, 1 - step / max(1, total_steps)) ** 0.9
    return min(1.0, (step + 1) / max(1, warmup)) * decay


# --------------------------------------------------------------------------------------------- one step


class StepResult(NamedTuple):
    """What the loop needs to know about a step."""

    out: dict  # of the last forward pass
    finite: bool  # loss and gradient
    loss_finite: bool
    stop: bool  # whether any process was asked to stop


def train_step(model, micro_batches, criteria, weights, optimizer, scaler, log, max_grad_norm=10.0,
               amp_dtype=torch.float32, dense_target=False, world_size=1, diagnose=False, stop=None):
    """One optimizer step over micro-batches, for every dtype and number of processes -> StepResult.

    A step with a loss or gradient that is not finite changes no weight. stop: a StopRequest, or None.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step_loss = torch.zeros((), device=parameters[0].device)
    for i, batch in enumerate(micro_batches):
        out, terms, counts = compute_losses(model, batch, criteria, weights, amp_dtype, dense_target)
        weighted = weight_terms(terms, weights)
        loss = sum(weighted.values()) / len(micro_batches)
        if diagnose and i == len(micro_batches) - 1:
            for name, value in term_statistics(grouped(weighted), out, scaler.get_scale()).items():
                log.add_scalar(f"diagnose/{name}", value)
            log.add_histogram("diagnose/gate", out["alpha"][out["valid"]].detach().float())
        scaler.scale(loss).backward()
        step_loss += loss.detach()
        log.add_losses(terms, weighted)
        if counts is not None:
            log.add("clip/nonfinite_rows", counts[1])
            log.add("clip/clamped_entries", counts[2])

    # before unscaling, so that every process sees the same inf; what all must agree on travels along
    signum = step_loss.new_full((), stop.signum if stop is not None else 0)
    step_loss, signum = average_gradients(parameters, world_size, [step_loss, signum])
    scaler.unscale_(optimizer)
    log.add_gradient_norms()
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    log.add("grad/total", grad_norm)
    checks = torch.stack([(grad_norm + step_loss).isfinite(), step_loss.isfinite(), signum > 0])
    finite, loss_finite, stop = checks.tolist()
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(out, finite, loss_finite, stop)


def open_log(args, folder, model, console, step):
    """The TensorBoard of a run that goes on after `step`; folder: None in the other processes."""
    purge_step = step + 1 if args.resume else None
    log = RunLog(folder, args.log_every, purge_step, logged_modules(model), world_mean, console.warn)
    log.step = step
    log.add_table("config", vars(args))
    for text in console.warnings:
        log.add_text("warning", text)
    return log


def latest_values(out, batch_idx, optimizer):
    """{tag: value} of this step alone: learning rates, and what fusion does to the features."""
    latest = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
    statistics = fusion_statistics(out, batch_idx)
    return latest | {f"fusion/{name}": value for name, value in statistics.items()}


def replay(args, argv, clip_criterion=None, tower=None):
    """Runs the step of a bad_step_N.pt again; returns [] if it is finite here.

    If not, it raises FloatingPointError, or, for a gradient, the RuntimeError of torch's anomaly
    detection.
    """
    state = read_checkpoint(args.replay, STEP_FIELDS)
    args = parse_args(argv, defaults=state["config"])
    _, _, device = setup(args.device)
    configure_device(device, args.deterministic)
    model = restore_model(state, args.replay, tower).to(device).train()
    criteria = build_criteria(args, clip_criterion)

    def losses(batch):
        _, terms, _ = compute_losses(model, batch, criteria, state["weights"], AMP_DTYPES[args.amp],
                                     args.clip_target == "point")
        return weight_terms(terms, state["weights"])

    batch = to_device(state["batch"], device)
    print(f"epoch {state['epoch']}, step {state['step']}: {', '.join(batch['name'])}")
    findings = replay_step(model, batch, losses, state["scale"])
    if findings:
        raise FloatingPointError(f"{args.replay}: {findings[0]}")
    return findings


# ---------------------------------------------------------------------------------------------- the run


def main(argv=None, clip_criterion=None, tower=None, stop=None):
    """One run, from options to the final table; returns the final validation metrics.

    clip_criterion: a module in the place of ClipConsCriterion. tower: an image encoder in the place of the one
    that the options name, see fusion.py. stop: a StopRequest that listens to signals.
    """
    # options; processes, one or as many as torchrun started; the checkpoint to go on from or to score
    args = parse_args(argv)
    if args.replay:
        return replay(args, argv, clip_criterion, tower)
    rank, world_size, device = setup(args.device)
    main_process = rank == 0
    path = args.resume or args.eval
    state = lock = None
    if path:
        state = read_checkpoint(path)
        lock = lock_folder(Path(path).parent) if goes_on_in_place(args.resume) and main_process else None
        args = parse_args(argv, defaults=state["config"])
    init_3d = open_backbone(args) if args.init_3d else None
    config = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
    amp_dtype = AMP_DTYPES[args.amp]
    dense_target = args.clip_target == "point"
    stop = stop or StopRequest()
    configure_device(device, args.deterministic)
    console = Console(main_process, state["warnings"] if state else ())
    if device.type == "cpu":
        console.print(choose_threads(args.workers, state["config"].get("threads") if state else None))
        config["threads"] = torch.get_num_threads()

    # the tower and the data, what is quick to refuse first; every frame is read before anything is written
    torch.manual_seed(args.seed)  # the same on every process, for the same initial weights
    tower = tower or open_tower(args, config, console.warn)
    check_tower(tower, args)
    train_set, val_set, class_names, instances = build_datasets(args)
    used_sets = [val_set] if args.eval else [train_set, val_set]
    console.print(describe(train_set, val_set, class_names))
    labelled = read_every_frame(used_sets, args, rank, world_size, console)

    # model
    model = build_model(config, len(class_names), instances, tower, count_features(train_set.frames, args))
    config["gate"] = gate_name(model)
    config["class_ids"] = class_ids_of(train_set, class_names)
    if init_3d is not None:
        model.fusion.encoder_3d.backbone.load_state_dict(init_3d)
    if labelled[0] == 0 or args.semantic_weight == args.lovasz == 0:
        console.print("no label trains: the classifier is CLIP's embeddings of the class names")
        if not dense_target:
            console.warn("--clip-target global ties no point to the name of its class, as --clip-target point does")
        classify_by_name(model, class_names)
    model.to(device)
    synchronize_batch_norm(model)
    if state is not None:
        load_weights(model, state, path, class_names)
    if args.compile:
        compile_parts(model)
    criteria = build_criteria(args, clip_criterion)

    # loaders
    if tower is not None and args.clip_blocks == 0 and cache_folder(args):
        cache_features(tower, used_sets, args, device, rank, world_size)
    sampler = ResumableSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    train_loader = data_loader(train_set, sampler, args, device, batches_for(model, training=True, mix=args.mix))
    val_share = range(rank, len(val_set), world_size)
    val_loader = data_loader(val_set, val_share, args, device, batches_for(model, training=False))
    score = partial(evaluate, model, val_loader, args.min_instance_points, amp_dtype, world_size)

    # optimizer and schedule
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, fused=True)
    in_optimizer = sum(len(group["params"]) for group in optimizer.param_groups)
    trainable = sum(p.requires_grad for p in model.parameters())
    assert in_optimizer == trainable, f"{in_optimizer} of {trainable} parameters reached the optimizer"
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    average = MovingAverage(model, args.ema)
    average.load_state_dict(state.get("ema", {}) if state else {})
    steps_per_epoch = -(-len(train_loader) // args.grad_accum)
    total_steps = args.epochs * steps_per_epoch
    global_batch = args.batch_size * args.grad_accum * world_size
    start_epoch, first_step, step, skipped_steps, best = 0, 0, 0, 0, -1.0

    def lr_at(epoch, i):
        return args.lr * lr_factor(epoch * steps_per_epoch + i, total_steps, args.lr_warmup)

    if args.resume:
        start_epoch, first_step = resume_position(state, steps_per_epoch, global_batch)
        step, skipped_steps, best = state["step"], state["skipped_steps"], state["best"]
        load_optimizer(optimizer, scaler, state)
        console.print(f"{path}: goes on with epoch {start_epoch}, step {first_step} of {steps_per_epoch}")
        warn_of_changes(state, config, lr_at(start_epoch, first_step), console)
    elif not args.eval and not args.no_clip and max(args.clip_weights) > 0 and not trains_clip_loss(args):
        console.warn(f"the CLIP loss will never be on: --clip-warmup ends after the last of {args.epochs} epochs")

    if args.eval or start_epoch >= args.epochs:
        with average.applied():
            metrics = score()
        console.print("\n".join([format_metrics(metrics, class_names), *console.notes()]))
        leave_processes()
        return metrics

    # log and guard
    name = f"{args.name or ('baseline' if args.no_clip else 'bifusion')}__{args.seed}__"
    if main_process:  # nobody else may write into the folder while `lock` is open
        folder, lock = run_folder(args.resume, Path(args.runs) / (name + time.strftime("%Y%m%d-%H%M%S")), lock)
    folder = gather_objects(folder if main_process else None, world_size)[0]
    log = open_log(args, folder if main_process else None, model, console, step)
    guard = NonFiniteGuard(model, folder, lambda text: (console.print(text), log.add_text("guard", text)),
                           write_atomically, partial(gather_objects, world_size=world_size),
                           rank if world_size > 1 else None, bad_steps=state["bad_steps"] if args.resume else 0)
    identity = {"config": config, "class_names": class_names, "clip_fingerprint": fingerprint_of(tower)}

    def save(name, epoch, next_step):
        """Writes a checkpoint that goes on at a step of an epoch, or keeps the old file if the disk is full."""
        if main_process:
            write_or_warn(folder / name, console.warn, {
                "model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "epoch": epoch, "next_step": next_step, "step": step, "global_batch": global_batch,
                "next_lr": lr_at(epoch, next_step), "best": best, "skipped_steps": skipped_steps,
                "bad_steps": guard.bad_steps, "warnings": console.warnings, **identity})

    def weighted_losses(batch):
        _, terms, _ = compute_losses(model, batch, criteria, weights, amp_dtype, dense_target)
        return weight_terms(terms, weights)

    # training
    bar = ProgressBar(args.epochs * len(train_set), start_epoch * len(train_set) + first_step * global_batch,
                      main_process)
    model.train()
    stop.armed = True
    for epoch in range(start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        sampler.skip = first_step * args.grad_accum * args.batch_size
        train_set.set_epoch(epoch)
        weights = loss_weights(args, epoch)
        batches = iter(train_loader)
        for i in range(first_step, steps_per_epoch):
            start = time.perf_counter()
            micro_batches = [to_device(batch, device) for batch in itertools.islice(batches, args.grad_accum)]
            waited = time.perf_counter() - start
            set_learning_rate(optimizer, lr_at(epoch, i))  # by position: `step` differs after another batch size
            guard.begin_step()
            log.begin_step(step + 1, last=(epoch + 1, i + 1) == (args.epochs, steps_per_epoch))
            scale = scaler.get_scale()
            diagnose = args.diagnose > 0 and (step + 1) % args.diagnose == 0 and main_process
            result = train_step(model, micro_batches, criteria, weights, optimizer, scaler, log, args.max_grad_norm,
                                amp_dtype, dense_target, world_size, diagnose, stop)
            searches = result.loss_finite and scaler.get_scale() < scale >= 1  # fp16 overflows to find its scale
            facts = {"epoch": epoch, "step": step, "scale": scale / len(micro_batches), "weights": weights}
            skipped_steps += guard.end_step(result.finite, searches, micro_batches, weighted_losses,
                                            {**facts, **identity})
            if result.finite:
                average.update(step)
            step += 1

            # log
            samples = sum(len(batch["name"]) for batch in micro_batches) * world_size
            spent = time.perf_counter() - start
            log.add("speed/samples_per_s", samples / spent)
            log.add("speed/data_wait", waited / spent)
            bar.update(min(samples, (epoch + 1) * len(train_set) - bar.done))
            if log.due:
                averages = log.write({
                    **latest_values(result.out, micro_batches[-1]["batch"], optimizer), "epoch": epoch,
                    "clip/weight": weights["clip"], "amp/scale": scaler.get_scale(),
                    "amp/skipped_steps": skipped_steps, "guard/bad_steps": guard.bad_steps,
                    "memory/peak_gib": peak_memory_gib(device)})
                bar.show(loss=averages["loss/total"])

            # save, and leave if a signal asks for it
            if result.stop or args.save_every and step % args.save_every == 0:
                save("last.pt", epoch, i + 1)
            if result.stop:
                log.close()
                bar.close()
                console.print(f"stopped by a signal after step {step}; go on with: python train.py --resume "
                              f"{folder}/last.pt")
                signum = max(gather_objects(stop.signum, world_size))
                leave_processes()
                raise SystemExit(128 + signum)
        first_step = 0

        # evaluate and save
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            average_buffers(model, world_size)
            with average.applied():
                metrics = score()
                if main_process:
                    visualize(log, model, val_set, class_names, args.min_instance_points)
            bar.show(mIoU=metrics["miou"])
            console.print(f"epoch {epoch + 1}: {log_metrics(log, metrics, class_names)}")
            if not metrics["miou"] <= best:  # NaN, without a true label, counts as the best
                best = metrics["miou"]
                save("best.pt", epoch + 1, 0)  # before the last.pt that speaks of it
        save("last.pt", epoch + 1, 0)

    bar.close()
    console.print("\n".join(["", format_metrics(metrics, class_names), *console.notes(), "",
                             f"best mIoU {best:.3f}: {folder}/best.pt; look at the run with: tensorboard --logdir "
                             f"{args.runs}"]))
    log.add_text("result", json.dumps({**metrics, "classes": class_names}))
    log.close()
    leave_processes()
    return metrics


if __name__ == "__main__":
    run_command(lambda: main(stop=StopRequest().install()))
