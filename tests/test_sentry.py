# SPDX-License-Identifier: MIT
"""The sentry in the loop: NaN is put into pictures, points, weights and the fp16 range, and has to be found there."""
import math
import re

import pytest
import torch

import train
from test_train import checkpoint, scalars, small, torchrun


def broken_batches(monkeypatch, breaks, when=(3,)):
    """Calls breaks(batch) on the training batches of the given numbers, as the loader hands them out."""
    count, collate = [0], train.collate

    def wrapper(samples):
        batch = collate(samples)
        if batch["name"][0].startswith("train"):
            if count[0] in when:
                breaks(batch)
            count[0] += 1
        return batch

    monkeypatch.setattr(train, "collate", wrapper)


def saved_steps(folder):
    return {int(re.search(r"bad_step_(\d+)", path.name)[1]): path for path in (folder / "runs").glob("*/bad_step_*.pt")}


def replayed(path, capsys, error=(FloatingPointError, RuntimeError)):
    """What a replay prints, and the message that it ends with."""
    capsys.readouterr()
    with pytest.raises(error) as caught:
        train.main(["--replay", str(path), "--device", "cpu"])
    return capsys.readouterr().out, str(caught.value)


def one_bad_step(folder, step=3):
    """Checks that one step was left out and all else went on; returns the file of that step and its findings."""
    state = checkpoint(folder)
    assert state["bad_steps"] == 1 and state["step"] == 8
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    events = scalars(folder)
    assert [e.value for e in events.Scalars("sentry/bad_steps")] == [float(s >= step) for s in range(8)]
    assert "sentry/text_summary" in events.Tags()["tensors"]
    (number, path), = saved_steps(folder).items()
    assert number == step
    return path, torch.load(path, weights_only=True)["findings"]


def first_scale(monkeypatch, scale):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=scale, **kwargs))


RUN = ["--epochs", "4", "--eval-every", "4", "--clip-warmup", "-1", "--clip-weights", "0,0.1", "--no-instances"]


def test_nan_in_one_picture_is_named_skipped_and_replayed(tmp_path, monkeypatch, capsys):
    names = []

    def breaks(batch):
        batch["images"][1, 0, 2, 5, 7] = math.nan
        names.append(batch["name"][1])

    broken_batches(monkeypatch, breaks)
    train.main(small(tmp_path, *RUN, "--clip-cache", "none"))
    assert f"field 'images' of sample {names[0]}" in capsys.readouterr().out
    path, findings = one_bad_step(tmp_path)
    assert f"field 'images' of sample {names[0]} holds 1 values" in findings[0] and "[1, 0, 2, 5, 7]" in findings[0]
    assert "module: fusion.encoder_2d" in findings[1] and "loss: semantic is nan" in findings
    printed, message = replayed(path, capsys)
    assert all(finding in printed for finding in findings) and "nan" in message
    # with the picture repaired the same step is finite
    state = torch.load(path, weights_only=True)
    state["batch"]["images"].nan_to_num_()
    torch.save(state, path)
    assert train.main(["--replay", str(path), "--device", "cpu"]) == []


def test_nan_in_one_colour_is_named_and_the_running_statistics_stay_clean(tmp_path, monkeypatch, capsys):
    broken_batches(monkeypatch, lambda batch: batch["colors"][1500].fill_(math.nan))
    train.main(small(tmp_path, *RUN))
    path, findings = one_bad_step(tmp_path)
    batch = torch.load(path, weights_only=True)["batch"]
    assert f"field 'colors' of sample {batch['name'][1]} holds 3 values" in findings[0]
    assert "module: fusion.encoder_3d.backbone.conv0p1s1" in findings[1]
    printed, message = replayed(path, capsys)
    assert all(finding in printed for finding in findings) and "nan" in message


