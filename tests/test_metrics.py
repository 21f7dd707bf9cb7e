# SPDX-License-Identifier: MIT
"""metrics.py: figures of the official ScanNet evaluator, hand counts, and invariances.

data/golden_ap: random scenes (ties, sizes around 100 points, void, a class without predictions) and, in
expected.json, what the official script prints for them; null is NaN. Masks are np.packbits along the points.
"""
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import InstanceMeter, SemanticMeter, evaluate_instances, evaluate_semantics

GOLDEN = Path(__file__).parent / "data" / "golden_ap"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SCANNET20 = {"cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9, "bookshelf": 10,
             "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24, "shower curtain": 28,
             "toilet": 33, "sink": 34, "bathtub": 36, "otherfurniture": 39}
IDS = list(SCANNET20.values())


def load(case):
    """Predictions and ground truth of every scan."""
    file = np.load(GOLDEN / f"ap_{case}.npz")
    truth = [file[f"gt{i}"] for i in range(int(file["scans"]))]
    predictions = []
    for i, gt in enumerate(truth):
        masks = np.unpackbits(file[f"masks{i}"], axis=1)[:, :len(gt)]
        predictions.append({"masks": masks.astype(bool), "labels": file[f"labels{i}"],
                            "scores": file[f"scores{i}"]})
    return predictions, truth


def flat(result):
    figures = [result["ap"], result["ap50"], result["ap25"]]
    for row in result["per_class"].values():
        figures += row
    return figures


