# SPDX-License-Identifier: MIT
"""support/clouds.py: a merged scene does not depend on the order of its frames, and files that others can read."""
import numpy as np
import pytest
import torch

from sources.scannet import read_ply_vertices
from support import clouds
from support.clouds import SceneMerger, write_ply, write_submission

K = 4


def frame(seed, n=3000):
    """What `predict_batch` gives for points of a wall with three objects; objects and classes depend on x alone."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([0, 0, 0], [3, 1, 0.01], (n, 3))
    thing = np.floor(points[:, 0]).astype(np.int64)
    likely = rng.dirichlet(np.ones(K), n).astype(np.float32)
    number = rng.permutation(3)  # instances have any numbers
    result = {"points": points.astype(np.float32), "colors": rng.random((n, 3)), "gate": rng.random(n),
              "probabilities": likely, "truth": thing % 2, "truth_instances": thing, "instances": number[thing],
              "instance_labels": np.argsort(number) % 2, "scores": rng.uniform(0.5, 1, 3)}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in result.items()}


def merged(frames):
    merger = SceneMerger(K, voxel_size=0.05)
    for one in frames:
        merger.add(one)
    return merger, merger.cloud()


def test_the_order_of_frames_changes_no_label_no_color_and_no_confidence_and_memory_follows_the_surface():
    frames = [frame(seed) for seed in range(6)]
    merger, one = merged(frames)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        again, other = merged([frames[i] for i in order])
        for name in ("points", "colors", "labels", "confidence", "gate"):
            assert np.array_equal(one[name], other[name]), name
    again.add(frames[0])
    assert len(again.keys) == len(merger.keys) <= len(merger.sums) <= 1.5 * len(merger.keys)


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
    assert len(cloud["points"]) == len(expected)
    found = [expected[tuple(cell)] for cell in np.floor(cloud["points"] / 0.05 + 1e-9).astype(int)]
    np.testing.assert_allclose(cloud["confidence"], np.max(found, 1), atol=1e-3)
    sure = np.sort(found, 1)[:, -1] - np.sort(found, 1)[:, -2] > 1e-3
    assert np.array_equal(cloud["labels"][sure], np.argmax(found, 1)[sure])


def test_instances_of_frames_become_those_of_the_scene_whatever_their_numbers():
    _, cloud = merged([frame(seed) for seed in range(5)])
    inner = np.abs(cloud["points"][:, 0] - np.round(cloud["points"][:, 0])) > 0.06  # off the borders of objects
    thing = np.floor(cloud["points"][:, 0]).astype(int)
    owners = [set(cloud["instances"][inner & (thing == t)]) for t in range(3)]
    assert all(len(owner) == 1 for owner in owners) and len(set.union(*owners)) == 3
    assert [cloud["instance_labels"][owner.pop()] for owner in owners] == [0, 1, 0]
    assert np.array_equal(cloud["truth_instances"][inner], thing[inner])


def test_a_cloud_made_in_parts_is_that_of_all_voxels(monkeypatch):
    merger, whole = merged([frame(0), frame(1)])
    monkeypatch.setattr(clouds, "PART", 7)
    in_parts = merger.cloud()
    assert all(np.array_equal(in_parts[name], values) for name, values in whole.items())


def test_a_scene_that_memory_cannot_hold_is_refused_if_it_may_have_no_tiles(monkeypatch):
    merger, cloud = merged([frame(0)])
    monkeypatch.setattr(clouds, "MAX_BYTES", 300 * len(cloud["points"]))
    merger.add(frame(0))
    farther = frame(1)
    farther["points"] += 100
    with pytest.raises(ValueError, match="more than half of the memory: merge larger voxels"):
        merger.add(farther)


def test_points_far_away_are_refused():
    one = frame(0, n=5)
    one["points"] += 1e6
    with pytest.raises(ValueError, match="are the poses in meters"):
        merged([one])


def test_a_ply_file_holds_positions_colors_and_every_field(tmp_path):
    rng = np.random.default_rng(0)
    points, colors = rng.normal(size=(50, 3)).astype(np.float32), rng.random((50, 3))
    scalars = {"label": np.arange(50) + 2 ** 20, "red_sofa": colors[:, 0].astype(np.float32)}  # ids below 2^24
    path = tmp_path / "x.ply"
    write_ply(path, points, colors, scalars, ["class 1 a\nwall"])
    assert b"\ncomment class 1 a wall\n" in path.read_bytes()
    floats = dict.fromkeys(["x", "y", "z", "scalar_label", "scalar_red_sofa"], ("f4",))
    readers = [read_ply_vertices(path, floats | dict.fromkeys(["red", "green", "blue"], ("u1",)))]
    try:
        from plyfile import PlyData  # no requirement
        readers.append(PlyData.read(path)["vertex"])
    except ImportError:
        pass
    for vertices in readers:
        assert np.array_equal(np.stack([vertices[axis] for axis in "xyz"], 1), points)
        assert np.array_equal(np.stack([vertices[c] for c in ("red", "green", "blue")], 1), (colors * 255).round())
        assert all(np.array_equal(vertices[f"scalar_{name}"], values) for name, values in scalars.items())


def test_submission_files_hold_what_was_written(tmp_path):
    """The reader follows the benchmark's rules: an id per line; mask file, id and confidence; 0 or 1 per line."""
    rng = np.random.default_rng(0)
    ids, n = np.array([1, 3, 5, 1191]), 900
    labels = rng.integers(0, K, n)
    masks = np.stack([(np.arange(n) // 150 == i) & (rng.random(n) < 0.9) for i in range(6)] + [np.arange(n) < 50])
    scene = {"masks": masks, "labels": rng.integers(0, K, 7), "scores": rng.random(7).astype(np.float32)}
    write_submission(tmp_path, "scene0000_00", labels, scene, ids)

    read = np.array([int(line) for line in (tmp_path / "semantic" / "scene0000_00.txt").read_text().splitlines()])
    assert np.array_equal(read, ids[labels])
    lines = (tmp_path / "instance" / "scene0000_00.txt").read_text().splitlines()
    assert len(lines) == 6  # the mask of 50 vertices is skipped
    paths, kinds, scores = zip(*(line.split(" ") for line in lines))
    assert all(path.startswith("predicted_masks/") and ".." not in path for path in paths)
    found = [[int(x) for x in (tmp_path / "instance" / path).read_text().split("\n")[:-1]] for path in paths]
    assert np.array_equal(found, masks[:6])
    assert np.array_equal([int(kind) for kind in kinds], ids[scene["labels"][:6]])
    assert np.array_equal([float(score) for score in scores], scene["scores"][:6])


def test_a_scan_with_a_space_in_its_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no spaces"):
        write_submission(tmp_path, "a b", np.zeros(3, int), None, np.arange(3))
