# SPDX-License-Identifier: MIT
"""visualize.py: averages over a window, and visualizations that show what they were asked to show."""
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from support import runlog, visualize


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events


def test_a_log_holds_averages_since_the_last_one_and_the_latest_value_of_others(tmp_path):
    log = runlog.RunLog(tmp_path, log_every=2, mean_over_processes=lambda values: values / 2)
    for step in range(1, 6):
        log.begin_step(step, last=step == 5)
        log.add("a", torch.tensor(float(step)))
        log.add("host", step)
        if step > 1:
            log.add("late", torch.tensor(1.0, dtype=torch.bfloat16))
        assert log.due == (step in (2, 4, 5))
        if log.due:
            log.write({"latest": step})
    log.close()
    events = read(tmp_path)
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert series == {"a": [(2, 0.75), (4, 1.75), (5, 2.5)], "host": [(2, 1.5), (4, 3.5), (5, 5)],
                      "late": [(2, 0.5), (4, 0.5), (5, 0.5)], "latest": [(2, 2), (4, 4), (5, 5)]}


def test_every_loss_term_is_logged_raw_and_weighted(tmp_path):
    log = runlog.RunLog(tmp_path, log_every=1)
    log.begin_step(1)
    raw = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0)}
    log.add_losses(raw, {"a": 0.5 * raw["a"], "b": 0 * raw["b"]})
    averages = log.write({})
    assert averages == {"loss/total": 1, "loss/a": 2, "weighted/a": 1, "loss/b": 3, "weighted/b": 0}


def test_gradient_norms_are_those_of_the_modules_and_only_of_steps_that_are_written(tmp_path):
    part = torch.nn.Linear(3, 2)
    part(torch.ones(1, 3)).sum().backward()
    log = runlog.RunLog(tmp_path, log_every=2, modules={"part": part, "idle": torch.nn.Linear(1, 1)})
    for step in (1, 2):
        log.begin_step(step)
        log.add_gradient_norms()
    log.close()
    event, = read(tmp_path).Scalars("grad/part")
    assert event.step == 2 and event.value == pytest.approx(math.sqrt(8))
    assert "grad/idle" not in read(tmp_path).Tags()["scalars"]


def test_a_log_without_a_folder_writes_nothing_and_still_averages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = runlog.RunLog(None, log_every=1)
    log.begin_step(1)
    log.add("a", torch.tensor(3.0))
    log.add_text("t", "x")
    log.add_table("t", {"x": 1})
    log.add_images({"i": torch.zeros(3, 2, 2)})
    log.add_histogram("h", torch.rand(3))
    log.add_gradient_norms()
    assert log.write({"b": 1}) == {"a": 3}
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_histogram_of_nothing_or_of_nan_is_left_out(tmp_path):
    log = runlog.RunLog(tmp_path)
    for values in (torch.zeros(0), torch.tensor([math.nan])):
        log.add_histogram("h", values)
    log.add_histogram("good", torch.rand(9))
    log.close()
    assert read(tmp_path).Tags()["histograms"] == ["good"]


def test_a_writer_that_fails_is_reported_once_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "RETRY_SECONDS", 0)
    reports = []
    log = runlog.RunLog(tmp_path, log_every=1, report=reports.append)
    log.begin_step(1)

    class Full:
        def __getattr__(self, name):
            def fail(*args, **options):
                raise OSError(28, "No space left on device")
            return fail

    for step in (2, 3):
        log.writer = Full()
        log.begin_step(step)
        log.add("a", torch.tensor(1.0))
        log.write({"b": 2})
        log.add_text("t", "x")
        log.add_images({"i": torch.zeros(3, 2, 2)})
    log.begin_step(4)
    log.add("a", torch.tensor(5.0))
    assert log.write({}) == {"a": 5}
    log.add_images({"i": torch.zeros(3, 2, 2)})  # was lost
    log.close()
    assert read(tmp_path).Tags()["images"] == ["i"]
    assert len(reports) == 1 and "No space left on device" in reports[0] and str(tmp_path) in reports[0]
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("a")] == [(4, 5.0)]


def test_a_folder_that_is_gone_does_not_stop_a_log(tmp_path):
    reports = []
    folder = tmp_path / "run"
    folder.mkdir()
    log = runlog.RunLog(folder, log_every=1, report=reports.append)
    log.close()
    log.writer = None
    (tmp_path / "run" / next(folder.iterdir()).name).unlink()
    folder.rmdir()
    folder.write_text("a file in its place")
    log.begin_step(1)
    log.add("a", torch.tensor(1.0))
    assert log.write({}) == {"a": 1} and len(reports) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_colors_of_features_that_are_not_finite_are_black(bad):
    feats = torch.randn(9, 4)
    feats[3, 1] = bad
    assert (visualize.pca_colors(feats) == 0).all()


