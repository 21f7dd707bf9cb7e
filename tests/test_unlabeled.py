# SPDX-License-Identifier: MIT
"""train.py without labels, with some and with all: what trains, what classifies, what is refused."""
import shutil

import pytest
import torch
from torch.nn import functional as F

import train
from data import PointDataset, collate
from helpers import checkpoint, last_checkpoint, small, write_rooms_as_scannet
from model import load_model
from sources.open import open_frames
from support.queries import TextQueries

pytestmark = pytest.mark.usefixtures("quick_runs")
DISTILL = "--no-check --no-instances --clip-warmup=-1 --clip-weights 0,1 --clip-target point --clip-loss infonce"


def rooms_on_disk(folder, labeled, *more):
    """Arguments of a run on three rooms, two of them for training; only `labeled` ones keep their labels."""
    data = write_rooms_as_scannet(folder / "data", num_rooms=3, frames_per_room=1, size=(96, 128))
    for number in {0, 1, 2} - set(labeled):
        shutil.rmtree(folder / "data" / f"train{number:04d}" / "label-filt")
    return small(folder, data, DISTILL, "--epochs 1", *more)


def names_of_classes(model, class_names):
    """CLIP's embeddings of the class names in the space of the fused features."""
    queries = TextQueries(model.fusion.encoder_2d, [[name] for name in class_names], "fused")
    return queries.embedding[:len(class_names)]


@pytest.mark.parametrize("labeled, options", [([2], ""), ([], ""), ([0, 1, 2], "--semantic-weight 0")], ids=str)
def test_without_labels_the_clip_loss_trains_and_a_point_takes_the_nearest_class_name(tmp_path, labeled, options):
    metrics = train.main(rooms_on_disk(tmp_path, labeled, options))
    assert (metrics["miou"] >= 0) == (2 in labeled)  # NaN without a true label
    best, last = (checkpoint(tmp_path, name)["model"] for name in ("best.pt", "last.pt"))
    assert best.keys() == last.keys()

    path = last_checkpoint(tmp_path)
    model, class_names, _ = load_model(path, "cpu")
    text = names_of_classes(model, class_names)
    assert torch.equal(model.head.weight, text)
    frames = open_frames(str(tmp_path / "data"), str(tmp_path / "data" / "val.txt"), labels=None)
    out = model(collate([PointDataset(frames, 500, (96, 128))[0]]))
    nearest = (F.normalize(out["feat_fusion"], dim=1) @ text.T).argmax(1)
    assert torch.equal(out["logits"].argmax(1), nearest)

    train.main(["--resume", str(path), "--epochs", "2", "--device", "cpu"])
    resumed = checkpoint(tmp_path)["model"]
    assert torch.equal(resumed["head.weight"], text)
    changed = [name for name in last if not torch.equal(last[name], resumed[name])]
    assert any(name.startswith("fusion.encoder_3d.") for name in changed)


def test_with_labels_in_some_scenes_the_classifier_is_learned_and_the_others_are_named(tmp_path, capsys):
    train.main(rooms_on_disk(tmp_path, [0, 2]))
    assert "1 scenes' labels, which do not exist" in capsys.readouterr().out
    model, class_names, _ = load_model(last_checkpoint(tmp_path), "cpu")
    assert not torch.allclose(model.head.weight, names_of_classes(model, class_names), atol=0.01)


@pytest.mark.parametrize("labeled, options, message", [
    ([2], "--isolate-clip", "label-filt, does not exist"), ([2], "--no-clip", "label-filt, does not exist"),
    ([0, 1], "", "no point of the 1 samples of a split has a label")], ids=str)
def test_missing_labels_are_named_before_a_run_begins(tmp_path, labeled, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(rooms_on_disk(tmp_path, labeled, options))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("classes, options, message", [
    ("", "", "no class list"),
    ("99 wall\n* unlabeled", "--isolate-clip", "only the CLIP loss can train without")], ids=str)
def test_the_class_names_are_needed_and_without_a_clip_loss_a_label_of_them(tmp_path, classes, options, message):
    argv = rooms_on_disk(tmp_path, [0, 1, 2] if classes else [], options)
    path = tmp_path / "data" / "classes.txt"
    path.unlink()
    if classes:
        path.write_text(classes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(argv)


@pytest.mark.parametrize("options, message", [
    ("--no-instances --isolate-clip", "leaves no loss"), ("--no-instances --no-clip", "leaves no loss"),
    ("", "give --no-instances")])
def test_a_semantic_weight_of_0_needs_another_loss(options, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--semantic-weight", "0", *options.split()])
    assert message in capsys.readouterr().err
