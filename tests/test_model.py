# SPDX-License-Identifier: MIT
"""model.py: what must hold for the whole network, whatever its weights, and what a loaded one is."""
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from support.checkpoint import write_atomically
from data import PointDataset, check_frames, collate
from decoder import InstanceDecoder, draw_queries, scene_instances
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder, FusionGate
from helpers import Forked, checkpoint, last_checkpoint, small
from model import Segmenter, asked_logits, load_model, run_command
from sources.rooms import RoomFrames
from sparse_unet import SMALL, PointEncoder
from superpoints import oversegment


def only_scene(out):
    """The instances of a network's output for one scene."""
    points = out["point_to_superpoint"]
    return scene_instances(out["decoder"], points, torch.zeros_like(points), min_points=1)[0]


@pytest.fixture(scope="module")
def samples():
    dataset = PointDataset(RoomFrames("train", 1, 4), 1500, (96, 128), 2, superpoints=partial(oversegment, count=24))
    return [{key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
             for key, value in sample.items()} for sample in dataset]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = Enhanced2DEncoder("ViT-S-32-alt", None, image_size=(96, 128))
    fusion = BiFusionEncoder(encoder, PointEncoder(0.15, **SMALL), dense_target=True)
    return Segmenter(fusion, 7, InstanceDecoder(256, 7, embed_dim=64, ffn=64)).double().eval()


KEYS = ("logits", "feat_fusion", "clip_point", "clip_dense", "valid", "alpha")


@torch.no_grad()
def test_a_batch_is_its_scenes_one_by_one(model, samples):
    whole = model(collate(samples))
    parts = [model(collate([sample])) for sample in samples]
    for key in (*KEYS, "clip_global"):
        torch.testing.assert_close(whole[key], torch.cat([part[key] for part in parts]), rtol=1e-9, atol=1e-9)
    batch = collate(samples)
    together = scene_instances(whole["decoder"], whole["point_to_superpoint"], batch["batch"], min_points=1)
    for scene, part in zip(together, parts):
        alone = only_scene(part)
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
    first, second = only_scene(straight), only_scene(mixed)
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
    batch["labels"] = batch["labels"] % 7
    args = train.parse_args(["--clip-warmup=-1", "--clip-weights", "0,0.1"])
    _, terms = train.compute_losses(model, batch, train.build_criteria(args), train.loss_weights(args, 0))
    assert set(terms) == {"semantic", "instance_class", "instance_bce", "instance_dice", "instance_quality", "clip"}
    parts = {"encoder_3d": model.fusion.encoder_3d.backbone.conv0p1s1.kernel,
             "spatial_proj": model.fusion.encoder_2d.spatial_proj.weight,
             "gate": model.fusion.gate.gate[0].weight}
    for name, term in terms.items():
        if name == "instance_quality":
            continue  # zero until a mask is better than half right
        for part, grad in zip(parts, torch.autograd.grad(term, list(parts.values()), retain_graph=True)):
            assert grad.isfinite().all() and grad.abs().max() > 0, (name, part)


class ChannelGate(torch.nn.Module):
    """One gate per channel."""

    def __init__(self, dim):
        super().__init__()
        self.linear = torch.nn.Linear(2 * dim, dim)

    def forward(self, feat_3d, feat_2d, valid):
        feat_2d = feat_2d.where(valid[:, None], 0)
        alpha = self.linear(torch.cat([feat_3d, feat_2d], 1)).sigmoid().where(valid[:, None], 0)
        return torch.lerp(feat_3d, feat_2d, alpha), alpha


def test_another_gate_and_another_backbone_are_one_argument_each(samples):
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Linear(6, 96)

        def forward(self, batch):
            return self.mlp(torch.cat([batch["coords"], batch["features"]], 1))

    encoder = Enhanced2DEncoder("ViT-S-32-alt", None, image_size=(96, 128))
    network = Segmenter(BiFusionEncoder(encoder, Toy(), gate=ChannelGate(256)), 7).double()
    out = network(collate(samples))
    assert out["alpha"].shape == (len(out["logits"]), 256) and out["logits"].shape[1] == 7
    out["logits"].sum().backward()
    assert network.fusion.gate.linear.weight.grad.any() and network.fusion.encoder_3d.mlp.weight.grad.any()
    plain = BiFusionEncoder(encoder, Toy())
    assert isinstance(plain.gate, FusionGate)


