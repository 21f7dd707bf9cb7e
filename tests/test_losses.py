# SPDX-License-Identifier: MIT
"""losses.py: the consistency loss keeps its bounds on hostile input, equals the plain formula, needs its guards.

`check_promises` checks what the docstring of ClipConsCriterion promises, against a float64 reference in
numpy, and `check_two_processes` that a batch may be split. They run on the shipped file and, in
`test_every_safeguard_is_needed`, on copies with one safeguard taken out.
"""
import contextlib
import itertools
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
from losses import (CLIP_LOSSES, ClipConsCriterion, SemanticCriterion, clip_consistency, clip_loss_weight,
                    draw_negatives, semantic_loss)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
C = 16
MAX_NEGATIVES = (512, 20, 2, 60)
NAMES = ("loss_weight", "temperature", "gradient_flow_ratio", "clamp", "norm_floor")
SETTINGS = [dict(zip(NAMES, values)) for values in (
    (0.05, 0.07, 0.0, 10.0, 0.1), (0.05, 0.1, 0.5, None, 0.1), (1.0, 0.5, 1.0, 10.0, 0.1),
    (0.01, 1e-4, 0.25, None, 0.5), (1.0, 0.0, 1.0, None, 0.01), (0.05, 0.07, 0.3, 0.5, 0.1),
    (2.0, 3.0, 1.0, 10.0, 2.0))]


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def hostile_rows(n, dtype, generator):
    """(n, C) rows, each of a kind drawn at random: ordinary, tiny, huge, constant, zero, not finite."""
    normal = torch.randn(n, C, generator=generator)
    uniform = torch.empty(n, C).uniform_(-1, 1, generator=generator)
    info = torch.finfo(dtype)
    one_bad = normal.expand(3, n, C).clone()
    one_bad[:, :, 0] = torch.tensor([math.nan, math.inf, -math.inf])[:, None]
    constant = [torch.full((n, C), value) for value in (0, 1, -info.max, math.nan, math.inf)]
    kinds = torch.stack([
        normal, normal, normal * 0.02, normal * 1e-3, normal * 1e-7, normal * 1e-20, uniform * 50,
        uniform * 6e4, uniform * info.max, uniform.sign() * info.max, uniform * info.tiny,
        uniform * info.tiny / 16, torch.eye(C)[torch.arange(n) % C] * 1e4, *constant, *one_bad]).to(dtype)
    return kinds[torch.randint(len(kinds), (n,), generator=generator), torch.arange(n)]


def hostile_pair(n, dtype, generator):
    """Two (n, C) tensors of hostile rows; in some rows they are equal, opposite, or nearly so."""
    feat, clip = hostile_rows(n, dtype, generator), hostile_rows(n, dtype, generator)
    relation = torch.randint(8, (n, 1), generator=generator)
    for value, other in enumerate((feat, -feat, feat * (1 + 1e-3))):
        clip = torch.where(relation == value, other, clip)
    return feat, clip


def hostile_batch(call, rows, dtype, generator):
    """feat (n, C), clip (n, C) or (B, C), batch (n,) or None, valid (n,); every fourth call is odd."""
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
        clip = hostile_rows(scenes, dtype, generator)
        if odd == 6:
            clip[:] = math.nan
    return feat, clip, batch, valid


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


def check_promises(module, dtype, variant, calls, rows, device="cpu"):
    """Checks what ClipConsCriterion promises on `calls` batches of hostile rows -> how many took part."""
    generator, taken = torch.Generator().manual_seed(0), 0
    for call, setting in zip(range(calls), itertools.cycle(SETTINGS)):
        batch = hostile_batch(call, rows, dtype, generator)
        taken += check_call(module, *batch, variant, setting, MAX_NEGATIVES[call % 4], device)
    return taken


