# SPDX-License-Identifier: MIT
"""RGB-D frames from disk or from the built-in rooms, as points with colours, labels and the pictures they project into.

A *frame* is a dict: name "scene/frame", color (H, W, 3) uint8, depth (Hd, Wd) float32 metres with 0 = unknown,
label and instance (Hl, Wl) integers with -1 = none (or None), world2cam (4, 4) float64, intrinsics (3, 3) float64 of
the colour image, depth_intrinsics (3, 3) float64. `ScanNetFrames` and `RoomFrames` are sequences of frames; `PointDataset`
turns either into samples, `collate` samples into a ragged batch. Cameras have OpenCV axes and pixel centres at integer
coordinates, colour and depth share one pose. Augmentation moves `coords` alone; `points` stay where the camera saw
them, so that projection is exact whatever the augmentation does.

Imports torch, numpy, PIL, and its siblings rooms.py (the generator), scannet.py (the readers) and cache.py (a helper).
A cache.FeatureCache and a superpoints.SuperpointCache are handed in.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

import rooms as rooms_module  # the argument `rooms` below is a number of them
from cache import to_tensor
from scannet import ScanNetFrames, ScanNetScenes, load_classes  # noqa: F401 (all sources of frames are found here)

# ---------------------------------------------------------------------------------------------------------- geometry


def unproject(uv, depth, intrinsics, world2cam):
    """Pixels uv (n, 2) at depth (n,) metres along the optical axis -> points (n, 3) float64 in the world."""
    rays = np.column_stack([uv, np.ones(len(uv))]) @ np.linalg.inv(intrinsics).T
    cam2world = np.linalg.inv(world2cam)
    return (rays * np.asarray(depth, np.float64)[:, None]) @ cam2world[:3, :3].T + cam2world[:3, 3]


def backproject(depth, intrinsics, world2cam):
    """Depth image (H, W) metres, unknown where not a finite number above 0 -> points (n, 3) float32, in row order."""
    if np.ndim(depth) != 2 or np.shape(intrinsics) != (3, 3) or np.shape(world2cam) != (4, 4):
        raise ValueError(f"expected depth (H, W), intrinsics (3, 3), world2cam (4, 4), got {np.shape(depth)}, "
                         f"{np.shape(intrinsics)}, {np.shape(world2cam)}")
    v, u = np.nonzero((depth > 0) & np.isfinite(depth))
    return unproject(np.stack([u, v], 1), depth[v, u], intrinsics, world2cam).astype(np.float32)


def resize_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (3, 3) of an image resized from old_size to new_size, both (H, W): `c -> (c + 0.5) * s - 0.5`."""
    sy, sx = new_size[0] / old_size[0], new_size[1] / old_size[1]
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return np.linalg.inv(half) @ np.diag([sx, sy, 1.0]) @ half @ intrinsics


def crop_intrinsics(intrinsics, top, left):
    """Intrinsics (3, 3) of an image whose first `top` rows and `left` columns were cut off."""
    return np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1.0]]) @ intrinsics


# ------------------------------------------------------------------------------------------------------ augmentation


def elastic(coords, rng, granularity, magnitude):
    """Smooth random displacement: blurred normal noise on a grid of 2 * granularity, trilinear in between.

    coords (n, 3) float32; granularity and magnitude in its unit. As in SPFormer, Mask3D and ESAM; the noise is cut at 3
    sigma, so that no coordinate moves by more than 3 * magnitude (and by a ninth of the magnitude as a rule).
    """
    if coords.ndim != 2 or coords.shape[1] != 3 or len(coords) == 0 or not np.isfinite(coords).all():
        raise ValueError(f"expected finite coords (n, 3) of at least one point, got shape {coords.shape}")
    cloud = torch.from_numpy(coords)
    low, high = torch.aminmax(cloud, dim=0)
    cells = ((high - low) / (2 * granularity)).long() + 3  # the cloud, and a cell to spare on both sides
    noise = rng.standard_normal((3, *cells.tolist()[::-1]), np.float32)
    noise = torch.from_numpy(noise).clamp(-3, 3)[None]  # (1, 3, z, y, x)
    for _ in range(2):
        noise = F.avg_pool3d(noise, 3, stride=1, padding=1)
    where = ((cloud - low) / (2 * granularity) + 0.5) / (cells - 1) * 2 - 1
    shift = F.grid_sample(noise, where.view(1, 1, 1, -1, 3), align_corners=True, padding_mode="border")
    return (cloud + magnitude * shift.view(3, -1).T).numpy()