def same(result, expected, tolerance=1e-12):
    return flat(result) == pytest.approx(expected, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("case", EXPECTED)
def test_every_figure_of_the_official_script_is_met(case):
    expected = EXPECTED[case]
    official = [expected[key] for key in ("all_ap", "all_ap_50%", "all_ap_25%")]
    for name in SCANNET20:
        official += [expected["classes"][name][key] for key in ("ap", "ap50%", "ap25%")]
    official = [math.nan if figure is None else figure for figure in official]
    assert same(evaluate_instances(*load(case), IDS), official, 1e-9)


@pytest.mark.parametrize("case", ["ties", "hard"])
def test_figures_do_not_depend_on_order_of_points_scenes_or_container(case):
    predictions, truth = load(case)
    expected = flat(evaluate_instances(predictions, truth, IDS))
    shuffled_p, shuffled_t = [], []
    for prediction, gt in zip(predictions[::-1], truth[::-1]):
        order = torch.randperm(len(gt), generator=torch.Generator().manual_seed(0))
        tensors = {key: torch.from_numpy(value) for key, value in prediction.items()}
        shuffled_p.append({**tensors, "masks": tensors["masks"][:, order]})
        shuffled_t.append(torch.from_numpy(gt)[order])
    assert same(evaluate_instances(shuffled_p, shuffled_t, IDS), expected)


def test_processes_that_pool_their_scenes_get_the_figures_of_one_process():
    predictions, truth = load("hard")
    before = pickle.dumps((predictions, truth))
    parts = [InstanceMeter(IDS), InstanceMeter(IDS)]
    for i, scene in enumerate(zip(predictions, truth)):
        parts[i % 2].update(*scene)
    pooled = InstanceMeter(IDS)
    pooled.scenes = [scene for part in parts for scene in pickle.loads(pickle.dumps(part.scenes))]
    assert same(pooled.compute(), flat(evaluate_instances(predictions, truth, IDS)))

    halves = [SemanticMeter(IDS), SemanticMeter(IDS)]
    labels = [torch.from_numpy(gt) // 1000 for gt in truth]
    for i, gt in enumerate(labels):
        halves[i % 2].update(gt.roll(1000), gt)
    halves[0].confusion += halves[1].confusion
    single = evaluate_semantics([gt.roll(1000) for gt in labels], labels, IDS)
    assert halves[0].compute()["miou"] == pytest.approx(single["miou"], abs=1e-12)
    assert pickle.dumps((predictions, truth)) == before  # arguments stay as they are


# Instances (points, class) side by side; void points after them; predictions (start, stop, score) of class 5;
# its AP, AP50 and AP25. A curve has precisions at recalls, weighted with central differences.
COUNTS = {
    "perfect": ([(150, 5), (200, 5), (300, 5)], 0, [(0, 150, .3), (150, 350, .3), (350, 650, .9)], (1, 1, 1)),
    "IoU of the threshold is no match": ([(200, 5)], 0, [(0, 100, .5)], (0, 0, 1)),
    "IoU above the threshold": ([(200, 5)], 0, [(0, 101, .5)], (1 / 9, 1, 1)),
    # hit, false, hit: precision 2/3, 1/2, 1, 1 at recall 1, 1/2, 1/2, 0
    "the lower of two matches is false": (
        [(200, 5)] * 2, 0, [(0, 200, .9), (0, 190, .4), (200, 400, .2)], [19 / 24] * 3),
    "whatever their order": (
        [(200, 5)] * 2, 0, [(0, 200, .4), (0, 190, .9), (200, 400, .2)], [19 / 24] * 3),
    "one prediction serves one instance": ([(200, 5)] * 2, 0, [(100, 300, .5)], (0, 0, 1 / 2)),  # IoU 1/3 with both
    "a spare one serves the next": (  # hit .9; false .5 on the first instance, hit .5 on the second
        [(200, 5)] * 2, 0, [(0, 200, .9), (100, 300, .5)], (1 / 2, 1 / 2, 2 / 3 / 4 + 1 / 2 + 1 / 4)),
    "a void share of the threshold is false": (  # precision 1/2, 0, 1 at recall 1, 0, 0
        [(200, 5), (100, 7)], 100, [(0, 200, .5), (200, 400, .9)], (1 / 4, 1 / 4, 1)),
    "on void": ([(200, 5)], 400, [(0, 200, .9), (300, 500, .95)], (1, 1, 1)),
    "on another class": ([(200, 5), (400, 7)], 0, [(0, 200, .9), (300, 500, .95)], (1 / 4, 1 / 4, 1 / 4)),
    "small ones do not count": ([(200, 5), (99, 5)], 0, [(0, 200, .5), (100, 199, .9), (200, 299, .9)], (1, 1, 1)),
    "all ignored, where the script stops": ([(200, 5)], 400, [(300, 500, .9)], (0, 0, 0))}


@pytest.mark.parametrize("instances, void, predictions, expected", COUNTS.values(), ids=COUNTS)
def test_figures_of_a_scene_are_those_counted_by_hand(instances, void, predictions, expected):
    truth = np.repeat([label * 1000 + i for i, (_, label) in enumerate(instances)] + [0],
                      [size for size, _ in instances] + [void])
    start, stop, scores = np.array(predictions).T
    point = np.arange(len(truth))
    masks = (point >= start[:, None]) & (point < stop[:, None])
    scene = {"masks": masks, "labels": np.full(len(scores), 5), "scores": scores}
    result = evaluate_instances([scene], [truth], [5, 7])["per_class"][5]
    assert result == pytest.approx(expected, abs=1e-12)


def test_ground_truth_without_a_prediction_is_zero_and_nothing_at_all_is_nan():
    none = {"masks": np.zeros((0, 300), bool), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    empty = {**none, "masks": np.zeros((0, 0), bool)}
    assert flat(evaluate_instances([none], [np.full(300, 5001)], [5])) == [0] * 6
    for scenes in (([none], [np.zeros(300, int)]), ([], []), ([empty], [np.zeros(0, int)])):
        assert np.isnan(flat(evaluate_instances(*scenes, [5]))).all()
    assert math.isnan(evaluate_semantics([np.array([1, 2])], [np.array([-1, -1])], [0, 1, 2])["miou"])
    assert math.isnan(evaluate_semantics([], [], [0, 1])["miou"])


def test_semantic_iou_equals_a_count_of_pairs():
    generator = torch.Generator().manual_seed(0)
    class_ids = [4, 0, 7, 9, 2]
    truth = [torch.randint(-1, 9, (n,), generator=generator) for n in (500, 1, 300)]  # 9 is never the truth
    truth = [torch.where(t == 7, 8, t) for t in truth]  # nor is 7
    guess = [torch.where(torch.rand(len(t), generator=generator) < .5, t, torch.randint(-1, 9, t.shape,
             generator=generator)) for t in truth]
    result = evaluate_semantics(guess, [t.numpy() for t in truth], class_ids)
    pairs = zip(torch.cat(truth).tolist(), torch.cat(guess).tolist())
    pairs = [(t, p) for t, p in pairs if t in class_ids]
    hits = [sum(t == p == c for t, p in pairs) for c in class_ids]
    union = [sum(c in pair for pair in pairs) for c in class_ids]
    ious = [h / u if u else math.nan for h, u in zip(hits, union)]
    assert list(result["per_class"]) == class_ids
    assert list(result["per_class"].values()) == pytest.approx(ious, abs=1e-12, nan_ok=True)
    assert ious[2] == 0 and math.isnan(ious[3])  # predicted only: 0; neither: skipped
    assert result["miou"] == pytest.approx(np.nanmean(ious), abs=1e-12)


def evaluate_changed(**change):
    scene = {"masks": np.ones((2, 300), bool), "labels": np.array([5, 5]), "scores": np.array([.5, .6])}
    evaluate_instances([{**scene, **change}], [np.full(300, 5001)], [5])


@pytest.mark.parametrize("call, message", [
    (lambda: evaluate_changed(masks=np.ones((2, 299), bool)), "P = 300"),
    (lambda: evaluate_changed(masks=np.ones((2, 300))), "bool"),
    (lambda: evaluate_changed(labels=np.array([5])), r"\(1,\)"),
    (lambda: evaluate_changed(scores=np.array([.5, np.nan])), "not finite"),
    (lambda: evaluate_instances([], [], [0, 1]), "shift"),
    (lambda: evaluate_semantics([], [], [1, 1]), "distinct"),
    (lambda: evaluate_semantics([], [], []), "distinct"),
    (lambda: evaluate_semantics([np.zeros(3, int)], [], [0]), "1 predictions for 0"),
    (lambda: evaluate_semantics([np.zeros(3, int)], [np.zeros(4, int)], [0]), "differ"),
    (lambda: evaluate_semantics([np.zeros(3)], [np.zeros(3, int)], [0]), "integer"),
    (lambda: InstanceMeter([1], min_points=0), "min_points"),
    (lambda: InstanceMeter([5]).update({"masks": np.ones((0, 3), bool), "labels": [], "scores": []}, np.zeros(3)),
     r"ground truth must be \(P,\) integers")])
def test_malformed_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
