# SPDX-License-Identifier: MIT
"""bench/: what is compared computes the same, every command parses and runs, a missing matplotlib is reported first.

Commands whose smallest form takes long are represented by their parts.
"""
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench.ap
import bench.gpu
import bench.loader
import bench.sample
import bench.scale
import bench.sparse
import bench.step
from support import clouds
import train
from bench import timing
from bench.__main__ import COMMANDS, main, parse_args
from data import PointDataset
from sources.rooms import RoomFrames
from support.visualize import label_colors
from sources.scannet import ScanNetFrames
from sparse_unet import VoxelGrid, sparse_conv

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ("--num-points", "200", "--image-size", "32,48", "--superpoints", "8", "--clip-model", "ViT-S-16-alt")


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_defaults_and_a_module_that_runs_it(command):
    args = parse_args([command])
    assert args.plot is None and args.device == "cpu" and args.threads >= 1
    assert "run" in vars(importlib.import_module(f"bench.{command}"))


def test_help_names_every_command_without_importing_torch():
    script = "import sys; sys.modules['torch'] = None; from bench.__main__ import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(COMMANDS) <= set(re.findall(r"^    ([a-z]+)\b", done.stdout, re.M))


@pytest.mark.parametrize("argv, message", [
    ([], "required"), (["nothing"], "invalid choice"), (["sample", "--repeats", "1"], "at least 2"),
    (["step", "--device", "tpu"], "invalid choice"), (["ap", "--device", "cuda"], "unrecognized arguments"),
    (["speedrun", "--plot", "x.png"], "unrecognized arguments")])
