# SPDX-License-Identifier: MIT
"""Trains 3D scene segmentation with frozen CLIP features fused in. The whole loop is in `main`, top to bottom.

    python train.py --clip-warmup 10,20                                the built-in rooms, no download
    python train.py --data SCANS --train-split train.txt --val-split val.txt --voxel-size 0.02
    python train.py --no-clip                                          the 3D baseline
    python train.py --resume runs/NAME/last.pt
    python train.py --eval runs/NAME/best.pt
    python train.py --replay runs/NAME/bad_step_N.pt                   a step that was not finite, once more
    torchrun --nproc-per-node 4 train.py --amp bf16                    the same file on several GPUs
    tensorboard --logdir runs

Imports its siblings, but for the benchmarks.
"""
import ctypes
import json
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
from checkpoint import STEP_FIELDS, read_checkpoint, restore, rng_state, set_rng_state, write_atomically
from data import PointDataset, RoomFrames, ScanNetFrames, ScanNetScenes, SceneDataset, collate, load_classes
from decoder import InstanceDecoder, Segmenter, scene_instances
from diagnose import fusion_statistics, locate_nonfinite, pictures, term_statistics
from distributed import average_buffers, average_gradients, setup, synchronize_batch_norm, world_mean
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder, apply_transform
from losses import ClipConsCriterion, InstanceCriterion, SemanticCriterion, clip_loss_weight, instance_targets
from metrics import InstanceMeter, SemanticMeter
from options import AMP_DTYPES, parse_args
from sparse_unet import SMALL, PointEncoder, load_res16unet34c
from superpoints import SuperpointCache

# ---------------------------------------------------------------------------------------------- parts


def build_sets(args):
    """Training and validation PointDataset, class names, and whether instances are to be trained."""
    options = dict(num_points=args.points, image_size=args.image_size, views=args.views, color=not args.no_color,
                   images=not args.no_clip, seed=args.seed,
                   voxel_size=min(args.voxel_size, 0.02))  # coarse voxels make no object larger
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


def build_model(args, encoder_2d, num_classes, instances):
    """The whole network, with fresh weights."""
    full = args.backbone == "res16unet34c"
    encoder_3d = PointEncoder(args.voxel_size, **({} if full else SMALL))
    fusion = BiFusionEncoder(encoder_2d, encoder_3d, depth_tolerance=args.depth_tolerance)
    # the small network takes a decoder of its size
    decoder = InstanceDecoder(256, num_classes, **({} if full else dict(embed_dim=128, ffn=512)))
    return Segmenter(fusion, num_classes, decoder if instances else None, cell=4 * args.voxel_size)


def compute_losses(model, batch, criteria, args):
    """One forward pass -> the model's output and the weighted loss terms; a CLIP term of weight 0 is not computed."""
    with torch.autocast(batch["points"].device.type, AMP_DTYPES[args.amp], enabled=args.amp != "off"):
        out = model(batch)
    terms = {"semantic": criteria["semantic"](out["logits"], batch["labels"])}
    if model.decoder is not None:
        targets = instance_targets(batch["labels"], batch["instances"], out["superpoint"], out["superpoint_batch"])
        terms["instance"] = criteria["instance"](out["decoder"], targets)
    if out["clip_global"] is not None and criteria["clip"].loss_weight > 0:
        target = (out["clip_point"], None) if args.clip_target == "point" else (out["clip_global"], batch["batch"])
        terms["clip"] = criteria["clip"](out["feat_fusion"], *target, out["valid"])
    return out, terms


def examine(model, seen, criteria, args, device, world_size, path, facts):
    """Looks where a step stopped being finite, saves what is needed to run it again, and says so in a text.

    seen: the (batch, random state) pairs of the step; every one is run, whatever is found in the first: with several
    processes a pass has collectives. Of batches and processes the one that holds the cause is saved, not those that
    meet it in a shared batch norm. path: None to save nothing; facts: what else goes into the file.
    """
    now, buffers = rng_state(device), {name: buffer.clone() for name, buffer in model.named_buffers()}
    # what is compiled takes no hooks, and no second backward pass
    compiled = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    kinds, found = ("input", "weight", "module", "loss", "gradient"), []
    for batch, rng in seen:
        set_rng_state(rng, device)
        findings = locate_nonfinite(model, batch, lambda batch: compute_losses(model, batch, criteria, args)[1],
                                    facts["scale"])
        depth = kinds.index(findings[0].split(":")[0]) if findings else len(kinds)
        found.append((depth, len(found), findings))
    set_rng_state(now, device)
    for name, buffer in model.named_buffers():  # the passes have moved running statistics
        buffer.copy_(buffers[name])
    for module, forward in compiled.items():
        module.forward = forward
    depth, index, findings = min(found)
    batch, rng = seen[index]
    text = "\n  ".join([f"{', '.join(batch['name'])}:", *(findings or [
        "finite when run a second time: a sum or norm of large gradients overflowed, or the device varies"])])
    cause = min(gather(depth, world_size))
    if path and depth == cause:
        write_atomically({"model": model.state_dict(), "batch": batch, "rng": rng, "findings": findings,
                          "clip_weight": criteria["clip"].loss_weight, "config": vars(args), **facts}, path)
        text += f"\nrun it again with: python train.py --replay {path}"
    return "\n".join(gather(text, world_size))


