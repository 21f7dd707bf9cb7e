# SPDX-License-Identifier: MIT
"""losses.py: the consistency loss keeps its bounds on hostile input, equals the plain formula, and needs every guard.

`check_promises` holds what the docstring of ClipConsCriterion promises, and a float64 reference in numpy. It runs on
the shipped file and, in `test_every_safeguard_is_needed`, on copies with one safeguard taken out.
"""
import itertools
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
from losses import ClipConsCriterion, SemanticCriterion, clip_consistency, clip_loss_weight, semantic_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
C = 16
SETTINGS = [dict(loss_weight=w, temperature=t, gradient_flow_ratio=g, clamp=m, norm_floor=r) for w, t, g, m, r in [
    (0.05, 0.07, 0.0, 10.0, 0.1), (0.05, 0.1, 0.5, 10.0, 0.1), (1.0, 0.5, 1.0, 10.0, 0.1),
    (0.01, 1e-4, 0.25, 10.0, 0.5), (1.0, 0.0, 1.0, 10.0, 0.01), (0.05, 0.07, 0.3, 2.0, 0.1),
    (2.0, 3.0, 1.0, 10.0, 2.0)]]


def hostile_rows(n, dtype, generator):
    """(n, C) rows, each of a kind drawn at random: ordinary, tiny, huge, constant, zero, not finite."""
    normal = torch.randn(n, C, generator=generator)
    spread = torch.empty(n, C).uniform_(-1, 1, generator=generator)
    info = torch.finfo(dtype)
    one_bad = [normal.clone() for _ in range(3)]
    for rows, bad in zip(one_bad, (math.nan, math.inf, -math.inf)):
        rows[:, 0] = bad
    kinds = torch.stack([
        normal, normal, normal * 0.02, spread * 50, spread * 6e4, spread * info.max, spread.sign() * info.max,
        normal * 1e-3, normal * 1e-7, normal * 1e-20, spread * info.tiny, spread * info.smallest_normal / 16,
        torch.zeros(n, C), torch.ones(n, C), torch.full((n, C), -info.max), torch.eye(C)[torch.arange(n) % C] * 1e4,
        torch.full((n, C), math.nan), torch.full((n, C), math.inf), *one_bad]).to(dtype)
    return kinds[torch.randint(len(kinds), (n,), generator=generator), torch.arange(n)]


def hostile_pair(n, dtype, generator):
    """Two (n, C) tensors of hostile rows; in some rows they are equal, opposite, or nearly so."""
    feat, clip = hostile_rows(n, dtype, generator), hostile_rows(n, dtype, generator)
    relation = torch.randint(8, (n, 1), generator=generator)
    for value, other in enumerate((feat, -feat, feat * (1 + 1e-3))):
        clip = torch.where(relation == value, other, clip)
    return feat, clip


def reference(feat, clip, used, loss_weight, temperature, clamp, norm_floor, **_):
    """The documented formula in float64 numpy, row by row, over the rows that count."""
    rows = []
    for f, c in zip(feat[used].double().numpy(), clip[used].double().numpy()):
        cos = f @ c / max(np.linalg.norm(f), norm_floor) / max(np.linalg.norm(c), norm_floor)
        rows.append(np.logaddexp(0, -np.clip(cos / max(temperature, 0.1), -clamp, clamp)))
    return loss_weight * np.mean(rows) if rows else 0.0


def check_promises(module, dtype, calls, rows, seed=0):
    """What ClipConsCriterion promises, on `calls` batches of `rows` hostile rows; returns how many rows took part."""
    generator, taken = torch.Generator().manual_seed(seed), 0
    for call, setting in zip(range(calls), itertools.cycle(SETTINGS)):
        n = rows if call % 8 else call // 8 % 3  # also batches of none, one, and two rows
        feat, clip = (x.requires_grad_() for x in hostile_pair(n, dtype, generator))
        valid = torch.rand(n, generator=generator) < 0.9
        criterion = module.ClipConsCriterion(**setting)
        loss = criterion(feat, clip, valid=valid)
        loss.backward()

        usable = valid & torch.tensor([bool(np.isfinite(f).all() and np.isfinite(c).all()) for f, c in
                                       zip(feat.detach().float().numpy(), clip.detach().float().numpy())], dtype=bool)
        used = int(usable.sum())
        taken += used

        t = max(setting["temperature"], 0.1)
        m = min(setting["clamp"], 1 / t)
        low, high = (setting["loss_weight"] * math.log1p(math.exp(x)) for x in (-m, m)) if used else (0, 0)
        assert low * (1 - 1e-5) <= loss.item() <= high * (1 + 1e-5)
        bound = setting["loss_weight"] / (max(used, 1) * t * setting["norm_floor"])
        assert (feat.grad.double().norm(dim=1) <= 1.01 * bound).all()  # false for NaN
        assert not feat.grad[~usable].any()
        ratio = setting["gradient_flow_ratio"]
        if ratio == 0:
            assert clip.grad is None
        else:
            assert (clip.grad.double().norm(dim=1) <= 1.01 * ratio * bound).all()
            assert not clip.grad[~usable].any()

        assert criterion.counts.tolist() == [used, int(valid.sum()) - used]
        expected = reference(feat.detach(), clip.detach(), usable, **setting)
        assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-9)
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_stay_within_their_bounds_on_hostile_rows(dtype):
    assert check_promises(losses, dtype, calls=800, rows=36) >= 10_000


