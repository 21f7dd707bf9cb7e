# SPDX-License-Identifier: MIT
"""losses.py: the consistency loss keeps its bounds on hostile input, equals the plain formula, and needs every guard.

`check_promises` checks what the docstring of ClipConsCriterion promises, against a float64 reference in numpy, and
`check_two_processes` that a batch may be split. They run on the shipped file and, in `test_every_safeguard_is_needed`,
on copies with one safeguard taken out.
"""
import contextlib
import itertools
import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
from helpers import in_two_processes, two_processes
from losses import (CLIP_LOSSES, ClipConsCriterion, SemanticCriterion, clip_consistency, clip_infonce, clip_loss_weight,
                    draw_negatives, semantic_loss)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
C = 16
MAX_NEGATIVES = (512, 20, 2, 60)
SETTINGS = [dict(loss_weight=w, temperature=t, gradient_flow_ratio=g, clamp=m, norm_floor=r) for w, t, g, m, r in [
    (0.05, 0.07, 0.0, 10.0, 0.1), (0.05, 0.1, 0.5, None, 0.1), (1.0, 0.5, 1.0, 10.0, 0.1),
    (0.01, 1e-4, 0.25, None, 0.5), (1.0, 0.0, 1.0, None, 0.01), (0.05, 0.07, 0.3, 0.5, 0.1),
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


def hostile_batch(call, rows, dtype, generator):
    """feat (n, C), clip (n, C) or (B, C), batch (n,) or None, valid (n,); every fourth is odd as a whole."""
    odd = call // 4 % 9 if call % 4 == 0 else None
    n = odd if odd in (0, 1, 2) else rows
    feat, clip = hostile_pair(n, dtype, generator)
    batch, valid = None, torch.rand(n, generator=generator) < 0.9
    if odd == 3:
        valid = torch.zeros(n, dtype=torch.bool)
    elif odd in (4, 7, 8):  # every row the same, and so its target; then one valid row of these
        feat = torch.randn(1, C, generator=generator).to(dtype).expand(n, C).clone()
        clip = feat.clone()
        valid = valid if odd == 4 else torch.arange(n) == n - 1
    elif odd in (5, 6) or odd is None and torch.rand((), generator=generator) < 0.5:
        scenes = 1 if odd == 5 else 5 if odd == 6 else int(torch.randint(3, 9, (), generator=generator))
        batch = torch.randint(scenes, (n,), generator=generator)
        clip = hostile_rows(scenes, dtype, generator) if odd != 6 else torch.full((scenes, C), math.nan, dtype=dtype)
    return feat, clip, batch, valid


def consistency(feat, clip, *args, variant="sigmoid", **options):
    """The function of a variant: loss, counts."""
    if variant == "infonce":
        return clip_infonce(feat, clip, *args, **options)
    return clip_consistency(feat, clip, *args, variant=variant, **options)


def floored_unit(x, clamp, floor):
    x = x.double().numpy()
    x = x if clamp is None else np.clip(x, -clamp, clamp)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), floor)


def reference(variant, feat, clip, own, negatives, is_negative, t, clamp, norm_floor):
    """The documented losses of rows in float64 numpy, all of finite rows."""
    feat, clip = floored_unit(feat, clamp, norm_floor), floored_unit(clip, clamp, norm_floor)
    positive = (feat * clip[own]).sum(1)
    if variant == "cosine":
        return 1 - positive
    if variant == "sigmoid":
        return np.logaddexp(0, -positive / t)
    negative = np.where(is_negative, feat @ clip[negatives].T / t, -np.inf)
    others = np.logaddexp.reduce(negative, 1, initial=-np.inf)
    return np.logaddexp(0, others - positive / t) / 2


def check_promises(module, dtype, variant, calls, rows, seed=0):
    """What ClipConsCriterion promises, on `calls` batches of `rows` hostile rows; returns how many rows took part."""
    generator, taken = torch.Generator().manual_seed(seed), 0
    for call, setting in zip(range(calls), itertools.cycle(SETTINGS)):
        feat, clip, batch, valid = hostile_batch(call, rows, dtype, generator)
        taken += check_call(module, feat, clip, batch, valid, variant, setting, MAX_NEGATIVES[call % 4], call)
    return taken


