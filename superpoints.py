# SPDX-License-Identifier: MIT
"""Superpoints of an RGB-D frame: a few hundred small regions that respect the borders of objects.

Agglomerative clustering of the pixel grid under Ward's criterion (Ward 1963): of all pairs of neighbouring regions,
merge the one that adds least to the sum of squares, `n_a n_b / (n_a + n_b) |mean_a - mean_b|^2` for regions of n_a and
n_b pixels, until `count` are left. A pixel is described by its position, in units of the expected region size, and its
colour in CIELAB, in units of 10. Ward's criterion is reducible, so all pairs of mutual nearest neighbours may merge in
one round: about 40 vectorised rounds give the same tree as single merges (Murtagh 1983). Nothing is random: equal
frames give equal superpoints.

Imports numpy.
"""
import numpy as np

VERSION = 1  # of the method; part of the owner of a cache, so results of an older method are not used


def srgb_to_lab(colors):
    """sRGB (..., 3) uint8 -> CIELAB under D65 (..., 3) float32."""
    linear = np.arange(256, dtype=np.float32) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)[colors]
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]]) / np.array([[0.95047], [1.0], [1.08883]])
    xyz = linear @ to_xyz.T.astype(np.float32)
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)


def box_mean(image, size):
    """Mean of image (H, W, C) over size x size pixels, size odd; beyond the border its pixels repeat."""
    for axis in (0, 1):
        reach = [(size // 2, size // 2) if i == axis else (0, 0) for i in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, reach, "edge"), size, axis)
        image = sum(windows[..., i] for i in range(size)) / np.float32(size)
    return image


def ward(features, u, v, count):
    """Graph of n nodes with edges u - v, both (E,) -> region (n,) int64 of each node; `count` regions if connected.

    features (n, C) float32. Builds the whole tree in rounds, then undoes its most expensive merges; ties go to the
    first edge.
    """
    n = len(features)
    size = np.ones(n)  # by region, as are mean, height and node
    mean = features
    height = np.zeros(n)  # cost of the merge that made it
    node = np.arange(n)  # a node that stands for it
    merges = []  # per round: node that goes, node that stays, height
    while len(u):
        gap = mean[u] - mean[v]
        cost = size[u] * size[v] / (size[u] + size[v]) * np.einsum("ec,ec->e", gap, gap)
        best = np.full(len(size), np.inf)
        np.minimum.at(best, u, cost)
        np.minimum.at(best, v, cost)
        chosen = np.full(len(size), len(u))  # the first of a region's cheapest edges
        for side in (u, v):
            cheapest = np.flatnonzero(cost == best[side])
            np.minimum.at(chosen, side[cheapest], cheapest)
        edges = np.arange(len(u))
        mutual = edges[(chosen[u] == edges) & (chosen[v] == edges)]
        stays, goes = u[mutual], v[mutual]
        # on a graph a later merge can be cheaper: its height is at least that of the merges that it builds on
        height[stays] = np.maximum(cost[mutual], np.maximum(height[stays], height[goes]))
        merges.append((node[goes], node[stays], height[stays]))

        parent = np.arange(len(size))
        parent[goes] = stays
        kept = parent == np.arange(len(size))
        parent = (np.cumsum(kept) - 1)[parent]
        height, node = height[kept], node[kept]
        new_size = np.bincount(parent, size)
        mean = np.stack([np.bincount(parent, size * column) for column in mean.T], 1) / new_size[:, None]
        size = new_size
        u, v = parent[u], parent[v]
        low, high = np.minimum(u, v)[u != v], np.maximum(u, v)[u != v]
        u, v = np.divmod(np.unique(low * len(size) + high), len(size))  # each edge once
    region = np.arange(n)
    if merges:
        goes, stays, height = (np.concatenate(part) for part in zip(*merges))
        cheapest = np.argsort(height, kind="stable")[:max(n - count, 0)]
        region[goes[cheapest]] = stays[cheapest]
        while (region != region[region]).any():
            region = region[region]
    return np.unique(region, return_inverse=True)[1]


def oversegment(depth, colors, intrinsics, count=256, nodes=20_000):
    """Superpoint of each pixel of a frame, (H, W) int64 from 0 to count - 1; -1 where depth is unknown.

    depth (H, W) metres, 0 = unknown; colors (H, W, 3) uint8, pixel by pixel; intrinsics (3, 3). If fewer pixels than
    `count` are known, each is a superpoint. Of a large image only every n-th row and column is clustered, about `nodes`
    pixels; each other pixel joins the most similar of the four clustered ones around it.
    """
    if colors.shape != (*depth.shape, 3) or colors.dtype != np.uint8 or np.shape(intrinsics) != (3, 3) or count < 1:
        raise ValueError(f"expected depth (H, W), colors (H, W, 3) uint8, intrinsics (3, 3), count > 0, got "
                         f"{depth.shape}, {colors.shape} {colors.dtype}, {np.shape(intrinsics)}, {count}")
    known = (depth > 0) & np.isfinite(depth)
    out = np.full(depth.shape, -1, np.int64)
    step = max(1, round((depth.size / nodes) ** 0.5))
    coarse = np.zeros_like(known)
    coarse[::step, ::step] = known[::step, ::step]
    if coarse.sum() < min(count, known.sum()):
        step, coarse = 1, known
    if not coarse.any():
        return out

    v, u = np.indices(depth.shape, np.float32)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T.astype(np.float32)
    points = rays * np.where(known, depth, 0)[..., None].astype(np.float32)

    # neighbours are consecutive known pixels of a row or column, so holes do not cut the graph into islands
    node = np.full(depth.shape, -1, np.int64)
    node[coarse] = np.arange(coarse.sum())
    rows, columns = node[coarse], node.T[coarse.T]

    spacing = np.linalg.norm(np.diff(points[coarse], axis=0), axis=1)
    length = max(np.median(spacing) if len(spacing) else 0, 1e-6) * (len(rows) / count) ** 0.5
    shades = box_mean(srgb_to_lab(colors), max(step // 2 * 2 - 1, 1))  # blur what the grid cannot show
    features = np.concatenate([points / np.float32(length), shades / 10], -1)
    clustered = features[coarse]
    region = ward(clustered, np.concatenate([rows[:-1], columns[:-1]]), np.concatenate([rows[1:], columns[1:]]), count)
    out[coarse] = region

    if step > 1:
        rest = known & ~coarse
        out[rest] = follow(features, coarse, out, rest, step)
        alone = out[rest] < 0  # no clustered pixel around it: it joins the region with the most similar mean
        mean = np.stack([np.bincount(region, column) for column in clustered.T], 1) / np.bincount(region)[:, None]
        row, column = (index[alone] for index in np.nonzero(rest))
        for part in np.array_split(np.arange(len(row)), len(row) // 1000 + 1):
            gap = features[row[part], column[part], None] - mean
            out[row[part], column[part]] = np.einsum("nsc,nsc->ns", gap, gap).argmin(1)
    return out


def follow(features, coarse, region, rest, step):
    """Region of the most similar of the four `coarse` pixels around each pixel of the mask `rest`, or -1 if none."""
    y, x = np.nonzero(rest)
    own = features[y, x]
    nearest = np.full(len(y), -1)
    closest = np.full(len(y), np.inf)
    for down in (0, step):
        for right in (0, step):
            row = y - y % step + down
            column = x - x % step + right
            row = np.where(row < rest.shape[0], row, row - step)
            column = np.where(column < rest.shape[1], column, column - step)
            gap = own - features[row, column]
            distance = np.where(coarse[row, column], np.einsum("nc,nc->n", gap, gap), np.inf)
            nearest = np.where(distance < closest, region[row, column], nearest)
            closest = np.minimum(distance, closest)
    return nearest
