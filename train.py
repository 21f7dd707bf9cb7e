# SPDX-License-Identifier: MIT
"""Trains 3D scene segmentation with frozen CLIP features fused in. The whole loop is in `main`, top to bottom.

    python train.py --clip-warmup 10,20                                the built-in rooms, no download
    python train.py --data SCANS --train-split train.txt --val-split val.txt --voxel-size 0.02
    python train.py --no-clip                                          the 3D baseline
    python train.py --resume runs/NAME/last.pt
    python train.py --eval runs/NAME/best.pt
    torchrun --nproc-per-node 4 train.py --amp bf16                    the same file on several GPUs
    tensorboard --logdir runs

Imports every sibling but bench.py.
"""
import argparse
import json
import os
import random
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cache import FeatureCache
from checkpoint import read_checkpoint, restore, rng_state, set_rng_state, write_atomically
from data import PointDataset, RoomFrames, ScanNetFrames, ScanNetScenes, SceneDataset, collate, load_classes
from decoder import InstanceDecoder, Segmenter, scene_instances
from diagnose import fusion_statistics, pictures
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder, apply_transform
from losses import ClipConsCriterion, InstanceCriterion, SemanticCriterion, clip_loss_weight, instance_targets
from metrics import InstanceMeter, SemanticMeter
from sparse_unet import SMALL, PointEncoder, load_res16unet34c
from superpoints import SuperpointCache

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------- options


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
                   "changes")
    g.add_argument("--clip-weights", type=float_list, default=(0.0, 0.001, 0.01), help="its weight up to the first, "
                   "up to the second ..., and after the last of them")
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
    g.add_argument("--seed", type=int, default=0, help="of weights, draws and augmentation")
    g.add_argument("--device", help="default: cuda where there is one, else cpu")

    g = parser.add_argument_group("run")
    g.add_argument("--runs", default="runs", help="folder that TensorBoard watches")
    g.add_argument("--name", help="run name (default: bifusion or baseline)")
    g.add_argument("--log-every", type=int, default=10, help="optimiser steps between entries in TensorBoard")
    g.add_argument("--eval-every", type=int, default=5, help="epochs between evaluations; each writes last.pt")
    g.add_argument("--resume", metavar="CHECKPOINT", help="go on from a last.pt; other options may be changed")
    g.add_argument("--eval", metavar="CHECKPOINT", help="evaluate only")
    return parser


