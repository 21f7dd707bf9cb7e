# SPDX-License-Identifier: MIT
"""support/diagnose.py: figures against closed forms and plain formulas; NaN put into a run is found where it was put."""
import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from helpers import CLIP_ON, checkpoint, in_two_processes, scalars, small
from support import diagnose

pytestmark = [pytest.mark.usefixtures("quick_runs"),
              pytest.mark.filterwarnings("ignore:Error detected in")]  # anomaly detection prints what it stops at


# ---------------------------------------------------------------------------------------------- effective rank


def rank(feats):
    return diagnose.effective_rank(feats).item()


def test_effective_rank_is_that_of_numpys_singular_values_and_sees_a_lost_direction_alone():
    torch.manual_seed(0)
    feats = torch.randn(300, 24) @ torch.randn(24, 24) + 5
    two_directions = torch.tensor([[1e3, 0, 0], [-1e3, 0, 0], [0, 1, 0], [0, -1, 0]])
    for rows in (feats, two_directions, torch.cat([torch.eye(9), -torch.eye(9)]), torch.randn(2, 3)):
        values = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), compute_uv=False)
        share = values[values > 1e-9] / values.sum()
        assert rank(rows) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)
    turn = torch.linalg.qr(torch.randn(24, 24))[0]
    for other in (feats * 1e-4, feats * 1e15, feats + 3, feats @ turn, feats[torch.randperm(300)]):
        assert rank(other) == pytest.approx(rank(feats), rel=1e-3)
    flat = feats.clone()
    flat[:, 12:] = 0
    assert rank(flat) < 12 < rank(feats)
    line = torch.randn(50, 1) * torch.randn(1, 20) + torch.randn(20)
    for rows in (line, torch.full((30, 20), 0.3), torch.randn(1, 20), torch.zeros(7, 20), torch.zeros(0, 20)):
        assert rank(rows) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 129])
def test_no_more_rows_than_allowed_enter_the_rank(n):
    assert min(n, 32) <= len(diagnose.every_kth_row(torch.zeros(n, 3), 64)) <= 64


# ---------------------------------------------------------------------------------------------- statistics

MEANS = ("fusion/valid_share", "fusion/gate_mean", "fusion/gate_std", "fusion/clip_cosine")
RANK = "fusion/effective_rank"


