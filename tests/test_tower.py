# SPDX-License-Identifier: MIT
"""Other image towers through everything that uses one: timm's, and one with what fusion.py asks for and no more."""
import functools
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import predict
import train
from data import PointDataset, collate
from encoder import Enhanced2DEncoder, TimmTower
from fusion import BiFusionEncoder
from helpers import CLIP_ON, TOWER, checkpoint, last_checkpoint, small
from model import load_model
from predict import predict_frames
from sources.rooms import RoomFrames
from sparse_unet import SMALL, PointEncoder
from support.queries import NEUTRAL, TextQueries


class PatchMeans(nn.Module):
    """The mean color of each patch as its token, and that of the image as the pooled feature."""

    image_size = (96, 128)

    def __init__(self, patch=16, dim=256):
        super().__init__()
        self.patch = patch
        self.spatial = nn.Conv2d(3, dim, 1)
        self.register_buffer("fixed", torch.eye(dim, 3))
        self.images_seen = 0

    def encode(self, images):
        self.images_seen += int(images.any())  # black ones only tell the shapes
        tokens = F.avg_pool2d(images, self.patch)
        return tokens, tokens.mean((2, 3))

    def project(self, tokens, pooled):
        return self.spatial(tokens.float()), F.linear(pooled.float(), self.fixed)

    def fingerprint(self):
        return f"mean colors of patches of {self.patch} pixels"


def test_a_tower_of_the_four_members_gives_images_and_cached_features_to_the_fusion():
    torch.manual_seed(0)
    tower = PatchMeans()
    net = BiFusionEncoder(tower, PointEncoder(0.5, **SMALL))
    batch = collate(list(PointDataset(RoomFrames("train", 2, 1, size=(60, 80)), 50, tower.image_size)))
    images = batch.pop("images")
    tokens, pooled = tower.encode(images[:, 0])
    out = net({**batch, "images": images})
    cached = net({**batch, "clip_tokens": tokens[:, None].half(), "clip_pooled": pooled[:, None].half()})
    assert out["valid"].all() and out["clip_dense"] is None
    assert_close(out["clip_global"], F.pad(images.mean((1, 3, 4)), (0, 253)))
    for name in ("feat_fusion", "clip_global", "clip_point"):
        assert_close(cached[name], out[name], rtol=1e-2, atol=1e-2)
    out["feat_fusion"].square().sum().backward()
    assert tower.spatial.weight.grad.any()


def test_a_tower_trains_and_fills_the_cache_from_which_it_resumes_and_predicts(tmp_path):
    tower, again = PatchMeans(), PatchMeans()
    options = ["--cache", str(tmp_path / "cache"), "--clip-warmup", "0,1", "--clip-weights", "0,0.001,0.01"]
    train.main(small(tmp_path, *options, "--epochs", "1"), tower=tower)
    path = last_checkpoint(tmp_path)
    first = checkpoint(tmp_path)
    assert first["clip_fingerprint"] == tower.fingerprint() and tower.images_seen

    train.main(["--resume", str(path), "--epochs", "2", *options[:2]], tower=again)
    second = checkpoint(tmp_path)
    assert second["epoch"] == 2 and not again.images_seen
    name = "fusion.encoder_2d.spatial.weight"
    assert not torch.equal(second["model"][name], first["model"][name])

    model, class_names, config = load_model(path, "cpu", tower=PatchMeans())
    assert torch.equal(model.state_dict()[name], second["model"][name])
    result, = predict_frames(model, RoomFrames("val", 1, 1), config)
    assert 0 <= result["labels"].max() < len(class_names)
    with pytest.raises(ValueError, match="clip_fingerprint differs"):
        load_model(path, "cpu", tower=PatchMeans(patch=32))


def test_a_tower_without_dense_features_is_refused_for_targets_per_point(tmp_path):
    with pytest.raises(AttributeError, match="PatchMeans.*encode_with_dense"):
        train.main(small(tmp_path, "--clip-target", "point"), tower=PatchMeans())


