# SPDX-License-Identifier: MIT
"""Weights of other projects, the colors that they know, and backbones that are not ours."""
import functools
import importlib
import itertools
import math
import pickle
import re
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import sources.open
import train
from data import PointDataset, collate
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder
from helpers import ROOT, TOWER, checkpoint, last_checkpoint, small
from model import BACKBONES, load_model
from predict import predict_frames
from sources.rooms import RoomFrames
from sparse_unet import COLORS, NETWORKS, PLANES, PointEncoder, Res16UNet34C
from support import pretrained
from test_diagnose import broken_batches, replayed, saved_steps
from test_sparse_unet import TINY

WIDE = dict(planes=(8,) * 7 + (512,))  # the last block is as wide as CLIP's features


def load_backbone(path, **options):
    return pretrained.load_backbone(path, Res16UNet34C, NETWORKS, **options)


def refused(message):
    return pytest.raises(ValueError, match=f"(?s){message}")


def named_weights(**options):
    """Distinct values for the tensors of a network, by key."""
    torch.manual_seed(0)
    return {key: tensor.add_(torch.rand(())) if tensor.is_floating_point() else tensor
            for key, tensor in Res16UNet34C(**options).state_dict().items()}


class Poison:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def foreign_object(module, name, **attributes):
    """An object of a package, and the modules of that package, which the caller removes."""
    parts = itertools.accumulate(module.split("."), "{}.{}".format)
    made = [part for part in parts if part not in sys.modules]
    for part in made:
        sys.modules[part] = types.ModuleType(part)
    kind = type(name, (dict,) if name.endswith("Config") else (), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    thing = kind()
    vars(thing).update(attributes)
    return thing, made


HUB = ("message_hub", "mmengine.logging.message_hub", "MessageHub")
OMEGA = ("hyper_parameters", "omegaconf.dictconfig", "DictConfig")
LIGHTNING = ("hyper_parameters", "pytorch_lightning.utilities", "AttributeDict")
NUMPY = ("best_iou", "numpy_of_old", "float64")
# project: prefix of the keys, what is nested beside the weights, the network, its colors. The prefixes, last layers and
# colors are those of the projects' sources; the networks are narrow.
LAYOUTS = {
    "ESAM": ("backbone.", HUB, dict(stem=5), "scannet"),
    "oneformer3d": ("unet.", HUB, dict(stem=5, final=(96, True)), "scannet"),
    "Mask3D": ("model.backbone.", OMEGA, dict(stem=5, final=(20, True)), "scannet"),
    "UnScene3D": ("model.backbone.", OMEGA, dict(stem=3, final=(20, True)), "scannet"),
    "LanguageGroundedSemseg": ("model.", LIGHTNING, dict(stem=3, final=(200, True)), "centered"),
    "LanguageGroundedSemseg, CLIP": ("model.", LIGHTNING, dict(stem=3, last_relu=False), "centered"),
    "LanguageGroundedSemseg, 34D": ("model.", LIGHTNING, dict(WIDE, stem=3, last_relu=False), "centered"),
    "OpenScene": ("module.net3d.", NUMPY, dict(stem=5, final=(768, False)), "ones"),
    "Pointcept": ("module.backbone.", NUMPY, dict(stem=5, in_channels=9), None)}


def publish(path, prefix, nested=NUMPY, options={}, colors=None, poison=None, **changes):
    """Writes a file as a project does -> the weights in it."""
    weights = named_weights(**{**TINY, **options})
    tensors = {prefix + key: tensor for key, tensor in weights.items()}
    field, module, name = nested
    history = [np.float64(0.5), torch.ones(2)]
    thing, made = foreign_object(module, name, history=history, poison=poison)
    state = {"epoch": 7, "state_dict": tensors, field: thing}
    tensors |= {"decoder.x.weight": torch.ones(3, 4), **changes}
    torch.save(state, path)
    for part in made:
        del sys.modules[part]
    return weights


# --------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("project", LAYOUTS)
def test_a_published_file_loads_without_its_packages_and_runs_nothing(project, tmp_path):
    *layout, options, colors = LAYOUTS[project]
    poisoned = tmp_path / "poisoned"
    weights = publish(tmp_path / "file.pth", *layout, options, poison=Poison(poisoned))
    network, found, loaded = load_backbone(tmp_path / "file.pth")
    assert not poisoned.exists()
    assert found == colors
    assert project.split(",")[0] in re.search("project (.*), dropped", loaded)[1]
    assert ("final" in options) == ("'final.kernel'" in loaded)
    expected = {"in_channels": 3, "last_relu": True, **TINY, **options}
    assert network.options == {key: expected[key] for key in network.options}
    state = network.state_dict()
    assert state.keys() == {key for key in weights if not key.startswith("final.")}
    assert all(torch.equal(tensor, weights[key]) for key, tensor in state.items())
    assert not network.training
    coords = torch.cartesian_prod(*[torch.arange(3)] * 4)
    out = network.train()(coords, torch.randn(81, expected["in_channels"]))
    assert (out < 0).any() != expected["last_relu"]
    pickle.loads(pickle.dumps(Poison(poisoned)))
    assert poisoned.exists()


def test_the_last_layer_is_kept_on_request(tmp_path):
    for final in ((5, False), (6, True)):
        weights = publish(tmp_path / "file.pth", "net3d.", options=dict(final=final))
        coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]])
        feats = torch.ones(2, 3)
        whole, _, _ = load_backbone(tmp_path / "file.pth", final=True)
        cut, _, _ = load_backbone(tmp_path / "file.pth")
        expected = cut(coords, feats) @ weights["final.kernel"] + weights.get("final.bias", 0)
        assert torch.allclose(whole(coords, feats), expected)
        assert whole.out_channels == final[0]


