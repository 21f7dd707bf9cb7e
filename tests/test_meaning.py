# SPDX-License-Identifier: MIT
"""bench/meaning.py: crops and captions, the tower found by its folder, trainings that are not repeated."""
import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import train
from bench import meaning
from encoder import Enhanced2DEncoder
from losses import ClipConsCriterion
from sources.rooms import CLASSES, RoomFrames


@pytest.fixture(scope="module")
def crops():
    """Objects of two rooms."""
    return meaning.Crops(RoomFrames("train", 2, 1, seed=meaning.ROOM_SEED))


def test_a_caption_names_the_class_that_was_asked_for_and_only_objects_in_the_crop(crops):
    rng = np.random.default_rng(0)
    known = [kind for kind, objects in enumerate(crops.objects) if objects]
    for kind in known:
        assert crops.around(*crops.objects[kind][0])[0].shape == (meaning.CROP, meaning.CROP, 3)
        _, caption = crops.draw(kind, rng)
        assert CLASSES[kind] in caption
        named = {index for index, name in enumerate(CLASSES) if name in caption}
        assert named <= set(known) and len(named) <= meaning.MOST_NAMED
    images, captions = crops.batch(32, rng)
    assert images.shape == (32, 3, meaning.CROP, meaning.CROP) and len(captions) == 32
    assert 0 <= images.min() and images.max() <= 1


def test_a_cut_shows_the_pixels_around_a_place_and_their_objects(crops):
    frame = RoomFrames("train", 2, 1, seed=meaning.ROOM_SEED)[1]
    crop, group = crops.cut(1, 100, 150, meaning.CROP)
    place = np.s_[52:148, 102:198]
    assert np.array_equal(crop, frame["color"][place])  # as large as the crop: nothing is interpolated
    assert np.array_equal(group // 256 - 1, frame["label"][place])
    corner, _ = crops.cut(1, 0, 1000, meaning.CROP)
    assert np.array_equal(corner, frame["color"][:96, -96:])


def test_a_tower_is_found_by_its_folder_and_the_same_seed_gives_the_same_weights(tmp_path):
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    tokens = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        meaning.train_tower(folder, rooms=1, steps=2, batch_size=4)
        tokens.append(meaning.named_tower(folder, "own", 96).encode(image)[0])
    assert torch.equal(*tokens)
    random = Enhanced2DEncoder(f"local-dir:{folder}", None, image_size=96)
    assert not torch.equal(tokens[0], random.encode(image)[0])
    assert 0 <= meaning.zero_shot(folder, rooms=1, most=1) <= 1


def test_a_centered_target_is_the_target_less_its_mean():
    feat, clip, mean = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    loss, counts = meaning.CenteredCriterion(mean[0], variant="cosine")(feat, clip + mean[0])
    expected, _ = ClipConsCriterion(1.0, variant="cosine")(feat, clip)
    assert torch.allclose(loss, expected, atol=1e-5) and counts[0] == 20


def test_labels_are_hidden_in_all_rooms_but_the_first():
    whole = RoomFrames("train", 2, meaning.FRAMES_PER_ROOM, size=(24, 32))
    frames = meaning.hide_labels(whole, 1)
    assert all((frame["label"] >= 0).any() for frame in whole.frames)
    known = [(frames[index]["label"] >= 0).any() for index in range(len(frames))]
    assert known == [True] * meaning.FRAMES_PER_ROOM + [False] * meaning.FRAMES_PER_ROOM


def test_a_training_on_few_rooms_can_be_validated_on_more():
    options = "--rooms 1 --val-rooms 2 --frames-per-room 2 --no-clip --no-instances".split()
    train_set, val_set, _, _ = train.build_datasets(train.parse_args(options))
    assert (len(train_set), len(val_set)) == (2, 4)
    assert train.parse_args(["--rooms", "8"]).val_rooms == 3


def test_a_finished_training_is_not_repeated_and_all_stand_in_the_table(tmp_path, monkeypatch, capsys):
    calls = []

    def training_run(argv, data, name, tower):
        seed = argv[argv.index("--seed") + 1]
        calls.append((data, name, seed))
        return {"miou": 0.25, "fused": 0.125, "3d": 0.5, "cpu_seconds": 0}

    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "open_clip_config.json").write_text(json.dumps(meaning.TOWER_CONFIG))
    (tower / meaning.WEIGHTS).write_bytes(b"trained")
    (tmp_path / "meaning.json").write_text(json.dumps({"zero_shot": 0.5, "text": {"naclip": [0.1, 0.2]}}))
    monkeypatch.setattr(meaning, "training_run", training_run)
    monkeypatch.setattr(meaning, "named_tower", lambda *_: None)
    args = Namespace(tower=str(tower), out=str(tmp_path), device="cpu", seeds=1)
    meaning.run(args)
    rows = len(calls)
    args.seeds = 2
    meaning.run(args)
    assert len(calls) == 2 * rows == len(set(calls))
    table = capsys.readouterr().out
    assert "| isolated | 0.250 ± 0.000 (2) | 0.125 ± 0.000 (2) | 0.500 ± 0.000 (2) |" in table
    (tower / meaning.WEIGHTS).write_bytes(b"trained again")
    meaning.run(args)
    again = calls[2 * rows:]
    assert 0 < len(again) < 2 * rows and not {name for _, name, _ in again} & {"3D baseline", "random tower"}
