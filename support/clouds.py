# SPDX-License-Identifier: MIT
"""Labelled frames merged into one cloud per scene, and the files that clouds are written to.

    merger = SceneMerger(num_classes)
    merger.add(result)                       for every frame of a scene, in any order
    cloud = merger.cloud()
    write_ply("scene.ply", cloud["points"], cloud["colors"], {"label": cloud["labels"]})

Imports torch, numpy.
"""
import re

import numpy as np
import torch

MERGE_VOXEL = 0.02  # metres


class SceneMerger:
    """The frames of a scene, merged on a voxel grid: memory grows with the scene's surface, not with its frames.

    A frame gives one vote to each voxel that it sees: the mean of its points there, and the instance and true label of
    the first of them. Votes are added in fixed point, so the sums, and with them the labels, do not depend on the order
    of the frames. The instance of a voxel, and its true label, are majority votes (Boyer and Moore 1981). An instance of
    a frame joins the instance of the scene with the same class that it overlaps most, if they share more than `overlap`
    of the smaller one's voxels that the frame sees; others that it overlaps as much join, too.
    """

    ONE = 2 ** 14  # fixed-point 1: int32 holds 131,071 votes

    def __init__(self, num_classes, voxel_size=MERGE_VOXEL, overlap=0.5):
        self.num_classes = num_classes
        self.voxel_size = voxel_size
        self.overlap = overlap
        self.keys = np.empty(0, np.int64)          # (M,) sorted
        self.sums = None                           # (M, F) int32; the last column counts votes
        self.owner = np.empty((0, 2), np.int64)    # (M, 2) instance of the scene and its lead
        self.truth = np.empty((0, 2), np.int64)    # (M, 2) true label and instance as one number, and its lead
        self.labels = np.empty(0, np.int64)        # (S,) class of each instance of the scene
        self.scores = np.empty((0, 2))             # (S, 2) sum of the scores of its parts, and their number

    def add(self, result):
        """Adds a result of `predict_sample`."""
        position = result["points"].cpu().double().numpy() / self.voxel_size
        cell = np.floor(position)
        if len(cell) and not np.abs(cell).max() < 2 ** 20:
            raise ValueError(f"points lie up to {np.abs(position).max() * self.voxel_size:.3g} m from the origin, too "
                             f"far for voxels of {self.voxel_size} m: are the poses in metres?")
        keys = (cell.astype(np.int64) + 2 ** 20) @ np.array([2 ** 42, 2 ** 21, 1])
        keys, first, voxel = np.unique(keys, return_index=True, return_inverse=True)
        device = result["points"].device
        fields = [torch.from_numpy((position - cell).astype(np.float32)).to(device), result["colors"],
                  result["gate"][:, None], result["probabilities"]]
        fields += [result["cosines"]] if "cosines" in result else []
        fields = torch.cat([field.float() for field in fields], 1)  # (n, F)
        total = fields.new_zeros(len(keys), fields.shape[1]).index_add_(0, torch.from_numpy(voxel).to(device), fields)
        mean = total.cpu().numpy() / np.bincount(voxel)[:, None]  # (m, F)
        votes = np.concatenate([np.rint(mean * self.ONE), np.ones((len(keys), 1))], 1).astype(np.int32)

        rows = self._rows(keys, votes.shape[1])
        self.sums[rows] += votes
        truth, instance = (result[key].cpu().numpy()[first] for key in ("truth", "truth_instances"))
        vote(self.truth, rows, np.where(truth >= 0, truth * 2 ** 32 + instance + 1, -1))
        if "instances" in result:
            self._join(rows, result["instances"].cpu().numpy()[first], result["instance_labels"].cpu().numpy(),
                       result["scores"].cpu().numpy())

    def _rows(self, keys, width):
        """Row of each voxel; new voxels get new rows."""
        if self.sums is None:
            self.sums = np.empty((0, width), np.int32)
        place = np.searchsorted(self.keys, keys)
        is_new = np.append(self.keys, -1)[place] != keys
        if is_new.any():
            place = place[is_new]
            self.sums = np.insert(self.sums, place, 0, axis=0)
            self.owner = np.insert(self.owner, place, [-1, 0], axis=0)
            self.truth = np.insert(self.truth, place, [-1, 0], axis=0)
            self.keys = np.insert(self.keys, place, keys[is_new])
        return np.searchsorted(self.keys, keys)

    def _join(self, rows, instances, labels, scores):
        """Instances of a frame, (m,) per voxel with -1 = none, labels and scores (R,) -> votes for those of the scene."""
        R, S = len(labels), len(self.labels)
        owner = self.owner[rows, 0]
        both = (instances >= 0) & (owner >= 0)
        shared = np.bincount(instances[both] * S + owner[both], minlength=R * S).reshape(R, S)
        size = np.bincount(instances + 1, minlength=R + 1)[1:]
        seen = np.bincount(owner + 1, minlength=S + 1)[1:]
        smaller = np.minimum(size[:, None], seen).clip(1)
        shared[(shared <= self.overlap * smaller) | (labels[:, None] != self.labels)] = 0

        number = np.arange(S + R)  # what becomes of the scene's instances and of the frame's
        for r in np.flatnonzero(size):
            found = np.unique(number[:S][shared[r] > 0])
            target = number[shared[r].argmax()] if len(found) else S + r
            number[np.isin(number, found)] = target
            number[S + r] = target
        score = np.concatenate([self.scores, np.stack([scores, np.ones(R)], 1)])
        self.owner[:, 0] = np.append(number, -1)[self.owner[:, 0]]
        vote(self.owner, rows, np.append(number[S:], -1)[instances])

        # those that own a voxel stay
        alive = np.bincount(self.owner[:, 0] + 1, minlength=S + R + 1)[1:] > 0
        total = np.zeros((S + R, 2))
        np.add.at(total, number, np.where(np.append(np.ones(S, bool), size > 0)[:, None], score, 0))
        self.labels = np.concatenate([self.labels, labels])[alive]
        self.scores = total[alive]
        self.owner[:, 0] = np.append(np.where(alive, alive.cumsum() - 1, -1), -1)[self.owner[:, 0]]

    def cloud(self, min_points=1, queries=None):
        """The merged scene, a dict of arrays with one row per voxel, in order of position.

        points (M, 3) metres, colors (M, 3) in [0, 1], labels (M,), confidence (M,), gate (M,), instances (M,) numbered
        from 0 with the best first, -1 = none, instance_labels and scores (R,), truth and truth_instances (M,), and
        queries (M, Q) if there are any. Instances with fewer than min_points voxels are left out.
        """
        count = self.sums[:, -1:]
        K = self.num_classes
        cell = np.stack([self.keys >> 42, self.keys >> 21 & 2 ** 21 - 1, self.keys & 2 ** 21 - 1], 1) - 2 ** 20
        mean = self.sums[:, :7] / (count * self.ONE)
        likely = self.sums[:, 7:7 + K]
        cloud = {"points": (cell + mean[:, :3]) * self.voxel_size, "colors": mean[:, 3:6], "gate": mean[:, 6],
                 "labels": likely.argmax(1), "confidence": likely.max(1) / (count[:, 0] * self.ONE)}
        if queries is not None:
            cosines = torch.from_numpy((self.sums[:, 7 + K:-1] / (count * self.ONE)).astype(np.float32))
            cloud["queries"] = queries.probabilities(cosines).numpy()
        truth = self.truth[:, 0]
        cloud["truth"] = truth >> 32  # -1 stays
        cloud["truth_instances"] = np.where(truth >= 0, truth % 2 ** 32 - 1, -1)

        sizes = np.bincount(self.owner[:, 0] + 1, minlength=len(self.labels) + 1)[1:]
        score = self.scores[:, 0] / self.scores[:, 1]
        best = np.argsort(-score, kind="stable")
        best = best[sizes[best] >= min_points]
        number = np.full(len(self.labels) + 1, -1)
        number[best] = np.arange(len(best))
        cloud["instances"] = number[self.owner[:, 0]]
        return {**cloud, "instance_labels": self.labels[best], "scores": score[best]}


