# SPDX-License-Identifier: MIT
"""Trains 3D scene segmentation with frozen CLIP features fused in.

    python train.py --clip-warmup 10,20                                the built-in rooms, no download
    python train.py --data DATA --train-split train.txt --val-split val.txt --voxel-size 0.02
    python train.py --no-clip                                          the 3D baseline
    python train.py --resume runs/NAME/last.pt                         go on
    python train.py --eval runs/NAME/best.pt                           score only
    python train.py --replay runs/NAME/bad_step_N.pt                   run a non-finite step again
    torchrun --nproc-per-node 4 train.py                               one node with 4 GPUs
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py
    tensorboard --logdir runs

The file reads from top to bottom. To change the network see model.py; a loss term is one entry of
`loss_weights` and one of `compute_losses`; a data set is one line of `open_frames` in sources/open.py.
"""
import itertools
import json
import os
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from check import check_cameras
from data import (PointDataset, SceneDataset, check_frames, class_ids_of, describe, to_device,
                  up_rotation, upright)
from evaluate import evaluate, format_metrics, log_metrics, visualize
from losses import (CLIP_LOSSES, INSTANCE_WEIGHTS, ClipConsCriterion, InstanceCriterion,
                    SemanticCriterion, clip_loss_weight, lovasz_loss)
from model import (BACKBONES, batches_for, build_model, build_tower, classify_by_name, compile_parts,
                   count_features, fingerprint_of, forward_in, gate_name, load_weights,
                   logged_modules, open_backbone, parameter_groups, restore_model)
from sources.open import open_frames, open_scans
from sources.scannet import check_splits
from sparse_unet import COLORS
from superpoints import VERSION, oversegment
from support.average import MovingAverage
from support.cache import FeatureCache, Store, SuperpointCache
from support.checkpoint import (STEP_FIELDS, load_optimizer, lock_folder, lock_in_place, new_folder,
                                read_checkpoint, resume_position, warn_of_changes, write_or_warn)
from support.diagnose import NonFiniteGuard, fusion_statistics, grouped, replay_step, term_statistics
from support.distributed import (ResumableSampler, average_buffers, average_gradients, gather_objects,
                                 leave_processes, setup, synchronize_batch_norm, world_mean)
from support.runlog import ProgressBar, RunLog, peak_memory_gib
from support.runtime import (Console, Parser, StopRequest, checked_by, choose_threads, configure_device,
                             image_size, list_of, loader_options, mean_std, nonnegative_float, nonnegative_int,
                             num_cores, number_in, positive_float, positive_int, readable_folder, run_command,
                             worker_count, writable_folder)

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a checkpoint does not carry over: where things are written, and what was asked of one start
NOT_IN_CONFIG = ("cache", "runs", "resume", "eval", "replay", "device", "debug", "init_3d")
NEVER_ON = "the CLIP loss will never be on: --clip-warmup ends after the last epoch"

# Settings without an option; a checkpoint keeps those that it was trained with.
CONSTANTS = {
    "min_instance_points": 100,  # smaller instances are neither predicted nor scored, as ScanNet does
    "temperature": 0.07,         # of the CLIP loss, floored at 0.1
    "weight_decay": 0.05,        # of AdamW, on matrices
    "lr_warmup": 50,             # optimizer steps of linear warm-up
    "lr_clip": 0.01,             # learning rate multiplier of trained CLIP blocks
    "max_grad_norm": 10.0,       # larger gradients are scaled down to it
    "save_every": 1000}          # optimizer steps between writings of last.pt within an epoch

# ---------------------------------------------------------------------------------------------- options