@pytest.mark.parametrize("change, message", [
    ({"backbone.conv0p1s1.kernel": torch.zeros(124, 3, 8)}, r"conv0p1s1.kernel has shape \(124, 3, 8\)"),
    ({"teacher.conv0p1s1.kernel": torch.zeros(125, 3, 8)}, "2 keys end in conv0p1s1.kernel"),
    ({"backbone.bn0.bn.weight": torch.full((8,), torch.nan)}, r"backbone.bn0.bn.weight \(8,\) holds NaN or inf"),
    ({"backbone.bn0.bn.weight": torch.zeros(9)}, r"bn0.bn.weight is \(9,\), expected \(8,\)"),
    ({"backbone.block9.0.conv1.kernel": torch.zeros(2)}, "block9.0.conv1.kernel is .*expected no such key"),
    ({"backbone.block1.0.conv2.kernel": torch.zeros(2)}, "block1 has no conv2.kernel of 3 dimensions")])
def test_a_file_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    publish(tmp_path / "file.pth", "backbone.", **change)
    with refused(f"file.pth.*{message}"):
        load_backbone(tmp_path / "file.pth")


def test_a_file_that_is_old_without_a_network_or_absent_is_refused_by_name(tmp_path):
    torch.save(named_weights(**TINY), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with refused("old.pth: not a checkpoint"):
        load_backbone(tmp_path / "old.pth")
    torch.save([1, {"state_dict": 3}], tmp_path / "list.pth")
    with refused("list.pth: no checkpoint with a known network"):
        load_backbone(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_backbone(tmp_path / "absent.pth")


def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path):
    """What such a tensor reads would be memory of this process."""
    publish(tmp_path / "file.pth", "backbone.")
    with zipfile.ZipFile(tmp_path / "file.pth") as source:
        entries = {name: source.read(name) for name in source.namelist()}
    pickled = entries["file/data.pkl"].replace(b"K}K\x03K\x08", b"K}K\x03K\x09")  # (125, 3, 8)
    assert pickled != entries["file/data.pkl"]
    entries["file/data.pkl"] = pickled
    with zipfile.ZipFile(tmp_path / "forged.pth", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with refused("forged.pth: .*out of bounds for storage"):
        load_backbone(tmp_path / "forged.pth")


def test_the_real_networks_have_the_keys_of_the_published_files():
    with torch.device("meta"):
        sizes = {name: len(Res16UNet34C(**options).state_dict()) for name, options in NETWORKS.items()}
    assert sizes.pop("minkunet18a") == 288
    del sizes["small"]
    assert set(sizes.values()) == {372}


# ---------------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("prefix, stem, channels, width, project, colors", [
    ("model.backbone.", 5, 3, 200, "Mask3D", "scannet"),
    ("model.backbone.", 5, 3, 13, "Mask3D", None),  # S3DIS
    ("", 5, 3, None, None, None),
    ("backbone.", 5, 6, None, None, None),
    ("my_backbone.", 5, 3, None, None, None)])
