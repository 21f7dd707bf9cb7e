# SPDX-License-Identifier: MIT
"""data.py: pixels and points line up, and samples depend on seed, epoch and index alone."""
import os
import types
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from support.cache import FeatureCache, Store, SuperpointCache
from fusion import apply_transform, occluded_mask, project_to_image
from superpoints import oversegment
from helpers import ALIGNMENT, CLASSES, POSE, intrinsics_of, write_scan, write_scannet
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames, ScanNetScenes


@pytest.fixture
def root(tmp_path):
    return write_scannet(tmp_path / "frames")


def project(points, intrinsics, world2cam):
    """An independent pinhole camera: points (n, 3) -> (u, v) (n, 2) and depth (n,), in float64."""
    camera = np.asarray(points, np.float64) @ world2cam[:3, :3].T + world2cam[:3, 3]
    image = camera @ np.asarray(intrinsics, np.float64).T
    return image[:, :2] / image[:, 2:], camera[:, 2]


def every_point(frame):
    """The points (n, 3) float32 of all pixels of known depth."""
    v, u = frame["depth"].nonzero()
    points = data.unproject(np.stack([u, v], 1), frame["depth"][v, u], frame["depth_intrinsics"], frame["world2cam"])
    return points.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("new_size", [(224, 224), (480, 640), (30, 40), (37, 51), (968, 1296)])
def test_a_pixel_comes_back_to_its_place_through_crop_and_resize(new_size):
    size, top, left, cropped = (480, 640), 21, 34, (420, 590)
    depth = np.random.default_rng(0).uniform(0.5, 4, size).astype(np.float32)
    intrinsics, world2cam = intrinsics_of(size), np.linalg.inv(POSE)
    v, u = np.mgrid[:size[0], :size[1]].reshape(2, -1)
    points = data.unproject(np.stack([u, v], 1), depth.ravel(), intrinsics, world2cam)
    camera = data.resize_intrinsics(data.crop_intrinsics(intrinsics, top, left), cropped, new_size)
    uv, z = project(points, camera, world2cam)
    # an image covers [-0.5, W - 0.5]: the same share of the covered range before and after
    expected = (np.stack([u - left, v - top], 1) + 0.5) / cropped[::-1] * new_size[::-1] - 0.5
    assert np.abs(uv - expected).max() < 1e-9 and np.abs(z - depth.ravel()).max() < 1e-9


@pytest.mark.parametrize("scale, new_size", [(1, (56, 42)), (10, (37, 51)), (10, (224, 224)), (1, (96, 200))])
def test_resized_image_and_resized_intrinsics_move_together(scale, new_size):
    """The centre of mass of a blob in the PIL-resized image is where the resized camera projects its 3D point."""
    size, u, v = (96 * scale, 128 * scale), 70.7 * scale, 40.3 * scale
    row, column = np.mgrid[:size[0], :size[1]]
    blob = np.exp(-((row - v) ** 2 + (column - u) ** 2) / (2 * (6 * scale) ** 2))
    image = data.resize_image(np.repeat((255 * blob[..., None]).round(), 3, 2).astype(np.uint8), new_size)[..., 0]
    point = data.unproject(np.array([[u, v]]), [2.0], intrinsics_of(size), np.linalg.inv(POSE))
    uv, _ = project(point, data.resize_intrinsics(intrinsics_of(size), size, new_size), np.linalg.inv(POSE))
    mass = image / image.sum(dtype=float)
    row, column = np.mgrid[:new_size[0], :new_size[1]]
    assert abs((mass * column).sum() - uv[0, 0]) < 0.05 and abs((mass * row).sum() - uv[0, 1]) < 0.05


def test_depth_that_is_not_finite_or_not_positive_is_unknown(root):
    frame = ScanNetFrames(root, CLASSES)[0]
    depth = np.zeros_like(frame["depth"])
    depth[0, :5] = np.inf, np.nan, -1, 2, 0
    sample = data.PointDataset([{**frame, "depth": depth}], 50, (24, 32))[0]
    assert len(sample["points"]) == 1 and sample["depth"].isfinite().all()


def test_frames_of_one_scene_meet_in_the_world(shared):
    """Real frames: one frame's points, projected into another, find its depth to millimetres."""
    frames = ScanNetFrames(shared / "data/ycbv", shared / "data/ycbv/classes.txt")
    for scene in ("scene0000_00", "scene0001_00"):
        first, second = (frames[frames.names.index(f"{scene}/{n}")] for n in (1, 2))
        points = every_point(first)
        uv, z = project(points, second["depth_intrinsics"], second["world2cam"])
        u, v = np.rint(uv).astype(int).T
        inside = (u >= 0) & (u < 640) & (v >= 0) & (v < 480)
        seen = second["depth"][v[inside], u[inside]]
        assert np.median(np.abs(seen - z[inside])[seen > 0]) < 0.0025


# ------------------------------------------------------------------------------------------------------ augmentation


def test_augmentation_without_elastic_is_a_similarity():
    coords = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32) + 5
    for seed in range(20):
        moved = data.augment_points(coords, np.random.default_rng(seed), elastic_p=0)
        a, b = (np.linalg.norm(c[:, None] - c[None], axis=2)[np.triu_indices(200, 1)] for c in (coords, moved))
        ratio = b / a
        assert ratio.max() - ratio.min() < 1e-3 and 0.79 < ratio.mean() < 1.21
        assert np.corrcoef(moved[:, 2], coords[:, 2])[0, 1] > 0.9999  # up stays up


