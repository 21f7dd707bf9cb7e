# SPDX-License-Identifier: MIT
"""What RGB-D frames and their labels tell one by one, without a second frame that sees the same.

Fillers and ranges of depth; whether surfaces are flat, which they are only if depth means z; whether
color edges lie on depth edges; which way the surfaces face; whether labels and instances are plausible.
check.py decides what of it is a fault.

Imports numpy.
"""
import numpy as np

EDGE_SHIFT = 56  # pixels of images that are 160 wide, by which color edges may lie off depth edges

# ----------------------------------------------------------------------------------------------- depth


def known_values(depth):
    """Meters (n,) of the pixels of an image whose depth is known."""
    return depth[(depth > 0) & np.isfinite(depth)]


def find_filler(images):
    """A value of depth in many pixels of several images that no similar value comes near to.

    Returns it, or None, and the shares (F,) of the images that hold the most frequent value.
    """
    depth = np.concatenate([known_values(image)[::7] for image in images])
    values, counts = np.unique(depth, return_counts=True)
    most = counts.argmax()
    near = np.delete(counts[max(0, most - 10):most + 11], min(most, 10))
    shares = np.array([(image == values[most]).mean() for image in images])
    spread = (shares > 0.005).sum() >= max(2, 0.2 * len(images))
    found = spread and shares.mean() > 0.002 and counts[most] > 20 * np.median(near)
    return (values[most] if found else None), shares


def common_top(images):
    """The largest depth if it is the same in more than 90 % of at least 3 images, else None."""
    tops = np.array([known_values(image).max() for image in images])
    middle = np.median(tops)
    return middle if len(images) > 2 and (tops == middle).mean() > 0.9 else None


def smooth_points(depth, intrinsics):
    """Points (h, w, 3) in the camera, means of blocks, about 40 per row; NaN where most is unknown."""
    k = max(1, depth.shape[1] // 40)
    height, width = (size // k for size in depth.shape)
    blocks = (height, k, width, k, -1)
    depth = depth[:height * k, :width * k]
    v, u = np.indices(depth.shape)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    total = (rays * depth[..., None]).reshape(blocks).sum((1, 3))
    count = (depth > 0).reshape(blocks).sum((1, 3))
    return total / np.where(count > k * k / 2, count, np.nan)


def flatness(points):
    """How flat the two largest planes of a frame are if depth is z, the length of the ray, or 1 / z.

    points: see `smooth_points`. A plane's 1 / z is affine in x / z and y / z. Returns the mean log of
    the relative errors of 1 / z under these readings (3,), or None without depth.
    """
    points = points[np.isfinite(points).all(-1)]
    if len(points) < 100:
        return None
    depth = points[:, 2]
    rays = points / depth[:, None]
    triples = np.random.default_rng(0).integers(len(points), size=(600, 3))
    extent = np.abs(np.diff(rays[triples], axis=1)).max((1, 2))
    triples = triples[np.argsort(extent)[:150]]  # close together, so that many lie on one surface
    triples = triples[np.abs(np.linalg.det(rays[triples])) > 1e-5]
    costs = []
    for inverse in (1 / depth, np.linalg.norm(rays, axis=1) / depth, depth):
        planes = np.linalg.solve(rays[triples], inverse[triples][..., None])
        error = np.abs((rays @ planes)[..., 0] / inverse - 1)
        error = np.log(np.clip(error, 0.001, 0.05))  # (planes, n)
        first = error[error.mean(1).argmin()]
        costs.append(np.minimum(error, first).mean(1).min())
    return np.array(costs)


# ---------------------------------------------------------------------------------- depth beside color


def edge_correlation(pairs):
    """Correlation of depth edges with color edges over shifts of the color image, summed over frames.

    pairs: of depth and of gray values (H, W), the latter seen at the pixels of the former, 160 wide.
    Returns (2 EDGE_SHIFT + 1, 2 EDGE_SHIFT + 1); a shift of (0, 0) is in the middle.
    """
    total = np.zeros((2 * EDGE_SHIFT + 1,) * 2)
    for depth, gray in pairs:
        logs = np.log(np.where(depth > 0, depth, np.nan))
        jumps = 1.0 * (np.fmax(*np.abs(np.gradient(logs))) > 0.02)
        steep = np.nan_to_num(np.log1p(np.hypot(*np.gradient(gray))))
        scale = jumps.std() * steep.std() * jumps.size
        if scale > 0:
            size = [extent + 2 * EDGE_SHIFT for extent in jumps.shape]
            edges = np.fft.rfft2(jumps - jumps.mean(), size).conj()
            spectrum = edges * np.fft.rfft2(steep - steep.mean(), size)
            shifted = np.roll(np.fft.irfft2(spectrum, size), (EDGE_SHIFT, EDGE_SHIFT), (0, 1))
            total += shifted[:len(total), :len(total)] / scale
    return total


def peak(correlation):
    """Shift (v, u) with the largest correlation."""
    return np.array(np.unravel_index(correlation.argmax(), correlation.shape)) - EDGE_SHIFT


# -------------------------------------------------------------------------------------------------- up


def surface_normals(points):
    """Unit normals (n, 3) of points (h, w, 3), see `smooth_points`, towards the camera."""
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(down, across)
    normals *= -np.sign((normals * points[1:-1, 1:-1]).sum(-1, keepdims=True))
    normals = normals[np.isfinite(normals).all(-1)]
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


def find_up(normals, cameras):
    """The most frequent of world normals (n, 3) near the cameras' mean up (3,); zero if unclear."""
    near = normals[normals @ cameras > 0.6 * np.linalg.norm(cameras)]
    if np.linalg.norm(cameras) < 0.5 or len(near) < 30:
        return np.zeros(3)
    votes = near[::len(near) // 100 + 1] @ near.T > 0.985  # within 10 degrees
    if votes.sum(1).max() < 0.05 * len(normals):
        return np.zeros(3)
    up = near[votes[votes.sum(1).argmax()]].mean(0)
    up = near[near @ up > 0.985 * np.linalg.norm(up)].sum(0)
    return up / np.linalg.norm(up)


# ---------------------------------------------------------------------------------------------- labels


def third_classes(label):
    """Pixels of a label image that lie between two classes, and those of them of a third class (2,)."""
    result = np.zeros(2, np.int64)
    for image in (label, label.T):
        before, middle, after = image[:-4], image[2:-2], image[4:]
        border = (before != after) & (np.minimum(np.minimum(before, middle), after) >= 0)
        third = border & (middle != before) & (middle != after)
        result += border.sum(), third.sum()
    return result


def below_floor(height, is_floor):
    """Share of points (n,) that lie 20 cm below the floor; None if hardly any point is floor."""
    if is_floor.sum() <= 0.01 * len(height):
        return None
    return (height < np.median(height[is_floor]) - 0.2).mean()


def count_instances(labels, instances):
    """Rows (label, instance, pixels) of the pixels (n,) of a frame that have a label; instance -1: none."""
    pairs = np.stack([labels, instances], 1)[labels >= 0]
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    return np.column_stack([pairs, counts])


def mixed_pixels(table):
    """Pixels whose instance belongs mostly to another class. table: see `count_instances`."""
    total = 0
    for instance in np.unique(table[:, 1]):
        pixels = table[table[:, 1] == instance, 2]
        total += pixels.sum() - pixels.max()
    return total
