# SPDX-License-Identifier: MIT
"""train.py, run in process on a few small frames: what it writes, repeats, resumes, isolates and refuses."""
import importlib.util
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import check
import encoder
import evaluate
import model as model_file
import predict
import train
from encoder import Enhanced2DEncoder
from fusion import FusionGate
from helpers import (CLIP_ON, POSE, ROOT, SHARED_CACHE, TOWER, Forked, StopAt, checkpoint, in_two_processes,
                     last_checkpoint, refused, rendered, scalars, small, try_lock, write_rooms_as_scannet,
                     write_scannet)
from losses import ClipConsCriterion, clip_loss_weight
from sources.rooms import CLASSES, RoomFrames
from sources.scannet import ScanNetFrames
from support.runtime import StopRequest, run_command
from test_scannet import write_scan

pytestmark = pytest.mark.usefixtures("quick_runs")
RESUME = ["--device", "cpu", "--cache", SHARED_CACHE.name]


def test_a_run_writes_finite_scalars_images_and_checkpoints_and_every_tag_is_documented(trained):
    folder, metrics = trained
    assert 0 <= metrics["miou"] <= 1 and 0 <= metrics["ap50"] <= 1
    events = scalars(folder)
    tags = events.Tags()
    assert {"loss/total", "loss/semantic", "weighted/semantic", "loss/clip", "weighted/clip", "loss/instance_dice",
            "clip/weight", "clip/clamped_entries", "clip/nonfinite_rows", "grad/total", "grad/encoder_3d",
            "grad/fusion", "fusion/gate_mean", "fusion/effective_rank", "speed/data_wait", "guard/bad_steps",
            "val/miou", "val/ap50"} <= set(tags["scalars"])
    kinds = {"image", "input_points", "truth", "prediction", "instances", "instances_truth", "gate", "fused_pca",
             "clip_pca"}
    samples = {tag.split("/")[0] for tag in tags["images"]}
    assert set(tags["images"]) == {f"{sample}/{kind}" for sample in samples for kind in kinds} and len(samples) == 2
    assert {"truth/val0000_VERTEX", "gate/val0000_COLOR", "clip_pca/val0000_COLOR"} <= set(tags["tensors"])
    values = {tag: [e.value for e in events.Scalars(tag)] for tag in tags["scalars"]}
    undefined = {tag for tag in values if tag.startswith("val_iou/")}  # NaN: a class that the few frames do not show
    assert all(torch.tensor(values[tag]).isfinite().all() for tag in values.keys() - undefined)

    cells = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "tensorboard.md").read_text(), re.M)
    patterns = [re.sub(r"<[a-z]+>", ".+", tag) for cell in cells for tag in re.findall("`([^`]+)`", cell)]
    for tag in [*tags["scalars"], *kinds]:
        assert any(re.fullmatch(pattern, tag) for pattern in patterns), f"{tag} is not in docs/tensorboard.md"
    for name in ("best.pt", "last.pt"):
        state = checkpoint(folder, name)
        assert not any("clip" in key and "trainable" not in key for key in state["model"])
    assert not list((folder / "runs").glob("*/*.tmp"))


def test_the_total_is_the_sum_of_the_weighted_terms_and_these_are_weight_times_raw(trained):
    events = scalars(trained[0])
    args = train.parse_args(small(trained[0], CLIP_ON))
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    terms = [tag.partition("/")[2] for tag in logged if tag.startswith("weighted/")]
    for step, total in logged["loss/total"].items():
        weights = train.loss_weights(args, (step - 1) // 2)
        own = {term: logged[f"weighted/{term}"][step] for term in terms if step in logged[f"weighted/{term}"]}
        assert total == pytest.approx(sum(own.values()), rel=1e-5)
        for term, weighted in own.items():
            assert weighted == pytest.approx(weights[term] * logged[f"loss/{term}"][step], rel=1e-5)


def test_eval_and_the_resuming_of_a_finished_run_print_the_table_with_the_metrics_of_the_training(trained, capsys):
    folder, metrics = trained
    path = str(last_checkpoint(folder))
    for options in (["--eval", path], ["--resume", path], ["--resume", path, "--epochs", "1"]):
        again = train.main([*options, *RESUME])
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("IoU", "AP50", "bookshelf"))
        assert again["miou"] == metrics["miou"] and again["ap50"] == pytest.approx(metrics["ap50"], nan_ok=True)


