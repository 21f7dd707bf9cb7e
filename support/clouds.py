# SPDX-License-Identifier: MIT
"""Labeled frames merged into one cloud per scene, and the files that clouds are written to.

    merger = SceneMerger(num_classes, voxel_size=0.02)
    merger.add(result)                       for every frame of a scene, in any order
    cloud = merger.cloud()
    write_ply("scene.ply", cloud["points"], cloud["colors"], {"label": cloud["labels"]})

Imports torch, numpy.
"""
import os
import re

import numpy as np
import torch

MAX_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # half of the machine's memory
ONE = 2 ** 14    # 1 in fixed point: int32 holds 131,071 votes
OVERLAP = 0.5    # of two instances that join
HALF = 2 ** 20   # cells of the grid from the origin to its end, along each axis
PART = 2 ** 18   # voxels of a cloud that are worked on at once
CLOUD_BYTES = 96  # of a voxel of a cloud, without queries
STRIDES = np.array([4 * HALF ** 2, 2 * HALF, 1])  # of the key of a cell
NO_END = 8 * HALF ** 3 - 1  # beyond the key of every cell


class SceneMerger:
    """The frames of a scene, merged on a voxel grid: memory grows with its surface, not with the frames.

    A frame gives one vote to each voxel that it sees: the mean of its points there, and the instance and
    true label of the first of them. Votes are added in fixed point, so the sums, and with them the
    labels, do not depend on the order of the frames. The instance of a voxel and its true label are
    majority votes (Boyer and Moore 1981). An instance of a frame joins the instance of the scene with the
    same class that it overlaps most, if they share more than half of the smaller one's voxels that the
    frame sees; other instances that it overlaps so much join, too.

    tile: first key and end of the keys of the voxels to merge, a slab across x. If they would take more than
    MAX_BYTES, the tile gets an earlier end. None: all voxels, and then a ValueError.
    """

    def __init__(self, num_classes, voxel_size, tile=None):
        self.num_classes = num_classes
        self.voxel_size = voxel_size             # meters
        self.may_end_early = tile is not None
        self.start, self.end = tile or (0, NO_END)
        self.keys = np.empty(0, np.int64)        # (M,) sorted, one per voxel
        self.rows = np.empty(0, np.int64)        # (M,) its row in the tables, which have free rows at their end
        self.sums = None                         # F columns of int32, see `voxel_means`
        self.owner = np.empty((0, 2), np.int64)  # instance of the scene, and its lead
        self.truth = np.empty((0, 2), np.int64)  # true label and instance in one, and its lead
        self.labels = np.empty(0, np.int64)      # (S,) class of each instance of the scene
        self.scores = np.empty((0, 2))           # (S, 2) sum of the scores of its parts, their number

    def add(self, result):
        """Adds the points of a frame, as `predict_batch` gives them; returns their first and last key."""
        points = result["points"].double().numpy()
        position = points / self.voxel_size
        cell = np.floor(position)
        if not np.abs(cell).max() < HALF - 1:
            raise ValueError(f"points lie up to {np.abs(points).max():.3g} m from the origin, too far "
                             f"for voxels of {self.voxel_size} m: are the poses in meters?")
        offset = position - cell
        cell = cell.astype(np.int64) + HALF
        keys, first, voxel = np.unique(cell @ STRIDES, return_index=True, return_inverse=True)
        means = voxel_means(result, offset, voxel)

        start = np.searchsorted(keys, self.start)
        rows = self.find_rows(keys[start:], means.shape[1])
        own = slice(start, start + len(rows))
        first = first[own]
        means = means[own]
        self.sums[rows] += np.rint(means * ONE).astype(np.int32)
        truth = result["truth"].numpy()[first]
        instance = result["truth_instances"].numpy()[first]
        code = truth * 2 ** 32 + instance + 1
        code = np.where(truth >= 0, code, -1)
        vote(self.truth, rows, code)
        if "instances" in result:
            instances = result["instances"].numpy()[first]
            labels = result["instance_labels"].numpy()
            scores = result["scores"].numpy()
            self.add_instances(rows, instances, labels, scores)
        return int(keys[0]), int(keys[-1])

    def find_rows(self, keys, width):
        """Row in the tables of each voxel before the tile's end; new voxels get the next free ones."""
        if self.sums is None:
            self.sums = np.empty((0, width), np.int32)
        keys = keys[keys < self.end]
        place = np.searchsorted(self.keys, keys)
        is_new = np.append(self.keys, -1)[place] != keys
        count = len(self.keys)
        total = count + is_new.sum()
        bytes_each = 4 * width + 6 * 8 + CLOUD_BYTES
        most = max(1, MAX_BYTES // bytes_each)
        if total > most and not self.may_end_early:
            raise ValueError(f"{total:,} voxels of {self.voxel_size:.3g} m, {bytes_each} bytes each, are more "
                             "than half of the memory: merge larger voxels, or fewer frames at once")
        if total > most:
            self.end_at(np.union1d(self.keys, keys)[most // 2] + 1)
            return self.find_rows(keys, width)
        place = place[is_new]
        self.keys = np.insert(self.keys, place, keys[is_new])
        self.rows = np.insert(self.rows, place, np.arange(count, total))
        self.sums = with_room(self.sums, total, 0)
        self.owner = with_room(self.owner, total, [-1, 0])
        self.truth = with_room(self.truth, total, [-1, 0])
        return self.rows[np.searchsorted(self.keys, keys)]

    def end_at(self, end):
        """Gives up the voxels from a key on, which belong to another tile."""
        self.end = int(end)
        kept = self.rows[self.keys < end]
        self.keys = self.keys[self.keys < end]
        self.rows = np.arange(len(kept))
        self.sums = self.sums[kept]
        self.owner = self.owner[kept]
        self.truth = self.truth[kept]

    def add_instances(self, rows, instances, labels, scores):
        """Instances of a frame vote: (m,) per voxel with -1 = none, labels and scores (R,)."""
        R, S = len(labels), len(self.labels)
        owner = self.owner[:, 0]
        counts = np.zeros((R + 1, S + 1), np.int64)  # row and column -1: of no instance
        np.add.at(counts, (instances, owner[rows]), 1)
        shared = counts[:R, :S]
        size = counts[:R].sum(1)
        seen = counts[:, :S].sum(0)
        joins = labels[:, None] == self.labels
        joins &= shared > OVERLAP * np.minimum(size[:, None], seen)

        number = np.arange(S + R)  # what becomes of the instances of the scene and of the frame
        for r in np.flatnonzero(size):
            found = np.unique(number[:S][joins[r]])
            target = S + r
            if len(found):
                most = np.argmax(shared[r] * joins[r])
                target = number[most]
            number[np.isin(number, found)] = target
            number[S + r] = target
        owner[:] = renumber(owner, number)
        vote(self.owner, rows, renumber(instances, number[S:]))

        scores = np.stack([scores, np.ones(R)], 1)
        scores[size == 0] = 0
        total = np.zeros((S + R, 2))
        np.add.at(total, number, np.concatenate([self.scores, scores]))
        kept = count(owner, S + R) > 0
        self.labels = np.concatenate([self.labels, labels])[kept]
        self.scores = total[kept]
        owner[:] = renumber(owner, kept.cumsum() - 1)

    def cloud(self, min_points=1, queries=None):
        """The merged scene, a dict of arrays with one row per voxel, in order of position.

        points (M, 3) meters, colors (M, 3) in [0, 1], labels (M,), confidence (M,), gate (M,), instances
        (M,) numbered from 0 with the best first, -1 = none, instance_labels and scores (R,), truth and
        truth_instances (M,), and queries (M, Q) if there are any. Instances with fewer than min_points
        voxels are left out.
        """
        score = self.scores[:, 0] / self.scores[:, 1]
        best = np.argsort(-score, kind="stable")
        best = best[count(self.owner[:, 0], len(score))[best] >= min_points]
        number = np.full(len(score), -1)
        number[best] = np.arange(len(best))
        parts = []
        for start in range(0, max(1, len(self.keys)), PART):  # copies of few rows at once
            part = slice(start, start + PART)
            parts.append(self.part_of_cloud(self.keys[part], self.rows[part], number, queries))
        cloud = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**cloud, "instance_labels": self.labels[best], "scores": score[best]}

    def part_of_cloud(self, keys, rows, number, queries):
        """The rows of `cloud` for some voxels. number: of each instance of the scene in the cloud, or -1."""
        sums = self.sums[rows]
        limits = [3, 6, 7, 7 + self.num_classes, -1]
        means = sums / sums[:, -1:]
        offset, colors, gate, likely, cosines, _ = np.split(means, limits, 1)
        cell = keys[:, None] // STRIDES % (2 * HALF) - HALF
        truth = self.truth[rows, 0]
        part = {
            "points": (cell + offset) * self.voxel_size,
            "colors": colors,
            "gate": gate[:, 0],
            "labels": likely.argmax(1),
            "confidence": likely.max(1),
            "truth": truth >> 32,  # -1 stays
            "truth_instances": np.where(truth < 0, -1, truth % 2 ** 32 - 1),
            "instances": renumber(self.owner[rows, 0], number)}
        if queries is not None:
            cosines = torch.from_numpy(cosines.astype(np.float32))
            part["queries"] = queries.probabilities(cosines).numpy()
        return part


def with_room(table, size, fill):
    """A table with at least `size` rows, new ones filled; it grows by half, so that few frames copy it."""
    if size <= len(table):
        return table
    extra = max(size - len(table), len(table) // 2)
    more = np.full((extra, table.shape[1]), fill, table.dtype)
    return np.concatenate([table, more])


def voxel_means(result, offset, voxel):
    """Means of offset, color, gate, probabilities, cosines and 1 over the points of each voxel: (m, F)."""
    columns = [torch.from_numpy(offset), result["colors"], result["gate"][:, None]]
    columns.append(result["probabilities"])
    if "cosines" in result:
        columns.append(result["cosines"])
    columns.append(torch.ones(len(offset), 1))
    fields = torch.cat([column.float() for column in columns], 1)  # (n, F)
    sizes = np.bincount(voxel)
    sums = fields.new_zeros(len(sizes), fields.shape[1])
    sums.index_add_(0, torch.from_numpy(voxel), fields)
    return sums.numpy() / sizes[:, None]


def renumber(codes, numbers):
    """codes (m,) -> numbers[codes]; -1 stays."""
    return np.append(numbers, -1)[codes]


def count(codes, size):
    """How often each of `size` codes occurs in codes (m,), where -1 is none."""
    return np.bincount(codes + 1, minlength=size + 1)[1:]


def vote(table, rows, codes):
    """One vote per row of table (M, 2), its code and its lead: codes (m,) integers, -1 abstains."""
    held, lead = table[rows].T
    change = np.where(codes == held, 1, -1)
    lead = lead + np.where(codes < 0, 0, change)
    table[rows, 0] = np.where(lead < 0, codes, held)
    table[rows, 1] = np.abs(lead)


# ---------------------------------------------------------------------------------------------- files


def write_ply(path, points, colors, scalars, comments=()):
    """A binary PLY file: points (M, 3), colors (M, 3) in [0, 1], scalars {name: (M,)} as float32."""
    kinds = dict.fromkeys("xyz", "float")
    kinds |= dict.fromkeys(["red", "green", "blue"], "uchar")
    kinds |= {f"scalar_{name}": "float" for name in scalars}
    types = {"float": "<f4", "uchar": "u1"}
    fields = [(name, types[kind]) for name, kind in kinds.items()]
    vertices = np.empty(len(points), fields)
    colors = (colors * 255).round()
    columns = [*points.T, *colors.T, *scalars.values()]
    for name, column in zip(kinds, columns):
        vertices[name] = column
    header = ["ply", "format binary_little_endian 1.0"]
    header += [f"comment {' '.join(text.split())}" for text in comments]
    header += [f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for name, kind in kinds.items()]
    header += ["end_header\n"]
    with open(path, "wb") as file:
        file.write("\n".join(header).encode("ascii", "replace"))
        file.write(vertices.tobytes())


def write_submission(folder, scan, labels, scene, benchmark_ids):
    """The files of ScanNet's benchmarks for one scan: semantic/<scan>.txt, instance/<scan>.txt.

    labels (P,), index of the class per vertex; scene: masks (R, P), labels (R,), scores (R,), or None;
    all NumPy arrays. benchmark_ids (K,): id of each class there. Masks of fewer than 100 vertices are
    skipped.
    """
    if re.search(r"\s", scan):
        raise ValueError(f"scan {scan!r}: the benchmark allows no spaces in names")
    semantic, instance = folder / "semantic", folder / "instance"
    semantic.mkdir(parents=True, exist_ok=True)
    ids = benchmark_ids[labels].tolist()
    (semantic / f"{scan}.txt").write_text("".join(f"{number}\n" for number in ids))
    if scene is None:
        return
    (instance / "predicted_masks").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, mask in enumerate(scene["masks"]):
        if mask.sum() < 100:
            continue
        name = f"predicted_masks/{scan}_{i:03d}.txt"
        text = np.where(mask, b"1\n", b"0\n")
        (instance / name).write_bytes(text.tobytes())
        lines.append(f"{name} {benchmark_ids[scene['labels'][i]]} {scene['scores'][i].item()!r}\n")
    (instance / f"{scan}.txt").write_text("".join(lines))
