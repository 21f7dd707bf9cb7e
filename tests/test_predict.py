# SPDX-License-Identifier: MIT
"""predict.py: the metrics of a whole evaluation, and labels for every pixel of known depth."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import predict
import train
from data import collate
from helpers import SHARED_CACHE, last_checkpoint, small, write_rooms_as_scannet, write_scan, write_scannet
from metrics import evaluate_semantics
from model import load_model, run_command
from sources.rooms import RoomFrames
from support.visualize import label_images
from sources.scannet import ScanNetFrames, read_ply_vertices


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.main(small(folder, "--epochs", "2", "--rooms", "4"))
    return last_checkpoint(folder)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(trained, "cpu")


@pytest.fixture(scope="module")
def frames():
    return RoomFrames("val", 1, 2, size=(48, 64))


def test_every_pixel_of_known_depth_has_a_label_and_no_other(loaded, frames):
    model, class_names, config = loaded
    changed = []
    for frame in frames:
        depth = frame["depth"].copy()
        depth[:10] = 0
        depth[20, 5] = np.nan
        changed.append({**frame, "depth": depth, "label": None, "instance": None})
    results = list(predict.predict_frames(model, changed, config, probabilities=True))
    assert [result["name"] for result in results] == [frame["name"] for frame in changed]
    for frame, result in zip(changed, results):
        known = (frame["depth"] > 0) & np.isfinite(frame["depth"])
        assert np.array_equal(result["labels"] >= 0, known) and result["labels"].max() < len(class_names)
        assert result["probabilities"].shape == (48, 64, len(class_names))
        np.testing.assert_allclose(result["probabilities"].sum(2), known, atol=1e-5)
        assert np.array_equal(result["probabilities"].argmax(2)[known], result["labels"][known])
        assert result["instances"].shape == known.shape and (result["instances"][~known] == -1).all()
        assert result["instances"].max() < len(result["scores"]) == len(result["instance_labels"])


def test_a_plain_list_of_frames_made_by_hand_and_frames_of_different_sizes_will_do(loaded, frames):
    model, _, config = loaded
    by_hand = {key: frames[0][key] for key in ("name", "color", "depth", "world2cam", "intrinsics",
                                               "depth_intrinsics")}
    small_depth = {**by_hand, "depth": by_hand["depth"][::2, ::2],
                   "depth_intrinsics": np.diag([0.5, 0.5, 1]) @ by_hand["depth_intrinsics"]}
    shapes = [result["labels"].shape for result in predict.predict_frames(model, [by_hand, small_depth], config)]
    assert shapes == [(48, 64), (24, 32)]


def test_prediction_does_not_depend_on_other_frames_and_leaves_the_model_as_it_was(loaded, frames):
    model, _, config = loaded
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = list(predict.predict_frames(model, list(frames), config))
    alone, = predict.predict_frames(model, [frames[1]], config)
    assert np.array_equal(alone["labels"], together[1]["labels"])
    assert np.array_equal(alone["instances"], together[1]["instances"])
    assert not model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_evaluation_gives_the_miou_of_the_predicted_labels_and_restores_the_mode(loaded):
    model, class_names, config = loaded
    _, dataset, _, _ = train.build_datasets(train.parse_args([], defaults={**config, "rooms": 2, "cache": "none"}))
    loader = DataLoader(dataset, 3, collate_fn=collate)
    model.train()
    metrics = predict.evaluate(model, loader, config["min_instance_points"])
    assert model.training
    model.eval()
    with torch.no_grad():
        guesses = [model(collate([sample]))["logits"].argmax(1) for sample in dataset]
    truth = [sample["labels"] for sample in dataset]
    expected = evaluate_semantics(guesses, truth, range(len(class_names)))["per_class"]
    present = sorted(set(torch.cat(truth).tolist()) - {-1})
    mean = sum(expected[c] for c in present) / len(present)
    assert metrics["miou"] == pytest.approx(mean, abs=0.02)  # a batch rounds otherwise than its scenes
    assert [c for c, iou in enumerate(metrics["iou"]) if not math.isnan(iou)] == present
    table = predict.format_metrics(metrics, class_names).splitlines()
    assert "AP50" in table[0] and f"mean, {len(present)} classes" in table[len(class_names) + 1]
    assert f"{metrics['miou']:.3f}" in table[len(class_names) + 1]
    absent = [name for c, name in enumerate(class_names) if c not in present]
    assert table[-1] == f"without truth, left out: {', '.join(absent)}"


def test_truth_ids_are_those_of_the_evaluator():
    labels, instances = torch.tensor([0, 0, 4, -1, 2]), torch.tensor([123456, 7, 7, 7, -1])
    ids = predict.ground_truth_ids(labels, instances)
    assert (ids // 1000).tolist() == [1, 1, 5, 0, 0]
    assert ids[0] != ids[1] and (ids[[3, 4]] == 0).all()


def test_truth_ids_hold_1000_instances_of_each_class_and_any_number_without_class():
    labels, instances = torch.arange(5000) // 1000 - 3, torch.arange(5000) + 5000
    labels[labels < 0] = -1
    ids = predict.ground_truth_ids(labels, instances)
    assert torch.equal(ids // 1000, labels + 1) and len(ids.unique()) == 2001
    with pytest.raises(ValueError, match="a class has 1001 instances in one sample"):
        predict.ground_truth_ids(torch.zeros(1001).long(), torch.arange(1001))
    assert predict.ground_truth_ids(labels[:0], instances[:0]).shape == (0,)


def test_fields_of_queries_have_names_of_their_own_in_any_script():
    assert predict.field_names(predict.parse_queries("red sofa | couch, стул, стол, chair")) == [
        "red_sofa", "query_2", "query_3", "chair"]


def label_options(tmp_path, options, config):
    """The class list and label map that the command finds, for a data folder and options of the training."""
    args = predict.parse_args(["x.pt", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options])
    config = {"classes": None, "data": "nowhere", "label_map": None, "scans": None, **config}
    classes = predict.find_classes(args, config, ["wall", "chair"])
    return classes, args.label_map


def test_label_ids_are_translated_as_in_training_or_not_read(tmp_path, capsys):
    trained_with, own = tmp_path / "nyu40.txt", tmp_path / "data" / "classes.txt"
    own.parent.mkdir()
    trained_with.write_text("1 wall\n5 chair\n* unlabeled\n")
    listed = {"*": None, 1: "wall", 5: "chair"}
    config = {"classes": str(trained_with), "label_map": "table.tsv"}
    assert label_options(tmp_path, [], config) == (listed, "table.tsv")
    assert label_options(tmp_path, [], {**config, "scans": "scans"}) == (listed, None)  # the table's ids, as the images
    assert label_options(tmp_path, ["--scans", "scans"], config) == (listed, None)  # those of NYU40, as labels.ply
    assert label_options(tmp_path, ["--scans", "scans"], {**config, "label_map": None}) == (None, None)
    assert "labels of the data are not read" in capsys.readouterr().out
    own.write_text("1 wall\n2 chair\n")  # ids of these images
    assert label_options(tmp_path, [], config) == ({1: "wall", 2: "chair"}, None)
    assert label_options(tmp_path, ["--classes", str(trained_with), "--label-map", "x.tsv"], {}) == (listed, "x.tsv")


def test_scans_are_opened_alike_whichever_is_first(tmp_path):
    write_scannet(tmp_path / "frames", scenes=2)
    points, colors = np.random.default_rng(0).random((40, 3), np.float32), np.zeros((40, 3))
    for scene in ("scene0000_00", "scene0001_00"):
        write_scan(tmp_path / "scans", scene, points, colors, np.ones(40), [0] * 40, [(0, "wall", [0])])
    other = tmp_path / "scans" / "scene0000_00"
    (other / "scene0000_00.aggregation.json").unlink()
    options = ["x.pt", "--data", str(tmp_path / "frames"), "--scans", str(tmp_path / "scans"), "--out", "out"]
    (tmp_path / "split.txt").write_text("scene0001_00\n")

    def scans(*more):
        return predict.open_source(predict.parse_args([*options, *more]), {}, {1: "wall"}, ["wall"])[1]

    assert "labels" not in scans()[1] and "labels" in scans("--split", str(tmp_path / "split.txt"))[0]
    (other / "scene0000_00.txt").write_text("colorHeight = 968\n")
    with pytest.raises(ValueError, match="scene0000_00.txt has no axisAlignment, but those of other scans have"):
        scans()
    assert not np.array_equal(scans("--split", str(tmp_path / "split.txt"))[0]["alignment"], np.eye(4))


def test_the_best_instance_of_a_point_is_painted():
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert predict.paint_instances(masks).tolist() == [0, 0, 1, -1]
    assert predict.paint_instances(masks[:0]).tolist() == [-1] * 4


def test_a_table_shows_nan_for_a_class_that_does_not_occur():
    table = predict.format_metrics({"miou": 0.5, "iou": [0.5, math.nan]}, ["wall", "chair"])
    assert "nan" in table and "AP" not in table


def test_the_command_writes_images_clouds_and_a_summary_that_agree_with_each_other(tmp_path, capsys):
    """Frames with labels: the table is that of `train.py --eval`, and the images score as what was in memory."""
    options = write_rooms_as_scannet(tmp_path / "data", 3, 2, (60, 80))
    train.main(small(tmp_path, *options, "--epochs", "2"))
    path = last_checkpoint(tmp_path)
    capsys.readouterr()
    train.main(["--eval", str(path), "--device", "cpu", "--cache", SHARED_CACHE.name])
    table = capsys.readouterr().out.split("class  ")[1].split("\nnote")[0].strip()
    out = tmp_path / "out"
    summary = predict.main([str(path), "--data", str(tmp_path / "data"), "--split", str(tmp_path / "data" / "val.txt"),
                            "--out", str(out), "--text", "red sofa | couch, chair", "--cache", SHARED_CACHE.name,
                            "--device", "cpu", "--tensorboard"])
    captured = capsys.readouterr()
    assert table in captured.out and "RANDOMLY INITIALISED" in captured.err
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["frames"] == 1 and sum(summary["share_of_points"].values()) == pytest.approx(1)
    assert summary["queries"]["names"] == [["red sofa", "couch"], ["chair"]]

    frames = ScanNetFrames(tmp_path / "data", tmp_path / "data" / "classes.txt", tmp_path / "data" / "val.txt")
    scene, stem = frames.names[0].split("/")
    written = np.array(Image.open(out / scene / "label" / f"{stem}.png"))
    assert written.dtype == np.uint16 and written.shape == frames[0]["depth"].shape
    truth = np.where(frames[0]["depth"] > 0, frames[0]["label"], -1)
    score = evaluate_semantics([written.astype(int) - 1], [truth], range(len(frames.class_names)))
    present = np.unique(truth)
    mean = np.mean([score["per_class"][c] for c in present[present >= 0]])
    assert summary["scores"]["every pixel"]["miou"] == pytest.approx(mean, abs=1e-9)
    assert np.array(Image.open(out / scene / "instance" / f"{stem}.png")).max() == len(
        (out / scene / "instance" / f"{stem}.txt").read_text().splitlines())
    header = (out / f"{scene}.ply").read_bytes().split(b"end_header")[0].decode()
    for field in ("label", "instance", "confidence", "gate", "red_sofa", "chair"):
        assert f"property float scalar_{field}\n" in header
    types = {"scalar_label": ("f4",), "red": ("u1",), "green": ("u1",), "blue": ("u1",)}
    painted = read_ply_vertices(out / f"{scene}_labels.ply", types)
    expected = label_images(painted["scalar_label"].astype(int)[None] - 1)[0]
    assert (np.stack([painted[channel] for channel in ("red", "green", "blue")], 1) == expected).all()
    events = EventAccumulator(str(out / scene), size_guidance={"tensors": 0})
    tags = events.Reload().Tags()["tensors"]
    kinds = ("colors", "truth", "prediction", "instances_truth", "instances", "gate", "query_red_sofa", "query_chair")
    assert {f"{kind}/{scene}_VERTEX" for kind in kinds} == {tag for tag in tags if tag.endswith("VERTEX")}
    assert (out / "classes.txt").read_text().splitlines()[:2] == ["0 unlabeled", "1 wall"]

    # again, without queries: no cloud of the first run is left; and with the class list in another order: same scores
    lines = (tmp_path / "data" / "classes.txt").read_text().splitlines()
    (tmp_path / "reversed.txt").write_text("\n".join(lines[::-1]))
    again = predict.main([str(path), "--data", str(tmp_path / "data"), "--split", str(tmp_path / "data" / "val.txt"),
                          "--out", str(out), "--cache", SHARED_CACHE.name, "--device", "cpu", "--tensorboard",
                          "--classes", str(tmp_path / "reversed.txt")])
    assert again["scores"] == summary["scores"]
    tags = EventAccumulator(str(out / scene), size_guidance={"tensors": 0}).Reload().Tags()["tensors"]
    assert tags and not any("query" in tag for tag in tags)
    state = torch.load(path, weights_only=True)
    state["config"]["num_views"] = 2  # more than the scene of the split has frames
    torch.save(state, tmp_path / "two_views.pt")
    fewer = predict.main([str(tmp_path / "two_views.pt"), "--data", str(tmp_path / "data"), "--split",
                          str(tmp_path / "data" / "val.txt"), "--out", str(out), "--device", "cpu"])
    assert fewer["scores"].keys() == {"every pixel", "merged scenes"}


def test_wrong_cameras_are_warned_of(trained, tmp_path, capsys, monkeypatch):
    write_rooms_as_scannet(tmp_path / "data", 2, 4, (60, 80))
    for path in (tmp_path / "data").glob("*/pose/*.txt"):
        np.savetxt(path, np.linalg.inv(np.loadtxt(path)))

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "open_queries", stop)
    with pytest.raises(KeyboardInterrupt):
        predict.main([str(trained), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "looks wrong: pose inverted" in capsys.readouterr().err


def test_a_network_of_other_classes_is_not_scored_on_the_rooms(trained, loaded):
    args = predict.parse_args([str(trained), "--data", "rooms", "--out", "out"])
    with pytest.raises(ValueError, match="trained on other classes"):
        predict.open_source(args, loaded[2], None, ["can", "box"])


def test_queries_need_a_tower():
    with pytest.raises(ValueError, match="trained with --no-clip"):
        predict.TextQueries(None, "chair")


def test_weights_of_clip_may_lie_elsewhere_than_in_training(trained, tmp_path):
    state = torch.load(trained, weights_only=True)
    state["config"]["clip_pretrained"] = "/nowhere/clip.bin"
    torch.save(state, tmp_path / "moved.pt")
    with pytest.raises(ValueError, match="/nowhere/clip.bin"):
        load_model(tmp_path / "moved.pt", "cpu")
    assert load_model(tmp_path / "moved.pt", "cpu", "none")[2]["clip_pretrained"] == "none"


@pytest.mark.parametrize("options, message", [
    (["--submission", "scannet20"], "needs --scans"), (["--intrinsics", "1,2"], "expected fx,fy,cx,cy"),
    (["--text", "chair,,sofa"], "an empty name"), (["--text", "chair, chair"], "would be written twice"),
    (["--data", "nowhere"], "nowhere does not exist"), (["--split", "x.txt"], "built-in rooms take no --split"),
    (["--text-from", "fused"], "needs --text"), (["--device", "foo"], "must be cpu, cuda or cuda:N"),
    (["--out", __file__], "is not a folder")])
def test_a_wrong_command_is_one_line_and_status_2(trained, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        run_command(lambda: predict.main([str(trained), "--data", "rooms", "--out", str(tmp_path / "out"), *options]))
    errors = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and message in errors[-1] and not (tmp_path / "out").exists()