def output(n=500, dtype=torch.float32, share=0.6):
    """An output of the fusion with a share of seen points, and the scenes of the points."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(n, generator=generator) < share
    alpha = torch.rand(n, 1, generator=generator) * valid[:, None]
    feats, clip = torch.randn(n, 16, generator=generator), torch.randn(3, 16, generator=generator)
    return {"feat_fusion": feats.to(dtype).requires_grad_(), "clip_global": clip.to(dtype), "valid": valid,
            "alpha": alpha.to(dtype)}, torch.arange(n) * 3 // n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_plain_formulas_over_the_seen_points(dtype):
    out, batch_idx = output(dtype=dtype)
    stats = diagnose.fusion_statistics(out, batch_idx)
    valid = out["valid"].numpy()
    feats, clip, alpha = (out[key].detach().double().numpy() for key in ("feat_fusion", "clip_global", "alpha"))
    gates, target = alpha[valid, 0], clip[batch_idx.numpy()]
    cosine = (feats * target).sum(1) / np.linalg.norm(feats, axis=1) / np.linalg.norm(target, axis=1)
    for name, value in zip(MEANS, (valid.mean(), gates.mean(), gates.std(), cosine[valid].mean())):
        assert stats[name].item() == pytest.approx(value, rel=1e-4), name
    assert stats.keys() == {*MEANS, RANK}
    assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


def test_an_unseen_point_has_no_influence_whatever_it_holds_and_is_reported_if_not_finite():
    out, batch_idx = output()
    changed = {**out, "feat_fusion": out["feat_fusion"].detach().clone()}
    changed["feat_fusion"][~out["valid"]] = math.nan
    own, other = (diagnose.fusion_statistics(o, batch_idx) for o in (out, changed))
    assert all(own[name] == other[name] for name in MEANS) and other[RANK].isnan()
    nothing_seen = diagnose.fusion_statistics(*output(share=-1))
    assert all(nothing_seen[name] == 0 for name in MEANS) and nothing_seen[RANK].isfinite()
    baseline = diagnose.fusion_statistics({**out, "clip_global": None}, batch_idx)
    assert baseline.keys() == {RANK}


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_pairwise_cosine_is_the_mean_over_all_pairs(n):
    torch.manual_seed(0)
    feats = torch.randn(n, 8) + 0.5
    matrix = F.cosine_similarity(feats[:, None], feats[None], dim=-1)
    pairs = matrix[~torch.eye(n, dtype=torch.bool)]
    assert diagnose.pairwise_cosine(feats).item() == pytest.approx(pairs.mean().item() if n > 1 else 0, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0 ** 16])
def test_term_statistics_equal_the_gradients_of_known_terms(scale):
    """Linear terms <a, f> and <b, f> have the gradients a and b; a constant one has none."""
    out, _ = output()
    out["feat_fusion"] = feats = out["feat_fusion"].detach().requires_grad_()
    out["feat_3d"] = feats.detach().clone()
    a, b = torch.randn(2, *feats.shape)
    terms = {"a": (a * feats).sum(), "b": (b * feats).sum(), "none": feats.new_zeros((), requires_grad=True) * 1}
    stats = {name: value.item() for name, value in diagnose.term_statistics(terms, out, scale).items()}
    total = (a + b).flatten()
    expected = {"grad_norm_a": a.norm(), "grad_norm_b": b.norm(), "grad_norm_none": 0, "share_none": 0,
                "cosine_a_b": F.cosine_similarity(a.flatten(), b.flatten(), 0), "cosine_a_none": 0, "drift": 0,
                "share_a": a.flatten() @ total / (total @ total), "share_b": b.flatten() @ total / (total @ total)}
    for name, value in expected.items():
        assert stats[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert stats["share_a"] + stats["share_b"] == pytest.approx(1)
    assert feats.grad is None
    sum(terms.values()).backward()  # the graph is still there
    moved = {**out, "feat_3d": feats.detach() / 3}
    assert diagnose.term_statistics({"a": (a * feats).sum()}, moved)["drift"].item() == pytest.approx(2, rel=1e-5)


# ---------------------------------------------------------------------------------------------- where it broke


class Tiny(torch.nn.Module):
    """Two layers and a function between them that may break backward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.middle = torch.nn.Identity()

    def forward(self, batch):
        return self.second(self.norm(self.middle(self.first(batch["points"]))))


def tiny_batch():
    return {"name": ["a", "b"], "points": torch.randn(6, 3), "batch": torch.tensor([0, 0, 0, 0, 1, 1])}


def tiny_losses(model):
    return lambda batch: {"mean": model(batch).mean(), "square": model(batch).square().mean()}


def found(model, batch, losses=None, scale=1.0):
    """The findings about a step of the tiny model, as text."""
    return [str(finding) for finding in diagnose.locate_nonfinite(model, batch, losses or tiny_losses(model), scale)]


def test_a_finite_step_has_no_finding_and_leaves_gradients_as_they_were():
    torch.manual_seed(0)
    model, batch = Tiny(), tiny_batch()
    assert found(model, batch) == []
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_input_is_named_with_its_sample(bad):
    model, batch = Tiny(), tiny_batch()
    batch["points"][4, 1] = bad
    findings = found(model, batch)
    assert "field 'points' of sample b holds 1 values" in findings[0] and "[4, 1] of (6, 3)" in findings[0]
    assert "module: first (Linear)" in findings[1] and "its input is not either" in findings[1]
    assert "loss: mean is nan" in findings[2]


def test_a_bad_weight_and_a_bad_buffer_are_named():
    model, batch = Tiny(), tiny_batch()
    with torch.no_grad():
        model.second.weight[0, 2] = math.nan
        model.norm.running_mean[1] = math.inf
    findings = found(model, batch)
    assert "weight: second.weight (1, 4) holds 1 values" in findings[0] and "norm.running_mean" in findings[1]
    assert "module: second (Linear)" in findings[2] and "its input is finite" in findings[2]


