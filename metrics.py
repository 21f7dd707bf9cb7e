# SPDX-License-Identifier: MIT
"""Semantic IoU and instance average precision, scored as ScanNet scores them.

Semantics: over the points whose ground truth is one of `class_ids`, IoU = TP / (TP + FP + FN). A prediction outside of
`class_ids` is a miss of the true class. A class with neither ground truth nor prediction is NaN and left out of the
mean.

Instances: AP is the area under the precision-recall curve, averaged over IoU thresholds .50, .55 ... .90, and taken
alone at .50 and .25. The rules that move the figures, from the benchmark's evaluator (Dai et al., "ScanNet", CVPR 2017,
evaluate_semantic_instance.py):
  - a prediction matches an instance of its class where IoU > threshold, strictly;
  - predictions below `min_points` are dropped; instances below it are ignored, neither hit nor miss;
  - instances take predictions greedily, by id, in the order in which the predictions stand; where one instance is
    matched twice, the lower score is a false positive;
  - an unmatched prediction is a false positive only where the share of its points on void or ignored ground truth is
    at most the threshold;
  - a class without ground truth is NaN and left out of the mean; with ground truth but nothing to rank it is 0 (the
    evaluator itself stops with an error where every prediction of a class is ignored).

`SemanticMeter.confusion` is one tensor that can be all-reduced; `InstanceMeter.scenes` is a list of small tables, no
masks, that can be gathered with `torch.distributed.all_gather_object` and concatenated. Neither depends on the order of
the scenes. Arrays may be tensors on any device or NumPy arrays. Imports torch only.
"""
import math

import torch

AP_THRESHOLDS = tuple((10 + i) / 20 for i in range(9))  # .50, .55 ... .90; 0.95 is not among them
LABEL_DIVISOR = 1000  # ground truth id = label * LABEL_DIVISOR + instance


class SemanticMeter:
    """Confusion matrix over scenes, for mean IoU.

    class_ids: the evaluated labels, e.g. range(K).
    confusion: (K, K + 1) int64 on `device`, row = truth, column = prediction; the last column holds predictions outside
    of class_ids. Sum it over processes before `compute`.
    """

    def __init__(self, class_ids, device="cpu"):
        self.class_ids = _check_class_ids(class_ids)
        K = len(self.class_ids)
        self.confusion = torch.zeros(K, K + 1, dtype=torch.int64, device=device)

    def update(self, prediction, ground_truth):
        """Adds points: prediction and ground_truth of one integer shape, on one device."""
        prediction, ground_truth = torch.as_tensor(prediction), torch.as_tensor(ground_truth)
        if prediction.shape != ground_truth.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)}, ground truth {tuple(ground_truth.shape)} differ")
        for name, labels in (("prediction", prediction), ("ground truth", ground_truth)):
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"{name} must be integer labels, not {labels.dtype}")
        K = len(self.class_ids)
        truth, guess = self._index(ground_truth), self._index(prediction)
        pairs = (truth * (K + 1) + guess)[truth < K]
        self.confusion += torch.bincount(pairs, minlength=K * (K + 1)).view(K, K + 1).to(self.confusion.device)

    def _index(self, labels):
        """Position of every label in class_ids; len(class_ids) where it is not there."""
        ids, position = torch.tensor(self.class_ids, device=labels.device).sort()
        slot = torch.searchsorted(ids, labels.flatten().long()).clamp(max=len(ids) - 1)
        return torch.where(ids[slot] == labels.flatten(), position[slot], len(ids))

    def compute(self):
        """{"miou": float, "per_class": {class id: IoU, NaN where the class has neither truth nor prediction}}."""
        K = len(self.class_ids)
        confusion = self.confusion.cpu().double()
        hits = confusion[:, :K].diagonal()
        iou = hits / (confusion.sum(1) + confusion[:, :K].sum(0) - hits)  # 0 / 0 is the NaN that is asked for
        return {"miou": iou.nanmean().item(), "per_class": dict(zip(self.class_ids, iou.tolist()))}


