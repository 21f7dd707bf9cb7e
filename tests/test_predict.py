# SPDX-License-Identifier: MIT
"""predict.py and evaluate.py: labels for every pixel of known depth, files that agree, and their scores."""
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import predict
import train
from data import PointDataset, up_rotation
from decoder import paint_instances
from evaluate import Scores, evaluate, format_metrics, ground_truth_ids
from helpers import Forked, last_checkpoint, small, write_rooms_as_scannet, write_scannet
from metrics import evaluate_semantics
from model import batches_for, load_model
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames, load_classes, read_ply_vertices
from support.queries import TextQueries, field_names, parse_queries
from support.runtime import run_command
from support.visualize import label_images
from test_captures import write_redwood
from test_gpu import pretend_gpu, waits
from test_scannet import write_scan

pytestmark = pytest.mark.usefixtures("quick_runs")
ON_CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def path(trained):
    """The checkpoint of a small run."""
    return last_checkpoint(trained[0])


@pytest.fixture(scope="module")
def loaded(path):
    return load_model(path, "cpu")


@pytest.fixture(scope="module")
def frames():
    return list(RoomFrames("val", 1, 2, size=(48, 64)))


# ---------------------------------------------------------------------------------------------- in memory


def test_every_pixel_of_known_depth_has_a_label_and_no_other(loaded, frames):
    model, class_names, config = loaded
    changed = []
    for frame in frames:
        depth = frame["depth"].copy()
        depth[:10] = 0
        depth[20, 5] = np.nan
        changed.append({**frame, "depth": depth, "label": None, "instance": None})
    results = list(predict.predict_frames(model, changed, config, probabilities=True))
    assert len(results) == 2
    for frame, result in zip(changed, results):
        known = (frame["depth"] > 0) & np.isfinite(frame["depth"])
        assert result["name"] == frame["name"] and np.array_equal(result["labels"] >= 0, known)
        assert result["labels"].max() < len(class_names)
        assert result["probabilities"].shape == (48, 64, len(class_names))
        np.testing.assert_allclose(result["probabilities"].sum(2), known, atol=1e-5)
        assert np.array_equal(result["probabilities"].argmax(2)[known], result["labels"][known])
        assert result["instances"].shape == known.shape and (result["instances"][~known] == -1).all()
        assert result["instances"].max() < len(result["scores"]) == len(result["instance_labels"])


def test_frames_made_by_hand_of_different_sizes_do_not_depend_on_each_other(loaded, frames):
    model, _, config = loaded
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fields = ("name", "color", "depth", "world2cam", "intrinsics", "depth_intrinsics")
    by_hand = [{key: frame[key] for key in fields} for frame in frames]
    by_hand[0]["depth"] = by_hand[0]["depth"][::2, ::2]
    by_hand[0]["depth_intrinsics"] = np.diag([0.5, 0.5, 1]) @ by_hand[0]["depth_intrinsics"]
    together = list(predict.predict_frames(model, by_hand, config))
    assert [result["labels"].shape for result in together] == [(24, 32), (48, 64)]
    alone, = predict.predict_frames(model, by_hand[1:], config)
    assert all(np.array_equal(alone[key], together[1][key]) for key in ("labels", "instances"))
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_frames_of_a_turned_world_get_the_same_labels_and_points_in_their_own_world(loaded, frames):
    model, _, config = loaded
    turn = np.eye(4)
    turn[:3, :3] = up_rotation("-y")  # from the turned world to the one with z up
    turned = [{**frame, "world2cam": frame["world2cam"] @ turn} for frame in frames[:1]]
    plain, = predict.predict_frames(model, frames[:1], config)
    result, = predict.predict_frames(model, turned, {**config, "up": "-y"})
    assert np.array_equal(result["labels"], plain["labels"])
    upright = result["points"]["points"].numpy() @ turn[:3, :3].T
    np.testing.assert_allclose(upright, plain["points"]["points"], atol=1e-5)


def test_frames_that_workers_and_threads_predict_ahead_are_those_of_a_plain_loop(loaded, frames):
    model, _, config = loaded
    more = [{**frames[i % 2], "name": f"room/{i}"} for i in range(5)]
    plain = predict.predict_frames(model, more, config)
    ahead = predict.predict_frames(model, more, config, workers=1, threads=2)
    for one, other in zip(plain, ahead, strict=True):
        assert one["name"] == other["name"] and one["scores"] == other["scores"]
        assert all(np.array_equal(one[key], other[key]) for key in ("labels", "instances"))