SAFEGUARDS = {
    "norm floor": ("torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor / scale)",
                   "torch.linalg.vector_norm(x, dim=-1, keepdim=True), 1e-12 / scale)"),
    "division by the largest entry": (".amax(-1, keepdim=True).clamp(min=1)", ".amax(-1, keepdim=True).clamp(1, 1)"),
    "fp32 inside": ("(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (feat_fusion, clip_feat))",
                    "(feat_fusion, clip_feat)"),
    "temperature floor": ("max(temperature, TEMPERATURE_FLOOR)", "max(temperature, 1e-6)"),
    "non-finite features are dropped": ("used = wanted & feat_finite & clip_finite", "used = wanted & clip_finite"),
    "non-finite targets are dropped": ("used = wanted & feat_finite & clip_finite", "used = wanted & feat_finite"),
    "invalid rows are dropped": ("torch.ones_like(feat_finite) if valid is None else valid",
                                 "torch.ones_like(feat_finite)"),
    "features are selected, not multiplied": ("feat.where(feat_finite[:, None], 0)", "feat * feat_finite[:, None]"),
    "targets are selected, not multiplied": ("clip.where(clip_finite[:, None], 0)", "clip * clip_finite[:, None]"),
    "rows are counted before the division": ("rows.clamp(min=1)", "rows"),
    "clamp": (".clamp(-clamp, clamp)", ""),
    "the target is detached": ("if gradient_flow_ratio == 0:", "if gradient_flow_ratio < 0:"),
    "gradient flow ratio": ("clip.detach() + gradient_flow_ratio * (clip - clip.detach())", "clip"),
}


def without(old, new):
    """A copy of the module with one piece of its source replaced."""
    source = Path(losses.__file__).read_text()
    assert source.count(old) == 1, f"losses.py holds {old!r} {source.count(old)} times: name the safeguard anew"
    module = types.ModuleType("losses_without")
    exec(compile(source.replace(old, new), "losses_without.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", SAFEGUARDS)
def test_every_safeguard_is_needed(name):
    module = without(*SAFEGUARDS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        for dtype in DTYPES:
            check_promises(module, dtype, calls=60, rows=32)


def test_half_precision_rows_do_not_overflow_in_their_sum():
    feat = torch.randn(40_000, 4).half()
    loss, counts = clip_consistency(feat, -feat)
    assert loss.item() == pytest.approx(math.log1p(math.exp(10)), rel=1e-3) and counts.tolist() == [40_000, 0]


def test_equals_the_plain_formula_where_that_is_healthy():
    torch.manual_seed(0)
    feat, clip = torch.randn(500, 32, requires_grad=True), torch.randn(500, 32)
    loss = ClipConsCriterion(loss_weight=1.0, temperature=0.3)(feat, clip)
    plain = -torch.sigmoid(F.cosine_similarity(feat, clip) / 0.3).log().mean()
    assert abs(loss.item() - plain.item()) < 1e-6
    ours, theirs = (torch.autograd.grad(x, feat)[0] for x in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e3])
@pytest.mark.parametrize("target", ["points", "scenes"])
def test_gradcheck_in_double_above_and_below_the_floor(size, target):
    torch.manual_seed(0)
    batch = torch.tensor([0, 0, 1, 1, 1])
    feat = (size * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
    clip = (size * torch.randn(5 if target == "points" else 2, 4, dtype=torch.float64)).requires_grad_()
    valid = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda f, c: clip_consistency(f, c, None if target == "points" else batch, valid, 0.3, 1.0)[0], (feat, clip),
        eps=1e-6 * size)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_gradient_flow_ratio_scales_the_target_gradient_and_nothing_else(ratio):
    torch.manual_seed(0)
    feat, clip = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    full = torch.autograd.grad(clip_consistency(feat, clip, gradient_flow_ratio=1.0)[0], (feat, clip))
    loss = clip_consistency(feat, clip, gradient_flow_ratio=ratio)[0]
    part = torch.autograd.grad(loss, (feat, clip), allow_unused=True)
    torch.testing.assert_close(part[0], full[0])
    if ratio == 0:
        assert part[1] is None
    else:
        torch.testing.assert_close(part[1], ratio * full[1])


def test_row_order_does_not_matter():
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(300, 16, requires_grad=True), torch.randn(4, 16), torch.rand(300) < 0.7
    batch, order = torch.arange(300) % 4, torch.randperm(300)
    loss = clip_consistency(feat, clip, batch, valid)[0]
    other = clip_consistency(feat[order], clip, batch[order], valid[order])[0]
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, feat)[0] for x in (loss, other)), rtol=1e-5, atol=1e-9)