def test_a_gradient_alone_that_breaks_is_named_with_its_term_and_place():
    model, batch = Tiny(), tiny_batch()
    model.middle.forward = lambda x: x + (x - x).sqrt()  # value 0, slope inf
    findings = found(model, batch, lambda batch: {
        "whole": model(batch).square().mean(), "bias": model.second.bias.sum()})
    finding, = findings
    assert finding.startswith("gradient: of whole, first not finite at the output of module first")
    assert "at 2 of 6 weights" in finding


def test_a_loss_scale_that_overflows_is_named():
    model, batch = Tiny(), tiny_batch()
    losses = lambda batch: {"mean": model(batch).half().mean()}
    assert found(model, batch, losses) == []
    findings = found(model, batch, losses, scale=2.0 ** 17)
    assert findings[0].startswith("gradient: of mean, first not finite at the output of module second")
    assert "loss scale of 131072" in findings[0]


# ---------------------------------------------------------------------------------------------- the guard in a run


def broken_batches(monkeypatch, breaks, when=(1,)):
    """Calls breaks(batch) on the training batches of the given numbers, as the loader hands them out."""
    batches_for = train.batches_for

    def wrapped(model, training, **options):
        collate, numbers = batches_for(model, training, **options), itertools.count()

        def broken(samples):
            batch = collate(samples)
            if training and next(numbers) in when:
                breaks(batch)
            return batch
        return broken

    monkeypatch.setattr(train, "batches_for", wrapped)


def saved_steps(folder):
    return {int(re.search(r"bad_step_(\d+)", path.name)[1]): path for path in (folder / "runs").glob("*/bad_step_*.pt")}


def replayed(path, capsys, error=(FloatingPointError, RuntimeError)):
    """What a replay prints, and the message that it ends with."""
    capsys.readouterr()
    with pytest.raises(error) as caught:
        train.main(["--replay", str(path), "--device", "cpu"])
    return capsys.readouterr().out, str(caught.value)


def one_bad_step(folder):
    """Checks that step 1 was left out and all else went on; returns the file of that step and its findings."""
    state = checkpoint(folder)
    assert state["bad_steps"] == 1 and state["step"] == 4
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    events = scalars(folder)
    assert [e.value for e in events.Scalars("guard/bad_steps")] == [0, 1, 1, 1]
    assert "guard/text_summary" in events.Tags()["tensors"]
    (number, path), = saved_steps(folder).items()
    assert number == 1
    return path, torch.load(path, weights_only=True)["findings"]


def first_scale(monkeypatch, scale):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=scale, **kwargs))


FP16 = "--no-clip --amp fp16 --num-points 60 --voxel-size 0.5"  # slow on a CPU
RUN = "--clip-warmup=-1 --clip-weights 0,0.1 --no-instances --num-points 300"


def test_nan_in_one_image_is_named_skipped_and_replayed(tmp_path, monkeypatch, capsys):
    names = []

    def breaks(batch):
        batch["images"][1, 0, 2, 5, 7] = math.nan
        names.append(batch["name"][1])

    broken_batches(monkeypatch, breaks)
    train.main(small(tmp_path, RUN, "--cache none"))
    assert f"field 'images' of sample {names[0]}" in capsys.readouterr().out
    path, findings = one_bad_step(tmp_path)
    assert f"field 'images' of sample {names[0]} holds 1 values" in findings[0] and "[1, 0, 2, 5, 7]" in findings[0]
    assert "module: fusion.encoder_2d" in findings[1] and "loss: semantic is nan" in findings
    printed, message = replayed(path, capsys)
    assert all(finding in printed for finding in findings) and "nan" in message
    # with the image repaired the same step is finite
    state = torch.load(path, weights_only=True)
    state["batch"]["images"].nan_to_num_()
    torch.save(state, path)
    assert train.main(["--replay", str(path), "--device", "cpu"]) == []


