# SPDX-License-Identifier: MIT
"""`python -m bench step`: a training step of BiFusion with a warm cache against the 3D baseline's, and where
its time goes. The step is `train.train_step`.

Imports train and what that is handed: cache, data, model, runlog; and bench.timing.
"""
import argparse
import copy
import tempfile
from collections import Counter
from functools import partial

import torch

import train
from bench.timing import machine, median, now, ratio, turns
from support.cache import FeatureCache
from data import to_device
from model import batches_for, build_model, build_tower, compile_parts
from support.runlog import RunLog

NETWORKS = {"default network": "",
            "Res16UNet34C": "--backbone res16unet34c --voxel-size 0.02 --num-points 20000"}
CLIP_WEIGHT = 0.01


class Step:
    """A network with its optimizer; called with a batch, it makes one training step.

    args: options of train.py. encoder_2d: None for the 3D baseline. clip_weight: 0 as at the start of a run.
    """

    def __init__(self, args, encoder_2d, num_classes, clip_weight=CLIP_WEIGHT, compiled=False,
                 diagnose=False):
        torch.manual_seed(0)
        self.args = args
        self.diagnose = diagnose
        self.model = build_model(vars(args), num_classes, True, encoder_2d).to(args.device)
        if compiled:
            compile_parts(self.model)
        self.criteria = train.build_criteria(args)
        self.weights = {**train.loss_weights(args, epoch=0), "clip": clip_weight}
        groups = train.parameter_groups(self.model, args)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")

    def __call__(self, batch):
        return train.train_step(self.model, [batch], self.criteria, self.weights, self.optimizer, self.scaler,
                                RunLog(), self.args.max_grad_norm, train.AMP_DTYPES[self.args.amp],
                                diagnose=self.diagnose)


def shares(step, batch, repeats=3):
    """{part: share of the time of a step}, by forward hooks; a part ends when the device has done it."""
    spent = Counter()
    started = {}
    handles = []
    last = None  # when the last part ended

    def begin(name):
        started[name] = now(step.args.device)

    def end(name, since=None):
        nonlocal last
        last = now(step.args.device)
        spent[name] += last - (since or started[name])

    def watch(name, module):
        handles.append(module.register_forward_pre_hook(lambda *_: begin(name)))
        handles.append(module.register_forward_hook(lambda *_: end(name)))

    model = step.model
    fusion = model.fusion
    watch("model", model)
    watch("fusion", fusion)
    watch("3D network", fusion.encoder_3d)
    watch("3D projection", fusion.proj_3d)
    if fusion.encoder_2d is not None:
        watch("2D projection", fusion.encoder_2d.spatial_proj)
        watch("2D norm", fusion.norm_2d)
        watch("gate", fusion.gate)
    for name, module in model.named_children():
        if name != "fusion":
            watch("heads", module)
    # the time from one part to the next goes to the later one, as clipping to the backward pass
    for criterion in step.criteria.values():
        handles.append(criterion.register_forward_hook(lambda *_: end("losses", last)))
    handles.append(step.optimizer.register_step_pre_hook(lambda *_: end("backward, clipping", last)))
    handles.append(step.optimizer.register_step_post_hook(lambda *_: end("AdamW", last)))

    step(batch)
    spent.clear()
    start = now(step.args.device)
    for _ in range(repeats):
        step(batch)
    whole = now(step.args.device) - start
    for handle in handles:
        handle.remove()

    # parts without a module of their own are what the others leave
    children = ("3D network", "3D projection", "2D projection", "2D norm", "gate")
    sampling = spent.pop("fusion") - sum(spent[name] for name in children)
    pooling = spent.pop("model") - spent["heads"] - sampling - sum(spent[name] for name in children)
    parts = {**spent, "projecting points, sampling": sampling, "superpoints": pooling}
    parts["rest"] = whole - sum(parts.values())
    return {name: seconds / whole for name, seconds in parts.items() if seconds > 0}