def test_the_logged_clip_weight_is_the_schedule_at_every_step_also_with_accumulation(tmp_path):
    train.main(small(tmp_path, "--epochs 4 --grad-accum 2 --no-instances --num-points 100 "
                     "--clip-warmup 0,2 --clip-weights 0,0.5,0.25"))
    events = scalars(tmp_path)
    weights = [e.value for e in events.Scalars("clip/weight")]
    assert weights == [clip_loss_weight(epoch, (0, 2), (0, 0.5, 0.25)) for epoch in range(4)]
    assert [e.step for e in events.Scalars("loss/clip")] == [2, 3, 4]  # not computed while its weight is 0


def test_a_warm_cache_spares_the_tower_and_an_isolated_clip_loss_trains_bit_exactly_as_none(
        trained, tmp_path, monkeypatch):
    encode = Enhanced2DEncoder.encode

    def only_to_learn_the_shapes(self, images):
        assert not images.any(), "the tower saw an image"
        return encode(self, images)

    def never(*args):
        raise AssertionError("called")

    monkeypatch.setattr(Enhanced2DEncoder, "encode", only_to_learn_the_shapes)
    monkeypatch.setattr(ClipConsCriterion, "forward", never)
    monkeypatch.setattr(Enhanced2DEncoder, "project_dense_target", never)
    train.main(small(tmp_path / "none", "--clip-weights 0,0,0"))
    train.main(small(tmp_path / "isolated", "--isolate-clip --clip-weights 1,1,1 --clip-target point"))
    none, isolated, with_loss = (checkpoint(folder)["model"]
                                 for folder in (tmp_path / "none", tmp_path / "isolated", trained[0]))
    assert all(torch.equal(isolated[key], none[key]) for key in none)
    assert any(not torch.equal(with_loss[key], none[key]) for key in none)
    assert "loss/clip" not in scalars(tmp_path / "isolated").Tags()["scalars"]


def test_cached_and_uncached_runs_train_alike_up_to_half_precision(tmp_path):
    curves = []
    for cache in (str(tmp_path / "cache"), "none"):
        name = Path(cache).name
        train.main(small(tmp_path / name, f"--cache {cache} --no-instances --clip-warmup=-1 --clip-weights 0,0.1"))
        curves.append([e.value for e in scalars(tmp_path / name).Scalars("loss/total")])
    assert len(curves[0]) == 4 and curves[0] == pytest.approx(curves[1], rel=2 ** -11)


# ---------------------------------------------------------------------------------------------- stopping and resuming


def same_weights(one, two):
    one, two = checkpoint(one), checkpoint(two)
    return all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])


@pytest.mark.parametrize("variant, target, step", [("sigmoid", "global", 5), ("infonce", "point", 6)])
def test_a_run_stopped_inside_an_epoch_goes_on_bit_exactly(tmp_path, capsys, variant, target, step):
    """3 steps per epoch: step 5 is inside one, step 6 ends one, before its evaluation."""
    options = (f"--eval-every 1 --clip-warmup=-1 --clip-weights 0,0.1 --clip-loss {variant} --clip-target {target} "
               "--rooms 3 --num-points 300")
    metrics = train.main(small(tmp_path / "straight", options))
    with pytest.raises(SystemExit) as left:
        train.main(small(tmp_path / "stopped", options), stop=StopAt(step))
    assert left.value.code == 128 + signal.SIGTERM
    path = last_checkpoint(tmp_path / "stopped")
    assert f"go on with: python train.py --resume {path}" in capsys.readouterr().out
    assert checkpoint(tmp_path / "stopped")["step"] == step
    resumed = train.main(["--resume", str(path), *RESUME])
    assert f"goes on with epoch 1, step {step - 3} of 3" in capsys.readouterr().out
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")
    assert resumed["miou"] == metrics["miou"]
    curves = [[(e.step, e.value) for e in scalars(tmp_path / name).Scalars("loss/total")]
              for name in ("straight", "stopped")]
    assert curves[0] == curves[1]
    best = [checkpoint(tmp_path / name, "best.pt") for name in ("straight", "stopped")]
    assert best[0]["epoch"] == best[1]["epoch"] and best[0]["best"] == best[1]["best"]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.01)


def as_command(arguments):
    """What `python train.py` does."""
    run_command(lambda: train.main(arguments, stop=StopRequest().install()))


def torchrun(arguments):
    """`torchrun --nproc-per-node 2 train.py`, with forks in the place of new interpreters."""
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", max_restarts=0,
                          start_method="fork")
    elastic_launch(config, as_command)(arguments)


