# SPDX-License-Identifier: MIT
"""superpoints.py: Ward's tree, regions that respect object borders, equal results for equal frames."""
import numpy as np
import pytest
import torch

from sources.scannet import ScanNetFrames
from superpoints import box_mean, oversegment, srgb_to_lab, ward

INTRINSICS = np.array([[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1.0]])


@pytest.fixture
def scene():
    """A wall of two colors with a box before it: depth, colors, which of the three surfaces each pixel shows."""
    rng = np.random.default_rng(0)
    _, column = np.indices((48, 64))
    surface = (column > 40).astype(int)
    surface[14:36, 12:30] = 2
    depth = np.where(surface == 2, 1.5, 2.0) + rng.normal(0, 0.002, surface.shape)
    colors = np.array([[150, 150, 140], [60, 90, 150], [150, 150, 140]])[surface] + rng.integers(-6, 7, (48, 64, 3))
    return depth.astype(np.float32), colors.astype(np.uint8), surface


def grid_edges(height, width):
    """Edges u - v between neighboring pixels of an image."""
    node = np.arange(height * width).reshape(height, width)
    return (np.concatenate([a.ravel(), b.ravel()]) for a, b in ((node[:, :-1], node[:-1]), (node[:, 1:], node[1:])))


def pure_share(segments, truth):
    """Share of the segmented pixels whose segment's most frequent truth is theirs."""
    ids, truth = segments[segments >= 0], truth[segments >= 0]
    table = np.zeros((ids.max() + 1, truth.max() + 1), int)
    np.add.at(table, (ids, truth), 1)
    return table.max(1).sum() / len(ids)


def naive_ward(features, edges, count):
    """One merge at a time, straight from the definition."""
    groups, edges = {i: [i] for i in range(len(features))}, {tuple(sorted(edge)) for edge in edges}
    while len(groups) > count:
        def cost(edge):
            a, b = (features[groups[g]].astype(np.float64) for g in edge)
            gap = a.mean(0) - b.mean(0)
            return len(a) * len(b) / (len(a) + len(b)) * gap @ gap
        a, b = min(edges, key=cost)
        groups[a] += groups.pop(b)
        edges = {tuple(sorted(a if g == b else g for g in edge)) for edge in edges}
        edges = {edge for edge in edges if edge[0] != edge[1]}
    return {tuple(sorted(group)) for group in groups.values()}


@pytest.mark.parametrize("count", [1, 3, 7, 19])
def test_rounds_of_mutual_neighbors_give_the_tree_of_single_merges_on_a_complete_graph(count):
    features = np.random.default_rng(count).normal(size=(20, 3)).astype(np.float32)
    u, v = np.triu_indices(20, 1)
    region = ward(features, u, v, count)
    assert {tuple(np.flatnonzero(region == i)) for i in range(count)} == naive_ward(features, zip(u, v), count)


def test_regions_of_a_graph_are_connected_and_as_many_as_asked_for():
    u, v = grid_edges(15, 20)
    region = ward(np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32), u, v, 12)
    assert np.unique(region).tolist() == list(range(12))
    reached = np.zeros(300, bool)
    reached[np.unique(region, return_index=True)[1]] = True
    inside = region[u] == region[v]
    for _ in range(300):  # flood from one node of each region
        reached[u[inside & reached[v]]] = True
        reached[v[inside & reached[u]]] = True
    assert reached.all()


def test_a_late_merge_that_is_cheaper_never_cuts_a_region_in_two():
    """0 - 10 - 0 in a row: joining the third costs 17, the first two 50, but the third touches the second alone."""
    region = ward(np.array([[0], [10], [0]], np.float32), np.array([0, 1]), np.array([1, 2]), 2)
    assert region[0] == region[1] != region[2]


def test_equal_costs_still_end_and_a_graph_without_edges_stays_as_it_is():
    assert np.unique(ward(np.zeros((64, 1), np.float32), *grid_edges(8, 8), 5)).tolist() == list(range(5))
    assert ward(np.zeros((3, 1), np.float32), np.array([], int), np.array([], int), 1).tolist() == [0, 1, 2]


def test_lab_of_known_colors():
    """Reference values of CIELAB under D65 for the sRGB primaries."""
    colors = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [53.241, 80.092, 67.203], [87.735, -86.183, 83.179], [32.297, 79.188, -107.860]]
    assert np.abs(srgb_to_lab(colors) - expected).max() < 0.02


def test_box_mean_agrees_with_average_pooling():
    image = np.random.default_rng(0).random((9, 7, 3)).astype(np.float32)
    padded = torch.from_numpy(np.pad(image, ((2, 2), (2, 2), (0, 0)), "edge")).permute(2, 0, 1)[None]
    expected = torch.nn.functional.avg_pool2d(padded, 5, 1)[0].permute(1, 2, 0)
    assert np.abs(box_mean(image, 5) - expected.numpy()).max() < 1e-6
    assert np.array_equal(box_mean(image, 1), image)


@pytest.mark.parametrize("nodes", [10_000, 700])
def test_superpoints_keep_to_surfaces_that_differ_in_depth_or_color_only(scene, nodes):
    depth, colors, surface = scene
    before = depth.copy(), colors.copy()
    segments = oversegment(depth, colors, INTRINSICS, 40, nodes)
    assert np.unique(segments).tolist() == list(range(40)) and pure_share(segments, surface) > 0.99
    assert np.array_equal(segments, oversegment(depth, colors, INTRINSICS, 40, nodes)), "a second call differs"
    assert np.array_equal(depth, before[0]) and np.array_equal(colors, before[1])


@pytest.mark.parametrize("nodes", [10_000, 300])
def test_every_known_pixel_and_no_other_gets_a_superpoint(scene, nodes):
    depth, colors, _ = scene
    depth[np.random.default_rng(1).random(depth.shape) < 0.3] = 0
    depth[5, 5], depth[6, 6], depth[10:20] = np.nan, np.inf, 0
    depth[15, 30] = 2.0  # alone in a hole
    segments = oversegment(depth, colors, INTRINSICS, 30, nodes)
    assert np.array_equal(segments >= 0, (depth > 0) & np.isfinite(depth)) and segments.max() == 29


def test_nothing_known_one_pixel_and_fewer_pixels_than_superpoints():
    colors = np.zeros((6, 8, 3), np.uint8)
    depth = np.zeros((6, 8), np.float32)
    assert (oversegment(depth, colors, INTRINSICS) == -1).all()
    depth[3, 4] = 1
    assert oversegment(depth, colors, INTRINSICS).max() == 0
    depth[:] = 1
    assert np.unique(oversegment(depth, colors, INTRINSICS)).tolist() == list(range(48))


def test_malformed_input_is_named(scene):
    depth, colors, _ = scene
    for bad in ((depth[:5], colors, INTRINSICS), (depth, colors.astype(np.float32), INTRINSICS),
                (depth, colors, np.eye(4)), (depth, colors, INTRINSICS, 0)):
        with pytest.raises(ValueError, match="expected depth"):
            oversegment(*bad)


def test_superpoints_of_real_frames_keep_to_objects(shared):
    """Majority label per superpoint, of all labeled frames of one sequence."""
    frames = ScanNetFrames(shared / "data/ycbv", shared / "data/ycbv/classes.txt")
    shares = [pure_share(oversegment(frame["depth"], frame["color"], frame["depth_intrinsics"]), frame["label"] + 1)
              for frame in (frames[i] for i in range(0, 20, 5))]
    assert np.mean(shares) > 0.97
