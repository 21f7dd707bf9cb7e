# SPDX-License-Identifier: MIT
"""support/visualize.py: visualizations show what they were asked to show."""
import math

import numpy as np
import pytest
import torch

from support import visualize
from support.visualize import NONE, SHOWN_HEIGHT, label_colors, legend, pca_colors, splat


def to_bytes(colors):
    return (255 * colors).round().int().tolist()


def test_colors_of_labels_are_distinct_and_gray_is_none_of_them():
    colors = label_colors(torch.arange(-1, 40))
    assert colors.shape == (41, 3) and colors.min() >= 0 and colors.max() <= 1 and (colors[0] == NONE).all()
    assert torch.pdist(colors).min() > 0.03


def test_label_images_have_the_colors_of_labels():
    labels = torch.tensor([[0, 3], [-1, 4]])
    expected = to_bytes(label_colors(labels.flatten()).view(2, 2, 3))
    for image in (visualize.label_images(labels), visualize.label_images(labels.numpy())):
        assert image.dtype == np.uint8 and image.tolist() == expected


def test_near_points_are_red_and_far_ones_blue_whatever_the_farthest():
    near, middle, far = visualize.near_far_colors(torch.tensor([1.0, 2.0, 1e6]))
    assert near.tolist() == [1, 0, 0] and far[2] == 1 and far[0] == 0 and middle[0] == 0.5 == middle[2]


def test_pca_colors_follow_the_largest_directions_and_draw_nothing():
    torch.manual_seed(0)
    scores = torch.rand(400, 3) * torch.tensor([9.0, 3.0, 1.0])
    feats = scores @ torch.linalg.qr(torch.randn(12, 3))[0].T + torch.randn(12)
    before = feats.clone()
    colors = pca_colors(feats)
    assert torch.equal(feats, before) and colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    correlation = torch.corrcoef(torch.cat([colors, scores], 1).T)[:3, 3:].abs()
    assert (correlation.diagonal() > 0.95).all()
    assert torch.equal(pca_colors(feats), colors)


@pytest.mark.parametrize("feats", [torch.rand(1, 8), torch.rand(2, 8), torch.full((5, 8), 2.0), torch.zeros(0, 8),
                                   torch.rand(6, 8).half() * 100, torch.full((9, 4), math.nan),
                                   torch.full((9, 4), math.inf)])
def test_pca_colors_of_few_equal_or_nonfinite_rows_are_in_range(feats):
    colors = pca_colors(feats)
    assert colors.shape == (len(feats), 3) and colors.dtype == torch.float32
    assert ((colors >= 0) & (colors <= 1)).all() and (feats.isfinite().all() or not colors.any())


def test_a_predicted_instance_has_the_color_of_the_true_one_that_it_finds():
    truth = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3, -1, -1])
    predicted = torch.tensor([1, 1, 1, -1, 0, 0, 0, 2, 3, 3])
    numbers = visualize.match_instances(truth, predicted)
    assert numbers[:2].tolist() == [3, 7]
    assert len(set(numbers.tolist())) == 4 and not {3, 7} & set(numbers[2:].tolist())
    assert visualize.renumber(predicted, numbers)[3] == -1


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_splat_paints_squares_and_darkens_the_rest(radius):
    image, uv = torch.rand(3, 20, 30), torch.tensor([[10.4, 5.6], [22.0, 14.0]])
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    before = image.clone()
    expected = image * 0.4
    for (x, y), color in zip(((10, 6), (22, 14)), colors):
        expected[:, y - radius:y + radius + 1, x - radius:x + radius + 1] = color[:, None, None]
    assert torch.equal(splat(image, uv, colors, radius), expected) and torch.equal(image, before)


def test_splat_cuts_squares_at_the_border_and_leaves_out_what_is_outside():
    image = torch.ones(3, 8, 10)
    inside = splat(image, torch.tensor([[0.0, 0.0], [9.4, 7.4]]), torch.zeros(2, 3), 1)
    assert (inside == 0).sum() == 3 * 2 * 4  # two corners of 2 x 2 pixels
    outside = torch.tensor([[-5.0, 3], [4, 100], [1e9, -1e9], [-2, -2], [math.nan, 2]])
    assert torch.equal(splat(image, outside, torch.zeros(5, 3), 1), image * 0.4)


def test_a_legend_has_the_color_of_every_row_and_says_how_many_are_missing():
    colors = label_colors(torch.arange(5))
    image = legend([(color, "x") for color in colors], (100, 60))
    present = to_bytes(image.flatten(1).T)
    assert all(color in present for color in to_bytes(colors))
    cut = legend([(color, "x") for color in colors], (45, 60))
    assert cut.shape == (3, 45, 60) and not torch.equal(cut, legend([(color, "x") for color in colors[:2]], (45, 60)))


def test_classes_are_listed_by_frequency_and_only_if_they_occur():
    rows = visualize.class_rows(torch.tensor([2, 2, 2, 0, -1, -1]), NAMES)
    assert [text for _, text in rows] == ["class 2", "class 0", "no label"]
    assert torch.equal(rows[0][0], label_colors(torch.tensor([2]))[0])


