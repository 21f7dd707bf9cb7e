# SPDX-License-Identifier: MIT
"""model.py: what must hold for the whole network, whatever its weights, and what a loaded one is."""
import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

import model as model_file
import train
from data import PointDataset
from decoder import InstanceDecoder, scene_instances
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder
from helpers import ROOT, TOWER, checkpoint, last_checkpoint, run_in_folder, small
from model import Segmenter, batches_for, forward_in, instance_logits, load_model, make_batch
from sources.rooms import RoomFrames
from sparse_unet import SMALL, PointEncoder, Res16UNet34C
from superpoints import oversegment
from support.checkpoint import write_atomically
from test_fusion import ChannelGate
from volt import Volt

pytestmark = pytest.mark.usefixtures("quick_runs")


def in_precision(sample, dtype):
    """A sample or batch with its floating-point tensors in a dtype."""
    return {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in sample.items()}


@pytest.fixture(scope="module")
def samples():
    superpoints = partial(oversegment, count=24)
    dataset = PointDataset(RoomFrames("train", 1, 4), 1500, (96, 128), 2, superpoints=superpoints)
    return [in_precision(sample, torch.float64) for sample in dataset]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tower = Enhanced2DEncoder(TOWER, None, image_size=(96, 128))
    fusion = BiFusionEncoder(tower, PointEncoder(0.15, **SMALL))
    return Segmenter(fusion, 7, InstanceDecoder(256, 7, embed_dim=64, ffn=64)).double().eval()


@torch.no_grad()
def run(model, samples):
    """A batch of samples, the output for it, and the instances of every scene."""
    batch = batches_for(model, training=False)(samples)
    out = model(batch, with_dense=True)
    scenes = scene_instances(out["decoder"], batch["point_to_superpoint"], batch["batch"], min_points=1)
    return batch, out, scenes


def same_instances(scene, other, order=slice(None)):
    torch.testing.assert_close(other["scores"], scene["scores"])
    assert torch.equal(other["masks"], scene["masks"][:, order])
    assert torch.equal(other["labels"], scene["labels"])


def test_weights_cast_together_and_their_gradients_have_the_bits_of_autocast(model, samples):
    batch = in_precision(batches_for(model, training=False)(samples), torch.float32)
    results = []
    for together in (True, False):
        net = copy.deepcopy(model).float()
        if together:
            out = forward_in(torch.bfloat16, net, batch, with_dense=True)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = net(batch, with_dense=True)
        out["logits"].square().mean().backward()
        results.append([out["logits"], *(p.grad for p in net.parameters())])
        assert net.decoder.quality_head[0].weight.grad is None  # the logits do not depend on it
    for one, other in zip(*results):
        assert one is other or one.dtype == torch.float32 and torch.equal(one, other)


KEYS = ("logits", "feat_fusion", "clip_point", "clip_dense", "valid", "alpha")


def test_a_batch_is_its_scenes_one_by_one(model, samples):
    _, whole, scenes = run(model, samples)
    parts = [run(model, [sample]) for sample in samples]
    for key in (*KEYS, "clip_global"):
        together = torch.cat([part[key] for _, part, _ in parts])
        torch.testing.assert_close(whole[key], together, rtol=1e-9, atol=1e-9)
    for scene, (_, _, (alone,)) in zip(scenes, parts):
        same_instances(scene, alone)


def test_points_and_superpoint_numbers_may_come_in_any_order(model, samples):
    sample = samples[0]
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(sample["points"]), generator=g)
    names = torch.randperm(int(sample["superpoints"].max()) + 1, generator=g)
    shuffled = {key: value[order] if torch.is_tensor(value) and len(value) == len(order) else value
                for key, value in sample.items()}
    shuffled["superpoints"] = names[shuffled["superpoints"]]
    (_, straight, (first,)), (_, mixed, (second,)) = run(model, [sample]), run(model, [shuffled])
    for key in KEYS:
        torch.testing.assert_close(mixed[key], straight[key][order], rtol=1e-8, atol=1e-8)
    same_instances(first, second, order)


def test_decoding_the_fused_features_is_the_forward_pass(model, samples):
    batch, out, _ = run(model, samples)
    with torch.no_grad():
        fused = model.fusion(batch, with_dense=True)
        decoded = model.decode(fused["feat_fusion"], batch)
    assert out.keys() == fused.keys() | decoded.keys() and torch.equal(out["logits"], decoded["logits"])
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(decoded["decoder"][key]))
               for key, value in out["decoder"].items())