def test_a_batch_is_the_row_weighted_mean_of_its_scenes():
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(60, 16), torch.randn(4, 16), torch.rand(60) < 0.7
    batch = torch.tensor([0] * 30 + [2] * 29 + [3])  # scene 1 has no point
    whole, (rows, _) = clip_consistency(feat, clip, batch, valid)
    scenes = [clip_consistency(feat[batch == s], clip[s].expand(int((batch == s).sum()), -1), None, valid[batch == s])
              for s in range(4)]
    assert sum(n for _, (n, _) in scenes) == rows
    torch.testing.assert_close(whole, sum(loss * n for loss, (n, _) in scenes) / rows)


def test_a_scene_target_equals_the_same_target_given_to_every_point():
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(10, 8), torch.randn(3, 8), torch.arange(10) % 3
    assert torch.equal(clip_consistency(feat, clip, batch)[0], clip_consistency(feat, clip[batch])[0])


def test_shared_scene_target_gets_the_sum_of_its_points_gradients():
    torch.manual_seed(0)
    feat, batch = torch.randn(10, 8), torch.arange(10) % 3
    scene = torch.randn(3, 8, requires_grad=True)
    point = scene.detach()[batch].requires_grad_()
    clip_consistency(feat, scene, batch, gradient_flow_ratio=1.0)[0].backward()
    clip_consistency(feat, point, gradient_flow_ratio=1.0)[0].backward()
    torch.testing.assert_close(scene.grad, torch.zeros(3, 8).index_add_(0, batch, point.grad))