def replay(model, state, criteria, args, device):
    """Runs a saved step again: prints where it stops being finite, then goes backward under anomaly detection, which
    raises there with the line of the forward pass. A FloatingPointError at the latest, where it is still not finite.
    """
    batch = to_device(state["batch"], device)
    criteria["clip"].loss_weight = state["clip_weight"]
    model.fusion.point_target = args.clip_target == "point" and state["clip_weight"] > 0
    model.train()
    set_rng_state(state["rng"], device)
    findings = locate_nonfinite(model, batch, lambda batch: compute_losses(model, batch, criteria, args)[1],
                                state["scale"])
    print(f"epoch {state['epoch']}, step {state['step']}: {', '.join(batch['name'])}",
          *(findings or ["every value of this step is finite here"]), sep="\n  ")
    model.load_state_dict(state["model"])  # the pass above has moved running statistics
    set_rng_state(state["rng"], device)
    with torch.autograd.set_detect_anomaly(True):
        _, terms = compute_losses(model, batch, criteria, args)
        (sum(terms.values()) * state["scale"]).backward()
    if findings:
        raise FloatingPointError(f"{args.replay}: {findings[0]}")
    return findings


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


def gather(value, world_size):
    """What every process holds, as a list by rank."""
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def compile_parts(model):
    """torch.compile, in place, for the dense parts: names and checkpoints stay as they are.

    Forward methods and not modules: the compiled code of one class is shared by its instances and has a limited number
    of versions, which all modules together would use up. The shapes of the sparse network differ by step.
    """
    fusion, decoder = model.fusion, model.decoder
    tower, parts = [], [fusion.proj_3d]
    if fusion.encoder_2d is not None:
        tower, parts = fusion.encoder_2d.blocks, [*parts, fusion.gate]
    if decoder is not None:
        parts += [decoder.class_head, decoder.quality_head]
    for module in (*tower, *parts):
        module.forward = torch.compile(module.forward, dynamic=module in parts)  # the number of points varies


