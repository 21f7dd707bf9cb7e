# SPDX-License-Identifier: MIT
"""bench/stability.py: the plain losses break where it says, ours stays within its bound, finished runs are kept."""
import json

import pytest
import torch

from bench import stability
from bench.__main__ import parse_args
from bench.stability import DTYPES, KINDS, LOSSES, PLAIN, WatchedCriterion, corrupt, criterion_case, training_run
from losses import CLIP_LOSSES, ClipConsCriterion

OURS = [loss for loss in LOSSES if loss not in PLAIN]


def cases(loss, dtype, kind, draws=5):
    return zip(*(criterion_case(loss, DTYPES[dtype], kind, seed, rows=64, channels=32) for seed in range(draws)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", OURS)
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
    ("ordinary", "fine", "fine"), ("zero rows", "explodes", "not finite"), ("zero targets", "fine", "not finite"),
    ("inf in rows", "not finite", "not finite"), ("inf in targets", "not finite", "not finite"),
    ("no valid point", "not finite", "not finite")])
def test_plain_losses_break_where_the_study_says(loss, kind, single, half):
    for dtype, expected in (("fp32", single), ("fp16", half)):
        finite, over_bound, dead = cases(loss, dtype, kind)
        if expected == "not finite":
            assert not any(finite)
        else:
            assert all(finite) and (min(over_bound) > 1e6 if expected == "explodes" else max(over_bound) < 1)
            assert max(dead) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_makes_what_it_names_and_lets_the_gradient_through(kind):
    torch.manual_seed(0)
    feat, clip, valid = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8), torch.ones(20, dtype=torch.bool)
    before = feat.detach().clone(), clip.clone(), valid.clone()
    bad, target, seen = corrupt(kind, feat, clip, valid, 10)
    assert all(torch.equal(a, b) for a, b in zip((feat, clip, valid), before))
    n, rows = len(bad), slice(0, None, 10)
    assert torch.equal(bad[1:10], feat[1:n][:9]) and torch.equal(target[1:10], clip[1:n][:9])
    expected = {"zero rows": lambda: not bad[rows].any(), "constant rows": lambda: bool((bad[rows] == 1).all()),
                "tiny rows": lambda: torch.allclose(bad[rows].norm(dim=1), torch.full((2,), 1e-7)),
                "huge rows": lambda: torch.allclose(bad[rows].abs().amax(1), torch.full((2,), 1e30)),
                "inf in rows": lambda: bool(bad[rows, 0].isinf().all()) and bool(bad[rows, 1:].isfinite().all()),
                "zero targets": lambda: not target[rows].any(),
                "inf in targets": lambda: bool(target[rows, 0].isinf().all()),
                "no valid point": lambda: not seen.any(), "one point": lambda: n == 1 and bool(seen.all()),
                "ordinary": lambda: torch.equal(bad, feat) and torch.equal(target, clip)}
    assert expected[kind]()
    assert torch.equal(torch.autograd.grad(bad.sum(), feat)[0][:n], torch.ones(n, 8))


@pytest.mark.parametrize("variant", CLIP_LOSSES)
def test_watched_criterion_is_the_shipped_one_if_nothing_is_corrupted(variant):
    torch.manual_seed(0)
    feat, clip, batch = torch.randn(30, 16, requires_grad=True), torch.randn(3, 16), torch.arange(30) // 10
    valid = torch.rand(30) < 0.8
    watched = WatchedCriterion(variant=variant)
    ours = watched(feat, clip, batch, valid)
    shipped = ClipConsCriterion(1.0, variant=variant)(feat, clip, batch, valid)
    assert torch.equal(ours, shipped)
    assert torch.equal(*(torch.autograd.grad(loss, feat)[0] for loss in (ours, shipped)))
    assert len(watched.over_bound) == 1 and 0 < watched.over_bound[0] <= 1


@pytest.mark.parametrize("loss", ["naive", "ours"])
def test_watched_criterion_tells_a_finite_step_from_one_that_is_not(loss):
    torch.manual_seed(0)
    watched = WatchedCriterion(loss, "inf in targets")
    watched(torch.randn(40, 16, requires_grad=True), torch.randn(40, 16), None, torch.ones(40, dtype=torch.bool))
    assert (watched.over_bound[0] <= 1) == (loss == "ours")  # NaN is not


def test_quick_study_runs_a_pair_of_trainings_and_does_not_repeat_them(tmp_path, capsys, monkeypatch):
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
    assert not calls and json.loads((tmp_path / "quick.json").read_text())["trainings"] == results["trainings"]
    monkeypatch.setattr(stability, "QUICK", [*stability.QUICK, "--epochs", "3"])  # other options: another run
    stability.run(args)
    assert len(calls) == 2


@pytest.mark.parametrize("name", stability.SETTINGS)
def test_every_setting_is_a_valid_run(name):
    options, loss, kind = stability.SETTINGS[name]
    stability.train.parse_args([*stability.RECIPE, *options.split()])
    assert loss in (*PLAIN, "ours") and (kind is None or kind in KINDS)


def test_a_run_that_is_lost_is_a_result(monkeypatch):
    def lost(argv, clip_criterion):
        folder = stability.Path(argv[-1]) / "run"
        folder.mkdir()
        raise FloatingPointError("10 steps in a row")
    monkeypatch.setattr(stability.train, "main", lost)
    record = training_run([], "ours", None)
    assert record["error"] == "10 steps in a row" and record["miou"] is None
    stability.print_training({"ours": {"0": record}})


def test_both_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    record = {"miou": 0.5, "over_bound": 0.1, "effective_rank": 20.0, "error": None}
    lost = {**record, "miou": None, "error": "10 steps in a row"}
    table = {kind: {loss: dict.fromkeys(DTYPES, (1.0, 0.5, 0.0)) for loss in LOSSES} for kind in KINDS}
    stability.plot_losses(table, tmp_path / "losses.png")
    stability.plot_training({"3D baseline": {"0": record}, "naive": {"0": record, "1": lost}}, tmp_path / "runs.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("losses.png", "runs.png"))
