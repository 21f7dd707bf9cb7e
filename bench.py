# SPDX-License-Identifier: MIT
"""Side-by-side timings, each against what one would otherwise run, on the same input.

    python bench.py step                         # a training step against the 3D baseline's, and where its time goes
    python bench.py loader                       # frames a second and worker against a plain loader
    python bench.py scale                        # projection, sampling, gate from 10,000 to 1,000,000 points
    python bench.py encode                       # spatial and global features against open_clip's encode_image
    python bench.py sample                       # points into feature maps against a loop of grid_sample
    python bench.py sparse                       # sparse convolution and Res16UNet34C, against spconv
    python bench.py ap                           # ScanNet AP of many large scenes
    python bench.py stability                    # the study of the CLIP losses (stability.py)

All take --device cuda, and --plot FILE.png (pip install matplotlib). Candidates take turns in one process; a ratio is
the median over the turns, with its quartiles. With --threads 1 the clock is the CPU time, which other work on the
machine disturbs least; read ratios rather than milliseconds all the same. glibc hands large buffers back to the system
and takes them again, page by page: on a CPU, `MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
python bench.py step` shows what a step costs without that, and the same before train.py saves it.
"""
import argparse
import copy
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

import fusion
import rooms
import train
from bench_scale import scale
from bench_sparse import sparse
from cache import FeatureCache
from data import PointDataset, ScanNetFrames, collate, resize_intrinsics
from encoder import Enhanced2DEncoder
from fusion import sample_features
from losses import ClipConsCriterion, InstanceCriterion, SemanticCriterion
from metrics import evaluate_instances
from options import parse_args as train_options
from stability import stability, stability_options
from timing import chart, median, now, ratio, require_matplotlib, turns, where

# ----------------------------------------------------------------------------------------------------- a training step

NETWORKS = {"default network": "", "Res16UNet34C": "--backbone res16unet34c --voxel-size 0.02 --points 20000"}