def check_call(module, feat, clip, batch, valid, variant, setting, max_negatives, device):
    criterion = module.ClipConsCriterion(**setting, variant=variant)
    feat_in, clip_in = (x.to(device, copy=True).requires_grad_() for x in (feat, clip))
    others = [None if x is None else x.to(device) for x in (batch, valid)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_NEGATIVES", max_negatives)
        loss, counts = criterion(feat_in, clip_in, *others, seed=1)
    loss.backward()
    feat_grad, clip_grad = feat_in.grad.cpu(), None if clip_in.grad is None else clip_in.grad.cpu()
    for before, after in ((feat, feat_in), (clip, clip_in)):
        assert torch.equal(before.nan_to_num(), after.detach().cpu().nan_to_num())

    n, T, weight = len(feat), len(clip), setting["loss_weight"]
    own = torch.arange(n) if batch is None else batch
    feat_finite, clip_finite = (x.isfinite().all(1) for x in (feat, clip))
    usable = valid & feat_finite & clip_finite[own]
    used = int(usable.sum())
    candidates, negatives = usable if batch is None else clip_finite, torch.arange(T)
    clamp = setting["clamp"]
    beyond = [x.abs() > (math.inf if clamp is None else clamp) for x in (feat, clip)]
    touched = beyond[0][usable].sum() + beyond[1][candidates].sum()
    assert counts.tolist() == [used, int(valid.sum()) - used, touched]

    if T > max_negatives:
        negatives = module.draw_negatives(candidates.to(device), max_negatives, seed=1).cpu()
        assert len(negatives.unique()) == max_negatives
        assert candidates[negatives].sum() == min(max_negatives, int(candidates.sum()))
    is_negative = candidates[negatives] & (negatives != own[usable, None])
    most = int(is_negative.sum(1).max()) if used and T else 0

    t = 1 if variant == "cosine" else max(setting["temperature"], 0.1)
    limits = {"sigmoid": (math.log1p(math.exp(-1 / t)), math.log1p(math.exp(1 / t))),
              "cosine": (0, 2),
              "infonce": (0, math.log1p(most * math.exp(2 / t)) / 2)}
    low, high = limits[variant] if used else (0, 0)
    assert weight * low * (1 - 1e-5) <= loss.item() <= weight * high * (1 + 1e-5)

    bound = weight / (max(used, 1) * t * setting["norm_floor"])
    assert (feat_grad.double().norm(dim=1) <= 1.01 * bound).all()  # false for NaN
    assert not feat_grad[~usable].any() and not feat_grad[beyond[0]].any()
    ratio = setting["gradient_flow_ratio"]
    if ratio == 0:
        assert clip_grad is None
    else:  # 0 for a target that is neither positive nor negative
        share = torch.zeros(T, dtype=torch.float64)
        share.index_add_(0, own[usable], torch.ones(used).double() / (2 if variant == "infonce" else 1))
        if variant == "infonce":
            share.index_add_(0, negatives, is_negative.double().sum(0) / 2)
        assert (clip_grad.double().norm(dim=1) <= 1.01 * ratio * bound * share).all()
        assert not clip_grad[beyond[1]].any()

    table = torch.where(clip_finite[:, None], clip, 0)
    row = reference(variant, feat[usable], table, own[usable].numpy(), negatives.numpy(), is_negative.numpy(),
                    t, clamp, setting["norm_floor"])
    expected = weight * row.mean() if used else 0
    near_one = 1e-9 if variant == "sigmoid" else 3e-7 * weight  # differences of numbers around 1
    assert loss.item() == pytest.approx(expected, rel=2e-5, abs=near_one)
    return used


def two_processes(run, halves):
    """The mean of what run(half, world_mean) returns in two processes that average their normalizers."""
    seen = [[], []]
    for half, calls in zip(halves, seen):
        run(half, lambda x: calls.append(x.clone()) or x)
    assert len(seen[0]) == len(seen[1]) > 0, "one process would wait for the other"
    means = [torch.stack(pair).mean(0) for pair in zip(*seen)]
    results = []
    for half in halves:
        queue = iter(means)
        results.append(run(half, lambda x: next(queue)))
    return [(a + b) / 2 for a, b in zip(*results)]


def check_two_processes(module):
    """Checks that mean loss and gradient of two halves are those of the whole -> how many variants it checked."""
    torch.manual_seed(0)
    feat, table = (double(n, C).requires_grad_() for n in (30, 4))
    batch, valid = torch.arange(30) % 4, torch.arange(30) % 3 > 0
    checked = 0
    for variant, per_point in itertools.product(CLIP_LOSSES, (False, True)):
        if per_point and variant == "infonce":
            continue  # negatives are those of the process

        def run(rows, world_mean):
            criterion = module.ClipConsCriterion(gradient_flow_ratio=0.5, variant=variant,
                                                 world_mean=world_mean)
            target = (table[batch[rows]], None) if per_point else (table, batch[rows])
            loss, _ = criterion(feat[rows], *target, valid[rows])
            return [loss.detach(), *torch.autograd.grad(loss, (feat, table))]

        for n, cut in ((30, 0), (30, 1), (30, 17), (2, 1)):  # the first row is not valid, the second is
            parts = two_processes(run, (torch.arange(cut), torch.arange(cut, n)))
            torch.testing.assert_close(parts, run(torch.arange(n), None))
        checked += 1
    return checked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_loss_and_gradient_stay_within_their_bounds_on_hostile_rows(variant, dtype, device):
    assert check_promises(losses, dtype, variant, calls=36, rows=700, device=device) >= 10_000


def test_a_batch_may_be_split_over_processes():
    assert check_two_processes(losses) == 2 * len(CLIP_LOSSES) - 1  # targets of scenes and of points


SAFEGUARDS = {
    "norm floor": ("clamp(min=norm_floor)", "clamp(min=1e-12)"),
    "division by the largest entry": ("largest_entry(rows).clamp(min=1)", "largest_entry(rows).clamp(1, 1)"),
    "fp32 inside": ("for x in tensors] else torch.float32", "for x in tensors] else tensors[0].dtype"),
    "temperature floor": ("max(temperature, TEMPERATURE_FLOOR)", "max(temperature, 1e-6)"),
    "non-finite features are dropped": ("wanted & feat_finite & own_finite", "wanted & own_finite"),
    "non-finite targets are dropped": ("wanted & feat_finite & own_finite", "wanted & feat_finite"),
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
    assert source.count(old) == 1, f"losses.py does not hold {old!r} once: name the safeguard anew"
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
        loss, _ = clip_consistency(feat, clip, variant=variant)
        assert loss.dtype == common
        assert torch.equal(loss, clip_consistency(feat.to(common), clip.to(common), variant=variant)[0])


def plain_formula(variant, feat, clip, own, temperature):
    """Written with what torch offers, without any guard; every other row of clip is a negative."""
    cos = F.normalize(feat) @ F.normalize(clip).T
    if variant == "sigmoid":
        return -torch.sigmoid(cos[torch.arange(len(feat)), own] / temperature).log().mean()
    if variant == "cosine":
        return F.cosine_embedding_loss(feat, clip[own], torch.ones(len(feat)))
    return F.cross_entropy(cos / temperature, own) / 2


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("targets", [None, 7, 60])  # of points; of scenes, also of 60 for the 60 points
@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_equals_the_plain_formula_where_that_is_healthy(variant, targets, ratio):
    torch.manual_seed(0)
    feat, clip = double(60, 32).requires_grad_(), double(targets or 60, 32).requires_grad_()
    batch = None if targets is None else torch.randint(targets, (60,))
    criterion = ClipConsCriterion(1.0, temperature=0.3, gradient_flow_ratio=ratio, variant=variant)
    loss, _ = criterion(feat, clip, batch)
    plain = plain_formula(variant, feat, clip, torch.arange(60) if batch is None else batch, 0.3)
    torch.testing.assert_close(loss, plain)
    ours, theirs = (torch.autograd.grad(x, (feat, clip), allow_unused=True) for x in (loss, plain))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] is None if ratio == 0 else torch.allclose(ours[1], ratio * theirs[1])


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_gradcheck_in_double_above_and_below_the_floor(variant):
    torch.manual_seed(0)
    valid = torch.tensor([True, True, False, True, True])
    for size, batch in itertools.product((1.0, 1e-2, 1e3), (None, torch.tensor([0, 0, 1, 1, 1]))):
        feat = (size * double(5, 4)).requires_grad_()
        clip = (size * double(5 if batch is None else 3, 4)).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda f, c: clip_consistency(f, c, batch, valid, variant, 0.3, 1.0)[0], (feat, clip), eps=1e-6 * size)