def test_colors_follow_from_what_only_one_project_publishes(prefix, stem, channels, width, project, colors):
    final = width and (width, True)
    options = dict(stem=stem, in_channels=channels, planes=PLANES, final=final)
    assert pretrained.recognize(prefix, options, {}, NETWORKS) == (project, colors, True)


@pytest.mark.parametrize("colors", COLORS)
def test_the_first_convolution_sees_colors_as_the_weights_know_them(colors):
    mean, std = COLORS[colors] or (None, None)
    encoder = PointEncoder(0.1, color_mean=mean, color_std=std, **TINY)
    seen = []
    encoder.backbone.conv0p1s1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    c = torch.rand(50, 3)
    coords = torch.arange(50.0)[:, None].expand(50, 3)  # one point per voxel
    encoder({"coords": coords, "features": c, "batch": torch.zeros(50, dtype=torch.long)})
    mean, std = torch.tensor(COLORS["scannet"])[:, None] * 255  # of colors up to 255
    expected = {"signed": 2 * c - 1, "centered": c - 0.5, "centred": c - 0.5, "raw": c,
                "ones": torch.ones_like(c), "scannet": (255 * c - mean) / std}
    assert torch.allclose(seen[0], expected[colors], atol=1e-5)
    assert not any("color" in key for key in encoder.state_dict())


def test_a_run_that_starts_from_a_file_keeps_its_network_and_colors(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BACKBONES, "minkunet18a", functools.partial(Res16UNet34C, **TINY))
    weights = publish(tmp_path / "file.pth", *LAYOUTS["OpenScene"])
    options = ["--lr-3d", "0", "--epochs", "1", "--no-clip", "--no-instances"]
    train.main(small(tmp_path, "--init-3d", str(tmp_path / "file.pth"), *options))
    assert "--backbone minkunet18a, --colors ones" in capsys.readouterr().out
    state = checkpoint(tmp_path)
    assert (state["config"]["backbone"], state["config"]["colors"]) == ("minkunet18a", "ones")
    kernel = state["model"]["fusion.encoder_3d.backbone.conv0p1s1.kernel"]
    assert torch.equal(kernel, weights["conv0p1s1.kernel"])
    path = last_checkpoint(tmp_path)
    (tmp_path / "file.pth").unlink()
    train.main(["--resume", str(path), "--device", "cpu"])  # needs neither the file nor an option

    network, colors, loaded = load_backbone(path)  # a run's own file
    assert colors == "ones" and "project BiFusion," in loaded
    assert torch.equal(network.conv0p1s1.kernel, kernel)


@pytest.mark.parametrize("prefix, options, message", [
    ("unheard_of.", [], "does not tell how these weights saw colors: give --colors signed"),
    ("backbone.", ["--backbone", "small"], "and not small")])
def test_weights_that_cannot_be_placed_are_refused(prefix, options, message, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "res16unet34c", functools.partial(Res16UNet34C, **TINY))
    publish(tmp_path / "file.pth", prefix)
    with refused(message):
        train.main(small(tmp_path, "--init-3d", str(tmp_path / "file.pth"), *options))
    assert not (tmp_path / "runs").exists()


def test_weights_and_scales_of_colors_alone_are_refused_for_points_with_more(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "res16unet34c", functools.partial(Res16UNet34C, **TINY))
    monkeypatch.setattr(sources.open, "RoomFrames", WithNormals)
    publish(tmp_path / "file.pth", "backbone.")
    with refused("--colors scannet is for points with 3 features"):
        train.main(small(tmp_path, "--no-clip", "--colors", "scannet"))
    with refused("file.pth is for points with 3 features, .* num_features 6"):
        train.main(small(tmp_path, "--no-clip", "--init-3d", str(tmp_path / "file.pth")))
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- other backbones


