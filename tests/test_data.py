# SPDX-License-Identifier: MIT
"""data.py: pixels and points line up, and samples depend on seed, epoch and index alone."""
import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from fusion import apply_transform, occluded_mask, project_to_image
from helpers import CLASSES, POSE, intrinsics_of, write_scannet
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames, ScanNetScenes
from superpoints import oversegment
from support.cache import FeatureCache, Store, SuperpointCache
from test_scannet import ALIGNMENT, write_scan


@pytest.fixture
def frames(tmp_path):
    return ScanNetFrames(write_scannet(tmp_path / "frames"), CLASSES)


def rng(seed=0):
    return np.random.default_rng(seed)


def samples_of(frames, num_points=10_000, image_size=(24, 32), **options):
    return data.PointDataset(frames, num_points, image_size, **options)


def differing(one, other):
    """The fields in which two samples or batches differ."""
    assert one.keys() == other.keys()
    return {key for key, value in one.items()
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))}


def unnamed(sample):
    return {key: value for key, value in sample.items() if key not in ("name", "seed")}


def project(points, intrinsics, world2cam):
    """An independent pinhole camera: points (n, 3) -> (u, v) (n, 2) and depth (n,), in float64."""
    camera = np.asarray(points, np.float64) @ world2cam[:3, :3].T + world2cam[:3, 3]
    image = camera @ np.asarray(intrinsics, np.float64).T
    return image[:, :2] / image[:, 2:], camera[:, 2]


def every_point(frame):
    """The points (n, 3) float32 of all pixels of known depth."""
    v, u = frame["depth"].nonzero()
    pixels = np.stack([u, v], 1)
    points = data.unproject(pixels, frame["depth"][v, u], frame["depth_intrinsics"], frame["world2cam"])
    return points.astype(np.float32)


# ---------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("new_size", [(224, 224), (480, 640), (37, 51), (968, 1296)])
def test_a_pixel_comes_back_to_its_place_through_crop_and_resize(new_size):
    size, top, left, cropped = (480, 640), 21, 34, (420, 590)
    depth = rng().uniform(0.5, 4, size).ravel()
    intrinsics, world2cam = intrinsics_of(size), np.linalg.inv(POSE)
    v, u = np.mgrid[:size[0], :size[1]].reshape(2, -1)
    points = data.unproject(np.stack([u, v], 1), depth, intrinsics, world2cam)
    camera = data.resize_intrinsics(data.crop_intrinsics(intrinsics, top, left), cropped, new_size)
    uv, z = project(points, camera, world2cam)
    # an image covers [-0.5, W - 0.5]: the same share of the covered range before and after
    expected = (np.stack([u - left, v - top], 1) + 0.5) / cropped[::-1] * new_size[::-1] - 0.5
    assert np.abs(uv - expected).max() < 1e-9 and np.abs(z - depth).max() < 1e-9


@pytest.mark.parametrize("scale, new_size", [(1, (56, 42)), (10, (37, 51)), (1, (96, 200))])
def test_resized_image_and_resized_intrinsics_move_together(scale, new_size):
    """The center of mass of a blob in the resized image is where the resized camera sees its point."""
    size, u, v = (96 * scale, 128 * scale), 70.7 * scale, 40.3 * scale
    row, column = np.mgrid[:size[0], :size[1]]
    blob = np.exp(-((row - v) ** 2 + (column - u) ** 2) / (2 * (6 * scale) ** 2))
    color = np.repeat((255 * blob[..., None]).round(), 3, 2).astype(np.uint8)
    image = data.resize_image(color, new_size)[..., 0]
    intrinsics, world2cam = intrinsics_of(size), np.linalg.inv(POSE)
    point = data.unproject(np.array([[u, v]]), [2.0], intrinsics, world2cam)
    uv, _ = project(point, data.resize_intrinsics(intrinsics, size, new_size), world2cam)
    mass = image / image.sum(dtype=float)
    row, column = np.mgrid[:new_size[0], :new_size[1]]
    center = (mass * column).sum(), (mass * row).sum()
    assert np.abs(center - uv[0]).max() < 0.05


def test_frames_of_one_scene_meet_in_the_world(shared):
    """Real frames: one frame's points, projected into another, find its depth to millimeters."""
    source = ScanNetFrames(shared / "data/ycbv", shared / "data/ycbv/classes.txt")
    for scene in ("scene0000_00", "scene0001_00"):
        first, second = (source[source.names.index(f"{scene}/{n}")] for n in (1, 2))
        uv, z = project(every_point(first), second["depth_intrinsics"], second["world2cam"])
        u, v = np.rint(uv).astype(int).T
        inside = (u >= 0) & (u < 640) & (v >= 0) & (v < 480)
        seen = second["depth"][v[inside], u[inside]]
        assert np.median(np.abs(seen - z[inside])[seen > 0]) < 0.0025