class Step:
    """A training step as train.py makes it; `run(batch)` makes one."""

    def __init__(self, options, encoder_2d, classes, instances, clip_weight=0.0, compiled=False, diagnosed=False):
        torch.manual_seed(0)
        self.options, self.device, self.diagnosed = options, options.device, diagnosed
        self.model = train.build_model(options, encoder_2d, classes, instances).to(options.device)
        if compiled:
            train.compile_parts(self.model)
        self.criteria = {"semantic": SemanticCriterion(options.semantic_weight).to(options.device),
                         "instance": InstanceCriterion(options.instance_weight),
                         "clip": ClipConsCriterion(clip_weight, options.temperature, variant=options.clip_loss)}
        self.optimizer = torch.optim.AdamW(train.parameter_groups(self.model, options), lr=options.lr, fused=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")

    def run(self, batch):
        out, terms = train.compute_losses(self.model, batch, self.criteria, self.options)
        loss = sum(terms.values())
        if self.diagnosed:
            train.term_statistics(terms, out)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def parts(self, batch, repeats):
        """{part: share of the time of a step}; a part ends when the device has done it."""
        spent, fused = Counter(), self.model.fusion
        watched = {"3D network": [(fused.encoder_3d, "forward")], "3D projection": [(fused.proj_3d, "forward")],
                   "heads": [(self.model.head, "forward")],
                   "losses": [(train, "instance_targets"), *((c, "forward") for c in self.criteria.values())],
                   "backward": [(torch.Tensor, "backward")],
                   "clipping, AdamW": [(nn.utils, "clip_grad_norm_"), (self.optimizer, "step")]}
        if fused.encoder_2d is not None:
            watched.update({"tower's projection": [(fused.encoder_2d, "project"), (fused.norm_2d, "forward")],
                            "points to pixels": [(fused, "project"), (fusion, "view_cells")],
                            "sampling": [(fusion, "sample_cells")],
                            "gate": [(fused.gate, "forward"), (fused.gate, "read_2d")]})
        if self.model.decoder is not None:
            watched["heads"].append((self.model.decoder, "forward"))

        def watch(owner, name, part):
            function = getattr(owner, name)

            def call(*args, **options):
                start = now(self.device)
                result = function(*args, **options)
                spent[part] += now(self.device) - start
                return result

            return patch.object(owner, name, call)

        self.run(batch)
        with ExitStack() as stack:
            for part, functions in watched.items():
                for owner, name in functions:
                    stack.enter_context(watch(owner, name, part))
            start = now(self.device)
            for _ in range(repeats):
                self.run(batch)
            whole = now(self.device) - start
        return {**{part: spent[part] / whole for part in watched}, "rest": 1 - sum(spent.values()) / whole}


def step_setup(network, device, folder, scenes=None, extra=()):
    """Options of train.py, its training set with a warm feature cache, the tower, the number of classes, and a batch
    twice: with cached features, and with pictures.
    """
    options = train_options([*NETWORKS[network].split(), "--clip-pretrained", "none", "--frames-per-room", "1",
                             "--device", device, "--superpoint-cache", folder, *extra])
    full = options.backbone == "res16unet34c"
    options.batch_size = options.rooms = scenes or (8 if device == "cuda" else 1 if full else options.batch_size)
    dataset, _, class_names, instances = train.build_sets(options)
    assert instances
    encoder = train.build_encoder_2d(options, print).to(device)
    pictures = train.to_device(collate([dataset[i] for i in range(len(dataset))]), device)
    dataset.cache = FeatureCache(folder, encoder.fingerprint(), lambda images: encoder.encode(images.to(device)))
    dataset.cache.build(dataset.pictures)
    cached = train.to_device(collate([dataset[i] for i in range(len(dataset))]), device)
    return options, dataset, encoder, len(class_names), cached, pictures


def data_wait(one, dataset, workers, steps):
    """Share of the time of a training, after its first steps, that is spent waiting for the loader."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=(steps + 3) * one.options.batch_size)
    batches = iter(DataLoader(dataset, one.options.batch_size, sampler=sampler, num_workers=workers, collate_fn=collate,
                              pin_memory=one.device == "cuda"))
    waited = 0.0
    for i in range(steps + 3):
        if i == 3:
            if one.device == "cuda":
                torch.cuda.synchronize()
            waited, start = 0.0, time.perf_counter()
        clock = time.perf_counter()
        batch = train.to_device(next(batches), one.device)
        waited += time.perf_counter() - clock
        one.run(batch)
        if one.device == "cuda":
            torch.cuda.synchronize()
    return waited / (time.perf_counter() - start)


def step(args):
    """A training step of BiFusion with a warm cache, against the 3D baseline's; where its time goes."""
    panels = {}
    if args.device == "cpu":
        train.keep_buffers()
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            options, dataset, encoder, classes, cached, pictures = step_setup(network, args.device, folder, args.scenes)
            steps = {"3D baseline": (Step(options, None, classes, True), cached),
                     "BiFusion, first epochs: no CLIP loss": (Step(options, encoder, classes, True), cached),
                     "BiFusion": (Step(options, encoder, classes, True, 0.01), cached),
                     "BiFusion, --diagnose 1": (Step(options, encoder, classes, True, 0.01, diagnosed=True), cached)}
            if args.device == "cuda" or options.backbone == "small":
                steps["BiFusion, tower in every step"] = (Step(options, encoder, classes, True, 0.01), pictures)
            if args.compile:  # in place, so on a tower of its own
                own = copy.deepcopy(encoder)
                steps["BiFusion, --compile"] = (Step(options, own, classes, True, 0.01, compiled=True), cached)
            for amp in ("bf16", "fp16") if args.device == "cuda" else ():
                own = argparse.Namespace(**{**vars(options), "amp": amp})
                steps[f"BiFusion, --amp {amp}"] = (Step(own, encoder, classes, True, 0.01), cached)
            seconds = turns({name: (lambda s=s, batch=batch: s.run(batch)) for name, (s, batch) in steps.items()},
                            args.repeats, args.device)
            title = (f"{network}, {options.batch_size} scenes of {options.points} points, voxels of "
                     f"{options.voxel_size} m, {where(args.device)}")
            print(f"\ntraining step, {title}, float32 where not said otherwise")
            for name, spent in median(seconds).items():
                print(f"  {name:38s} {spent * 1e3:7.0f} ms  {ratio(seconds, name, '3D baseline')}")
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    steps[name][0].run(steps[name][1])
                    print(f"  {'':38s} {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB at most, "
                          f"{options.batch_size / spent:.0f} scenes/s")
            shares = steps["BiFusion"][0].parts(cached, max(3, args.repeats // 3))
            print("  shares of BiFusion's:", ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
            if "BiFusion, tower in every step" in steps:
                spent = median(seconds)
                share = 1 - spent["BiFusion"] / spent["BiFusion, tower in every step"]
                print(f"  the tower's share without a cache: {share:.0%}")
                wait = data_wait(steps["BiFusion"][0], dataset, args.workers, 10 * args.repeats)
                print(f"  waiting for {args.workers} workers: {wait:.1%}")
            panels[f"training step, {title}: ms"] = {n: s * 1e3 for n, s in median(seconds).items()}
            panels[f"where it goes, {network}: %"] = {n: s * 100 for n, s in shares.items()}
    return panels


# ------------------------------------------------------------------------------------------------------------- loader


def write_frames(root, rooms_and_frames, size=(480, 640)):
    """Pictures of the built-in rooms in ScanNet's exported layout, and its class list {id: name}."""
    for frame in rooms.frames("train", *rooms_and_frames, size=size):
        scene, stem = frame["name"].split("/")
        for kind in ("color", "depth", "pose", "intrinsic", "label-filt", "instance-filt"):
            (root / scene / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame["color"]).save(root / scene / "color" / f"{stem}.jpg", quality=95)
        Image.fromarray((frame["depth"] * 1000).round().astype(np.uint16)).save(root / scene / "depth" / f"{stem}.png")
        for kind in ("label", "instance"):
            Image.fromarray(frame[kind].astype(np.uint16)).save(root / scene / f"{kind}-filt" / f"{stem}.png")
        np.savetxt(root / scene / "pose" / f"{stem}.txt", np.linalg.inv(frame["world2cam"]))
        matrix = np.eye(4)
        matrix[:3, :3] = frame["intrinsics"]
        for kind in ("color", "depth"):
            np.savetxt(root / scene / "intrinsic" / f"intrinsic_{kind}.txt", matrix)
    return {0: None, **{1 + i: name for i, name in enumerate(rooms.CLASSES)}}


def plain_frame(root, name, count, image_size):
    """A frame as one would load it: every file decoded, every pixel carried into the world, then `count` drawn."""
    scene, stem = name.split("/")
    color, depth, label, instance = (
        np.array(Image.open(root / scene / kind / f"{stem}.{suffix}")) for kind, suffix in (
            ("color", "jpg"), ("depth", "png"), ("label-filt", "png"), ("instance-filt", "png")))
    pose = np.loadtxt(root / scene / "pose" / f"{stem}.txt")
    intrinsics = np.loadtxt(root / scene / "intrinsic" / "intrinsic_depth.txt")[:3, :3]
    depth = depth / 1000
    v, u = np.mgrid[:depth.shape[0], :depth.shape[1]]
    points = np.stack([u * depth, v * depth, depth], -1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T
    points = points @ pose[:3, :3].T + pose[:3, 3]
    known = torch.from_numpy(np.flatnonzero(depth.ravel() > 0))
    own = known[torch.randperm(len(known))[:count]]
    image = np.array(Image.fromarray(color).resize(image_size[::-1], Image.Resampling.BICUBIC))
    return {"points": torch.from_numpy(points).float()[own],
            "colors": torch.from_numpy(color).float().view(-1, 3)[own] / 255,
            "labels": torch.from_numpy(label.astype(int)).view(-1)[own],
            "instances": torch.from_numpy(instance.astype(int)).view(-1)[own],
            "images": torch.from_numpy(image).permute(2, 0, 1).float() / 255, "depth": torch.from_numpy(depth).float(),
            "world2cam": torch.from_numpy(np.linalg.inv(pose)).float(),
            "intrinsics": torch.from_numpy(resize_intrinsics(intrinsics, depth.shape, image_size)).float()}


def loader(args):
    """Frames a second and worker, 640 x 480, 20,000 points drawn, against a plain loader."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = ScanNetFrames(root, write_frames(root, (4, 2)))
        options = dict(num_points=20_000, image_size=(240, 320))
        cache = FeatureCache(None, "random", lambda x: (torch.randn(len(x), 768, 15, 20), torch.randn(len(x), 512)))
        sets = {"as they are": PointDataset(frames, **options),
                "augmented": PointDataset(frames, augment=True, **options),
                "augmented, tokens from the cache": PointDataset(frames, augment=True, cache=cache, **options)}
        cache.build(sets["as they are"].pictures)
        candidates = {"plain loader": lambda: [plain_frame(root, name, 20_000, (240, 320)) for name in frames.names]}
        candidates |= {name: (lambda s=s: [s[i] for i in range(len(s))]) for name, s in sets.items()}
        seconds = turns(candidates, args.repeats)
    rates = {name: len(frames) / spent for name, spent in median(seconds).items()}
    print(f"one worker, 640 x 480, JPEG and PNG, 20,000 points drawn, {where('cpu')}")
    for name, rate in rates.items():
        print(f"  {name:38s} {rate:6.1f} frames/s  time {ratio(seconds, name, 'plain loader')}")
    return {"frames a second and worker": rates}


# -------------------------------------------------------------------------------------- encoder, sampler, metrics


def encode(args):
    """`Enhanced2DEncoder.encode` against `encode_image`, which gives the global feature alone."""
    encoder = Enhanced2DEncoder("ViT-B-16", None).to(args.device)
    batch = args.batch or (256 if args.device == "cuda" else 4)
    images = torch.rand(batch, 3, 224, 224, device=args.device)
    normalised = (images - 0.45) / 0.27
    with FlopCounterMode(display=False) as counter:
        encoder.encode(images[:1])
    panels = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if args.device == "cuda" else (torch.float32,):
        candidates = {"encode_image": lambda: encoder.clip.encode_image(normalised),
                      "both features": lambda: encoder.encode(images)}
        matrix = torch.randn(2 * [8192 if args.device == "cuda" else 1024], device=args.device, dtype=dtype)
        candidates["product of matrices"] = lambda: matrix @ matrix
        with torch.no_grad(), torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            seconds = turns(candidates, args.repeats, args.device)
        spent = median(seconds)
        rate, peak = (flop / spent[name] / 1e12 for name, flop in (
            ("both features", counter.get_total_flops() * batch), ("product of matrices", 2 * len(matrix) ** 3)))
        print(f"ViT-B-16, {str(dtype)[6:]}, batch {batch}, {where(args.device)}: "
              f"{spent['both features'] / batch * 1e3:.2f} ms an image, "
              f"{ratio(seconds, 'both features', 'encode_image')} of encode_image; {rate:.3f} TFLOP/s, "
              f"{rate / peak:.2f} of those of a product of {len(matrix)} x {len(matrix)} matrices")
        panels[f"ViT-B-16, {str(dtype)[6:]}, ms an image"] = {
            n: spent[n] / batch * 1e3 for n in ("encode_image", "both features")}
    return panels


def sample(args):
    """`sample_features` against one `grid_sample` a scene, both passes: 8 scenes of 20,000 points, 256 channels."""
    scenes, points, size = 8, 20_000, (240, 320)
    feature_map = torch.randn(scenes, 256, 15, 20, device=args.device, requires_grad=True)
    uv = torch.rand(scenes * points, 2, device=args.device) * torch.tensor([320.0, 240.0], device=args.device) - 0.5
    batch = torch.arange(scenes, device=args.device).repeat_interleave(points)

    def loop():
        out = []
        for scene in range(scenes):
            grid = (uv[batch == scene] + 0.5) / torch.tensor([320.0, 240.0], device=args.device) * 2 - 1
            out.append(torch.nn.functional.grid_sample(feature_map[scene:scene + 1], grid[None, :, None],
                                                       align_corners=False, padding_mode="border")[0, :, :, 0].T)
        return torch.cat(out)

    def one_call():
        return sample_features(feature_map, uv, size, batch)

    gap = (loop() - one_call()).abs().max().item()
    cotangent = torch.randn(scenes * points, 256, device=args.device)
    seconds = turns({name: lambda f=f: torch.autograd.grad(f(), feature_map, cotangent)
                     for name, f in (("loop of grid_sample", loop), ("one call", one_call))}, args.repeats, args.device)
    print(f"forward and backward, {where(args.device)}: {median(seconds)['one call'] * 1000:.0f} ms, "
          f"{ratio(seconds, 'one call', 'loop of grid_sample')} of the loop (largest difference {gap:.0e})")
    return {"sampling, forward and backward, ms": {n: s * 1e3 for n, s in median(seconds).items()}}


def ap(args):
    """AP of 100 scenes of 100,000 points with 100 predictions each, of 3,000 points as a rule."""
    g = torch.Generator().manual_seed(0)
    truth, predictions = [], []
    for _ in range(100):
        blocks = torch.randint(0, 40, (100_000 // 50,), generator=g).repeat_interleave(50)
        truth.append((blocks % 18 + 1) * 1000 + blocks)
        predictions.append({"masks": torch.rand(100, 100_000, generator=g) < 0.03,
                            "labels": torch.randint(1, 19, (100,), generator=g),
                            "scores": torch.rand(100, generator=g)})
    start = time.perf_counter()
    evaluate_instances(predictions, truth, range(1, 19))
    spent = time.perf_counter() - start
    print(f"AP of 100 scenes: {spent:.1f} s, {where('cpu')}")
    return {"AP of 100 scenes, s": {"evaluate_instances": spent}}


def parse_args(argv=None):
    """The command, its options and their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run, repeats in ((step, 9), (loader, 5), (scale, 1), (encode, 9), (sample, 9), (sparse, 15), (ap, 1)):
        command = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0])
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
        command.add_argument("--plot", metavar="FILE", help="draw the figures, too")
        if run not in (scale, ap):
            command.add_argument("--repeats", type=int, default=repeats, help="turns, at least 2")
        if run is encode:
            command.add_argument("--batch", type=int, help="images (default: 4, on a GPU 256)")
        if run is step:
            command.add_argument("--scenes", type=int, help="in a batch (default: train.py's; 1 for Res16UNet34C; on a "
                                 "GPU 8)")
            command.add_argument("--workers", type=int, default=2, help="that load data while it trains")
            command.add_argument("--compile", action="store_true", help="also a step with train.py --compile")
        if run is scale:
            command.add_argument("--points", type=int, default=1_000_000, help="of the largest scene")
        command.set_defaults(run=run)
    command = commands.add_parser("stability", help=stability.__doc__.split("\n")[0])
    stability_options(command)
    command.set_defaults(run=stability)
    args = parser.parse_args(argv)
    if getattr(args, "repeats", 2) < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    return args


def main(argv=None):
    """Runs one comparison, prints it, and draws it where asked to."""
    args = parse_args(argv)
    if args.run is stability:
        return stability(args)
    if args.plot:
        require_matplotlib()
    torch.set_num_threads(args.threads)
    panels = args.run(args)
    if args.plot:
        chart(args.plot, panels)


if __name__ == "__main__":
    main()
