# SPDX-License-Identifier: MIT
"""The Volume Transformer against figures of the published network, and its symmetries.

tests/data/volt.npz and volt.json: what the published classes compute on two scenes, for q and k normalized ("small")
and not ("small_plain"). `value` makes the weights from their state-dict keys.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support.pretrained import load_backbone
from volt import Volt, drop_path

DATA = Path(__file__).parent / "data"
FIGURES = np.load(DATA / "volt.npz")
TABLE = json.loads((DATA / "volt.json").read_text())
TINY = dict(in_channels=3, embed_dim=128, depth=2, num_heads=2, out_channels=8)
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # largest error, of the largest value
FEW = {"no voxel": torch.empty(0, 4).long(),
       "one voxel": torch.tensor([[0, -7, 3, 2]]),
       "two voxels of one patch": torch.arange(8).view(2, 4) // 4,
       "scenes without voxels": torch.arange(8).view(2, 4)}
ORIGIN = torch.zeros(1, 4).long()
WRONG = {r"coords must be \(M, 4\) int64, got \(1, 3\)": (ORIGIN[:, 1:], 3),
         "int64, got .* torch.float32": (ORIGIN.float(), 3),
         r"feats must be \(1, 3\), got \(1, 2\)": (ORIGIN, 2),
         "coords hold 1 duplicates": (ORIGIN.repeat(2, 1), 3),
         "batch must be >= 0": (ORIGIN - 1, 3),
         r"box < 2\^63 voxels": (torch.cat((ORIGIN, ORIGIN + 2 ** 30)), 3)}


def value(key, shape):
    """The tensor that belongs to a state-dict key, as the figures were made."""
    if not shape:
        return torch.tensor(0)
    seed = zlib.crc32(key.encode()) & 0x7fffffff
    r = np.random.RandomState(seed).randn(*shape)
    if len(shape) == 2:
        r *= (1 / shape[1]) ** 0.5
    elif key.endswith("weight"):
        r = 1 + 0.2 * r
    elif key.endswith("running_var"):
        r = 1 + 0.3 * abs(r)
    else:
        r = 0.1 * r
    return torch.from_numpy(np.asarray(r, np.float32))


def assert_close(ours, theirs, tolerance):
    """Equal up to a share of the largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max()
    assert error <= tolerance * theirs.abs().max(), error


def finite_gradients(network):
    """Whether every parameter has a gradient, and no gradient NaN or inf."""
    grads = [parameter.grad for parameter in network.parameters()]
    return all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.fixture(scope="module")
def tiny():
    """A small network in eval mode, whose norms have seen data."""
    torch.manual_seed(0)
    network = Volt(**TINY)
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    for block in network.blocks:  # as large as in a trained network, so that attention is not uniform
        nn.init.normal_(block.attn.qkv.weight, std=0.1)
    coords, feats = scenes(3)
    network(coords, feats)
    return network.eval()