def check_call(module, feat, clip, batch, valid, variant, setting, max_negatives, seed):
    feat.requires_grad_(), clip.requires_grad_()
    criterion = module.ClipConsCriterion(**setting, variant=variant)
    torch.default_generator.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_NEGATIVES", max_negatives)
        loss = criterion(feat, clip, batch, valid)
    loss.backward()

    n, T, weight = len(feat), len(clip), setting["loss_weight"]
    own = torch.arange(n) if batch is None else batch
    feat_finite, clip_finite = (torch.from_numpy(np.isfinite(x.detach().float().numpy()).all(1)) for x in (feat, clip))
    usable = valid & feat_finite & clip_finite[own]
    used = int(usable.sum())
    candidates, negatives = usable if batch is None else clip_finite, torch.arange(T)
    clamp = setting["clamp"]
    beyond = [x.detach().abs() > (math.inf if clamp is None else clamp) for x in (feat, clip)]
    touched = beyond[0][usable].sum() + beyond[1][candidates].sum()
    assert criterion.counts.tolist() == [used, int(valid.sum()) - used, touched]

    if T > max_negatives:
        torch.default_generator.manual_seed(seed)
        negatives = module.draw_negatives(candidates, max_negatives)
        assert len(negatives.unique()) == max_negatives
        assert candidates[negatives].sum() == min(max_negatives, int(candidates.sum()))
    is_negative = candidates[negatives] & (negatives != own[usable, None])
    most = int(is_negative.sum(1).max()) if used and T else 0

    t = 1 if variant == "cosine" else max(setting["temperature"], 0.1)
    m = 1 / t
    low, high = {"sigmoid": (math.log1p(math.exp(-m)), math.log1p(math.exp(m))), "cosine": (0, 2),
                 "infonce": (0, math.log1p(most * math.exp(2 * m)) / 2)}[variant] if used else (0, 0)
    assert weight * low * (1 - 1e-5) <= loss.item() <= weight * high * (1 + 1e-5)

    bound = weight / (max(used, 1) * t * setting["norm_floor"])
    assert (feat.grad.double().norm(dim=1) <= 1.01 * bound).all()  # false for NaN
    assert not feat.grad[~usable].any() and not feat.grad[beyond[0]].any()
    ratio = setting["gradient_flow_ratio"]
    if ratio == 0:
        assert clip.grad is None
    else:  # 0 for a target that is neither positive nor negative
        share = torch.zeros(T, dtype=torch.float64)
        share.index_add_(0, own[usable], torch.ones(used).double() / (2 if variant == "infonce" else 1))
        if variant == "infonce":
            share.index_add_(0, negatives, is_negative.double().sum(0) / 2)
        assert (clip.grad.double().norm(dim=1) <= 1.01 * ratio * bound * share).all()
        assert not clip.grad[beyond[1]].any()

    table = torch.where(clip_finite[:, None], clip.detach(), 0)
    row = reference(variant, feat.detach()[usable], table, own[usable].numpy(), negatives.numpy(),
                    is_negative.numpy(), t, clamp, setting["norm_floor"])
    expected = weight * row.mean() if used else 0
    near_one = 1e-9 if variant == "sigmoid" else 3e-7 * weight  # differences of numbers around 1
    assert loss.item() == pytest.approx(expected, rel=2e-5, abs=near_one)
    return used


def check_two_processes(module):
    """Checks that the mean loss and gradient of two halves are those of the whole -> the number of variants checked."""
    generator = torch.Generator().manual_seed(0)
    feat, table = (torch.randn(n, C, generator=generator, requires_grad=True) for n in (30, 4))
    batch, valid = torch.arange(30) % 4, torch.arange(30) % 3 > 0
    checked = 0
    for variant, per_point in itertools.product(CLIP_LOSSES, (False, True)):
        if per_point and variant == "infonce":
            continue  # negatives are those of the process

        def run(rows, world_mean):
            criterion = module.ClipConsCriterion(gradient_flow_ratio=0.5, variant=variant, world_mean=world_mean)
            target = (table[batch[rows]], None) if per_point else (table, batch[rows])
            loss = criterion(feat[rows], *target, valid[rows])
            return [loss.detach(), *torch.autograd.grad(loss, (feat, table))]

        whole = run(torch.arange(30), None)
        for cut in (0, 1, 17):  # the first row is not valid, so also a half with rows but none used
            parts = two_processes(run, (torch.arange(30)[:cut], torch.arange(30)[cut:]))
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-8)
        one = two_processes(run, (torch.arange(1), torch.arange(1, 2)))  # none and one
        torch.testing.assert_close(one, run(torch.arange(1, 2), None), rtol=1e-5, atol=1e-8)
        checked += 1
    return checked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_loss_and_gradient_stay_within_their_bounds_on_hostile_rows(variant, dtype):
    assert check_promises(losses, dtype, variant, calls=84, rows=300) >= 10_000


def test_a_batch_may_be_split_over_processes():
    assert check_two_processes(losses) == 2 * len(CLIP_LOSSES) - 1  # targets of scenes and of points


