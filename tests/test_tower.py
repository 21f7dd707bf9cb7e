# SPDX-License-Identifier: MIT
"""An image tower of a few lines, with what fusion.py asks of a tower and no more, through everything that uses one."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import train
from fusion import BiFusionEncoder
from helpers import checkpoint, last_checkpoint, small
from model import load_model
from predict import predict_frames
from sources.rooms import RoomFrames


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


class Colors(nn.Module):
    """A 3D encoder that knows the colors of the points."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 96)

    def forward(self, batch):
        return self.layer(batch["features"])


def test_a_tower_of_the_four_members_gives_images_and_cached_features_to_the_fusion():
    torch.manual_seed(0)
    tower = PatchMeans()
    net = BiFusionEncoder(tower, Colors())
    points = torch.rand(50, 3) + torch.tensor([-0.5, -0.5, 1.0])
    intrinsics = torch.tensor([[100.0, 0, 63.5], [0, 100, 47.5], [0, 0, 1]])
    batch = {"points": points, "coords": points, "features": torch.rand(50, 3), "batch": torch.arange(50) // 25,
             "world2cam": torch.eye(4).expand(2, 1, 4, 4), "intrinsics": intrinsics.expand(2, 1, 3, 3)}
    images = torch.rand(2, 1, 3, *tower.image_size)
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
