# SPDX-License-Identifier: MIT
"""bench/: what is compared computes the same, every command parses and runs, errors are one line.

Commands whose smallest form takes long are represented by their parts.
"""
import importlib.util
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import bench.ap
import bench.encode
import bench.gpu
import bench.loader
import bench.sample
import bench.scale
import bench.sparse
import bench.step
import train
from bench import timing
from bench.__main__ import COMMANDS, NO_FIGURES, main, parse_args
from data import PointDataset
from helpers import TOWER
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames
from sparse_unet import VoxelGrid, sparse_conv
from support import clouds
from support.visualize import label_colors

SMOKE = ["--num-points", "200", "--image-size", "32,64", "--clip-model", TOWER]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_defaults_and_a_module_that_runs_it(command):
    args = parse_args([command])
    assert args.plot is None and args.device == "cpu" and args.threads >= 1
    assert "run" in vars(importlib.import_module(f"bench.{command}"))


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert set(COMMANDS) <= set(re.findall(r"^    ([a-z]+)\b", capsys.readouterr().out, re.M))


@pytest.mark.parametrize("argv, message", [
    ([], "required"), (["nothing"], "invalid choice"), (["sample", "--repeats", "1"], "--repeats: must be finite"),
    (["step", "--threads", "0"], "--threads: must be finite"), (["speedrun", "--target", "nan"], "--target"),
    (["volt", "--threads", ""], "--threads is empty"), (["picture", "--frames", "12"], "at most 11"),
    (["picture", "--out", "nowhere/x.png"], "a folder that exists"), (["meaning", "--tower", "/proc/x"], "written to"),
    (["step", "--device", "tpu"], "invalid choice"), (["ap", "--device", "cuda"], "unrecognized"),
    (["speedrun", "--plot", "x.png"], "unrecognized arguments"),
    (["gpu", "--of", "nowhere"], "--of nowhere"), (["check", "--only", "x", "--seeds", "1"], "--only 'x'"),
    (["picture", "--checkpoint", "nowhere.pt"], "error: checkpoint nowhere.pt does not exist\n"),
    *(([command, "--plot", "x.png"], "matplotlib") for command in COMMANDS if command not in NO_FIGURES)])