def test_negatives_are_drawn_at_random_without_repetition_and_usable_ones_first():
    torch.manual_seed(0)
    candidates = torch.arange(40) % 4 > 0
    draws = torch.stack([draw_negatives(candidates, 10) for _ in range(3000)])
    assert candidates[draws].all() and (draws.sort(1).values.diff(dim=1) > 0).all()
    frequency = torch.bincount(draws.flatten(), minlength=40)[candidates] / 3000
    assert (frequency - 10 / 30).abs().max() < 5 * math.sqrt(2 / 9 / 3000)  # five standard deviations
    assert set(draw_negatives(candidates, 34).tolist()) > set(candidates.nonzero()[:, 0].tolist())


def test_negatives_are_drawn_anew_in_each_call_and_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(losses, "MAX_NEGATIVES", 7)
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(9, 8), torch.randn(40, 8, requires_grad=True), torch.zeros(9).long()
    clip.data[5:10] = math.nan
    criterion = ClipConsCriterion(gradient_flow_ratio=1.0, variant="infonce")
    gradients = [torch.autograd.grad(criterion(feat, clip, batch)[0], clip)[0] for _ in range(20)]
    met = [frozenset(gradient.any(1).nonzero()[:, 0].tolist()) for gradient in gradients]
    assert all(0 in rows and len(rows) in (7, 8) and not rows & set(range(5, 10)) for rows in met)
    assert len(set(met)) > 10
    state = torch.get_rng_state()
    first, again, other = (criterion(feat, clip, batch, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    criterion(feat, clip[:5], batch)  # few: all of them
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn by the global generator


def test_without_a_clamp_the_loss_still_pulls_where_half_precision_would_be_silently_dead():
    torch.manual_seed(0)
    feat, clip = torch.empty(64, C).uniform_(-6e4, 6e4).half().requires_grad_(), torch.randn(64, C).half()
    upstream = 2.0 ** 20  # a loss scale: true gradients of rows this long lie below what fp16 can hold
    (upstream * clip_consistency(feat, clip, clamp=None)[0]).backward()
    assert feat.grad.isfinite().all() and (feat.grad != 0).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_changes_neither_loss(dtype):
    torch.manual_seed(0)
    feat, clip, logits = torch.randn(40, 16), torch.randn(40, 16), torch.randn(40, 5)

    def run():
        return [ClipConsCriterion(variant=variant)(feat, clip)[0] for variant in CLIP_LOSSES] + [
            semantic_loss(logits, torch.arange(40) % 5)]

    expected = run()
    with torch.autocast("cpu", dtype):
        got = run()
    assert got == expected and all(x.dtype == torch.float32 for x in got)


@pytest.mark.parametrize("targets", [90, 40])
def test_no_step_waits_for_the_device(monkeypatch, targets):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    monkeypatch.setattr(losses, "MAX_NEGATIVES", 20)
    with torch.device("meta"):  # tensors without numbers: reading one raises
        feat, clip = torch.empty(90, 8, requires_grad=True), torch.empty(targets, 8)
        batch, valid = torch.empty(90, dtype=torch.long), torch.empty(90, dtype=torch.bool)
        loss = SemanticCriterion()(feat, batch)
        for variant in CLIP_LOSSES:
            scenes = None if targets == 90 else batch
            loss = loss + ClipConsCriterion(variant=variant)(feat, clip, scenes, valid)[0]
        loss.backward()
    assert loss.shape == () and feat.grad.shape == feat.shape


def test_the_attributes_hold_what_is_used():
    expected = {"loss_weight": 0.05, "temperature": 0.1, "gradient_flow_ratio": 0.0, "clamp": 10.0,
                "norm_floor": 0.1, "variant": "sigmoid", "world_mean": None}
    assert {name: getattr(ClipConsCriterion(temperature=0.07), name) for name in expected} == expected
    assert ClipConsCriterion(temperature=0.2).temperature == 0.2


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_vmap_of_grad_equals_a_loop(variant):
    torch.manual_seed(0)
    feat, clip = double(3, 7, 8), double(3, 7, 8)
    valid, batch = torch.rand(3, 7) < 0.7, torch.randint(7, (3, 7))
    criterion = ClipConsCriterion(variant=variant, gradient_flow_ratio=0.5)
    gradient = torch.func.grad(criterion, (0, 1), has_aux=True)
    for own in (None, batch):
        over = (0, 0, None if own is None else 0, 0)
        mapped, counts = torch.func.vmap(gradient, over)(feat, clip, own, valid)
        assert counts.tolist() == [[n, 0, 0] for n in valid.sum(1)]
        for i in range(3):
            inputs = feat[i].clone().requires_grad_(), clip[i].clone().requires_grad_()
            loss, _ = criterion(*inputs, None if own is None else own[i], valid[i])
            torch.testing.assert_close((mapped[0][i], mapped[1][i]), torch.autograd.grad(loss, inputs))


def test_the_semantic_loss_under_vmap_of_grad_equals_a_loop():
    logits, labels = double(3, 6, 4), torch.randint(-1, 4, (3, 6))
    gradient = torch.func.grad(SemanticCriterion())
    loop = torch.stack([gradient(*pair) for pair in zip(logits, labels)])
    torch.testing.assert_close(torch.func.vmap(gradient)(logits, labels), loop)


def test_the_criterion_compiles_without_a_break_and_exports_for_any_number_of_rows():
    torch.manual_seed(0)
    feat, clip, valid = double(7, 8).requires_grad_(), double(7, 8), torch.arange(7) % 3 > 0
    for variant in CLIP_LOSSES:
        criterion = ClipConsCriterion(variant=variant)
        expected = criterion(feat, clip, None, valid)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")(feat, clip, None, valid)
        torch.testing.assert_close(compiled, expected)
        gradients = [torch.autograd.grad(loss, feat) for loss, _ in (compiled, expected)]
        torch.testing.assert_close(*gradients)
        n = torch.export.Dim("n", min=2, max=losses.MAX_NEGATIVES)  # beyond, infonce draws
        shapes = {0: n}, {0: n}, None, {0: n}
        exported = torch.export.export(criterion, (feat, clip, None, valid), dynamic_shapes=shapes).module()
        fewer = feat[:4], clip[:4], None, valid[:4]
        torch.testing.assert_close(exported(*fewer), criterion(*fewer))


@pytest.mark.parametrize("boundaries, weights, expected", [
    ((10, 20), (0.0, 0.001, 0.01), [0.0] * 11 + [0.001] * 10 + [0.01] * 20), ((), (0.3,), [0.3] * 5),
    ((0,), (1, 2), [1, 2, 2]), ((-1,), (0, 5), [5, 5]), ((4, 4), (1, 2, 3), [1] * 5 + [3] * 5)])
def test_the_warm_up_changes_after_each_boundary(boundaries, weights, expected):
    assert [clip_loss_weight(epoch, boundaries, weights) for epoch in range(len(expected))] == expected
    if len(expected) == 41:  # the defaults
        assert [clip_loss_weight(epoch) for epoch in range(41)] == expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("ignore_index, bad", [(-1, math.nan), (255, math.inf), (2, -math.inf)])
def test_semantic_loss_equals_torch_whatever_ignored_rows_hold(ignore_index, bad, dtype, device):
    torch.manual_seed(0)
    logits = (100 * torch.randn(50, 5)).to(device, dtype)
    labels = torch.randint(0, 5, (50,)).to(device)
    labels[::7] = ignore_index
    wide = logits.clone().double().requires_grad_()
    expected = F.cross_entropy(wide, labels, ignore_index=ignore_index)
    logits[labels == ignore_index] = bad
    logits.requires_grad_()
    loss = SemanticCriterion(ignore_index)(logits, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=0)
    gradient, plain = (torch.autograd.grad(x, y)[0] for x, y in ((loss, logits), (expected, wide)))
    torch.testing.assert_close(gradient, plain.to(dtype), rtol=1e-2, atol=1e-6)
    assert not gradient[labels == ignore_index].any()


def test_semantic_loss_of_a_batch_may_be_split_over_processes():
    torch.manual_seed(0)
    logits, labels = double(30, 3).requires_grad_(), torch.arange(30) % 3
    labels[torch.arange(30) % 4 == 0] = -1  # also the first, so that one half has a row but no label

    def run(rows, world_mean):
        loss = SemanticCriterion(world_mean=world_mean)(logits[rows], labels[rows])
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    for cut in (0, 1, 2, 13):
        halves = torch.arange(30)[:cut], torch.arange(30)[cut:]
        torch.testing.assert_close(two_processes(run, halves), run(torch.arange(30), None))


def zeros(*shape):
    return torch.zeros(shape)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.long)


REFUSED = [  # call, what the message must hold
    *((lambda bad=bad: ClipConsCriterion(**bad), next(iter(bad))) for bad in (
        dict(temperature=-1), dict(temperature=math.nan), dict(norm_floor=0), dict(clamp=0),
        dict(clamp=math.nan), dict(loss_weight=-1), dict(gradient_flow_ratio=1.5),
        dict(gradient_flow_ratio=-0.1))),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 8), variant="x"), "'x' must be one of sigmoid"),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 7)), r"\(4, 8\).*\(4, 7\)"),
    (lambda: clip_consistency(zeros(4), zeros(4, 8)), r"\(4,\)"),
    (lambda: clip_consistency(zeros(4, 8), zeros(2, 8)), r"\(2, 8\).*batch"),
    (lambda: clip_consistency(zeros(4, 8), zeros(2, 8), integers(3)), r"batch \(3,\)"),
    (lambda: clip_consistency(zeros(4, 8), zeros(4, 8), None, zeros(5) > 0), r"valid \(5,\)"),
    *((lambda bad=bad: ClipConsCriterion()(zeros(2, 8), zeros(3, 8), bad), message)
      for bad, message in ((torch.tensor([0, 3]), r"batch \(2,\) must lie in \[0, 3\)"),
                           (torch.tensor([0, -1]), r"batch \(2,\) must lie in \[0, 3\)"),
                           (zeros(2), r"batch must be one-dimensional int64, got \(2,\) torch.float32"))),
    *((lambda bad=bad: ClipConsCriterion()(zeros(4, 8), zeros(4, 8), None, bad), f"bool, got {bad.dtype}")
      for bad in (zeros(4), integers(4), zeros(4).byte())),
    *((lambda bad=bad: semantic_loss(zeros(2, 3), bad), message)
      for bad, message in ((torch.tensor([0, 3]), r"labels \(2,\) must lie in \[0, 3\) or be -1"),
                           (torch.tensor([0, -2]), r"labels \(2,\) must lie in \[0, 3\) or be -1"),
                           (integers(2).int(), "labels must be one-dimensional int64, got"),
                           (integers(5), r"\(2, 3\).*\(5,\)"), (integers(2, 1), r"\(2, 1\)"))),
    (lambda: semantic_loss(zeros(4), integers(4)), r"\(4,\)"),
    *((lambda bad=bad: clip_loss_weight(0, *bad), "boundaries")
      for bad in (((10, 20), (0, 1)), ((20, 10), (0, 1, 2)), ((1,), (0, 1, 2))))]


@pytest.mark.parametrize("call, message", REFUSED, ids=map(str, range(len(REFUSED))))
def test_bad_settings_and_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
        loss, counts = criterion(f, c)
        grad, = torch.autograd.grad(loss, f)
        bound = 1 / (int(counts[0]) * criterion.temperature * criterion.norm_floor)
        assert loss.isfinite() and grad.float().norm(dim=1).max() <= 1.01 * bound