def scenes(count):
    """Voxels of some scenes with features of 3 channels."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.arange(count).repeat_interleave(400)
    xyz = torch.randint(-12, 12, (len(batch), 3), generator=generator)
    coords = torch.cat([batch[:, None], xyz], 1).unique(dim=0)
    return coords, torch.randn(len(coords), 3, generator=generator)


@pytest.mark.parametrize("size", TABLE["shapes"])
def test_the_network_has_the_published_keys_outputs_and_gradients(size):
    kinds = ("out_eval", "grad_in_eval", "out_train")
    out_eval, grad_in_eval, out_train = (torch.from_numpy(FIGURES[f"{size}.{kind}"]) for kind in kinds)
    coords = torch.from_numpy(FIGURES["coords"]).long()
    feats = torch.from_numpy(FIGURES["feats"]).requires_grad_()
    rows = FIGURES["rows"].astype(int)
    random = np.random.RandomState(zlib.crc32(b"volt.cotangent"))
    cotangent = torch.from_numpy(random.randn(len(coords), 128)).float()

    with torch.device("meta"):
        network = Volt(qk_norm=size == "small")
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == TABLE["shapes"][size]
    weights = {key: value(key, shape) for key, shape in shapes.items()}
    network.load_state_dict(weights, assign=True)
    out = network.eval()(coords, feats)
    (out * cotangent).sum().backward()

    assert_close(out[rows], out_eval, 1e-4)
    assert_close(feats.grad[rows], grad_in_eval, 1e-4)
    norms = {key: parameter.grad.norm().item() for key, parameter in network.named_parameters()}
    assert norms == pytest.approx(TABLE["norms"][size], rel=1e-3)
    with torch.no_grad():
        out = network.train()(coords, feats)
    assert_close(out[rows], out_train, 1e-4)


@torch.no_grad()
def test_shifts_permutations_and_batching_change_nothing(tiny):
    coords, feats = scenes(3)
    expected = tiny(coords, feats)

    shifts = torch.tensor([[0, 5, -10, 500], [0, -35, 15, 0], [0, 1, 2, -3]])  # also by less than a patch
    assert_close(tiny(coords + shifts[coords[:, 0]], feats), expected, 1e-5)

    order = torch.randperm(len(coords))
    assert_close(tiny(coords[order], feats[order]), expected[order], 1e-5)

    for scene in range(3):
        mine = coords[:, 0] == scene
        alone = coords[mine]
        alone[:, 0] = 0
        assert_close(tiny(alone, feats[mine]), expected[mine], 1e-5)


@torch.no_grad()
def test_a_token_sees_its_whole_scene_and_no_other(tiny):
    coords, feats = scenes(2)
    changed = feats.clone()
    changed[0] += 1
    reached = (tiny(coords, changed) != tiny(coords, feats)).any(1)
    assert torch.equal(reached, coords[:, 0] == 0)


@torch.no_grad()
def test_far_away_coordinates_lose_no_precision(tiny):
    coords, feats = scenes(1)
    far = coords + torch.tensor([0, 2 ** 40, -2 ** 40, 2 ** 33])
    assert torch.equal(tiny(far, feats), tiny(coords, feats))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_stays_near_float32(tiny, dtype, autocast):
    coords, feats = scenes(2)
    expected = tiny(coords, feats)
    network = Volt(**TINY).eval()
    network.load_state_dict(tiny.state_dict())
    if not autocast:
        network.to(dtype)
        feats = feats.to(dtype)
    feats.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = network(coords, feats)
    assert out.dtype == feats.dtype
    assert_close(out, expected, HALF[dtype])
    out.float().square().mean().backward()
    assert finite_gradients(network)
    assert feats.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_few_voxels_give_finite_outputs_and_a_graph(case, training):
    coords = FEW[case]
    network = Volt(**TINY).train(training)
    out = network(coords, torch.randn(len(coords), 3))
    out.sum().backward()
    assert out.shape == (len(coords), 8) and out.isfinite().all()
    assert finite_gradients(network)
    assert network.decoder.pre[0].running_mean.isfinite().all()


def test_drop_path_drops_whole_tokens_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20000, 3)
    out = drop_path(x, 0.3, training=True)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out[:, :1] == out).all()
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert drop_path(x, 0.3, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


@pytest.mark.parametrize("message", WRONG)
def test_wrong_inputs_are_refused(tiny, message):
    coords, channels = WRONG[message]
    with pytest.raises(ValueError, match=message):
        tiny(coords, torch.ones(len(coords), channels))


def publish(path, network, moving_average):
    """Writes a file with the nesting of the published ones, whose weights are those of a network."""
    weights = {f"backbone.{key}": tensor for key, tensor in network.state_dict().items()}
    weights["seg_heads.ScanNet.weight"] = torch.ones(20, 8)
    weights["distill_heads.ScanNet.weight"] = torch.ones(20, 8)
    raw = {f"module.{key}": tensor for key, tensor in weights.items()}
    if moving_average:
        raw = {key: tensor + 1 for key, tensor in raw.items()}
    state = {"epoch": 500, "state_dict": raw, "ema_state_dict": weights if moving_average else None,
             "optimizer": {"state": {0: torch.ones(5)}}, "best_metric_value": np.float64(0.8)}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("moving_average", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_files_load_in_full(tmp_path, qk_norm, moving_average):
    theirs = Volt(**TINY, qk_norm=qk_norm)
    publish(tmp_path / "volt.pth", theirs, moving_average)
    ours, colors, loaded = load_backbone(tmp_path / "volt.pth", None, {}, build_volt=Volt)
    assert ours.options == theirs.options
    assert colors == "raw"
    assert "project Volt, dropped nothing" in loaded
    assert not ours.training
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


DAMAGES = {"blocks.1.mlp.fc1.bias is missing": ("blocks.1.mlp.fc1.bias", None),
           r"tokenizer.proj.weight has shape \(128, 374\)": ("tokenizer.proj.weight", torch.ones(128, 374)),
           "no decoder.unembed.bias": ("decoder.unembed.bias", None)}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path, message):
    key, tensor = DAMAGES[message]
    path = tmp_path / "volt.pth"
    state = publish(path, Volt(**TINY), moving_average=False)
    state["state_dict"][f"module.backbone.{key}"] = tensor
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"volt.pth.*(\n.*)*{message}"):
        load_backbone(path, None, {}, build_volt=Volt)


def test_a_head_has_64_channels():
    with pytest.raises(ValueError, match="embed_dim must be 64 per head, got 384 for 4 heads"):
        Volt(num_heads=4)