def build_parser():
    """The one source of every default."""
    parser = Parser("train.py", "Trains 3D scene segmentation with frozen CLIP features fused in.")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="rooms", help="'rooms' (built in) or a folder in ScanNet's 2D layout")
    add("--classes", help="class list, one 'id name' pair per line; not given: classes.txt of --data")
    add("--scans", help="folder of whole ScanNet scans: points from there, views from --data")
    add("--label-map", help="scannetv2-labels.combined.tsv: for scans if the class list holds that "
        "table's ids (ScanNet200), for exported frames if it holds those of NYU40 (ScanNet20)")
    add("--train-split", help="file with one scene or scene/frame per line; needed for a data folder")
    add("--val-split", help="the same for validation")
    add("--rooms", type=number_in(int, 1, 10 ** 6), default=32, help="built-in training rooms")
    add("--val-rooms", type=number_in(int, 1, 10 ** 6), help="not given: 3 per 8 training rooms")
    add("--frames-per-room", type=number_in(int, 1, 1000), default=4, help="of each built-in room")
    add("--num-points", type=positive_int, default=4096, help="points drawn per sample")
    add("--num-views", type=positive_int, default=1, help="frames per sample")
    add("--image-size", type=image_size, default=(240, 320), help="height,width of CLIP's images, in "
        "multiples of its patch size")
    add("--up", type=checked_by(up_rotation), default="z", help="axis of the data's world that points "
        "up, z, -y, ... or a vector x,y,z; negative ones as --up=-y")
    add("--no-check", action="store_true", help="insist on data that look wrong, see docs/check.md")
    add("--no-color", action="store_true", help="hide the points' colors from the 3D encoder")
    add("--normals", action="store_true", help="show it normals, of depth or of the meshes of --scans")
    add("--superpoints", type=positive_int, default=128, help="per frame, for instances")
    add("--cache", type=readable_folder, default=".cache", help="folder for CLIP features and "
        "superpoints; 'none': compute them every time")
    add("--workers", type=worker_count, help="data-loading processes; 0: the main one; not given: 2, "
        "with two cores 0, with a GPU one per core of the process, at most 8")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=tuple(BACKBONES), help="not given: small, or the network of --init-3d")
    add("--colors", choices=tuple(COLORS), help="what the 3D encoder sees of the points' colors, see "
        "docs/backbones.md; not given: signed, or as the weights of --init-3d were trained")
    add("--voxel-size", type=number_in(float, 0.001, 1.0), default=0.08, help="meters")
    add("--init-3d", metavar="CHECKPOINT", help="trained weights of the 3D encoder: of ESAM, "
        "oneformer3d, Mask3D, UnScene3D, LanguageGroundedSemseg, OpenScene, Volt, or of a run")
    add("--drop-path", type=number_in(float, 0.0, 0.9), default=0.0, help="of volt-*: how often the "
        "last block is skipped for a token; the others less, the first never")
    add("--no-clip", action="store_true", help="the 3D baseline: no images, no fusion, no CLIP loss")
    add("--no-instances", action="store_true", help="semantics only, even if there are instance labels")
    add("--clip-model", default="ViT-B-16", help="an open_clip vision transformer")
    add("--clip-pretrained", default="openai", help="open_clip tag, checkpoint file, or 'none': random")
    add("--clip-mean-std", type=mean_std, metavar="NUMBERS|TAG", help="scaling of images that CLIP "
        "weights from a file were trained with: 3 means and 3 standard deviations, or an open_clip tag "
        "that has it; needed if the tags of the model disagree")
    add("--tower", metavar="timm:NAME", help="fuse the patch tokens of a timm vision transformer "
        "instead of CLIP's, which stays the target of the CLIP loss and answers to text; see docs/towers.md")
    add("--tower-pretrained", metavar="FILE", help="weights of --tower, or 'none': random; not given: "
        "timm's download")
    add("--clip-blocks", type=nonnegative_int, default=0, help="last blocks of CLIP to train")

    add = parser.add_argument_group("loss").add_argument
    add("--semantic-weight", type=nonnegative_float, help="0: labels train nothing, see docs/losses.md; "
        "not given: 0.4, and 0.5 with --no-clip")
    add("--mix", type=number_in(float, 0.0, 1.0), default=0.0, metavar="P", help="how often the "
        "3D encoder sees two samples of a batch as one scene (Mix3D)")
    add("--label-smoothing", type=number_in(float, 0.0, 0.9), default=0.0, help="share of a "
        "point's label that the semantic loss spreads over all classes")
    add("--lovasz", type=nonnegative_float, default=0.0, metavar="W", help="weight of the "
        "Lovasz-softmax loss, which follows the IoU; 0: none")
    add("--clip-warmup", type=list_of(int), default=(10, 20), help="last epoch, from 0, of each weight "
        "of the CLIP loss but the last; '--clip-warmup=-1 --clip-weights 0,W': W throughout")
    add("--clip-weights", type=list_of(nonnegative_float), default=(0.0, 0.001, 0.01),
        help="the weights: 0 for epochs 0 to 10, 0.001 for 11 to 20, 0.01 from 21 on")
    add("--clip-loss", choices=CLIP_LOSSES, default="sigmoid", help="its form, see docs/losses.md")
    add("--clip-target", choices=("global", "point"), default="global", help="tie a point to the CLIP "
        "feature of its scene, or to the one that it projects to")
    add("--isolate-clip", action="store_true", help="weight 0: bit-exactly as without the CLIP loss")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive_int, default=24, help="passes over the training samples")
    add("--batch-size", type=positive_int, default=4, help="samples per process and micro-batch")
    add("--grad-accum", type=positive_int, default=1, help="micro-batches per optimizer step")
    add("--lr", type=positive_float, default=2e-3, help="peak learning rate of AdamW")
    add("--lr-3d", type=nonnegative_float, default=1.0, help="multiplier for the 3D encoder")
    add("--ema", type=number_in(float, 0.0, 0.99999), default=0.0, metavar="DECAY", help="evaluate the "
        "moving average of all weights, with a decay per step such as 0.999; 0: the last weights")
    add("--amp", choices=tuple(AMP_DTYPES), help="not given: bf16 on a GPU that has it, else off")
    add("--compile", action="store_true", help="torch.compile for the tower, the gate and the heads")
    add("--seed", type=number_in(int, 0, 2 ** 63 - 1), default=0, help="of weights, sampling and augmentation")
    add("--sync-bn", choices=("on", "off"), default="on", help="batch norms count all processes' rows")
    add("--deterministic", action="store_true", help="on a GPU: the same numbers in every run, as "
        "always on a CPU; slower, see docs/gpus.md")
    add("--device", help="not given: cuda if there is one, else cpu")

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--runs", type=writable_folder, default="runs", help="folder that TensorBoard watches")
    add("--log-every", type=positive_int, default=10, help="steps between TensorBoard entries")
    add("--eval-every", type=positive_int, default=5, help="epochs between evaluations")
    add("--diagnose", type=nonnegative_int, default=0, metavar="K", help="optimizer steps between "
        "entries under diagnose/, see docs/diagnostics.md; 0: none")
    one_of = group.add_mutually_exclusive_group().add_argument
    one_of("--resume", metavar="CHECKPOINT", help="go on from a last.pt, with its options unless given")
    one_of("--eval", metavar="CHECKPOINT", help="score only")
    one_of("--replay", metavar="FILE", help="run a bad step again, see docs/diagnostics.md")
    return parser