class InstanceMeter:
    """Matches over scenes, for average precision.

    class_ids: the evaluated labels, all > 0, because an id below 1000 means "no instance" in the ground truth.
    min_points: predictions below are dropped, ground truth below is ignored.
    scenes: one dict per scene, {class id: (instance sizes (G,), prediction sizes (R,), scores (R,), void points of each
    prediction (R,), intersections (G, R))}, on the CPU.
    """

    def __init__(self, class_ids, min_points=100):
        self.class_ids = _check_class_ids(class_ids)
        if min(self.class_ids) < 1:
            raise ValueError(f"class ids must be > 0, for a ground truth id is label * {LABEL_DIVISOR} + instance and "
                             f"label 0 is void; got {self.class_ids}: shift both by 1")
        if min_points < 1:
            raise ValueError(f"min_points must be at least 1, got {min_points}")
        self.min_points = min_points
        self.scenes = []

    def update(self, prediction, ground_truth):
        """Adds one scene.

        prediction: {"masks": (R, P) bool, "labels": (R,), "scores": (R,)}; the order of the rows matters where several
        predictions claim one instance. ground_truth: (P,) int64, label * 1000 + instance, where a label outside of
        class_ids is void.
        """
        truth = torch.as_tensor(ground_truth)
        masks = torch.as_tensor(prediction["masks"], device=truth.device)
        labels = torch.as_tensor(prediction["labels"], device=truth.device)
        scores = torch.as_tensor(prediction["scores"], device=truth.device).double()
        if truth.ndim != 1 or truth.is_floating_point():
            raise ValueError(f"ground truth must be (P,) integers, got {truth.dtype} {tuple(truth.shape)}")
        if masks.shape != (len(labels), len(truth)) or labels.ndim != 1 or scores.shape != labels.shape:
            raise ValueError(f"masks {tuple(masks.shape)}, labels {tuple(labels.shape)} and scores "
                             f"{tuple(scores.shape)} are not (R, P), (R,), (R,) with P = {len(truth)}")
        if masks.dtype != torch.bool:
            raise ValueError(f"masks must be bool, not {masks.dtype}")
        if not torch.isfinite(scores).all():
            raise ValueError("scores hold a value that is not finite")

        ids, index, sizes = torch.unique(truth, return_inverse=True, return_counts=True)
        # One pass over the mask entries that are set, instead of one over the points per pair of instance and mask.
        row, point = masks.nonzero(as_tuple=True)
        overlap = torch.bincount(row * len(ids) + index[point], minlength=len(labels) * len(ids))
        overlap = overlap.view(len(labels), len(ids))  # (R, ground truth ids)
        sizes, overlap, labels, scores = sizes.cpu(), overlap.cpu(), labels.cpu(), scores.cpu()
        label_of_id = torch.div(ids, LABEL_DIVISOR, rounding_mode="floor").cpu()

        void = overlap[:, ~torch.isin(label_of_id, torch.tensor(self.class_ids))].sum(1)
        area = overlap.sum(1)
        scene = {}
        for c in self.class_ids:
            of_class, rows = label_of_id == c, (labels == c) & (area >= self.min_points)
            if of_class.any() or rows.any():
                scene[c] = (sizes[of_class], area[rows], scores[rows], void[rows], overlap[rows][:, of_class].T)
        self.scenes.append(scene)

    def compute(self):
        """{"ap", "ap50", "ap25": float, "per_class": {class id: (ap, ap50, ap25)}}; NaN without ground truth."""
        table = torch.tensor([[_class_ap(self.scenes, c, t, self.min_points) for t in AP_THRESHOLDS + (0.25,)]
                              for c in self.class_ids], dtype=torch.float64)
        columns = torch.stack([table[:, :-1].mean(1), table[:, 0], table[:, -1]], dim=1)  # (K, 3)
        ap, ap50, ap25 = columns.nanmean(0).tolist()
        per_class = {c: tuple(row) for c, row in zip(self.class_ids, columns.tolist())}
        return {"ap": ap, "ap50": ap50, "ap25": ap25, "per_class": per_class}


def evaluate_semantics(predictions, ground_truth, class_ids):
    """Mean IoU of a list of scenes; predictions and ground_truth are lists of (P,) integer labels."""
    meter = SemanticMeter(class_ids)
    for prediction, truth in _pairs(predictions, ground_truth):
        meter.update(prediction, truth)
    return meter.compute()


def evaluate_instances(predictions, ground_truth, class_ids):
    """AP, AP50 and AP25 of a list of scenes; see `InstanceMeter.update` for a scene, `.compute` for the result."""
    meter = InstanceMeter(class_ids)
    for prediction, truth in _pairs(predictions, ground_truth):
        meter.update(prediction, truth)
    return meter.compute()


def _class_ap(scenes, class_id, threshold, min_points):
    """Average precision of one class at one IoU threshold; NaN without ground truth."""
    scores, hits, num_instances = [], [], 0
    for scene in scenes:
        if class_id not in scene:
            continue
        sizes, area, score, void, overlap = scene[class_id]
        matched = overlap / (sizes[:, None] + area - overlap) > threshold  # (G, R)
        counted = sizes >= min_points
        num_instances += int(counted.sum())
        ignored = void + (overlap * ~counted[:, None]).sum(0)
        false = ~matched.any(0) & (ignored / area <= threshold)
        scores += score[false].tolist()
        hits += [0.0] * int(false.sum())

        taken = set()
        score = score.tolist()
        for row in matched[counted].tolist():
            # A prediction is taken only as the first of an instance: a spare one may still go to the next instance.
            claims = [r for r, match in enumerate(row) if match and r not in taken]
            if claims:
                taken.add(claims[0])
                ranked = sorted((score[r] for r in claims), reverse=True)
                scores += ranked
                hits += [1.0] + [0.0] * (len(ranked) - 1)
    if num_instances == 0:
        return math.nan
    if not scores:
        return 0.0

    # One point of the curve for each distinct score, from the lowest cut (all predictions) to the highest; the last
    # point, precision 1 at recall 0, is added by hand. The weights are central differences of recall.
    scores, order = torch.tensor(scores, dtype=torch.float64).sort()
    hits = torch.tensor(hits, dtype=torch.float64)[order]
    _, ties = torch.unique_consecutive(scores, return_counts=True)
    first = ties.cumsum(0) - ties
    true_positives = hits.sum() - (hits.cumsum(0) - hits)[first]
    precision = torch.cat([true_positives / (len(scores) - first), torch.ones(1)])
    recall = torch.cat([true_positives / num_instances, torch.zeros(1)])
    padded = torch.cat([recall[:1], recall, torch.zeros(1)])
    return (precision * (padded[:-2] - padded[2:]) / 2).sum().item()


def _check_class_ids(class_ids):
    class_ids = [int(c) for c in class_ids]
    if not class_ids or len(set(class_ids)) != len(class_ids):
        raise ValueError(f"class_ids must be distinct and not empty, got {class_ids}")
    return class_ids


def _pairs(predictions, ground_truth):
    if len(predictions) != len(ground_truth):
        raise ValueError(f"{len(predictions)} predictions for {len(ground_truth)} scenes of ground truth")
    return zip(predictions, ground_truth)
