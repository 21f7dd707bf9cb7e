# SPDX-License-Identifier: MIT
"""The loop, run in process on a few small frames: what it writes, repeats, resumes, isolates and refuses."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import options
import rooms
import train
from encoder import Enhanced2DEncoder
from fusion import FusionGate
from losses import clip_loss_weight
from test_scannet import POSE, write_scan, write_scannet

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
TOWER = "ViT-S-32-alt"


def small(folder, *more):
    """Arguments of a run of a few seconds in `folder`."""
    return ["--rooms", "2", "--frames-per-room", "2", "--points", "1000", "--voxel-size", "0.15", "--batch-size", "2",
            "--image-size", "96,128", "--clip-model", TOWER, "--clip-pretrained", "none", "--workers", "0",
            "--epochs", "2", "--eval-every", "1", "--log-every", "1", "--superpoints", "24",
            "--min-instance-points", "20", "--clip-cache", str(folder / "clip"), "--superpoint-cache",
            str(folder / "superpoints"), "--runs", str(folder / "runs"), "--device", "cpu", *more]


def checkpoint(folder, name="last.pt"):
    path, = (folder / "runs").glob(f"*/{name}")
    return torch.load(path, weights_only=True)


def scalars(folder):
    run, = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_run_writes_finite_scalars_pictures_and_checkpoints_and_every_tag_is_documented(tmp_path, capsys):
    metrics = train.main(small(tmp_path, "--clip-warmup", "0,1", "--clip-weights", "0,0.001,0.01"))
    printed = capsys.readouterr().out
    assert "tensorboard --logdir" in printed and all(name in printed for name in ("IoU", "AP50", "bookshelf"))
    assert 0 <= metrics["miou"] <= 1 and 0 <= metrics["ap50"] <= 1
    events = scalars(tmp_path)
    tags = events.Tags()
    assert {"loss/total", "loss/semantic", "weighted/semantic", "loss/clip", "weighted/clip", "loss/instance",
            "clip/weight", "grad/total", "grad/encoder_3d", "fusion/gate_mean", "fusion/effective_rank",
            "speed/data_wait", "val/miou", "val/ap50"} <= set(tags["scalars"])
    assert {"val/input_points", "val/truth", "val/prediction", "val/fused_pca", "val/clip_pca"} <= set(tags["images"])
    values = {tag: [e.value for e in events.Scalars(tag)] for tag in tags["scalars"]}
    undefined = {tag for tag in values if tag.startswith("val_iou/")}  # NaN: a class that the few frames do not show
    assert all(torch.tensor(values[tag]).isfinite().all() for tag in values.keys() - undefined)
    documented = re.findall(r"^\| `([^`]+)` \|", README.split("## TensorBoard")[1].split("\n## ")[0], re.M)
    patterns = [re.sub(r"<[a-z]+>", ".+", tag) for tag in documented]
    for tag in tags["scalars"] + tags["images"]:
        assert any(re.fullmatch(pattern, tag) for pattern in patterns), f"{tag} is not in the README's table"
    for name in ("best.pt", "last.pt"):
        state = checkpoint(tmp_path, name)
        assert not any("clip" in key and "trainable" not in key for key in state["model"])
    assert not list((tmp_path / "runs").glob("*/*.tmp"))


def test_clip_weight_logged_is_the_schedule_at_every_step_also_with_accumulation(tmp_path):
    train.main(small(tmp_path, "--epochs", "4", "--clip-warmup", "0,2", "--clip-weights", "0,0.5,0.25", "--accumulate",
                     "2", "--no-instances", "--eval-every", "4"))
    events = scalars(tmp_path)
    weights = [e.value for e in events.Scalars("clip/weight")]
    assert weights == [clip_loss_weight(epoch, (0, 2), (0, 0.5, 0.25)) for epoch in range(4)]
    raw, weighted = ({e.step: e.value for e in events.Scalars(tag)} for tag in ("loss/clip", "weighted/clip"))
    assert raw.keys() == {2, 3, 4}  # weight 0: not computed
    assert all(weighted[s] == pytest.approx(raw[s] * weights[s - 1], rel=1e-5) for s in raw)


def test_isolated_clip_loss_trains_as_none_at_all_to_the_bit(tmp_path):
    runs = {}
    for name, more in {"isolated": ["--isolate-clip", "--clip-weights", "1,1,1", "--gradient-flow-ratio", "1"],
                       "none": ["--clip-weights", "0,0,0"], "full": ["--clip-weights", "1,1,1"]}.items():
        train.main(small(tmp_path / name, *more, "--clip-cache", str(tmp_path / "clip")))
        runs[name] = checkpoint(tmp_path / name)["model"]
    assert all(torch.equal(runs["isolated"][key], runs["none"][key]) for key in runs["none"])
    assert any(not torch.equal(runs["full"][key], runs["none"][key]) for key in runs["none"])


def test_cached_and_uncached_runs_train_alike_to_the_error_of_half_precision(tmp_path):
    curves = []
    for cache in (str(tmp_path / "clip"), "none"):
        name = Path(cache).name
        train.main(small(tmp_path / name, "--epochs", "5", "--eval-every", "5", "--clip-cache", cache, "--no-instances",
                         "--clip-warmup", "-1", "--clip-weights", "0,0.1"))
        curves.append([e.value for e in scalars(tmp_path / name).Scalars("loss/total")])
    assert len(curves[0]) == 10 and curves[0] == pytest.approx(curves[1], rel=2 ** -11)


@pytest.mark.parametrize("target", ["global", "point"])
def test_no_time_is_spent_on_an_isolated_clip_loss(tmp_path, monkeypatch, target):
    def never(*args):
        raise AssertionError("called")

    monkeypatch.setattr(train.ClipConsCriterion, "forward", never)
    monkeypatch.setattr(Enhanced2DEncoder, "project_dense", never)
    train.main(small(tmp_path, "--isolate-clip", "--clip-target", target, "--epochs", "1", "--no-instances"))
    assert checkpoint(tmp_path)["step"] == 2 and "loss/clip" not in scalars(tmp_path).Tags()["scalars"]


def test_with_a_warm_cache_the_tower_is_never_run(tmp_path, monkeypatch):
    first = train.main(small(tmp_path))
    encode = Enhanced2DEncoder.encode

    def only_to_learn_the_shapes(self, images):
        assert not images.any(), "the tower saw a picture"
        return encode(self, images)

    monkeypatch.setattr(Enhanced2DEncoder, "encode", only_to_learn_the_shapes)
    assert train.main(small(tmp_path, "--name", "second"))["miou"] == first["miou"]


def test_resumed_run_ends_with_the_same_weights_to_the_bit(tmp_path, monkeypatch):
    write = train.write_atomically

    def keep(state, path):
        write(state, path)
        (tmp_path / "kept").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "kept" / f"{path.stem}{state['epoch']}.pt")

    monkeypatch.setattr(train, "write_atomically", keep)
    arguments = small(tmp_path, "--epochs", "4", "--eval-every", "2", "--clip-warmup", "0,2", "--workers", "1")
    train.main(arguments)
    straight = checkpoint(tmp_path)
    middle = tmp_path / "second" / "runs" / "x" / "last.pt"
    middle.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "kept" / "last2.pt", middle)
    train.main(["--resume", str(middle), "--device", "cpu"])
    resumed = checkpoint(tmp_path / "second")
    assert resumed["epoch"] == straight["epoch"] == 4 and resumed["step"] == straight["step"]
    assert all(torch.equal(resumed["model"][key], straight["model"][key]) for key in straight["model"])
    logged = scalars(tmp_path / "second").Scalars("clip/weight")
    assert [e.value for e in logged] == pytest.approx([0.001, 0.001, 0.01, 0.01])  # two steps each of epochs 2 and 3


def test_eval_of_a_checkpoint_gives_the_metrics_of_its_training(tmp_path):
    trained = train.main(small(tmp_path))
    path, = (tmp_path / "runs").glob("*/last.pt")
    evaluated = train.main(["--eval", str(path), "--device", "cpu"])
    assert evaluated["miou"] == trained["miou"] and evaluated["ap50"] == pytest.approx(trained["ap50"], nan_ok=True)


def test_compiled_parts_train_as_plain_ones(tmp_path, monkeypatch, caplog):
    """With the tracer alone: the C++ behind it takes minutes."""
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f.__self__) or compile(
        f, backend="eager", **options))
    ends = []
    for more in ([], ["--compile"]):
        train.main(small(tmp_path / str(len(more)), "--epochs", "3", "--clip-cache", "none", *more))
        ends.append(checkpoint(tmp_path / str(len(more)))["model"])
    assert any(isinstance(module, FusionGate) for module in compiled) and len(compiled) > 12
    assert ends[0].keys() == ends[1].keys() and "limit" not in caplog.text
    plain, traced = ([e.value for e in scalars(tmp_path / name).Scalars("loss/total")] for name in "01")
    assert traced == pytest.approx(plain, rel=1e-5)


def test_baseline_never_builds_a_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Enhanced2DEncoder", None)
    metrics = train.main(small(tmp_path, "--no-clip", "--epochs", "1"))
    assert 0 <= metrics["miou"] <= 1


def test_missing_weights_warn_loudly_on_the_rooms_and_stop_on_own_data(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise RuntimeError("no network")

    tag = open_clip.list_pretrained_tags_by_model("ViT-B-32")[0]
    own = ["--clip-model", "ViT-B-32", "--clip-pretrained", tag]
    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    metrics = train.main(small(tmp_path, *own, "--epochs", "1", "--no-instances"))
    assert metrics["miou"] >= 0 and "RANDOMLY INITIALISED" in capsys.readouterr().out
    assert "RANDOMLY INITIALISED" in checkpoint(tmp_path)["warnings"][0]
    run, = (tmp_path / "runs").iterdir()
    assert "warning/text_summary" in scalars(tmp_path).Tags()["tensors"]
    args = train.parse_args(small(tmp_path, *own, "--data", str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=f"ViT-B-32/{tag} could not be had.*file's path"):
        train.build_encoder_2d(args, print)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_100_steps_under_autocast_are_finite(tmp_path, amp):
    train.main(small(tmp_path, "--amp", amp, "--epochs", "25", "--points", "100", "--eval-every", "25", "--batch-size",
                     "1", "--voxel-size", "0.3", "--no-instances", "--clip-warmup", "1,2", "--clip-weights",
                     "0.01,0.05,0.05", "--log-every", "10"))
    events = scalars(tmp_path)  # a mean over 10 steps is finite only if each of them is
    assert len(events.Scalars("loss/total")) == 10 and checkpoint(tmp_path)["step"] == 100
    for tag in ("loss/total", "loss/clip"):
        assert all(torch.tensor([e.value for e in events.Scalars(tag)]).isfinite())
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["model"].values())
    assert events.Scalars("amp/skipped_steps")[-1].value <= (20 if amp == "fp16" else 0)  # the scaler's back-off


@pytest.mark.parametrize("variant", ["cosine", "siglip", "infonce"])
@pytest.mark.parametrize("target", ["global", "point"])
def test_every_clip_loss_trains_on_both_targets(tmp_path, variant, target):
    train.main(small(tmp_path, "--clip-loss", variant, "--clip-target", target, "--no-instances", "--epochs", "1",
                     "--clip-warmup", "-1", "--clip-weights", "0,0.1", "--name", variant))
    values = [e.value for e in scalars(tmp_path).Scalars("loss/clip")]
    assert len(values) == 2 and all(0 < value < 4 for value in values)


def test_every_trainable_parameter_gets_a_gradient_and_is_in_one_group():
    args = train.parse_args(small(Path("unused")))
    encoder = Enhanced2DEncoder(TOWER, None, image_size=args.image_size)
    model = train.Segmenter(train.BiFusionEncoder(encoder, train.PointEncoder(0.15, **train.SMALL)), 5,
                            train.InstanceDecoder(256, 5))
    groups = train.parameter_groups(model, args)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["name"] for group in groups} == {"encoder_3d", "fusion", "head"}
    clip = {id(p) for p in encoder.clip.parameters()}
    assert not clip & set(grouped)


def test_full_network_starts_from_a_prefixed_checkpoint_with_its_own_learning_rate(tmp_path, capsys):
    network = train.PointEncoder(0.3).backbone
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "esam.pth")
    train.main(small(tmp_path, "--no-clip", "--no-instances", "--backbone", "res16unet34c", "--init-3d",
                     str(tmp_path / "esam.pth"), "--voxel-size", "0.3", "--rooms", "1", "--frames-per-room", "1",
                     "--epochs", "1", "--lr-3d", "0", "--lr-warmup", "0"))
    assert "372" in capsys.readouterr().out
    trained = checkpoint(tmp_path)["model"]
    own = {key: trained[f"fusion.encoder_3d.backbone.{key}"] for key, _ in network.named_parameters()}
    assert all(torch.equal(own[key], value) for key, value in network.named_parameters())  # --lr-3d 0: untouched
    assert scalars(tmp_path).Scalars("lr/encoder_3d")[-1].value == 0


def test_cubes_stand_in_where_there_are_no_superpoints(tmp_path):
    metrics = train.main(small(tmp_path, "--no-clip", "--superpoints", "0", "--epochs", "1"))
    assert 0 <= metrics["ap25"] <= 1 and not (tmp_path / "superpoints").exists()


def test_schedule_warms_up_and_ends_at_zero():
    for schedule in ("poly", "cosine"):
        factors = [train.lr_factor(step, 100, 10, schedule) for step in range(101)]
        assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0, abs=1e-12)
        assert max(factors) <= 1 and all(a >= b for a, b in zip(factors[10:], factors[11:]))


@pytest.mark.parametrize("options, message", [
    (["--clip-warmup", "20,10"], "must ascend"), (["--clip-warmup", "ten"], "expected integers"),
    (["--clip-weights", "0,1"], "one entry less"), (["--image-size", "224"], "height,width"),
    (["--batch-size", "0"], "at least 1"), (["--clip-loss", "infonce", "--batch-size", "1"], "--batch-size 2 or more"),
    (["--diagnose", "-1"], "at least 0"), (["--diagnose", "1", "--compile"], "--compile does not allow"),
    (["--lr-3d", "-1"], "at least 0"), (["--temperature", "nan"], "at least 0"),
    (["--gradient-flow-ratio", "2"], "0 to 1"),
    (["--max-bad-steps", "0"], "at least 1"),
    (["--resume", "a.pt", "--replay", "b.pt"], "exclude each other"),
    (["--init-3d", "x.pt"], "--backbone res16unet34c")])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        train.main(small(tmp_path, *options))
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def own_frames(folder):
    """Two scenes of two frames in ScanNet's layout, with class list and splits; returns the options that name them."""
    frames = rooms.frames("train", 2, 2)
    for frame in frames:
        scene, stem = (folder / frame["name"]).parent, frame["name"].split("/")[1]
        for kind in ("color", "depth", "pose", "intrinsic", "label-filt", "instance-filt"):
            (scene / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame["color"]).save(scene / "color" / f"{stem}.png")
        Image.fromarray((frame["depth"] * 1000).astype(np.uint16)).save(scene / "depth" / f"{stem}.png")
        Image.fromarray(frame["label"]).save(scene / "label-filt" / f"{stem}.png")
        Image.fromarray(frame["instance"]).save(scene / "instance-filt" / f"{stem}.png")
        np.savetxt(scene / "pose" / f"{stem}.txt", np.linalg.inv(frame["world2cam"]))
        np.savetxt(scene / "intrinsic" / "intrinsic_color.txt", frame["intrinsics"])
        np.savetxt(scene / "intrinsic" / "intrinsic_depth.txt", frame["depth_intrinsics"])
    names = ["unlabeled", *rooms.CLASSES]
    (folder / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    (folder / "train.txt").write_text("train0000\n")
    (folder / "val.txt").write_text("train0001/1\n")
    return ["--data", str(folder), "--train-split", str(folder / "train.txt"), "--val-split", str(folder / "val.txt")]


def test_own_frames_train_and_a_broken_one_ends_the_run_before_anything_is_written(tmp_path):
    options = own_frames(tmp_path / "own")
    metrics = train.main(small(tmp_path / "good", *options, "--epochs", "1"))
    assert 0 <= metrics["miou"] <= 1 and 0 <= metrics["ap25"] <= 1
    path = tmp_path / "own" / "train0000" / "depth" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="train0000/depth/1.png: depth image cannot be decoded"):
        train.main(small(tmp_path / "truncated", *options))
    path.write_bytes(whole)
    (tmp_path / "own" / "classes.txt").write_text("1 wall\n")
    with pytest.raises(ValueError, match=r"label-filt/\d.png: label \d+ is not in the class list"):
        train.main(small(tmp_path / "label", *options))
    assert not (tmp_path / "truncated" / "runs").exists()
    assert not (tmp_path / "label" / "runs").exists()