def test_one_bad_row_leaves_the_others_as_if_it_were_not_there():
    torch.manual_seed(0)
    feat, clip = torch.randn(50, 16), torch.randn(50, 16)
    feat[7, 3], clip[11, 0] = math.nan, -math.inf
    feat.requires_grad_()
    keep = torch.ones(50, dtype=torch.bool)
    keep[[7, 11]] = False
    loss, counts = clip_consistency(feat, clip)
    alone = clip_consistency(feat[keep], clip[keep])[0]
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    assert counts.tolist() == [48, 2]
    gradient, = torch.autograd.grad(loss, feat)
    assert gradient.isfinite().all() and not gradient[~keep].any()
    torch.testing.assert_close(gradient[keep], torch.autograd.grad(alone, feat)[0][keep], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("feat, clip, batch, valid", [
    (torch.zeros(0, 8), torch.zeros(0, 8), None, None),
    (torch.zeros(0, 8), torch.ones(2, 8), torch.zeros(0, dtype=torch.long), None),
    (torch.ones(5, 8), torch.ones(5, 8), None, torch.zeros(5, dtype=torch.bool)),
    (torch.full((5, 8), math.nan), torch.ones(1, 8), torch.zeros(5, dtype=torch.long), None),
    (torch.ones(1, 8), torch.full((1, 8), math.inf), None, None)])
def test_no_usable_row_gives_a_zero_that_still_has_a_graph(feat, clip, batch, valid):
    feat = feat.clone().requires_grad_()
    criterion = ClipConsCriterion()
    loss = criterion(feat, clip, batch, valid)
    loss.backward()
    assert loss.item() == 0 and criterion.counts[0] == 0 and feat.grad is not None and not feat.grad.any()


def test_the_loss_still_pulls_where_half_precision_would_be_silently_dead():
    feat = torch.empty(64, C).uniform_(-6e4, 6e4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    clip = torch.randn(64, C, generator=torch.Generator().manual_seed(1)).half()
    upstream = 2.0 ** 20  # a loss scale: true gradients of rows this long lie below what fp16 can hold
    (upstream * clip_consistency(feat, clip)[0]).backward()
    assert feat.grad.isfinite().all() and (feat.grad != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_neither_loss(dtype):
    torch.manual_seed(0)
    feat, clip, logits, labels = torch.randn(40, 16), torch.randn(40, 16), torch.randn(40, 5), torch.arange(40) % 5
    expected = ClipConsCriterion()(feat, clip), SemanticCriterion()(logits, labels)
    with torch.autocast("cpu", dtype):
        got = ClipConsCriterion()(feat, clip), SemanticCriterion()(logits, labels)
    assert got == expected and all(x.dtype == torch.float32 for x in got)


def test_arguments_are_left_alone():
    feat, clip = hostile_pair(30, torch.float32, torch.Generator().manual_seed(0))
    before = feat.clone(), clip.clone()
    ClipConsCriterion(gradient_flow_ratio=0.5)(feat, clip)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((feat, clip), before))


def test_the_criterion_is_its_weight_times_the_function():
    torch.manual_seed(0)
    feat, clip = torch.randn(9, 8), torch.randn(9, 8)
    criterion = ClipConsCriterion(loss_weight=0.3, temperature=0.4, clamp=1.5, norm_floor=3.0)
    assert torch.equal(criterion(feat, clip),
                       0.3 * clip_consistency(feat, clip, temperature=0.4, clamp=1.5, norm_floor=3.0)[0])


def test_the_attributes_hold_what_is_used():
    criterion = ClipConsCriterion(temperature=0.07)
    assert (criterion.loss_weight, criterion.temperature, criterion.gradient_flow_ratio, criterion.clamp) == (
        0.05, 0.1, 0.0, 10.0) and criterion.norm_floor > 0
    assert ClipConsCriterion(temperature=0.2).temperature == 0.2


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(temperature=math.nan), dict(norm_floor=0), dict(clamp=0),
                                 dict(gradient_flow_ratio=1.5), dict(gradient_flow_ratio=-0.1), dict(loss_weight=-1)])
def test_a_setting_without_a_bound_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ClipConsCriterion(**bad)


@pytest.mark.parametrize("shapes, message", [
    (((4, 8), (4, 7), None, None), r"\(4, 8\).*\(4, 7\)"), (((4, 8), (2, 8), None, None), r"\(2, 8\).*batch"),
    (((4, 8), (2, 8), 3, None), r"batch \(3,\)"), (((4, 8), (4, 8), None, 5), r"valid \(5,\)"),
    (((4,), (4, 8), None, None), r"\(4,\)")])
def test_misshapen_input_is_named(shapes, message):
    feat, clip, batch, valid = shapes
    with pytest.raises(ValueError, match=message):
        clip_consistency(torch.zeros(feat), torch.zeros(clip), None if batch is None else torch.zeros(batch).long(),
                         None if valid is None else torch.ones(valid).bool())


# ---------------------------------------------------------------------------------------------- schedule


def test_the_warm_up_is_exact_at_every_epoch():
    expected = [0.0] * 11 + [0.001] * 10 + [0.01] * 20
    assert [clip_loss_weight(epoch) for epoch in range(41)] == expected


@pytest.mark.parametrize("boundaries, weights", [((), (0.3,)), ((0,), (1, 2)), ((2, 5, 6), (1, 2, 3, 4)),
                                                 ((4, 4), (1, 2, 3))])
def test_the_warm_up_changes_after_each_boundary(boundaries, weights):
    for epoch in range(10):
        stage = len([b for b in boundaries if b < epoch])
        assert clip_loss_weight(epoch, boundaries, weights) == weights[stage]


@pytest.mark.parametrize("boundaries, weights", [((10, 20), (0, 1)), ((20, 10), (0, 1, 2)), ((1,), (0, 1, 2))])
def test_a_schedule_that_does_not_fit_is_refused(boundaries, weights):
    with pytest.raises(ValueError, match="boundaries"):
        clip_loss_weight(0, boundaries, weights)


