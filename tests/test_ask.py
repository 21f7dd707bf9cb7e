# SPDX-License-Identifier: MIT
"""predict.py without a network and on captures: questions to CLIP alone, a live loop, clouds of any size of scene."""
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import predict
from data import PointDataset, collate
from encoder import Enhanced2DEncoder
from fusion import BiFusionEncoder
from helpers import ROOT, TOWER, last_checkpoint, write_rooms_as_scannet
from model import load_model
from sources.rooms import RoomFrames
from sources.scannet import read_ply_vertices
from support import clouds
from support.clouds import SceneMerger
from support.queries import SOURCES, TextQueries
from test_captures import write_redwood

CLIP = ["--clip-model", TOWER, "--clip-pretrained", "none", "--image-size", "96,128", "--device", "cpu"]


def test_clip_alone_answers_per_pixel_and_per_voxel(tmp_path):
    (tmp_path / "capture").mkdir()
    write_redwood(tmp_path / "capture")
    out = tmp_path / "out"
    summary = predict.main(["--data", str(tmp_path / "capture"), "--out", str(out), "--text", "chair, sofa | couch",
                            *CLIP])
    names = {path.name for path in (out / "capture" / "label").iterdir()}
    assert names == {f"{i:06d}.png" for i in range(4)} and (out / "capture.ply").read_bytes()[:3] == b"ply"
    assert b"scalar_sofa" in (out / "capture.ply").read_bytes()[:2000]
    assert {path.name for path in (out / "capture" / "query").iterdir()} == names
    assert summary["queries"]["names"] == [["chair"], ["sofa", "couch"]] and summary["frames"] == 4
    assert summary["rotation_to_z_up"] == np.eye(3).tolist() and json.loads((out / "summary.json").read_text())


def test_a_class_list_is_asked_for_and_scored(tmp_path):
    write_rooms_as_scannet(tmp_path / "rooms", 1, 2, (60, 80))
    classes = tmp_path / "rooms" / "classes.txt"
    summary = predict.main(["--data", str(tmp_path / "rooms"), "--out", str(tmp_path / "out"), "--classes", str(classes),
                            "--attention", "identity", "--up=0,-1,0.1", *CLIP])
    np.testing.assert_allclose(summary["rotation_to_z_up"] @ np.array([0, -1, 0.1]), [0, 0, 1.01 ** 0.5], atol=1e-9)
    assert set(summary["scores"]) == {"every pixel", "merged scenes"}
    assert [names[0] for names in summary["queries"]["names"]] == list(RoomFrames("train", 1, 1).class_names)
    assert 0 <= summary["scores"]["every pixel"]["miou"] <= 1


def test_a_scene_larger_than_memory_is_worked_in_tiles_with_the_same_answers(tmp_path, monkeypatch):
    write_rooms_as_scannet(tmp_path / "rooms", 1, 3, (60, 80))
    options = ["--data", str(tmp_path / "rooms"), "--classes", str(tmp_path / "rooms/classes.txt"), *CLIP]
    whole = predict.main([*options, "--out", str(tmp_path / "whole")])
    held = []  # bytes of the tables of each tile and its cloud
    tables_to_cloud = SceneMerger.cloud

    def measured(merger, *args):
        arrays = [merger.keys, merger.rows, *(t[:len(merger.keys)] for t in (merger.sums, merger.owner, merger.truth))]
        cloud = tables_to_cloud(merger, *args)
        held.append(sum(values.nbytes for values in arrays) + sum(
            values.nbytes for name, values in cloud.items() if name != "queries"))
        return cloud

    monkeypatch.setattr(SceneMerger, "cloud", measured)
    monkeypatch.setattr(clouds, "MAX_BYTES", 400_000)
    tiled = predict.main([*options, "--out", str(tmp_path / "tiled")])
    assert max(held) <= 400_000 and tiled["scores"] == whole["scores"]

    scene, = whole["scenes"]
    assert list(tiled["scenes"]) == [f"{scene}_tile{i + 1}" for i in range(len(held))] and len(held) > 3
    fields = [f"scalar_{name}" for name in ("label", "gate", "confidence", "wall", "chair")]
    one, *parts = (read_ply_vertices(tmp_path / name, dict.fromkeys(fields, ("f4",))) for name in
                   (f"whole/{scene}.ply", *(f"tiled/{name}.ply" for name in tiled["scenes"])))
    assert np.array_equal(np.concatenate(parts), one)
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "tiled" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_labels_of_other_classes_than_the_queries_are_not_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "open_frames", lambda *args, **options: RoomFrames("val", 1, 1, size=(48, 64)))
    options = ["--data", "rooms", "--out", str(tmp_path / "out"), *CLIP]
    assert predict.main([*options, "--text", "chair, sofa"])["scores"] == {}
    names = RoomFrames("val", 1, 1).class_names
    assert 0 <= predict.main([*options, "--text", ", ".join(names)])["scores"]["every pixel"]["miou"] <= 1


@pytest.mark.parametrize("patch, size", [(14, (238, 322)), (16, (240, 320)), (32, (256, 320))])
def test_clip_sees_whole_patches_nearest_to_240_x_320(patch, size, tmp_path):
    tiny = open_clip.get_model_config(TOWER)
    tiny["vision_cfg"]["patch_size"] = patch
    (tmp_path / f"tiny-{patch}.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(tmp_path / f"tiny-{patch}.json")
    args = predict.parse_args(["--data", "d", "--out", "o", "--text", "a", "--clip-model", f"tiny-{patch}",
                               "--clip-pretrained", "none"])
    assert predict.open_tower(args).image_size == size


def test_a_tower_that_is_handed_in_keeps_its_image_size(tmp_path, capsys):
    write_rooms_as_scannet(tmp_path / "rooms", 1, 1, (60, 80))
    tower = Enhanced2DEncoder(TOWER, None, image_size=(64, 96))
    options = ["--data", str(tmp_path / "rooms"), "--out", str(tmp_path / "out"), "--text", "chair", "--device", "cpu"]
    predict.main(options, tower)
    assert "CLIP sees images of 64 x 96 pixels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the tower takes images of 64,96"):
        predict.main([*options, "--image-size", "96,128"], tower)