@pytest.mark.parametrize("start, more, status, run", [
    (as_command, "--workers 1", 128 + signal.SIGTERM, lambda train: train()),
    (torchrun, "--workers 0", 1, in_two_processes),
    (torchrun, "--sync-bn off", 1, in_two_processes)], ids=["one process", "torchrun", "norms of each process"])
def test_sigterm_saves_ends_and_resumes_bit_exactly(tmp_path, monkeypatch, start, more, status, run):
    options = f"--no-clip --no-instances --batch-size 1 --num-points 100 {more}"
    step, stopped = train.train_step, tmp_path / "stopped"

    def until_the_signal(*args):
        stop = args[-1]
        if list(stopped.glob("runs/*/last.pt")):
            wait_for(lambda: stop.signum)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", until_the_signal)
        patch.setitem(train.CONSTANTS, "save_every", 2)
        process = Forked(lambda: start(small(stopped, options)))
    wait_for(lambda: list(stopped.glob("runs/*/last.pt")) or not process.process.is_alive())
    process.process.terminate()
    left, printed, errors = process.wait()
    assert left == status and "go on with: python train.py --resume" in printed, errors
    assert checkpoint(stopped)["step"] == 3  # of 4 in two processes, of 8 in one
    resume = ["--resume", str(last_checkpoint(stopped)), *RESUME]
    for arguments in (resume, small(tmp_path / "straight", options)):
        run(lambda: train.main(arguments))
    assert checkpoint(tmp_path / "straight")["epoch"] == 2
    if more == "--sync-bn off":  # saving averages the running statistics, which rounds them
        models = [checkpoint(folder)["model"] for folder in (tmp_path / "straight", stopped)]
        statistics = [{key: model.pop(key) for key in list(model) if "running_" in key} for model in models]
        torch.testing.assert_close(*statistics, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*models, rtol=0, atol=0)
    else:
        assert same_weights(tmp_path / "straight", stopped)
    assert not list(stopped.glob("runs/*/*.tmp"))


@pytest.mark.parametrize("armed, printed, status", [(False, "", 130), (True, "alive\n", 143)])
def test_a_second_signal_ends_a_run_at_once_and_the_first_one_during_set_up(armed, printed, status):
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
        stop = StopRequest().install()
        stop.armed = armed
        os.kill(os.getpid(), signal.SIGINT)
        print("alive")
        os.kill(os.getpid(), signal.SIGTERM)
        print("alive")

    assert Forked(run).wait() == (status, printed, "")


def test_the_folder_of_a_run_is_locked_while_it_trains_and_after_it_resumed(tmp_path, monkeypatch):
    step, seen = train.train_step, []

    def look(*args):
        folder, = (tmp_path / "runs").iterdir()
        seen.append(try_lock(folder))
        return step(*args)

    monkeypatch.setattr(train, "train_step", look)
    train.main(small(tmp_path, "--no-clip --no-instances --epochs 1 --num-points 100"))
    train.main(["--resume", str(last_checkpoint(tmp_path)), "--epochs", "2", *RESUME])
    assert len(seen) == 4 and all(f"in use by process {os.getpid()}" in answer for answer in seen)


def test_last_is_written_once_per_epoch_or_every_n_steps(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(train, "write_or_warn", lambda state, path, warn: written.append(
        (path.name, state["epoch"], state["next_step"])))
    options = "--no-clip --no-instances --rooms 3 --num-points 100"
    train.main(small(tmp_path / "a", options))
    assert written == [("last.pt", 1, 0), ("best.pt", 2, 0), ("last.pt", 2, 0)]
    written.clear()
    monkeypatch.setitem(train.CONSTANTS, "save_every", 2)
    train.main(small(tmp_path / "b", options))
    assert [entry for entry in written if entry[2]] == [("last.pt", 0, 2), ("last.pt", 1, 1), ("last.pt", 1, 3)]


def test_options_given_on_resuming_take_effect(tmp_path, capsys):
    train.main(small(tmp_path, "--eval-every 1 --no-clip --no-instances --batch-size 1 --num-points 100"))
    path = last_checkpoint(tmp_path)
    train.main(["--resume", str(path), "--epochs", "3", "--batch-size", "4", "--amp", "fp16", "--lr-3d", "0.1",
                *RESUME])
    assert re.search(r"learning rate goes on from 0 to \S+: ", capsys.readouterr().out)
    groups = checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert {(g["weight_decay"], g["lr_mult"]) for g in groups} == {(0.05, 0.1), (0, 0.1), (0.05, 1), (0, 1)}
    steps = [event.step for event in scalars(tmp_path).Scalars("val/miou")]
    assert steps == [4, 8, 9]  # what was logged before is kept


# ---------------------------------------------------------------------------------------------- variants of a run


def test_compiled_parts_train_as_plain_ones(tmp_path, monkeypatch, caplog):
    """With the tracer alone: the C++ behind it takes minutes."""
    torch.compiler.reset()  # graphs of other tests count towards its limit
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f.__self__) or compile(
        f, backend="eager", **options))
    ends = []
    for more in ([], ["--compile"]):
        train.main(small(tmp_path / str(len(more)), "--epochs 1 --cache none", *more))
        ends.append(checkpoint(tmp_path / str(len(more)))["model"])
    assert any(isinstance(module, FusionGate) for module in compiled)
    assert sum("Block" in type(module).__name__ for module in compiled) == 2  # those of the tower
    assert ends[0].keys() == ends[1].keys() and "limit" not in caplog.text
    plain, traced = ([e.value for e in scalars(tmp_path / name).Scalars("loss/total")] for name in "01")
    assert traced == pytest.approx(plain, rel=1e-5)