def predict_on_pretended_gpu(path):
    """Prints the labels of a frame, and what the host waited for."""
    with pretend_gpu():
        model, _, config = load_model(path, "cuda")
        waits.clear()
        result, = predict.predict_frames(model, RoomFrames("val", 1, 1), config)
        print(json.dumps({"labels": result["labels"].tolist(), "waits": waits}))


def test_the_host_rarely_waits_for_a_gpu_that_labels_a_frame(path, loaded):
    model, _, config = loaded
    status, printed, errors = Forked(partial(predict_on_pretended_gpu, path)).wait()
    if status:
        pytest.skip(f"no GPU can be pretended here: {(errors.splitlines() or [status])[-1]}")
    found = json.loads(printed.splitlines()[-1])
    result, = predict.predict_frames(model, RoomFrames("val", 1, 1), config)
    assert (np.array(found["labels"]) == result["labels"]).mean() > 0.999
    assert len(found["waits"]) <= 10, found["waits"]


def test_evaluation_gives_the_miou_of_the_predicted_labels_and_restores_the_mode(loaded):
    model, class_names, config = loaded
    _, dataset, _, _ = train.build_datasets(train.parse_args([], {**config, "cache": "none"}))
    collate = batches_for(model, training=False)
    model.train()
    metrics = evaluate(model, DataLoader(dataset, 3, collate_fn=collate), config["min_instance_points"])
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

    table = format_metrics(metrics, class_names).splitlines()
    means = table[len(class_names) + 1]
    assert "AP50" in table[0] and f"mean, {len(present)} classes" in means and f"{metrics['miou']:.3f}" in means
    absent = [name for c, name in enumerate(class_names) if c not in present]
    assert table[-1] == f"without truth, left out: {', '.join(absent)}"
    assert "AP" not in format_metrics({"miou": 0.5, "iou": [0.5, math.nan]}, ["wall", "chair"])