@pytest.mark.parametrize("options", [[], ["--no-clip"], ["--no-instances", "--clip-blocks", "1"]])
def test_a_loaded_model_is_the_trained_one_in_eval_mode(tmp_path, samples, options):
    train.main(small(tmp_path, "--epochs", "1", *options))
    network, class_names, config = load_model(last_checkpoint(tmp_path), "cpu")
    state = checkpoint(tmp_path)
    assert not network.training and class_names == state["class_names"] and config == state["config"]
    assert all(torch.equal(value, state["model"][key]) for key, value in network.state_dict().items())
    single = [{key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
               for key, value in sample.items()} for sample in samples]
    with torch.no_grad():
        assert network(collate(single))["logits"].shape[1] == len(class_names)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The folder of a run without CLIP."""
    folder = tmp_path_factory.mktemp("baseline")
    train.main(small(folder, "--epochs", "1", "--no-clip"))
    return folder


def test_loading_needs_no_tensorboard(baseline):
    """The front of a notebook: the package that only training needs is not imported."""
    def notebook():
        own = {path.stem for path in Path(train.__file__).parent.glob("*.py")}
        for name in list(sys.modules):
            if name in own or "tensorboard" in name:
                del sys.modules[name]
        sys.modules["tensorboard"] = sys.modules["torch.utils.tensorboard"] = None  # importing them raises
        from model import load_model
        import predict  # noqa: F401
        assert not load_model(last_checkpoint(baseline))[0].training
    status, _, errors = Forked(notebook).wait()
    assert status == 0, errors


def test_a_random_tower_is_said_when_its_checkpoint_is_loaded(baseline, tmp_path):
    state = checkpoint(baseline)
    write_atomically({**state, "warnings": ["CLIP IS RANDOMLY INITIALISED"]}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="x.pt: CLIP IS RANDOMLY INITIALISED"):
        model, _, _ = load_model(tmp_path / "x.pt")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state["model"].items())


@pytest.mark.parametrize("field", ["backbone", "colors"])
def test_a_config_without_a_known_network_or_colours_is_refused(baseline, tmp_path, field):
    state = checkpoint(baseline)
    for config in (state["config"] | {field: "x"}, state["config"] | {field: [1]},
                   {key: value for key, value in state["config"].items() if key != field}):
        write_atomically({**state, "config": config}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: field config.{field} is"):
            load_model(tmp_path / "x.pt")


def test_another_tower_or_a_missing_file_is_refused(trained, tmp_path):
    state = checkpoint(trained[0])
    state["config"]["image_size"] = (64, 96)
    write_atomically(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: clip_fingerprint differs"):
        load_model(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="y.pt does not exist"):
        load_model(tmp_path / "y.pt")


def test_superpoints_ask_the_instances_that_hold_them():
    """Against plain loops, for scenes with different numbers of queries and superpoints."""
    torch.manual_seed(0)
    sizes, query_sizes, K = [3, 5], [4, 2], 6
    decoder = InstanceDecoder(8, K, embed_dim=16, num_heads=2, ffn=16).eval()
    feats = torch.randn(8, 8)
    scenes = torch.tensor([0] * 3 + [1] * 5)
    queries = {**draw_queries(scenes), "rows": torch.tensor([0, 1, 2, 1, 3, 6]), "query_sizes": query_sizes,
               "query": torch.tensor([[0, 1, 2, 1], [0, 3, -1, -1]])}
    out = decoder(feats, scenes, queries=queries)
    asked = asked_logits(out["padded"], sizes)
    rows = []
    for classes, masks in zip(out["layers"][-1]["class_logits"], out["layers"][-1]["mask_logits"]):
        for s in range(masks.shape[1]):
            held = masks[:, s].sigmoid()
            rows.append(sum(held[q] * classes[q, :K] for q in range(len(held))) / (1 + held.sum()))
    assert asked.shape == (8, K) and torch.allclose(asked, torch.stack(rows), atol=1e-6)


def test_an_error_in_a_worker_is_one_line(capsys):
    frame = RoomFrames("train", 1, 1, size=(24, 32))[0]
    broken = PointDataset([{**frame, "depth": frame["depth"] * 0}], 10, (24, 32))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: check_frames(broken, workers=1))
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": error: no pixel with known depth in {frame['name']}")