def keep_buffers():
    """Makes glibc keep the memory of large buffers for the next ones; elsewhere nothing.

    As it comes it hands them back to the system, which clears them page by page when they are asked for again: a sixth
    of a step on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        if libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25):  # M_MMAP_THRESHOLD; old ones refuse more than 2^25
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


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
        instances.scenes = sum(gather(instances.scenes, world_size), [])
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
    state = None
    if args.resume or args.eval or args.replay:
        state = read_checkpoint(args.replay, STEP_FIELDS) if args.replay else read_checkpoint(args.resume or args.eval)

    # processes: one, or as many as torchrun started
    rank, world_size, device = setup(args.device)
    main_process = rank == 0
    warnings = []
    if device.type == "cpu":
        keep_buffers()

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
    if args.replay:
        class_names, instances = state["class_names"], any(key.startswith("decoder.") for key in state["model"])
    else:
        train_set, val_set, class_names, instances = build_sets(args)
        say(f"{len(train_set)} training and {len(val_set)} validation samples, {len(class_names)} classes; "
            f"{train_set.frames.skipped} and {val_set.frames.skipped} frames skipped for a lost pose")
        # every frame is read before anything is written: a broken file ends the run here; superpoints are made, too
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
    num_classes = len(class_names)
    encoder_2d = build_encoder_2d(args, warn)
    model = build_model(args, encoder_2d, num_classes, instances)
    if args.init_3d and state is None:
        say(load_res16unet34c(model.fusion.encoder_3d.backbone, args.init_3d))
    model.to(device)
    synchronize_batch_norm(model)
    fingerprint = encoder_2d.fingerprint() if encoder_2d is not None else None
    if state is not None:
        restore(model, state, args.resume or args.eval or args.replay, class_names, fingerprint)
    if args.compile and not args.replay:
        compile_parts(model)
    if encoder_2d is not None and args.clip_target == "point" and max(args.clip_weights) > 0:  # refused now, if at all
        encoder_2d.project_dense(torch.zeros(1, encoder_2d.token_dim, 1, 1, device=device))
    criteria = {"semantic": SemanticCriterion(args.semantic_weight, world_mean=world_mean).to(device),
                "instance": InstanceCriterion(args.instance_weight, world_mean=world_mean),
                "clip": ClipConsCriterion(0.0, args.temperature, args.gradient_flow_ratio, variant=args.clip_loss,
                                          world_mean=world_mean)}
    if args.replay:
        return replay(model, state, criteria, args, device)

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

    # optimiser, schedule
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(parameters) == trainable, f"{len(parameters)} of {trainable} parameters reached the optimizer"
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    steps_per_epoch = -(-len(train_loader) // args.accumulate)
    total_steps = args.epochs * steps_per_epoch
    epoch, step, skipped_steps, bad_steps, bad_in_a_row, best = 0, 0, 0, 0, 0, -1.0
    if args.resume:
        if state["epoch"] >= args.epochs:
            raise ValueError(f"{args.resume}: all {state['epoch']} epochs are done; to go on give --epochs above that")
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, parameter_groups(model, args)):
            group.update(factor=own["factor"], weight_decay=own["weight_decay"])  # this run's, not the checkpoint's
        if state["scaler"]:  # empty where it was written without fp16
            scaler.load_state_dict(state["scaler"])
        epoch, step, skipped_steps, bad_steps, best = (state[k] for k in (
            "epoch", "step", "skipped_steps", "bad_steps", "best"))
        set_rng_state(state["rng"], device)
        if rank > 0:  # the checkpoint holds the generators of rank 0
            torch.manual_seed(args.seed + rank + world_size * step)
    else:
        torch.manual_seed(args.seed + rank)  # what was drawn so far depends on how full the caches were

    # where it is logged
    folder = Path(args.resume).parent if args.resume else Path(args.runs) / (
        f"{args.name or ('baseline' if args.no_clip else 'bifusion')}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    folder = gather(folder, world_size)[0]  # the clocks of two processes may differ
    writer = None
    if main_process:
        folder.mkdir(parents=True, exist_ok=bool(args.resume))
        writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)
        table = "\n".join(f"| {k} | {v} |" for k, v in sorted(vars(args).items()))
        writer.add_text("config", f"| option | value |\n| --- | --- |\n{table}", step)
        for text in warnings:
            writer.add_text("warning", text, step)

    fusion = model.fusion
    modules = {"encoder_3d": fusion.encoder_3d, "encoder_2d": encoder_2d,
               "head": nn.ModuleList([module for name, module in model.named_children() if name != "fusion"]),
               "fusion": nn.ModuleList([fusion.proj_3d, *([fusion.gate, fusion.norm_2d] if encoder_2d else [])])}
    statistics = [buffer for name, buffer in model.named_buffers() if "running_" in name or "num_batches" in name]
    statistics_before = [buffer.clone() for buffer in statistics]
    window, speed = defaultdict(list), defaultdict(list)  # since the last log: tensors, and numbers of the host
    metrics = {"miou": float("nan")}
    bar = tqdm(total=args.epochs * len(train_set), initial=epoch * len(train_set), unit="sample", smoothing=0.05,
               disable=not main_process, dynamic_ncols=True)
    model.train()
    while epoch < args.epochs:
        sampler.set_epoch(epoch)
        train_set.set_epoch(epoch)
        criteria["clip"].loss_weight = clip_loss_weight(epoch, args.clip_warmup, args.clip_weights)
        fusion.point_target = args.clip_target == "point" and criteria["clip"].loss_weight > 0  # else no time is spent
        batches = iter(train_loader)
        for i in range(len(train_loader)):
            # the first batch of a step; the last step of an epoch may have fewer
            if i % args.accumulate == 0:
                position = epoch * steps_per_epoch + i // args.accumulate  # `step` of a resumed run may differ
                group = min(args.accumulate, len(train_loader) - i)
                seen, step_loss, waited = [], torch.zeros((), device=device), 0.0
                torch._foreach_copy_(statistics_before, statistics)
                clock = time.perf_counter()

            waiting = time.perf_counter()
            batch = to_device(next(batches), device)
            waited += time.perf_counter() - waiting
            seen.append((batch, rng_state(device)))

            # forward and backward
            out, terms = compute_losses(model, batch, criteria, args)
            loss = sum(terms.values())
            if args.diagnose and (step + 1) % args.diagnose == 0 and len(seen) == group and main_process:
                for name, value in term_statistics(terms, out, scaler.get_scale()).items():
                    writer.add_scalar(f"diagnose/{name}", value, step + 1)
                gates = out["alpha"][out["valid"]].detach().float()
                if len(gates) and gates.isfinite().all():  # TensorBoard refuses a histogram of nothing
                    writer.add_histogram("diagnose/gate", gates, step + 1)
            scaler.scale(loss / group).backward()
            step_loss += loss.detach() / group
            window["loss/total"].append(loss.detach())
            for name, weighted in terms.items():
                window[f"weighted/{name}"].append(weighted.detach())
                window[f"loss/{name}"].append(weighted.detach() / criteria[name].loss_weight)
            if "instance" in terms:
                for name, value in criteria["instance"].terms.items():
                    window[f"loss/instance_{name}"].append(value)
            if "clip" in terms:
                window["clip/nonfinite_rows"].append(criteria["clip"].counts[1])
            bar.update(min(args.batch_size * world_size, (epoch + 1) * len(train_set) - bar.n))
            if len(seen) < group:
                continue

            # optimiser step
            factor = lr_factor(position, total_steps, args.lr_warmup, args.schedule)
            for param_group in optimizer.param_groups:
                param_group["lr"] = args.lr * param_group["factor"] * factor
            # before unscaling, so that every rank sees the same inf; the loss travels along for the same reason
            step_loss, = average_gradients(parameters, world_size, [step_loss])
            scaler.unscale_(optimizer)
            log_now = (step + 1) % args.log_every == 0 or position + 1 == total_steps
            if log_now and main_process:
                for name, module in modules.items():
                    grads = [p.grad for p in module.parameters() if p.grad is not None] if module else []
                    if grads:
                        writer.add_scalar(f"grad/{name}", torch.stack(torch._foreach_norm(grads)).norm(), step + 1)
            norm = nn.utils.clip_grad_norm_(parameters, args.clip_norm)
            finite, loss_finite = torch.stack([(norm + step_loss).isfinite(), step_loss.isfinite()]).tolist()
            if finite:
                scaler.step(optimizer)
                scaler.update()
                bad_in_a_row = 0
            else:
                torch._foreach_copy_(statistics, statistics_before)  # a skipped step leaves no trace
                scale = scaler.get_scale()
                scaler.update()
                # fp16 looks for its scale by overflowing: no alarm unless it no longer finds one
                if loss_finite and scaler.get_scale() < scale and scale >= 1:
                    skipped_steps += 1
                else:
                    bad_steps, bad_in_a_row = bad_steps + 1, bad_in_a_row + 1
                    path = folder / f"bad_step_{step}{f'_rank{rank}' if world_size > 1 else ''}.pt"
                    facts = {"scale": scale / group, "epoch": epoch, "step": step, "class_names": class_names,
                             "clip_fingerprint": fingerprint}
                    where = examine(model, seen, criteria, args, device, world_size,
                                    path if bad_steps <= args.max_bad_steps else None, facts)
                    text = f"epoch {epoch}, step {step} is not finite and is skipped, {bad_in_a_row} in a row; {where}"
                    say(text)
                    if main_process:
                        writer.add_text("sentry", text.replace("\n", "  \n"), step)
                        writer.flush()
                    if bad_in_a_row >= args.max_bad_steps:
                        raise FloatingPointError(f"{bad_in_a_row} steps in a row were not finite, the last: {text}")
            optimizer.zero_grad(set_to_none=True)
            window["grad/total"].append(norm.detach())
            spent = time.perf_counter() - clock
            speed["speed/samples_per_s"].append(sum(len(b["name"]) for b, _ in seen) * world_size / spent)
            speed["speed/data_wait"].append(waited / spent)
            step += 1

            if log_now:  # means over processes, too, and one copy to the host for all of them
                values = world_mean(torch.stack([torch.stack(v).float().mean() for v in window.values()])).tolist()
            if log_now and main_process:
                stats = fusion_statistics(out, batch)
                memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else (
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
                for name, value in {**dict(zip(window, values)), **{k: np.mean(v) for k, v in speed.items()},
                                    **{f"fusion/{k}": v for k, v in stats.items()},
                                    **{f"lr/{g['name']}": g["lr"] for g in optimizer.param_groups},
                                    "clip/weight": criteria["clip"].loss_weight, "amp/scale": scaler.get_scale(),
                                    "amp/skipped_steps": skipped_steps, "sentry/bad_steps": bad_steps,
                                    "memory/peak_gib": memory / 2 ** 30, "epoch": epoch}.items():
                    writer.add_scalar(name, value, step)
                bar.set_postfix(loss=f"{values[0]:.3f}", mIoU=f"{metrics['miou']:.3f}")
            if log_now:  # on every rank
                window.clear()
                speed.clear()
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
                         "bad_steps": bad_steps, "best": max(best, metrics["miou"]), "rng": rng_state(device),
                         "config": vars(args), "class_names": class_names, "clip_fingerprint": fingerprint,
                         "warnings": warnings}
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