def test_truth_ids_hold_1000_instances_of_each_class_and_any_number_without_class():
    labels, instances = torch.tensor([0, 0, 4, -1, 2]), torch.tensor([123456, 7, 7, 7, -1])
    ids = ground_truth_ids(labels, instances)
    assert (ids // 1000).tolist() == [1, 1, 5, 0, 0]
    assert ids[0] != ids[1] and (ids[[3, 4]] == 0).all()
    labels, instances = (torch.arange(5000) // 1000 - 3).clamp(min=-1), torch.arange(5000) + 5000
    ids = ground_truth_ids(labels, instances)
    assert torch.equal(ids // 1000, labels + 1) and len(ids.unique()) == 2001
    with pytest.raises(ValueError, match="a class has 1001 instances in one sample"):
        ground_truth_ids(torch.zeros(1001).long(), torch.arange(1001))
    assert ground_truth_ids(labels[:0], instances[:0]).shape == (0,)


def test_the_best_instance_of_a_point_is_painted():
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert paint_instances(masks).tolist() == [0, 0, 1, -1]
    assert paint_instances(masks[:0]).tolist() == [-1] * 4


def test_fields_of_queries_have_names_of_their_own_in_any_script_and_need_a_tower():
    names = field_names(parse_queries("red sofa | couch, стул, стол, chair"))
    assert names == ["red_sofa", "query_2", "query_3", "chair"]
    with pytest.raises(ValueError, match="trained with --no-clip"):
        TextQueries(None, "chair")


# ---------------------------------------------------------------------------------------------- labels of the data


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
    listed, scans = {"*": None, 1: "wall", 5: "chair"}, ["--scans", "scans"]
    config = {"classes": str(trained_with), "label_map": "table.tsv"}
    assert label_options(tmp_path, [], config) == (listed, "table.tsv")
    assert label_options(tmp_path, [], {**config, "scans": "scans"}) == (listed, None)  # the table's, as the images
    assert label_options(tmp_path, scans, config) == (listed, None)  # those of NYU40, as labels.ply
    assert label_options(tmp_path, scans, {**config, "label_map": None}) == (None, None)
    assert "labels of the data are not read" in capsys.readouterr().out
    own.write_text("1 wall\n2 chair\n")  # ids of these images
    assert label_options(tmp_path, [], config) == ({1: "wall", 2: "chair"}, None)
    given = ["--classes", str(trained_with), "--label-map", "x.tsv"]
    assert label_options(tmp_path, given, {}) == (listed, "x.tsv")


def test_scans_are_opened_alike_whichever_is_first(tmp_path):
    write_scannet(tmp_path / "frames", scenes=2)
    points, colors = np.random.default_rng(0).random((40, 3), np.float32), np.zeros((40, 3))
    for scene in ("scene0000_00", "scene0001_00"):
        write_scan(tmp_path / "scans", scene, points, colors, np.ones(40), [0] * 40, [(0, "wall", [0])])
    other = tmp_path / "scans" / "scene0000_00"
    (other / "scene0000_00.aggregation.json").unlink()
    (tmp_path / "split.txt").write_text("scene0001_00\n")
    options = ["x.pt", "--data", str(tmp_path / "frames"), "--scans", str(tmp_path / "scans"), "--out", "out"]

    def scans(*more):
        return predict.open_source(predict.parse_args([*options, *more]), {}, {1: "wall"}, ["wall"])[1]

    second = ["--split", str(tmp_path / "split.txt")]
    assert "labels" not in scans()[1] and "labels" in scans(*second)[0]
    (other / "scene0000_00.txt").write_text("colorHeight = 968\n")
    with pytest.raises(ValueError, match="scene0000_00.txt has no axisAlignment, but those of other scans have"):
        scans()
    assert not np.array_equal(scans(*second)[0]["alignment"], np.eye(4))
    (other / "scene0000_00.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="scene0000_00.txt: scan description is not UTF-8"):
        scans()


@pytest.mark.parametrize("n, most, expected", [(7, 7, [7]), (8, 7, [4, 4]), (100, 30, [25] * 4), (101, 26, [26, 25, 25, 25])])
def test_tiles_hold_every_point_once_and_do_not_overlap(n, most, expected):
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([9, 1, 30])
    tiles = predict.split_into_tiles(points, most)
    assert [len(rows) for rows in tiles] == expected
    assert torch.equal(torch.cat(tiles).sort().values, torch.arange(n))
    sides = [points[rows, 0].aminmax() for rows in tiles]  # the room is long in x
    assert all(left.max < right.min for left, right in zip(sides, sides[1:]))


class OneScan:
    """Points of a room as a scan, and what `predict_scans` gives to its output."""

    names = ["val0000"]
    class_names = None

    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"name": "val0000", "alignment": np.eye(4), **self.fields}

    def add_scan(self, name, result, ids):
        self.result = result


@pytest.fixture
def scan_fields(frames):
    """Points of two views as vertices, with cubes as superpoints."""
    sample = PointDataset(frames, sys.maxsize, (48, 64), num_views=2)[0]
    points = sample["points"].numpy()
    cubes = np.floor(points / 0.3).astype(int)
    return {"points": points, "colors": sample["features"].numpy(),
            "superpoints": np.unique(cubes, axis=0, return_inverse=True)[1].reshape(-1)}


def test_a_scan_is_written_as_cloud_and_for_the_benchmark(path, loaded, frames, scan_fields, tmp_path):
    model, class_names, config = loaded
    args = predict.parse_args([str(path), "--data", "rooms", "--out", str(tmp_path)])
    output = predict.Output(args, "z", config["class_ids"], class_names, None, partial(Scores, 16, True), [])
    predict.predict_scans(model, OneScan(**scan_fields), frames, config, None, output, np.arange(101, 117))
    labels = read_ply_vertices(tmp_path / "val0000.ply", {"scalar_label": ("f4",)})["scalar_label"]
    lines = (tmp_path / "submission" / "semantic" / "val0000.txt").read_text().split()
    assert [int(line) - 100 for line in lines] == labels.tolist() and len(labels) == len(scan_fields["points"])
    assert (tmp_path / "submission" / "instance" / "val0000.txt").is_file()
    assert output.counts.sum() == len(labels) and output.scenes["val0000"]["points"] == len(labels)


def test_a_large_scan_is_predicted_as_if_each_tile_were_a_scan(loaded, frames, scan_fields, monkeypatch):
    model, _, config = loaded
    fields = scan_fields
    points = torch.from_numpy(fields["points"])

    def predicted(rows):
        scan = OneScan(**{key: values[rows] for key, values in fields.items()})
        predict.predict_scans(model, scan, frames, config, None, scan, None)
        return scan.result

    tiles = predict.split_into_tiles(points, len(points) // 2 + 1)
    alone = [predicted(rows.numpy()) for rows in tiles]
    monkeypatch.setattr(predict, "MAX_POINTS", len(points) // 2 + 1)
    tiled = predicted(np.arange(len(points)))
    assert torch.equal(tiled["points"], points)
    numbers = 0
    for rows, one in zip(tiles, alone, strict=True):
        assert torch.equal(tiled["labels"][rows], one["labels"])
        assert torch.equal(tiled["confidence"][rows], one["confidence"])
        expected = one["instances"] + numbers
        assert torch.equal(tiled["instances"][rows], expected.where(one["instances"] >= 0, -1))
        numbers += len(one["scores"])
    assert len(tiled["scores"]) == len(tiled["instance_labels"]) == numbers
    scan = OneScan(**fields)
    with pytest.raises(ValueError, match="val0000: --submission is for scans of at most"):
        predict.predict_scans(model, scan, frames, config, None, scan, np.arange(40))


def test_a_network_of_other_classes_is_not_scored_on_the_rooms(path, loaded):
    args = predict.parse_args([str(path), "--data", "rooms", "--out", "out"])
    with pytest.raises(ValueError, match="--data rooms: its classes .* are not those of"):
        predict.open_source(args, loaded[2], None, ["can", "box"])


# ---------------------------------------------------------------------------------------------- the command


def meshes(folder):
    """The kinds of clouds that a scene shows in TensorBoard."""
    tags = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload().Tags()["tensors"]
    return {tag.split("/")[0] for tag in tags if tag.endswith("VERTEX")}


def test_the_command_writes_images_clouds_and_a_summary_that_agree_with_each_other(tmp_path, capsys):
    """Frames with labels: the images score as what was in memory."""
    folder = tmp_path / "data"
    train.main(small(tmp_path, write_rooms_as_scannet(folder, 2, 2, (60, 80)), "--epochs 1"))
    path, out = last_checkpoint(tmp_path), tmp_path / "out"

    def command(path, *more):
        return predict.main([str(path), "--data", str(folder), "--split", str(folder / "val.txt"),
                             "--out", str(out), *ON_CPU, *more])

    summary = command(path, "--text", "red sofa | couch, chair", "--tensorboard")
    captured = capsys.readouterr()
    assert f"every pixel: miou {summary['scores']['every pixel']['miou']:.3f}" in captured.out
    assert "RANDOMLY INITIALISED" in captured.err
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["frames"] == 1 and sum(summary["share_of_points"].values()) == pytest.approx(1)
    assert summary["queries"]["names"] == [["red sofa", "couch"], ["chair"]]

    # images
    frames = ScanNetFrames(folder, folder / "classes.txt", folder / "val.txt")
    scene, stem = frames.names[0].split("/")
    image = out / scene / "label" / f"{stem}.png"
    label = np.array(Image.open(image))
    assert image.read_bytes()[24] == 16 and label.shape == frames[0]["depth"].shape  # bits per pixel
    truth = np.where(frames[0]["depth"] > 0, frames[0]["label"], -1)
    scores = evaluate_semantics([label.astype(int) - 1], [truth], range(len(frames.class_names)))
    mean = np.mean([scores["per_class"][c] for c in np.unique(truth[truth >= 0])])
    assert summary["scores"]["every pixel"]["miou"] == pytest.approx(mean, abs=1e-9)
    instances = (out / scene / "instance" / f"{stem}.txt").read_text().splitlines()
    assert np.array(Image.open(out / scene / "instance" / f"{stem}.png")).max() == len(instances)
    assert (out / "classes.txt").read_text().splitlines()[:2] == ["0 unlabeled", "1 wall"]

    # clouds
    header = (out / f"{scene}.ply").read_bytes().split(b"end_header")[0].decode()
    for field in ("label", "instance", "confidence", "gate", "red_sofa", "chair"):
        assert f"property float scalar_{field}\n" in header
    channels = ("red", "green", "blue")
    fields = {"scalar_label": ("f4",), **dict.fromkeys(channels, ("u1",))}
    painted = read_ply_vertices(out / f"{scene}_labels.ply", fields)
    expected = label_images(painted["scalar_label"].astype(int)[None] - 1)[0]
    assert (np.stack([painted[channel] for channel in channels], 1) == expected).all()
    assert meshes(out / scene) == {"colors", "truth", "prediction", "instances_truth", "instances", "gate",
                                   "query_red_sofa", "query_chair"}

    # again, without queries: no cloud of the first run is left; and with the class list in another order
    lines = (folder / "classes.txt").read_text().splitlines()
    (tmp_path / "reversed.txt").write_text("\n".join(lines[::-1]))
    again = command(path, "--tensorboard", "--classes", str(tmp_path / "reversed.txt"))
    assert again["scores"] == summary["scores"]
    assert "prediction" in meshes(out / scene) and not any("query" in kind for kind in meshes(out / scene))


@pytest.mark.parametrize("first, none", [(40, 0), (0, 65535)])
def test_ids_that_are_written_are_those_of_the_checkpoint(path, tmp_path, monkeypatch, first, none):
    state = torch.load(path, weights_only=True)
    ids = list(range(first, first + len(state["class_names"])))
    state["config"] |= {"class_ids": ids, "classes": "gone.txt"}
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "phone").mkdir()
    write_redwood(tmp_path / "phone")
    monkeypatch.chdir(tmp_path)
    predict.main(["x.pt", "--data", "phone", "--out", "out", *ON_CPU])
    listed = load_classes(tmp_path / "out/classes.txt")
    assert listed == {none: None, **dict(zip(ids, state["class_names"]))}
    images = [np.asarray(Image.open(image)) for image in (tmp_path / "out/phone/label").iterdir()]
    assert len(images) == 4 and set(np.unique(images)) <= {none, *ids}
    camera = Path("phone/camera_intrinsic.json")
    camera.write_text(re.sub(r"(\[(?:[^,]*,){6})[^,]*", r"\1 1e6", camera.read_text()))
    with pytest.raises(ValueError, match="phone/000000: intrinsics .* has the principal point"):
        predict.main(["x.pt", "--data", "phone", "--out", "new", *ON_CPU])
    assert not Path("new").exists()  # frames that no network takes are refused before


def test_wrong_cameras_are_warned_of(path, tmp_path, capsys, monkeypatch):
    write_rooms_as_scannet(tmp_path / "data", 2, 4, (60, 80))
    for pose in (tmp_path / "data").glob("*/pose/*.txt"):
        np.savetxt(pose, np.linalg.inv(np.loadtxt(pose)))

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "open_queries", stop)
    with pytest.raises(KeyboardInterrupt):
        predict.main([str(path), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *ON_CPU])
    assert "looks wrong: pose inverted" in capsys.readouterr().err


def test_weights_of_clip_may_lie_elsewhere_than_in_training(path, tmp_path):
    state = torch.load(path, weights_only=True)
    state["config"]["clip_pretrained"] = "/nowhere/clip.bin"
    torch.save(state, tmp_path / "moved.pt")
    with pytest.raises(ValueError, match="/nowhere/clip.bin"):
        load_model(tmp_path / "moved.pt", "cpu")
    assert load_model(tmp_path / "moved.pt", "cpu", "none")[2]["clip_pretrained"] == "none"


@pytest.mark.parametrize("options, message", [
    (["--submission", "scannet20"], "needs --scans"), (["--intrinsics", "1,2"], "expected fx,fy,cx,cy"),
    (["--text", "chair,,sofa"], "an empty name"), (["--text", "chair, chair"], "would be written twice"),
    (["--data", "nowhere"], "nowhere does not exist"), (["--split", "x.txt"], "built-in rooms take no --split"),
    (["--text-from", "fused"], "need --text"), (["--device", "foo"], "must be cpu, cuda or cuda:N"),
    (["--out", __file__], "is not a folder"), (["--out", f"{__file__}/x"], "is not a folder"),
    (["--out", "/proc/x"], "that can be written to"), (["--pose", "w2c"], "options of captures"),
    (["--label-map", "x.tsv"], "take no --split"), (["--depth-scale", "5000"], "options of captures")])
def test_a_wrong_command_is_one_line_and_status_2(path, tmp_path, options, message, capsys):
    given = [str(path), "--data", "rooms", "--out", str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit) as left:
        run_command(lambda: predict.main(given))
    errors = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and message in errors[-1] and not (tmp_path / "out").exists()