def test_bad_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"gpu", "speedrun", "meaning", "picture"}))
def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured(command, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module = importlib.import_module(f"bench.{command}")
    monkeypatch.setattr(module, "run", lambda args: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        main([command, "--plot", "figure.png"])
    assert "matplotlib" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- timing


def test_candidates_take_turns_and_ratios_are_of_turns():
    calls = []
    seconds = timing.turns({name: (lambda name=name: calls.append(name)) for name in "ab"}, 3)
    assert calls == list("ab" * 4)
    assert all(len(values) == 3 for values in seconds.values())
    assert timing.ratio({"a": [2.0, 20, 4], "b": [1.0, 10, 2]}, "a", "b") == "2.00 (2.00 to 2.00)"
    assert timing.median({"a": [3.0, 1, 2]}) == {"a": 2}


def test_the_exponent_of_a_power_law_is_its_power():
    assert timing.exponent([10, 100, 1000], [3, 300, 30_000]) == pytest.approx(2)


def test_a_fresh_process_returns_the_result_and_its_peak_memory():
    result, before, after = timing.in_fresh_process(math.hypot, 3, 4)
    assert result == 5 and 0 < before <= after


def test_a_chart_holds_bars_and_lines(tmp_path):
    pytest.importorskip("matplotlib")
    timing.chart(tmp_path / "chart.png", {"bars": {"a": 1.0, "b": 2.0}, "lines": {"c": ([1, 10], [2, 20])}})
    assert np.asarray(Image.open(tmp_path / "chart.png")).std() > 1


# ---------------------------------------------------------------------------------------------- step


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
    totals = []
    for batch in (cached, with_images):
        _, terms, _ = train.compute_losses(step.model, batch, step.criteria, step.weights)
        assert "clip" in terms
        totals.append(sum(train.weight_terms(terms, step.weights).values()))
    torch.testing.assert_close(*totals, rtol=2e-3, atol=0)


def test_the_table_of_steps_has_a_row_per_network_batch_and_dtype(monkeypatch, capsys, setup):
    monkeypatch.setattr(bench.gpu, "setup", lambda *_: setup)
    bench.gpu.run(parse_args(["gpu", "--repeats", "2", "--batches", "1", "2"]))
    lines = capsys.readouterr().out.strip().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 2 * 2 * 2 and len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_moves_fusion_and_head_and_its_shares_sum_to_one(setup, fused):
    args, encoder_2d, num_classes, make_batch = setup
    cached = make_batch(2)
    step = bench.step.Step(args, encoder_2d if fused else None, num_classes)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    for _ in range(2):
        finite = step(cached).finite
        assert finite
    still = [name for name, p in step.model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if name.startswith(("fusion.", "head."))]

    shares = bench.step.shares(step, cached, repeats=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0.001 for name, share in shares.items() if name in ("3D network", "heads", "losses", "AdamW"))
    assert shares["backward, clipping"] > 0.05
    assert ("gate" in shares) == fused
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in step.model.modules())


def test_the_candidates_of_a_step_differ_in_what_they_are_named_after(setup):
    *parts, make_batch = setup
    steps = bench.step.candidates(*parts, make_batch(2), make_batch(2, cached=False), compiled=False)
    assert steps["3D baseline"][0].model.fusion.encoder_2d is None
    assert steps["BiFusion"][0].weights["clip"] > 0 == steps["BiFusion, CLIP loss of weight 0"][0].weights["clip"]
    assert "images" in steps["BiFusion, --cache none"][1]
    step, batch = steps["BiFusion, --diagnose 1"]
    assert step(batch).finite


# ---------------------------------------------------------------------------------------------- the parts


def test_the_loaders_compared_draw_from_the_same_points(tmp_path):
    classes = bench.loader.write_frames(RoomFrames("train", 1, 1, size=(48, 64)), tmp_path)
    frames = ScanNetFrames(tmp_path, classes)
    size = (24, 32)
    ours = PointDataset(frames, 10 ** 6, size)[0]
    plain = bench.loader.plain_frame(tmp_path, frames.names[0], 10 ** 6, size)
    order = [np.lexsort(np.round(sample["points"].numpy(), 3).T) for sample in (ours, plain)]
    for key in ("points", "features"):
        torch.testing.assert_close(ours[key][order[0]], plain[key][order[1]], rtol=0, atol=1e-4)
    assert torch.equal(ours["labels"][order[0]] + 1, plain["labels"][order[1]])
    assert ours["labels"].unique().numel() > 1
    for key in ("world2cam", "intrinsics", "depth"):
        torch.testing.assert_close(ours[key][0], plain[key], rtol=1e-5, atol=1e-5)
    assert (ours["images"][0] - plain["images"]).abs().max() < 0.03  # ours may shrink in two steps


def test_frames_that_are_written_are_read_back(tmp_path):
    source = RoomFrames("train", 1, 1, size=(48, 64))
    frames = ScanNetFrames(tmp_path, bench.loader.write_frames(source, tmp_path))
    assert frames.class_names == source.class_names and frames.names == source.names
    assert np.array_equal(frames[0]["label"], source[0]["label"])
    instance = source[0]["instance"]  # written as instance + 1, because 0 = none there
    assert np.array_equal(frames[0]["instance"], np.where(instance >= 0, instance + 1, -1))
    for key in ("depth", "world2cam", "intrinsics", "depth_intrinsics"):
        np.testing.assert_allclose(frames[0][key], source[0][key], atol=6e-4)


def test_the_fusions_compared_give_the_same_features():
    torch.manual_seed(0)
    batch = bench.scale.scene_of(500, 3)
    fusion = bench.scale.given_fusion(500, 3)
    ours = fusion(batch)
    assert 50 < ours["valid"].sum() < 500
    difference = (bench.scale.plain_fusion(fusion, batch) - ours["feat_fusion"]).abs().amax(1)
    assert (difference > 1e-3).float().mean() < 0.01  # a point on the border of an image may fall on either side


def test_the_convolutions_compared_give_the_same_features():
    torch.manual_seed(0)
    coords = bench.sparse.room_cloud(500, 1.0)
    assert len(coords.unique(dim=0)) == 500
    feats, kernel, kernel_map = torch.randn(500, 16), torch.randn(27, 16, 8), VoxelGrid(coords).neighbors(3)
    expected = sparse_conv(feats, kernel, kernel_map)
    torch.testing.assert_close(bench.sparse.one_product(feats, kernel, kernel_map), expected, rtol=1e-4, atol=1e-4)


def test_the_samplers_compared_give_the_same_features():
    torch.manual_seed(0)
    feature_map, uv = torch.randn(2, 4, 5, 7), torch.rand(30, 2) * 40
    batch_idx = torch.arange(2).repeat_interleave(15)
    torch.testing.assert_close(bench.sample.loop_of_grid_sample(feature_map, uv, (40, 40), batch_idx),
                               bench.sample.sample_features(feature_map, uv, (40, 40), batch_idx), rtol=1e-5, atol=1e-5)


def test_a_denser_scan_of_the_same_number_of_voxels_has_more_neighbours():
    pairs = [len(VoxelGrid(bench.sparse.room_cloud(500, density)).neighbors(3).pairs[0]) for density in (0.35, 3.5)]
    assert pairs[1] > 2 * pairs[0]


# ---------------------------------------------------------------------------------------------- commands, tiny


def test_ap_runs_in_small(capsys):
    panels = bench.ap.run(parse_args(["ap"]), count=2, points=1000)
    assert "2 scenes" in capsys.readouterr().out and len(panels) == 1


def test_sample_runs_in_small(capsys):
    panels = bench.sample.run(parse_args(["sample", "--repeats", "2"]), scenes=2, points=50)
    assert "of the loop" in capsys.readouterr().out and len(panels) == 1


def test_loader_runs_in_small(capsys):
    panels = bench.loader.run(parse_args(["loader", "--repeats", "2"]), 1, (48, 64), 50)
    assert "augmented" in capsys.readouterr().out and len(panels["frames per second and worker"]) == 4


def test_encode_runs_in_small(capsys):
    import bench.encode
    panels = bench.encode.run(parse_args(["encode", "--repeats", "2", "--batch", "1"]), "ViT-S-32-alt")
    assert "of encode_image" in capsys.readouterr().out and len(panels) == 1


def test_sparse_convolution_runs_in_small(capsys):
    panels = bench.sparse.bench_convolution(2, [("tiny", 300, 1.0)], channels=8)
    assert "spconv" in capsys.readouterr().out and len(panels) == 1


def test_a_cloud_is_drawn_in_the_colours_of_its_classes_without_its_ceiling(tmp_path):
    points = torch.rand(400, 3)
    labels = torch.arange(400) % 3 + 1
    clouds.write_ply(tmp_path / "x.ply", points, torch.full((400, 3), 0.5), {"label": labels, "instance": labels * 0},
                     ["class 1 wall", "class 2 ceiling", "class 3 door"])
    main(["picture", "--cloud", str(tmp_path / "x.ply"), "--out", str(tmp_path / "x.png")])
    image = np.asarray(Image.open(tmp_path / "x.png"))[:400]
    for panel, expected in zip(np.split(image, 3, 1), ({(128, 128, 128)}, {tuple(c) for c in (
            label_colors(torch.tensor([0, 2])) * 255).round().int().tolist()}, {(102, 102, 102)})):
        shown = {tuple(int(x) for x in color) for color in panel.reshape(-1, 3)} - {(255, 255, 255)}
        assert shown == expected


def test_speedrun_runs_in_small(capsys):
    main(["speedrun", "--target", "0", "--options", "--rooms 2 --frames-per-room 1 --epochs 2 --eval-every 1 --workers 0 "
          "--voxel-size 0.3 " + " ".join(SMOKE)])
    printed = capsys.readouterr().out
    first, second = map(float, re.findall(r"(\d+) s  mIoU", printed))
    assert 0 <= first <= second and f"mIoU 0.0: {first:.0f} s" in printed


def test_a_scene_of_scale_is_measured_in_both_passes():
    for plain in (False, True):
        seconds, gpu_peak = bench.scale.measure(plain, 50, True, "cpu")
        assert seconds > 0 and gpu_peak is None