# -------------------------------------------------------------------------------- timm

ARCHITECTURES = {  # patch size and tokens before the patches
    "vit_small_patch14_reg4_dinov2": (14, 5), "vit_small_patch16_dinov3": (16, 5),
    "vit_base_patch14_reg1_tipsv2": (14, 2), "naflexvit_base_patch16_radio_v3": (16, 8),
    "vit_pe_spatial_tiny_patch16_512": (16, 1)}


@pytest.fixture
def small_models(monkeypatch):
    """timm's models with two blocks of width 64."""
    small_model = functools.partial(timm.create_model, embed_dim=64, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small_model)


def timm_tower(name, weights="none"):
    return TimmTower(f"timm:{name}", weights, model_name=TOWER, pretrained=None, image_size=(96, 128))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_tokens_are_timms_at_its_own_scaling_and_patches_and_the_rest_is_clips(small_models, name):
    tower, (patch, prefix) = timm_tower(name), ARCHITECTURES[name]
    images = torch.rand(2, 3, 96, 128)
    tokens, pooled, dense = tower.encode_with_dense(images)
    grid = round(96 / patch), round(128 / patch)
    resized = F.interpolate(images, (grid[0] * patch, grid[1] * patch), mode="bicubic", antialias=True).clamp(0, 1)
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    expected = tower.timm.forward_features((resized - mean) / std)
    if isinstance(expected, dict):
        expected = expected["patches"]
    assert_close(tokens.flatten(2).mT, expected[:, prefix:])
    assert tokens.shape == (2, 64, *grid)
    clip = Enhanced2DEncoder(TOWER, None, image_size=(96, 128))
    assert all(map(torch.equal, clip.encode_with_dense(images)[1:], (pooled, dense)))
    assert all(map(torch.equal, tower.encode(images), (tokens, pooled)))
    for block in tower.blocks:  # as --compile does
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    assert_close(tower.encode(images), (tokens, pooled))


def test_a_timm_tower_is_frozen_and_moves_along_and_all_its_features_depend_on_is_in_the_fingerprint(small_models):
    tower = timm_tower("vit_small_patch16_dinov3")
    trained = {name for name, p in nn.Sequential(tower).train().named_parameters() if p.requires_grad}
    assert trained == {"0.spatial_proj.weight", "0.spatial_proj.bias"} and not tower.timm.training
    assert len(tower.blocks) == 4 and set(tower.timm.blocks) < set(tower.blocks)
    prints = [tower.fingerprint(), timm_tower("vit_pe_spatial_tiny_patch16_512").fingerprint(),
              Enhanced2DEncoder(TOWER, None, image_size=(96, 128)).fingerprint()]
    assert timm_tower("vit_small_patch16_dinov3").fingerprint() == prints[0]  # random weights are always the same
    tower.timm.norm.weight.data[0] = 2
    prints.append(tower.fingerprint())
    assert len(set(prints)) == 4
    assert tower.double().encode(torch.rand(1, 3, 96, 128).double())[0].dtype == torch.float64


@pytest.mark.parametrize("name", list(ARCHITECTURES)[:4])
def test_a_timm_tower_trains_from_the_cache_and_resumes_and_predicts(small_models, tmp_path, name):
    options = (f"--epochs 1 --tower timm:{name} --tower-pretrained none --clip-target point {CLIP_ON} "
               "--rooms 1 --val-rooms 1 --num-points 300 --no-instances")
    train.main(small(tmp_path, options))
    path, first = last_checkpoint(tmp_path), checkpoint(tmp_path)
    assert "IS RANDOMLY INITIALISED" in first["warnings"][0]
    train.main(["--resume", str(path), "--epochs", "2", "--cache", str(tmp_path / "cache")])
    second = checkpoint(tmp_path)
    weight = "fusion.encoder_2d.spatial_proj.weight"
    assert first["model"][weight].shape == (256, 64, 1, 1)
    assert not torch.equal(first["model"][weight], second["model"][weight])
    model, class_names, config = load_model(path, "cpu")
    queries = TextQueries(model.fusion.encoder_2d, "chair")
    result, = predict_frames(model, RoomFrames("val", 1, 1, size=(60, 80)), config, queries=queries)
    assert 0 <= result["labels"].max() < len(class_names) and result["queries"].any()
    torch.save(timm.create_model(name).state_dict(), tmp_path / "others.pt")
    with pytest.raises(ValueError, match="clip_fingerprint differs"):
        load_model(path, "cpu", tower_pretrained=str(tmp_path / "others.pt"))