def setup(network, device, folder, scenes=None, options=()):
    """Options of train.py, the tower, the number of classes, and make_batch.

    make_batch(n, cached=True): a batch of the first n scenes; cached features, kept in `folder`, stand in for
    the images.
    """
    args = train.parse_args([*NETWORKS[network].split(), "--clip-pretrained", "none", "--device", device,
                             "--amp", "off", "--frames-per-room", "1", "--cache", folder, *options])
    if device == "cuda":
        args.batch_size = 8
    elif args.backbone == "res16unet34c":
        args.batch_size = 1
    args.batch_size = args.rooms = scenes or args.batch_size
    dataset, _, class_names, instances = train.build_datasets(args)
    assert instances
    encoder_2d = build_tower(vars(args)).to(device)
    collate = batches_for(build_model(vars(args), len(class_names), instances, None), training=True)

    def encode(images):
        return encoder_2d.encode(images.to(device))

    cache = FeatureCache(folder, encoder_2d.fingerprint(), encode)
    cache.build(dataset.images_only)

    def make_batch(n, cached=True):  # as the loader makes it
        dataset.feature_cache = cache if cached else None
        samples = [dataset[i] for i in range(n)]
        return to_device(collate(samples), device)

    return args, encoder_2d, len(class_names), make_batch


def candidates(args, encoder_2d, num_classes, cached, with_images, compiled):
    """{name: (Step, its batch)}"""
    def step(encoder_2d=encoder_2d, args=args, **options):
        return Step(args, encoder_2d, num_classes, **options)

    steps = {"3D baseline": (step(None), cached),
             "BiFusion, CLIP loss of weight 0": (step(clip_weight=0.0), cached),
             "BiFusion": (step(), cached),
             "BiFusion, --diagnose 1": (step(diagnose=True), cached)}
    if args.device == "cuda" or args.backbone == "small":
        steps["BiFusion, --cache none"] = (step(), with_images)
    if compiled:  # in place, so on a copy of the tower
        steps["BiFusion, --compile"] = (step(copy.deepcopy(encoder_2d), compiled=True), cached)
    for amp in ("bf16", "fp16") if args.device == "cuda" else ():
        half = argparse.Namespace(**{**vars(args), "amp": amp})
        steps[f"BiFusion, --amp {amp}"] = (step(args=half), cached)
    return steps


def run(command, options=()):
    panels = {}
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            parts = setup(network, command.device, folder, command.scenes, options)
            args, encoder_2d, num_classes, make_batch = parts
            cached, with_images = (make_batch(args.batch_size, cached) for cached in (True, False))
        steps = candidates(args, encoder_2d, num_classes, cached, with_images, command.compile)
        calls = {name: partial(step, batch) for name, (step, batch) in steps.items()}
        seconds = turns(calls, command.repeats, command.device)
        medians = median(seconds)

        title = (f"{network}, {args.batch_size} scenes of {args.num_points} points, voxels of "
                 f"{args.voxel_size} m, {machine(command.device)}")
        print(f"\ntraining step, {title}, float32 if not said otherwise")
        for name, spent in medians.items():
            relative = ratio(seconds, name, "3D baseline")
            print(f"  {name:32s} {spent * 1e3:7.0f} ms  {relative} of the 3D baseline")
            if command.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()  # weights and optimizers of all candidates
                calls[name]()
                peak = (torch.cuda.max_memory_allocated() - held) / 2 ** 30
                print(f"  {'':32s} {peak:.2f} GiB beside the weights, "
                      f"{args.batch_size / spent:.0f} scenes per second")
        parts = shares(*steps["BiFusion"], max(3, command.repeats // 3))
        text = [f"{name} {share:.1%}" for name, share in parts.items()]
        print("  shares of BiFusion:", ", ".join(text))
        panels[f"training step, {title}: ms"] = {name: spent * 1e3 for name, spent in medians.items()}
        panels[f"where it goes, {network}: %"] = {name: share * 100 for name, share in parts.items()}
    return panels