def test_a_skipped_step_leaves_no_trace(tmp_path, monkeypatch):
    """Weights, statistics and counters as the next batch finds them are those that the broken one found."""
    build, models, states = train.build_model, [], []
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[-1])

    def look(batch):
        states.append({key: value.clone() for key, value in models[0].state_dict().items()})
        if len(states) == 1:
            batch["colors"].fill_(math.nan)

    broken_batches(monkeypatch, look, when=(3, 4, 5))
    train.main(small(tmp_path, *RUN, "--no-clip"))
    assert any("num_batches_tracked" in key for key in states[0])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_a_compiled_network_is_searched_uncompiled(tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))
    broken_batches(monkeypatch, lambda batch: batch["colors"][1500].fill_(math.nan))
    train.main(small(tmp_path, *RUN, "--no-clip", "--compile"))
    _, findings = one_bad_step(tmp_path)
    assert "field 'colors'" in findings[0] and "module: fusion.encoder_3d.backbone.conv0p1s1" in findings[1]


def test_a_norm_that_overflows_is_an_alarm_although_every_gradient_is_finite(tmp_path, monkeypatch):
    forward = train.SemanticCriterion.forward
    monkeypatch.setattr(train.SemanticCriterion, "forward", lambda *args: forward(*args) * 3e20)
    with pytest.raises(FloatingPointError, match="2 steps in a row(.|\n)*norm of large gradients overflowed"):
        train.main(small(tmp_path, *RUN, "--no-clip", "--points", "100", "--max-bad-steps", "2"))
    assert sorted(saved_steps(tmp_path)) == [0, 1]


def test_a_bad_batch_among_accumulated_ones_is_the_one_that_is_saved(tmp_path, monkeypatch):
    names = []

    def breaks(batch):
        batch["colors"][7] = math.nan
        names.extend(batch["name"])

    broken_batches(monkeypatch, breaks, when=(5,))
    train.main(small(tmp_path, *RUN, "--no-clip", "--batch-size", "1", "--accumulate", "4"))
    (step, path), = saved_steps(tmp_path).items()
    assert step == 1 and torch.load(path, weights_only=True)["batch"]["name"] == names


def test_a_broken_weight_stops_the_run_by_name_after_max_bad_steps(tmp_path, monkeypatch, capsys):
    build, factor, models = train.build_model, train.lr_factor, []
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[-1])

    def breaks(position, *rest):
        if position == 49:  # so the step after it, number 50, is the first bad one
            models[0].fusion.proj_3d[0].weight.data[3, 4] = math.nan
        return factor(position, *rest)

    monkeypatch.setattr(train, "lr_factor", breaks)
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite(.|\n)*fusion.proj_3d.0.weight"):
        train.main(small(tmp_path, *RUN, "--epochs", "30", "--eval-every", "30", "--points", "200", "--no-clip",
                         "--max-bad-steps", "3", "--log-every", "100"))
    steps = saved_steps(tmp_path)
    assert sorted(steps) == [50, 51, 52]
    monkeypatch.undo()
    printed, message = replayed(steps[50], capsys)
    assert "weight: fusion.proj_3d.0.weight (256, 96) holds 1 values" in printed
    assert "module: fusion.proj_3d.0 (Linear) is the first" in printed and "its input is finite" in printed


def test_the_fp16_scaler_may_search_for_its_scale_without_an_alarm(tmp_path, monkeypatch, capsys):
    first_scale(monkeypatch, 2.0 ** 30)
    train.main(small(tmp_path, *RUN, "--epochs", "10", "--eval-every", "10", "--no-clip", "--points", "100",
                     "--amp", "fp16"))
    state = checkpoint(tmp_path)
    assert state["bad_steps"] == 0 and 5 <= state["skipped_steps"] < 20 == state["step"]
    assert not saved_steps(tmp_path) and "is not finite" not in capsys.readouterr().out