def test_the_baseline_builds_no_tower_and_cubes_stand_in_for_superpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "Enhanced2DEncoder", None)
    monkeypatch.setattr(train, "SuperpointCache", lambda *args: None)
    metrics = train.main(small(tmp_path, "--no-clip --epochs 1"))
    assert 0 <= metrics["miou"] <= 1 and 0 <= metrics["ap25"] <= 1


def test_missing_weights_warn_loudly_on_the_rooms_and_stop_on_own_data(tmp_path, monkeypatch, capsys):
    load = encoder.load_clip

    def no_network(name, pretrained):
        if pretrained is not None:
            raise FileNotFoundError(f"{name}/{pretrained} could not be loaded")
        return load(name, pretrained)

    monkeypatch.setattr(encoder, "load_clip", no_network)
    options = small(tmp_path, "--clip-pretrained openai --epochs 1 --no-instances --num-points 100")
    metrics = train.main(options)
    assert metrics["miou"] >= 0 and "RANDOMLY INITIALISED" in capsys.readouterr().out
    state = checkpoint(tmp_path)
    assert "RANDOMLY INITIALISED" in state["warnings"][0] and state["config"]["clip_pretrained"] == "none"
    assert "warning/text_summary" in scalars(tmp_path).Tags()["tensors"]
    train.main(["--resume", str(last_checkpoint(tmp_path)), "--epochs", "2", *RESUME])
    assert checkpoint(tmp_path)["warnings"][0] == state["warnings"][0]
    assert "note: CLIP IS RANDOMLY" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="could not be loaded .--clip-pretrained, --clip-model"):
        train.main([*options, "--data", str(tmp_path), "--train-split", "t.txt", "--val-split", "v.txt"])


@pytest.mark.parametrize("options, expected", [
    ("--epochs 11", False), ("--epochs 12", True), ("--epochs 12 --no-clip", False), ("--isolate-clip", False),
    ("--epochs 24 --clip-warmup 2 --clip-weights 0.01,0", True),
    ("--epochs 3 --clip-warmup=-1 --clip-weights 0,1", True)])
def test_a_clip_loss_that_no_epoch_has_is_noticed(options, expected):
    assert train.trains_clip_loss(train.parse_args(options.split())) == expected


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_steps_under_autocast_are_finite(tmp_path, amp):
    train.main(small(tmp_path, f"--amp {amp} --epochs 3 --batch-size 1 --num-points 60 --voxel-size 0.5 "
                     "--clip-warmup 0,1 --clip-weights 0.01,0.05,0.05"))
    events = scalars(tmp_path)
    skipped = events.Scalars("amp/skipped_steps")[-1].value
    assert skipped < (12 if amp == "fp16" else 1)  # the scaler looks for its scale
    for tag in ("loss/total", "loss/clip"):
        values = torch.tensor([e.value for e in events.Scalars(tag)])
        assert len(values) == checkpoint(tmp_path)["step"] == 12 and values.isfinite().all()
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["model"].values())


