# SPDX-License-Identifier: MIT
"""bench/stability.py: plain losses break where it says, ours keeps its bound, finished runs are kept."""
import json

import pytest
import torch

import train
from bench import stability
from bench.__main__ import parse_args
from bench.stability import (DTYPES, KINDS, LOSSES, PLAIN, Setting, WatchedCriterion, corrupt, criterion_case,
                             training_run)
from helpers import TOWER
from losses import CLIP_LOSSES, ClipConsCriterion


def cases(loss, dtype, kind, draws=3):
    """Finite, largest gradient over the bound, and share of dead rows, of every draw."""
    return zip(*(criterion_case(loss, DTYPES[dtype], kind, seed, 64, 32) for seed in range(draws)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in PLAIN])
def test_ours_is_finite_and_within_the_bound_on_every_kind(loss, dtype):
    for kind in KINDS:
        finite, over_bound, dead = cases(loss, dtype, kind)
        assert all(finite) and max(over_bound) <= 1.01
        if kind == "one point" and loss == "ours, infonce":
            assert min(dead) == 1  # no negative to distinguish it from
        elif kind == "huge rows":
            assert min(dead) > 0.3  # the half of the rows whose entries are clamped
        else:
            assert max(dead) == 0


@pytest.mark.parametrize("loss", PLAIN)
@pytest.mark.parametrize("kind, single, half", [
    ("ordinary", "fine", "fine"), ("zero rows", "explodes", "broken"), ("zero targets", "fine", "broken"),
    ("inf in rows", "broken", "broken"), ("inf in targets", "broken", "broken"),
    ("no valid point", "broken", "broken")])
def test_plain_losses_break_where_the_study_says(loss, kind, single, half):
    for dtype, expected in (("fp32", single), ("fp16", half)):
        finite, over_bound, dead = cases(loss, dtype, kind)
        assert set(finite) == {expected != "broken"}
        assert expected != "explodes" or min(over_bound) > 1e6
        assert expected != "fine" or max(over_bound) < 1 and max(dead) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_makes_what_it_names_and_lets_the_gradient_through(kind):
    torch.manual_seed(0)
    feat, clip = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)
    valid = torch.ones(20, dtype=torch.bool)
    before = feat.detach().clone(), clip.clone(), valid.clone()
    bad, target, seen = corrupt(kind, feat, clip, valid, 10)
    assert all(map(torch.equal, (feat, clip, valid), before))
    n, rows = len(bad), slice(0, None, 10)
    assert torch.equal(bad[1:10], feat[1:n][:9]) and torch.equal(target[1:10], clip[1:n][:9])
    expected = {"zero rows": not bad[rows].any(), "constant rows": (bad[rows] == 1).all(),
                "tiny rows": bad[rows].norm(dim=1).allclose(torch.tensor(1e-7)),
                "huge rows": bad[rows].abs().amax(1).allclose(torch.tensor(1e30)),
                "inf in rows": bad[rows, 0].isinf().all() and bad[rows, 1:].isfinite().all(),
                "zero targets": not target[rows].any(), "inf in targets": target[rows, 0].isinf().all(),
                "no valid point": not seen.any(), "one point": n == 1 and seen.all(),
                "ordinary": torch.equal(bad, feat) and torch.equal(target, clip) and seen.all()}
    assert expected[kind] and sum(map(bool, expected.values())) == 1
    assert torch.equal(torch.autograd.grad(bad.sum(), feat)[0][:n], torch.ones(n, 8))


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_watched_criterion_is_the_shipped_one_if_nothing_is_corrupted(variant):
    torch.manual_seed(0)
    feat, clip = torch.randn(30, 16, requires_grad=True), torch.randn(3, 16)
    batch, valid = torch.arange(30) // 10, torch.rand(30) < 0.8
    watched = WatchedCriterion(variant=variant)
    criteria = watched, ClipConsCriterion(1.0, variant=variant)
    (ours, counts), (shipped, expected) = (criterion(feat, clip, batch, valid) for criterion in criteria)
    assert torch.equal(ours, shipped) and torch.equal(counts, expected)
    assert torch.equal(*(torch.autograd.grad(loss, feat)[0] for loss in (ours, shipped)))
    assert len(watched.over_bound) == 1 and 0 < watched.over_bound[0] <= 1


def test_quick_study_runs_two_trainings_and_does_not_repeat_them(tmp_path, capsys, monkeypatch, quick_runs):
    monkeypatch.setattr(stability, "QUICK", [*stability.QUICK, "--clip-model", TOWER])
    args = parse_args(["stability", "--quick", "--out", str(tmp_path)])
    stability.run(args)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "quick.json").read_text())
    healthy, broken = (results["trainings"][name]["0"] for name in ("ours", "inf in targets: naive"))
    assert healthy["bad_steps"] == 0 and 0 < healthy["over_bound"] <= 1 and healthy["effective_rank"] > 1
    assert broken["bad_steps"] > 0 and broken["over_bound"] is None
    assert all(kind in printed for kind in KINDS) and "inf in targets: naive" in printed

    calls = []
    monkeypatch.setattr(stability, "training_run", lambda *a: calls.append(a) or {**healthy, "miou": 0.5})
    monkeypatch.setattr(stability, "criterion_study", lambda draws: {})
    stability.run(args)
    assert not calls
    assert json.loads((tmp_path / "quick.json").read_text())["trainings"] == results["trainings"]
    monkeypatch.setattr(stability, "QUICK", [*stability.QUICK, "--epochs", "3"])  # other options: another run
    stability.run(args)
    assert len(calls) == 2


def test_every_setting_is_a_valid_run():
    for setting in stability.SETTINGS.values():
        train.parse_args([*stability.RECIPE, *setting.options.split()])
        assert setting.loss in (*PLAIN, "ours") and setting.kind in (None, *KINDS)
        assert 0 <= setting.gradient_flow_ratio <= 1


def test_a_run_that_is_lost_is_a_result_and_its_criterion_is_that_of_the_setting(monkeypatch):
    def lost(argv, clip_criterion):
        assert clip_criterion.gradient_flow_ratio == 0.5 and clip_criterion.variant == "cosine"
        folder = stability.Path(argv[-1]) / "run"
        folder.mkdir()
        raise FloatingPointError("10 steps in a row")
    monkeypatch.setattr(train, "main", lost)
    record = training_run(["--clip-loss", "cosine"], Setting(gradient_flow_ratio=0.5))
    assert record["error"] == "10 steps in a row" and record["miou"] is None
    stability.print_training({"ours": {"0": record}})


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = {kind: {loss: dict.fromkeys(DTYPES, (1.0, 0.5, 0.0)) for loss in LOSSES} for kind in KINDS}
    stability.plot_losses(table, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000