def parse_args(argv=None):
    """Options of the command line; those of a checkpoint to resume or evaluate stand in for what is not given."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume and args.eval:
        parser.error("--resume and --eval exclude each other")
    if args.resume or args.eval:
        config = read_checkpoint(args.resume or args.eval)["config"]
        parser.set_defaults(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
                               if k not in ("resume", "eval", "device")})
        args = parser.parse_args(argv)
    for name in ("points", "views", "epochs", "batch_size", "accumulate", "log_every", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.data == "rooms" and args.scans:
        parser.error("--scans holds points alone: give --data, the folder of their frames, too")
    if args.label_map and not args.scans:
        parser.error("--label-map is of --scans: label images already hold that table's ids")
    for name in ("voxel_size", "instance_weight", "clip_norm", "lr"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
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
    if args.semantic_weight is None:
        args.semantic_weight = 0.5 if args.no_clip else 0.4
    if not args.semantic_weight > 0:
        parser.error(f"--semantic-weight must be above 0, got {args.semantic_weight}")
    return args


# ---------------------------------------------------------------------------------------------- parts


def build_sets(args):
    """Training and validation PointDataset, class names, and whether instances are to be trained."""
    options = dict(num_points=args.points, image_size=args.image_size, views=args.views, color=not args.no_color,
                   seed=args.seed, voxel_size=min(args.voxel_size, 0.02))  # coarse voxels make no object larger
    if args.data == "rooms":
        frames = (RoomFrames("train", args.rooms, args.frames_per_room),
                  RoomFrames("val", -(-args.rooms * 3 // 8), args.frames_per_room))
    else:
        missing = [name for name in ("train_split", "val_split") if getattr(args, name) is None]
        if missing:
            raise ValueError(f"--data {args.data} needs --{missing[0].replace('_', '-')} FILE, a scene or scene/frame "
                             "a line")
        splits = (args.train_split, args.val_split)
        classes = load_classes(args.classes or Path(args.data) / "classes.txt")
        if args.scans:
            scans = [ScanNetScenes(args.scans, classes, split, args.label_map) for split in splits]
            sets = [SceneDataset(scan, ScanNetFrames(args.data, None, split), augment=train and not args.no_augment,
                                 **options) for scan, split, train in zip(scans, splits, (True, False))]
            return *sets, scans[0].class_names, not args.no_instances
        frames = [ScanNetFrames(args.data, classes, split) for split in splits]
        for scene in (scene for part in frames for scene in sorted({name.split("/")[0] for name in part.names})):
            if not (Path(args.data) / scene / "label-filt").is_dir():
                raise FileNotFoundError(f"{Path(args.data) / scene}: labels, the folder label-filt, do not exist")
    instances = not args.no_instances and all(f[0]["instance"] is not None for f in frames)
    if instances and args.superpoints:
        options["superpoints"] = SuperpointCache(args.superpoint_cache, args.superpoints)
    return (PointDataset(frames[0], augment=not args.no_augment, **options), PointDataset(frames[1], **options),
            frames[0].class_names, instances)


def build_encoder_2d(args, warn):
    """The CLIP tower; on the built-in rooms a random one, with a warning, where its weights cannot be had."""
    if args.no_clip:
        return None
    options = dict(image_size=args.image_size, trainable_blocks=args.clip_blocks)
    if args.clip_pretrained == "none":
        return Enhanced2DEncoder(args.clip_model, None, **options)
    try:
        return Enhanced2DEncoder(args.clip_model, args.clip_pretrained, **options)
    except FileNotFoundError as error:
        if args.data != "rooms":
            raise
        warn(f"CLIP IS RANDOMLY INITIALISED: {error}. The built-in rooms train on a random tower, which shows colours "
             "and textures but no meaning: good for trying things out, not for results.")
        return Enhanced2DEncoder(args.clip_model, None, **options)


def parameter_groups(model, args):
    """AdamW groups: one a part of the model, and one more for what weight decay should leave alone (1-d tensors)."""
    factors = {"encoder_3d": args.lr_3d, "clip_blocks": args.lr_clip, "fusion": 1.0, "head": 1.0}
    prefixes = {"fusion.encoder_3d.": "encoder_3d", "fusion.encoder_2d.trainable.": "clip_blocks", "fusion.": "fusion"}
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        part = next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "head")
        if parameter.requires_grad:
            groups[part, parameter.dim() > 1].append(parameter)
    return [{"params": parameters, "name": part, "factor": factors[part],
             "weight_decay": args.weight_decay if decay else 0.0} for (part, decay), parameters in groups.items()]


def lr_factor(step, total, warmup, schedule):
    """Factor on the learning rate at optimiser step `step` of `total`: linear warm-up times decay to 0."""
    t = step / max(1, total)
    decay = (1 - t) ** 0.9 if schedule == "poly" else 0.5 * (1 + np.cos(np.pi * t))
    return min(1.0, (step + 1) / max(1, warmup)) * float(decay)


def average_gradients(parameters, world_size):
    """Averages gradients over processes, in place: what DistributedDataParallel does, without a wrapper to see through.

    One flat all-reduce; a parameter without a gradient on this rank (nothing matched, no valid point) counts as zero.
    """
    if world_size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= world_size
    for parameter, grad in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad.copy_(grad.view_as(parameter))


def average_buffers(model, world_size):
    """Running statistics averaged over processes, in place, so that every rank evaluates and saves the same model."""
    if world_size > 1:
        for name, buffer in model.named_buffers():
            if "running_" in name:  # fixed matrices stay to the bit: (x + x + x) / 3 need not be x
                dist.all_reduce(buffer)
                buffer /= world_size


def to_device(batch, device):
    """A batch with its tensors on a device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def evaluate(model, loader, num_classes, device, amp_dtype, min_points, world_size=1):
    """Metrics over a loader and all processes: {"miou", "iou" [K]}, with instances also {"ap", "ap50", "ap25", "aps"
    [K]}.
    """
    model.eval()
    semantics = SemanticMeter(range(num_classes), device)
    instances = InstanceMeter(range(1, num_classes + 1), min_points)
    for batch in loader:
        batch = to_device(batch, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            out = model(batch)
        semantics.update(out["logits"].argmax(1), batch["labels"])
        if model.decoder is not None:
            scenes = scene_instances(out["decoder"], out["superpoint"], batch["batch"], min_points=min_points)
            for b, scene in enumerate(scenes):
                label, instance = (batch[key][batch["batch"] == b] for key in ("labels", "instances"))
                number = torch.unique(instance, return_inverse=True)[1]  # the data's own may pass 1000
                truth = torch.where((label >= 0) & (instance >= 0), (label + 1) * 1000 + number, 0)
                instances.update({**scene, "labels": scene["labels"] + 1}, truth)
    if world_size > 1:
        dist.all_reduce(semantics.confusion)
        gathered = [None] * world_size
        dist.all_gather_object(gathered, instances.scenes)
        instances.scenes = sum(gathered, [])
    model.train()
    result = semantics.compute()
    metrics = {"miou": result["miou"], "iou": [result["per_class"][c] for c in range(num_classes)]}
    if model.decoder is not None:
        result = instances.compute()
        metrics.update({k: result[k] for k in ("ap", "ap50", "ap25")},
                       aps=[result["per_class"][c] for c in range(1, num_classes + 1)])
    return metrics


@torch.no_grad()
def draw(model, dataset, index, num_classes, device, min_points):
    """Pictures of one sample of a dataset: what the first view shows of its points, truth, predictions, features."""
    model.eval()
    batch = to_device(collate([dataset[index]]), device)
    out = model(batch)
    image = torch.from_numpy(np.array(dataset.pictures[dataset._samples[index][0]])).to(device)
    image = image.permute(2, 0, 1) / 255
    uv, visible, _ = model.fusion.project(batch, image.shape[1:])
    uv, seen = uv[:, 0], visible[:, 0]
    depth = apply_transform(batch["points"], batch["world2cam"][0, 0])[:, 2]
    labels = {"prediction": out["logits"].argmax(1), "truth": batch["labels"]}
    if model.decoder is not None:
        labels["instances_truth"] = batch["instances"]
        labels["instances"] = torch.full_like(batch["labels"], -1)
        scene, = scene_instances(out["decoder"], out["superpoint"], batch["batch"], min_points=min_points)
        for i in reversed(range(len(scene["scores"]))):  # the best on top
            if scene["scores"][i] > 0.3:
                labels["instances"][scene["masks"][i]] = i
    clip_map = None
    if out["clip_global"] is not None:
        clip_map = batch["clip_tokens"][0, 0] if "clip_tokens" in batch else (
            model.fusion.encoder_2d.encode(batch["images"][0, :1])[0][0])
    model.train()
    return pictures(image, uv[seen], depth[seen], {k: v[seen] for k, v in labels.items()}, out["feat_fusion"][seen],
                    clip_map)


# ---------------------------------------------------------------------------------------------- the run


def main(argv=None):
    """One run, from options to the final table. Returns the final validation metrics."""
    args = parse_args(argv)
    state = read_checkpoint(args.resume or args.eval) if args.resume or args.eval else None

    # processes: one, or as many as torchrun started
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else device.index or 0)
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    main_process = rank == 0
    warnings = []

    def say(text):
        if main_process:
            tqdm.write(text)

    def warn(text):
        warnings.append(text)
        say(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n")

    # data and model; the same seed on every rank, for the same initial weights
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed % 2 ** 32)
    train_set, val_set, class_names, instances = build_sets(args)
    num_classes = len(class_names)
    say(f"{len(train_set)} training and {len(val_set)} validation samples, {num_classes} classes; "
        f"{train_set.frames.skipped} and {val_set.frames.skipped} frames skipped for a lost pose")
    # every frame is read before anything is written: a broken file ends the run here; superpoints are made on the way
    for dataset in (val_set,) if args.eval else (val_set, train_set):
        share = Subset(dataset, range(rank, len(dataset), world_size))
        loader = DataLoader(share, batch_size=None, num_workers=args.workers, generator=torch.Generator())
        labelled = torch.zeros((), dtype=torch.int64, device=device)
        for sample in tqdm(loader, "reading frames", unit="sample", disable=not main_process):
            labelled += (sample["labels"] >= 0).sum()
        if world_size > 1:
            dist.all_reduce(labelled)
        if labelled == 0:
            raise ValueError(f"{args.data}: no point of {dataset.frames.names[0]} and the other {len(dataset) - 1} "
                             "samples has a label of the class list")
    encoder_2d = build_encoder_2d(args, warn)
    full = args.backbone == "res16unet34c"
    encoder_3d = PointEncoder(args.voxel_size, **({} if full else SMALL))
    if args.init_3d and state is None:
        say(load_res16unet34c(encoder_3d.backbone, args.init_3d))
    fusion = BiFusionEncoder(encoder_2d, encoder_3d, depth_tolerance=args.depth_tolerance,
                             point_target=args.clip_target == "point")
    # the small network takes a decoder of its size
    decoder = InstanceDecoder(256, num_classes, **({} if full else dict(embed_dim=128, ffn=512)))
    model = Segmenter(fusion, num_classes, decoder if instances else None, cell=4 * args.voxel_size).to(device)
    fingerprint = encoder_2d.fingerprint() if encoder_2d is not None else None
    if state is not None:
        restore(model, state, args.resume or args.eval, class_names, fingerprint)

    # CLIP is frozen: encode each picture once
    amp_dtype = AMP_DTYPES[args.amp]
    if encoder_2d is not None and args.clip_blocks == 0 and args.clip_cache != "none":
        cache = FeatureCache(args.clip_cache, fingerprint, lambda images: encoder_2d.encode(images.to(device)),
                             workers=args.workers)
        for dataset in (val_set,) if args.eval else (train_set, val_set):
            cache.build(dataset.pictures, rank, world_size)
            dataset.cache = cache
        if world_size > 1:
            dist.barrier()
    sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    loading = dict(batch_size=args.batch_size, collate_fn=collate, num_workers=args.workers,
                   persistent_workers=args.workers > 0, pin_memory=device.type == "cuda",
                   generator=torch.Generator())  # its own: a resumed run must find the global one where it was left
    train_loader = DataLoader(train_set, sampler=sampler, **loading)
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), world_size)), **loading)

    def finish(metrics):
        names = ("AP", "AP50", "AP25") if instances else ()
        say(f"\n{'class':<24}" + "".join(f"{name:>8}" for name in ("IoU", *names)))
        for i, name in enumerate(class_names):
            row = (metrics["iou"][i], *(metrics["aps"][i] if names else ()))
            say(f"{name:<24}" + "".join(f"{x:>8.3f}" for x in row))
        say(f"{'mean':<24}" + "".join(f"{metrics[name]:>8.3f}" for name in ("miou", *(n.lower() for n in names))))
        for text in warnings:
            say(f"note: {text}")
        return metrics

    if args.eval:
        for text in state["warnings"]:
            warn(f"of the training: {text}")
        metrics = finish(evaluate(model, val_loader, num_classes, device, amp_dtype, args.min_instance_points,
                                  world_size))
        if world_size > 1:
            dist.destroy_process_group()
        return metrics

    # criteria, optimiser, schedule
    semantic_criterion = SemanticCriterion(args.semantic_weight).to(device)
    instance_criterion = InstanceCriterion(args.instance_weight)
    clip_criterion = ClipConsCriterion(0.0, args.temperature, args.gradient_flow_ratio)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(parameters) == trainable, f"{len(parameters)} of {trainable} parameters reached the optimizer"
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    steps_per_epoch = -(-len(train_loader) // args.accumulate)
    total_steps = args.epochs * steps_per_epoch
    epoch, step, skipped_steps, best = 0, 0, 0, -1.0
    if args.resume:
        if state["epoch"] >= args.epochs:
            raise ValueError(f"{args.resume}: all {state['epoch']} epochs are done; to go on give --epochs above that")
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, parameter_groups(model, args)):
            group.update(factor=own["factor"], weight_decay=own["weight_decay"])  # this run's, not the checkpoint's
        if state["scaler"]:  # empty where it was written without fp16
            scaler.load_state_dict(state["scaler"])
        epoch, step, skipped_steps, best = (state[k] for k in ("epoch", "step", "skipped_steps", "best"))
        set_rng_state(state["rng"], device)
        if rank > 0:  # the checkpoint holds the generators of rank 0
            torch.manual_seed(args.seed + rank + world_size * step)
    else:
        torch.manual_seed(args.seed + rank)  # what was drawn so far depends on how full the caches were

    # where it is logged
    folder = Path(args.resume).parent if args.resume else Path(args.runs) / (
        f"{args.name or ('baseline' if args.no_clip else 'bifusion')}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    writer = None
    if main_process:
        folder.mkdir(parents=True, exist_ok=bool(args.resume))
        writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)
        table = "\n".join(f"| {k} | {v} |" for k, v in sorted(vars(args).items()))
        writer.add_text("config", f"| option | value |\n| --- | --- |\n{table}", step)
        for text in warnings:
            writer.add_text("warning", text, step)

    modules = {"encoder_3d": encoder_3d, "encoder_2d": encoder_2d,
               "head": nn.ModuleList([module for name, module in model.named_children() if name != "fusion"]),
               "fusion": nn.ModuleList([fusion.proj_3d, *([fusion.gate, fusion.norm_2d] if encoder_2d else [])])}
    window = defaultdict(list)  # what was measured since the last log, averaged when it is written
    metrics = {"miou": float("nan")}
    bar = tqdm(total=args.epochs * len(train_set), initial=epoch * len(train_set), unit="sample", smoothing=0.05,
               disable=not main_process, dynamic_ncols=True)
    model.train()
    while epoch < args.epochs:
        sampler.set_epoch(epoch)
        train_set.set_epoch(epoch)
        clip_criterion.loss_weight = clip_loss_weight(epoch, args.clip_warmup, args.clip_weights)
        batches, clock = iter(train_loader), time.perf_counter()
        for i in range(len(train_loader)):
            batch = to_device(next(batches), device)
            waited = time.perf_counter() - clock

            # forward; a CLIP term of weight 0 is not computed at all
            with torch.autocast(device.type, amp_dtype, enabled=args.amp != "off"):
                out = model(batch)
            terms = {"semantic": (semantic_criterion(out["logits"], batch["labels"]), args.semantic_weight)}
            if instances:
                targets = instance_targets(batch["labels"], batch["instances"], out["superpoint"],
                                           out["superpoint_batch"])
                terms["instance"] = (instance_criterion(out["decoder"], targets), args.instance_weight)
                for name, value in instance_criterion.terms.items():
                    window[f"loss/instance_{name}"].append(value)
            if encoder_2d is not None and clip_criterion.loss_weight > 0:
                target = (out["clip_point"], None) if args.clip_target == "point" else (
                    out["clip_global"], batch["batch"])
                terms["clip"] = (clip_criterion(out["feat_fusion"], *target, out["valid"]), clip_criterion.loss_weight)
                window["clip/nonfinite_rows"].append(clip_criterion.counts[1].float())
            loss = sum(weighted for weighted, _ in terms.values())

            # backward; the last group of an epoch may be smaller
            group = min(args.accumulate, len(train_loader) - i // args.accumulate * args.accumulate)
            scaler.scale(loss / group).backward()
            for name, (weighted, weight) in terms.items():
                window[f"weighted/{name}"].append(weighted.detach())
                window[f"loss/{name}"].append(weighted.detach() / weight)
            window["loss/total"].append(loss.detach())
            bar.update(min(args.batch_size * world_size, (epoch + 1) * len(train_set) - bar.n))

            if (i + 1) % args.accumulate == 0 or i + 1 == len(train_loader):
                position = epoch * steps_per_epoch + i // args.accumulate  # `step` of a resumed run may differ
                factor = lr_factor(position, total_steps, args.lr_warmup, args.schedule)
                for param_group in optimizer.param_groups:
                    param_group["lr"] = args.lr * param_group["factor"] * factor
                average_gradients(parameters, world_size)  # before unscaling, so that every rank sees the same inf
                scaler.unscale_(optimizer)
                log_now = (step + 1) % args.log_every == 0 or position + 1 == total_steps
                if log_now and main_process:
                    for name, module in modules.items():
                        grads = [p.grad for p in module.parameters() if p.grad is not None] if module else []
                        if grads:
                            writer.add_scalar(f"grad/{name}", torch.stack(torch._foreach_norm(grads)).norm(),
                                              step + 1)
                norm = nn.utils.clip_grad_norm_(parameters, args.clip_norm)
                # the fp16 scaler skips such a step and backs off; below 1 it is no longer a search for a scale
                if not norm.isfinite() and (args.amp != "fp16" or scaler.get_scale() < 1):
                    if main_process:
                        writer.flush()
                    raise FloatingPointError(f"epoch {epoch}, step {step}, {', '.join(batch['name'])}: gradient norm "
                                             f"{norm.item()}, losses { {k: v.item() for k, (v, _) in terms.items()} }")
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                skipped_steps += scaler.get_scale() < scale  # the scaler backs off exactly when it skipped
                window["grad/total"].append(norm.detach())
                window["speed/samples_per_s"].append(torch.tensor(
                    len(batch["name"]) * world_size / (time.perf_counter() - clock)))
                window["speed/data_wait"].append(torch.tensor(waited / (time.perf_counter() - clock)))
                step += 1

                if log_now and main_process:
                    means = {name: torch.stack([v.cpu() for v in values]).mean().item()
                             for name, values in window.items()}
                    stats = fusion_statistics(out, batch)
                    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else (
                        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
                    for name, value in {**means, **{f"fusion/{k}": v for k, v in stats.items()},
                                        **{f"lr/{g['name']}": g["lr"] for g in optimizer.param_groups},
                                        "clip/weight": clip_criterion.loss_weight, "amp/scale": scale,
                                        "amp/skipped_steps": skipped_steps, "memory/peak_gib": memory / 2 ** 30,
                                        "epoch": epoch}.items():
                        writer.add_scalar(name, value, step)
                    bar.set_postfix(loss=f"{means['loss/total']:.3f}", mIoU=f"{metrics['miou']:.3f}")
                if log_now:
                    window.clear()  # on every rank
            clock = time.perf_counter()
        epoch += 1

        if epoch % args.eval_every == 0 or epoch == args.epochs:
            average_buffers(model, world_size)
            metrics = evaluate(model, val_loader, num_classes, device, amp_dtype, args.min_instance_points,
                               world_size)
            if main_process:
                for name in ("miou", "ap", "ap50", "ap25")[:4 if instances else 1]:
                    writer.add_scalar(f"val/{name}", metrics[name], step)
                for name, iou in zip(class_names, metrics["iou"]):
                    writer.add_scalar(f"val_iou/{name}", iou, step)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "scaler": scaler.state_dict(), "epoch": epoch, "step": step, "skipped_steps": skipped_steps,
                         "best": max(best, metrics["miou"]), "rng": rng_state(device), "config": vars(args),
                         "class_names": class_names, "clip_fingerprint": fingerprint, "warnings": warnings}
                write_atomically(state, folder / "last.pt")
                if metrics["miou"] > best:
                    write_atomically(state, folder / "best.pt")
                for name, picture in draw(model, val_set, 0, num_classes, device, args.min_instance_points).items():
                    writer.add_image(f"val/{name}", picture, step)
            best = max(best, metrics["miou"])
            say(f"epoch {epoch}: " + ", ".join(f"{label} {metrics[label.lower()]:.3f}" for label in (
                "mIoU", "AP", "AP50", "AP25")[:4 if instances else 1]))

    bar.close()
    metrics = finish(metrics)
    if main_process:
        writer.add_text("result", json.dumps({**metrics, "classes": class_names}))
        writer.close()
        say(f"\nbest mIoU {best:.3f}; checkpoints in {folder}; look at it with: tensorboard --logdir {args.runs}")
    if world_size > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