def test_every_trainable_parameter_gets_a_gradient_and_is_in_one_group():
    args = train.parse_args(small(Path("unused"), "--clip-blocks 1"))
    model = model_file.build_model(vars(args), 5, True, model_file.build_tower(vars(args)))
    groups = train.parameter_groups(model, args)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {(group["name"], group["lr_mult"]) for group in groups} == {
        ("encoder_3d", 1.0), ("clip", 0.01), ("fusion", 1.0), ("head", 1.0)}
    frozen = {id(p) for p in model.fusion.encoder_2d.clip.parameters() if not p.requires_grad}
    assert frozen and not frozen & set(grouped)


def test_the_schedule_warms_up_and_ends_at_zero():
    factors = [train.lr_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0, abs=1e-12)
    assert max(factors) <= 1 and all(a >= b for a, b in zip(factors[10:], factors[11:]))


# ---------------------------------------------------------------------------------------------- options

WRONG = [
    ("--clip-warmup 20,10", "must ascend"), ("--clip-warmup ten", "separated by commas"),
    ("--clip-weights 0,1", "one entry less"), ("--clip-weights 0,nan,1", "finite"),
    ("--image-size 224", "height,width"), ("--image-size 0,224", "at least 1"),
    ("--image-size 99999,224", "at most 2048"), ("--image-size 100,128", "multiples of the patch"),
    ("--clip-loss infonce --batch-size 1", "--batch-size 2 or more"), ("--amp fp8", "invalid choice"),
    ("--diagnose 1 --compile", "--compile does not allow"), ("--diagnose -1", "at least 0"),
    ("--voxel-size 0.0001", "at least 0.001"), ("--lr inf", "above 0"), ("--epochs 1.5", "expected a number"),
    ("--up up", "up must be one of"), ("--clip-mean-std 0.5,0.5", "3 means"), ("--moon", "unrecognized arguments"),
    ("--resume a.pt --eval b.pt", "not allowed with"), ("--eval a.pt --replay b.pt", "not allowed with"),
    ("--scans scans", "holds only points"), ("--label-map x.tsv", "take no --classes, --label-map"),
    ("--train-split x", "take no --classes"),
    ("--init-3d x.pt", "x.pt does not exist"), ("--data folder", "--train-split"),
    ("--data folder --train-split t --val-split v", "folder does not exist"),
    ("--clip-model ViT-X", "is unknown to open_clip"), ("--clip-pretrained moon", "not a tag of"),
    ("--clip-blocks 99", "trainable_blocks=99"), ("--num-views 9", "fewer than num_views=9"),
    ("--eval missing.pt", "missing.pt does not exist"), ("--replay missing.pt", "missing.pt does not exist"),
    ("--resume missing.pt", "missing.pt does not exist"), ("--resume text.pt", "text.pt: not a checkpoint"),
    ("--runs text.pt", "not a folder that can be written to"), ("--cache text.pt/a", "not a folder"),
    ("--runs /proc/x", "/proc is not a folder that can be written to"), ("--workers 100000", "at most 256"),
    ("--seed 99999999999999999999", "at most 9223372036854775807"), ("--rooms 99999999999", "at most 1000000"),
    ("--clip-pretrained text.pt --clip-mean-std 0,0,0,1,1,1", "is it a file of weights of this model?"),
    ("--device cuda:99", "cuda"), ("--device moon", "moon")]


