# SPDX-License-Identifier: MIT
"""Images of lenses with a distortion, straightened to those of pinhole cameras.

    straight = undistort(image, intrinsics, "OPENCV", (k1, k2, p1, p2, k3))

The mapping of a camera is computed once. Models: OpenCV's (Brown, "Decentering distortion of lenses", 1966), and its
fisheye model (Kannala and Brandt, "A generic camera model", 2006).

Imports torch and numpy.
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F


@functools.lru_cache(maxsize=16)
def distorted_pixels(size, camera, model, coefficients):
    """Where the pixels of an ideal pinhole image of size (H, W) lie in that of a lens: x and y, (H, W) float32 each.

    camera: fx, fy, cx, cy of both. model: "OPENCV" with k1, k2, p1, p2, k3, or "OPENCV_FISHEYE" (Kannala-Brandt)
    with k1 to k4.
    """
    fx, fy, cx, cy = camera
    v, u = np.indices(size)
    x, y = (u - cx) / fx, (v - cy) / fy
    r2 = x * x + y * y
    if model == "OPENCV":
        k1, k2, p1, p2, k3 = coefficients
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        shift_x = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        shift_y = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        x, y = x * radial + shift_x, y * radial + shift_y
    else:
        k1, k2, k3, k4 = coefficients
        r = np.sqrt(r2)
        theta = np.arctan(r)
        t2 = theta * theta
        bent = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
        scale = np.divide(bent, r, out=np.ones_like(r), where=r > 0)
        x, y = x * scale, y * scale
    return (x * fx + cx).astype(np.float32), (y * fy + cy).astype(np.float32)


def undistort(image, intrinsics, model, coefficients):
    """An image of a lens -> that of the pinhole camera with the same intrinsics (3, 3); 0 outside.

    Colors (H, W, 3) uint8 are interpolated; of depth (H, W) the nearest pixel is taken, because a mean of two surfaces
    is neither. model, coefficients: see `distorted_pixels`.
    """
    height, width = image.shape[:2]
    camera = tuple(intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]].tolist())
    x, y = distorted_pixels((height, width), camera, model, coefficients)
    inside = (x > -0.5) & (x < width - 0.5)
    inside &= (y > -0.5) & (y < height - 0.5)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    if image.ndim == 2:
        nearest = image[np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)]
        return np.where(inside, nearest, 0).astype(image.dtype)
    grid = np.stack([(x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1], -1).astype(np.float32)
    colors = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)) / 255
    sampled = F.grid_sample(colors[None], torch.from_numpy(grid)[None], padding_mode="border",
                            align_corners=False)[0]
    straight = (sampled * 255).round().byte().permute(1, 2, 0).numpy()
    return np.where(inside[..., None], straight, 0)