def test_a_moved_scene_gives_the_same_features_if_camera_and_points_move_together(model, samples):
    sample = dict(samples[0])
    shift = torch.tensor([0.15 * 16 * 3, -0.15 * 16, 0.15 * 16 * 2], dtype=torch.float64)  # whole coarsest voxels
    moved = {**sample, "points": sample["points"] + shift, "coords": sample["coords"] + shift,
             "world2cam": sample["world2cam"].clone()}
    moved["world2cam"][:, :3, 3] -= sample["world2cam"][:, :3, :3] @ shift
    (_, straight, _), (_, shifted, _) = run(model, [sample]), run(model, [moved])
    torch.testing.assert_close(shifted["logits"], straight["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["sigmoid", "cosine", "infonce"])
@pytest.mark.parametrize("target", ["global", "point"])
def test_every_term_reaches_every_part_and_repeats(model, samples, variant, target):
    samples = [{**sample, "labels": sample["labels"] % 7} for sample in samples]
    batch = batches_for(model, training=True)(samples)
    args = train.parse_args(["--clip-warmup=-1", "--clip-weights", "0,0.1", "--clip-loss", variant])
    step = partial(train.compute_losses, model, batch, train.build_criteria(args), train.loss_weights(args, 0),
                   dense_target=target == "point")
    _, terms, counts = step()
    torch.rand(1)  # infonce draws its negatives by the samples' seed, not by the global generator
    assert torch.equal(step()[1]["clip"], terms["clip"])
    assert set(terms) == {"semantic", "instance_class", "instance_bce", "instance_dice", "instance_quality", "clip"}
    assert 0 < terms["clip"] < 4 and counts[0] > 0 and counts[1] == 0
    parts = {"encoder_3d": model.fusion.encoder_3d.backbone.conv0p1s1.kernel,
             "spatial_proj": model.fusion.encoder_2d.spatial_proj.weight,
             "gate": model.fusion.gate.gate[0].weight}
    for name, term in terms.items():
        if name == "instance_quality":
            continue  # zero until a mask is better than half right
        for part, grad in zip(parts, torch.autograd.grad(term, list(parts.values()), retain_graph=True)):
            assert grad.isfinite().all() and grad.abs().max() > 0, (name, part)


def test_instances_tell_the_class_of_the_superpoints_that_they_hold():
    """Against plain loops, for scenes with different numbers of queries and superpoints."""
    torch.manual_seed(0)
    sizes, query_sizes, K = [3, 5], [4, 2], 6
    query = torch.tensor([[0, 1, 2, 1], [0, 3, -1, -1]])
    decoded = {"class_logits": torch.randn(2, 2, 4, K + 1), "mask_logits": torch.randn(2, 2, 4, 5), "query": query,
               "sizes": sizes, "query_sizes": query_sizes}
    rows = []
    for b, (S, Q) in enumerate(zip(sizes, query_sizes)):
        for s in range(S):
            held = decoded["mask_logits"][-1, b, :Q, s].sigmoid()
            classes = decoded["class_logits"][-1, b, :Q, :K]
            rows.append(sum(weight * row for weight, row in zip(held, classes)) / (1 + held.sum()))
    torch.testing.assert_close(instance_logits(decoded), torch.stack(rows))


@pytest.mark.parametrize("build, options", [
    (Res16UNet34C, SMALL),
    (Volt, dict(embed_dim=64, depth=1, num_heads=1))])
def test_what_a_loader_makes_in_advance_changes_no_bit_and_carries_no_weights(samples, build, options):
    encoder = PointEncoder(0.15, build=build, **options).double().eval()
    assert len(pickle.dumps(encoder.plan)) < 1000
    collate_fn = partial(make_batch, mix=1.0, plan=encoder.plan)
    batch, = DataLoader(samples, len(samples), collate_fn=collate_fn, num_workers=1)
    assert torch.equal(batch["plan"]["coords"], encoder.plan(batch)["coords"])
    planned, encoder.plan = encoder.plan, None  # so that it is not called
    out = encoder(batch)
    encoder.plan = planned
    del batch["plan"]
    assert torch.equal(encoder(batch), out)


# ---------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The folder of a run without CLIP."""
    folder = tmp_path_factory.mktemp("baseline")
    train.main(small(folder, "--epochs 1 --no-clip --num-points 200"))
    return folder


def is_the_trained_one(folder, samples):
    network, class_names, config = load_model(last_checkpoint(folder), "cpu")
    state = checkpoint(folder)
    assert not network.training and class_names == state["class_names"] and config == state["config"]
    assert all(torch.equal(value, state["model"][key]) for key, value in network.state_dict().items())
    single = [in_precision(sample, torch.float32) for sample in samples]
    with torch.no_grad():
        out = network(batches_for(network, training=False)(single))
    assert out["logits"].shape[1] == len(class_names)


def test_a_loaded_model_is_the_trained_one_in_eval_mode(trained, baseline, samples):
    is_the_trained_one(trained[0], samples)
    is_the_trained_one(baseline, samples)


def test_a_checkpoint_of_another_gate_is_refused_by_name(tmp_path, samples, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "BiFusionEncoder", partial(BiFusionEncoder, gate=ChannelGate(256)))
        train.main(small(tmp_path, "--epochs 1 --no-instances --clip-blocks 1 --num-points 200"))
        is_the_trained_one(tmp_path, samples)
    with pytest.raises(ValueError, match="last.pt: .* trained with the gate ChannelGate, .* FusionGate"):
        load_model(last_checkpoint(tmp_path))


def test_loading_needs_no_tensorboard(baseline):
    """The front of a notebook: the package that only training needs is not imported."""
    code = f"""
import sys
for name in [name for name in sys.modules if "tensorboard" in name]:
    del sys.modules[name]
sys.modules["tensorboard"] = sys.modules["torch.utils.tensorboard"] = None  # importing them raises
from model import load_model
import predict
assert not load_model({str(last_checkpoint(baseline))!r})[0].training
"""
    status, _, errors = run_in_folder(code, ROOT)
    assert status == 0, errors


def test_the_warnings_of_a_training_are_repeated_when_its_checkpoint_is_loaded(baseline, tmp_path):
    write_atomically({**checkpoint(baseline), "warnings": ["CLIP IS RANDOMLY INITIALISED"]}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="x.pt: CLIP IS RANDOMLY INITIALISED"):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("changes, message", [
    ({"backbone": "x"}, "field config.backbone is 'x'"), ({"backbone": None}, "field config.backbone is None"),
    ({"colors": "x"}, "field config.colors is 'x'"), ({"image_size": (64, 96)}, "clip_fingerprint differs")])
def test_a_config_of_another_network_or_tower_is_refused(trained, tmp_path, changes, message):
    state = checkpoint(trained[0])
    write_atomically({**state, "config": state["config"] | changes}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: {message}"):
        load_model(tmp_path / "x.pt")