@pytest.mark.parametrize("up", [*data.AXES, "0,-0.9,0.1", "1,2,-3", "0,0,-1", "0.01,0,-1"])
def test_up_rotation_takes_up_to_z_and_is_exact_for_axes(up):
    rotation = data.up_rotation(up)
    vector = data.AXES[up] if up in data.AXES else np.array(up.split(","), float)
    np.testing.assert_allclose(rotation @ vector, [0, 0, np.linalg.norm(vector)], atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    if up in data.AXES:
        assert set(np.abs(rotation).ravel()) == {0, 1} and (rotation @ vector == [0, 0, 1]).all()
    else:  # the smallest turn: what is perpendicular to both stays
        side = np.cross(vector, [0, 0, 1])
        assert not side.any() or np.allclose(rotation @ side, side)


@pytest.mark.parametrize("up", ["+y", "up", "", "1,2", "0,0,0", "nan,0,1", "inf,0,0"])
def test_what_is_no_direction_is_refused(up):
    with pytest.raises(ValueError, match="up must be one of z, -z, y, -y, x, -x, or a vector"):
        data.up_rotation(up)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("up", [*data.AXES, "1,2,-3"])
def test_a_turned_world_gives_the_same_samples(up, augment):
    plain = list(RoomFrames("train", 1, 2, size=(60, 80)))
    turn = np.eye(4)
    turn[:3, :3] = data.up_rotation(up)  # from the turned world to the one with z up
    turned = [{**frame, "world2cam": frame["world2cam"] @ turn} for frame in plain]
    options = dict(num_points=1500, num_views=2, augment=augment)
    sets = [samples_of(source, **options) for source in (plain, data.upright(turned, up), turned)]
    tolerance = 0 if up in data.AXES else 1e-5
    for epoch in range(3):  # with and without elastic augmentation
        for dataset in sets:
            dataset.set_epoch(epoch)
        expected, sample, own = (unnamed(dataset[0]) for dataset in sets)
        for key, value in expected.items():
            torch.testing.assert_close(sample[key], value, rtol=0, atol=tolerance)
        back = sample["points"] @ torch.from_numpy(data.up_rotation(up)).float()
        torch.testing.assert_close(back, own["points"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- augmentation


def test_augmentation_without_elastic_is_a_similarity():
    coords = rng(1).normal(size=(200, 3)).astype(np.float32) + 5
    pairs = np.triu_indices(200, 1)
    for seed in range(20):
        moved = data.augment_points(coords, rng(seed), elastic_p=0)
        before, after = (np.linalg.norm(c[:, None] - c[None], axis=2)[pairs] for c in (coords, moved))
        ratio = after / before
        assert ratio.max() - ratio.min() < 1e-3 and 0.79 < ratio.mean() < 1.21
        assert np.corrcoef(moved[:, 2], coords[:, 2])[0, 1] > 0.9999  # up stays up


@pytest.mark.parametrize("granularity, magnitude", [(0.12, 0.8), (0.4, 3.2)])
def test_elastic_is_bounded_and_smooth(granularity, magnitude):
    coords = rng(2).uniform(0, 3, (5000, 3)).astype(np.float32)
    near = coords + np.float32(1e-3)
    shift, shift_near = (data.elastic(c, rng(3), granularity, magnitude) - c for c in (coords, near))
    assert 0.03 * magnitude < shift.std() < 0.3 * magnitude and np.abs(shift).max() <= 3 * magnitude
    # neighboring nodes of a blurred grid, 2 * granularity apart, differ by far less than the noise itself
    assert np.abs(shift_near - shift).max() < 1e-3 * 3 * 3 * magnitude / (2 * granularity)


def test_elastic_is_counted_in_voxels_and_takes_any_finite_points():
    coords = rng().uniform(0, 2, (2000, 3)).astype(np.float32)
    shifts = []
    for size in (1, 4):
        elastic, rigid = (data.augment_points(coords * size, rng(3), 0.02 * size, p) for p in (1, 0))
        shifts.append(elastic - rigid)
    small, large = shifts
    assert small.std() > 0.05 and np.abs(large - 4 * small).max() < 1e-2 * np.abs(large).max()
    assert np.isfinite(data.augment_points(coords[:1], rng(), elastic_p=1)).all()
    for bad in (coords[:0], coords[:, :2], coords * np.float32(np.nan)):
        with pytest.raises(ValueError, match="coords"):
            data.elastic(bad, rng(), 0.1, 0.1)


def test_color_jitter_stays_in_range_and_keeps_its_input():
    colors = rng().random((1000, 3)).astype(np.float32)
    before = colors.copy()
    jittered = data.jitter_colors(colors, rng(1))
    assert np.array_equal(colors, before) and not np.array_equal(jittered, colors)
    assert jittered.min() >= 0 and jittered.max() <= 1 and jittered.dtype == np.float32


def test_augmentation_changes_coords_and_colors_only(frames):
    plain = samples_of(frames)[1]
    assert torch.equal(plain["coords"], plain["points"])
    for color in (True, False):  # without color all points are white
        dataset = samples_of(frames, augment=True, color=color)
        for epoch in range(4):
            dataset.set_epoch(epoch)
            assert differing(unnamed(dataset[1]), unnamed(plain)) == {"coords", "features"}
            assert color or (dataset[1]["features"] == 1).all()


# ---------------------------------------------------------------------------------------------- frames


def check_fields(part, frame, size, image_size, intrinsics):
    """Points have the color, label and instance of the pixel of `write_scannet` that they project to."""
    height, width = size
    uv, _ = project(part["points"], frame["intrinsics"], frame["world2cam"])
    u, v = np.rint(uv).astype(int).T
    away_from_ties = np.abs(uv - np.floor(uv) - 0.5).min(1) > 1e-2
    color = np.stack([u * 255 // width, v * 255 // height, 0 * u], 1) / 255
    label = np.choose(u * 4 // width, [-1, 0, 1, 2])
    instance = np.choose(v * 3 // height, [-1, 1, 2])
    for key, expected in (("features", color), ("labels", label), ("instances", instance)):
        assert np.abs(expected - part[key].numpy())[away_from_ties].max() < 1e-6, key
    small, _ = project(part["points"], intrinsics, frame["world2cam"])
    share = (small + 0.5) / image_size[::-1] - (uv + 0.5) / size[::-1]
    assert np.abs(share).max() * image_size[1] < 1e-4


def test_views_of_any_size_share_a_sample_whose_fields_come_from_the_pixel_that_a_point_projects_to(tmp_path):
    """Color and labels of one size, depth of another, a camera matrix each; no two views share a superpoint."""
    def single_pixels(depth, colors, intrinsics):
        return np.arange(depth.size).reshape(depth.shape)

    color_sizes, depth_sizes = ((48, 64), (30, 80), (90, 45)), ((24, 32), (6, 8), (12, 16))
    frames = []
    for i, sizes in enumerate(zip(color_sizes, depth_sizes)):
        root = write_scannet(tmp_path / str(i), 1, 1, *sizes)
        frames.append({**ScanNetFrames(root, CLASSES)[0], "name": f"scene/{i}"})
    sample = samples_of(frames, num_views=3, superpoints=single_pixels)[0]
    assert sample["images"].shape == (3, 3, 24, 32)
    counts = [len(samples_of([frame])[0]["points"]) for frame in frames]
    assert len(sample["superpoints"].unique()) == len(sample["points"]) == sum(counts)
    per_point = {key: sample[key].split(counts) for key in ("points", "features", "labels", "instances")}
    for view, frame in enumerate(frames):
        part = {key: parts[view] for key, parts in per_point.items()}
        check_fields(part, frame, color_sizes[view], (24, 32), sample["intrinsics"][view])


def test_points_outside_the_color_image_and_of_unknown_depth_are_left_out(frames):
    frame = frames[0]
    narrow = {**frame, "intrinsics": intrinsics_of((48, 64), focal=2.5)}
    every = every_point(frame)
    uv, _ = project(every, narrow["intrinsics"], frame["world2cam"])
    inside = ((uv > -0.5) & (uv < (63.5, 47.5))).all(1)
    assert 0 < inside.sum() < len(every)
    assert np.array_equal(samples_of([narrow])[0]["points"], every[inside])

    depth = np.zeros_like(frame["depth"])
    depth[0, :5] = np.inf, np.nan, -1, 2, 0
    sample = samples_of([{**frame, "depth": depth}])[0]
    assert len(sample["points"]) == 1 and sample["depth"].isfinite().all()


def test_labels_may_have_the_size_of_the_depth(frames):
    frame = {**frames[0], "label": np.arange(24 * 32).reshape(24, 32) % 3 - 1}
    sample = samples_of([frame])[0]
    uv, _ = project(sample["points"], frame["depth_intrinsics"], frame["world2cam"])
    u, v = np.rint(uv).astype(int).T
    assert np.array_equal(sample["labels"], frame["label"][v, u])


def test_a_depth_camera_may_have_a_pose_of_its_own():
    """The points are the depth camera's; their colors are seen by the other one, which a wall may hide."""
    pose = np.eye(4)
    pose[0, 3] = 0.5  # the depth camera stands to the left of the color camera
    depth = np.full((24, 32), 4.0, np.float32)
    depth[:, 16:] = 1.0  # a wall in the right half
    intrinsics = intrinsics_of((24, 32))
    color = np.stack([np.tile(np.arange(32), (24, 1))] * 3, 2).astype(np.uint8)
    frame = {"name": "scene/0", "color": color, "depth": depth, "intrinsics": intrinsics, "world2cam": np.eye(4),
             "depth_intrinsics": intrinsics, "depth_world2cam": pose}
    sample = samples_of([frame])[0]
    own = every_point({**frame, "world2cam": pose})
    uv, z = project(own, intrinsics, np.eye(4))
    u, v = np.rint(uv).astype(int).T
    inside = (u >= 0) & (u < 32) & (v >= 0) & (v < 24)
    nearest = {}
    for pixel, distance in zip(zip(u, v), z):
        nearest[pixel] = min(distance, nearest.get(pixel, np.inf))
    hidden = np.array([distance > nearest[pixel] + 0.05 for pixel, distance in zip(zip(u, v), z)])
    assert (inside & hidden).any()
    kept = inside & ~hidden
    np.testing.assert_allclose(sample["points"], own[kept], atol=1e-6)
    np.testing.assert_allclose(sample["features"][:, 0] * 255, u[kept], atol=1e-4)
    batch = data.collate([sample])
    assert torch.equal(batch["depth_world2cam"][0, 0], torch.from_numpy(pose).float())
    same = data.collate([samples_of([{**frame, "depth_world2cam": np.eye(4)}])[0]])
    assert "depth_world2cam" not in same  # one projection serves both images


# ---------------------------------------------------------------------------------------------- samples


def test_draws_are_without_replacement_and_depend_on_seed_epoch_and_index_alone(frames):
    every = samples_of(frames)[2]["points"]
    training, validation = (samples_of(frames, 100, augment=augment) for augment in (True, False))
    first = training[2]["coords"], validation[2]["points"]
    assert len(every) < 10_000 and len(first[1]) == len(first[1].unique(dim=0)) == 100
    assert set(map(tuple, first[1].tolist())) < set(map(tuple, every.tolist()))
    for _ in range(3):
        training[0]
    assert torch.equal(training[2]["coords"], first[0])
    for dataset in (training, validation):
        dataset.set_epoch(1)
    assert not torch.equal(training[2]["coords"], first[0]) and torch.equal(validation[2]["points"], first[1])
    training.set_epoch(0)
    assert torch.equal(training[2]["coords"], first[0])
    assert not torch.equal(samples_of(frames, 100, augment=True, seed=1)[2]["coords"], first[0])


def test_any_number_of_workers_gives_the_same_samples_in_every_epoch(frames):
    dataset = samples_of(frames, 100, augment=True)
    loaders = [DataLoader(dataset, 2, num_workers=workers, collate_fn=data.collate,
                          persistent_workers=workers > 0) for workers in (0, 2)]
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for alone, with_workers in zip(*loaders, strict=True):
            assert alone["name"] == with_workers["name"]
            assert not differing(unnamed(alone), unnamed(with_workers))


def frame_numbers(images):
    """The frames of `write_scannet` that images (V, 3, H, W) show: the blue channel tells."""
    return [round(view[2].mean().item() * 25.5) for view in images]


def test_views_of_a_sample_are_consecutive_frames_of_one_scene(tmp_path):
    frames = ScanNetFrames(write_scannet(tmp_path, 2, 5), CLASSES)
    dataset, singles = samples_of(frames, num_views=2), samples_of(frames)
    assert [frame_numbers(sample["images"]) for sample in dataset] == [[0, 1], [2, 3], [3, 4]] * 2
    assert [dataset.frame_indices(index) for index in range(3)] == [[0, 1], [2, 3], [3, 4]]
    assert dataset[1]["world2cam"].shape == (2, 4, 4) and dataset[1]["depth"].shape == (2, 24, 32)
    for key in ("points", "features", "labels"):
        assert torch.equal(dataset[1][key], torch.cat([singles[2][key], singles[3][key]]))

    def colored_points(sample):
        return set(map(tuple, torch.cat([sample["points"], sample["features"]], 1).tolist()))

    drawn = colored_points(samples_of(frames, 300, num_views=4)[0])
    parts = [colored_points(singles[i]) for i in range(4)]
    assert len(drawn) == 300 and drawn <= set.union(*parts)
    assert all(len(drawn & part) > 30 for part in parts)


def test_collate_packs_ragged_points_and_says_whose_they_are(frames):
    sources = list(frames)[:3]
    corner = np.pad(np.full((4, 5), 1.5, np.float32), ((0, 20), (0, 27)))
    sources[1] = {**sources[1], "depth": corner}
    samples = list(samples_of(sources, 200))
    batch = data.collate(samples)
    assert batch["batch"].bincount().tolist() == [len(s["points"]) for s in samples]
    assert len(samples[1]["points"]) <= 20 and batch["images"].shape == (3, 1, 3, 24, 32)
    assert batch["name"] == [f"scene0000_00/{n}" for n in range(3)]
    for i, sample in enumerate(samples):
        for key in ("points", "coords", "features", "labels", "instances"):
            assert torch.equal(batch[key][batch["batch"] == i], sample[key])
        assert torch.equal(batch["intrinsics"][i], sample["intrinsics"])
    with pytest.raises(ValueError, match="images differs in shape.*scene0000_00/1"):
        data.collate([samples[0], {**samples[1], "images": samples[1]["images"][..., :5]}])


@pytest.mark.parametrize("num_views", [1, 2])
def test_depth_images_of_different_sizes_share_a_batch_and_hide_the_same_points(tmp_path, num_views):
    """Padding is unknown depth: the occlusion test finds what it finds without it."""
    frames = []
    for i, size in enumerate([(24, 32), (12, 40), (30, 20), (6, 8)]):
        frame = ScanNetFrames(write_scannet(tmp_path / str(i), 1, 1, depth_size=size), CLASSES)[0]
        frames.append({**frame, "name": f"scene{i // num_views}/{i}"})
    batch = data.collate(list(samples_of(frames, num_views=num_views)))
    assert batch["depth"].shape == (4 // num_views, num_views, 30, 40)
    shift = torch.tensor([0.03, 0.02, 0.3])  # off the surface, so that some points hide behind others
    hidden = 0
    for i, frame in enumerate(frames):
        b, v = divmod(i, num_views)
        padded, own = batch["depth"][b, v], torch.from_numpy(frame["depth"])
        assert torch.equal(padded[:own.shape[0], :own.shape[1]], own)
        points = apply_transform(batch["points"][batch["batch"] == b], batch["world2cam"][b, v]) + shift
        uv, z = project_to_image(points, batch["depth_intrinsics"][b, v])
        view = torch.zeros(len(z), dtype=torch.int64)
        masks = [occluded_mask(uv, z, image[None], view) for image in (padded, own)]
        assert torch.equal(*masks)
        hidden += masks[0].sum()
    assert hidden > 100


def test_superpoints_are_numbered_through_the_batch_and_belong_to_one_view(tmp_path):
    frames = ScanNetFrames(write_scannet(tmp_path, 1, 4), CLASSES)
    plain = samples_of(frames, 200, num_views=2)
    dataset = samples_of(frames, 200, num_views=2, superpoints=partial(oversegment, count=20))
    assert dataset[0].keys() - plain[0].keys() == {"superpoints"}
    assert not differing(unnamed(plain[0]), {key: dataset[0][key] for key in unnamed(plain[0])})
    batch = data.collate(list(dataset), cell=0.1)
    ids, owner = batch["point_to_superpoint"], batch["superpoint_batch"]
    assert ids.unique().tolist() == list(range(len(owner))) and torch.equal(owner[ids], batch["batch"])
    assert ((owner.bincount() > 20) & (owner.bincount() <= 40)).all()
    view = (batch["features"][:, 2] * 25.5).round()  # the blue channel numbers the frames
    assert all(len(view[ids == i].unique()) == 1 for i in range(len(owner)))

    cubes = data.collate(list(plain), cell=0.1)  # stand in for superpoints that samples do not have
    cube = torch.cat([cubes["batch"][:, None], (cubes["points"] / 0.1).floor().long()], 1)
    rows = torch.cat([cube, cubes["point_to_superpoint"][:, None]], 1).unique(dim=0)
    assert len(rows) == len(cube.unique(dim=0)) == len(cubes["superpoint_batch"])
    assert "superpoint_batch" not in data.collate(list(plain))


def test_superpoints_of_color_and_depth_of_different_size_follow_the_color(frames):
    """Four columns of color on a flat wall, seen at twice the depth's resolution: none spans two of them."""
    column = np.arange(64)[None].repeat(48, 0)
    color = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]], np.uint8)[column // 16]
    frame = {**frames[0], "color": color, "depth": np.full((24, 32), 2.0, np.float32)}
    sample = samples_of([frame], superpoints=partial(oversegment, count=16))[0]
    assert sample["superpoints"].unique().tolist() == list(range(16))
    for i in range(16):
        assert len(sample["labels"][sample["superpoints"] == i].unique()) == 1  # the same four columns


def test_cached_samples_hold_the_features_of_their_images(frames, tmp_path):
    def encode(images):
        return images[:, :, ::8, ::8], images.mean((2, 3))

    cache = FeatureCache(tmp_path / "cache", "every eighth pixel, 24x32", encode)
    assert cache.build(samples_of(frames).images_only) == 3  # both scenes hold the same ones
    options = dict(num_points=100, num_views=3, augment=True)
    plain, cached = (data.collate(list(samples_of(frames, **options, feature_cache=given)))
                     for given in (None, cache))
    images, features = plain.pop("images"), [cached.pop(key) for key in ("clip_tokens", "clip_pooled")]
    assert not differing(unnamed(plain), unnamed(cached))
    for found, expected in zip(features, encode(images.flatten(0, 1))):
        assert torch.equal(found.flatten(0, 1), expected.half())


# ---------------------------------------------------------------------------------------------- sources


def test_a_plain_list_of_frame_dicts_is_a_source(frames):
    """What a notebook has: no names, no color(), no files(), no labels, lists of dicts alone."""
    plain = [{key: frame[key] for key in frame if key not in ("label", "instance")} for frame in frames]
    options = dict(num_points=100, num_views=2, augment=True)
    expected, dataset = samples_of(frames, **options), samples_of(plain, **options)
    for index in range(4):
        sample = dataset[index]
        assert sample["name"] == expected[index]["name"] and (sample["labels"] == -1).all()
        assert differing(unnamed(sample), unnamed(expected[index])) == {"labels", "instances"}
    assert np.array_equal(dataset.images_only[5], expected.images_only[5])
    room = samples_of(RoomFrames("train", 1, 1, size=(60, 80)))[0]  # built-in rooms give the same kind of sample
    assert {key: (value.dtype, value.dim()) for key, value in unnamed(room).items()} == {
        key: (value.dtype, value.dim()) for key, value in unnamed(expected[0]).items()}


class Counting:
    """A source that counts the frames and the color images that are read."""

    def __init__(self, frames):
        self.frames = frames
        self.reads = self.images = 0

    def __getattr__(self, name):
        return getattr(self.frames, name)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        self.reads += 1
        return self.frames[index]

    def color(self, index):
        self.images += 1
        return self.frames.color(index)


def check(root, store, classes=CLASSES, rank=0, world_size=1, up="z", **options):
    """check_frames on a new dataset: labeled points, frames read."""
    frames = Counting(ScanNetFrames(root, classes))
    dataset = samples_of(data.upright(frames, up), 50, **options)
    labeled, blank = data.check_frames(dataset, store, rank, world_size)
    assert blank == []
    return labeled, frames.reads


def test_a_second_start_on_unchanged_files_reads_no_frame(frames, tmp_path):
    root, store = frames.root, Store(tmp_path / "store", "checks")
    labeled, reads = check(root, store)
    assert reads == 6 and 0 < labeled < 300
    assert check(root, Store(tmp_path / "store", "checks")) == (labeled, 0)
    assert check(root, None) == (labeled, 6)  # without a store every time
    shares = [check(root, store, rank=rank, world_size=4) for rank in range(4)]
    assert [reads for _, reads in shares] == [2, 2, 1, 1] and sum(count for count, _ in shares) == labeled
    assert [check(root, store, rank=rank, world_size=4)[1] for rank in range(4)] == [0] * 4


def test_a_full_disk_only_forgets_what_the_check_has_found(frames, tmp_path, monkeypatch):
    store = Store(tmp_path / "store", "checks")
    monkeypatch.setattr(store, "_write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.warns(UserWarning, match="takes no new entries: No space left"):
        assert check(frames.root, store)[1] == check(frames.root, store)[1] == 6


@pytest.mark.parametrize("kind", ["color/1.png", "depth/1.png", "label-filt/1.png", "instance-filt/1.png",
                                  "pose/1.txt", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"])
def test_a_file_that_changed_is_read_again(frames, tmp_path, kind):
    root, store = frames.root, Store(tmp_path / "store", "checks")
    check(root, store)
    path = root / "scene0001_00" / kind
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))  # same size, another time
    assert check(root, store)[1] == 6 and check(root, store)[1] == 0
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time, another size
    assert check(root, store)[1] == 6 and check(root, store)[1] == 0


def test_every_setting_that_a_sample_depends_on_has_it_read_again(frames, tmp_path):
    root, store = frames.root, Store(tmp_path / "store", "checks")
    check(root, store)
    one, two = (SuperpointCache(tmp_path, oversegment, name) for name in ("one", "two"))
    for options in ({"classes": {**CLASSES, 2: "seat"}}, {"num_views": 3}, {"augment": True}, {"seed": 1},
                    {"voxel_size": 0.1}, {"color": False}, {"images": False}, {"up": "y"}, {"superpoints": one},
                    {"superpoints": two}):
        assert check(root, store, **options)[1] == 6, options
        assert check(root, store, **options)[1] == 0, options
    for _ in range(2):  # superpoints that do not say what they depend on: nothing to compare
        assert check(root, store, superpoints=oversegment)[1] == 6


def test_superpoints_are_computed_by_the_check(frames, tmp_path):
    made = []

    def count(*frame):
        made.append(frame)
        return oversegment(*frame, count=20)

    for _ in range(2):
        check(frames.root, Store(tmp_path, "checks"), superpoints=SuperpointCache(tmp_path, count, "20"))
        assert len(made) == 6


def test_a_broken_file_ends_the_check_by_name_and_nothing_is_remembered(frames, tmp_path):
    path = frames.root / "scene0000_00/depth/2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    for _ in range(2):
        with pytest.raises(ValueError, match="depth.2.png: depth image cannot be decoded"):
            check(frames.root, Store(tmp_path / "store", "checks"))


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_named_by_the_check(frames, label):
    class Source(list):
        class_names = ["a", "b", "c"]

    source = Source([{**frames[0], "label": np.full((48, 64), label)}])
    with pytest.raises(ValueError, match=f"scene0000_00/0: labels from {label} to {label}, .* 3 class names"):
        data.check_frames(samples_of(source, 50))


def test_a_sample_without_any_depth_is_named_and_can_be_left_out(frames, tmp_path):
    for number in (0, 2):
        Image.fromarray(np.zeros((24, 32), np.uint16)).save(frames.root / f"scene0000_00/depth/{number}.png")
    dataset = samples_of(frames, 100)
    with pytest.raises(data.BlankSample, match="no pixel with known depth in scene0000_00/2"):
        dataset[2]
    for _ in range(2):  # the second time from the store
        labeled, blank = data.check_frames(dataset, Store(tmp_path / "store", "checks"))
        assert labeled > 0 and blank == [0, 2]
    dataset.leave_out(blank)
    assert [sample["name"] for sample in dataset] == [frames.names[i] for i in (1, 3, 4, 5)]


def test_features_of_unchanged_files_are_found_without_reading_an_image(frames, tmp_path, monkeypatch):
    def build(size=(24, 32)):
        """Images encoded, images read."""
        source = Counting(frames)
        cache = FeatureCache(tmp_path / "cache", "stub", lambda x: (x[:, :, ::8, ::8], x.mean((2, 3))))
        return cache.build(samples_of(source, image_size=size).images_only), source.images

    assert build() == (3, 6 + 3)  # both scenes hold the same images: read to be compared, then to be encoded
    assert build() == (0, 0)
    assert build((12, 16)) == (3, 6 + 3)  # images of another size are others
    assert build((12, 16)) == build() == (0, 0)
    Image.fromarray(np.full((48, 64, 3), 7, np.uint8)).save(frames.root / "scene0001_00/color/1.png")
    assert build() == (1, 6 + 1)
    os.utime(frames.root / "scene0001_00/depth/1.png", (0, 0))  # features are those of the color image
    assert build() == (0, 0)
    monkeypatch.setattr(data.codecs, "version", lambda name: "another")  # another decoder may give other pixels
    assert build() == (0, 6)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("change, message", [
    ({"name": "frame7"}, "name .scene/stem., got 'frame7'"),
    ({"name": "a/b/0"}, "name .scene/stem., got 'a/b/0'"), ({"name": "a/"}, "name .scene/stem., got 'a/'"),
    ({"color": np.zeros((48, 64, 3))}, r"color has shape \(48, 64, 3\) of float64, expected .*uint8"),
    ({"color": np.zeros((48, 64), np.uint8)}, r"color has shape \(48, 64\)"),
    ({"depth": np.ones((24, 32), np.uint16)}, "depth has .* of uint16, expected .*floating-point meters"),
    ({"depth": None}, "depth has NoneType, expected"),
    ({"depth": np.full((24, 32), 1e10)}, r"depth \(24, 32\) has values above 10000 m"),
    ({"world2cam": np.eye(3)}, r"world2cam has shape \(3, 3\)"),
    ({"world2cam": np.full((4, 4), np.nan)}, "world2cam .*finite"),
    ({"world2cam": POSE.T}, r"world2cam \(4, 4\) must have the last row \[0. 0. 0. 1.\].*transposed"),
    ({"world2cam": np.eye(4) + 2e4 * np.eye(4, k=3)}, r"world2cam \(4, 4\) has a translation of 20000 m"),
    ({"depth_world2cam": POSE.T}, r"depth_world2cam \(4, 4\) must have the last row"),
    ({"intrinsics": intrinsics_of((48, 64)).T}, r"intrinsics \(3, 3\) must have the last row"),
    ({"intrinsics": [[1]]}, "intrinsics has list, expected"),
    *(({field: np.array([[50.0, 0, 1e9], [0, 50, 9], [0, 0, 1]])}, rf"{field} \(3, 3\) has the principal point \[1000")
      for field in ("intrinsics", "depth_intrinsics")),
    ({"depth_intrinsics": np.eye(4)}, r"depth_intrinsics has shape \(4, 4\)"),
    ({"label": np.zeros((5, 5), int)}, r"label has shape \(5, 5\)"),
    ({"label": [[0] * 64] * 48}, "label has list, expected integers"),
    ({"instance": np.zeros((48, 64))}, "instance .*expected integers"),
    ({"features": [[[0.0]]]}, "features has list, expected"),
    *(({"features": features}, "features has shape") for features in (
        np.zeros((5, 5, 1)), np.zeros((48, 64)), np.zeros((48, 64, 1), int), np.full((48, 64, 1), np.nan)))])
def test_a_frame_that_breaks_the_protocol_is_named_with_field_and_shape(frames, change, message):
    with pytest.raises(ValueError, match=message if "name" in change else f"scene/1: {message}"):
        samples_of([{**frames[0], "name": "scene/1", **change}])[0]


@pytest.mark.parametrize("options, message", [
    *(({"image_size": size}, "image_size must be") for size in ((0, 224), (224,), (9, 9, 3), (22.4, 224), ("a", "b"))),
    ({"num_points": 0}, "num_points and num_views must be at least 1, got 0, 1"),
    ({"num_views": 0}, "num_points and num_views must be at least 1, got 10000, 0"),
    ({"num_views": 4}, "scene0000_00 has 3 frames, fewer than num_views=4")])
def test_options_that_make_no_sample_are_refused(frames, options, message):
    with pytest.raises(ValueError, match=message):
        samples_of(frames, **options)


# ---------------------------------------------------------------------------------------------- scans


@pytest.fixture
def scan(tmp_path):
    """A scan whose vertices are the first frame's own points and colors, and five frames of it."""
    frames = ScanNetFrames(write_scannet(tmp_path / "frames", 1, 5), None)
    sample = samples_of(frames)[0]
    segments = (np.arange(len(sample["points"])) // 7 * 3).tolist()
    labels = np.where(np.arange(len(segments)) < 70, 5, 1)
    write_scan(tmp_path / "scans", "scene0000_00", sample["points"].numpy(), (sample["features"] * 255).round().numpy(),
               labels, segments, [(4, "chair", segments[:70:7])])
    return ScanNetScenes(tmp_path / "scans", {1: "wall", 5: "chair"}), frames


def scans_of(scan, num_points=200, image_size=(24, 32), **options):
    return data.SceneDataset(*scan, num_points, image_size, **{"num_views": 3, **options})


def test_vertices_of_a_scan_project_to_the_pixels_that_they_came_from(scan):
    for augment in (False, True):
        sample = scans_of(scan, image_size=(48, 64), augment=augment)[0]
        uv, _ = project(sample["points"], sample["intrinsics"][0], sample["world2cam"][0].double().numpy())
        u, v = np.rint(uv).astype(int).T
        colors = sample["images"][0][:2, v, u].T
        expected = torch.tensor(np.stack([u * 255 // 64, v * 255 // 48], 1) / 255)
        assert len(u) == 200 and torch.allclose(colors.double(), expected, atol=1e-6)
        away_from_ties = torch.tensor(np.abs(uv - np.floor(uv) - 0.5).min(1) > 1e-2)
        assert augment or (sample["features"][:, :2] - colors)[away_from_ties].abs().max() < 1e-6


def test_scans_are_aligned_for_the_encoder_and_not_for_the_camera_and_may_be_turned(scan):
    sample = scans_of(scan)[0]
    aligned = sample["points"].double().numpy() @ ALIGNMENT[:3, :3].T + ALIGNMENT[:3, 3]
    np.testing.assert_allclose(sample["coords"], aligned, atol=1e-5)
    np.testing.assert_allclose(sample["world2cam"][1], np.linalg.inv(POSE), atol=1e-6)
    turned = scans_of([data.upright(source, "-y") for source in scan])[0]
    for key in ("points", "coords"):
        expected = sample[key].double().numpy() @ data.up_rotation("-y").T
        np.testing.assert_allclose(turned[key], expected, atol=1e-5)
    before, after = (project(s["points"], s["intrinsics"][0], s["world2cam"][0].double().numpy())[0]
                     for s in (sample, turned))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_views_of_a_scan_are_spread_and_drawn_anew_in_training(scan):
    def views(dataset):
        return frame_numbers(dataset[0]["images"])

    assert views(scans_of(scan)) == [0, 2, 4] and views(scans_of(scan, num_views=5)) == [0, 1, 2, 3, 4]
    training, drawn = scans_of(scan, augment=True), set()
    for epoch in range(12):
        training.set_epoch(epoch)
        drawn.add(tuple(views(training)))
        assert views(training) == sorted(set(views(training)))
    assert len(drawn) > 3
    with pytest.raises(ValueError, match="5 frames, fewer than num_views=6"):
        scans_of(scan, num_views=6)


def test_scans_and_frames_share_one_collate(scan):
    sample = scans_of(scan, 10_000)[0]
    assert sample["labels"].unique().tolist() == [0, 1] and sample["instances"].unique().tolist() == [-1, 4]
    assert ((sample["instances"] == 4) == (sample["labels"] == 1)).all()
    assert (sample["superpoints"] == torch.arange(len(sample["points"])) // 7).all()
    batch = data.collate([sample, scans_of(scan)[0]])
    assert batch["batch"].bincount().tolist() == [len(sample["points"]), 200]
    frame = samples_of(scan[1], superpoints=oversegment)[0]
    assert {key: (value.dtype, value.dim()) for key, value in unnamed(frame).items()} == {
        key: (value.dtype, value.dim()) for key, value in unnamed(sample).items()}


def test_a_scan_may_have_labels_without_instances(scan):
    dataset = scans_of(scan)
    dataset.scenes = [{key: value for key, value in dataset.scenes[0].items() if key != "instances"}]
    assert (dataset[0]["labels"] >= 0).any() and (dataset[0]["instances"] == -1).all()


def test_the_check_of_scans_reads_every_frame_and_a_scan_without_one_is_named(scan):
    scenes, frames = scan[0], Counting(scan[1])
    dataset = scans_of((scenes, frames), num_views=1, augment=True)
    assert data.check_frames(dataset)[0] > 0 and frames.reads > len(frames) == 5
    scenes.names = ["scene0707_00"]
    with pytest.raises(ValueError, match="scan scene0707_00 has no frame"):
        scans_of((scenes, frames))


def test_a_source_without_a_frame_is_refused():
    with pytest.raises(ValueError, match="list: the source holds no frame"):
        samples_of([])