# ---------------------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-1, 255, 2])
def test_semantic_loss_equals_torch_cross_entropy(weighted, ignore_index):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 5, requires_grad=True), torch.randint(0, 5, (50,))
    labels[::7] = ignore_index
    weights = torch.rand(5) if weighted else None
    ours = semantic_loss(logits, labels, ignore_index, weights)
    theirs = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_all_ignored_gives_a_zero_with_a_graph(weights, n):
    logits = torch.randn(n, 3, requires_grad=True)
    loss = SemanticCriterion(class_weights=weights)(logits, torch.full((n,), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_a_class_of_weight_zero_counts_for_nothing():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, -1])
    weights = torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(semantic_loss(logits, labels, class_weights=weights), semantic_loss(logits[2:4], labels[2:4]))
    loss = semantic_loss(logits, labels * 0, class_weights=weights)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_ignored_row_has_no_influence_whatever_it_holds(bad):
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, -1, 0, -1])
    expected = semantic_loss(logits, labels)
    logits[labels < 0] = bad
    logits.requires_grad_()
    loss = semantic_loss(logits, labels)
    loss.backward()
    assert torch.equal(loss, expected) and logits.grad.isfinite().all() and not logits.grad[labels < 0].any()


def test_semantic_gradcheck_in_double():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: semantic_loss(x, labels, class_weights=torch.tensor([1., 2, 3])), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semantic_loss_of_half_precision_logits_is_that_of_the_same_numbers_in_fp32(dtype):
    logits, labels = (1e4 * torch.randn(30, 4)).to(dtype), torch.arange(30) % 4
    loss = semantic_loss(logits, labels)
    assert loss.dtype == torch.float32 and loss.isfinite() and torch.equal(loss, semantic_loss(logits.float(), labels))


def test_semantic_criterion_is_its_weight_times_the_function_and_saves_no_state():
    logits, labels = torch.randn(30, 4), torch.arange(30) % 4
    criterion = SemanticCriterion(0.4, class_weights=[1, 2, 3, 4])
    assert torch.equal(criterion(logits, labels), 0.4 * semantic_loss(logits, labels, -1, torch.tensor([1., 2, 3, 4])))
    assert not criterion.state_dict()


@pytest.mark.parametrize("logits, labels, weights, message", [
    ((4, 3), (5,), None, r"\(4, 3\).*\(5,\)"), ((4,), (4,), None, r"\(4,\)"), ((4, 3), (4, 1), None, r"\(4, 1\)"),
    ((4, 3), (4,), 2, r"class_weights \(2,\).*\(3,\)")])
def test_misshapen_semantic_input_is_named(logits, labels, weights, message):
    with pytest.raises(ValueError, match=message):
        semantic_loss(torch.zeros(logits), torch.zeros(labels).long(),
                      class_weights=None if weights is None else torch.ones(weights))


@pytest.mark.parametrize("kind, single, half", [  # largest gradient of a row, "dead" or "nan": the README's table
    ("random", 9e-4, 9e-4), ("huge", 2e-8, "dead"), ("zero rows", 7e9, "nan"), ("zero targets", 9e-4, "nan"),
    ("tiny", 1.3e5, "nan"), ("inf", "nan", "nan")])
def test_naive_loss_breaks_as_the_readme_says_and_ours_does_not(kind, single, half):
    torch.manual_seed(0)
    fused, target = torch.randn(1024, 256), torch.randn(1024, 256)
    if kind == "huge":
        fused = (torch.rand_like(fused) * 2 - 1) * 6e4
    elif kind == "zero rows":
        fused[::2] = 0
    elif kind == "zero targets":
        target[::2] = 0
    elif kind == "tiny":
        fused = F.normalize(fused) * 1e-7
    elif kind == "inf":
        fused[0, 0] = torch.inf
    for dtype, expected in ((torch.float32, single), (torch.float16, half)):
        f, c = fused.to(dtype).requires_grad_(), target.to(dtype)
        naive = -torch.log(torch.sigmoid((F.normalize(f) * F.normalize(c)).sum(1) / 0.07)).mean()
        largest = torch.autograd.grad(naive, f)[0].float().norm(dim=1).max()
        if expected == "nan":
            assert largest.isnan()
        elif expected == "dead":
            assert largest == 0
        else:
            assert largest.item() == pytest.approx(expected, rel=0.25)
        criterion = ClipConsCriterion(loss_weight=1.0)
        loss = criterion(f, c)
        grad, = torch.autograd.grad(loss, f)
        bound = 1 / (int(criterion.counts[0]) * criterion.temperature * criterion.norm_floor)
        assert loss.isfinite() and grad.float().norm(dim=1).max() <= 1.01 * bound