def test_a_gradient_beyond_every_fp16_scale_is_named_with_its_term_and_place(tmp_path, monkeypatch, capsys):
    first_scale(monkeypatch, 4.0)
    forward = train.SemanticCriterion.forward
    monkeypatch.setattr(train.SemanticCriterion, "forward", lambda *args: forward(*args) * 1e15)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        train.main(small(tmp_path, *RUN, "--epochs", "30", "--eval-every", "30", "--no-clip", "--points", "100",
                         "--amp", "fp16", "--max-bad-steps", "2"))
    steps = saved_steps(tmp_path)
    assert sorted(steps) == [3, 4]  # 4, 2 and 1 are the scaler's own
    findings = torch.load(steps[3], weights_only=True)["findings"]
    assert "gradient: of semantic, first not finite at the output of module head" in findings[0]
    assert "loss scale of 0.5" in findings[0]
    printed, message = replayed(steps[3], capsys)
    assert findings[0] in printed and ("nan" in message or "gradient: of semantic" in message)


def test_a_file_that_is_no_saved_step_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="bad_step_1.pt does not exist"):
        train.main(["--replay", str(tmp_path / "bad_step_1.pt")])
    torch.save({"config": {}}, tmp_path / "bad_step_1.pt")
    with pytest.raises(ValueError, match="bad_step_1.pt: .*field 'class_names' is missing"):
        train.main(["--replay", str(tmp_path / "bad_step_1.pt")])


def test_the_baseline_without_gates_may_be_diagnosed(tmp_path):
    train.main(small(tmp_path, "--epochs", "1", "--no-clip", "--diagnose", "1"))
    assert scalars(tmp_path).Scalars("diagnose/share_instance")


def test_diagnosis_is_written_every_k_steps_and_changes_nothing(tmp_path):
    ends = {}
    for k in (0, 2):
        train.main(small(tmp_path / str(k), "--epochs", "2", "--clip-warmup", "-1", "--clip-weights", "0,0.1",
                         "--diagnose", str(k), "--clip-cache", str(tmp_path / "clip")))
        ends[k] = checkpoint(tmp_path / str(k))["model"]
    assert all(torch.equal(value, ends[2][key]) for key, value in ends[0].items())
    tags = scalars(tmp_path / "0").Tags()
    assert not any(tag.startswith("diagnose/") for tag in tags["scalars"] + tags["histograms"])
    events = scalars(tmp_path / "2")
    names = {tag[9:] for tag in events.Tags()["scalars"] if tag.startswith("diagnose/")}
    terms = ("semantic", "instance", "clip")
    assert names == {f"{kind}_{term}" for kind in ("grad_norm", "share") for term in terms} | {
        "cosine_semantic_instance", "cosine_semantic_clip", "cosine_instance_clip", "effective_rank",
        "pairwise_cosine", "drift"} and "diagnose/gate" in events.Tags()["histograms"]
    values = {name: [(e.step, e.value) for e in events.Scalars(f"diagnose/{name}")] for name in names}
    assert all([step for step, _ in series] == [2, 4] for series in values.values())
    assert all(math.isfinite(value) for series in values.values() for _, value in series)
    for i in range(2):
        assert sum(values[f"share_{term}"][i][1] for term in terms) == pytest.approx(1, abs=1e-4)


def test_nan_on_one_of_two_processes_is_skipped_by_both_and_saved_by_the_one_that_has_it(tmp_path):
    code = ("collate, count = train.collate, [0]\n"
            "def breaks(samples):\n"
            "    batch = collate(samples)\n"
            "    count[0] += batch['name'][0].startswith('train')\n"
            "    if count[0] == 4 and os.environ['RANK'] == '1':\n"
            "        batch['colors'][3] = float('nan')\n"
            "    return batch\n"
            "train.collate = breaks\n"
            "train.main(sys.argv[1:])\n")
    done = torchrun(tmp_path, code, small(tmp_path, "--epochs", "8", "--eval-every", "8", "--no-clip", "--batch-size",
                                          "1", "--accumulate", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    state = checkpoint(tmp_path)
    assert state["bad_steps"] == 1 and state["step"] == 8
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    path, = (tmp_path / "runs").glob("*/bad_step_*.pt")
    assert path.name == "bad_step_1_rank1.pt"
    assert "field 'colors'" in torch.load(path, weights_only=True)["findings"][0]