def test_elastic_is_bounded_and_smooth():
    rng = np.random.default_rng(2)
    coords = rng.uniform(0, 3, (5000, 3)).astype(np.float32)
    near = coords + np.float32(1e-3)
    for granularity, magnitude in ((0.12, 0.8), (0.4, 3.2)):
        shift = data.elastic(coords, np.random.default_rng(3), granularity, magnitude) - coords
        assert 0.03 * magnitude < shift.std() < 0.3 * magnitude and np.abs(shift).max() <= 3 * magnitude
        # neighbouring nodes of a blurred grid, 2 * granularity apart, differ by far less than the noise itself
        shift_near = data.elastic(near, np.random.default_rng(3), granularity, magnitude) - near
        assert np.abs(shift_near - shift).max() < 1e-3 * 3 * 3 * magnitude / (2 * granularity)


def test_the_grid_of_elastic_noise_is_bounded():
    wide = np.array([[0, 0, 0], [9e3, 9e3, 9e3]], np.float32)
    peak = []
    rng = np.random.default_rng(0)
    draw = types.SimpleNamespace(
        standard_normal=lambda shape, dtype: peak.append(shape) or rng.standard_normal(shape, dtype))
    assert np.abs(data.elastic(wide, draw, 0.12, 0.8) - wide).max() <= 2.4
    assert max(peak[0]) <= 259


def test_elastic_takes_one_point_and_refuses_none_and_nan():
    one = data.augment_points(np.ones((1, 3), np.float32), np.random.default_rng(0), elastic_p=1)
    assert np.isfinite(one).all()
    for bad in (np.zeros((0, 3), np.float32), np.full((5, 3), np.nan, np.float32), np.zeros((5, 2), np.float32)):
        with pytest.raises(ValueError, match="coords"):
            data.elastic(bad, np.random.default_rng(0), 0.1, 0.1)


def test_color_jitter_stays_in_range_and_keeps_its_input():
    colors = np.random.default_rng(0).random((1000, 3)).astype(np.float32)
    before = colors.copy()
    jittered = data.jitter_colors(colors, np.random.default_rng(1))
    assert np.array_equal(colors, before) and not np.array_equal(jittered, colors)
    assert jittered.min() >= 0 and jittered.max() <= 1 and jittered.dtype == np.float32


def test_elastic_is_counted_in_voxels():
    coords = np.random.default_rng(0).uniform(0, 2, (2000, 3)).astype(np.float32)
    small, large = (data.augment_points(coords * size, np.random.default_rng(3), voxel_size=0.02 * size, elastic_p=1)
                    - data.augment_points(coords * size, np.random.default_rng(3), elastic_p=0) for size in (1, 4))
    assert small.std() > 0.05 and np.abs(large - 4 * small).max() < 1e-2 * np.abs(large).max()


def test_augmentation_changes_coords_and_colors_only(root):
    frames = ScanNetFrames(root, CLASSES)
    dataset = data.PointDataset(frames, 10_000, (28, 28), augment=True)
    plain = data.PointDataset(frames, 10_000, (28, 28))[1]
    for epoch in range(4):
        dataset.set_epoch(epoch)
        sample = dataset[1]
        assert not torch.equal(sample["coords"], plain["coords"])
        assert not torch.equal(sample["features"], plain["features"])
        for key in set(plain) - {"name", "seed", "coords", "features"}:
            assert torch.equal(sample[key], plain[key]), key
    assert torch.equal(plain["coords"], plain["points"])