def test_what_cannot_be_done_is_one_error_with_status_2(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no matplotlib
    with pytest.raises(SystemExit) as ended:
        main(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_candidates_take_turns_and_ratios_are_of_turns():
    calls = []
    seconds = timing.turns({name: (lambda name=name: calls.append(name)) for name in "ab"}, 3)
    assert calls == list("ab" * 4)
    assert all(len(values) == 3 for values in seconds.values())
    assert timing.ratio({"a": [2.0, 20, 4], "b": [1.0, 10, 2]}, "a", "b") == "2.00 (2.00 to 2.00)"
    assert timing.median({"a": [3.0, 1, 2]}) == {"a": 2}
    assert timing.exponent([10, 100, 1000], [3, 300, 30_000]) == pytest.approx(2)


def test_a_fresh_process_returns_the_result_and_its_peak_memory():
    result, before, after = timing.in_fresh_process(math.hypot, 3, 4)
    assert result == 5 and 0 < before <= after


def test_a_chart_holds_bars_and_lines(tmp_path):
    pytest.importorskip("matplotlib")
    timing.chart(tmp_path / "chart.png", {"bars": {"a": 1.0, "b": 2.0}, "lines": {"c": ([1, 10], [2, 20])}})
    assert np.asarray(Image.open(tmp_path / "chart.png")).std() > 1


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Options, tower, number of classes, and a function that makes batches."""
    torch.manual_seed(0)  # of the tower
    return bench.step.setup("default network", "cpu", str(tmp_path_factory.mktemp("step")), 2, SMOKE)


def test_a_step_from_the_cache_is_the_step_with_the_tower_to_half_precision(setup):
    args, encoder_2d, num_classes, make_batch = setup
    cached, with_images = make_batch(2), make_batch(2, cached=False)
    assert "images" in with_images and "clip_tokens" in cached
    step = bench.step.Step(args, encoder_2d, num_classes)
    step.model.eval()
    results = []
    for batch in (cached, with_images):
        out, terms, _ = train.compute_losses(step.model, batch, step.criteria, step.weights)
        results.append((terms["clip"], out["feat_fusion"]))
    torch.testing.assert_close(*results, rtol=2e-3, atol=5e-3)


def test_the_table_of_steps_has_a_row_per_batch_and_dtype(monkeypatch, capsys, setup):
    monkeypatch.setattr(bench.gpu, "setup", lambda *_: setup)
    monkeypatch.setattr(bench.gpu, "NETWORKS", {"default network": ""})
    bench.gpu.run(parse_args(["gpu", "--repeats", "2", "--batches", "1", "2"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 2 and len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_moves_fusion_and_head_and_its_shares_sum_to_one(setup, fused, monkeypatch):
    args, encoder_2d, num_classes, make_batch = setup
    cached = make_batch(2)
    step = bench.step.Step(args, encoder_2d if fused else None, num_classes)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    assert step(cached)[1] and step(cached)[1]  # finite
    still = [name for name, p in step.model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if name.startswith(("fusion.", "head."))]

    shares = bench.step.shares(step, cached, repeats=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() >= {"3D network", "heads", "losses", "AdamW", "backward, clipping"}
    assert ("gate" in shares) == fused
    monkeypatch.setattr(bench.step, "now", lambda device: pytest.fail("a hook is still there"))
    step(cached)


def test_the_candidates_of_a_step_differ_in_what_they_are_named_after(setup):
    *parts, make_batch = setup
    steps = bench.step.candidates(*parts, make_batch(2), make_batch(2, cached=False), compiled=False)
    assert steps["3D baseline"][0].model.fusion.encoder_2d is None
    for name, weight in (("BiFusion, CLIP loss of weight 0", 0), ("BiFusion", bench.step.CLIP_WEIGHT)):
        assert steps[name][0].weights["clip"] == weight
    assert "images" in steps["BiFusion, --cache none"][1]
    step, batch = steps["BiFusion, --diagnose 1"]
    assert step(batch)[1]  # finite


def test_the_loaders_compared_draw_from_the_same_points(tmp_path):
    classes = bench.loader.write_frames(RoomFrames("train", 1, 1, size=(48, 64)), tmp_path)
    frames = ScanNetFrames(tmp_path, classes)
    size = (24, 32)
    ours = PointDataset(frames, 10 ** 6, size)[0]
    plain = bench.loader.plain_frame(tmp_path, frames.names[0], 10 ** 6, size)
    nearest = torch.cdist(ours["points"], plain["points"]).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(plain["points"])))
    for key in ("points", "features"):
        torch.testing.assert_close(ours[key], plain[key][nearest], rtol=0, atol=1e-4)
    assert torch.equal(ours["labels"] + 1, plain["labels"][nearest])
    assert ours["labels"].unique().numel() > 1
    for key in ("world2cam", "intrinsics", "depth"):
        torch.testing.assert_close(ours[key][0], plain[key], rtol=1e-5, atol=1e-5)
    assert (ours["images"][0] - plain["images"]).abs().max() < 0.03  # ours may shrink in two steps


def test_the_fusions_compared_give_the_same_features():
    torch.manual_seed(0)
    batch = bench.scale.scene_of(500, 3)
    fusion = bench.scale.given_fusion(500, 3)
    ours = fusion(batch)
    assert 50 < ours["valid"].sum() < 500
    difference = (bench.scale.plain_fusion(fusion, batch) - ours["feat_fusion"]).abs().amax(1)
    assert (difference > 1e-3).float().mean() < 0.01  # points on the border of an image may be on either side


def test_the_convolutions_compared_give_the_same_features_on_clouds_of_the_density_asked_for():
    torch.manual_seed(0)
    sparse, dense = (bench.sparse.room_cloud(500, density) for density in (0.35, 3.5))
    kernel_map, denser = (VoxelGrid(coords).neighbors(3) for coords in (sparse, dense))
    neighbors, more = (sum(len(part.source) for part in one.pairs) for one in (kernel_map, denser))
    assert len(sparse.unique(dim=0)) == 500 and more > 2 * neighbors
    feats, kernel = torch.randn(500, 16), torch.randn(27, 16, 8)
    results = [convolve(feats, kernel, kernel_map) for convolve in (bench.sparse.one_product, sparse_conv)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_samplers_compared_give_the_same_features():
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 5, 7), torch.rand(30, 2) * 40, (40, 40), torch.arange(30) // 15
    expected = bench.sample.loop_of_grid_sample(*inputs)
    torch.testing.assert_close(bench.sample.sample_features(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run, printed", [
    (lambda: bench.ap.run(parse_args(["ap"]), count=2, points=1000), "2 scenes"),
    (lambda: bench.sample.run(parse_args("sample --repeats 2".split()), 2, 50), "of the loop"),
    (lambda: bench.loader.run(parse_args("loader --repeats 2".split()), 1, (48, 64), 50), "augmented"),
    (lambda: bench.encode.run(parse_args("encode --repeats 2 --batch 1".split()), TOWER), "of encode_image"),
    (lambda: bench.sparse.bench_convolution(2, [("tiny", 300, 1.0)], channels=8), "spconv")],
    ids=["ap", "sample", "loader", "encode", "sparse"])
def test_commands_run_in_small(run, printed, capsys):
    assert len(run()) == 1 and printed in capsys.readouterr().out


def test_a_scene_of_scale_is_measured_in_both_passes():
    for plain in (False, True):
        seconds, gpu_peak = bench.scale.measure(plain, 50, True, "cpu")
        assert seconds > 0 and gpu_peak is None


def test_a_cloud_is_drawn_in_the_colors_of_its_classes_without_its_ceiling(tmp_path):
    labels = torch.arange(400) % 3 + 1
    fields = {"label": labels, "instance": labels * 0}
    comments = ["class 1 wall", "class 2 ceiling", "class 3 door"]
    clouds.write_ply(tmp_path / "x.ply", torch.rand(400, 3), torch.full((400, 3), 0.5), fields, comments)
    main(["picture", "--cloud", str(tmp_path / "x.ply"), "--out", str(tmp_path / "x.png")])
    image = np.asarray(Image.open(tmp_path / "x.png"))[:400]
    of_classes = (label_colors(torch.tensor([0, 2])) * 255).round().int().tolist()
    for panel, expected in zip(np.split(image, 3, 1), ([[128] * 3], of_classes, [[102] * 3])):
        shown = np.unique(panel.reshape(-1, 3), axis=0).tolist()
        assert sorted(shown) == sorted([*expected, [255] * 3])


def test_speedrun_runs_in_small(capsys, quick_runs):
    options = "--rooms 2 --epochs 2 --eval-every 1 --workers 0 --voxel-size 0.3"
    main(["speedrun", "--target", "0", "--options", " ".join([options, *SMOKE])])
    printed = capsys.readouterr().out
    first, second = map(float, re.findall(r"(\d+) s  mIoU", printed))
    assert 0 <= first <= second and f"mIoU 0.0: {first:.0f} s" in printed
