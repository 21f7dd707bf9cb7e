# SPDX-License-Identifier: MIT
"""What a training may add, each part off by default: Lovasz loss, label smoothing, mixed scenes, drop path, moving
average.
"""
import copy
import math
from functools import partial

import pytest
import torch

import model
import train
from data import PointDataset, collate, mix_scenes
from helpers import StopAt, checkpoint, last_checkpoint, small
from losses import SemanticCriterion, lovasz_loss
from model import load_model
from sources.rooms import RoomFrames
from sparse_unet import PointEncoder
from support.average import MovingAverage
from volt import Volt


def case(rows=40, classes=4):
    """Logits in float64 and labels, of which some are ignored and the last class does not occur."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, classes - 1, (rows,), generator=generator)
    return logits, labels


def jaccard_loss(truth, wrong):
    """1 - IoU of a class, if the rows `wrong` are mistaken."""
    intersection = (truth & ~wrong).sum().item()
    union = (truth | wrong).sum().item()
    return 1 - intersection / union if union else 0.0


def by_thresholds(logits, labels):
    """The Lovasz extension by its definition: the mean over t in [0, 1] of the loss of the rows with errors > t."""
    known = labels >= 0
    probabilities = logits[known].softmax(1)
    losses = []
    for c in labels[known].unique().tolist():
        truth = labels[known] == c
        errors = (truth.double() - probabilities[:, c]).abs()
        thresholds = [0.0, *errors.sort().values.tolist()]
        steps = zip(thresholds, thresholds[1:])
        losses.append(sum((high - low) * jaccard_loss(truth, errors > low) for low, high in steps))
    return sum(losses) / len(losses)


def test_the_lovasz_loss_is_the_integral_of_the_jaccard_loss_over_thresholds():
    logits, labels = case()
    assert lovasz_loss(logits, labels).item() == pytest.approx(by_thresholds(logits, labels))


def test_the_lovasz_loss_has_exact_gradients_and_ignores_rows():
    logits, labels = case()
    torch.autograd.gradcheck(partial(lovasz_loss, labels=labels), logits.requires_grad_())
    poisoned = logits.detach().clone()
    poisoned[labels < 0] = math.nan
    poisoned.requires_grad_()
    loss = lovasz_loss(poisoned, labels)
    loss.backward()
    assert loss.item() == pytest.approx(lovasz_loss(logits, labels).item())
    assert (poisoned.grad[labels < 0] == 0).all()
    assert poisoned.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 5])
def test_without_labels_the_lovasz_loss_is_a_zero_with_a_graph(rows):
    logits = torch.randn(rows, 3, requires_grad=True)
    loss = lovasz_loss(logits, torch.full((rows,), -1))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.sum() == 0


def test_half_precision_logits_have_the_lovasz_loss_of_float32():
    logits, labels = case()
    half = logits.to(torch.float16)
    assert lovasz_loss(half, labels) == lovasz_loss(half.float(), labels)


def test_label_smoothing_mixes_in_the_mean_over_all_classes():
    logits, labels = case()
    known = labels >= 0
    log_p = logits[known].log_softmax(1)
    own = -log_p.gather(1, labels[known, None]).mean()
    expected = 0.9 * own - 0.1 * log_p.mean()
    assert torch.isclose(SemanticCriterion(label_smoothing=0.1)(logits, labels), expected)
    assert torch.isclose(SemanticCriterion()(logits, labels), own)


def batch_of_rooms():
    dataset = PointDataset(RoomFrames("train", 5, 1, size=(24, 32)), 200, (24, 32))
    return collate([dataset[index] for index in range(5)])


def test_mixed_samples_are_one_scene_for_the_encoder_and_apart_for_the_cameras():
    batch = batch_of_rooms()
    mixed = mix_scenes(batch, 1.0)
    assert torch.equal(mixed["scene"], batch["batch"] // 2)
    changed = {key for key in mixed if mixed[key] is not batch.get(key)}
    assert changed == {"coords", "scene"}
    samples = [mixed["batch"] == sample for sample in range(5)]
    centers = torch.stack([mixed["coords"][own].mean(0) for own in samples])
    assert torch.allclose(centers[[1, 3]], centers[[0, 2]], atol=1e-4)
    for own in samples:
        moved = mixed["coords"][own] - batch["coords"][own]
        assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-5)

    seen = []
    encoder = PointEncoder(0.1, build=lambda channels: Spy(seen))
    encoder(mixed)
    assert seen[0][:, 0].unique().tolist() == [0, 1, 2]


def test_mixing_depends_on_the_seeds_of_the_samples_alone():
    batch = batch_of_rooms()
    drawn = [mix_scenes({**batch, "seed": [seed] * 5}, 0.5)["scene"].amax().item() for seed in range(20)]
    again = [mix_scenes({**batch, "seed": [seed] * 5}, 0.5)["scene"].amax().item() for seed in range(20)]
    assert drawn == again
    assert len(set(drawn)) > 1
    assert torch.equal(mix_scenes(batch, 0.0)["scene"], batch["batch"])


class Spy(torch.nn.Module):
    """A network of voxels that keeps their coordinates."""

    out_channels = 96

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, coords, feats):
        self.seen.append(coords)
        return feats.new_zeros(len(coords), 96)


def test_the_moving_average_is_the_sum_of_its_definition_and_leaves_the_model_alone():
    layer = torch.nn.Linear(3, 2).double()
    average = MovingAverage(layer, 0.9)
    expected = layer.weight.detach().clone()
    for step in range(200):
        torch.nn.init.normal_(layer.weight)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    last = copy.deepcopy(layer.state_dict())
    with average.applied():
        assert torch.allclose(layer.weight, expected)
    assert all(torch.equal(last[key], value) for key, value in layer.state_dict().items())


def test_without_decay_there_is_no_average():
    layer = torch.nn.Linear(3, 2)
    average = MovingAverage(layer, 0.0)
    average.update(0)
    with average.applied():
        assert average.state_dict() == {}


def test_every_part_trains_resumes_bit_exactly_and_is_loaded(tmp_path, monkeypatch):
    tiny = partial(Volt, embed_dim=64, num_heads=1, depth=3, out_channels=32)
    monkeypatch.setitem(model.BACKBONES, "volt-small", tiny)
    parts = "--backbone volt-small --drop-path 0.2 --lovasz 1 --label-smoothing 0.1 --ema 0.99 --mix 0.5 --no-clip"
    options = [*parts.split(), "--no-instances"]
    metrics = train.main(small(tmp_path / "whole", *options))
    with pytest.raises(SystemExit):
        train.main(small(tmp_path / "halves", *options), stop=StopAt(2))
    path = last_checkpoint(tmp_path / "halves")
    train.main(["--resume", str(path), "--device", "cpu"])

    whole, halves = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves")
    assert whole["ema"]
    for field in ("model", "ema"):
        assert all(torch.equal(halves[field][key], value) for key, value in whole[field].items())
    config = halves["config"]
    assert (config["lovasz"], config["label_smoothing"]) == (1, 0.1)

    network, *_ = load_model(path, "cpu")
    rates = [block.drop_rate for block in network.fusion.encoder_3d.backbone.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert torch.equal(network.head.weight, whole["ema"]["head.weight"])
    scored = train.main(["--eval", str(path), "--device", "cpu"])
    assert scored["miou"] == metrics["miou"]


def test_drop_path_is_refused_for_networks_without_it(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--drop-path", "0.1"])
    assert "--drop-path is for --backbone volt-" in capsys.readouterr().err
