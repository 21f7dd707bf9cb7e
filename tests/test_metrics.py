# SPDX-License-Identifier: MIT
"""metrics.py against figures of the official ScanNet evaluator, hand counts, and its own invariances.

data/golden_ap: random scenes (ties, sizes around 100 points, void, a class without predictions) and, in expected.json,
what the official script prints for them; null is NaN. Masks are np.packbits along the points.
"""
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import AP_THRESHOLDS, InstanceMeter, SemanticMeter, evaluate_instances, evaluate_semantics

GOLDEN = Path(__file__).parent / "data" / "golden_ap"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SCANNET20 = {"cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9, "bookshelf": 10,
             "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24, "shower curtain": 28,
             "toilet": 33, "sink": 34, "bathtub": 36, "otherfurniture": 39}
IDS = list(SCANNET20.values())


def load(case):
    file = np.load(GOLDEN / f"ap_{case}.npz")
    truth = [file[f"gt{i}"] for i in range(int(file["scans"]))]
    return [{"masks": np.unpackbits(file[f"masks{i}"], axis=1)[:, :len(gt)].astype(bool),
             "labels": file[f"labels{i}"], "scores": file[f"scores{i}"]} for i, gt in enumerate(truth)], truth


def flat(result):
    return [result["ap"], result["ap50"], result["ap25"], *(v for row in result["per_class"].values() for v in row)]


def one_scene(sizes, predictions, label=5, void=0):
    """Instances of `sizes` points side by side, then `void` points; predictions are (start, stop, score)."""
    truth = torch.repeat_interleave(torch.arange(len(sizes) + 1), torch.tensor([*sizes, void]))
    truth = torch.where(truth < len(sizes), label * 1000 + 1 + truth, 0)
    masks = torch.zeros(len(predictions), len(truth), dtype=torch.bool)
    for mask, (start, stop, _) in zip(masks, predictions):
        mask[start:stop] = True
    return {"masks": masks, "labels": torch.full((len(masks),), label),
            "scores": torch.tensor([p[2] for p in predictions], dtype=torch.float64)}, truth


@pytest.mark.parametrize("case", EXPECTED)
def test_every_figure_of_the_official_script_is_met(case):
    result, expected = evaluate_instances(*load(case), IDS), EXPECTED[case]
    names = ("ap", "ap50%", "ap25%")
    pairs = list(zip([result["ap"], result["ap50"], result["ap25"]], [expected[f"all_{n}"] for n in
                                                                      ("ap", "ap_50%", "ap_25%")]))
    assert expected["classes"].keys() == SCANNET20.keys()
    for name, figures in expected["classes"].items():
        pairs += zip(result["per_class"][SCANNET20[name]], (figures[n] for n in names))
    for ours, official in pairs:
        assert ours == pytest.approx(math.nan if official is None else official, abs=1e-9, nan_ok=True)


def test_thresholds_are_those_of_the_official_script():
    assert AP_THRESHOLDS == pytest.approx(np.arange(0.5, 0.95, 0.05).tolist(), abs=1e-12)


