# SPDX-License-Identifier: MIT
"""Superpoints of an RGB-D frame: a few hundred small regions that respect the borders of objects.

Agglomerative clustering of the pixel grid under Ward's criterion (Ward 1963): of all neighbouring regions, merge the
pair that adds least to the sum of squares, `m_a m_b / (m_a + m_b) |mean_a - mean_b|^2`, until `count` are left. A pixel
is described by its position, in units of the size that a region is to have, and its colour in CIELAB, in units of 10.
Ward's criterion is reducible, so all pairs that are each other's nearest neighbour may merge in one round: the same
tree as one by one, in some 40 vectorised rounds (Murtagh 1983). No random numbers: equal frames, equal superpoints.

Imports numpy.
"""
import numpy as np

VERSION = 1  # of the method: another number, other entries in a cache


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
    """Mean of image (H, W, C) over size x size pixels, size odd; the border is repeated outwards."""
    for axis in (0, 1):
        reach = [(size // 2, size // 2) if i == axis else (0, 0) for i in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, reach, "edge"), size, axis)
        image = sum(windows[..., i] for i in range(size)) / np.float32(size)
    return image


def ward(features, u, v, count):
    """Graph of n nodes with edges u - v (E,), (E,) -> region (n,) int64 of each node; `count` regions where connected.

    features (n, C) float32. Builds the whole tree in rounds, then undoes its dearest merges; ties go to the first edge.
    """
    n = len(features)
    mass, mean, height, node = np.ones(n), features, np.zeros(n), np.arange(n)  # by region; a node that stands for it
    merges = []  # (node that goes, node that stays, height) of each round
    while len(u):
        gap = mean[u] - mean[v]
        cost = mass[u] * mass[v] / (mass[u] + mass[v]) * np.einsum("ec,ec->e", gap, gap)
        best = np.full(len(mass), np.inf)
        np.minimum.at(best, u, cost)
        np.minimum.at(best, v, cost)
        chosen = np.full(len(mass), len(u))  # the first of a region's cheapest edges
        for side in (u, v):
            cheapest = np.flatnonzero(cost == best[side])
            np.minimum.at(chosen, side[cheapest], cheapest)
        edges = np.arange(len(u))
        mutual = edges[(chosen[u] == edges) & (chosen[v] == edges)]
        stays, goes = u[mutual], v[mutual]
        # with borders in the way a later merge can be cheaper: no lower in the tree than those that it builds on
        height[stays] = np.maximum(cost[mutual], np.maximum(height[stays], height[goes]))
        merges.append((node[goes], node[stays], height[stays]))
        parent = np.arange(len(mass))
        parent[goes] = stays
        kept = parent == np.arange(len(mass))
        parent = (np.cumsum(kept) - 1)[parent]
        height, node, size = height[kept], node[kept], np.bincount(parent, mass)
        mean = np.stack([np.bincount(parent, mass * column) for column in mean.T], 1) / size[:, None]
        mass, u, v = size, parent[u], parent[v]
        u, v = np.divmod(np.unique(np.minimum(u, v)[u != v] * len(mass) + np.maximum(u, v)[u != v]), len(mass))
    region = np.arange(n)
    if merges:
        goes, stays, height = (np.concatenate(part) for part in zip(*merges))
        cheapest = np.argsort(height, kind="stable")[:max(n - count, 0)]
        region[goes[cheapest]] = stays[cheapest]
        while (region != region[region]).any():
            region = region[region]
    return np.unique(region, return_inverse=True)[1]


def oversegment(depth, colors, intrinsics, count=256, nodes=20_000):
    """Depth (H, W) metres, 0 = unknown, its colors (H, W, 3) uint8 and intrinsics (3, 3) -> (H, W) int64, -1 = unknown.

    Numbers run from 0 to count - 1 (or as many as there are known pixels). Of large pictures every n-th row and column
    is clustered, about `nodes` pixels; each other pixel follows that one of the four around it which it resembles most.
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
    # neighbours are the known pixels that follow each other in a row or column: holes do not cut the graph into islands
    node = np.full(depth.shape, -1, np.int64)
    node[coarse] = np.arange(coarse.sum())
    rows, columns = node[coarse], node.T[coarse.T]
    spacing = np.linalg.norm(np.diff(points[coarse], axis=0), axis=1)
    length = max(np.median(spacing) if len(spacing) else 0, 1e-6) * (len(rows) / count) ** 0.5
    shades = box_mean(srgb_to_lab(colors), max(step // 2 * 2 - 1, 1))  # texture finer than the clustered grid is noise
    features = np.concatenate([points / np.float32(length), shades / 10], -1)
    clustered = features[coarse]
    region = ward(clustered, np.concatenate([rows[:-1], columns[:-1]]), np.concatenate([rows[1:], columns[1:]]), count)
    out[coarse] = region
    if step > 1:
        rest = known & ~coarse
        out[rest] = follow(features, coarse, out, rest, step)
        alone = out[rest] < 0  # nothing clustered around: the region with the most similar mean
        mean = np.stack([np.bincount(region, column) for column in clustered.T], 1) / np.bincount(region)[:, None]
        row, column = (index[alone] for index in np.nonzero(rest))
        for part in np.array_split(np.arange(len(row)), len(row) // 1000 + 1):
            gap = features[row[part], column[part], None] - mean
            out[row[part], column[part]] = np.einsum("nsc,nsc->ns", gap, gap).argmin(1)
    return out


def follow(features, coarse, region, rest, step):
    """Pixels of the mask `rest` -> the region of the most similar of the four `coarse` pixels around each, or -1."""
    y, x = np.nonzero(rest)
    own, nearest, closest = features[y, x], np.full(len(y), -1), np.full(len(y), np.inf)
    for down in (0, step):
        for right in (0, step):
            row, column = y - y % step + down, x - x % step + right
            row = np.where(row < rest.shape[0], row, row - step)
            column = np.where(column < rest.shape[1], column, column - step)
            gap = own - features[row, column]
            distance = np.where(coarse[row, column], np.einsum("nc,nc->n", gap, gap), np.inf)
            nearest = np.where(distance < closest, region[row, column], nearest)
            closest = np.minimum(distance, closest)
    return nearest