def random_similarity(rng):
    """(3, 3) matrix and (3,) shift: flips of x and y with p 0.5, any turn about z, scale 0.8 to 1.2, shift sigma 0.1 m.
    """
    angle = rng.uniform(-math.pi, math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    flip = np.diag([rng.choice([-1.0, 1.0]), rng.choice([-1.0, 1.0]), 1.0])
    return rng.uniform(0.8, 1.2) * turn @ flip, rng.normal(0, 0.1, 3)


def augment_points(coords, rng, voxel_size=0.02, elastic_p=0.5):
    """A random similarity about the cloud's centre, then, with probability elastic_p, two elastic fields.

    coords (n, 3) float32 metres -> (n, 3) float32 metres. Granularity 6 and 20, magnitude 40 and 160 voxels.
    """
    matrix, shift = random_similarity(rng)
    centre = coords.mean(0)
    coords = ((coords - centre) @ matrix.T + centre + shift).astype(np.float32)
    if rng.random() < elastic_p:
        for granularity, magnitude in ((6, 40), (20, 160)):
            coords = elastic(coords, rng, granularity * voxel_size, magnitude * voxel_size)
    return coords


def jitter_colors(colors, rng):
    """Contrast 0.8 to 1.2 about the mean, a shift (sigma 0.05 a channel), noise (sigma 0.02). (n, 3) in [0, 1]."""
    mean = colors.mean(0)
    colors = (colors - mean) * rng.uniform(0.8, 1.2) + mean + rng.normal(0, 0.05, 3)
    noise = rng.standard_normal(colors.shape, np.float32)
    return np.clip(colors + np.float32(0.02) * noise, 0, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ frames


class RoomFrames:
    """Frames of the built-in rooms (rooms.py), generated at construction; the same interface as ScanNetFrames.

    split "train" or "val": disjoint rooms; `size` (H, W) of the images.
    """

    skipped = 0

    def __init__(self, split, rooms, frames_per_room, seed=0, size=(240, 320)):
        self.class_names = list(rooms_module.CLASSES)
        self._frames = rooms_module.frames(split, rooms, frames_per_room, seed, size)
        self.names = [frame["name"] for frame in self._frames]

    def __len__(self):
        return len(self.names)

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame."""
        return self._frames[index]["color"]

    def __getitem__(self, index):
        frame = self._frames[index]
        label, instance = (frame[kind].astype(np.int32) for kind in ("label", "instance"))
        return {**frame, "label": label - 1, "instance": np.where(instance > 0, instance, -1)}


# ----------------------------------------------------------------------------------------------------------- samples

PER_POINT = ("points", "coords", "colors", "labels", "instances", "superpoints")


def resize_image(color, image_size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8, bicubic with antialiasing, the whole image; see `resize_intrinsics`."""
    if color.shape[:2] == tuple(image_size):
        return color
    return np.asarray(Image.fromarray(color).resize(image_size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def depth_to_color(frame):
    """Which colour pixel each depth pixel of known depth falls on: flat indices (n,), (n,) into depth and colour.

    Cameras with one pose see a point along one ray, so the map needs no depth: u_color = K_color inv(K_depth) u_depth.
    Points outside of the colour image are left out: nobody has seen their colour.
    """
    depth, (height, width) = frame["depth"], frame["color"].shape[:2]
    known = np.flatnonzero((depth > 0) & np.isfinite(depth))
    if depth.shape == (height, width) and np.array_equal(frame["intrinsics"], frame["depth_intrinsics"]):
        return known, known
    matrix = (frame["intrinsics"] @ np.linalg.inv(frame["depth_intrinsics"])).astype(np.float32)
    v, u = np.divmod(known, depth.shape[1])
    u, v = u.astype(np.float32), v.astype(np.float32)
    x = np.rint(matrix[0, 0] * u + matrix[0, 1] * v + matrix[0, 2]).astype(np.int64)
    y = np.rint(matrix[1, 0] * u + matrix[1, 1] * v + matrix[1, 2]).astype(np.int64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return known[inside], (y * width + x)[inside]


def registered(frame, known, seen):
    """Depth (Hd, Wd) and colours (Hd, Wd, 3) of one frame pixel by pixel, both 0 where they do not meet."""
    depth, color = frame["depth"], frame["color"]
    if known is seen:
        return depth, color
    own_depth, own_color = np.zeros(depth.size, np.float32), np.zeros((depth.size, 3), np.uint8)
    own_depth[known], own_color[known] = depth.ravel()[known], color.reshape(-1, 3)[seen]
    return own_depth.reshape(depth.shape), own_color.reshape(*depth.shape, 3)


def pixel_fields(frame, known, seen):
    """The points of depth pixels `known` (n,), which fall on colour pixels `seen` (n,): arrays (n, ...) by field."""
    v, u = np.divmod(known, frame["depth"].shape[1])
    points = unproject(np.stack([u, v], 1), frame["depth"].ravel()[known], frame["depth_intrinsics"],
                       frame["world2cam"]).astype(np.float32)
    fields = {"points": points, "colors": frame["color"].reshape(-1, 3)[seen].astype(np.float32) / 255}
    for key, image in (("labels", frame["label"]), ("instances", frame["instance"])):
        if image is None:
            fields[key] = np.full(len(known), -1, np.int64)
        else:
            fields[key] = image.ravel()[seen if image.shape == frame["color"].shape[:2] else known].astype(np.int64)
    return fields


class Pictures(Dataset):
    """The resized pictures (h, w, 3) uint8 of frames, without points: what a feature cache is built from."""

    def __init__(self, frames, image_size):
        self.frames, self.image_size = frames, image_size

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return resize_image(self.frames.color(index), self.image_size)


class PointDataset(Dataset):
    """Samples of points with the views that they project into, drawn and augmented by (seed, epoch, index) alone.

    frames: ScanNetFrames, RoomFrames, or any sequence of frames with `names` and `color(index)`.
    num_points: drawn without replacement out of a sample's back-projected pixels; all of them where there are fewer.
    image_size: (H, W) of the pictures. views: consecutive frames of a scene that make one sample; the last sample of a
    scene reaches back where its frames are not a multiple. augment: for training. color=False: all point colours are 1.
    cache: a FeatureCache built from `.pictures`; samples then hold clip_tokens and clip_pooled instead of images.
    superpoints: a SuperpointCache; samples then hold superpoints (n,), 0..S-1, each of one view.
    voxel_size: metres; elastic augmentation is counted in voxels, see `augment_points`. images=False: no pictures.

    A sample: name, seed, points and coords (n, 3) metres, colors (n, 3) in [0, 1], labels and instances (n,) with
    -1 = none, images (V, 3, H, W) in [0, 1], world2cam (V, 4, 4), intrinsics (V, 3, 3) of the resized image,
    depth (V, Hd, Wd) metres with 0 = unknown, depth_intrinsics (V, 3, 3).
    """

    def __init__(self, frames, num_points, image_size, views=1, augment=False, color=True, cache=None, seed=0,
                 superpoints=None, voxel_size=0.02, images=True):
        if len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size):
            raise ValueError(f"image_size must be (H, W) of positive integers, got {image_size!r}")
        if num_points < 1 or views < 1:
            raise ValueError(f"num_points and views must be at least 1, got {num_points} and {views}")
        self.frames, self.num_points, self.image_size, self.views = frames, num_points, tuple(image_size), views
        self.augment, self.color, self.cache, self.seed = augment, color, cache, seed
        self.superpoints, self.voxel_size, self.images = superpoints, voxel_size, images
        self.pictures = Pictures(frames, self.image_size)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch
        scenes = {}
        for index, name in enumerate(frames.names):
            scenes.setdefault(name.split("/")[0], []).append(index)
        self._samples = []
        for scene, members in scenes.items():
            if len(members) < views:
                raise ValueError(f"scene {scene} has {len(members)} frames, fewer than views={views}")
            starts = range(0, len(members), views)
            self._samples += [members[min(start, len(members) - views):][:views] for start in starts]

    def set_epoch(self, epoch):
        """Changes the draw and the augmentation of every sample (of a training set; others stay as they are)."""
        self._epoch.fill_(epoch)

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, index):
        frames = [self.frames[member] for member in self._samples[index]]
        rng = self._rng(index)
        pixels = [depth_to_color(frame) for frame in frames]
        ends = np.cumsum([len(known) for known, _ in pixels])
        if ends[-1] == 0:
            raise ValueError(f"no pixel with known depth in {', '.join(frame['name'] for frame in frames)}")
        drawn = self._draw(ends[-1], rng)
        fields = []
        for view, (frame, (known, seen), end) in enumerate(zip(frames, pixels, ends)):
            own = drawn[(drawn >= end - len(known)) & (drawn < end)] - (end - len(known))
            fields.append(pixel_fields(frame, known[own], seen[own]))
            if self.superpoints is not None:
                segments = self.superpoints.get(*registered(frame, known, seen), frame["depth_intrinsics"])
                fields[-1]["superpoints"] = segments.ravel()[known[own]] + view * segments.size
        fields = {key: np.concatenate([part[key] for part in fields]) for key in fields[0]}
        return self._sample(frames[0]["name"], frames, fields, fields["points"], rng)

    def _rng(self, index):
        return np.random.default_rng((self.seed, 1 + int(self._epoch) if self.augment else 0, index))

    def _draw(self, total, rng):
        if total <= self.num_points:
            return np.arange(total)
        return np.sort(rng.choice(total, self.num_points, replace=False, shuffle=False))

    def _sample(self, name, frames, fields, coords, rng):
        """Views and per-point fields, and the coordinates to augment -> sample."""
        fields["coords"] = augment_points(coords, rng, self.voxel_size) if self.augment else coords.astype(np.float32)
        if not self.color:
            fields["colors"] = np.ones_like(fields["colors"])
        elif self.augment:
            fields["colors"] = jitter_colors(fields["colors"], rng)
        if "superpoints" in fields:  # those that a point was drawn of, numbered without gaps
            fields["superpoints"] = np.unique(fields["superpoints"], return_inverse=True)[1]
        cameras = {
            "world2cam": [frame["world2cam"] for frame in frames],
            "intrinsics": [resize_intrinsics(frame["intrinsics"], frame["color"].shape[:2], self.image_size)
                           for frame in frames],
            "depth": [frame["depth"] for frame in frames],
            "depth_intrinsics": [frame["depth_intrinsics"] for frame in frames]}
        sample = {"name": name, "seed": int(rng.integers(2 ** 62)),  # of what the network draws for this sample
                  **{key: torch.from_numpy(value) for key, value in fields.items()},
                  **{key: torch.from_numpy(np.stack(views).astype(np.float32)) for key, views in cameras.items()}}
        if not self.images:
            return sample
        pictures = [resize_image(frame["color"], self.image_size) for frame in frames]
        if self.cache is None:
            return {**sample, "images": torch.stack([to_tensor(picture) for picture in pictures])}
        tokens, pooled = zip(*(self.cache.get(picture) for picture in pictures))
        return {**sample, "clip_tokens": torch.stack(tokens), "clip_pooled": torch.stack(pooled)}


class SceneDataset(PointDataset):
    """Samples of whole scans, with `views` of the frames that were taken in them: evenly spread, or drawn for training.

    scenes: ScanNetScenes. frames: ScanNetFrames of the same scenes (its labels are not needed: classes=None).
    points are those of the poses; coords are axis-aligned, then augmented. Superpoints are those of the scan.
    """

    def __init__(self, scenes, frames, num_points, image_size, views, augment=False, color=True, cache=None, seed=0,
                 voxel_size=0.02, images=True):
        super().__init__(frames, num_points, image_size, views, augment, color, cache, seed, None, voxel_size, images)
        self.scenes, taken = scenes, {}
        for index, name in enumerate(frames.names):
            taken.setdefault(name.split("/")[0], []).append(index)
        for name in scenes.names:
            if name not in taken:
                raise ValueError(f"scan {name} has no frame")
        self._samples = [taken[name] for name in scenes.names]

    def __getitem__(self, index):
        scene, members = self.scenes[index], self._samples[index]
        rng = self._rng(index)
        chosen = np.linspace(0, len(members) - 1, self.views).round().astype(int)
        if self.augment:
            chosen = np.sort(rng.choice(len(members), self.views, replace=False))
        drawn = self._draw(len(scene["points"]), rng)
        fields = {key: scene[key][drawn] for key in PER_POINT if key in scene}
        if "labels" not in fields:
            fields["labels"] = fields["instances"] = np.full(len(drawn), -1, np.int64)
        coords = fields["points"] @ scene["alignment"][:3, :3].T + scene["alignment"][:3, 3]
        return self._sample(scene["name"], [self.frames[members[i]] for i in chosen], fields,
                            coords.astype(np.float32), rng)


def collate(samples):
    """Ragged batch: per-point fields are concatenated to (N, ...), all others stacked to (B, V, ...).

    Adds batch (N,) int64, the sample that each point is of; `name` and `seed` become lists. Superpoints and instances
    keep their numbers within the sample.
    """
    batch = {key: [sample[key] for sample in samples] for key in ("name", "seed")}
    for key in samples[0]:
        if key in batch:
            continue
        values = [sample[key] for sample in samples]
        if key in PER_POINT:
            batch[key] = torch.cat(values)
            continue
        if any(value.shape != values[0].shape for value in values):
            raise ValueError(f"{key} differs in shape within a batch: " + ", ".join(
                f"{name} {tuple(value.shape)}" for name, value in zip(batch["name"], values)))
        batch[key] = torch.stack(values)
    sizes = torch.tensor([len(sample["points"]) for sample in samples])
    batch["batch"] = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    return batch
