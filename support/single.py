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
    depth = [known_values(image)[::7] for image in images]
    depth = np.concatenate(depth)
    values, counts = np.unique(depth, return_counts=True)
    most = counts.argmax()
    value = values[most]
    around = counts[max(0, most - 10):most + 11]
    near = np.delete(around, min(most, 10))
    shares = [(image == value).mean() for image in images]
    shares = np.array(shares)
    in_several = (shares > 0.005).sum() >= max(2, 0.2 * len(images))
    lonely = counts[most] > 20 * np.median(near)
    found = in_several and lonely and shares.mean() > 0.002
    return (value if found else None), shares


def common_top(images):
    """The largest depth if it is the same in more than 90 % of at least 3 images, else 0."""
    tops = [known_values(image).max() for image in images]
    middle = np.median(tops)
    share = np.mean(tops == middle)
    return middle if len(images) > 2 and share > 0.9 else 0


def smooth_points(depth, intrinsics):
    """Points (h, w, 3) in the camera, means of blocks, about 40 per row; NaN where most is unknown."""
    k = max(1, depth.shape[1] // 40)
    height, width = (size // k for size in depth.shape)
    blocks = (height, k, width, k, -1)
    depth = depth[:height * k, :width * k]
    v, u = np.indices(depth.shape)
    pixels = np.stack([u, v, np.ones_like(u)], -1)
    rays = pixels @ np.linalg.inv(intrinsics).T
    points = rays * depth[..., None]
    total = points.reshape(blocks).sum((1, 3))
    is_known = (depth > 0).reshape(blocks)
    count = is_known.sum((1, 3))
    enough = count > k * k / 2
    return total / np.where(enough, count, np.nan)


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
    rng = np.random.default_rng(0)
    triples = rng.integers(len(points), size=(600, 3))
    steps = np.diff(rays[triples], axis=1)
    nearest = np.abs(steps).max((1, 2)).argsort()
    triples = triples[nearest[:150]]  # close together, so that many lie on one surface
    volume = np.linalg.det(rays[triples])
    triples = triples[np.abs(volume) > 1e-5]
    costs = []
    lengths = np.linalg.norm(rays, axis=1)
    for inverse in (1 / depth, lengths / depth, depth):
        corners = inverse[triples][..., None]
        planes = np.linalg.solve(rays[triples], corners)
        fitted = (rays @ planes)[..., 0]  # (planes, n)
        error = np.abs(fitted / inverse - 1)
        error = np.log(np.clip(error, 0.001, 0.05))
        first = error[error.mean(1).argmin()]
        both = np.minimum(error, first)
        costs.append(both.mean(1).min())
    return np.array(costs)


# ---------------------------------------------------------------------------------- depth beside color


def edge_correlation(pairs):
    """Correlation of depth edges with color edges over shifts of the color image, summed over frames.

    pairs: of depth and of gray values (H, W), the latter seen at the pixels of the former, 160 wide.
    Returns (2 EDGE_SHIFT + 1, 2 EDGE_SHIFT + 1); a shift of (0, 0) is in the middle.
    """
    side = 2 * EDGE_SHIFT + 1
    total = np.zeros((side, side))
    for depth, gray in pairs:
        jumps, steep = edges(depth, gray)
        size = [extent + 2 * EDGE_SHIFT for extent in jumps.shape]
        spectrum = np.fft.rfft2(steep, size)
        spectrum *= np.fft.rfft2(jumps, size).conj()
        shifted = np.fft.irfft2(spectrum, size)
        shifted = np.roll(shifted, (EDGE_SHIFT, EDGE_SHIFT), (0, 1))
        total += shifted[:side, :side]
    return total


def edges(depth, gray):
    """Depth edges and gray edges of two images, each of mean 0; the sum of their products is a correlation."""
    logs = np.log(np.where(depth > 0, depth, np.nan))
    slopes = np.abs(np.gradient(logs))
    jumps = (np.fmax(*slopes) > 0.02).astype(float)
    jumps -= jumps.mean()
    steep = np.log1p(np.hypot(*np.gradient(gray)))
    steep = np.nan_to_num(steep)
    steep -= steep.mean()
    scale = jumps.std() * steep.std() * jumps.size
    return jumps / max(scale, 1e-12), steep


def edge_match(depth, gray):
    """Correlation of depth edges with gray edges of two images."""
    jumps, steep = edges(depth, gray)
    return (jumps * steep).sum()


def peak(correlation):
    """Shift (v, u) with the largest correlation."""
    place = np.unravel_index(correlation.argmax(), correlation.shape)
    return np.array(place) - EDGE_SHIFT


# -------------------------------------------------------------------------------------------------- up


def surface_normals(points):
    """Unit normals (n, 3) of points (h, w, 3), see `smooth_points`, towards the camera."""
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(down, across)
    middle = points[1:-1, 1:-1]
    away = (normals * middle).sum(-1)
    normals *= -np.sign(away)[..., None]
    normals = normals[np.isfinite(normals).all(-1)]
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / (lengths + 1e-12)


def find_up(normals, cameras):
    """The most frequent of world normals (n, 3) near the cameras' mean up (3,); zero if unclear."""
    length = np.linalg.norm(cameras)
    near = normals[normals @ cameras > 0.6 * length]
    if length < 0.5 or len(near) < 30:
        return np.zeros(3)
    some = near[::len(near) // 100 + 1]
    votes = some @ near.T > 0.985  # within 10 degrees
    counts = votes.sum(1)
    if counts.max() < 0.05 * len(normals):
        return np.zeros(3)
    up = near[votes[counts.argmax()]].mean(0)
    agreeing = near @ up > 0.985 * np.linalg.norm(up)
    up = near[agreeing].sum(0)
    return up / np.linalg.norm(up)


# ---------------------------------------------------------------------------------------------- labels


def third_classes(label):
    """Pixels of a label image that lie between two classes, and those of them of a third class (2,)."""
    result = np.zeros(2, np.int64)
    for image in (label, label.T):
        before, middle, after = image[:-4], image[2:-2], image[4:]
        labeled = np.minimum(np.minimum(before, middle), after) >= 0
        border = (before != after) & labeled
        differs = (middle != before) & (middle != after)
        third = border & differs
        result += border.sum(), third.sum()
    return result


def count_instances(labels, instances):
    """Rows (label, instance, pixels) of the pixels (n,) of a frame that have a label; instance -1: none."""
    pairs = np.stack([labels, instances], 1)
    labeled = pairs[labels >= 0]
    pairs, counts = np.unique(labeled, axis=0, return_counts=True)
    return np.column_stack([pairs, counts])


def mixed_pixels(table):
    """Pixels whose instance belongs mostly to another class. table: see `count_instances`."""
    total = 0
    for instance in np.unique(table[:, 1]):
        pixels = table[table[:, 1] == instance, 2]
        total += pixels.sum() - pixels.max()
    return total


def share_below_floor(labels, names, up):
    """Mean share of a frame's points that lie 20 cm below what is called floor; 0 without a floor."""
    below = []
    for own in labels if up is not None and "floor" in names else ():
        is_floor = own["labels"] == names.index("floor")
        if is_floor.sum() > 0.01 * len(is_floor):
            height = own["points"] @ up
            below.append((height < np.median(height[is_floor]) - 0.2).mean())
    return np.mean(below) if below else 0


def lost_instances(table, names, ids):
    """Words about pixels without instance in classes that should have some; "" if there are none.

    table: rows (label, instance, pixels), instance -1 = none. names, ids: of the classes.
    """
    total = np.bincount(table[:, 0], table[:, 2], len(names))
    none = table[table[:, 1] < 0]
    without = np.bincount(none[:, 0], none[:, 2], len(names))
    things = without < 0.5 * total
    share = without[things].sum() / max(total[things].sum(), 1)
    if share > 0.01:
        return f"{share:.1%} of the pixels of classes with instances have none: " \
            "objects with id 0 count as none."
    empty = [i for i in np.flatnonzero((total > 0) & (without == total))
             if names[i] not in ("wall", "floor", "ceiling")]
    doubtful = [i for i in empty if ids[i:i + 1] in ([0], [255])]
    if not doubtful and len(empty) == 1 and things.sum() >= 5:
        doubtful = empty
    if not doubtful or not things.any():
        return ""
    told = ", ".join(repr(names[i]) for i in doubtful[:3])
    return f"No pixel of class {told} has an instance: it means unlabeled (then name it so in the class " \
        "list), or its objects have id 0, which counts as none."
