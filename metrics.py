# SPDX-License-Identifier: MIT
"""Semantic IoU and instance average precision (AP), with the rules of the ScanNet benchmark.

Semantics: IoU = TP / (TP + FP + FN) per class, over the points whose ground truth is one of `class_ids`.
A prediction outside `class_ids` is a miss of the true class. A class with neither ground truth nor
prediction is NaN and left out of the mean.

Instances: AP is the area under the precision-recall curve. "AP" is its mean over the IoU thresholds
.50, .55 ... .90; AP50 and AP25 are its values at .50 and .25. The rules that change the figures, from
the benchmark's script evaluate_semantic_instance.py (Dai et al., "ScanNet", CVPR 2017):
  - A prediction matches an instance of its class if IoU > threshold, strictly.
  - Predictions with fewer than `min_points` points are dropped. Instances with fewer are ignored: neither
    hit nor miss.
  - Instances claim their matches in order of instance id. Of several claims, the highest score is a hit
    and the others are false positives. Only the first claim in the given order is then taken; later
    instances may claim the others.
  - An unmatched prediction is a false positive only if the share of its points on void or ignored ground
    truth is at most the threshold.
  - A class without ground truth is NaN and left out of the mean. A class with ground truth but nothing to
    rank is 0; the script itself stops with an error if every prediction of a class is ignored.

With several processes, all-reduce `SemanticMeter.confusion`, and gather and concatenate
`InstanceMeter.scenes`, which holds small tables and no masks. Neither depends on the order of the
scenes. Inputs may be NumPy arrays or tensors on any device.

Imports torch.
"""
import math

import torch

AP_THRESHOLDS = tuple((10 + i) / 20 for i in range(9))  # .50, .55 ... .90; 0.95 is not among them
LABEL_DIVISOR = 1000  # ground truth id = label * LABEL_DIVISOR + instance


class SemanticMeter:
    """Confusion matrix over scenes, for mean IoU.

    class_ids: the evaluated labels, for instance range(K).
    confusion: (K, K + 1) int64 on `device`, row = ground truth, column = prediction; the last column
        counts predictions outside class_ids. Sum it over processes before `compute`.
    """

    def __init__(self, class_ids, device="cpu"):
        self.class_ids = _check_class_ids(class_ids)
        K = len(self.class_ids)
        self.confusion = torch.zeros(K, K + 1, dtype=torch.int64, device=device)

    def update(self, prediction, ground_truth):
        """Adds points: prediction and ground_truth are integers of equal shape, on the same device."""
        prediction = torch.as_tensor(prediction)
        ground_truth = torch.as_tensor(ground_truth)
        if prediction.shape != ground_truth.shape:
            raise ValueError(f"shapes of prediction {tuple(prediction.shape)} and ground truth "
                             f"{tuple(ground_truth.shape)} differ")
        for name, labels in (("prediction", prediction), ("ground truth", ground_truth)):
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"{name} must be integer labels, not {labels.dtype}")
        K = len(self.class_ids)
        truth = self._index(ground_truth)
        guess = self._index(prediction)
        pairs = (truth * (K + 1) + guess)[truth < K]  # one code per (row, column)
        counts = torch.bincount(pairs, minlength=K * (K + 1))
        self.confusion += counts.view(K, K + 1).to(self.confusion.device)

    def _index(self, labels):
        """The position of every label in class_ids, flattened; K for labels outside class_ids."""
        K = len(self.class_ids)
        labels = labels.flatten().long()
        ids, position = torch.tensor(self.class_ids, device=labels.device).sort()
        slot = torch.searchsorted(ids, labels).clamp(max=K - 1)
        return torch.where(ids[slot] == labels, position[slot], K)

    def compute(self):
        """{"miou": float, "per_class": {class id: IoU, NaN without ground truth and prediction}}."""
        confusion = self.confusion.cpu().double()
        square = confusion[:, :-1]
        hits = square.diagonal()
        union = confusion.sum(1) + square.sum(0) - hits
        iou = hits / union  # 0 / 0 is the documented NaN
        per_class = dict(zip(self.class_ids, iou.tolist()))
        return {"miou": iou.nanmean().item(), "per_class": per_class}