def test_whole_scans_train_with_posed_views(tmp_path):
    """Points from two scans of 40 segments in front of the cameras, pictures from exported frames without labels."""
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
        tmp_path, "--data", str(frames), "--scans", str(tmp_path / "scans"), "--classes", str(tmp_path / "classes.txt"),
        "--train-split", str(tmp_path / "train.txt"), "--val-split", str(tmp_path / "val.txt"), "--views", "2",
        "--epochs", "1", "--clip-warmup", "-1", "--clip-weights", "0,0.1"))
    assert len(metrics["iou"]) == 2 and metrics["miou"] > 0 and 0 <= metrics["ap25"] <= 1
    events = scalars(tmp_path)
    assert 0 < events.Scalars("fusion/valid_share")[-1].value <= 1
    assert torch.tensor(events.Scalars("loss/clip")[-1].value).isfinite()
    assert "val/instances" in events.Tags()["images"]


def test_wrong_data_model_and_checkpoint_are_named_before_anything_is_written(tmp_path):
    (tmp_path / "classes.txt").write_text("1 thing\n")
    with pytest.raises(ValueError, match="needs --train-split FILE"):
        train.main(small(tmp_path, "--data", str(tmp_path)))
    with pytest.raises(ValueError, match="CLIP model 'ViT-X' is unknown"):
        train.main(small(tmp_path, "--clip-model", "ViT-X"))
    with pytest.raises(FileNotFoundError, match="missing.pt does not exist"):
        train.main(["--eval", str(tmp_path / "missing.pt")])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pt: not a checkpoint of train.py"):
        train.main(["--resume", str(tmp_path / "text.pt")])
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: .* field 'class_names' is missing"):
        train.main(["--eval", str(tmp_path / "other.pt")])
    assert not (tmp_path / "runs").exists()