def test_palette_colors_are_distinct_and_in_range():
    colors = visualize.palette(40)
    assert colors.shape == (40, 3) and colors.min() >= 0 and colors.max() <= 1
    assert torch.pdist(colors).min() > 0.03 and visualize.palette(0).shape == (0, 3)
    assert torch.equal(visualize.palette(40)[:7], visualize.palette(7))


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_splat_paints_squares_and_darkens_the_rest(radius):
    image, uv = torch.rand(3, 20, 30), torch.tensor([[10.4, 5.6], [22.0, 14.0]])
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    before = image.clone(), uv.clone(), colors.clone()
    expected = image * 0.4
    for (x, y), color in zip(((10, 6), (22, 14)), colors):
        expected[:, y - radius:y + radius + 1, x - radius:x + radius + 1] = color[:, None, None]
    assert torch.equal(visualize.splat(image, uv, colors, radius), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (image, uv, colors)))


def test_splat_cuts_squares_at_the_border_and_leaves_out_what_is_outside():
    image = torch.ones(3, 8, 10)
    inside = visualize.splat(image, torch.tensor([[0.0, 0.0], [9.4, 7.4]]), torch.zeros(2, 3), 1)
    assert (inside == 0).sum() == 3 * 2 * 4  # two corners of 2 x 2 pixels
    outside = torch.tensor([[-5.0, 3], [4, 100], [1e9, -1e9], [-2, -2], [math.nan, 2]])
    assert torch.equal(visualize.splat(image, outside, torch.zeros(5, 3), 1), image * 0.4)
    assert torch.equal(visualize.splat(image, torch.zeros(0, 2), torch.zeros(0, 3)), image * 0.4)


def test_pca_colors_follow_the_largest_directions():
    torch.manual_seed(0)
    scores = torch.rand(400, 3) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(12, 3))[0].T
    feats = scores @ basis + torch.randn(12)
    before = feats.clone()
    colors = visualize.pca_colors(feats)
    assert torch.equal(feats, before) and colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    correlation = torch.corrcoef(torch.cat([colors, scores], 1).T)[:3, 3:].abs()
    assert (correlation.diagonal() > 0.95).all()
    assert torch.equal(visualize.pca_colors(feats), colors)  # draws nothing


def test_pca_colors_of_few_or_equal_rows_are_in_range():
    for feats in (torch.randn(1, 8), torch.randn(2, 8), torch.full((5, 8), 2.0), torch.zeros(0, 8),
                  torch.randn(6, 8).half() * 100):
        colors = visualize.pca_colors(feats)
        assert colors.shape == (len(feats), 3) and colors.dtype == torch.float32
        assert ((colors >= 0) & (colors <= 1)).all()


