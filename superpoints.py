# SPDX-License-Identifier: MIT
"""Superpoints of an RGB-D frame: a few hundred small regions that respect the borders of objects.

Agglomerative clustering of the pixel grid under Ward's criterion (Ward 1963): of all pairs of
neighboring regions, merge the one that adds least to the sum of squares,
`n_a n_b / (n_a + n_b) |mean_a - mean_b|^2` for regions of n_a and n_b pixels, until `count` are left. A
pixel is described by its position, in units of the expected region size, and its color in CIELAB, in
units of 10. Ward's criterion is reducible, so all pairs of mutual nearest neighbors may merge in one
round: about 40 vectorized rounds give the same tree as single merges (Murtagh 1983). Nothing is random:
equal frames give equal superpoints.

Imports numpy.
"""
import numpy as np

VERSION = 1  # of the method; part of the owner of a cache, so results of an older method are not used

RGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375],
                       [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])
WHITE = [0.95047, 1.0, 1.08883]  # XYZ of D65


def srgb_to_lab(colors):
    """sRGB (..., 3) uint8 -> CIELAB under D65 (..., 3) float32."""
    value = np.arange(256, dtype=np.float32) / 255
    curve = ((value + 0.055) / 1.055) ** 2.4
    linear = np.where(value > 0.04045, curve, value / 12.92)
    to_xyz = (RGB_TO_XYZ.T / WHITE).astype(np.float32)
    xyz = linear[colors] @ to_xyz
    small = xyz / (3 * (6 / 29) ** 2) + 4 / 29
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), small)
    x, y, z = np.moveaxis(root, -1, 0)
    lightness = 116 * y - 16
    lab = [lightness, 500 * (x - y), 200 * (y - z)]
    return np.stack(lab, -1)