@pytest.mark.parametrize("name", ["RN50", "EVA02-L-14"])
def test_models_without_dense_features_are_refused_before_weights_are_loaded(name):
    with pytest.raises(ValueError, match=f"{name} has no dense features"):
        predict.open_tower(predict.parse_args(["--data", "d", "--out", "o", "--text", "a", "--clip-model", name]))


@pytest.mark.parametrize("options, message", [
    (["x.pt", "--clip-model", TOWER], "those of the training"), (["x.pt", "--image-size", "64,96"], "those of the training"),
    ([], "--text or --classes"), (["--text", "a", "--scans", "s"], "--text or --classes"),
    (["--text", "a", "--text-from", "fused"], "--text or --classes"),
    (["--attention", "identity"], "--text or --classes"), (["x.pt", "--attention", "identity"], "need --text")])
def test_what_clip_alone_cannot_answer_is_said(options, message, capsys):
    with pytest.raises(SystemExit):
        predict.parse_args(["--data", "d", "--out", "o", *options])
    assert message in capsys.readouterr().err


def test_frames_of_a_camera_are_labeled_one_by_one_and_instances_persist(trained, capsys):
    text = (ROOT / "docs" / "predict.md").read_text()
    snippet, = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "def live" in code)
    scope = {}
    exec(snippet, scope)
    model, class_names, config = load_model(last_checkpoint(trained[0]), "cpu")
    rooms = RoomFrames("val", 1, 2)
    blank = {**rooms[0], "name": "val0000/blank", "depth": np.zeros_like(rooms[0]["depth"])}
    camera = (frame for frame in (rooms[0], blank, rooms[1]))
    first, second = scope["live"](model, class_names, config, camera)
    assert [first[0]["name"], second[0]["name"]] == rooms.names
    assert len(second[1]["points"]) > len(first[1]["points"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_features_of_all_sources_are_compared_with_text_as_documented(trained, monkeypatch):
    """A toy network whose fused and 3D features are those of two names."""
    tower = Enhanced2DEncoder(TOWER, None, image_size=(96, 128))
    fusion = BiFusionEncoder(tower, torch.nn.Identity())
    sample = PointDataset(list(RoomFrames("val", 1, 1, size=(48, 64))), 500, (96, 128))[0]
    batch = collate([sample])
    dense = tower.encode_dense(batch["images"][0])
    feats = torch.randn(500, 256)
    found = {source: TextQueries(tower, "chair, sofa", source).cosines(fusion, batch, feats, dense)
             for source in SOURCES}
    names = TextQueries(tower, "chair, sofa")
    text = F.normalize(tower.project_global(names.embedding), dim=1)
    assert_close(found["fused"], F.cosine_similarity(feats[:, None], text[None], dim=2))
    assert torch.equal(found["3d"], found["fused"])
    at_points = fusion.sample(batch, (96, 128), [dense])[1][0]
    assert_close(found["clip"], at_points @ names.embedding.T)
    both = F.normalize(feats, dim=1) + F.normalize(tower.project_global(at_points), dim=1)
    assert_close(found["mean"], F.cosine_similarity(both[:, None], text[None], dim=2))


@pytest.mark.parametrize("config, last_epoch, reasons", [
    ({}, 21, []), ({}, 20, ["ended with epoch 20"]), ({"clip_weights": (0.0, 0.0)}, 30, ["no weight"]),
    ({"clip_target": "global"}, 21, ["global and not point"]),
    ({"clip_target": "global"}, 3, ["global and not point", "ended with epoch 3"])])
def test_reasons_why_fused_features_may_not_answer(config, last_epoch, reasons):
    trained = {"clip_weights": (0.0, 0.001, 0.01), "clip_warmup": (10, 20), "clip_target": "point", **config}
    found = predict.text_doubts(trained, last_epoch)
    assert len(found) == len(reasons) and all(words in text for words, text in zip(reasons, found))


@pytest.mark.parametrize("distance, focal, expected", [(0.8, 1067, 0.002), (2.5, 290, 0.01724), (8, 100, 0.02)])
def test_the_voxels_of_a_cloud_are_those_of_its_scene(distance, focal, expected):
    frame = {"depth": np.full((4, 4), distance), "depth_intrinsics": np.diag([focal, focal, 1.0])}
    blank = [{**frame, "depth": np.full((4, 4), value)} for value in (0, np.inf)]
    assert predict.cloud_voxel([*blank, frame]) == pytest.approx(expected, rel=1e-3)
    assert predict.cloud_voxel(blank) == 0.02


def test_a_frame_without_depth_gets_no_label_and_stops_nothing(trained, tmp_path):
    model, _, config = load_model(last_checkpoint(trained[0]), "cpu")
    frame = RoomFrames("val", 1, 1)[0]
    result, = predict.predict_frames(model, [{**frame, "depth": np.zeros_like(frame["depth"])}], config)
    assert result["points"] is None and (result["labels"] == -1).all()
    assert torch.equal(torch.as_tensor(result["labels"].shape), torch.as_tensor(frame["depth"].shape))