SAFEGUARDS = {
    "norm floor": ("clamp(min=norm_floor)", "clamp(min=1e-12)"),
    "division by the largest entry": ("largest_entry(rows).clamp(min=1)", "largest_entry(rows).clamp(1, 1)"),
    "fp32 inside": ("for x in tensors) else torch.float32", "for x in tensors) else tensors[0].dtype"),
    "temperature floor": ("max(temperature, TEMPERATURE_FLOOR)", "max(temperature, 1e-6)"),
    "non-finite features are dropped": ("wanted & feat_finite & (clip_finite", "wanted & (clip_finite"),
    "non-finite targets are dropped": (" & (clip_finite if batch is None else clip_finite[batch])", ""),
    "invalid rows are dropped": ("torch.ones_like(feat_finite) if valid is None else valid",
                                 "torch.ones_like(feat_finite)"),
    "rows are selected, not multiplied": (".where(usable[:, None], 0)", " * usable[:, None]"),
    "no division by zero rows": ("torch.where(normalizer > 0, normalizer, 1)", "normalizer"),
    "only usable rows are negatives": ("targets[negatives] & (", "("),
}
SAFEGUARDS_OF_PROCESSES = {
    "a normalizer below one stays": ("torch.where(normalizer > 0, normalizer, 1)", "normalizer.clamp(min=1)"),
    "the normalizer is that of all processes": ("normalizer = world_mean(normalizer)", "world_mean(normalizer)"),
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
        for dtype, variant in itertools.product(DTYPES, CLIP_LOSSES):
            check_promises(module, dtype, variant, calls=36, rows=60)


@pytest.mark.parametrize("name", SAFEGUARDS_OF_PROCESSES)
def test_every_safeguard_of_several_processes_is_needed(name):
    module = without(*SAFEGUARDS_OF_PROCESSES[name])
    with pytest.raises(AssertionError):
        check_two_processes(module)


@pytest.mark.parametrize("variant", CLIP_LOSSES)
@pytest.mark.parametrize("one, other, common", [(torch.float16, torch.bfloat16, torch.float32),
                                                (torch.float32, torch.float64, torch.float64)], ids=str)
def test_features_and_targets_may_differ_in_precision(one, other, common, variant):
    torch.manual_seed(0)
    a, b = torch.randn(9, 8).to(one), torch.randn(9, 8).to(other)
    for feat, clip in ((a, b), (b, a)):
        loss = consistency(feat, clip, variant=variant)[0]
        assert loss.dtype == common
        assert torch.equal(loss, consistency(feat.to(common), clip.to(common), variant=variant)[0])


def test_half_precision_rows_do_not_overflow_in_their_sum():
    feat = torch.randn(40_000, 4).half()
    loss, counts = clip_consistency(feat, -feat)
    assert loss.item() == pytest.approx(math.log1p(math.exp(10)), rel=1e-3) and counts.tolist() == [40_000, 0, 0]


def plain_formula(variant, feat, clip, own, temperature=0.3):
    """Written with what torch offers, without any guard; every other row of clip is a negative."""
    cos = F.normalize(feat) @ F.normalize(clip).T
    if variant == "sigmoid":
        return -torch.sigmoid(cos[torch.arange(len(feat)), own] / temperature).log().mean()
    if variant == "cosine":
        return F.cosine_embedding_loss(feat, clip[own], torch.ones(len(feat)))
    return F.cross_entropy(cos / temperature, own) / 2


@pytest.mark.parametrize("target", ["points", "scenes"])
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_equals_the_plain_formula_where_that_is_healthy(variant, target):
    torch.manual_seed(0)
    feat = torch.randn(500, 32, requires_grad=True)
    clip = torch.randn(500 if target == "points" else 7, 32, requires_grad=True)
    batch = None if target == "points" else torch.arange(500) % 7
    loss = ClipConsCriterion(1.0, temperature=0.3, gradient_flow_ratio=1.0, variant=variant)(feat, clip, batch)
    plain = plain_formula(variant, feat, clip, torch.arange(500) if batch is None else batch)
    assert abs(loss.item() - plain.item()) < 1e-6
    ours, theirs = (torch.autograd.grad(x, (feat, clip)) for x in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e3])