@pytest.mark.parametrize("up", [*data.AXES, "0,-0.9,0.1", "1,2,-3", "0,0,-1", "0.01,0,-1"])
def test_up_rotation_takes_up_to_z_and_is_exact_for_axes(up):
    rotation = data.up_rotation(up)
    vector = data.AXES[up] if up in data.AXES else np.array(up.split(","), float)
    np.testing.assert_allclose(rotation @ vector, [0, 0, np.linalg.norm(vector)], atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    if up in data.AXES:
        assert set(np.abs(rotation).ravel()) == {0, 1} and (rotation @ vector == [0, 0, 1]).all()
    else:  # the smallest turn: what is square to both stays
        side = np.cross(vector, [0, 0, 1])
        assert not side.any() or np.allclose(rotation @ side, side)


@pytest.mark.parametrize("up", ["+y", "up", "", "1,2", "0,0,0", "nan,0,1", "inf,0,0"])
def test_what_is_no_direction_is_refused(up):
    with pytest.raises(ValueError, match="up must be one of z, -z, y, -y, x, -x, or a vector"):
        data.up_rotation(up)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("up", [*data.AXES, "1,2,-3"])
def test_a_turned_world_gives_the_same_samples(up, augment):
    frames = list(RoomFrames("train", 1, 2, size=(60, 80)))
    turn = np.eye(4)
    turn[:3, :3] = data.up_rotation(up)  # from the turned world to the one with z up
    turned_frames = [{**frame, "world2cam": frame["world2cam"] @ turn} for frame in frames]
    options = dict(num_points=1500, image_size=(32, 32), num_views=2, augment=augment)
    plain, turned = (data.PointDataset(source, **options) for source in (frames, data.upright(turned_frames, up)))
    close = dict(rtol=0, atol=0 if up in data.AXES else 1e-5)
    for epoch in range(3):  # with and without elastic augmentation
        plain.set_epoch(epoch)
        turned.set_epoch(epoch)
        expected, sample = plain[0], turned[0]
        assert sample.pop("name") == expected.pop("name") and sample.pop("seed") == expected.pop("seed")
        for key in expected:
            torch.testing.assert_close(sample[key], expected[key], **close)
    own = data.PointDataset(turned_frames, **options)
    own.set_epoch(epoch)
    back = sample["points"] @ torch.from_numpy(data.up_rotation(up)).float()  # to the world of the data
    torch.testing.assert_close(back, own[0]["points"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ frames


def test_colors_and_labels_come_from_the_pixel_that_the_point_projects_to(tmp_path):
    """ScanNet's own sizes: colour and labels 1296 x 968, depth 640 x 480, a camera matrix each."""
    size = (968, 1296)
    frames = ScanNetFrames(write_scannet(tmp_path, 1, 1, color_size=size, depth_size=(480, 640)), CLASSES)
    sample = data.PointDataset(frames, 20_000, (240, 320))[0]
    assert len(sample["points"]) == 20_000 and sample["depth"].shape == (1, 480, 640)
    uv, z = project(sample["points"], frames[0]["intrinsics"], frames[0]["world2cam"])
    u, v = np.rint(uv).astype(int).T
    away_from_ties = np.abs(uv - np.floor(uv) - 0.5).min(1) > 1e-2
    expected = np.stack([u * 255 // size[1], v * 255 // size[0], 0 * u], 1) / 255
    assert np.abs(expected - sample["features"].numpy())[away_from_ties].max() < 1e-6
    label = np.choose(u * 4 // size[1], [-1, 0, 1, 2])
    assert np.array_equal(label[away_from_ties], sample["labels"].numpy()[away_from_ties])
    instance = np.choose(v * 3 // size[0], [-1, 1, 2])
    assert np.array_equal(instance[away_from_ties], sample["instances"].numpy()[away_from_ties])
    uv_small, _ = project(sample["points"], sample["intrinsics"][0], frames[0]["world2cam"])
    assert np.abs((uv_small + 0.5) / (320, 240) - (uv + 0.5) / size[::-1]).max() * 320 < 1e-4


def test_points_outside_the_color_image_are_left_out(tmp_path):
    root = write_scannet(tmp_path, 1, 1)
    narrow = np.eye(4)
    narrow[:3, :3] = intrinsics_of((48, 64), focal=2.5)
    np.savetxt(root / "scene0000_00" / "intrinsic" / "intrinsic_color.txt", narrow)
    frames = ScanNetFrames(root, CLASSES)
    sample = data.PointDataset(frames, 10_000, (24, 32))[0]
    frame = frames[0]
    every = every_point(frame)
    uv, _ = project(every, frame["intrinsics"], frame["world2cam"])
    inside = ((uv > -0.5) & (uv < (63.5, 47.5))).all(1)
    assert 0 < inside.sum() < len(every) and len(sample["points"]) == inside.sum()
    assert np.array_equal(sample["points"].numpy(), every[inside])


def test_labels_may_have_the_size_of_the_depth(tmp_path):
    root = write_scannet(tmp_path, 1, 1)
    label = np.arange(24 * 32).reshape(24, 32) % 3
    Image.fromarray(label.astype(np.uint16)).save(root / "scene0000_00/label-filt/0.png")
    frames = ScanNetFrames(root, CLASSES)
    sample = data.PointDataset(frames, 10_000, (24, 32))[0]
    uv, _ = project(sample["points"], frames[0]["depth_intrinsics"], frames[0]["world2cam"])
    u, v = np.rint(uv).astype(int).T
    assert np.array_equal(sample["labels"], label[v, u] - 1)


def test_rooms_and_files_give_the_same_kind_of_sample(root):
    rooms = RoomFrames("train", 1, 2, size=(60, 80))
    samples = [data.PointDataset(frames, 500, (32, 32))[0] for frames in (rooms, ScanNetFrames(root, CLASSES))]
    assert samples[0].keys() == samples[1].keys()
    for key, value in samples[0].items():
        if key not in ("name", "seed"):
            assert value.dtype == samples[1][key].dtype and value.dim() == samples[1][key].dim(), key


# ----------------------------------------------------------------------------------------------------------- samples


def test_points_are_drawn_without_replacement_and_capped(root):
    frames = ScanNetFrames(root, CLASSES)
    every = data.PointDataset(frames, 10_000, (24, 32))[0]["points"]
    drawn = data.PointDataset(frames, 100, (24, 32))[0]["points"]
    assert len(every) < 10_000 and len(drawn) == 100 and len(drawn.unique(dim=0)) == 100
    assert {tuple(p) for p in drawn.tolist()} < {tuple(p) for p in every.tolist()}


def test_draw_depends_on_seed_epoch_and_index_alone(root):
    frames = ScanNetFrames(root, CLASSES)
    training, validation = (data.PointDataset(frames, 100, (24, 32), augment=augment) for augment in (True, False))
    first = training[2]["coords"], validation[2]["points"]
    for _ in range(3):
        training[0]
    assert torch.equal(training[2]["coords"], first[0])
    for dataset in (training, validation):
        dataset.set_epoch(1)
    assert not torch.equal(training[2]["coords"], first[0]) and torch.equal(validation[2]["points"], first[1])
    training.set_epoch(0)
    assert torch.equal(training[2]["coords"], first[0])
    other = data.PointDataset(frames, 100, (24, 32), augment=True, seed=1)
    assert not torch.equal(other[2]["coords"], first[0])


def test_any_number_of_workers_gives_the_same_samples_in_every_epoch(root):
    frames = ScanNetFrames(root, CLASSES)
    dataset = data.PointDataset(frames, 100, (24, 32), augment=True)
    loaders = [DataLoader(dataset, 2, num_workers=workers, collate_fn=data.collate, persistent_workers=workers > 0)
               for workers in (0, 2)]
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for alone, with_workers in zip(*loaders, strict=True):
            assert alone.keys() == with_workers.keys() and alone["name"] == with_workers["name"]
            assert all(torch.equal(alone[key], with_workers[key]) for key in alone if key not in ("name", "seed"))


def test_views_of_a_sample_are_consecutive_frames_of_one_scene(tmp_path):
    frames = ScanNetFrames(write_scannet(tmp_path, 2, 5), CLASSES)
    dataset = data.PointDataset(frames, 100_000, (24, 32), num_views=2)
    blue = [[int(round(view[2].mean().item() * 25.5)) for view in sample["images"]] for sample in dataset]
    assert blue == [[0, 1], [2, 3], [3, 4]] * 2  # the blue channel numbers the frames
    singles = data.PointDataset(frames, 100_000, (24, 32))
    assert torch.equal(dataset[1]["points"], torch.cat([singles[2]["points"], singles[3]["points"]]))
    assert dataset[1]["world2cam"].shape == (2, 4, 4) and dataset[1]["depth"].shape == (2, 24, 32)


def test_points_of_several_views_keep_the_color_of_their_own_view(tmp_path):
    frames = ScanNetFrames(write_scannet(tmp_path, 1, 4), CLASSES)
    dataset = data.PointDataset(frames, 300, (24, 32), num_views=4)
    sample, singles = dataset[0], data.PointDataset(frames, 100_000, (24, 32))
    pairs = [{(*p, *c) for p, c in zip(s["points"].tolist(), s["features"].tolist())} for s in (sample, *singles)]
    assert len(pairs[0]) == 300 and pairs[0] <= set.union(*pairs[1:])
    assert all(len(pairs[0] & single) > 30 for single in pairs[1:])


def test_without_color_all_points_are_white_and_images_stay(root):
    frames = ScanNetFrames(root, CLASSES)
    plain, white = (data.PointDataset(frames, 100, (24, 32), augment=True, color=color)[0] for color in (True, False))
    assert (white["features"] == 1).all() and torch.equal(white["images"], plain["images"])
    assert torch.equal(white["coords"], plain["coords"])


def test_collate_packs_ragged_points_and_says_whose_they_are(tmp_path):
    root = write_scannet(tmp_path, 1, 3)
    corner = np.pad(np.full((4, 5), 1500, np.uint16), ((0, 20), (0, 27)))
    Image.fromarray(corner).save(root / "scene0000_00/depth/1.png")
    dataset = data.PointDataset(ScanNetFrames(root, CLASSES), 200, (24, 32))
    samples = [dataset[i] for i in range(3)]
    batch = data.collate(samples)
    assert batch["batch"].bincount().tolist() == [len(s["points"]) for s in samples] and len(samples[1]["points"]) <= 20
    assert batch["name"] == [f"scene0000_00/{n}" for n in range(3)] and batch["images"].shape == (3, 1, 3, 24, 32)
    for i, sample in enumerate(samples):
        for key in ("points", "coords", "features", "labels", "instances"):
            assert torch.equal(batch[key][batch["batch"] == i], sample[key])
        assert torch.equal(batch["intrinsics"][i], sample["intrinsics"])
    with pytest.raises(ValueError, match="images differs in shape.*scene0000_00/1"):
        data.collate([samples[0], {**samples[1], "images": samples[1]["images"][..., :5]}])


@pytest.mark.parametrize("num_views", [1, 2])
def test_depth_images_of_different_sizes_share_a_batch_and_hide_the_same_points(tmp_path, num_views):
    """Padding is unknown depth: the occlusion test finds what it finds without it."""
    frames = [ScanNetFrames(write_scannet(tmp_path / str(size[0]), 1, 1, depth_size=size), CLASSES)[0]
              for size in ((24, 32), (12, 40), (30, 20), (6, 8))]
    frames = [{**frame, "name": f"scene{i // num_views}/{i}"} for i, frame in enumerate(frames)]
    samples = [data.PointDataset(frames, 10_000, (24, 32), num_views)[i] for i in range(len(frames) // num_views)]
    batch = data.collate(samples)
    assert batch["depth"].shape == (len(samples), num_views, 30, 40)
    shift = torch.tensor([0.03, 0.02, 0.3])  # off the surface, so that some points hide behind others
    hidden = 0
    for i, frame in enumerate(frames):
        b, v = divmod(i, num_views)
        depth = torch.from_numpy(frame["depth"])
        assert torch.equal(batch["depth"][b, v, :len(depth), :depth.shape[1]], depth)
        points = apply_transform(batch["points"][batch["batch"] == b], batch["world2cam"][b, v]) + shift
        uv, z = project_to_image(points, batch["depth_intrinsics"][b, v])
        view = torch.zeros(len(z), dtype=torch.int64)
        padded, alone = (occluded_mask(uv, z, image[None], view) for image in (batch["depth"][b, v], depth))
        assert torch.equal(padded, alone)
        hidden += alone.sum()
    assert hidden > 100


def test_views_of_different_image_sizes_share_a_sample_with_cameras_of_their_own(tmp_path):
    sizes = (48, 64), (30, 80), (90, 45)
    frames = [ScanNetFrames(write_scannet(tmp_path / str(size[0]), 1, 1, color_size=size), CLASSES)[0]
              for size in sizes]
    frames = [{**frame, "name": f"scene/{i}"} for i, frame in enumerate(frames)]
    sample = data.PointDataset(frames, 10_000, (24, 32), num_views=3)[0]
    assert sample["images"].shape == (3, 3, 24, 32)
    start = 0
    for view, (size, frame) in enumerate(zip(sizes, frames)):
        part = slice(start, start + len(data.PointDataset([frame], 10_000, (24, 32))[0]["points"]))
        start = part.stop
        uv, _ = project(sample["points"][part], frame["intrinsics"], frame["world2cam"])
        small, _ = project(sample["points"][part], sample["intrinsics"][view], frame["world2cam"])
        assert np.abs((small + 0.5) / (32, 24) - (uv + 0.5) / size[::-1]).max() * 32 < 1e-4
        u, v = np.rint(uv).astype(int).T
        away_from_ties = np.abs(uv - np.floor(uv) - 0.5).min(1) > 1e-2
        expected = np.stack([u * 255 // size[1], v * 255 // size[0], 0 * u], 1) / 255
        assert np.abs(expected - sample["features"][part].numpy())[away_from_ties].max() < 1e-6
    assert start == len(sample["points"])


def test_views_of_different_depth_sizes_share_no_superpoint(tmp_path):
    frames = [ScanNetFrames(write_scannet(tmp_path / str(size[0]), 1, 1, depth_size=size), CLASSES)[0]
              for size in ((24, 32), (6, 8), (12, 16))]
    frames = [{**frame, "name": f"scene/{i}"} for i, frame in enumerate(frames)]

    def single_pixels(depth, colors, intrinsics):
        return np.arange(depth.size).reshape(depth.shape)

    sample = data.PointDataset(frames, 10_000, (24, 32), num_views=3, superpoints=single_pixels)[0]
    assert len(sample["superpoints"].unique()) == len(sample["points"])


# ------------------------------------------------------------------------------------------------------------ source


def test_a_plain_list_of_frame_dicts_is_a_source(root):
    """What a notebook has: no names, no color(), no files(), no labels, lists of dicts alone."""
    frames = ScanNetFrames(root, CLASSES)
    plain = [{key: frame[key] for key in frame if key not in ("label", "instance")}
             for frame in (frames[i] for i in range(len(frames)))]
    options = dict(num_points=100, image_size=(24, 32), num_views=2, augment=True)
    expected, dataset = data.PointDataset(frames, **options), data.PointDataset(plain, **options)
    assert len(dataset) == len(expected) == 4
    for index in range(len(dataset)):
        sample = dataset[index]
        assert (sample.pop("labels") == -1).all() and (sample.pop("instances") == -1).all()
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(expected[index][key]))
                   for key, value in sample.items() if key != "name")
        assert sample["name"] == expected[index]["name"]
    assert np.array_equal(dataset.images_only[5], expected.images_only[5])


def test_frame_indices_name_the_views_of_a_sample(root):
    frames = ScanNetFrames(root, CLASSES)
    dataset = data.PointDataset(frames, 100, (24, 32), num_views=2)
    assert [dataset.frame_indices(index) for index in range(4)] == [[0, 1], [1, 2], [3, 4], [4, 5]]


class Counting:
    """A source that counts the frames that are read."""

    def __init__(self, frames):
        self.frames = frames
        self.reads = 0

    def __getattr__(self, name):
        return getattr(self.frames, name)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        self.reads += 1
        return self.frames[index]


def check(root, store, classes=CLASSES, rank=0, world_size=1, up="z", **options):
    """check_frames on a new dataset: labelled points, frames read."""
    frames = Counting(ScanNetFrames(root, classes))
    dataset = data.PointDataset(data.upright(frames, up), 50, (24, 32), **options)
    labelled, blank = data.check_frames(dataset, store, rank, world_size)
    assert blank == []
    return labelled, frames.reads


def test_a_second_start_on_unchanged_files_reads_no_frame(root, tmp_path):
    store = Store(tmp_path / "store", "checks")
    first = check(root, store)
    assert first[1] == 6 and 0 < first[0] < 300
    assert check(root, Store(tmp_path / "store", "checks")) == (first[0], 0)
    assert check(root, None) == first  # without a store every time
    shares = [check(root, store, rank=rank, world_size=4) for rank in range(4)]
    assert [reads for _, reads in shares] == [2, 2, 1, 1] and sum(labelled for labelled, _ in shares) == first[0]
    assert [check(root, store, rank=rank, world_size=4)[1] for rank in range(4)] == [0] * 4


@pytest.mark.parametrize("kind", ["color/1.png", "depth/1.png", "label-filt/1.png", "instance-filt/1.png", "pose/1.txt",
                                  "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"])
def test_a_file_that_changed_is_read_again(root, tmp_path, kind):
    store = Store(tmp_path / "store", "checks")
    check(root, store)
    path = root / "scene0001_00" / kind
    stat = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))  # same size, another time
    assert check(root, store)[1] == 6 and check(root, store)[1] == 0
    content = path.read_bytes() + b"\n"
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time, another size
    assert check(root, store)[1] == 6 and check(root, store)[1] == 0


def test_every_setting_that_a_sample_depends_on_has_it_read_again(root, tmp_path):
    store = Store(tmp_path / "store", "checks")
    check(root, store)
    other_classes = {**CLASSES, 2: "seat"}
    assert check(root, store, other_classes)[1] == 6
    for options in ({"num_views": 3}, {"augment": True}, {"seed": 1}, {"voxel_size": 0.1}, {"color": False},
                    {"images": False}, {"up": "y"}, {"superpoints": SuperpointCache(tmp_path, oversegment, "one")},
                    {"superpoints": SuperpointCache(tmp_path, oversegment, "two")}):
        assert check(root, store, **options)[1] == 6, options
        assert check(root, store, **options)[1] == 0, options
    for _ in range(2):  # superpoints that do not say what they depend on, and frames in memory: nothing to compare
        assert check(root, store, superpoints=oversegment)[1] == 6
        rooms = data.PointDataset(RoomFrames("train", 1, 1, size=(24, 32)), 50, (24, 32))
        assert data.check_frames(rooms, store)[0] > 0


def test_a_broken_file_ends_the_check_by_name_and_nothing_is_remembered(root, tmp_path):
    path = root / "scene0000_00/depth/2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    store = Store(tmp_path / "store", "checks")
    for _ in range(2):
        with pytest.raises(ValueError, match="depth.2.png: depth image cannot be decoded"):
            check(root, store)


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_named_by_the_check(root, label):
    class Relabelled(Counting):
        class_names = ["a", "b", "c"]

        def __getitem__(self, index):
            frame = super().__getitem__(index)
            return {**frame, "label": np.full_like(frame["label"], label)}

    dataset = data.PointDataset(Relabelled(ScanNetFrames(root, CLASSES)), 50, (24, 32))
    with pytest.raises(ValueError, match=f"scene0000_00/0: labels from {label} to {label}, expected -1 or .* 3 class"):
        data.check_frames(dataset)


def test_images_are_compared_again_when_their_decoder_changes(root, monkeypatch):
    images = data.PointDataset(ScanNetFrames(root, CLASSES), 50, (24, 32)).images_only
    before = images.signature([0])
    assert images.signature([0]) == before
    monkeypatch.setattr(data.codecs, "version", lambda name: "another")
    assert images.signature([0]) != before


def test_superpoints_are_computed_by_the_check(root, tmp_path):
    made = []

    def count(*frame):
        made.append(frame)
        return oversegment(*frame, count=20)

    store = Store(tmp_path, "checks")
    check(root, store, superpoints=SuperpointCache(tmp_path, count, "20"))
    assert len(made) == 6
    check(root, store, superpoints=SuperpointCache(tmp_path, count, "20"))
    assert len(made) == 6


class CountingColor(ScanNetFrames):
    """Frames that count the colour images read."""

    reads = 0

    def color(self, index):
        self.reads += 1
        return super().color(index)


def test_features_of_unchanged_files_are_found_without_reading_an_image(root, tmp_path):
    def build(size=(24, 32)):
        """Images encoded, images read."""
        frames = CountingColor(root, CLASSES)
        cache = FeatureCache(tmp_path / "cache", "stub", lambda x: (x[:, :, ::8, ::8], x.mean((2, 3))))
        return cache.build(data.PointDataset(frames, 100, size).images_only), frames.reads

    assert build() == (3, 6 + 3)  # both scenes hold the same images: read to be compared, then to be encoded
    assert build() == (0, 0)
    assert build((12, 16)) == (3, 6 + 3)  # images of another size are others
    assert build((12, 16)) == build() == (0, 0)
    Image.fromarray(np.full((48, 64, 3), 7, np.uint8)).save(root / "scene0001_00/color/1.png")
    assert build() == (1, 6 + 1)
    assert build() == (0, 0)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("change, message", [
    ({"name": "frame7"}, "name .scene/stem., got 'frame7'"),
    ({"color": np.zeros((48, 64, 3))}, r"scene/1: color has shape \(48, 64, 3\) of float64, expected .*uint8"),
    ({"color": np.zeros((48, 64), np.uint8)}, r"scene/1: color has shape \(48, 64\)"),
    ({"depth": np.ones((24, 32), np.uint16)}, "scene/1: depth has .* of uint16, expected .*floating-point meters"),
    ({"depth": None}, "scene/1: depth has NoneType, expected"),
    ({"world2cam": np.eye(3)}, r"scene/1: world2cam has shape \(3, 3\)"),
    ({"world2cam": np.full((4, 4), np.nan)}, "scene/1: world2cam .*finite"),
    ({"world2cam": np.eye(4)[:3]}, r"scene/1: world2cam has shape \(3, 4\)"),
    ({"world2cam": POSE.T}, r"scene/1: world2cam \(4, 4\) must have the last row \[0. 0. 0. 1.\].*transposed"),
    ({"world2cam": np.diag([1.0, 1, 1, 2])}, r"scene/1: world2cam \(4, 4\) must have the last row"),
    ({"world2cam": np.eye(4) + 2e4 * np.eye(4, k=3)}, r"scene/1: world2cam \(4, 4\) has a translation of 20000 m"),
    ({"depth_world2cam": np.eye(3)}, r"scene/1: depth_world2cam has shape \(3, 3\)"),
    ({"depth_world2cam": POSE.T}, r"scene/1: depth_world2cam \(4, 4\) must have the last row"),
    ({"intrinsics": intrinsics_of((48, 64)).T}, r"scene/1: intrinsics \(3, 3\) must have the last row"),
    ({"depth_intrinsics": intrinsics_of((24, 32)).T}, r"scene/1: depth_intrinsics \(3, 3\) must have the last row"),
    ({"intrinsics": np.eye(4)[:3]}, r"scene/1: intrinsics has shape \(3, 4\)"),
    ({"intrinsics": [[1]]}, "scene/1: intrinsics has list, expected"),
    ({"depth_intrinsics": np.eye(4)}, r"scene/1: depth_intrinsics has shape \(4, 4\)"),
    ({"label": np.zeros((5, 5), int)}, r"scene/1: label has shape \(5, 5\)"),
    ({"instance": np.zeros((48, 64))}, "scene/1: instance .*expected integers"),
    ({"label": [[0] * 64] * 48}, "scene/1: label has list, expected integers"),
    ({"features": [[[0.0]]]}, "scene/1: features has list, expected"),
    ({"depth": np.full((24, 32), 1e10)}, r"scene/1: depth \(24, 32\) has values above 10000 m")])
def test_a_frame_that_breaks_the_protocol_is_named_with_field_and_shape(tmp_path, change, message):
    frame = {**ScanNetFrames(write_scannet(tmp_path, 1, 1), CLASSES)[0], "name": "scene/1", **change}
    with pytest.raises(ValueError, match=message):
        data.PointDataset([frame], 100, (24, 32))[0]


def test_a_frame_without_any_depth_is_named(root):
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(root / "scene0000_00/depth/2.png")
    dataset = data.PointDataset(ScanNetFrames(root, CLASSES), 100, (24, 32))
    with pytest.raises(ValueError, match="no pixel with known depth in scene0000_00/2"):
        dataset[2]


@pytest.mark.parametrize("options, message", [
    *(({"image_size": size}, "image_size must be") for size in ((0, 224), (224,), (224, 224, 3), (-1, 5), (22.4, 224),
                                                                ("a", "b"))),
    ({"num_points": 0}, "num_points and num_views must be at least 1, got 0, 1"),
    ({"num_views": 0}, "num_points and num_views must be at least 1, got 10, 0"),
    ({"num_views": 4}, "scene0000_00 has 3 frames, fewer than num_views=4")])
def test_options_that_make_no_sample_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        data.PointDataset(ScanNetFrames(root, CLASSES), **{"num_points": 10, "image_size": (24, 32), **options})


# ------------------------------------------------------------------------------------------------------------- cache


def test_cached_samples_hold_the_features_of_their_images(root, tmp_path):
    def encode(images):
        return images[:, :, ::8, ::8], images.mean((2, 3))

    frames = ScanNetFrames(root, CLASSES)
    cache = FeatureCache(tmp_path / "cache", "every eighth pixel, 24x32", encode)
    assert cache.build(data.PointDataset(frames, 100, (24, 32)).images_only) == 3  # both scenes hold the same ones
    plain, cached = (data.PointDataset(frames, 100, (24, 32), num_views=3, augment=True, feature_cache=feature_cache)
                     for feature_cache in (None, cache))
    batches = [data.collate([dataset[0], dataset[1]]) for dataset in (plain, cached)]
    assert set(batches[1]) == set(batches[0]) - {"images"} | {"clip_tokens", "clip_pooled"}
    shared = set(batches[0]) & set(batches[1]) - {"name", "seed"}
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in shared)
    tokens, pooled = encode(batches[0]["images"].flatten(0, 1))
    assert torch.equal(batches[1]["clip_tokens"].flatten(0, 1), tokens.half())
    assert torch.equal(batches[1]["clip_pooled"].flatten(0, 1), pooled.half())


# ------------------------------------------------------------------------------------------------------- superpoints


def test_superpoints_are_numbered_through_the_batch_and_belong_to_one_view(tmp_path):
    frames = ScanNetFrames(write_scannet(tmp_path / "frames", 1, 4), CLASSES)
    options = dict(num_points=200, image_size=(24, 32), num_views=2)
    superpoints = partial(oversegment, count=20)
    dataset, plain = data.PointDataset(frames, **options, superpoints=superpoints), data.PointDataset(frames, **options)
    assert all(torch.equal(plain[0][key], dataset[0][key]) for key in plain[0] if key not in ("name", "seed"))
    batch = data.collate([dataset[0], dataset[1]], cell=0.1)
    ids, owner = batch["point_to_superpoint"], batch["superpoint_batch"]
    assert ids.unique().tolist() == list(range(len(owner))) and torch.equal(owner[ids], batch["batch"])
    assert ((owner.bincount() > 20) & (owner.bincount() <= 40)).all()
    view = (batch["features"][:, 2] * 25.5).round()  # the blue channel numbers the frames
    assert all(len(view[ids == i].unique()) == 1 for i in range(len(owner)))

    cubes = data.collate([plain[0], plain[1]], cell=0.1)  # stand in for superpoints that samples do not have
    cube = torch.cat([cubes["batch"][:, None], (cubes["points"] / 0.1).floor().long()], 1)
    rows = torch.cat([cube, cubes["point_to_superpoint"][:, None]], 1).unique(dim=0)
    assert len(rows) == len(cube.unique(dim=0)) == len(cubes["superpoint_batch"])
    assert "superpoint_batch" not in data.collate([plain[0]])
    with pytest.raises(ValueError, match=r"\(N,\) or \(N, 3\)"):
        data.superpoint_index(torch.zeros(4), torch.zeros(4, dtype=torch.long))


def test_superpoints_of_color_and_depth_of_different_size_follow_the_color(tmp_path):
    """Four columns of colour on a flat wall, seen at twice the depth's resolution: no superpoint spans two of them."""
    root = write_scannet(tmp_path / "frames", 1, 1)
    row, column = np.mgrid[:48, :64]
    color = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]], np.uint8)[column // 16]
    Image.fromarray(color).save(root / "scene0000_00/color/0.png")
    Image.fromarray(np.full((24, 32), 2000, np.uint16)).save(root / "scene0000_00/depth/0.png")
    frames = ScanNetFrames(root, CLASSES)
    sample = data.PointDataset(frames, 10_000, (24, 32), superpoints=partial(oversegment, count=16))[0]
    assert sample["superpoints"].max() == 15
    for i in range(16):
        assert len(sample["labels"][sample["superpoints"] == i].unique()) == 1  # labels are the same four columns


# ------------------------------------------------------------------------------------------------------------- scans


@pytest.fixture
def scene_dataset(tmp_path):
    """A scan whose vertices are the first frame's own points, with the colours of the pixels they came from."""
    root = write_scannet(tmp_path / "frames", 1, 5)
    frames = ScanNetFrames(root, None)
    points = data.PointDataset(frames, 10_000, (24, 32))[0]
    segments = (np.arange(len(points["points"])) // 7 * 3).tolist()
    write_scan(tmp_path / "scans", "scene0000_00", points["points"].numpy(), (points["features"] * 255).round().numpy(),
               np.where(np.arange(len(segments)) < 70, 5, 1), segments, [(4, "chair", segments[:70:7])])
    scenes = ScanNetScenes(tmp_path / "scans", {1: "wall", 5: "chair"})
    defaults = {"num_points": 200, "image_size": (24, 32), "num_views": 3}
    return lambda **options: data.SceneDataset(scenes, frames, **{**defaults, **options})


def test_vertices_of_a_scan_project_to_the_pixels_that_they_came_from(scene_dataset):
    for augment in (False, True):
        sample = scene_dataset(augment=augment, image_size=(48, 64))[0]
        uv, _ = project(sample["points"], sample["intrinsics"][0], sample["world2cam"][0].double().numpy())
        u, v = np.rint(uv).astype(int).T
        colors = sample["images"][0][:2, v, u].T
        expected = torch.tensor(np.stack([u * 255 // 64, v * 255 // 48], 1) / 255)
        away_from_ties = torch.tensor(np.abs(uv - np.floor(uv) - 0.5).min(1) > 1e-2)
        assert len(u) == 200 and torch.allclose(colors.double(), expected, atol=1e-6)
        if not augment:
            assert (sample["features"][:, :2] - colors)[away_from_ties].abs().max() < 1e-6


def test_scans_are_aligned_for_the_encoder_and_not_for_the_camera(scene_dataset):
    sample = scene_dataset()[0]
    aligned = sample["points"].double().numpy() @ ALIGNMENT[:3, :3].T + ALIGNMENT[:3, 3]
    assert np.abs(sample["coords"].numpy() - aligned).max() < 1e-5
    assert np.allclose(sample["world2cam"][1].numpy(), np.linalg.inv(POSE), atol=1e-6)


def test_a_scan_is_turned_to_z_up_after_its_alignment(scene_dataset):
    plain, rotation = scene_dataset(), data.up_rotation("-y")
    scenes, frames = (data.upright(source, "-y") for source in (plain.scenes, plain.frames))
    turned = data.SceneDataset(scenes, frames, 200, (24, 32), num_views=3)[0]
    for key in ("points", "coords"):
        expected = plain[0][key].double().numpy() @ rotation.T
        np.testing.assert_allclose(turned[key], expected, atol=1e-5)
    before, after = (project(sample["points"], sample["intrinsics"][0], sample["world2cam"][0].double().numpy())[0]
                     for sample in (plain[0], turned))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_views_of_a_scan_are_spread_and_drawn_anew_in_training(scene_dataset):
    def views(dataset):
        return [int(round(view[2].mean().item() * 25.5)) for view in dataset[0]["images"]]

    assert views(scene_dataset()) == [0, 2, 4] and views(scene_dataset(num_views=5)) == [0, 1, 2, 3, 4]
    training, drawn = scene_dataset(augment=True), set()
    for epoch in range(12):
        training.set_epoch(epoch)
        drawn.add(tuple(views(training)))
        assert views(training) == sorted(set(views(training)))
    assert len(drawn) > 3
    with pytest.raises(ValueError, match="5 frames, fewer than num_views=6"):
        scene_dataset(num_views=6)


def test_scans_and_frames_share_one_collate(scene_dataset):
    sample = scene_dataset(num_points=10_000)[0]
    assert sample["labels"].unique().tolist() == [0, 1] and sample["instances"].unique().tolist() == [-1, 4]
    assert ((sample["instances"] == 4) == (sample["labels"] == 1)).all()
    assert (sample["superpoints"] == torch.arange(len(sample["points"])) // 7).all()
    batch = data.collate([sample, scene_dataset()[0]])
    assert batch["batch"].bincount().tolist() == [len(sample["points"]), 200] and batch["images"].shape[:2] == (2, 3)
    frame = data.PointDataset(scene_dataset().frames, 10, (24, 32), superpoints=oversegment)[0]
    assert {k: (v.dtype, v.dim()) for k, v in frame.items() if k not in ("name", "seed")} == {
        k: (v.dtype, v.dim()) for k, v in sample.items() if k not in ("name", "seed")}


def test_a_scan_may_have_labels_without_instances(scene_dataset):
    dataset = scene_dataset()
    dataset.scenes = [{key: value for key, value in dataset.scenes[0].items() if key != "instances"}]
    sample = dataset[0]
    assert (sample["labels"] >= 0).any() and (sample["instances"] == -1).all()


def test_the_check_of_scans_reads_every_frame(scene_dataset):
    plain = scene_dataset()
    frames = Counting(plain.frames)
    dataset = data.SceneDataset(plain.scenes, frames, 200, (24, 32), num_views=1, augment=True)
    assert data.check_frames(dataset)[0] > 0 and frames.reads > len(frames) == 5


def test_a_scan_without_frames_is_named(scene_dataset, tmp_path):
    dataset = scene_dataset()
    dataset.scenes.names = ["scene0707_00"]
    with pytest.raises(ValueError, match="scan scene0707_00 has no frame"):
        data.SceneDataset(dataset.scenes, dataset.frames, 10, (24, 32))