def test_a_skipped_step_leaves_no_trace(tmp_path, monkeypatch):
    """Weights, statistics and counters as the next batch finds them are those that the broken one found."""
    build, models, states = train.build_model, [], []
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[-1])

    def look(batch):
        states.append({key: value.clone() for key, value in models[0].state_dict().items()})
        if len(states) == 1:
            batch["features"].fill_(math.nan)

    broken_batches(monkeypatch, look, when=(1, 2, 3))
    train.main(small(tmp_path, RUN, "--no-clip"))
    assert any("num_batches_tracked" in key for key in states[0])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_nan_in_one_color_is_named_in_a_compiled_network_too(tmp_path, monkeypatch):
    torch.compiler.reset()  # graphs of other tests count towards its limit
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    broken_batches(monkeypatch, lambda batch: batch["features"][400].fill_(math.nan))
    train.main(small(tmp_path, RUN, "--no-clip --compile"))
    path, findings = one_bad_step(tmp_path)
    batch = torch.load(path, weights_only=True)["batch"]
    assert f"field 'features' of sample {batch['name'][1]} holds 3 values" in findings[0]
    assert "module: fusion.encoder_3d.backbone.conv0p1s1" in findings[1]


def test_a_bad_batch_among_accumulated_ones_is_the_one_that_is_saved(tmp_path, monkeypatch):
    names = []

    def breaks(batch):
        batch["features"][7] = math.nan
        names.extend(batch["name"])

    broken_batches(monkeypatch, breaks, when=(3,))
    train.main(small(tmp_path, RUN, "--no-clip --batch-size 1 --grad-accum 2"))
    (step, path), = saved_steps(tmp_path).items()
    assert step == 1 and torch.load(path, weights_only=True)["batch"]["name"] == names


def test_a_step_that_a_full_disk_does_not_take_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def full(state, path):
        raise OSError(28, "No space left on device", str(path))

    broken_batches(monkeypatch, lambda batch: batch["features"].fill_(math.nan))
    monkeypatch.setattr("support.checkpoint.write_atomically", full)
    train.main(small(tmp_path, RUN, "--no-clip"))
    printed = capsys.readouterr().out
    assert "bad_step_1.pt': this file is not written" in printed and "step 1 is not finite" in printed
    assert "--replay" not in printed and ": not written; look" in printed and not saved_steps(tmp_path)


def test_a_broken_weight_stops_the_run_by_name_after_max_bad_steps(tmp_path, monkeypatch, capsys):
    build, factor, models = train.build_model, train.lr_factor, []
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[-1])

    def breaks(position, *rest):
        if position == 2:
            models[0].fusion.proj_3d[0].weight.data[3, 4] = math.nan
        return factor(position, *rest)

    monkeypatch.setattr(train, "lr_factor", breaks)
    monkeypatch.setattr(diagnose, "MAX_BAD_STEPS", 3)
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite(.|\n)*fusion.proj_3d.0.weight"):
        train.main(small(tmp_path, RUN, "--epochs 3 --no-clip"))
    steps = saved_steps(tmp_path)
    assert sorted(steps) == [2, 3, 4]
    monkeypatch.undo()
    printed, message = replayed(steps[2], capsys)
    assert "weight: fusion.proj_3d.0.weight (256, 96) holds 1 values" in printed
    assert "module: fusion.proj_3d.0 (Linear) is the first" in printed and "its input is finite" in printed


def test_the_fp16_scaler_may_search_for_its_scale_without_an_alarm(tmp_path, monkeypatch, capsys):
    first_scale(monkeypatch, 2.0 ** 20)
    train.main(small(tmp_path, RUN, "--epochs 5", FP16))
    state = checkpoint(tmp_path)
    assert state["bad_steps"] == 0 and 2 <= state["skipped_steps"] < 10 == state["step"]
    assert not saved_steps(tmp_path) and "is not finite" not in capsys.readouterr().out