def view(n, height=24, width=32, seed=0, **more):
    """What `visualizations` and `clouds` take, of n points of which all are seen."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 5, (n,), generator=generator)
    return {"name": f"room{seed}/0", "image": torch.rand(3, height, width, generator=generator),
            "uv": torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) - 0.5,
            "depth": torch.rand(n, generator=generator) * 3 + 0.5, "seen": torch.ones(n, dtype=torch.bool),
            "points": torch.rand(n, 3, generator=generator), "colors": torch.rand(n, 3, generator=generator),
            "camera_height": torch.tensor(2.0), "truth": ids, "prediction": torch.full((n,), -1),
            "fused": torch.randn(n, 16, generator=generator), **more}


def with_everything(n):
    generator = torch.Generator().manual_seed(1)
    return view(n, gate=torch.rand(n, generator=generator), clip=torch.randn(n, 20, generator=generator),
                clip_map=torch.randn(20, 3, 4, generator=generator), instances=torch.arange(n) % 4 - 1,
                instances_truth=torch.arange(n) % 7 - 1, instance_labels=torch.tensor([0, 1, 2]),
                instance_scores=torch.tensor([0.9, 0.8, 0.7]), other_view=(torch.rand(n, 2) * 20, torch.rand(n, 3)))


NAMES = [f"class {i}" for i in range(5)]
ALWAYS = {"image", "input_points", "fused_pca", "truth", "prediction"}
SOMETIMES = {"gate", "clip_pca", "instances", "instances_truth", "other_view"}


@pytest.mark.parametrize("n", [0, 1, 2, 300])
@pytest.mark.parametrize("make, kinds", [(view, ALWAYS), (with_everything, ALWAYS | SOMETIMES)])
def test_visualizations_and_clouds_are_in_range_for_any_number_of_points(n, make, kinds):
    given, before = make(n), make(n)
    named = visualize.visualizations([given], NAMES)
    assert named.keys() == {f"val_room0_0/{kind}" for kind in kinds}
    shape = (3, visualize.SHOWN_HEIGHT, visualize.SHOWN_HEIGHT * 4 // 3 + visualize.LEGEND_WIDTH)
    for name, image in named.items():
        assert image.shape == shape and image.isfinite().all() and image.min() >= 0 and image.max() <= 1, name
    for name, (points, colors) in visualize.clouds([given, given]).items():
        assert points.shape == colors.shape == (2 * n, 3) and ((colors >= 0) & (colors <= 1)).all(), name
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(given[key], value), key


def shown(image, uv, scale):
    """The colours of an image that `visualizations` gives, at pixels uv of the image that it was given."""
    u, v = ((uv + 0.5) * scale - 0.5).round().long().unbind(1)
    return image[:, v, u].T


def test_a_class_has_one_colour_everywhere_and_points_without_a_label_are_grey():
    uv = torch.tensor([[2.0, 4], [10, 4], [18, 4], [26, 4]])
    labels = torch.tensor([-1, 0, 3, 4])
    expected = torch.cat([torch.full((1, 3), visualize.NONE), visualize.palette(5)[[0, 3, 4]]])
    given = view(4, uv=uv, truth=labels, prediction=labels)
    named = visualize.visualizations([given], NAMES)
    for kind in ("truth", "prediction"):
        assert torch.allclose(shown(named[f"val_room0_0/{kind}"], uv, visualize.SHOWN_HEIGHT / 24), expected)
        assert torch.allclose(visualize.clouds([given])[kind][1], expected)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_label_images_have_the_colours_of_labels(make):
    image = visualize.label_images(make([[0, 3], [-1, 4]]))
    expected = torch.stack([*visualize.palette(4)[[0, 3]], torch.full((3,), visualize.NONE), visualize.palette(5)[4]])
    assert image.dtype == np.uint8 and image.tolist() == (255 * expected).round().int().view(2, 2, 3).tolist()


def test_a_legend_has_the_colour_of_every_row_and_says_how_many_are_missing():
    colors = visualize.palette(5)
    image = visualize.legend([(color, "x") for color in colors], (100, 60))
    present = {tuple((c * 255).round().int().tolist()) for c in image.flatten(1).T}
    assert {tuple((c * 255).round().int().tolist()) for c in colors} <= present
    cut = visualize.legend([(color, "x") for color in colors], (45, 60))
    assert not torch.equal(cut, visualize.legend([(color, "x") for color in colors[:2]], (45, 60)))
    assert cut.shape == (3, 45, 60)


def test_classes_are_listed_by_frequency_and_only_if_they_occur():
    rows = visualize.class_rows(torch.tensor([2, 2, 2, 0, -1, -1]), NAMES)
    assert [text for _, text in rows] == ["class 2", "class 0", "no label"]
    assert torch.equal(rows[0][0], visualize.palette(3)[2])


def test_near_points_are_red_and_far_ones_blue_whatever_the_farthest():
    near, middle, far = visualize.near_far_colors(torch.tensor([1.0, 2.0, 1e6]))
    assert near.tolist() == [1, 0, 0] and far[2] == 1 and far[0] == 0 and middle[0] == 0.5 == middle[2]


def test_clip_cells_lie_where_their_patch_lies():
    given = with_everything(5)
    image = visualize.visualizations([given], NAMES)["val_room0_0/clip_pca"][:, :, :visualize.SHOWN_HEIGHT * 4 // 3]
    cell = visualize.SHOWN_HEIGHT // 3
    cells = image[:, cell // 2::cell, cell // 2::cell]
    assert torch.allclose(cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2), image, atol=1e-6)
    expected = visualize.pca_colors(given["clip_map"].flatten(1).T).T.view(3, 3, 4)
    assert torch.allclose(cells, expected, atol=1e-6)


def test_a_predicted_instance_has_the_colour_of_the_true_one_that_it_finds():
    truth = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3, -1, -1])
    predicted = torch.tensor([1, 1, 1, -1, 0, 0, 0, 2, 3, 3])
    numbers = visualize.match_instances(truth, predicted)
    assert numbers[:2].tolist() == [3, 7]
    assert len(set(numbers.tolist())) == 4 and not {3, 7} & set(numbers[2:].tolist())
    assert visualize.renumber(predicted, numbers)[3] == -1


def test_what_lies_above_the_cameras_is_left_out_of_a_cloud_and_a_cloud_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(visualize, "MAX_CLOUD", 50)
    given = view(300)
    given["points"][:100, 2] = 2.6  # the camera is at 2 m
    points, _ = visualize.clouds([given])["truth"]
    assert len(points) == 50 and points[:, 2].max() < 2.5


def test_an_image_or_cloud_that_has_not_changed_is_written_once(tmp_path):
    log = runlog.RunLog(tmp_path, log_every=1)
    cloud = (torch.rand(40, 3), torch.rand(40, 3))
    for step, image in ((1, torch.zeros(3, 2, 2)), (2, torch.zeros(3, 2, 2)), (3, torch.ones(3, 2, 2))):
        log.begin_step(step)
        log.add_images({"a/i": image})
        log.add_clouds({"truth/room": cloud, "empty/room": (cloud[0][:0], cloud[1][:0])})
    log.close()
    events = read(tmp_path)
    assert [event.step for event in events.Images("a/i")] == [1, 3]
    assert {tag for tag in events.Tags()["tensors"]} == {"truth/room_VERTEX", "truth/room_COLOR"}
    event, = events.Tensors("truth/room_VERTEX")
    written = tensor_util.make_ndarray(event.tensor_proto)[0]
    assert torch.allclose(torch.from_numpy(written), cloud[0][:, [0, 2, 1]] * torch.tensor([1, 1, -1]))  # y is up there
