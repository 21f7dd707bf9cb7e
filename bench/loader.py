# SPDX-License-Identifier: MIT
"""`python -m bench loader`: frames per second and worker of ScanNetFrames and PointDataset, against a plain loader.

Frames of 640 x 480 as JPEG and PNG, 20,000 points drawn. Imports cache, data, rooms, scannet and bench.timing.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.timing import machine, median, ratio, turns
from support.cache import FeatureCache
from data import PointDataset, resize_intrinsics
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames, write_frames

IMAGE_SIZE = (240, 320)


def plain_frame(root, name, count, image_size):
    """A frame as one would load it: every file decoded, every pixel carried into the world, then `count` drawn."""
    scene, stem = name.split("/")
    color = np.array(Image.open(root / scene / "color" / f"{stem}.jpg"))
    depth = np.array(Image.open(root / scene / "depth" / f"{stem}.png")) / 1000
    label = np.array(Image.open(root / scene / "label-filt" / f"{stem}.png"))
    instance = np.array(Image.open(root / scene / "instance-filt" / f"{stem}.png"))
    pose = np.loadtxt(root / scene / "pose" / f"{stem}.txt")
    intrinsics = np.loadtxt(root / scene / "intrinsic" / "intrinsic_depth.txt")

    v, u = np.mgrid[:depth.shape[0], :depth.shape[1]]
    points = np.stack([u * depth, v * depth, depth], -1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T
    points = points @ pose[:3, :3].T + pose[:3, 3]
    known = torch.from_numpy(np.flatnonzero(depth.ravel() > 0))
    drawn = known[torch.randperm(len(known))[:count]]
    image = np.array(Image.fromarray(color).resize(image_size[::-1], Image.Resampling.BICUBIC))
    return {"points": torch.from_numpy(points).float()[drawn],
            "features": torch.from_numpy(color).float().view(-1, 3)[drawn] / 255,
            "labels": torch.from_numpy(label.astype(int)).view(-1)[drawn],
            "instances": torch.from_numpy(instance.astype(int)).view(-1)[drawn],
            "images": torch.from_numpy(image).permute(2, 0, 1).float() / 255,
            "depth": torch.from_numpy(depth).float(),
            "world2cam": torch.from_numpy(np.linalg.inv(pose)).float(),
            "intrinsics": torch.from_numpy(resize_intrinsics(intrinsics, depth.shape, image_size)).float()}


def random_features(images):
    """Stands in for the CLIP tower: tokens (B, 768, 15, 20) and pooled features (B, 512)."""
    return torch.randn(len(images), 768, 15, 20), torch.randn(len(images), 512)


def run(args, num_rooms=8, size=(480, 640), num_points=20_000):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "frames"
        classes = write_frames(RoomFrames("train", num_rooms, 1, size=size), root)
        frames = ScanNetFrames(root, classes)
        plain = PointDataset(frames, num_points, IMAGE_SIZE)
        feature_cache = FeatureCache(Path(folder) / "cache", "random", random_features)
        feature_cache.build(plain.images_only)
        datasets = {
            "as they are": plain,
            "augmented": PointDataset(frames, num_points, IMAGE_SIZE, augment=True),
            "augmented, cached features": PointDataset(frames, num_points, IMAGE_SIZE, augment=True,
                                                       feature_cache=feature_cache)}
        calls = {"plain loader": lambda: [plain_frame(root, name, num_points, IMAGE_SIZE) for name in frames.names]}
        for name, dataset in datasets.items():
            calls[name] = lambda dataset=dataset: [dataset[i] for i in range(len(dataset))]
        seconds = turns(calls, args.repeats)

    rates = {name: len(frames) / spent for name, spent in median(seconds).items()}
    print(f"one worker, {size[1]} x {size[0]}, JPEG and PNG, {num_points} points drawn, {machine('cpu')}")
    for name, rate in rates.items():
        print(f"  {name:28s} {rate:6.1f} frames per second, {ratio(seconds, name, 'plain loader')} of the plain "
              "loader's time")
    return {"frames per second and worker": rates}