@pytest.mark.parametrize("options, message", WRONG, ids=[options for options, _ in WRONG])
def test_a_wrong_command_is_one_line_and_status_2_and_writes_nothing(tmp_path, monkeypatch, options, message, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("not a checkpoint")
    given = small(tmp_path, "--cache cache", options)
    with pytest.raises(SystemExit) as left:
        run_command(lambda: train.main(given))
    captured = capsys.readouterr()
    assert left.value.code == 2 and message in captured.err and captured.err.count("\n") == 1, captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


def test_help_names_every_option_with_a_meaning_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    options = vars(train.build_parser().parse_args([]))
    assert len(options) <= 61 and printed.count("(default: ") == len(options)  # not shown without a meaning
    for name, default in options.items():
        assert f"--{name.replace('_', '-')}" in printed and f"(default: {default})" in printed


def test_the_config_of_a_checkpoint_names_no_place_to_write_and_is_checked(trained, capsys):
    state = checkpoint(trained[0])
    assert not {"runs", "cache", "name", "device", "resume", "replay"} & set(state["config"])
    config = {key: state["config"][key] for key in vars(train.parse_args([])) if key in state["config"]}
    assert len(config) > 40
    args = train.parse_args([], {**config, "runs": "/", "cache": "/", "device": "cuda"})
    assert (args.runs, args.cache, args.device) == ("runs", ".cache", None)
    assert {key: value for key, value in vars(args).items() if key in config} == config
    given = {**config, "clip_mean_std": ((0.5, 0.4, 0.3), (0.25, 1e-3, 1.0)), "clip_warmup": (-1,),
             "clip_weights": (0.0, 0.1)}
    args = train.parse_args([], given)
    assert {key: value for key, value in vars(args).items() if key in given} == given
    for key, value in {"lr": "fast", "batch_size": -1, "amp": "fp8", "image_size": (1,)}.items():
        with pytest.raises(SystemExit):
            train.parse_args([], {**config, key: value})
        assert f"--{key.replace('_', '-')}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- own data


def test_own_frames_train_and_what_is_wrong_with_them_ends_the_run_before_anything_is_written(tmp_path):
    options = write_rooms_as_scannet(tmp_path / "own", 2, 2, (96, 128))
    metrics = train.main(small(tmp_path / "good", options, "--epochs 1"))
    assert 0 <= metrics["miou"] <= 1 and 0 <= metrics["ap25"] <= 1

    (tmp_path / "own" / "classes.txt").write_text("1 wall\n")
    with refused(r"label-filt/\d.png: label \d+ is not in the class list"):
        train.main(small(tmp_path, options))
    (tmp_path / "own" / "val.txt").write_text((tmp_path / "own" / "train.txt").read_text())
    with refused("train0000/. is in two splits"):
        train.main(small(tmp_path, options))
    assert not (tmp_path / "runs").exists()


def test_wrong_cameras_are_refused_unless_one_insists(tmp_path):
    options = f"{write_rooms_as_scannet(tmp_path / 'own', 3, 6, (60, 80))} --epochs 1 --no-clip --no-instances"
    for path in (tmp_path / "own").glob("*/pose/*.txt"):
        np.savetxt(path, np.linalg.inv(np.loadtxt(path)))
    with pytest.raises(ValueError, match="pose inverted: .*check.py .*--no-check insists"):
        train.main(small(tmp_path, options))
    assert not (tmp_path / "runs").exists()
    assert train.main(small(tmp_path, options, "--no-check"))["miou"] >= 0


def test_a_second_start_on_unchanged_frames_reads_no_more_than_its_first_batch(tmp_path, monkeypatch):
    options = write_rooms_as_scannet(tmp_path / "own", 4, 3, (60, 80))
    options += f" --cache {tmp_path}/cache --epochs 1 --clip-warmup=-1 --clip-weights 0,0.01"
    read, reader = [], ScanNetFrames.__getitem__
    monkeypatch.setattr(ScanNetFrames, "__getitem__", lambda self, i: read.append(i) or reader(self, i))

    class AtFirstStep(ClipConsCriterion):
        def forward(self, *args):
            raise KeyboardInterrupt

    for start in range(2):
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            train.main(small(tmp_path / str(start), options), AtFirstStep(1.0))
        # one frame per split tells whether there are instances, and two make the batch
        assert len(read) == 4 if start else len(read) >= 14


def test_whole_scans_train_with_posed_views(tmp_path, monkeypatch):
    """Points from two scans of 40 segments in front of the cameras, images from exported frames without labels."""
    monkeypatch.setattr(train, "visualize", evaluate.visualize)
    frames, rng = write_scannet(tmp_path / "frames", scenes=2, frames=3, labels=False), np.random.default_rng(0)
    segments = np.arange(800) // 20
    for scene in range(2):
        camera = np.column_stack([rng.uniform(-1, 1, (800, 2)), rng.uniform(1, 3, 800)])
        points = (camera @ POSE[:3, :3].T + POSE[:3, 3]).astype(np.float32)
        write_scan(tmp_path / "scans", f"scene{scene:04d}_00", points, rng.integers(0, 256, (800, 3)),
                   np.where(segments % 2, 1, 5), segments.tolist(),
                   [(0, "wall", list(range(1, 40, 2))), (1, "chair", list(range(0, 20, 2))),
                    (2, "chair", list(range(20, 40, 2)))])
    for name, text in (("classes", "1 wall\n5 chair\n* unlabeled\n"), ("train", "scene0000_00\n"),
                       ("val", "scene0001_00/0\nscene0001_00/2\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    metrics = train.main(small(
        tmp_path, f"--data {frames} --scans {tmp_path}/scans --classes {tmp_path}/classes.txt --num-views 2 "
        f"--train-split {tmp_path}/train.txt --val-split {tmp_path}/val.txt --epochs 1 --no-check "
        "--clip-warmup=-1 --clip-weights 0,0.1"))
    assert len(metrics["iou"]) == 2 and metrics["miou"] > 0 and 0 <= metrics["ap25"] <= 1
    events = scalars(tmp_path)
    assert 0 < events.Scalars("fusion/valid_share")[-1].value <= 1
    assert torch.tensor(events.Scalars("loss/clip")[-1].value).isfinite()
    assert {tag.split("/")[1] for tag in events.Tags()["images"]} >= {"instances", "other_view"}


@pytest.fixture
def own_data_set(tmp_path, monkeypatch):
    """The data set that docs/data.md adds, with built-in rooms as its files -> what names it and its splits."""
    page = (ROOT / "docs" / "data.md").read_text()
    source, line = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "MyFrames" in code)
    frames = RoomFrames("train", 3, 4, size=(60, 80))
    for index, name in enumerate(frames.names):
        path = tmp_path / "mine" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = {key: value for key, value in frames[index].items() if key != "name"}
        ceiling = frame["label"] == 2  # one class with all objects, and an object like them
        instance = np.where(ceiling, 500, frame["instance"])
        np.savez(path, **{**frame, "label": np.minimum(frame["label"], 2), "instance": instance})
    for split, names in (("train", frames.names[:8]), ("val", frames.names[8:])):
        (tmp_path / f"{split}.txt").write_text("\n".join(names))

    text = (ROOT / "sources" / "open.py").read_text()
    first = '    if data == "rooms":\n'
    assert text.count(first) == 1
    text = source + text.replace(first, line.replace("FOLDER", str(tmp_path / "mine")) + first)
    (tmp_path / "open.py").write_text(text)
    spec = importlib.util.spec_from_file_location("open_with_mine", tmp_path / "open.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for command in (train, predict, check):
        monkeypatch.setattr(command, "open_frames", module.open_frames)
    return f"mine --train-split {tmp_path}/train.txt --val-split {tmp_path}/val.txt"


def test_a_data_set_added_as_the_docs_say_is_trained_predicted_and_checked(own_data_set, tmp_path):
    assert check.main(own_data_set.split()) == 0
    metrics = train.main(small(tmp_path, "--data", own_data_set, "--epochs 1"))
    assert len(metrics["iou"]) == 3 and metrics["miou"] > 0 and "ap" in metrics
    command = f"{last_checkpoint(tmp_path)} --data mine --split {tmp_path}/val.txt --out {tmp_path}/out"
    summary = predict.main([*command.split(), "--device", "cpu"])
    assert summary["frames"] == 4 and "wall" in summary["share_of_points"]
    assert summary["scores"]["every pixel"]["miou"] > 0


class Toy(torch.nn.Module):
    """A backbone of one layer."""

    out_channels = 96

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(6, 96)

    def forward(self, batch):
        return self.mlp(torch.cat([batch["coords"], batch["features"]], 1))


class FewestFields(list):
    """The least that a data set needs: class names, and frame dicts in a list."""

    class_names = CLASSES


def test_another_backbone_and_the_least_of_a_data_set_train(tmp_path, monkeypatch):
    frames = [{key: value for key, value in frame.items() if key != "instance"}
              for frame in rendered("train", 1, 2, 0, (24, 32))]
    monkeypatch.setattr(model_file, "PointEncoder", lambda *args, **options: Toy())
    monkeypatch.setattr(train, "open_frames", lambda *args, **options: FewestFields(frames))
    metrics = train.main(small(tmp_path, "--epochs 1 --diagnose 1 --no-check"))
    assert len(metrics["iou"]) == len(CLASSES) and metrics["miou"] >= 0 and "ap" not in metrics


def test_what_a_start_asks_for_is_judged_anew(tmp_path, capsys):
    """A warning of the first start is not repeated by one that it is not true of."""
    train.main(small(tmp_path, "--epochs 1"))
    assert train.NEVER_ON in checkpoint(tmp_path)["warnings"]
    capsys.readouterr()
    train.main(["--resume", str(last_checkpoint(tmp_path)), "--epochs", "2", "--clip-warmup=-1,0", *RESUME])
    printed = capsys.readouterr().out
    assert train.NEVER_ON not in printed and f": {last_checkpoint(tmp_path, 'best.pt')};" in printed
    assert train.NEVER_ON not in checkpoint(tmp_path)["warnings"]


def test_a_tower_of_another_image_size_is_refused(tmp_path):
    tower = Enhanced2DEncoder(TOWER, None, image_size=(64, 96))
    with pytest.raises(ValueError, match=r"--image-size \(96, 128\): the tower takes images of \(64, 96\)"):
        train.main(small(tmp_path), tower=tower)


def test_a_new_loss_term_logs_itself(tmp_path, monkeypatch):
    """One entry in the weights and one in the terms is all that it takes."""
    compute, weights = train.compute_losses, train.loss_weights

    def with_length(*args):
        out, terms, counts = compute(*args)
        return out, {**terms, "length": out["feat_fusion"].square().mean()}, counts

    monkeypatch.setattr(train, "compute_losses", with_length)
    monkeypatch.setattr(train, "loss_weights", lambda args, epoch: {**weights(args, epoch), "length": 0.5})
    train.main(small(tmp_path, "--epochs 1 --no-clip --diagnose 1"))
    events = scalars(tmp_path)
    raw, weighted = (events.Scalars(f"{kind}/length")[-1].value for kind in ("loss", "weighted"))
    assert raw > 0 and weighted == pytest.approx(0.5 * raw)
    assert events.Scalars("diagnose/cosine_semantic_length") and events.Scalars("diagnose/share_instance")
    with pytest.raises(KeyError, match="width"):
        train.weight_terms({"width": torch.ones(())}, {"length": 1.0})


# ---------------------------------------------------------------------------------------------- two processes


def test_two_processes_train_as_one_with_the_doubled_batch_and_write_once(tmp_path, monkeypatch):
    average = train.average_buffers

    def same_on_both(model, world):
        average(model, world)
        for p in [*model.parameters(), *model.buffers()]:
            others = [torch.empty_like(p) for _ in range(world)]
            dist.all_gather(others, p.detach().contiguous())
            assert torch.equal(others[0], others[1])

    # at a higher learning rate, rounding may grow until a match or a bit of a mask is another
    options = "--epochs 3 --clip-warmup 0,1 --clip-weights 0.001,0.01,0.1 --lr 2e-4"
    metrics = train.main(small(tmp_path / "one", options, "--batch-size 4"))
    monkeypatch.setattr(train, "average_buffers", same_on_both)
    done = in_two_processes(lambda: print("MIOU", train.main(
        small(tmp_path / "two", options, "--batch-size 2"))["miou"]))
    assert [status for status, _, _ in done] == [0, 0], done
    values = [float(re.search(r"MIOU (\S+)", printed)[1]) for _, printed, _ in done]
    assert values == pytest.approx([metrics["miou"]] * 2, abs=1e-3)
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")  # of one run each: one process writes
    assert len(one.Scalars("loss/total")) == 3
    for tag in ("loss/total", "loss/semantic", "loss/instance_bce", "loss/clip"):
        theirs = [e.value for e in two.Scalars(tag)]
        assert theirs == pytest.approx([e.value for e in one.Scalars(tag)], rel=1e-4), tag


def test_norms_count_the_rows_of_both_processes_or_with_sync_bn_off_their_own(tmp_path, monkeypatch):
    average = train.average_buffers

    def compared(model, world):
        own = model.fusion.encoder_3d.backbone.bn0.bn.running_mean
        before = train.gather_objects(own.clone(), world)
        average(model, world)
        print("EQUAL", torch.equal(*before), torch.equal(*train.gather_objects(own, world)))

    monkeypatch.setattr(train, "average_buffers", compared)
    for setting, equal in (("on", True), ("off", False)):
        options = f"--no-clip --no-instances --epochs 1 --num-points 100 --sync-bn {setting}"
        done = in_two_processes(lambda: train.main(small(tmp_path / setting, options)))
        for status, printed, errors in done:
            assert status == 0 and f"EQUAL {equal} True" in printed, errors
    assert not same_weights(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("status", [1, -9], ids=["raises", "is killed"])
def test_a_process_that_raises_or_is_killed_ends_the_other_with_an_error(tmp_path, monkeypatch, status):
    factor = train.lr_factor

    def fail(position, *rest):
        if position == 3 and os.environ["RANK"] == "1":
            if status == -9:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError
        return factor(position, *rest)

    monkeypatch.setattr(train, "lr_factor", fail)
    options = small(tmp_path, "--epochs 1000 --no-clip --no-instances --num-points 100")
    first, second = in_two_processes(lambda: train.main(options))
    assert second[0] == status and ("ZeroDivisionError" in second[2]) == (status == 1)
    assert first[0] == 1 and re.search("Connection (closed|reset) by peer", first[2]), first[2]