class InstanceMeter:
    """Overlaps of predicted and true instances over scenes, for average precision.

    class_ids: the evaluated labels, all > 0, because ground-truth ids below 1000 mean "no instance".
    min_points: smaller predictions are dropped, smaller ground truth is ignored.
    scenes: one dict per scene, on the CPU: {class id: (instance sizes (G,), prediction sizes (R,),
        scores (R,), void points of each prediction (R,), intersections (G, R))}. Concatenate it over
        processes before `compute`.
    """

    def __init__(self, class_ids, min_points=100):
        self.class_ids = _check_class_ids(class_ids)
        if min(self.class_ids) < 1:
            raise ValueError(f"class ids must be > 0, because a ground-truth id is label * {LABEL_DIVISOR} "
                             f"+ instance and label 0 is void; got {self.class_ids}: shift class ids and "
                             "labels by 1")
        if min_points < 1:
            raise ValueError(f"min_points must be at least 1, got {min_points}")
        self.min_points = min_points
        self.scenes = []

    def update(self, prediction, ground_truth):
        """Adds one scene.

        prediction: {"masks": (R, P) bool, "labels": (R,), "scores": (R,)}; the order of the rows matters
            if several predictions match one instance.
        ground_truth: (P,) int64, label * 1000 + instance; a label outside class_ids is void.
        """
        truth = torch.as_tensor(ground_truth)
        values = (prediction[name] for name in ("masks", "labels", "scores"))
        masks, labels, scores = (torch.as_tensor(value, device=truth.device) for value in values)
        if truth.ndim != 1 or truth.is_floating_point():
            raise ValueError("ground truth must be (P,) integers, got "
                             f"{truth.dtype} {tuple(truth.shape)}")
        shapes = [tuple(value.shape) for value in (masks, labels, scores)]
        R, P = len(labels), len(truth)
        if shapes != [(R, P), (R,), (R,)]:
            raise ValueError("masks, labels and scores must be (R, P), (R,) and (R,) with "
                             f"P = {P}, got {shapes}")
        if masks.dtype != torch.bool:
            raise ValueError(f"masks must be bool, not {masks.dtype}")
        if not torch.isfinite(scores).all():
            raise ValueError("scores hold a value that is not finite")

        # points of each mask on each of the I ground-truth ids, in one pass over the points in masks
        ids, index, sizes = torch.unique(truth, return_inverse=True, return_counts=True)
        num_ids = len(ids)
        row, point = masks.nonzero(as_tuple=True)
        pairs = row * num_ids + index[point]
        overlap = torch.bincount(pairs, minlength=R * num_ids).view(R, num_ids).cpu()
        ids, sizes, labels = ids.cpu(), sizes.cpu(), labels.cpu()
        scores = scores.double().cpu()

        label_of_id = torch.div(ids, LABEL_DIVISOR, rounding_mode="floor")  # (I,)
        is_void = ~torch.isin(label_of_id, torch.tensor(self.class_ids))
        void = overlap[:, is_void].sum(1)  # (R,)
        area = overlap.sum(1)              # (R,)
        scene = {}
        for c in self.class_ids:
            of_class = label_of_id == c                       # (I,)
            rows = (labels == c) & (area >= self.min_points)  # (R,)
            if of_class.any() or rows.any():
                shared = overlap[rows][:, of_class].T
                scene[c] = sizes[of_class], area[rows], scores[rows], void[rows], shared
        self.scenes.append(scene)

    def compute(self):
        """{"ap", "ap50", "ap25": float, "per_class": {class id: (ap, ap50, ap25)}}, NaN = no truth."""
        per_class = {}
        for c in self.class_ids:
            *values, ap25 = [_class_ap(self.scenes, c, threshold, self.min_points)
                             for threshold in (*AP_THRESHOLDS, 0.25)]
            ap = torch.tensor(values, dtype=torch.float64).mean().item()
            per_class[c] = ap, values[0], ap25
        table = torch.tensor(list(per_class.values()), dtype=torch.float64)  # (K, 3)
        ap, ap50, ap25 = table.nanmean(0).tolist()
        return {"ap": ap, "ap50": ap50, "ap25": ap25, "per_class": per_class}