def test_checkpoint_of_another_tower_or_network_is_refused(tmp_path):
    train.main(small(tmp_path, "--epochs", "1", "--no-instances"))
    path, = (tmp_path / "runs").glob("*/last.pt")
    with pytest.raises(ValueError, match="clip_fingerprint differs"):
        train.main(["--eval", str(path), "--image-size", "64,96"])
    state = torch.load(path, weights_only=True)
    state["model"]["head.weight"] = state["model"]["head.weight"][:3]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"field 'head.weight' has shape \(3, 256\), the model's has \(16, 256\)"):
        train.main(["--eval", str(path)])


def torchrun(folder, code, arguments):
    """Runs Python code that calls train.main(sys.argv[1:]) in two processes; returns what subprocess.run does."""
    (folder / "two.py").write_text("import os, signal, sys, time, torch, train, torch.distributed as dist\n" + code)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(folder / "two.py"), *arguments], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_two_processes_train_as_one_with_the_doubled_batch_and_write_once(tmp_path):
    code = ("average = train.average_buffers\n"
            "def check(model, world):\n"
            "    average(model, world)\n"
            "    for p in [*model.parameters(), *model.buffers()]:\n"
            "        others = [torch.empty_like(p) for _ in range(world)]\n"
            "        dist.all_gather(others, p.detach().contiguous())\n"
            "        assert torch.equal(others[0], others[1])\n"
            "train.average_buffers = check\n"
            "metrics = train.main(sys.argv[1:])\n"
            "print('MIOU', metrics['miou'])\n")
    options = ["--rooms", "4", "--epochs", "10", "--eval-every", "10", "--clip-warmup", "1,2", "--clip-weights",
               "0.001,0.01,0.1", "--clip-cache", str(tmp_path / "clip"),
               "--lr", "2e-4"]  # at more, rounding may grow until a match or a bit of a mask is another
    metrics = train.main(small(tmp_path / "one", *options, "--batch-size", "4"))
    done = torchrun(tmp_path, code, small(tmp_path / "two", *options, "--batch-size", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    values = [float(value) for value in re.findall(r"MIOU (\S+)", done.stdout)]
    assert values == pytest.approx([metrics["miou"]] * 2, abs=1e-3)
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")  # of one run each: one process writes
    assert len(one.Scalars("loss/total")) == 20
    for tag in ("loss/total", "loss/semantic", "loss/instance", "loss/clip"):
        theirs = [e.value for e in two.Scalars(tag)]
        assert theirs == pytest.approx([e.value for e in one.Scalars(tag)], rel=1e-4), tag


def test_a_killed_process_ends_the_other_within_a_minute_and_with_a_message(tmp_path):
    code = ("factor = train.lr_factor\n"
            "def die(position, *rest):\n"
            "    if position == 3 and os.environ['RANK'] == '1':\n"
            "        open(sys.argv[-1] + '/died', 'w').close()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return factor(position, *rest)\n"
            "train.lr_factor = die\n"
            "train.main(sys.argv[1:-1])\n")
    done = torchrun(tmp_path, code, [*small(tmp_path, "--epochs", "1000", "--no-clip", "--no-instances"),
                                     str(tmp_path)])
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert done.returncode != 0 and re.search(r"exitcode\s*: -9|SIGKILL", done.stderr)


def test_readme_lists_every_option_with_its_default():
    table = dict(re.findall(r"^\| `(--[a-z0-9-]+)[^|]*?` \| (.*?) \|", README.replace("\\|", "/"), re.M))
    for action in options.build_parser()._actions:
        if action.dest == "help":
            continue
        default = action.default
        expected = "off" if action.nargs == 0 else "" if default is None else "`{}`".format(
            ",".join(f"{x:g}" for x in default) if isinstance(default, tuple) else default)
        assert table.pop(action.option_strings[0]).strip() == expected, action.option_strings
    assert not table, f"documented, but not there: {table}"


def test_options_given_on_resuming_take_effect(tmp_path):
    train.main(small(tmp_path, "--no-clip", "--no-instances", "--batch-size", "1", "--epochs", "2"))
    path, = (tmp_path / "runs").glob("*/last.pt")
    with pytest.raises(ValueError, match="last.pt: all 2 epochs are done"):
        train.main(["--resume", str(path)])
    train.main(["--resume", str(path), "--epochs", "3", "--batch-size", "4", "--amp", "fp16", "--weight-decay", "0.5",
                "--lr-3d", "0.1"])
    groups = checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert {(g["weight_decay"], g["factor"]) for g in groups} == {(0.5, 0.1), (0, 0.1), (0.5, 1), (0, 1)}
    steps = [event.step for event in scalars(tmp_path).Scalars("val/miou")]
    assert steps == [4, 8, 9]  # what was logged before is kept


def test_frames_without_labels_and_a_loss_that_stays_nan_end_the_run(tmp_path, monkeypatch):
    options = own_frames(tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "train0001" / "label-filt")
    with pytest.raises(FileNotFoundError, match="train0001: .*label-filt"):
        train.main(small(tmp_path, *options))
    assert not (tmp_path / "runs").exists()
    forward = train.SemanticCriterion.forward
    monkeypatch.setattr(train.SemanticCriterion, "forward", lambda *args: forward(*args) * float("nan"))
    for amp in ("off", "fp16"):
        with pytest.raises(FloatingPointError, match="3 steps in a row were not finite(.|\\n)*loss: semantic is nan"):
            train.main(small(tmp_path / amp, "--no-clip", "--no-instances", "--amp", amp, "--epochs", "30",
                             "--eval-every", "30", "--points", "100", "--max-bad-steps", "3"))