def parse_args(argv=None, config=None):
    """The options of a run. config: of a checkpoint, in the place of options that are not given."""
    parser = build_parser()
    config = config or {}
    known = {key: value for key, value in config.items() if key not in NOT_IN_CONFIG}
    args = parser.parse_args(argv, defaults=known)
    vars(args).update({name: config.get(name, value) for name, value in CONSTANTS.items()})
    if args.isolate_clip or args.no_clip:
        args.clip_weights = (0.0,) * len(args.clip_weights)
    check_options(args, parser.error)

    on_gpu = args.device.startswith("cuda") if args.device else torch.cuda.is_available()
    if args.amp is None:
        args.amp = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if args.workers is None:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_cpu = 2 if num_cores() > 2 else 0  # loaders slow a step down by more than they save
        args.workers = max(1, min(8, num_cores() // local_processes)) if on_gpu else on_cpu
    if args.semantic_weight is None:
        args.semantic_weight = 0.5 if args.no_clip else 0.4
    if args.val_rooms is None:
        args.val_rooms = -(-args.rooms * 3 // 8)
    if args.cache == "none":
        args.cache = None
    if not args.init_3d:
        args.backbone = args.backbone or "small"
        args.colors = args.colors or "signed"
    return args


def check_options(args, error):
    """Calls error(text) if options exclude each other or name what cannot be used."""
    from_rooms = args.data == "rooms"
    is_volt = (args.backbone or "").startswith("volt-")
    is_alone = args.clip_loss == "infonce" and args.clip_target == "global" and args.batch_size == 1
    clip_is_on = max(args.clip_weights) > 0
    unlabeled = args.semantic_weight == 0 and not args.lovasz
    faults = {
        "--scans holds only points: give --data, the folder of frames, too": from_rooms and args.scans,
        "the built-in rooms take no --classes, --label-map, --train-split or --val-split":
            from_rooms and (args.classes or args.label_map or args.train_split or args.val_split),
        "--drop-path is for --backbone volt-*": args.drop_path and not is_volt,
        "--tower fuses other features than CLIP's: give neither --no-clip nor --clip-blocks":
            args.tower and (args.no_clip or args.clip_blocks),
        "--tower-pretrained holds the weights of --tower, which is not given":
            args.tower_pretrained and not args.tower,
        "--colors ones hides normals, too: give no --normals": args.normals and args.colors == "ones",
        "--init-3d begins a run, and a checkpoint has weights": args.init_3d and (args.resume or args.eval),
        "--diagnose runs two backward passes, which --compile does not allow": args.compile and args.diagnose,
        "--clip-loss infonce takes its negatives from the other scenes of a batch: give --batch-size 2 or "
        "more, or --clip-target point": is_alone and clip_is_on,
        "--semantic-weight 0 leaves no loss: give the CLIP loss a weight, or --lovasz":
            unlabeled and not clip_is_on,
        "--semantic-weight 0 trains no classes, and instances have one each: give --no-instances":
            unlabeled and not args.no_instances}
    for text, is_found in faults.items():
        if is_found:
            error(text)
    try:
        clip_loss_weight(0, args.clip_warmup, args.clip_weights)
    except ValueError as problem:
        error(f"--clip-warmup, --clip-weights: {problem}")


# --------------------------------------------------------------------------------------- parts of a run


def build_datasets(args):
    """Training and validation set, class names, and whether instances are trained."""
    splits = ("train", "val") if args.data == "rooms" else (args.train_split, args.val_split)
    if None in splits:
        raise ValueError(f"--data {args.data} needs --train-split FILE and --val-split FILE")
    labels = args.classes, args.label_map
    needed = None if trains_clip_loss(args) else True  # without labels that loss trains alone
    sources = []  # per split (frames,), or (scans, frames)
    for split, rooms in zip(splits, (args.rooms, args.val_rooms)):
        if args.scans:
            sources.append(open_scans(args.scans, args.data, split, *labels, normals=args.normals))
        else:
            sources.append([open_frames(args.data, split, *labels, labels=needed,
                                        rooms=(rooms, args.frames_per_room))])
    if not sources[0][0].class_names:
        raise FileNotFoundError(f"--data {args.data}: no class list (classes.txt, or --classes FILE), which is "
                                "needed even without labels")
    for of_splits in zip(*sources):
        check_splits(of_splits, () if args.scans or args.no_instances else ("instance-filt",))

    options = dict(num_points=args.num_points, image_size=args.image_size, num_views=args.num_views,
                   color=not args.no_color, images=not args.no_clip, normals=args.normals, seed=args.seed,
                   voxel_size=min(args.voxel_size, 0.02))  # of elastic augmentation, at most that much
    kind = SceneDataset if args.scans else PointDataset
    sets = []
    for source, augment in zip(sources, (True, False)):
        parts = [upright(part, args.up) for part in source]
        sets.append(kind(*parts, augment=augment, **options))
    class_names = sources[0][0].class_names
    if args.scans or args.no_instances:
        return *sets, class_names, not args.no_instances
    instances = all(frames[0].get("instance") is not None for frames, in sources)
    if instances:
        owner = f"superpoints {VERSION} {args.superpoints}"
        cache = SuperpointCache(args.cache, partial(oversegment, count=args.superpoints), owner)
        for dataset in sets:
            dataset.superpoints = cache
    return *sets, class_names, instances


def read_every_frame(datasets, args, rank, world_size, console):
    """The number of labeled points of each data set.

    Fails, before anything is written, if a file is broken, a camera wrong, or labels are missing: only if
    the CLIP loss trains may the training set be without any, and then the validation set, too.

    Samples without any depth are left out. Frames whose files are as the cache remembers them, by size and
    time, are not read again.
    """
    store = Store(args.cache, "frames")
    counts = []
    for dataset in datasets:
        found = check_frames(dataset, store, rank, world_size, **loader_options(args.workers))
        labeled, blank = zip(*gather_objects(found, world_size))
        dataset.leave_out(sum(blank, []))
        counts.append(sum(labeled))
        may_lack_labels = trains_clip_loss(args) and not args.eval and counts[0] == 0
        if counts[-1] == 0 and not may_lack_labels:
            raise ValueError(f"{args.data}: no point of the {len(dataset)} samples of a split has a label of "
                             "the class list; only the CLIP loss can train without (--clip-weights)")
        console.print(describe(dataset, sum(blank, [])))
        if rank == 0 and not args.no_check:
            for text in check_cameras(dataset, store, args.up, args.data):
                console.print(text)
    return counts


def open_tower(args, config, log_warning):
    """The CLIP tower of the options; on the built-in rooms a random one if there are no weights."""
    if args.tower_pretrained == "none" and not (args.resume or args.eval):
        log_warning(f"--tower {args.tower} IS RANDOMLY INITIALISED: good for trying things out, not for results.")
    try:
        return build_tower(config)
    except FileNotFoundError as error:
        if args.data != "rooms":
            raise FileNotFoundError(f"{error} (--clip-pretrained, --clip-model)") from None
        log_warning(f"CLIP IS RANDOMLY INITIALISED: {error}. A random tower shows colors and textures but no "
                    "meaning: good for trying things out, not for results.")
        config["clip_pretrained"] = args.clip_pretrained = "none"  # what the checkpoint will say
        return build_tower(config)


def trains_clip_loss(args):
    """Whether the CLIP loss has a weight in any epoch of this run."""
    return any(loss_weights(args, epoch)["clip"] for epoch in range(args.epochs))


def labels_train(args, num_labeled, console):
    """Whether any label trains; says which losses do not, although the options sound as if they did."""
    if not args.eval and max(args.clip_weights) > 0 and not trains_clip_loss(args):
        console.warn(NEVER_ON)
    if num_labeled > 0 and (args.semantic_weight or args.lovasz):
        return True
    console.print("no label trains: the classifier is CLIP's embeddings of the class names")
    if args.clip_target == "global":
        console.warn("--clip-target global ties no point to the name of its class, as --clip-target point does")
    return False


def check_tower(tower, args):
    """Fails now, and not after hours, if the tower takes other images or lacks what the loss needs."""
    if tower is not None and tuple(tower.image_size) != tuple(args.image_size):
        raise ValueError(f"--image-size {args.image_size}: the tower takes images of {tuple(tower.image_size)}")
    if needs_dense(args):
        tower.encode_with_dense(torch.zeros(1, 3, *tower.image_size))


def needs_dense(args):
    """Whether the CLIP loss ties points to dense features."""
    return args.clip_target == "point" and max(args.clip_weights) > 0


def cache_features(tower, datasets, args, device, rank, world_size):
    """A frozen tower encodes every image once; from then on the samples hold its features."""
    owner, encode = f"clip {tower.fingerprint()}", tower.encode
    if needs_dense(args):
        owner, encode = f"{owner} with dense features", tower.encode_with_dense
    cache = FeatureCache(args.cache, owner, lambda images: encode(images.to(device)),
                         **loader_options(args.workers))
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
    """The loss functions. clip_criterion: in the place of ClipConsCriterion."""
    clip = clip_criterion or ClipConsCriterion(1.0, args.temperature, variant=args.clip_loss,
                                               world_mean=world_mean)
    return {"semantic": SemanticCriterion(world_mean=world_mean, label_smoothing=args.label_smoothing),
            "instance": InstanceCriterion(world_mean=world_mean), "clip": clip}


def loss_weights(args, epoch):
    """The weight of every loss term in an epoch."""
    return {"semantic": args.semantic_weight, "lovasz": args.lovasz,
            **{f"instance_{name}": weight for name, weight in INSTANCE_WEIGHTS.items()},
            "clip": clip_loss_weight(epoch, args.clip_warmup, args.clip_weights)}


def compute_losses(model, batch, criteria, weights, amp_dtype=torch.float32, dense_target=False):
    """One forward pass -> the model's output, {name: raw loss}, counts of the CLIP loss or None.

    A CLIP term of weight 0 is not computed. dense_target: it ties points to dense features, not to
    their scene's. Every process must return the same terms, whatever its batch: multiply by 0 instead
    of leaving one out.
    """
    clip_is_on = model.fusion.encoder_2d is not None and weights["clip"] > 0
    torch.manual_seed(batch["seed"][0])  # random draws of a step depend on its samples alone: they repeat
    out = forward_in(amp_dtype, model, batch, with_dense=dense_target and clip_is_on)
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
        terms["clip"], counts = criteria["clip"](out["feat_fusion"], target, batch_idx, out["valid"],
                                                 batch["seed"][0])
    return out, terms, counts


def weight_terms(terms, weights):
    """{name: what the term adds to the total loss}; KeyError if a term has no weight."""
    return {name: weights[name] * term for name, term in terms.items()}


def weighted_losses(model, criteria, weights, amp_dtype, dense_target):
    """`batch -> {name: weighted term}`: the forward pass of a step, to find what is not finite."""
    def losses(batch):
        _, terms, _ = compute_losses(model, batch, criteria, weights, amp_dtype, dense_target)
        return weight_terms(terms, weights)
    return losses


def lr_factor(step, total_steps, warmup):
    """Factor on the learning rate at optimizer step `step`: linear warm-up times polynomial decay to 0.

    A warm-up that is longer than the run never reaches the peak.
    """
    decay = max(0.0, 1 - step / max(1, total_steps)) ** 0.9
    return min(1.0, (step + 1) / max(1, warmup)) * decay


# --------------------------------------------------------------------------------------------- one step


def train_step(model, micro_batches, criteria, weights, optimizer, scaler, log, max_grad_norm=10.0,
               amp_dtype=torch.float32, dense_target=False, world_size=1, diagnose=False, stop=None):
    """One optimizer step over micro-batches, for every dtype and number of processes.

    Returns the output of the last forward pass, whether loss and gradient are finite, whether the loss
    is, and whether any process was asked to stop. A step that is not finite changes no weight. stop: a
    StopRequest, or None.
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
    return out, finite, loss_finite, stop


def latest_values(out, batch_idx, optimizer, scaler, weights):
    """{tag: value} of this step alone, not averaged over steps."""
    learning_rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
    return {**learning_rates, **fusion_statistics(out, batch_idx), "clip/weight": weights["clip"],
            "amp/scale": scaler.get_scale(), "memory/peak_gib": peak_memory_gib(batch_idx.device)}


def replay(args, argv, clip_criterion=None, tower=None):
    """Runs the step of a bad_step_N.pt again; returns [] if it is finite here.

    If not, it raises FloatingPointError, or for a gradient the RuntimeError of anomaly detection.
    """
    state = read_checkpoint(args.replay, STEP_FIELDS)
    args = parse_args(argv, state["config"])
    _, _, device = setup(args.device)
    configure_device(device, args.deterministic)
    model = restore_model(state, args.replay, tower).to(device).train()
    criteria = build_criteria(args, clip_criterion)
    losses = weighted_losses(model, criteria, state["weights"], AMP_DTYPES[args.amp],
                             args.clip_target == "point")
    batch = to_device(state["batch"], device)
    print(f"epoch {state['epoch']}, step {state['step']}: {', '.join(batch['name'])}")
    findings = replay_step(model, batch, losses, state["scale"])
    if findings:
        raise FloatingPointError(f"{args.replay}: {findings[0]}")
    return findings


# ---------------------------------------------------------------------------------------------- the run


def main(argv=None, clip_criterion=None, tower=None, stop=None):
    """One run, from options to the final table; returns the final validation metrics.

    clip_criterion: a module in the place of ClipConsCriterion. tower: an image encoder in the place of
    the one that the options name, see fusion.py. stop: a StopRequest that listens to signals.
    """
    # options; processes, one or as many as torchrun started; the checkpoint to go on from or to score
    args = parse_args(argv)
    if args.replay:
        return replay(args, argv, clip_criterion, tower)
    rank, world_size, device = setup(args.device)
    main_process = rank == 0
    path = args.resume or args.eval
    lock = lock_in_place(args.resume) if main_process else None
    state = read_checkpoint(path) if path else {}
    args = parse_args(argv, state.get("config"))
    init_3d = open_backbone(args) if args.init_3d else None
    config = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
    amp_dtype = AMP_DTYPES[args.amp]
    dense_target = args.clip_target == "point"
    stop = stop or StopRequest()
    configure_device(device, args.deterministic)
    console = Console(main_process, [text for text in state.get("warnings", ()) if text != NEVER_ON])
    if device.type == "cpu":
        console.print(choose_threads(args.workers, state.get("config", {}).get("threads")))
        config["threads"] = torch.get_num_threads()

    # tower and data, what is quick to refuse first; every frame is read before anything is written
    torch.manual_seed(args.seed)  # the same on every process, for the same initial weights
    tower = tower or open_tower(args, config, console.warn)
    check_tower(tower, args)
    train_set, val_set, class_names, instances = build_datasets(args)
    used_sets = [val_set] if args.eval else [train_set, val_set]
    console.print(f"{len(class_names)} classes: {', '.join(class_names)}")
    labeled = read_every_frame(used_sets, args, rank, world_size, console)

    # model
    model = build_model(config, len(class_names), instances, tower, count_features(train_set.frames, args))
    config |= {"gate": gate_name(model), "class_ids": class_ids_of(train_set, class_names)}
    if init_3d is not None:
        model.fusion.encoder_3d.backbone.load_state_dict(init_3d)
    if not labels_train(args, labeled[0], console):
        classify_by_name(model, class_names)
    model.to(device)
    if args.sync_bn == "on":
        synchronize_batch_norm(model)
    if path:
        load_weights(model, state, path, class_names)
    if args.compile:
        compile_parts(model)
    criteria = build_criteria(args, clip_criterion)

    # loaders
    if tower is not None and args.clip_blocks == 0 and args.cache:
        cache_features(tower, used_sets, args, device, rank, world_size)
    sampler = ResumableSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    train_loader = data_loader(train_set, sampler, args, device, batches_for(model, training=True, mix=args.mix))
    val_loader = data_loader(val_set, range(rank, len(val_set), world_size), args, device,
                             batches_for(model, training=False))
    score = partial(evaluate, model, val_loader, args.min_instance_points, amp_dtype, world_size)

    # optimizer and schedule
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    average = MovingAverage(model, args.ema)
    average.load_state_dict(state.get("ema", {}))
    steps_per_epoch = -(-len(train_loader) // args.grad_accum)
    global_batch = args.batch_size * args.grad_accum * world_size
    start_epoch, first_step, step, skipped_steps, best = 0, 0, 0, 0, -1.0

    def lr_at(epoch, i):
        position, end = epoch * steps_per_epoch + i, args.epochs * steps_per_epoch
        return args.lr * lr_factor(position, end, args.lr_warmup)

    if args.resume:
        start_epoch, first_step = resume_position(state, steps_per_epoch, global_batch)
        step, skipped_steps, best = state["step"], state["skipped_steps"], state["best"]
        load_optimizer(optimizer, scaler, state)
        console.print(f"{path}: goes on with epoch {start_epoch}, step {first_step} of {steps_per_epoch}")
        warn_of_changes(state, config, lr_at(start_epoch, first_step), console.warn)
    if args.eval or start_epoch >= args.epochs:
        with average.applied():
            metrics = score()
        console.print("\n".join([format_metrics(metrics, class_names), *console.notes()]))
        leave_processes()
        return metrics

    # the run's folder, its log, and the guard
    if main_process:
        name = f"{'baseline' if args.no_clip else 'bifusion'}__{args.seed}"
        folder = Path(path).parent if lock else new_folder(Path(args.runs) / name)
        lock = lock or lock_folder(folder)  # nobody else may write into the folder while it is open
    folder = gather_objects(folder if main_process else None, world_size)[0]
    log = RunLog(folder if main_process else None, args.log_every, logged_modules(model), world_mean,
                 console.warn, step)
    log.add_table("config", vars(args))
    log.add_text("warning", "\n".join(console.warnings) or "none")
    guard = NonFiniteGuard(model, folder, lambda text: (console.print(text), log.add_text("guard", text)),
                           partial(write_or_warn, warn=console.warn), partial(gather_objects, world_size=world_size),
                           rank, state.get("bad_steps", 0))
    identity = {"config": config, "class_names": class_names, "clip_fingerprint": fingerprint_of(tower)}

    def save(name, epoch, next_step):
        """Writes a checkpoint that goes on at a step of an epoch; a full disk keeps the old file."""
        if main_process:
            write_or_warn({
                "model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "epoch": epoch, "next_step": next_step, "step": step,
                "global_batch": global_batch, "next_lr": lr_at(epoch, next_step), "best": best,
                "skipped_steps": skipped_steps, "bad_steps": guard.bad_steps,
                "warnings": console.warnings, **identity}, folder / name, console.warn)

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
        losses = weighted_losses(model, criteria, weights, amp_dtype, dense_target)
        batches = iter(train_loader)
        for i in range(first_step, steps_per_epoch):
            start = time.perf_counter()
            micro_batches = [to_device(batch, device) for batch in itertools.islice(batches, args.grad_accum)]
            waited = time.perf_counter() - start
            for group in optimizer.param_groups:
                group["lr"] = lr_at(epoch, i) * group["lr_mult"]
            guard.begin_step()
            log.begin_step(step + 1, last=(epoch + 1, i + 1) == (args.epochs, steps_per_epoch))
            scale = scaler.get_scale()
            diagnose = args.diagnose > 0 and (step + 1) % args.diagnose == 0 and main_process
            out, finite, loss_finite, is_stopped = train_step(
                model, micro_batches, criteria, weights, optimizer, scaler, log, args.max_grad_norm, amp_dtype,
                dense_target, world_size, diagnose, stop)
            searches = loss_finite and scaler.get_scale() < scale >= 1  # fp16 overflows to find its scale
            facts = {"epoch": epoch, "step": step, "scale": scale / len(micro_batches), "weights": weights}
            skipped_steps += guard.end_step(finite, searches, micro_batches, losses, {**facts, **identity})
            if finite:
                average.update(step)
            step += 1

            # log
            samples = sum(len(batch["name"]) for batch in micro_batches) * world_size
            spent = time.perf_counter() - start
            log.add("speed/samples_per_s", samples / spent)
            log.add("speed/data_wait", waited / spent)
            bar.update(min(samples, (epoch + 1) * len(train_set) - bar.done))
            if log.due:
                latest = latest_values(out, micro_batches[-1]["batch"], optimizer, scaler, weights)
                latest |= {"epoch": epoch, "amp/skipped_steps": skipped_steps, "guard/bad_steps": guard.bad_steps}
                bar.show(loss=log.write(latest)["loss/total"])

            # save, and leave if a signal asks for it
            if is_stopped or step % args.save_every == 0:
                average_buffers(model, world_size)
                save("last.pt", epoch, i + 1)
            if is_stopped:
                log.close()
                bar.close()
                console.print(f"stopped after step {step}; go on with: python train.py --resume {folder}/last.pt")
                signum = max(gather_objects(stop.signum, world_size))
                leave_processes()
                raise SystemExit(128 + signum)
        first_step = 0
        average_buffers(model, world_size)

        # evaluate and save
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
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
    where = folder / "best.pt" if (folder / "best.pt").exists() else "not written"
    console.print("\n".join(["", format_metrics(metrics, class_names), *console.notes(), "",
                             f"best mIoU {best:.3f}: {where}; look at the run with: tensorboard --logdir {args.runs}"]))
    log.add_text("result", json.dumps({**metrics, "classes": class_names}))
    log.close()
    leave_processes()
    return metrics


if __name__ == "__main__":
    run_command(lambda: main(stop=StopRequest().install()))