@pytest.mark.parametrize("target", ["points", "scenes"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_gradcheck_in_double_above_and_below_the_floor(variant, ratio, target, size):
    torch.manual_seed(0)
    batch = None if target == "points" else torch.tensor([0, 0, 1, 1, 1])
    feat = (size * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
    clip = (size * torch.randn(5 if target == "points" else 3, 4, dtype=torch.float64)).requires_grad_(ratio > 0)
    valid = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda f, c: consistency(f, c, batch, valid, 0.3, ratio, variant=variant)[0], (feat, clip),
        eps=1e-6 * size)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_gradient_flow_ratio_scales_the_target_gradient_and_nothing_else(variant, ratio):
    torch.manual_seed(0)
    feat, clip = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    full = torch.autograd.grad(consistency(feat, clip, gradient_flow_ratio=1.0, variant=variant)[0], (feat, clip))
    loss = consistency(feat, clip, gradient_flow_ratio=ratio, variant=variant)[0]
    part = torch.autograd.grad(loss, (feat, clip), allow_unused=True)
    torch.testing.assert_close(part[0], full[0])
    if ratio == 0:
        assert part[1] is None
    else:
        torch.testing.assert_close(part[1], ratio * full[1])


@pytest.mark.parametrize("target", ["points", "scenes"])
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_row_order_does_not_matter(variant, target):
    torch.manual_seed(0)
    feat, valid, order = torch.randn(300, 16, requires_grad=True), torch.rand(300) < 0.7, torch.randperm(300)
    negatives = torch.randperm(300)[:20] if target == "points" else torch.tensor([2, 0, 3])
    clip = torch.randn(300 if target == "points" else 4, 16)
    batch = None if target == "points" else torch.arange(300) % 4

    def loss_of(feat, clip, batch, valid, negatives):
        own = {"negatives": negatives} if variant == "infonce" else {}
        return consistency(feat, clip, batch, valid, variant=variant, **own)[0]

    loss = loss_of(feat, clip, batch, valid, negatives)
    if target == "points":
        clip, negatives = clip[order], order.argsort()[negatives]
    else:
        batch = batch[order]
    other = loss_of(feat[order], clip, batch, valid[order], negatives[torch.randperm(len(negatives))])
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, feat)[0] for x in (loss, other)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_a_batch_is_the_row_weighted_mean_of_its_scenes(variant):
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(60, 16), torch.randn(4, 16), torch.rand(60) < 0.7
    batch = torch.tensor([0] * 30 + [2] * 29 + [3])  # scene 1 has no point
    whole, (rows, *_) = consistency(feat, clip, batch, valid, variant=variant)
    scenes = []
    for own in (batch == s for s in range(4)):
        # with negatives a scene needs the targets of the others, without it is alone
        target = (clip, batch[own]) if variant == "infonce" else (clip[batch[own]], None)
        scenes.append(consistency(feat[own], *target, valid[own], variant=variant))
    assert sum(n for _, (n, *_) in scenes) == rows
    torch.testing.assert_close(whole, sum(loss * n for loss, (n, *_) in scenes) / rows)


def test_points_are_the_mean_of_their_parts_given_the_same_targets_and_negatives():
    torch.manual_seed(0)
    feat, clip, negatives = torch.randn(60, 16), torch.randn(60, 16), torch.tensor([59, 3, 31])
    whole = clip_infonce(feat, clip, negatives=negatives)[0]
    parts = [clip_infonce(feat[rows], clip, rows, negatives=negatives)[0]
             for rows in torch.arange(60).split(20)]
    torch.testing.assert_close(whole, sum(parts) / 3)


def test_a_scene_target_equals_the_same_target_given_to_every_point():
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(10, 8), torch.randn(3, 8), torch.arange(10) % 3
    assert torch.equal(clip_consistency(feat, clip, batch)[0], clip_consistency(feat, clip[batch])[0])


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_with_a_batch_targets_are_those_of_scenes_also_if_there_are_as_many_as_points(variant):
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([5, 4, 3, 0, 0, 1])
    got = consistency(feat, clip, batch, variant=variant)[0]
    torch.testing.assert_close(got, plain_formula(variant, feat, clip, batch, 0.1))
    assert not torch.equal(got, consistency(feat, clip, variant=variant)[0])


def test_shared_scene_target_gets_the_sum_of_its_points_gradients():
    torch.manual_seed(0)
    feat, batch = torch.randn(10, 8), torch.arange(10) % 3
    scene = torch.randn(3, 8, requires_grad=True)
    point = scene.detach()[batch].requires_grad_()
    clip_consistency(feat, scene, batch, gradient_flow_ratio=1.0)[0].backward()
    clip_consistency(feat, point, gradient_flow_ratio=1.0)[0].backward()
    torch.testing.assert_close(scene.grad, torch.zeros(3, 8).index_add_(0, batch, point.grad))


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_one_bad_row_leaves_the_others_as_if_it_were_not_there(variant):
    torch.manual_seed(0)
    feat, clip = torch.randn(50, 16), torch.randn(50, 16)
    feat[7, 3], clip[11, 0] = math.nan, -math.inf
    feat.requires_grad_()
    keep = torch.ones(50, dtype=torch.bool)
    keep[[7, 11]] = False
    loss, counts = consistency(feat, clip, variant=variant)
    alone = consistency(feat[keep], clip[keep], variant=variant)[0]
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    assert counts.tolist() == [48, 2, 0]
    gradient, = torch.autograd.grad(loss, feat)
    assert gradient.isfinite().all() and not gradient[~keep].any()
    torch.testing.assert_close(gradient[keep], torch.autograd.grad(alone, feat)[0][keep], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", CLIP_LOSSES)
@pytest.mark.parametrize("feat, clip, batch, valid", [
    (torch.zeros(0, 8), torch.zeros(0, 8), None, None),
    (torch.zeros(0, 8), torch.ones(2, 8), torch.zeros(0, dtype=torch.long), None),
    (torch.ones(5, 8), torch.ones(5, 8), None, torch.zeros(5, dtype=torch.bool)),
    (torch.full((5, 8), math.nan), torch.ones(1, 8), torch.zeros(5, dtype=torch.long), None),
    (torch.ones(1, 8), torch.full((1, 8), math.inf), None, None)])
def test_no_usable_row_gives_a_zero_that_still_has_a_graph(feat, clip, batch, valid, variant):
    feat = feat.clone().requires_grad_()
    criterion = ClipConsCriterion(variant=variant)
    loss = criterion(feat, clip, batch, valid)
    loss.backward()
    assert loss.item() == 0 and criterion.counts[0] == 0 and feat.grad is not None and not feat.grad.any()


@pytest.mark.parametrize("target", ["one point", "one scene", "other points not valid", "other scenes not finite"])
def test_without_a_negative_infonce_is_a_zero_with_a_graph(target):
    torch.manual_seed(0)
    feat, clip, batch, valid = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8), torch.zeros(6).long(), None
    if target == "one point":
        feat, clip, batch = feat[:1], clip[:1], None
    elif target == "one scene":
        clip = clip[:1]
    elif target == "other points not valid":
        clip, batch, valid = torch.randn(6, 8), None, torch.arange(6) == 2
    else:
        clip[1:] = torch.tensor([[math.nan], [math.inf]])
    loss, _ = clip_infonce(feat, clip, batch, valid)
    assert loss == 0 and loss.requires_grad and not torch.autograd.grad(loss, feat)[0].any()


def test_negatives_are_drawn_at_random_without_repetition_and_usable_ones_first():
    torch.manual_seed(0)
    candidates = torch.arange(40) % 4 > 0
    draws = torch.stack([draw_negatives(candidates, 10) for _ in range(3000)])
    assert candidates[draws].all() and (draws.sort(1).values.diff(dim=1) > 0).all()
    frequency = torch.bincount(draws.flatten(), minlength=40)[candidates] / 3000
    assert (frequency - 10 / 30).abs().max() < 5 * math.sqrt(2 / 9 / 3000)  # five standard deviations
    assert set(draw_negatives(candidates, 34).tolist()) > set(candidates.nonzero()[:, 0].tolist())


def test_negatives_are_drawn_anew_in_each_call_from_the_global_generator_and_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(losses, "MAX_NEGATIVES", 7)
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(9, 8), torch.randn(40, 8, requires_grad=True), torch.zeros(9).long()
    clip.data[5:10] = math.nan
    criterion = ClipConsCriterion(gradient_flow_ratio=1.0, variant="infonce")
    met = [set(torch.autograd.grad(criterion(feat, clip, batch), clip)[0].any(1).nonzero()[:, 0].tolist())
           for _ in range(20)]
    assert all(0 in rows and len(rows) in (7, 8) and not rows & set(range(5, 10)) for rows in met)
    assert len(set(map(frozenset, met))) > 10
    state = torch.get_rng_state()
    assert criterion(feat, clip[:5], batch) == criterion(feat, clip[:5], batch)  # few: all of them, nothing is drawn
    assert torch.equal(state, torch.get_rng_state())
    first = criterion(feat, clip, batch)
    torch.set_rng_state(state)
    assert criterion(feat, clip, batch) == first


def test_without_a_clamp_the_loss_still_pulls_where_half_precision_would_be_silently_dead():
    feat = torch.empty(64, C).uniform_(-6e4, 6e4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    clip = torch.randn(64, C, generator=torch.Generator().manual_seed(1)).half()
    upstream = 2.0 ** 20  # a loss scale: true gradients of rows this long lie below what fp16 can hold
    (upstream * clip_consistency(feat, clip, clamp=None)[0]).backward()
    assert feat.grad.isfinite().all() and (feat.grad != 0).any(1).all()


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_the_clamp_acts_on_both_features_entry_by_entry_before_the_norm(variant):
    torch.manual_seed(0)
    feat, clip, options = torch.randn(40, C), torch.randn(40, C), dict(variant=variant, gradient_flow_ratio=1.0)
    results = []
    for clamp, bound in ((1.5, math.inf), (10.0, 1.5)):
        f, c = feat.clone().requires_grad_(), clip.clone().requires_grad_()
        loss, counts = consistency(f.clamp(-bound, bound), c.clamp(-bound, bound), clamp=clamp, **options)
        results.append((loss, *torch.autograd.grad(loss, (f, c))))
        beyond = sum(int((x.abs() > 1.5).sum()) for x in (feat, clip))
        assert beyond > 0 and counts.tolist() == [40, 0, beyond if clamp == 1.5 else 0]
    assert all(map(torch.equal, *results))
    assert not results[0][1][feat.abs() > 1.5].any() and results[0][1][feat.abs() <= 1.5].all()
    inside, free = (consistency(feat, clip, clamp=clamp, **options)[0] for clamp in (10.0, None))
    torch.testing.assert_close(inside, free)  # nothing lies beyond 10


@pytest.mark.parametrize("variant", CLIP_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_neither_loss(dtype, variant):
    torch.manual_seed(0)
    feat, clip, logits, labels = torch.randn(40, 16), torch.randn(40, 16), torch.randn(40, 5), torch.arange(40) % 5
    expected = ClipConsCriterion(variant=variant)(feat, clip), SemanticCriterion()(logits, labels)
    with torch.autocast("cpu", dtype):
        got = ClipConsCriterion(variant=variant)(feat, clip), SemanticCriterion()(logits, labels)
    assert got == expected and all(x.dtype == torch.float32 for x in got)


@pytest.mark.parametrize("target", ["points", "scenes"])
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_no_step_waits_for_the_device(monkeypatch, variant, target):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    monkeypatch.setattr(losses, "MAX_NEGATIVES", 20)
    with torch.device("meta"):  # tensors without numbers: reading one raises
        feat, clip = torch.empty(90, 8, requires_grad=True), torch.empty(90 if target == "points" else 40, 8)
        batch, valid = torch.empty(90, dtype=torch.long), torch.empty(90, dtype=torch.bool)
        loss = ClipConsCriterion(variant=variant)(feat, clip, batch, valid) + SemanticCriterion()(feat, batch)
        loss.backward()
    assert loss.shape == () and feat.grad.shape == feat.shape


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_arguments_are_left_alone(variant, monkeypatch):
    monkeypatch.setattr(losses, "MAX_NEGATIVES", 9)
    feat, clip = hostile_pair(30, torch.float32, torch.Generator().manual_seed(0))
    before = feat.clone(), clip.clone()
    ClipConsCriterion(gradient_flow_ratio=0.5, variant=variant)(feat, clip)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((feat, clip), before))


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_the_criterion_is_its_weight_times_the_function(variant):
    torch.manual_seed(0)
    feat, clip = torch.randn(9, 8), torch.randn(9, 8)
    settings = dict(temperature=0.4, clamp=1.5, norm_floor=3.0, variant=variant)
    criterion = ClipConsCriterion(loss_weight=0.3, **settings)
    assert torch.equal(criterion(feat, clip), 0.3 * consistency(feat, clip, **settings)[0])


def test_the_attributes_hold_what_is_used():
    criterion = ClipConsCriterion(temperature=0.07)
    assert (criterion.variant, criterion.world_mean) == ("sigmoid", None)
    assert (criterion.loss_weight, criterion.temperature, criterion.gradient_flow_ratio, criterion.clamp) == (
        0.05, 0.1, 0.0, 10.0) and criterion.norm_floor > 0
    assert ClipConsCriterion(temperature=0.2).temperature == 0.2


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_vmap_of_grad_equals_a_loop_and_leaves_nothing_behind(variant):
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(3, 7, 8), torch.randn(3, 7, 8), torch.rand(3, 7) < 0.7
    batch = torch.randint(7, (3, 7))
    criterion = ClipConsCriterion(variant=variant, gradient_flow_ratio=0.5)
    gradient = torch.func.grad(criterion, (0, 1))
    for own in (None, batch):
        mapped = torch.func.vmap(gradient, (0, 0, None if own is None else 0, 0))(feat, clip, own, valid)
        assert criterion.counts is None
        for i in range(3):
            inputs = feat[i].clone().requires_grad_(), clip[i].clone().requires_grad_()
            loss = criterion(*inputs, None if own is None else own[i], valid[i])
            assert type(criterion.counts) is torch.Tensor and criterion.counts.tolist() == [valid[i].sum(), 0, 0]
            torch.testing.assert_close((mapped[0][i], mapped[1][i]), torch.autograd.grad(loss, inputs))


def test_the_semantic_loss_under_vmap_of_grad_equals_a_loop():
    logits, labels = torch.randn(3, 6, 4), torch.randint(-1, 4, (3, 6))
    gradient = torch.func.grad(SemanticCriterion())
    loop = torch.stack([gradient(*pair) for pair in zip(logits, labels)])
    torch.testing.assert_close(torch.func.vmap(gradient)(logits, labels), loop)


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_the_criterion_compiles_without_a_break_and_exports_for_any_number_of_rows(variant):
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8), torch.arange(7) % 3 > 0
    criterion = ClipConsCriterion(variant=variant)
    expected = criterion(feat, clip, None, valid)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")(feat, clip, None, valid)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, feat), torch.autograd.grad(expected, feat))
    n = torch.export.Dim("n", min=2, max=losses.MAX_NEGATIVES)  # beyond, infonce draws
    shapes = {0: n}, {0: n}, None, {0: n}
    exported = torch.export.export(criterion, (feat, clip, None, valid), dynamic_shapes=shapes).module()
    fewer = feat[:4], clip[:4], None, valid[:4]
    torch.testing.assert_close(exported(*fewer), criterion(*fewer))


DDP = """
import torch, torch.distributed as dist
from datetime import timedelta
from torch import nn
from fusion import BiFusionEncoder
from losses import ClipConsCriterion, SemanticCriterion

class Toy(nn.Module):
    image_size = (8, 12)
    def __init__(self):
        super().__init__()
        self.map, self.points = nn.Conv2d(5, 16, 1), nn.Linear(3, 12)
    def project(self, tokens, pooled):
        return self.map(tokens), pooled
    def forward(self, batch):
        return self.points(batch["coords"])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        toy = Toy()
        self.fusion, self.head = BiFusionEncoder(toy, toy, dim_3d=12, embed_dim=16), nn.Linear(16, 3)
    def forward(self, batch):
        out = self.fusion(batch)
        return out, self.head(out["feat_fusion"])

def scene(n, b):
    g = torch.Generator().manual_seed(b)
    points = torch.randn(n, 3, generator=g) + torch.tensor([0.0, 0, 3])
    intrinsics = torch.tensor([[6.0, 0, 5.5], [0, 6, 3.5], [0, 0, 1]])
    return {"points": points, "coords": points, "features": points, "batch": torch.full((n,), b),
            "labels": torch.randint(-1, 3, (n,), generator=g), "world2cam": torch.eye(4)[None, None],
            "intrinsics": intrinsics[None, None], "clip_tokens": torch.randn(1, 1, 5, 4, 6, generator=g),
            "clip_pooled": torch.randn(1, 1, 16, generator=g)}

def loss_of(net, batch, world_mean=None):
    out, logits = net(batch)
    clip = ClipConsCriterion(gradient_flow_ratio=0.5, variant="cosine", world_mean=world_mean)
    loss = clip(out["feat_fusion"], out["clip_global"], batch["batch"], out["valid"])
    return loss + SemanticCriterion(world_mean=world_mean)(logits, batch["labels"])

def world_mean(x):
    x = x.clone()
    dist.all_reduce(x)
    return x / 2

torch.manual_seed(0)
alone = Net()
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2, timeout=timedelta(seconds=100))
net = nn.parallel.DistributedDataParallel(Net())
net.module.load_state_dict(alone.state_dict())
for sizes in ((60, 7), (40, 1), (0, 30)):
    scenes = [scene(n, b) for b, n in enumerate(sizes)]
    own = {**scenes[rank], "batch": torch.zeros(sizes[rank], dtype=torch.long)}
    net.zero_grad()
    alone.zero_grad()
    loss_of(net, own, world_mean).backward()
    loss_of(alone, {key: torch.cat([s[key] for s in scenes]) for key in own}).backward()
    for (name, p), q in zip(alone.named_parameters(), net.module.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text: f"{sizes} {name} {text}")
    assert alone.fusion.encoder_2d.map.weight.grad.any()
"""


def test_ddp_with_uneven_rows_has_the_gradient_of_the_undivided_batch(tmp_path):
    path = str(tmp_path / "meeting")
    for status, _, errors in in_two_processes(lambda: exec(DDP, {"rank": int(os.environ["RANK"]), "path": path})):
        assert status == 0, errors


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


# ---------------------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("ignore_index", [-1, 255, 2])
def test_semantic_loss_equals_torch_cross_entropy(ignore_index):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 5, requires_grad=True), torch.randint(0, 5, (50,))
    labels[::7] = ignore_index
    ours = semantic_loss(logits, labels, ignore_index)
    theirs = F.cross_entropy(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("n", [0, 1, 6])
def test_all_ignored_gives_a_zero_with_a_graph(n):
    logits = torch.randn(n, 3, requires_grad=True)
    loss = SemanticCriterion()(logits, torch.full((n,), -1))
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
    assert torch.autograd.gradcheck(lambda x: semantic_loss(x, labels), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semantic_loss_of_half_precision_logits_is_that_of_the_same_numbers_in_fp32(dtype):
    logits, labels = (1e4 * torch.randn(30, 4)).to(dtype), torch.arange(30) % 4
    loss = semantic_loss(logits, labels)
    assert loss.dtype == torch.float32 and loss.isfinite() and torch.equal(loss, semantic_loss(logits.float(), labels))


def test_the_semantic_criterion_is_the_function_and_saves_no_state():
    logits, labels = torch.randn(30, 4), torch.arange(30) % 4
    criterion = SemanticCriterion(ignore_index=2)
    assert torch.equal(criterion(logits, labels), semantic_loss(logits, labels, 2)) and not criterion.state_dict()


@pytest.mark.parametrize("cut", [0, 1, 2, 13, 30])
def test_semantic_loss_of_a_batch_may_be_split_over_processes(cut):
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 3, requires_grad=True), torch.arange(30) % 3
    labels[torch.arange(30) % 4 == 0] = -1  # also the first, so that one half has a row but no label

    def run(rows, world_mean):
        loss = SemanticCriterion(world_mean=world_mean)(logits[rows], labels[rows])
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    halves = torch.arange(30)[:cut], torch.arange(30)[cut:]
    torch.testing.assert_close(two_processes(run, halves), run(torch.arange(30), None), rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------- bad input


def zeros(*shape):
    return torch.zeros(shape)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.long)


REFUSED = [  # call, what the message must hold
    *((lambda bad=bad: ClipConsCriterion(**bad), next(iter(bad))) for bad in (
        dict(temperature=-1), dict(temperature=math.nan), dict(norm_floor=0), dict(clamp=0), dict(clamp=math.nan),
        dict(loss_weight=-1), dict(gradient_flow_ratio=1.5), dict(gradient_flow_ratio=-0.1))),
    (lambda: ClipConsCriterion(variant="softmax"), "'softmax' must be one of sigmoid, cosine, infonce"),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 8), variant="infonce"), "'infonce' must be sigmoid or cosine"),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 7)), r"\(4, 8\).*\(4, 7\)"),
    (lambda: clip_consistency(zeros(4), zeros(4, 8)), r"\(4,\)"),
    (lambda: clip_consistency(zeros(4, 8), zeros(2, 8)), r"\(2, 8\).*batch"),
    (lambda: clip_infonce(zeros(4, 8), zeros(2, 8), integers(3)), r"batch \(3,\)"),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 8), None, zeros(5) > 0), r"valid \(5,\)"),
    (lambda: clip_infonce(zeros(4, 8), zeros(4, 8), negatives=integers(2, 1)), r"negatives \(2, 1\)"),
    *((lambda bad=bad: clip_infonce(zeros(4, 8), zeros(4, 8), negatives=bad), r"negatives \(2,\) must lie in \[0, 4\)")
      for bad in (torch.tensor([0, 4]), torch.tensor([0, -1]))),
    *((lambda bad=bad: ClipConsCriterion()(zeros(2, 8), zeros(3, 8), bad), r"batch \(2,\) must lie in \[0, 3\)")
      for bad in (torch.tensor([0, 3]), torch.tensor([0, -1]))),
    (lambda: ClipConsCriterion()(zeros(4, 8), zeros(2, 8), zeros(4)), "batch must be int64, got torch.float32"),
    *((lambda bad=bad: ClipConsCriterion()(zeros(4, 8), zeros(4, 8), None, bad), f"valid must be bool, got {bad.dtype}")
      for bad in (zeros(4), integers(4), zeros(4).byte())),
    *((lambda bad=bad: semantic_loss(zeros(2, 3), bad), r"labels \(2,\) must lie in \[0, 3\) or be -1")
      for bad in (torch.tensor([0, 3]), torch.tensor([0, -2]))),
    (lambda: semantic_loss(zeros(2, 3), integers(2).int()), "labels must be int64, got torch.int32"),
    (lambda: clip_loss_weight(0, (10, 20), (0, 1)), "boundaries"),
    (lambda: clip_loss_weight(0, (20, 10), (0, 1, 2)), "boundaries"),
    (lambda: clip_loss_weight(0, (1,), (0, 1, 2)), "boundaries"),
    (lambda: semantic_loss(zeros(4, 3), integers(5)), r"\(4, 3\).*\(5,\)"),
    (lambda: semantic_loss(zeros(4), integers(4)), r"\(4,\)"),
    (lambda: semantic_loss(zeros(4, 3), integers(4, 1)), r"\(4, 1\)")]


@pytest.mark.parametrize("call, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_bad_settings_and_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- the naive loss


# The largest gradient of a row, "dead" or "nan", as in the table of docs/losses.md
@pytest.mark.parametrize("kind, single, half", [
    ("random", 9e-4, 9e-4), ("huge", 2e-8, "dead"), ("zero rows", 7e9, "nan"), ("zero targets", 9e-4, "nan"),
    ("tiny", 1.3e5, "nan"), ("inf", "nan", "nan")])
def test_naive_loss_breaks_as_the_docs_say_and_ours_does_not(kind, single, half):
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
