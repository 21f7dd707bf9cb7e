# SPDX-License-Identifier: MIT
"""The whole network, from pictures and points to instances: what must hold whatever its weights."""
import pytest
import torch

import train
from data import PointDataset, RoomFrames, collate
from decoder import InstanceDecoder, Segmenter, scene_instances
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder
from sparse_unet import SMALL, PointEncoder
from superpoints import SuperpointCache


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    cache = SuperpointCache(tmp_path_factory.mktemp("superpoints"), 24)
    frames = RoomFrames("train", 1, 4)
    return [{key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
             for key, value in sample.items()} for sample in PointDataset(frames, 1500, (96, 128), 2, superpoints=cache)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = Enhanced2DEncoder("ViT-S-32-alt", None, image_size=(96, 128))
    fusion = BiFusionEncoder(encoder, PointEncoder(0.15, **SMALL), point_target=True)
    return Segmenter(fusion, 7, InstanceDecoder(256, 7, embed_dim=64, ffn=64)).double().eval()


KEYS = ("logits", "feat_fusion", "clip_point", "valid", "alpha")


@torch.no_grad()
def test_a_batch_is_its_scenes_one_by_one(model, samples):
    whole = model(collate(samples))
    parts = [model(collate([sample])) for sample in samples]
    for key in (*KEYS, "clip_global"):
        torch.testing.assert_close(whole[key], torch.cat([part[key] for part in parts]), rtol=1e-9, atol=1e-9)
    batch = collate(samples)
    together = scene_instances(whole["decoder"], whole["superpoint"], batch["batch"], min_points=1)
    for scene, part in zip(together, parts):
        alone, = scene_instances(part["decoder"], part["superpoint"], torch.zeros_like(part["superpoint"]), min_points=1)
        assert torch.equal(scene["masks"], alone["masks"]) and torch.equal(scene["labels"], alone["labels"])
        torch.testing.assert_close(scene["scores"], alone["scores"])


@torch.no_grad()
def test_points_and_superpoint_numbers_may_come_in_any_order(model, samples):
    sample = samples[0]
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(sample["points"]), generator=g)
    names = torch.randperm(int(sample["superpoints"].max()) + 1, generator=g)
    shuffled = {key: value[order] if torch.is_tensor(value) and len(value) == len(order) else value
                for key, value in sample.items()}
    shuffled["superpoints"] = names[shuffled["superpoints"]]
    straight, mixed = model(collate([sample])), model(collate([shuffled]))
    for key in KEYS:
        torch.testing.assert_close(mixed[key], straight[key][order], rtol=1e-8, atol=1e-8)
    first, second = (scene_instances(out["decoder"], out["superpoint"], torch.zeros_like(out["superpoint"]),
                                     min_points=1)[0] for out in (straight, mixed))
    torch.testing.assert_close(second["scores"], first["scores"])
    assert torch.equal(second["masks"], first["masks"][:, order]) and torch.equal(second["labels"], first["labels"])


@torch.no_grad()
def test_points_that_no_camera_sees_are_what_the_baseline_makes_of_them(model, samples):
    batch = collate(samples)
    behind = torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))  # every depth becomes -1
    behind[2, 3] = -1
    batch["world2cam"] = behind.expand_as(batch["world2cam"])
    out = model.fusion(batch)
    assert not out["valid"].any() and torch.equal(out["feat_fusion"], out["feat_3d"]) and (out["alpha"] == 0).all()


def test_a_moved_scene_gives_the_same_features_where_camera_and_points_move_together(model, samples):
    sample = dict(samples[0])
    shift = torch.tensor([0.15 * 16 * 3, -0.15 * 16, 0.15 * 16 * 2], dtype=torch.float64)  # whole coarsest voxels
    moved = {**sample, "points": sample["points"] + shift, "coords": sample["coords"] + shift,
             "world2cam": sample["world2cam"].clone()}
    moved["world2cam"][:, :3, 3] -= sample["world2cam"][:, :3, :3] @ shift
    with torch.no_grad():
        straight, shifted = model(collate([sample])), model(collate([moved]))
    torch.testing.assert_close(shifted["logits"], straight["logits"], rtol=1e-6, atol=1e-6)


def test_every_term_reaches_every_part(model, samples):
    batch = collate(samples)
    out = model(batch)
    targets = train.instance_targets(batch["labels"] % 7, batch["instances"], out["superpoint"],
                                     out["superpoint_batch"])
    terms = {"semantic": train.SemanticCriterion()(out["logits"], batch["labels"] % 7),
             "instance": train.InstanceCriterion()(out["decoder"], targets),
             "clip": train.ClipConsCriterion()(out["feat_fusion"], out["clip_global"], batch["batch"], out["valid"])}
    parts = {"encoder_3d": model.fusion.encoder_3d.backbone.conv0p1s1.kernel,
             "spatial_proj": model.fusion.encoder_2d.spatial_proj.weight,
             "gate": model.fusion.gate.gate[0].weight}
    for name, term in terms.items():
        for part, grad in zip(parts, torch.autograd.grad(term, list(parts.values()), retain_graph=True)):
            assert grad.isfinite().all() and grad.abs().max() > 0, (name, part)