def evaluate_semantics(predictions, ground_truth, class_ids):
    """Mean IoU of a list of scenes; predictions and ground_truth are lists of (P,) integer labels."""
    return _evaluate(SemanticMeter(class_ids), predictions, ground_truth)


def evaluate_instances(predictions, ground_truth, class_ids):
    """AP, AP50 and AP25 of lists of scenes; see `InstanceMeter.update` and `InstanceMeter.compute`."""
    return _evaluate(InstanceMeter(class_ids), predictions, ground_truth)


def _evaluate(meter, predictions, ground_truth):
    if len(predictions) != len(ground_truth):
        raise ValueError(f"{len(predictions)} predictions for {len(ground_truth)} scenes of "
                         "ground truth")
    for prediction, truth in zip(predictions, ground_truth):
        meter.update(prediction, truth)
    return meter.compute()


def _class_ap(scenes, class_id, threshold, min_points):
    """Average precision of one class at one IoU threshold; NaN without ground truth."""
    scores, hits, num_instances = [], [], 0
    for scene in scenes:
        if class_id not in scene:
            continue
        sizes, area, score, void, overlap = scene[class_id]
        union = sizes[:, None] + area - overlap
        matched = overlap / union > threshold  # (G, R)
        counted = sizes >= min_points          # (G,)
        num_instances += int(counted.sum())

        # unmatched predictions
        ignored = void + overlap[~counted].sum(0)  # (R,) points on void or ignored ground truth
        false = ~matched.any(0) & (ignored / area <= threshold)
        scores += score[false].tolist()
        hits += [0.0] * int(false.sum())

        # matched predictions
        taken = set()
        score = score.tolist()
        for row in matched[counted].tolist():
            claims = [r for r, match in enumerate(row) if match and r not in taken]
            if claims:
                taken.add(claims[0])  # as in the script, later instances may match the others
                scores += sorted((score[r] for r in claims), reverse=True)
                hits += [1.0] + [0.0] * (len(claims) - 1)
    if num_instances == 0:
        return math.nan
    return _area_under_curve(scores, hits, num_instances) if scores else 0.0


def _area_under_curve(scores, hits, num_instances):
    """Area under the precision-recall curve of ranked predictions: lists of scores and of hits, 1 or 0."""
    scores, order = torch.tensor(scores, dtype=torch.float64).sort()
    hits = torch.tensor(hits, dtype=torch.float64)[order]
    # one point per distinct score, from the lowest, with all predictions; then precision 1 at recall 0
    _, ties = torch.unique_consecutive(scores, return_counts=True)
    first = ties.cumsum(0) - ties
    true_positives = hits.sum() - (hits.cumsum(0) - hits)[first]
    precision = torch.cat([true_positives / (len(scores) - first), torch.ones(1)])
    recall = torch.cat([true_positives / num_instances, torch.zeros(1)])
    # each point is weighted with the central difference of recall
    padded = torch.cat([recall[:1], recall, torch.zeros(1)])
    weights = (padded[:-2] - padded[2:]) / 2
    return (precision * weights).sum().item()


def _check_class_ids(class_ids):
    class_ids = [int(c) for c in class_ids]
    if not class_ids or len(set(class_ids)) != len(class_ids):
        raise ValueError(f"class_ids must be distinct and not empty, got {class_ids}")
    return class_ids