def box_mean(image, size):
    """Mean of image (H, W, C) over size x size pixels, size odd; beyond its border pixels repeat."""
    height, width, _ = image.shape
    reach = (size // 2, size // 2)
    padded = np.pad(image, (reach, reach, (0, 0)), "edge")
    rows = sum(padded[i:i + height] for i in range(size))
    rows /= np.float32(size)
    means = sum(rows[:, i:i + width] for i in range(size))
    means /= np.float32(size)
    return means


def region_means(region, size, mean):
    """Sizes (R,) and means (R, C) of regions; region (n,), size (n,) and mean (n, C) of their parts."""
    total = np.bincount(region, size)
    sums = [np.bincount(region, size * column) for column in mean.T]
    return total, np.stack(sums, 1) / total[:, None]


def mutual_nearest(u, v, cost, n):
    """The edges u - v, both (E,), that both of their nodes find cheapest; ties go to the first edge."""
    best = np.full(n, np.inf)
    np.minimum.at(best, u, cost)
    np.minimum.at(best, v, cost)
    chosen = np.full(n, len(u))  # the first of a node's cheapest edges
    for end in (u, v):
        cheapest = np.flatnonzero(cost == best[end])
        np.minimum.at(chosen, end[cheapest], cheapest)
    edges = np.arange(len(u))
    mutual = (chosen[u] == edges) & (chosen[v] == edges)
    return edges[mutual]


def ward(features, u, v, count):
    """Graph of n nodes with edges u - v, both (E,) -> region (n,) int64 of each node.

    features (n, C) float32. There are `count` regions if the graph is connected. Builds the whole tree
    in rounds, then undoes its most expensive merges.
    """
    n = len(features)
    size = np.ones(n)  # of each region, as are mean, height and node
    mean = features
    height = np.zeros(n)  # cost of the merge that made it
    node = np.arange(n)  # a node that stands for it
    merges = []  # per round: nodes that go, nodes that stay, heights
    while len(u):
        gap = mean[u] - mean[v]
        n_u = size[u]
        n_v = size[v]
        cost = n_u * n_v / (n_u + n_v) * np.einsum("ec,ec->e", gap, gap)
        edges = mutual_nearest(u, v, cost, len(size))
        stays = u[edges]
        goes = v[edges]
        # on a graph a later merge can be cheaper: it is at least as high as those it builds on
        below = np.maximum(height[stays], height[goes])
        height[stays] = np.maximum(cost[edges], below)
        merges.append((node[goes], node[stays], height[stays]))

        kept = np.ones(len(size), bool)
        kept[goes] = False
        region = np.cumsum(kept) - 1
        region[goes] = region[stays]
        height = height[kept]
        node = node[kept]
        size, mean = region_means(region, size, mean)
        u, v = region[u], region[v]
        low = np.minimum(u, v)
        high = np.maximum(u, v)
        pairs = low * len(size) + high
        pairs = np.sort(pairs[u != v])
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # each edge once
        u, v = np.divmod(pairs, len(size))

    region = np.arange(n)
    if merges:
        goes, stays, height = (np.concatenate(rounds) for rounds in zip(*merges))
        cheapest = np.argsort(height, kind="stable")
        cheapest = cheapest[:max(n - count, 0)]
        region[goes[cheapest]] = stays[cheapest]
    while (region != region[region]).any():
        region = region[region]
    return np.unique(region, return_inverse=True)[1]


def oversegment(depth, colors, intrinsics, count=256, nodes=20_000):
    """Superpoint of each pixel of a frame, (H, W) int64 from 0 to count - 1; -1 where depth is unknown.

    depth (H, W) meters, 0 = unknown; colors (H, W, 3) uint8, pixel by pixel; intrinsics (3, 3). If fewer
    pixels than `count` are known, each is a superpoint. Of a large image only every n-th row and column
    is clustered, about `nodes` pixels; each other pixel joins the most similar clustered one of the four
    around it.
    """
    shapes = depth.shape, colors.shape, np.shape(intrinsics)
    expected = depth.shape, (*depth.shape, 3), (3, 3)
    if shapes != expected or colors.dtype != np.uint8 or count < 1:
        raise ValueError("expected depth (H, W), colors (H, W, 3) uint8, intrinsics (3, 3) and "
                         f"count > 0, got {shapes}, {colors.dtype} and {count}")
    known = (depth > 0) & np.isfinite(depth)
    segments = np.full(depth.shape, -1)
    step = max(1, round((depth.size / nodes) ** 0.5))
    coarse = np.zeros_like(known)
    grid = np.s_[::step, ::step]
    coarse[grid] = known[grid]
    if coarse.sum() < min(count, known.sum()):
        step, coarse = 1, known
    if not coarse.any():
        return segments

    depth = np.where(known, depth, 0)
    features = pixel_features(depth, colors, intrinsics, coarse, step, count)
    # neighbors are consecutive known pixels of a row or column: holes do not cut the graph into islands
    node = coarse.cumsum().reshape(coarse.shape) - 1
    paths = np.stack([node[coarse], node.T[coarse.T]])  # along rows, along columns
    u = paths[:, :-1].ravel()
    v = paths[:, 1:].ravel()
    segments[coarse] = ward(features[coarse], u, v, count)
    if step > 1:
        rest = known & ~coarse
        segments[rest] = join_rest(features, coarse, segments, rest, step)
    return segments


def pixel_features(depth, colors, intrinsics, coarse, step, count):
    """(H, W, 6) float32: position in units of the expected size of a region, color in units of 10."""
    v, u = np.indices(depth.shape, np.float32)
    pixels = np.stack([u, v, np.ones_like(u)], -1)
    to_rays = np.linalg.inv(intrinsics).T.astype(np.float32)
    rays = pixels @ to_rays
    points = rays * depth[..., None].astype(np.float32)
    steps = np.diff(points[coarse], axis=0)
    steps = np.linalg.norm(steps, axis=1)
    spacing = np.median(steps) if len(steps) else 0
    length = max(spacing, 1e-6) * ((len(steps) + 1) / count) ** 0.5
    points /= np.float32(length)
    blur = max(step // 2 * 2 - 1, 1)  # what the grid cannot show
    shades = box_mean(srgb_to_lab(colors), blur)
    return np.concatenate([points, shades / 10], -1)


def join_rest(features, coarse, segments, rest, step):
    """Segment of the most similar of the four `coarse` pixels around each pixel of the mask `rest`.

    Without one around it, a pixel joins the segment with the most similar mean.
    """
    pixels = np.argwhere(rest)
    own = features[rest]
    nearest = np.full(len(pixels), -1)
    closest = np.full(len(pixels), np.inf)
    last = (np.array(rest.shape) - 1) // step
    for shift in np.ndindex(2, 2):
        corner = np.minimum(pixels // step + shift, last) * step
        row, column = corner.T
        gap = own - features[row, column]
        distance = np.einsum("nc,nc->n", gap, gap)
        closer = coarse[row, column]
        closer &= distance < closest
        nearest[closer] = segments[row, column][closer]
        closest[closer] = distance[closer]

    alone = np.flatnonzero(nearest < 0)
    clustered = features[coarse]
    _, mean = region_means(segments[coarse], np.ones(len(clustered)), clustered)
    parts = np.array_split(alone, len(alone) // 1000 + 1)  # bounds the memory
    for part in parts:
        gap = own[part, None] - mean
        distance = np.einsum("nsc,nsc->ns", gap, gap)
        nearest[part] = distance.argmin(1)
    return nearest