def vote(table, rows, codes):
    """One vote per row of table (M, 2), its code and its lead: codes (m,) integers, -1 abstains."""
    held, lead = table[rows].T
    lead = np.where(codes < 0, lead, np.where(codes == held, lead + 1, lead - 1))
    table[rows, 0] = np.where(lead < 0, codes, held)
    table[rows, 1] = np.abs(lead)


# ---------------------------------------------------------------------------------------------- files


def write_ply(path, points, colors, scalars, comments=()):
    """A binary little-endian PLY file: points (M, 3), colors (M, 3) in [0, 1], scalars {name: (M,)} as float32."""
    fields = [(axis, "<f4") for axis in "xyz"] + [(color, "u1") for color in ("red", "green", "blue")]
    vertices = np.empty(len(points), fields + [(f"scalar_{name}", "<f4") for name in scalars])
    columns = [*points.T, *(colors * 255).round().T, *scalars.values()]
    for name, column in zip(vertices.dtype.names, columns):
        vertices[name] = column
    kinds = {"f": "float", "u": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {' '.join(text.split())}" for text in comments),
              f"element vertex {len(points)}",
              *(f"property {kinds[vertices.dtype[name].kind]} {name}" for name in vertices.dtype.names), "end_header\n"]
    with open(path, "wb") as file:
        file.write("\n".join(header).encode("ascii", "replace"))
        file.write(vertices.tobytes())


def write_submission(folder, scan, labels, scene, benchmark_ids):
    """The files of ScanNet's benchmarks for one scan: folder/semantic/<scan>.txt and folder/instance/<scan>.txt.

    labels (P,), index of the class per vertex; scene: masks (R, P), labels (R,), scores (R,), or None; all NumPy arrays.
    benchmark_ids (K,): see `benchmark_ids`. Masks of fewer than 100 vertices are skipped.
    """
    if re.search(r"\s", scan):
        raise ValueError(f"scan {scan!r}: the benchmark allows no spaces in names")
    (folder / "semantic").mkdir(parents=True, exist_ok=True)
    (folder / "semantic" / f"{scan}.txt").write_text("".join(f"{label}\n" for label in benchmark_ids[labels].tolist()))
    if scene is None:
        return
    (folder / "instance" / "predicted_masks").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (mask, label, score) in enumerate(zip(scene["masks"], scene["labels"], scene["scores"].tolist())):
        if mask.sum() < 100:
            continue
        name = f"predicted_masks/{scan}_{i:03d}.txt"
        rows = np.full((len(mask), 2), ord("\n"), np.uint8)
        rows[:, 0] = ord("0") + mask
        (folder / "instance" / name).write_bytes(rows.tobytes())
        lines.append(f"{name} {benchmark_ids[label]} {score!r}\n")
    (folder / "instance" / f"{scan}.txt").write_text("".join(lines))