def test_a_gradient_beyond_every_fp16_scale_is_named_with_its_term_and_place(tmp_path, monkeypatch, capsys):
    first_scale(monkeypatch, 4.0)
    forward = train.SemanticCriterion.forward
    monkeypatch.setattr(train.SemanticCriterion, "forward", lambda *args: forward(*args) * 1e15)
    monkeypatch.setattr(diagnose, "MAX_BAD_STEPS", 2)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        train.main(small(tmp_path, RUN, "--epochs 30", FP16))
    steps = saved_steps(tmp_path)
    assert sorted(steps) == [3, 4]  # 4, 2 and 1 are the scaler's own
    findings = torch.load(steps[3], weights_only=True)["findings"]
    assert "gradient: of semantic, first not finite at the output of module head" in findings[0]
    assert "loss scale of 0.5" in findings[0]
    printed, message = replayed(steps[3], capsys)
    assert findings[0] in printed and ("nan" in message or "gradient: of semantic" in message)


def test_a_file_that_is_no_saved_step_is_refused(tmp_path):
    path = tmp_path / "bad_step_1.pt"
    torch.save({"config": {}}, path)
    with pytest.raises(ValueError, match="bad_step_1.pt: .*field 'class_names' is missing"):
        train.main(["--replay", str(path)])


def test_diagnosis_is_written_every_k_steps_and_changes_nothing(trained, tmp_path):
    train.main(small(tmp_path, CLIP_ON, "--diagnose 2"))
    plain, diagnosed = checkpoint(trained[0])["model"], checkpoint(tmp_path)["model"]
    assert all(torch.equal(value, diagnosed[key]) for key, value in plain.items())
    tags = scalars(trained[0]).Tags()
    assert not any(tag.startswith("diagnose/") for tag in tags["scalars"] + tags["histograms"])
    events = scalars(tmp_path)
    names = {tag[9:] for tag in events.Tags()["scalars"] if tag.startswith("diagnose/")}
    terms = ("semantic", "instance", "clip")
    assert names == {f"{kind}_{term}" for kind in ("grad_norm", "share") for term in terms} | {
        "cosine_semantic_instance", "cosine_semantic_clip", "cosine_instance_clip", "effective_rank",
        "pairwise_cosine", "drift"} and "diagnose/gate" in events.Tags()["histograms"]
    values = {name: {e.step: e.value for e in events.Scalars(f"diagnose/{name}")} for name in names}
    for name, series in values.items():
        assert list(series) == ([4] if "clip" in name else [2, 4])  # the CLIP loss is off in the first epoch
        assert all(map(math.isfinite, series.values()))
    for step in (2, 4):
        assert sum(values[f"share_{term}"].get(step, 0) for term in terms) == pytest.approx(1, abs=1e-4)


def test_nan_on_one_of_two_processes_is_skipped_by_both_and_saved_by_the_one_that_has_it(tmp_path, monkeypatch):
    def breaks(batch):
        if os.environ["RANK"] == "1":
            batch["features"][3] = math.nan

    broken_batches(monkeypatch, breaks)
    options = small(tmp_path, "--no-clip --batch-size 1 --grad-accum 2 --num-points 300")
    done = in_two_processes(lambda: train.main(options))
    assert [status for status, _, _ in done] == [0, 0], done
    state = checkpoint(tmp_path)
    assert state["bad_steps"] == 1 and state["step"] == 2
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    path, = (tmp_path / "runs").glob("*/bad_step_*.pt")
    assert path.name == "bad_step_0_rank1.pt"
    assert "field 'features'" in torch.load(path, weights_only=True)["findings"][0]


@pytest.mark.parametrize("factor, options, message", [
    (3e20, "", "norm of large gradients overflowed"),  # every single gradient is finite
    (math.nan, FP16, "loss: semantic is nan")], ids=["overflow", "nan"])
def test_steps_that_stay_not_finite_end_the_run_with_their_cause(tmp_path, monkeypatch, factor, options, message):
    """Without a finite step in between, also under a scaler: this is no search for its scale."""
    forward = train.SemanticCriterion.forward
    monkeypatch.setattr(train.SemanticCriterion, "forward", lambda *args: forward(*args) * factor)
    monkeypatch.setattr(diagnose, "MAX_BAD_STEPS", 2)
    with pytest.raises(FloatingPointError, match=f"2 steps in a row were not finite(.|\n)*{message}"):
        train.main(small(tmp_path, RUN, "--no-clip", options))
    assert sorted(saved_steps(tmp_path)) == [0, 1]
