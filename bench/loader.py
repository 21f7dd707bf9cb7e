# SPDX-License-Identifier: MIT
"""`python -m bench loader`: frames per second and worker of PointDataset, against a plain loader.

Frames of 640 x 480 as JPEG and PNG, 20,000 points drawn. Imports cache, data, rooms, scannet, bench.timing.
"""
import tempfile
from functools import partial
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


def read_image(path):
    return np.array(Image.open(path))


def plain_frame(root, name, count, image_size):
    """A frame as one would load it: all files decoded, all pixels carried into the world, `count` drawn."""
    scene, stem = name.split("/")
    folder = root / scene
    color = read_image(folder / "color" / f"{stem}.jpg")
    depth = read_image(folder / "depth" / f"{stem}.png") / 1000
    label = read_image(folder / "label-filt" / f"{stem}.png")
    instance = read_image(folder / "instance-filt" / f"{stem}.png")
    pose = np.loadtxt(folder / "pose" / f"{stem}.txt")
    intrinsics = np.loadtxt(folder / "intrinsic" / "intrinsic_depth.txt")

    v, u = np.indices(depth.shape)
    pixels = np.stack([u * depth, v * depth, depth], -1)
    in_camera = pixels.reshape(-1, 3) @ np.linalg.inv(intrinsics).T
    points = in_camera @ pose[:3, :3].T + pose[:3, 3]
    known = np.flatnonzero(depth)
    drawn = np.random.permutation(known)[:count]
    image = Image.fromarray(color).resize(image_size[::-1], Image.Resampling.BICUBIC)
    image = np.array(image, np.float32).transpose(2, 0, 1)
    world2cam = np.linalg.inv(pose)
    intrinsics = resize_intrinsics(intrinsics, depth.shape, image_size)
    fields = {"points": points[drawn].astype(np.float32),
              "features": color.reshape(-1, 3)[drawn].astype(np.float32) / 255,
              "labels": label.ravel()[drawn].astype(int),
              "instances": instance.ravel()[drawn].astype(int),
              "images": image / 255,
              "depth": depth.astype(np.float32),
              "world2cam": world2cam.astype(np.float32),
              "intrinsics": intrinsics.astype(np.float32)}
    return {key: torch.from_numpy(value) for key, value in fields.items()}


def random_features(images):
    """Stands in for the CLIP tower: tokens (B, 768, 15, 20) and pooled features (B, 512)."""
    B = len(images)
    return torch.randn(B, 768, 15, 20), torch.randn(B, 512)


def run(args, num_rooms=8, size=(480, 640), num_points=20_000):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "frames"
        rooms = RoomFrames("train", num_rooms, 1, size=size)
        frames = ScanNetFrames(root, write_frames(rooms, root))
        plain = PointDataset(frames, num_points, IMAGE_SIZE)
        feature_cache = FeatureCache(Path(folder) / "cache", "random", random_features)
        feature_cache.build(plain.images_only)
        augmented = partial(PointDataset, frames, num_points, IMAGE_SIZE, augment=True)
        datasets = {"as they are": plain,
                    "augmented": augmented(),
                    "augmented, cached features": augmented(feature_cache=feature_cache)}

        def load_plain():
            for name in frames.names:
                plain_frame(root, name, num_points, IMAGE_SIZE)

        calls = {"plain loader": load_plain}
        calls |= {name: partial(list, dataset) for name, dataset in datasets.items()}
        seconds = turns(calls, args.repeats)

    print(f"one worker, {size[1]} x {size[0]}, JPEG and PNG, {num_points} points, {machine('cpu')}")
    rates = {}
    for name, spent in median(seconds).items():
        rates[name] = len(frames) / spent
        print(f"  {name:28s} {rates[name]:6.1f} frames per second, "
              f"{ratio(seconds, name, 'plain loader')} of the plain loader's time")
    return {"frames per second and worker": rates}
