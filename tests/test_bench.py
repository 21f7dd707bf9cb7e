# SPDX-License-Identifier: MIT
"""bench.py: what is compared computes the same, and a chart that cannot be drawn is refused before the work."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import timing
from bench_scale import Given, plain_fusion, scene_of
from data import PointDataset, ScanNetFrames
from fusion import BiFusionEncoder

SMOKE = ("--points", "200", "--image-size", "32,48", "--superpoints", "8", "--clip-model", "ViT-S-16-alt")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return bench.step_setup("default network", "cpu", str(tmp_path_factory.mktemp("step")), 2, SMOKE)


def test_a_step_from_the_cache_is_the_step_with_the_tower_to_half_precision(setup):
    options, _, encoder, classes, cached, pictures = setup
    one = bench.Step(options, encoder, classes, True, 0.01)
    one.model.eval()
    losses = [sum(bench.train.compute_losses(one.model, batch, one.criteria, options)[1].values())
              for batch in (cached, pictures)]
    assert "images" in pictures and "clip_tokens" in cached
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


def test_every_step_moves_all_of_its_model_and_the_shares_of_its_parts_are_a_whole(setup):
    options, _, encoder, classes, cached, _ = setup
    for one in (bench.Step(options, None, classes, True), bench.Step(options, encoder, classes, True, 0.01)):
        before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        assert all(one.run(cached).isfinite() for _ in range(2))
        still = [name for name, p in one.model.named_parameters() if torch.equal(p, before[name])]
        assert not [name for name in still if name.startswith(("fusion.", "head."))]
        shares = one.parts(cached, 1)
        assert sum(shares.values()) == pytest.approx(1) and shares["backward"] > 0.05 and shares["rest"] >= 0
        assert ("gate" in shares) == (one.model.fusion.encoder_2d is not None)


def test_the_loaders_compared_draw_from_the_same_points(tmp_path):
    frames = ScanNetFrames(tmp_path, bench.write_frames(tmp_path, (1, 1), (48, 64)))
    size = (24, 32)
    ours = PointDataset(frames, 10 ** 6, size)[0]
    plain = bench.plain_frame(tmp_path, frames.names[0], 10 ** 6, size)
    order = [np.lexsort(np.round(sample["points"].numpy(), 3).T) for sample in (ours, plain)]
    for key in ("points", "colors"):
        torch.testing.assert_close(ours[key][order[0]], plain[key][order[1]], rtol=0, atol=1e-4)
    assert torch.equal(ours["labels"][order[0]] + 1, plain["labels"][order[1]])
    for key in ("world2cam", "intrinsics", "depth"):
        torch.testing.assert_close(ours[key][0], plain[key], rtol=1e-5, atol=1e-5)
    assert (ours["images"][0] - plain["images"]).abs().max() < 0.03  # ours may shrink in two steps


def test_the_scenes_compared_give_the_same_fused_features():
    torch.manual_seed(0)
    given, batch = Given(500, 3), scene_of(500, 3, "cpu")
    net = BiFusionEncoder(given, given)
    net.proj_3d = torch.nn.Identity()
    ours = net(batch)
    assert 50 < ours["valid"].sum() < 500
    difference = (plain_fusion(net, batch) - ours["feat_fusion"]).abs().amax(1)
    assert (difference > 1e-3).float().mean() < 0.01  # a point on the border of a picture may fall on either side


def test_candidates_take_turns_and_ratios_are_of_turns():
    calls = []
    seconds = timing.turns({name: (lambda name=name: calls.append(name)) for name in "ab"}, 3)
    assert calls == list("ab" * 4) and all(len(values) == 3 for values in seconds.values())
    assert timing.ratio({"a": [2.0, 20, 4], "b": [1.0, 10, 2]}, "a", "b") == "2.00 (2.00 to 2.00)"
    assert timing.exponent([10, 100, 1000], [3, 300, 30_000]) == pytest.approx(2)


def test_a_process_of_its_own_holds_what_it_is_asked_to():
    result, before, after = timing.alone(math.hypot, 3, 4)
    assert result == 5 and 0 < before <= after


def test_a_chart_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "turns", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="matplotlib"):
        bench.main(["sample", "--plot", "chart.png"])


def test_a_chart_holds_bars_and_lines(tmp_path):
    pytest.importorskip("matplotlib")
    timing.chart(tmp_path / "chart.png", {"bars": {"a": 1.0, "b": 2.0}, "lines": {"c": ([1, 10], [2, 20])}})
    assert np.asarray(Image.open(tmp_path / "chart.png")).std() > 1


@pytest.mark.parametrize("command", ["step", "loader", "scale", "encode", "sample", "sparse", "ap", "stability"])
def test_every_command_has_defaults(command):
    args = bench.parse_args([command])
    assert args.run.__name__ == command and args.plot is None


def test_one_turn_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(["sample", "--repeats", "1"])
    assert "at least 2" in capsys.readouterr().err