def test_weights_of_a_timm_tower_come_from_a_file_and_what_does_not_fit_is_named(tmp_path):
    name, path = "test_vit", tmp_path / "weights.pt"
    torch.manual_seed(3)
    weights = timm.create_model(name).state_dict()
    torch.save(weights, path)
    tower = timm_tower(name, str(path))
    assert_close(dict(tower.timm.blocks.state_dict()), {key.removeprefix("blocks."): value for key, value in
                                                        weights.items() if key.startswith("blocks.")})
    weights["blocks.1.mlp.fc1.bias"][5] = math.nan
    torch.save(weights, path)
    with pytest.raises(ValueError, match="weights.pt: field blocks.1.mlp.fc1.bias holds NaN"):
        timm_tower(name, str(path))
    torch.save({"head": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"{name}, weights .*weights.pt: "):
        timm_tower(name, str(path))
    for bad, message in (("vit_smal_patch14_dinov2", "Unknown model.*vit_small_patch14_dinov2"),
                         ("test_resnet", "ResNet is not a vision transformer")):
        with pytest.raises(ValueError, match=message):
            timm_tower(bad)
    with pytest.raises(ValueError, match="--tower dinov2: must be timm:NAME"):
        TimmTower("dinov2", "none", model_name=TOWER, pretrained=None)


@pytest.mark.parametrize("options", [["--no-clip"], ["--clip-blocks", "1"]])
def test_a_timm_tower_needs_a_frozen_clip(options, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--tower", "timm:vit_small_patch16_dinov3", *options])
    assert "give neither --no-clip nor --clip-blocks" in capsys.readouterr().err


# -------------------------------------------------------------------------------- text from a file


def test_text_from_a_file_answers_as_the_towers_own_and_what_it_lacks_is_named(tmp_path):
    tower, path = Enhanced2DEncoder(TOWER, None, image_size=(96, 128)), tmp_path / "text.pt"
    own = TextQueries(tower, "red sofa | couch, lamp")
    vectors = dict(zip(["red sofa", "couch", "lamp", *NEUTRAL], 3 * own.embedding))
    torch.save(vectors, path)
    for source in ("clip", "fused"):
        own, read = (TextQueries(tower, "red sofa | couch, lamp", source, embeddings=file) for file in (None, path))
        assert_close(read.embedding, own.embedding)
    assert read.described()["from"] == f"embeddings: {path}"
    args = predict.parse_args(["best.pt", "--data", "rooms", "--out", str(tmp_path / "out"), "--text", "chair",
                               "--text-embeddings", str(path)])
    model = SimpleNamespace(fusion=SimpleNamespace(encoder_2d=tower))
    with pytest.raises(ValueError, match=r"text.pt: 'chair' needs .* vector \(64,\), found none.*red sofa, couch"):
        predict.open_queries(args, model, {"clip_pretrained": "openai"})
    for bad in (torch.zeros(512), torch.full((64,), math.nan), "lamp"):
        torch.save({**vectors, "lamp": bad}, path)
        with pytest.raises(ValueError, match=r"'lamp' needs a finite vector \(64,\), found"):
            TextQueries(tower, "lamp", embeddings=path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="text.pt: must hold a dict .*found a list"):
        TextQueries(tower, "lamp", embeddings=path)
