# SPDX-License-Identifier: MIT
"""Weights of other projects, the colours that they know, and backbones that are not ours."""
import functools
import importlib
import io
import itertools
import math
import pickle
import re
import resource
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_unet
import train
from data import PointDataset, collate
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder
from helpers import TOWER, checkpoint, small
from sources.rooms import RoomFrames
from sparse_unet import COLORS, NETWORKS, PointEncoder, Res16UNet34C, load_backbone
from test_diagnose import broken_batches, replayed, saved_steps
from test_sparse_unet import TINY, error, figures, value  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
value_once = functools.lru_cache(value)  # the networks of most projects have most tensors in common


def named_weights(final=None, **options):
    """The tensors of a network, made from their names as MinkowskiEngine's figures were."""
    with torch.device("meta"):
        network = Res16UNet34C(final=final, **options)
    return {key: torch.zeros(tuple(tensor.shape), dtype=torch.int64) if key.endswith("tracked")
            else value_once(key, tensor.shape, key.rpartition(".")[2]) for key, tensor in network.state_dict().items()}


class Poison:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def foreign():
    """A function that makes an object of a package which is gone when it returns to the test."""
    made = []

    def make(module, name, **attributes):
        for part in itertools.accumulate(module.split("."), "{}.{}".format):
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                made.append(part)
        kind = type(name, (dict,) if name.endswith("Config") else (), {"__module__": module})
        setattr(sys.modules[module], name, kind)
        thing = kind()
        vars(thing).update(attributes)
        return thing

    make.forget = lambda: [sys.modules.pop(part, None) for part in made]
    yield make


# project: prefix of the keys, what is nested beside the weights, its other keys, the network's options, its colours.
# The prefixes, last layers and colours are those of the projects' sources.
LAYOUTS = {
    "ESAM": ("backbone.", ("message_hub", "mmengine.logging.message_hub", "MessageHub"), ["decoder.x.weight"],
             dict(NETWORKS["res16unet34c"]), "scannet"),
    "oneformer3d": ("backbone.", ("message_hub", "mmengine.logging.message_hub", "MessageHub"), ["decoder.x.weight"],
                    dict(NETWORKS["res16unet34c"], final=(96, True)), "scannet"),
    "Mask3D": ("model.backbone.", ("hyper_parameters", "omegaconf.dictconfig", "DictConfig"), ["model.query.weight"],
               dict(NETWORKS["res16unet34c"], final=(20, True)), "scannet"),
    "UnScene3D": ("model.backbone.", ("hyper_parameters", "omegaconf.dictconfig", "DictConfig"), ["criterion.weight"],
                  dict(NETWORKS["res16unet34c-k3"], final=(20, True)), "scannet"),
    "LanguageGroundedSemseg": ("model.", ("hyper_parameters", "pytorch_lightning.utilities", "AttributeDict"), [],
                               dict(NETWORKS["res16unet34c-k3"], final=(200, True)), "centred"),
    "LanguageGroundedSemseg, 34C from CLIP": (
        "model.", ("hyper_parameters", "pytorch_lightning.utilities", "AttributeDict"), [],
        NETWORKS["res16unet34c-k3-clip"], "centred"),
    "LanguageGroundedSemseg, 34D": ("model.", ("hyper_parameters", "pytorch_lightning.utilities", "AttributeDict"), [],
                                    dict(NETWORKS["res16unet34d-k3-clip"], final=(200, True)), "centred"),
    "OpenScene": ("module.net3d.", ("best_iou", "numpy_of_old", "float64"), [],
                  dict(NETWORKS["minkunet18a"], final=(768, False)), "ones"),
    "Pointcept": ("module.backbone.", ("best_metric_value", "numpy_of_old", "float64"), ["module.criteria.weight"],
                  dict(NETWORKS["res16unet34c"], in_channels=9, final=(20, True)), None)}