NAMES = [f"class {i}" for i in range(5)]


def view(n, **more):
    """What `visualizations` and `clouds` take, of n points of which all are seen."""
    generator = torch.Generator().manual_seed(0)
    uv = torch.rand(n, 2, generator=generator) * torch.tensor([32, 24]) - 0.5
    return {"name": "room/0", "image": torch.rand(3, 24, 32, generator=generator), "uv": uv,
            "depth": torch.rand(n, generator=generator) * 3 + 0.5, "seen": torch.ones(n, dtype=torch.bool),
            "points": torch.rand(n, 3, generator=generator), "colors": torch.rand(n, 3, generator=generator),
            "camera_height": torch.tensor(2.0), "truth": torch.arange(n) % 6 - 1, "prediction": torch.full((n,), -1),
            "fused": torch.randn(n, 16, generator=generator), **more}


def with_everything(n):
    generator = torch.Generator().manual_seed(1)
    return view(n, gate=torch.rand(n, generator=generator), clip=torch.randn(n, 20, generator=generator),
                clip_map=torch.randn(20, 3, 4, generator=generator), instances=torch.arange(n) % 4 - 1,
                instances_truth=torch.arange(n) % 7 - 1, instance_labels=torch.tensor([0, 1, 2]),
                instance_scores=torch.tensor([0.9, 0.8, 0.7]), other_view=(torch.rand(n, 2) * 20, torch.rand(n, 3)))


ALWAYS = {"image", "input_points", "fused_pca", "truth", "prediction"}
SOMETIMES = {"gate", "clip_pca", "instances", "instances_truth", "other_view"}


@pytest.mark.parametrize("make, n, kinds", [(view, 1, ALWAYS), *((with_everything, n, ALWAYS | SOMETIMES)
                                                                 for n in (0, 1, 300))])
def test_visualizations_and_clouds_are_in_range_for_any_number_of_points(make, n, kinds):
    given, before = make(n), make(n)
    named = visualize.visualizations([given], NAMES)
    assert named.keys() == {f"val_room_0/{kind}" for kind in kinds}
    shape = (3, SHOWN_HEIGHT, SHOWN_HEIGHT * 4 // 3 + visualize.LEGEND_WIDTH)
    for name, image in named.items():
        assert image.shape == shape and image.isfinite().all() and image.min() >= 0 and image.max() <= 1, name
    for name, (points, colors) in visualize.clouds([given, given]).items():
        assert points.shape == colors.shape == (2 * n, 3) and ((colors >= 0) & (colors <= 1)).all(), name
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(given[key], value), key


def test_a_class_has_one_color_everywhere_and_points_without_a_label_are_gray():
    uv = torch.tensor([[2.0, 4], [10, 4], [18, 4], [26, 4]])
    labels = torch.tensor([-1, 0, 3, 4])
    given = view(4, uv=uv, truth=labels, prediction=labels)
    named = visualize.visualizations([given], NAMES)
    u, v = ((uv + 0.5) * (SHOWN_HEIGHT / 24) - 0.5).round().long().unbind(1)
    for kind in ("truth", "prediction"):
        assert torch.allclose(named[f"val_room_0/{kind}"][:, v, u].T, label_colors(labels))
        assert torch.allclose(visualize.clouds([given])[kind][1], label_colors(labels))


def test_the_heat_of_each_query_lies_where_it_is_likely_and_the_image_comes_first():
    colors = np.full((24, 32, 3), 0.5, np.float32)
    heats = np.zeros((24, 32, 2), np.float32)
    heats[:, 16:, 1] = 1
    image = visualize.heat_image(colors, heats, ["chair", "sofa"])
    width = SHOWN_HEIGHT * 4 // 3
    assert image.shape == (SHOWN_HEIGHT + visualize.LEGEND_ROW, 3 * width, 3) and image.dtype == np.uint8
    row = image[visualize.LEGEND_ROW + 100]
    unlikely, likely = to_bytes(0.2 + 0.6 * visualize.heat_colors(torch.tensor([0.0, 1.0])))
    assert (row[:width] == 128).all()
    assert (row[width + 5:2 * width - 5] == unlikely).all()  # chair: nowhere
    assert (row[2 * width + 5:-width // 2 - 5] == unlikely).all() and (row[-width // 2 + 5:] == likely).all()


def test_clip_cells_lie_where_their_patch_lies():
    given = with_everything(5)
    image = visualize.visualizations([given], NAMES)["val_room_0/clip_pca"][:, :, :SHOWN_HEIGHT * 4 // 3]
    cell = SHOWN_HEIGHT // 3
    cells = pca_colors(given["clip_map"].flatten(1).T).T.view(3, 3, 4)
    assert torch.allclose(cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2), image, atol=1e-6)


def test_what_lies_above_the_cameras_is_left_out_of_a_cloud_and_a_cloud_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(visualize, "MAX_CLOUD", 50)
    given = view(300)
    given["points"][:100, 2] = 2.6  # the camera is at 2 m
    points, _ = visualize.clouds([given])["truth"]
    assert len(points) == 50 and points[:, 2].max() < 2.5