@pytest.mark.parametrize("case", ["ties", "hard"])
def test_figures_do_not_depend_on_order_of_points_scenes_or_container(case):
    predictions, truth = load(case)
    expected = flat(evaluate_instances(predictions, truth, IDS))
    shuffled_p, shuffled_t = [], []
    for prediction, gt in reversed(list(zip(predictions, truth))):
        order = torch.randperm(len(gt), generator=torch.Generator().manual_seed(0))
        shuffled_p.append({**{k: torch.from_numpy(v) for k, v in prediction.items()},
                           "masks": torch.from_numpy(prediction["masks"])[:, order]})
        shuffled_t.append(torch.from_numpy(gt)[order])
    assert flat(evaluate_instances(shuffled_p, shuffled_t, IDS)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_processes_that_pool_their_scenes_get_the_figures_of_one_process():
    predictions, truth = load("hard")
    parts = [InstanceMeter(IDS), InstanceMeter(IDS)]
    for i, scene in enumerate(zip(predictions, truth)):
        parts[i % 2].update(*scene)
    pooled = InstanceMeter(IDS)
    pooled.scenes = [scene for part in parts for scene in pickle.loads(pickle.dumps(part.scenes))]
    expected = evaluate_instances(predictions, truth, IDS)
    assert flat(pooled.compute()) == pytest.approx(flat(expected), abs=1e-12, nan_ok=True)

    halves = [SemanticMeter(IDS), SemanticMeter(IDS)]
    labels = [torch.from_numpy(gt) // 1000 for gt in truth]
    for i, gt in enumerate(labels):
        halves[i % 2].update(gt.roll(1000), gt)
    halves[0].confusion += halves[1].confusion
    single = evaluate_semantics([gt.roll(1000) for gt in labels], labels, IDS)
    assert halves[0].compute()["miou"] == pytest.approx(single["miou"], abs=1e-12)


def test_perfect_prediction_scores_one():
    prediction, truth = one_scene([150, 200, 300], [(0, 150, .3), (150, 350, .3), (350, 650, .9)])
    result = evaluate_instances([prediction], [truth], [5, 7])
    assert (result["ap"], result["ap50"], result["ap25"]) == (1, 1, 1)
    assert result["per_class"][5] == (1, 1, 1) and all(map(math.isnan, result["per_class"][7]))


def test_iou_of_exactly_the_threshold_is_no_match():
    half, truth = one_scene([200], [(0, 100, .5)])  # IoU 0.5
    assert evaluate_instances([half], [truth], [5])["ap50"] == 0
    more, truth = one_scene([200], [(0, 101, .5)])
    assert evaluate_instances([more], [truth], [5])["ap50"] == 1


def test_of_two_matches_the_lower_score_is_the_false_positive_whatever_their_order():
    for scores in ((.9, .4), (.4, .9)):
        prediction, truth = one_scene([200, 200], [(0, 200, scores[0]), (0, 190, scores[1]), (200, 400, .2)])
        # Ranked: hit, false positive, hit. Precision 2/3, 1/2, 1, 1 at recall 1, 1/2, 1/2, 0, with central differences.
        expected = 2 / 3 * .25 + 1 / 2 * .25 + 1 * .25 + 1 * .25
        assert evaluate_instances([prediction], [truth], [5])["ap50"] == pytest.approx(expected, abs=1e-12)


def test_a_prediction_serves_one_instance_and_a_spare_one_may_still_serve_the_next():
    across = (100, 300, .5)  # half on each of two instances: IoU 1/3
    alone, truth = one_scene([200, 200], [across])
    assert evaluate_instances([alone], [truth], [5])["ap25"] == pytest.approx(.5, abs=1e-12)
    both, truth = one_scene([200, 200], [(0, 200, .9), across])  # hit .9; false .5 on the first, hit .5 on the second
    expected = 2 / 3 * .25 + 1 * .5 + 1 * .25
    assert evaluate_instances([both], [truth], [5])["ap25"] == pytest.approx(expected, abs=1e-12)


def test_a_void_share_of_exactly_the_threshold_is_a_false_positive():
    prediction, truth = one_scene([200, 100], [(0, 200, .5), (200, 400, .9)], void=100)
    truth[200:300] = 7001
    # False positive, then hit: precision 1/2, 0, 1 at recall 1, 0, 0; for AP25 the void share is above the threshold.
    result = evaluate_instances([prediction], [truth], [5, 7])["per_class"][5]
    assert result[1:] == pytest.approx((1 / 2 * .5, 1), abs=1e-12)


def test_predictions_on_void_are_neither_hit_nor_miss_up_to_the_threshold():
    on_void, truth = one_scene([200], [(0, 200, .9), (300, 500, .95)], void=400)
    assert evaluate_instances([on_void], [truth], [5])["ap50"] == 1
    on_other, truth = one_scene([200, 400], [(0, 200, .9), (300, 500, .95)])
    truth[200:] = 7001
    assert evaluate_instances([on_other], [truth], [5, 7])["per_class"][5][1] < 1


def test_small_predictions_are_dropped_and_small_instances_ignored():
    prediction, truth = one_scene([200, 99], [(0, 200, .5), (100, 199, .9), (200, 299, .9)])
    result = evaluate_instances([prediction], [truth], [5])
    assert (result["ap"], result["ap50"]) == (1, 1)


def test_ground_truth_without_a_prediction_is_zero_and_nothing_at_all_is_nan():
    none = {"masks": np.zeros((0, 300), bool), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    truth = np.full(300, 5001)
    assert flat(evaluate_instances([none], [truth], [5])) == [0] * 6
    assert all(map(math.isnan, flat(evaluate_instances([none], [np.zeros(300, int)], [5]))))
    assert all(map(math.isnan, flat(evaluate_instances([], [], [5]))))
    empty = {"masks": np.zeros((0, 0), bool), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    assert math.isnan(evaluate_instances([empty], [np.zeros(0, int)], [5])["ap"])


def test_where_the_official_script_stops_with_an_error_the_result_is_zero():
    ignored, truth = one_scene([200], [(300, 500, .9)], void=400)  # all predictions ignored, no match
    assert flat(evaluate_instances([ignored], [truth], [5])) == [0] * 6


def test_updates_leave_their_arguments_alone():
    predictions, truth = load("small")
    before = pickle.dumps((predictions, truth))
    evaluate_instances(predictions, truth, IDS)
    evaluate_semantics([gt // 1000 for gt in truth], [gt // 1000 for gt in truth], IDS)
    assert pickle.dumps((predictions, truth)) == before


def test_semantic_iou_equals_a_count_over_sets():
    generator = torch.Generator().manual_seed(0)
    class_ids = [4, 0, 7, 9, 2]
    truth = [torch.randint(-1, 9, (n,), generator=generator) for n in (500, 1, 300)]  # 9 is never the truth
    truth = [torch.where(t == 7, 8, t) for t in truth]  # nor is 7
    guess = [torch.where(torch.rand(len(t), generator=generator) < .5, t, torch.randint(-1, 9, t.shape,
             generator=generator)) for t in truth]
    result = evaluate_semantics(guess, [t.numpy() for t in truth], class_ids)
    t, p = torch.cat(truth).tolist(), torch.cat(guess).tolist()
    valid = [i for i in range(len(t)) if t[i] in class_ids]
    ious = []
    for c in class_ids:
        a, b = {i for i in valid if t[i] == c}, {i for i in valid if p[i] == c}
        ious.append(len(a & b) / len(a | b) if a | b else math.nan)
    assert list(result["per_class"]) == class_ids
    assert list(result["per_class"].values()) == pytest.approx(ious, abs=1e-12, nan_ok=True)
    assert ious[2] == 0 and math.isnan(ious[3])  # predicted only: 0; neither: skipped
    assert result["miou"] == pytest.approx(np.nanmean(ious), abs=1e-12)


def test_semantics_of_no_valid_point_is_nan():
    assert math.isnan(evaluate_semantics([np.array([1, 2])], [np.array([-1, -1])], [0, 1, 2])["miou"])
    assert math.isnan(evaluate_semantics([], [], [0, 1])["miou"])


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