def publish(path, layout, foreign, poison=None, **changes):
    """Writes a file as that project does -> the weights in it."""
    prefix, (field, module, name), others, options, _ = layout
    weights = named_weights(**options)
    tensors = {prefix + key: tensor for key, tensor in weights.items()} | {key: torch.ones(3, 4) for key in others}
    tensors |= changes
    thing = foreign(module, name, history=[np.float64(0.5), torch.ones(2)], poison=poison)
    torch.save({"epoch": 7, "state_dict": tensors, field: thing, "optimizer": {"state": {0: torch.ones(5)}}}, path)
    foreign.forget()
    assert module not in sys.modules
    return weights


def dense_network(weights, last_relu, coords, feats):
    """What a network with these weights computes, by torch's dense convolutions of a cube of 16^3 voxels."""
    weights = {key: tensor.double() for key, tensor in weights.items()}
    occupied = torch.zeros(16, 16, 16).index_put(tuple(coords[:, 1:].T), torch.ones(()))
    masks = {size: F.max_pool3d(occupied[None, None], 16 // size).double() for size in (16, 8, 4, 2, 1)}

    def conv(x, key, stride=1, transposed=False):
        kernel = weights[f"{key}.kernel"]
        K = round(len(kernel) ** (1 / 3)) if kernel.ndim == 3 else 1
        cube = kernel.view(K, K, K, *kernel.shape[-2:]).permute(4, 3, 2, 1, 0)  # (Cout, Cin, x, y, z)
        if transposed:
            out = F.conv_transpose3d(x, cube.transpose(0, 1), stride=2)
        else:
            out = F.conv3d(x, cube, stride=stride, padding=K // 2 * (K % 2))
        return out * masks[out.shape[-1]]

    def norm(x, key):
        parts = (weights[f"{key}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5) * masks[x.shape[-1]]

    def block(x, key):
        out = norm(conv(x, f"{key}.conv1"), f"{key}.norm1").relu()
        out = norm(conv(out, f"{key}.conv2"), f"{key}.norm2")
        if f"{key}.downsample.0.kernel" in weights:
            x = norm(conv(x, f"{key}.downsample.0"), f"{key}.downsample.1")
        out = out + x
        return out if key == last and not last_relu else out.relu()

    def stage(x, i):
        for j in itertools.takewhile(lambda j: f"block{i}.{j}.conv1.kernel" in weights, itertools.count()):
            x = block(x, f"block{i}.{j}")
        return x

    last = max(key for key in weights if key.startswith("block8."))[:len("block8.0")]
    x = torch.zeros(1, feats.shape[1], 16, 16, 16, dtype=torch.float64)
    rows = (0, slice(None), *coords[:, 1:].T)
    x[rows] = feats.T
    x = norm(conv(x, "conv0p1s1"), "bn0").relu()
    skips = [x]
    for i, key in enumerate(("conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2"), 1):
        x = stage(norm(conv(x, key, stride=2), f"bn{i}").relu(), i)
        skips.append(x)
    skips.pop()
    for i, key in enumerate(("convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2"), 4):
        x = norm(conv(x, key, transposed=True), f"bntr{i}").relu()
        x = stage(torch.cat([x, skips.pop()], 1), i + 1)
    return x[rows].T


@pytest.mark.parametrize("project", LAYOUTS)
def test_a_published_file_loads_without_its_packages_and_runs_nothing(project, tmp_path, foreign, figures):
    prefix, _, _, options, colors = layout = LAYOUTS[project]
    weights = publish(tmp_path / "file.pth", layout, foreign, Poison(tmp_path / "poisoned"))
    network, found, loaded = load_backbone(tmp_path / "file.pth")
    assert not (tmp_path / "poisoned").exists()
    assert found == colors and project.split(",")[0] in re.search("project (.*), dropped", loaded)[1]
    assert ("final" in options) == ("'final.kernel'" in loaded)
    assert network.options == dict(in_channels=3, last_relu=True) | {k: v for k, v in options.items() if k != "final"}
    state = network.state_dict()
    assert state.keys() == {key for key in weights if not key.startswith("final.")} and not network.training
    assert all(torch.equal(tensor, weights[key]) for key, tensor in state.items())
    assert len(state) == (288 if project == "OpenScene" else 372)
    if project in ("oneformer3d", "Mask3D", "LanguageGroundedSemseg", "LanguageGroundedSemseg, 34D"):
        return  # ESAM's or UnScene3D's network, or a wider one
    coords = torch.cat([torch.zeros(400, 1).long(), torch.randint(16, (400, 3))], 1).unique(dim=0)
    feats = torch.randn(len(coords), network.options["in_channels"], dtype=torch.float64)
    with torch.no_grad():
        expected = dense_network(weights, network.options["last_relu"], coords, feats)
        assert error(network.double()(coords, feats), expected) < 1e-9
        if project == "ESAM":
            out = network.float()(figures["coords"], figures["feats3"])
            assert error(out[::figures["step"]], figures["res16unet34c.out_eval"]) < 1e-5


def test_the_poison_of_these_tests_works_on_pickle_itself(tmp_path):
    pickle.loads(pickle.dumps(Poison(tmp_path / "poisoned")))
    assert (tmp_path / "poisoned").exists()


def test_the_last_layer_is_kept_on_request(tmp_path, foreign):
    for final in ((5, False), (6, True)):
        layout = ("module.net3d.", ("best_iou", "numpy_of_old", "float64"), [], dict(TINY, stem=5, final=final), "ones")
        weights = publish(tmp_path / "file.pth", layout, foreign)
        coords, feats = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), torch.ones(2, 3)
        whole, cut = load_backbone(tmp_path / "file.pth", final=True)[0], load_backbone(tmp_path / "file.pth")[0]
        expected = cut(coords, feats) @ weights["final.kernel"] + weights.get("final.bias", 0)
        assert torch.allclose(whole(coords, feats), expected) and whole.out_channels == final[0]


def tiny(path, foreign, prefix="backbone.", **changes):
    return publish(path, (prefix, ("meta", "numpy_of_old", "float64"), [], dict(TINY, stem=5), None), foreign, **changes)


@pytest.mark.parametrize("change, message", [
    ({"backbone.conv0p1s1.kernel": torch.zeros(124, 3, 8)}, r"conv0p1s1.kernel has shape \(124, 3, 8\)"),
    ({"teacher.conv0p1s1.kernel": torch.zeros(125, 3, 8)}, "2 keys end in conv0p1s1.kernel"),
    ({"backbone.bn0.bn.weight": torch.full((8,), torch.nan)}, r"backbone.bn0.bn.weight \(8,\) holds NaN or inf"),
    ({"backbone.bn0.bn.weight": torch.zeros(9)}, r"bn0.bn.weight is \(9,\), expected \(8,\)"),
    ({"backbone.block9.0.conv1.kernel": torch.zeros(2)}, "block9.0.conv1.kernel is .*expected no such key")])
def test_a_file_that_does_not_fit_is_refused_by_name(change, message, tmp_path, foreign):
    tiny(tmp_path / "file.pth", foreign, **change)
    with pytest.raises(ValueError, match=f"file.pth.*{message}|(?s:file.pth.*{message})"):
        load_backbone(tmp_path / "file.pth")


def test_a_file_that_is_damaged_old_or_absent_is_refused_by_name(tmp_path, foreign):
    tiny(tmp_path / "whole.pth", foreign)
    whole = (tmp_path / "whole.pth").read_bytes()
    entry = next(e for e in zipfile.ZipFile(tmp_path / "whole.pth").infolist() if e.filename.endswith("/data/0"))
    flipped = bytearray(whole)
    flipped[entry.header_offset + entry.file_size // 2 + 100] ^= 1
    torch.save(named_weights(**TINY, stem=5), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, content in (("cut", whole[:-500]), ("empty", b""), ("flipped", flipped)):
        (tmp_path / f"{name}.pth").write_bytes(content)
    for name in ("cut", "empty", "flipped", "old"):
        with pytest.raises(ValueError, match=f"{name}.pth: not a checkpoint in the zip format"):
            load_backbone(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_backbone(tmp_path / "absent.pth")


@pytest.mark.parametrize("size, stride, offset", [((9,), (1,), 0), ((8,), (2,), 0), ((8,), (1,), 1), ((8,), (-1,), 7),
                                                  ((10 ** 6, 10 ** 6), (0, 0), 0), ((0,), (1,), 0)])
def test_a_tensor_that_claims_more_than_its_storage_is_refused(size, stride, offset, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/data/0", np.zeros(8, np.float32).tobytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, pytest.raises(ValueError, match="8 values"):
        sparse_unet.StoredTensor("0", torch.float32, offset, size, stride).read(archive, "a/")


def test_a_pickle_that_names_a_huge_index_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hostile = b"\x80\x02}r\xff\xff\xff\x3f."  # an empty dict, remembered under 2^30 - 1
    assert sparse_unet.TensorUnpickler(io.BytesIO(hostile)).load() == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 17  # KiB


def test_keys_that_share_one_storage_do_not_multiply_the_memory_of_a_file(tmp_path, foreign):
    shared = torch.zeros(2 ** 16)
    tiny(tmp_path / "file.pth", foreign, **{f"backbone.block1.{i}.x": shared for i in range(9)})
    with pytest.raises(ValueError, match="file.pth.*claim more values than fit in it"):
        load_backbone(tmp_path / "file.pth")


# ---------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("prefix, stem, channels, width, wide, expected", [
    ("backbone.", 5, 3, None, 96, ("ESAM or oneformer3d", "scannet", True)),
    ("unet.", 5, 3, 96, 96, ("ESAM or oneformer3d", "scannet", True)),
    ("model.backbone.", 5, 3, 20, 96, ("Mask3D", "scannet", True)),
    ("model.backbone.", 5, 3, 200, 96, ("Mask3D", "scannet", True)),
    ("model.backbone.", 5, 3, 13, 96, ("Mask3D", None, True)),  # S3DIS
    ("model.backbone.", 3, 3, 20, 96, ("UnScene3D", "scannet", True)),
    ("model.", 3, 3, 200, 96, ("LanguageGroundedSemseg", "centred", True)),
    ("model.", 3, 3, None, 96, ("LanguageGroundedSemseg", "centred", False)),
    ("model.", 3, 3, 200, 512, ("LanguageGroundedSemseg", "centred", False)),
    ("net3d.", 5, 3, 768, 96, ("OpenScene", "ones", True)),
    ("module.backbone.", 5, 9, 20, 96, ("Pointcept", None, True)),
    ("", 5, 3, None, 96, (None, None, True)), ("", 3, 3, None, 96, (None, None, True)),
    ("backbone.", 5, 6, None, 96, (None, None, True)), ("my_backbone.", 5, 3, None, 96, (None, None, True))])
def test_colours_follow_from_what_only_one_project_publishes(prefix, stem, channels, width, wide, expected):
    planes, final = (*sparse_unet.PLANES[:7], wide), width and (width, True)
    options = dict(stem=stem, in_channels=channels, planes=planes, final=final)
    assert sparse_unet.recognize(prefix, options, {}) == expected


@pytest.mark.parametrize("colors", COLORS)
def test_the_first_convolution_sees_colours_as_the_weights_know_them(colors):
    mean, std = COLORS[colors] or (None, None)
    encoder = PointEncoder(0.1, color_mean=mean, color_std=std, **TINY)
    seen = []
    encoder.backbone.conv0p1s1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = torch.rand(50, 3)
    coords = torch.arange(50.0)[:, None].expand(50, 3)  # one point per voxel
    encoder({"coords": coords, "features": features, "batch": torch.zeros(50, dtype=torch.long)})
    c = features.double()
    expected = {"signed": 2 * c - 1, "centred": c - 0.5, "raw": c, "ones": torch.ones_like(c),
                "scannet": (255 * c - 255 * torch.tensor(COLORS["scannet"][0]).double()) / (
                    255 * torch.tensor(COLORS["scannet"][1]).double())}[colors]
    assert torch.allclose(seen[0].double(), expected, atol=1e-6)
    assert not any("color" in key for key in encoder.state_dict())


@pytest.mark.parametrize("options, message", [
    (dict(color_std=0.0), "color_std"), (dict(color_mean=(1.0, 2.0)), "color_mean"),
    (dict(color_mean=float("nan")), "color_mean")])
def test_colours_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PointEncoder(0.1, **options, **TINY)


def test_a_run_that_starts_from_a_file_keeps_its_network_and_colours(tmp_path, foreign, capsys, monkeypatch):
    narrow = dict(TINY, stem=3)
    monkeypatch.setitem(NETWORKS, "minkunet18a", narrow)
    layout = ("module.net3d.", ("best_iou", "numpy_of_old", "float64"), [], narrow, "ones")
    monkeypatch.setitem(sparse_unet.PROJECTS, "OpenScene", (r"module\.net3d\.", 3, 3, "ones"))
    weights = publish(tmp_path / "file.pth", layout, foreign)
    train.main(small(tmp_path, "--init-3d", str(tmp_path / "file.pth"), "--lr-3d", "0", "--epochs", "1", "--no-clip",
                     "--no-instances", "--clip-warmup=-1", "--clip-weights", "0,0"))
    assert "--backbone minkunet18a, --colors ones" in capsys.readouterr().out
    state = checkpoint(tmp_path)
    assert (state["config"]["backbone"], state["config"]["colors"]) == ("minkunet18a", "ones")
    kernel = state["model"]["fusion.encoder_3d.backbone.conv0p1s1.kernel"]
    assert torch.equal(kernel, weights["conv0p1s1.kernel"])
    path = next((tmp_path / "runs").glob("*/last.pt"))
    (tmp_path / "file.pth").unlink()
    train.main(["--resume", str(path), "--device", "cpu"])  # needs neither the file nor an option

    network, colors, loaded = load_backbone(path)  # a run's own file
    assert colors == "ones" and "project BiFusion," in loaded and torch.equal(network.conv0p1s1.kernel, kernel)


@pytest.mark.parametrize("prefix, options, message", [
    ("unheard_of.", [], "does not tell how these weights saw colours: give --colors signed"),
    ("backbone.", ["--backbone", "small"], "and not small")])
def test_weights_that_cannot_be_placed_are_refused(prefix, options, message, tmp_path, foreign, monkeypatch):
    monkeypatch.setitem(NETWORKS, "res16unet34c", dict(TINY, stem=5))
    tiny(tmp_path / "file.pth", foreign, prefix)
    with pytest.raises(ValueError, match=message):
        train.main(small(tmp_path, "--init-3d", str(tmp_path / "file.pth"), *options))
    assert not (tmp_path / "runs").exists()


def test_weights_and_scales_of_colours_alone_are_refused_for_points_with_more(tmp_path, foreign, monkeypatch):
    monkeypatch.setitem(NETWORKS, "res16unet34c", dict(TINY, stem=5))
    monkeypatch.setattr(train, "RoomFrames", WithNormals)
    tiny(tmp_path / "file.pth", foreign)
    with pytest.raises(ValueError, match="--colors scannet is for points with 3 features"):
        train.main(small(tmp_path, "--no-clip", "--colors", "scannet"))
    with pytest.raises(ValueError, match="file.pth is for points with 3 features, .* num_features 6"):
        train.main(small(tmp_path, "--no-clip", "--init-3d", str(tmp_path / "file.pth")))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- other backbones


class WithNormals(RoomFrames):
    """Built-in rooms with an image of three more numbers per pixel, in [-1, 1]."""

    num_features = 6

    def __getitem__(self, index):
        frame = super().__getitem__(index)
        v, u = np.mgrid[:frame["depth"].shape[0], :frame["depth"].shape[1]]
        return {**frame, "features": np.stack([np.sin(u), np.cos(v), np.sin(u + v)], 2)}


def test_features_of_a_frame_stand_beside_the_colours_of_its_points():
    source = WithNormals("train", 1, 2)
    frame = source[0]
    for options in ({}, {"augment": True}, {"color": False}):
        plain = PointDataset(RoomFrames("train", 1, 2), 500, (64, 96), **options)[0]
        sample = PointDataset(source, 500, (64, 96), **options)[0]
        assert sample["features"].shape == (500, 6) and torch.equal(sample["features"][:, :3], plain["features"])
    camera = sample["points"].double().numpy() @ frame["world2cam"][:3, :3].T + frame["world2cam"][:3, 3]
    u, v = np.rint((camera @ frame["depth_intrinsics"].T)[:, :2] / camera[:, 2:]).astype(int).T
    assert np.allclose(sample["features"][:, 3:], frame["features"][v, u], atol=1e-6)


def test_features_of_another_size_or_with_nan_are_refused():
    frame = WithNormals("train", 1, 1)[0]
    for features in (frame["features"][:-1], frame["features"][..., 0], frame["features"] * np.nan,
                     frame["features"].astype(int)):
        with pytest.raises(ValueError, match="train0000/0: features has shape"):
            PointDataset([{**frame, "features": features}], 100, (64, 96))[0]


def test_a_network_with_features_of_any_width_is_trained_replayed_and_loaded(tmp_path, monkeypatch, capsys):
    from model import load_model
    from predict import predict_frames
    monkeypatch.setattr(train, "RoomFrames", WithNormals)
    broken_batches(monkeypatch, lambda batch: batch["features"][2].fill_(math.nan), when=(0,))
    train.main(small(tmp_path, "--no-instances", "--epochs", "1"))
    printed, _ = replayed(saved_steps(tmp_path)[0], capsys)
    assert "field 'features'" in printed and "holds 6 values" in printed
    model, _, config = load_model(next((tmp_path / "runs").glob("*/last.pt")), "cpu")
    assert model.fusion.encoder_3d.in_channels == 6
    result, = predict_frames(model, [WithNormals("val", 1, 1)[0]], config)
    assert (result["labels"] >= 0).any()


class ToyTransformer(nn.Module):
    """Takes and gives what a backbone of Pointcept does: attention within every scene."""

    def __init__(self, in_channels=6, width=32):
        super().__init__()
        self.embed = nn.Linear(in_channels + 3, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0.0)

    def forward(self, point):
        assert point["grid_coord"].min() >= 0 and point["offset"][-1] == len(point["feat"])
        x = self.embed(torch.cat([point["coord"], point["feat"]], 1))
        sizes = torch.diff(point["offset"], prepend=point["offset"].new_zeros(1)).tolist()
        return types.SimpleNamespace(feat=torch.cat([self.layer(part[None])[0] for part in x.split(sizes)]))


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
    dataset = PointDataset(WithNormals("train", 2, 1), 200, (64, 96))
    batch = collate([dataset[0], dataset[1]])
    optimizer = torch.optim.Adam([p for p in (*fusion.parameters(), *head.parameters()) if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(head(fusion(batch)["feat_fusion"]), batch["labels"].clamp(min=0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    one = fusion(collate([dataset[1]]))["feat_fusion"]
    assert torch.allclose(fusion(batch)["feat_fusion"][200:], one, atol=1e-5)  # a scene does not see its neighbours