class WithNormals(RoomFrames):
    """Built-in rooms with an image of three more numbers per pixel, in [-1, 1]."""

    num_features = 6

    def __getitem__(self, index):
        frame = super().__getitem__(index)
        v, u = np.indices(frame["depth"].shape)
        frame["features"] = np.stack([np.sin(u), np.cos(v), np.sin(u + v)], 2)
        return frame


def few(source, count, split="train"):
    """One small frame of each of some rooms."""
    return source(split, count, 1, size=(60, 80))


def test_features_of_a_frame_stand_beside_the_colors_of_its_points():
    source = few(WithNormals, 1)
    frame = source[0]
    for options in ({}, {"augment": True}, {"color": False}):
        plain = PointDataset(few(RoomFrames, 1), 500, (64, 96), **options)[0]
        sample = PointDataset(source, 500, (64, 96), **options)[0]
        assert sample["features"].shape == (500, 6)
        assert torch.equal(sample["features"][:, :3], plain["features"])
    camera = sample["points"].double().numpy() @ frame["world2cam"][:3, :3].T + frame["world2cam"][:3, 3]
    image = camera @ frame["depth_intrinsics"].T
    u, v = np.rint(image[:, :2] / image[:, 2:]).astype(int).T
    assert np.allclose(sample["features"][:, 3:], frame["features"][v, u], atol=1e-6)


def test_a_network_with_features_of_any_width_is_trained_replayed_and_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources.open, "RoomFrames", WithNormals)
    broken_batches(monkeypatch, lambda batch: batch["features"][2].fill_(math.nan), when=(0,))
    train.main(small(tmp_path, "--no-instances", "--no-clip", "--epochs", "1"))
    printed, _ = replayed(saved_steps(tmp_path)[0], capsys)
    assert "features" in printed and "holds 6 values" in printed
    model, _, config = load_model(last_checkpoint(tmp_path), "cpu")
    assert model.fusion.encoder_3d.in_channels == 6
    frame = few(WithNormals, 1, "val")[0]
    result, = predict_frames(model, [frame], config)
    assert (result["labels"] >= 0).any()


class ToyTransformer(nn.Module):
    """Takes and gives what a backbone of Pointcept does: attention within every scene."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(9, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)

    def forward(self, point):
        assert point["grid_coord"].min() >= 0
        assert point["offset"][-1] == len(point["feat"])
        x = self.embed(torch.cat([point["coord"], point["feat"]], 1))
        scenes = x.tensor_split(point["offset"][:-1])
        feats = [self.layer(scene[None])[0] for scene in scenes]
        return types.SimpleNamespace(feat=torch.cat(feats))


def test_the_adapter_of_the_docs_trains_a_pointcept_backbone(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "backbones.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert len(snippet.split("class ")[1].strip().splitlines()) <= 16
    (tmp_path / "adapter.py").write_text(snippet)
    monkeypatch.syspath_prepend(tmp_path)
    adapter = importlib.import_module("adapter").PointceptEncoder(ToyTransformer())
    torch.manual_seed(0)
    fusion = BiFusionEncoder(Enhanced2DEncoder(TOWER, None, image_size=(64, 96)), adapter, dim_3d=32)
    head = nn.Linear(256, 20)
    dataset = PointDataset(few(WithNormals, 2), 200, (64, 96))
    batch = collate([dataset[0], dataset[1]])
    parameters = [p for p in (*fusion.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    losses = []
    for _ in range(12):
        logits = head(fusion(batch)["feat_fusion"])
        loss = nn.functional.cross_entropy(logits, batch["labels"].clamp(min=0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    one = fusion(collate([dataset[1]]))["feat_fusion"]
    both = fusion(batch)["feat_fusion"]
    assert torch.allclose(both[200:], one, atol=1e-5)  # a scene does not see its neighbors
