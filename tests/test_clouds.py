# SPDX-License-Identifier: MIT
"""clouds.py: a merged scene does not depend on the order of its frames, and files that others can read."""
import numpy as np
import pytest
import torch

from support import clouds
from metrics import evaluate_instances, evaluate_semantics

K = 4


def frame(seed, n=3000, shift=0.0):
    """What `predict_sample` gives for points of a wall with three objects; objects and classes depend on x alone."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([0, 0, 0], [3, 1, 0.01], (n, 3)) + [shift, 0, 0]
    thing = np.floor(points[:, 0]).astype(np.int64)
    likely = torch.from_numpy(rng.dirichlet(np.ones(K), n)).float()
    order = {value: i for i, value in enumerate(rng.permutation(np.unique(thing)))}  # instances have any numbers
    instances = np.vectorize(order.get)(thing)
    classes = [next(t % 2 for t, i in order.items() if i == number) for number in range(len(order))]
    return {"points": torch.from_numpy(points).float(), "colors": torch.from_numpy(rng.random((n, 3))).float(),
            "gate": torch.from_numpy(rng.random(n)).float(), "probabilities": likely, "labels": likely.argmax(1),
            "truth": torch.from_numpy(thing % 2), "truth_instances": torch.from_numpy(thing),
            "instances": torch.from_numpy(instances), "instance_labels": torch.tensor(classes),
            "scores": torch.from_numpy(rng.uniform(0.5, 1, len(classes))).float()}


def merged(frames):
    merger = clouds.SceneMerger(K, voxel_size=0.05)
    for one in frames:
        merger.add(one)
    return merger, merger.cloud()


def test_the_order_of_frames_changes_no_label_no_colour_and_no_confidence():
    frames = [frame(seed) for seed in range(6)]
    _, one = merged(frames)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        _, other = merged([frames[i] for i in order])
        for name in ("points", "colors", "labels", "confidence", "gate"):
            assert np.array_equal(one[name], other[name]), name


def test_a_voxel_holds_the_mean_of_what_its_frames_voted():
    frames = [frame(seed, n=400) for seed in range(3)]
    _, cloud = merged(frames)
    votes = {}
    for one in frames:
        cells = np.floor(one["points"].double().numpy() / 0.05).astype(int)
        for cell in np.unique(cells, axis=0):
            inside = (cells == cell).all(1)
            votes.setdefault(tuple(cell), []).append(one["probabilities"].numpy()[inside].mean(0))
    expected = {cell: np.mean(vote, 0) for cell, vote in votes.items()}
    cells = np.floor(cloud["points"] / 0.05 + 1e-9).astype(int)
    assert len(cells) == len(expected)
    found = [expected[tuple(cell)] for cell in cells]
    np.testing.assert_allclose(cloud["confidence"], np.max(found, 1), atol=1e-3)
    sure = np.sort(found, 1)[:, -1] - np.sort(found, 1)[:, -2] > 1e-3
    assert np.array_equal(cloud["labels"][sure], np.argmax(found, 1)[sure])


def test_instances_of_frames_become_those_of_the_scene_whatever_their_numbers():
    _, cloud = merged([frame(seed, shift=0.0) for seed in range(5)])
    inner = np.abs(cloud["points"][:, 0] - np.round(cloud["points"][:, 0])) > 0.06  # off the borders of objects
    thing = np.floor(cloud["points"][:, 0]).astype(int)
    owners = [set(cloud["instances"][inner & (thing == t)]) for t in range(3)]
    assert all(len(owner) == 1 for owner in owners) and len(set.union(*owners)) == 3
    assert [cloud["instance_labels"][owner.pop()] for owner in owners] == [0, 1, 0]
    assert np.array_equal(cloud["truth_instances"][inner], thing[inner])


def test_memory_follows_the_surface_not_the_number_of_frames():
    few, _ = merged([frame(seed) for seed in range(3)])
    many, _ = merged([frame(seed % 3) for seed in range(30)])
    assert len(many.keys) == len(few.keys) and many.sums.nbytes == few.sums.nbytes


def test_points_far_away_are_refused():
    one = frame(0, n=5)
    one["points"] += 1e6
    with pytest.raises(ValueError, match="are the poses in metres"):
        clouds.SceneMerger(K).add(one)


def read_ply(path):
    """A reader of its own: header lines, then packed little-endian vertices."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property")]
    count, = (int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    return lines, np.frombuffer(body, fields, count)


def test_a_ply_file_holds_positions_colours_and_every_field(tmp_path):
    rng = np.random.default_rng(0)
    points, colors, label = rng.normal(size=(50, 3)), rng.random((50, 3)), np.arange(50) + 2 ** 20
    clouds.write_ply(tmp_path / "x.ply", points, colors, {"label": label, "red_sofa": colors[:, 0]}, ["class 1 a\nwall"])
    lines, vertices = read_ply(tmp_path / "x.ply")
    assert "comment class 1 a wall" in lines
    np.testing.assert_allclose(np.stack([vertices[axis] for axis in "xyz"], 1), points, rtol=1e-6)
    assert np.array_equal(np.stack([vertices[c] for c in ("red", "green", "blue")], 1), (colors * 255).round())
    assert np.array_equal(vertices["scalar_label"], label)  # float32 holds ids below 2^24 exactly
    np.testing.assert_allclose(vertices["scalar_red_sofa"], colors[:, 0], rtol=1e-6)


@pytest.mark.parametrize("package", ["plyfile", "trimesh", "open3d"])
def test_a_ply_file_opens_in_other_programs_with_every_field(package, tmp_path):
    """These packages are no requirement: pip install plyfile trimesh open3d."""
    reader = pytest.importorskip(package)
    torch.manual_seed(0)
    points, colors = torch.rand(50, 3), torch.rand(50, 3)
    fields = {name: torch.randint(0, 1000, (50,)) for name in ("label", "instance", "confidence", "gate", "red_sofa")}
    path = tmp_path / "x.ply"
    clouds.write_ply(path, points, colors, fields, ["class 1 a wall"])
    if package == "plyfile":
        vertices = reader.PlyData.read(path)["vertex"]
        found = {name: vertices[f"scalar_{name}"] for name in fields}
        found_points = np.stack([vertices[axis] for axis in "xyz"], 1)
    elif package == "trimesh":
        cloud = reader.load(path, process=False)
        found_points = cloud.vertices
        data = cloud.metadata["_ply_raw"]["vertex"]["data"]
        found = {name: data[f"scalar_{name}"] for name in fields}
    else:
        cloud = reader.t.io.read_point_cloud(str(path))
        found_points = cloud.point.positions.numpy()
        found = {name: cloud.point[f"scalar_{name}"].numpy() for name in fields}
    assert np.array_equal(np.asarray(found_points, np.float32), points.numpy())
    assert all(np.array_equal(np.ravel(found[name]), fields[name].numpy()) for name in fields)


def test_submission_files_read_back_score_as_what_was_written(tmp_path):
    """The reader follows the benchmark's rules: an id per line; mask file, id and confidence; 0 or 1 per line."""
    rng = np.random.default_rng(0)
    ids, n = np.array([1, 3, 5, 1191]), 900
    truth = rng.integers(0, K, n // 150).repeat(150)
    labels = np.where(rng.random(n) < 0.8, truth, rng.integers(0, K, n))
    masks = np.stack([(np.arange(n) // 150 == i) & (rng.random(n) < 0.9) for i in range(6)] + [np.arange(n) < 50])
    scene = {"masks": masks, "labels": np.append(truth[::150], 0), "scores": rng.random(7).astype(np.float32)}
    clouds.write_submission(tmp_path, "scene0000_00", labels, scene, ids)

    read = np.array([int(line) for line in (tmp_path / "semantic" / "scene0000_00.txt").read_text().splitlines()])
    assert np.array_equal(read, ids[labels])
    lines = (tmp_path / "instance" / "scene0000_00.txt").read_text().splitlines()
    assert len(lines) == 6  # the mask of 50 vertices is skipped
    found = {"masks": [], "labels": [], "scores": []}
    for line in lines:
        path, label, score = line.split(" ")
        assert path.startswith("predicted_masks/") and ".." not in path
        found["masks"].append([int(x) for x in (tmp_path / "instance" / path).read_text().split()])
        found["labels"].append(int(label))
        found["scores"].append(float(score))
    found = {key: np.array(values, bool if key == "masks" else None) for key, values in found.items()}
    truth_ids = ids[truth] * 1000 + np.arange(n) // 150
    memory = {"masks": masks, "labels": ids[scene["labels"]], "scores": scene["scores"].astype(float)}
    assert (evaluate_instances([found], [truth_ids], ids.tolist())["ap"]
            == evaluate_instances([memory], [truth_ids], ids.tolist())["ap"] > 0.3)
    assert (evaluate_semantics([read], [ids[truth]], ids.tolist())["miou"]
            == evaluate_semantics([labels], [truth], range(K))["miou"])


def test_a_scan_with_a_space_in_its_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no spaces"):
        clouds.write_submission(tmp_path, "a b", np.zeros(3, int), None, np.arange(3))
