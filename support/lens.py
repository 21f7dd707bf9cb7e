# SPDX-License-Identifier: MIT
"""Images of lenses with a distortion, straightened to those of pinhole cameras, and of other pinholes.

    straight = undistort(image, intrinsics, "OPENCV", (k1, k2, p1, p2, k3))
    frames = OneCamera(frames)       the first camera of each scene for all of its frames

The mapping of a camera is computed once. Models: OpenCV's (Brown, "Decentering distortion of lenses",
1966), and its fisheye model (Kannala and Brandt, "A generic camera model", 2006).

Imports torch and numpy.
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F


def focal_and_center(intrinsics):
    """Intrinsics (3, 3) -> fx, fy, cx, cy."""
    (fx, _, cx), (_, fy, cy), _ = intrinsics.tolist()
    return fx, fy, cx, cy


@functools.lru_cache(maxsize=16)
def distorted_pixels(size, camera, model, coefficients, pinhole=None):
    """Where the pixels of an ideal pinhole image of size (H, W) lie in that of a lens: x and y (H, W) float32.

    camera: fx, fy, cx, cy of the lens, and of the pinhole if it has no others. model: "OPENCV" with k1, k2,
    p1, p2, k3, or "OPENCV_FISHEYE" with k1 to k4.
    """
    fx, fy, cx, cy = pinhole or camera
    v, u = np.indices(size)
    x = (u - cx) / fx
    y = (v - cy) / fy
    r2 = x * x + y * y
    if model == "OPENCV":
        k1, k2, p1, p2, k3 = coefficients
        scale = np.polyval([k3, k2, k1, 1], r2)
        shift_x = 2 * p1 * x * y
        shift_x += p2 * (r2 + 2 * x * x)
        shift_y = p1 * (r2 + 2 * y * y)
        shift_y += 2 * p2 * x * y
    else:
        r = np.sqrt(r2)
        theta = np.arctan(r)
        bent = theta * np.polyval([*reversed(coefficients), 1], theta * theta)
        scale = np.divide(bent, r, out=np.ones_like(r), where=r > 0)
        shift_x = 0
        shift_y = 0
    fx, fy, cx, cy = camera
    x = (x * scale + shift_x) * fx + cx
    y = (y * scale + shift_y) * fy + cy
    return x.astype(np.float32), y.astype(np.float32)


def undistort(image, intrinsics, model, coefficients, pinhole=None):
    """An image of a lens -> that of a pinhole camera, by default with the same intrinsics (3, 3); 0 outside.

    Colors (H, W, 3) uint8 are interpolated; of depth (H, W) the nearest pixel is taken, because a mean of two
    surfaces is neither. model, coefficients: see `distorted_pixels`.
    """
    height, width = image.shape[:2]
    camera = focal_and_center(intrinsics)
    straight = camera if pinhole is None else focal_and_center(pinhole)
    x, y = distorted_pixels((height, width), camera, model, coefficients, straight)
    inside = (x > -0.5) & (y > -0.5)
    inside &= x < width - 0.5
    inside &= y < height - 0.5
    x = np.where(inside, x, 0)
    y = np.where(inside, y, 0)
    if image.ndim == 2:
        row = np.rint(y).astype(np.int64)
        column = np.rint(x).astype(np.int64)
        nearest = image[row, column]
        return np.where(inside, nearest, 0).astype(image.dtype)
    grid = np.stack([x, y], -1) + np.float32(0.5)
    grid = grid * 2 / np.float32([width, height]) - 1
    grid = torch.from_numpy(grid)
    colors = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))
    sampled = F.grid_sample(colors[None] / 255, grid[None], padding_mode="border", align_corners=False)
    straight = (sampled[0] * 255).round().byte()
    straight = straight.permute(1, 2, 0).numpy()
    return np.where(inside[..., None], straight, 0)


class OneCamera:
    """A source of frames without labels (see data.py), resampled to the first camera of their scene.

    Depth is that of the nearest pixel, up to half a pixel beside. ValueError if sizes differ in a scene.
    """

    def __init__(self, frames):
        self.frames = frames
        self.first = {}  # (scene, image): size and intrinsics

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        frame = dict(self.frames[index])
        scene, _, _ = frame["name"].partition("/")
        for kind, field in (("color", "intrinsics"), ("depth", "depth_intrinsics")):
            image, own = frame[kind], frame[field]
            size, camera = self.first.setdefault((scene, kind), (image.shape[:2], own))
            if image.shape[:2] != size:
                raise ValueError(f"{frame['name']}: {kind} has size {image.shape[:2]}, "
                                 f"frames before it have {size}")
            if not np.array_equal(own, camera):
                frame[kind] = undistort(image, own, "OPENCV", (0, 0, 0, 0, 0), camera)
                frame[field] = camera
        return frame
