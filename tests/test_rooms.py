# SPDX-License-Identifier: MIT
"""sources/rooms.py: exact geometry without noise, honest noise, seeds, splits, contents."""
import pickle
from collections import defaultdict

import numpy as np
import pytest

from data import unproject
from sources import rooms
from sources.rooms import CLASSES, frames, look_at, make_room, render

INTRINSICS = np.array([[150.0, 0, 79.3], [0, 140.0, 61.1], [0, 0, 1]])
SIZE = (120, 160)


def box_scene(corners, ellipsoid=False, label=0, color=(0.5, 0.4, 0.3)):
    """A scene with nothing but one box or ellipsoid."""
    return dict(size=np.full(3, 9.0), corners=np.array([corners], float), ellipsoid=np.array([ellipsoid]),
                label=np.array([label]), instance=np.array([7]), look=[rooms.Look(np.array(color))],
                ambient=0.6, light=np.array([0.0, 0.0, 5.0]), tint=np.ones(3))


def world_points(depth, pose):
    """World coordinates (H, W, 3) of every pixel."""
    v, u = np.indices(SIZE)
    pixels = np.stack([u.ravel(), v.ravel()], 1)
    return unproject(pixels, depth.ravel(), INTRINSICS, pose).reshape(*SIZE, 3)


def views(seed, count):
    """A room and `count` noise-free renderings of it, as (world2cam, rendering) pairs."""
    scene, rng = make_room(seed), np.random.default_rng(seed)
    poses = [rooms.draw_camera(scene, rng) for _ in range(count)]
    return scene, [(pose, render(scene, pose, INTRINSICS, SIZE)) for pose in poses]


def test_a_box_fills_the_pixels_whose_centers_its_projection_covers_with_its_depth_along_the_axis():
    # Camera axes by hand: x right = world x, y down = -z, z forward = y. The face lies at depth 2.
    left, right, low, high = -0.311, 0.521, -0.231, 0.411  # through no pixel's center
    pose = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    rendering = render(box_scene([[left, 2, low], [right, 2.5, high]]), pose, INTRINSICS, SIZE)
    v, u = np.indices(SIZE)
    x, z = 2 * (u - 79.3) / 150, -2 * (v - 61.1) / 140
    inside = (x >= left) & (x <= right) & (z >= low) & (z <= high)
    np.testing.assert_allclose(rendering["depth"], 2.0 * inside, atol=1e-6)
    np.testing.assert_array_equal(rendering["label"], np.where(inside, 0, -1))
    np.testing.assert_array_equal(rendering["instance"], np.where(inside, 7, -1))
    assert not rendering["color"][~inside].any() and rendering["color"][inside].all()


@pytest.mark.parametrize("seed", range(3))
def test_box_depth_is_the_nearest_crossing_of_its_six_planes(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(-1, 0, 3), rng.uniform(0.1, 1, 3)
    eye = rng.normal(size=3)
    eye *= 3 / np.linalg.norm(eye)
    pose = look_at(eye, rng.uniform(-0.5, 0.5, 3), roll=rng.uniform(-1, 1))
    depth = render(box_scene([low, high]), pose, INTRINSICS, SIZE)["depth"]
    # Independent: every face as a plane, the hit kept where it falls into the face's rectangle.
    rays = world_points(np.ones(SIZE), pose) - eye
    expected, margin = np.full(SIZE, np.inf), np.full(SIZE, np.inf)
    for axis in range(3):
        for plane in (low[axis], high[axis]):
            t = (plane - eye[axis]) / rays[..., axis]
            hit = eye + t[..., None] * rays
            slack = np.delete(np.minimum(hit - low, high - hit), axis, -1).min(-1)
            expected = np.where((slack >= 0) & (t > 0), np.minimum(expected, t), expected)
            margin = np.minimum(margin, np.abs(slack))
    expected[np.isinf(expected)] = 0
    clear = margin > 1e-5  # a ray through an edge may fall on either side
    assert clear.mean() > 0.99 and (expected > 0).any()
    np.testing.assert_allclose(depth[clear], expected[clear], atol=2e-5)


def test_ellipsoid_depth_solves_its_quadratic():
    eye, half, center = np.array([3.0, -1.0, 0.7]), np.array([0.5, 0.3, 0.4]), np.array([0.1, 0.2, 0.3])
    pose = look_at(eye, center)
    depth = render(box_scene([center - half, center + half], ellipsoid=True), pose, INTRINSICS, SIZE)["depth"]
    d = (world_points(np.ones(SIZE), pose) - eye) / half
    o = (eye - center) / half
    a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum() - 1
    discriminant = b * b - a * c
    clear = np.abs(discriminant) > 1e-3
    expected = np.where(discriminant > 0, (-b - np.sqrt(np.maximum(discriminant, 0))) / a, 0)
    assert (expected[clear] > 0).sum() > 200
    np.testing.assert_allclose(depth[clear], expected[clear], atol=2e-5)


def test_what_lies_behind_the_camera_or_around_it_is_not_seen_and_what_reaches_behind_it_not_cut_off():
    pose = look_at(np.zeros(3), np.array([0.0, 1.0, 0.0]))
    for corners in ([[-1, -3, -1], [1, -2, 1]], [[-1, -1, -1], [1, 1, 1]]):
        rendering = render(box_scene(corners), pose, INTRINSICS, SIZE)
        assert not rendering["depth"].any() and (rendering["label"] == -1).all()
    below = render(box_scene([[-9, -9, -2], [9, 9, -1]]), pose, INTRINSICS, SIZE)["depth"][:, 80]
    depth = 140 / np.maximum(np.arange(SIZE[0]) - 61.1, 1e-9)
    np.testing.assert_allclose(below, np.where(depth <= 9, depth, 0), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_noise_free_pixels_lie_on_the_surface_of_a_box_of_their_label_and_instance(seed):
    scene, renderings = views(seed, 3)
    for pose, rendering in renderings:
        points = world_points(rendering["depth"], pose)
        distance = np.full(SIZE, np.inf)
        surfaces = zip(*(scene[key] for key in ("corners", "ellipsoid", "label", "instance")))
        for corners, ellipsoid, label, instance in surfaces:
            mine = (rendering["label"] == label) & (rendering["instance"] == instance)
            center, half = corners.mean(0), np.ptp(corners, axis=0) / 2
            q = np.abs(points[mine] - center)
            off = np.maximum(np.linalg.norm(np.maximum(q - half, 0), axis=1), np.abs((q - half).max(1)))
            if ellipsoid:
                off = np.abs(np.linalg.norm(q / half, axis=1) - 1) * half.min()
            distance[mine] = np.minimum(distance[mine], off)
        assert distance.max() < 1e-4


def test_points_of_one_frame_meet_the_same_depth_and_label_in_another():
    scene, renderings = views(10, 5)
    before = pickle.dumps((scene, renderings))
    rng, met, hidden = np.random.default_rng(0), 0, 0
    for pose, a in renderings:
        points = world_points(a["depth"], pose)
        for other, _ in renderings:
            for v, u in rng.integers(0, SIZE, (12, 2)):
                x, y, z = other[:3, :3] @ points[v, u] + other[:3, 3]
                if z < 0.1 or abs(x / z) > 1 or abs(y / z) > 1:
                    continue
                through = np.array([[1, 0, -x / z], [0, 1, -y / z], [0, 0, 1.0]])  # one pixel, centered on the point
                b = {key: image[0, 0] for key, image in render(scene, other, through, (1, 1)).items()}
                assert b["depth"] < z + 1e-4  # nothing is seen through
                if b["depth"] > z - 1e-4:
                    met += 1
                    assert (b["label"], b["instance"]) == (a["label"][v, u], a["instance"][v, u])
                hidden += b["depth"] < z - 0.05
    assert met > 60 and hidden > 3, (met, hidden)
    assert pickle.dumps((scene, renderings)) == before  # rendering leaves scene and camera as they were


def test_an_instance_has_one_label_lies_in_the_room_and_stuff_and_clutter_are_none():
    for seed in range(20):
        scene = make_room(seed)
        low, high = scene["corners"][:, 0], scene["corners"][:, 1]
        is_object = scene["label"] >= len(rooms.STUFF)
        np.testing.assert_array_equal(scene["instance"] > 0, is_object)
        assert (scene["instance"][~is_object] == -1).all() and (high > low).all()
        assert (low[is_object] > -1e-6).all() and (high[is_object] < scene["size"] + 1e-6).all()
        pieces = []
        for instance in range(1, scene["instance"].max() + 1):
            mine = scene["instance"] == instance
            label, = set(scene["label"][mine])
            if CLASSES[label] not in rooms.PANELS:
                pieces.append((low[mine].min(0), high[mine].max(0)))
        for i, (a_low, a_high) in enumerate(pieces):  # no two intersect
            assert all((a_low > b_high).any() or (a_high < b_low).any() for b_low, b_high in pieces[:i])


def test_panels_are_flush_with_the_wall_and_no_class_has_its_own_sizes_or_heights():
    sizes = defaultdict(list)
    for seed in range(60):
        scene = make_room(seed)
        for (low, high), label in zip(scene["corners"], scene["label"]):
            if label < 0:
                continue
            if CLASSES[label] in rooms.PANELS:
                assert (high - low)[:2].min() < 0.01 and np.minimum(low, scene["size"] - high)[:2].min() < 1e-9
            sizes[CLASSES[label]].append([(high - low)[:2].max(), (high - low)[2], low[2]])
    for group, columns in ((rooms.PANELS, 3), (rooms.BOXES, 2)):
        for column in range(columns):
            values = [np.sort([row[column] for row in sizes[name]]) for name in group]
            for i, a in enumerate(values):
                for b in values[:i]:  # two-sample Kolmogorov-Smirnov, one false alarm in 20,000 draws of the rooms
                    cdf_a, cdf_b = (np.searchsorted(x, np.concatenate([a, b]), "right") / len(x) for x in (a, b))
                    assert np.abs(cdf_a - cdf_b).max() < 2.7 * np.sqrt(1 / len(a) + 1 / len(b))


def test_cameras_are_rigid_at_eye_height_in_free_space_and_look_everywhere():
    headings, pitches = [], []
    for seed in range(8):
        scene, rng = make_room(seed), np.random.default_rng(seed)
        for _ in range(8):
            pose = rooms.draw_camera(scene, rng)
            rotation, eye = pose[:3, :3], -pose[:3, :3].T @ pose[:3, 3]
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(rotation) > 0 and (pose[3] == [0, 0, 0, 1]).all()
            assert 1.1 < eye[2] < 1.9 and (eye > 0).all() and (eye < scene["size"]).all()
            assert not ((eye > scene["corners"][:, 0] - 0.2) & (eye < scene["corners"][:, 1] + 0.2)).all(1).any()
            assert rotation[1, 2] < -0.7  # the image's y axis points down
            headings.append(np.arctan2(*rotation[2, 1::-1]))
            pitches.append(np.arcsin(rotation[2, 2]))
    assert np.histogram(headings, 4, (-np.pi, np.pi))[0].min() > 3
    assert min(pitches) < -0.3 and max(pitches) > 0.1


def test_every_class_occurs_and_its_pixels_are_no_rarity():
    shots = frames("train", 12, 4, size=(30, 40))
    seen = np.array([[(shot["label"] == k).mean() > 0.004 for k in range(len(CLASSES))] for shot in shots])
    share = dict(zip(CLASSES, seen.mean(0)))
    assert min(share.values()) > 0.1, share
    assert max((shot["label"] == -1).mean() for shot in shots) < 0.3


def test_a_source_holds_the_same_frames_at_every_call_and_the_first_ones_whatever_is_asked_for():
    few, many = frames("train", 2, 2, seed=3, size=(30, 40)), rooms.RoomFrames("train", 3, 4, seed=3, size=(30, 40))
    assert [frame["name"] for frame in few] == ["train0000/0", "train0000/1", "train0001/0", "train0001/1"]
    assert len(many) == len(set(many.names)) == 12 and many.class_names == list(CLASSES) and many.num_skipped == 0
    for frame in few:
        index = many.names.index(frame["name"])
        assert frame.keys() == many[index].keys()
        for key, value in frame.items():
            np.testing.assert_array_equal(value, many[index][key])
        np.testing.assert_array_equal(many.color(index), frame["color"])
    many[0]["label"] = None  # what a reader does with a frame stays with it
    assert many[0]["label"] is not None
    assert frames("train", 0, 3) == [] and frames("train", 3, 0) == []


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split.*'training'"):
        frames("training", 1, 1)


def test_splits_and_seeds_share_no_room_and_no_camera(monkeypatch):
    seen, names = [], defaultdict(set)

    def recorded(seed):
        scene = make_room(seed)
        seen.append(scene["size"])
        return scene

    monkeypatch.setattr(rooms, "make_room", recorded)
    for split in rooms.SPLITS:
        for seed in (0, 1, 2**32, 2**32 + 1, 2**64):
            for frame in frames(split, 2, 1, seed=seed, size=(6, 8)):
                names[split].add(frame["name"])
                seen.append(frame["world2cam"])
    assert len({value.tobytes() for value in seen}) == len(seen) == 60
    assert len(set.union(*names.values())) == sum(map(len, names.values())) == 6


def test_depth_noise_follows_the_sensor_model_and_labels_stay_exact():
    scene, [(pose, clean)] = views(1, 1)
    noisy = [render(scene, pose, INTRINSICS, SIZE, np.random.default_rng(seed)) for seed in range(12)]
    for rendering in noisy:
        np.testing.assert_array_equal(rendering["label"], clean["label"])
        np.testing.assert_array_equal(rendering["instance"], clean["instance"])
        assert 0.001 < (rendering["depth"] == 0).mean() < 0.25
    depth = np.stack([rendering["depth"] for rendering in noisy])
    error = (depth - clean["depth"]) / (0.0012 + 0.0019 * (clean["depth"] - 0.4) ** 2)
    error = error[depth > 0]
    assert abs(error.mean()) < 0.02 and abs(error.std() - 1) < 0.02  # 2e5 draws: standard errors under 0.003
    color = np.stack([rendering["color"] for rendering in noisy]).astype(float)
    assert 2 < np.abs(color - clean["color"]).mean() < 20


def test_holes_say_nothing_of_the_class():
    # The same slab under two labels and two looks: the same holes.
    pose = look_at(np.zeros(3), np.array([0.4, 3.0, 0.2]))
    slab = [[-50, 3, -50], [50, 4, 50]]
    a, b = (render(box_scene(slab, label=label, color=color), pose, INTRINSICS, SIZE, np.random.default_rng(0))
            for label, color in ((0, (0.5, 0.4, 0.3)), (4, (0.9, 0.1, 0.1))))
    np.testing.assert_array_equal(a["depth"], b["depth"])
    assert (a["label"] != b["label"]).all() and (a["color"] != b["color"]).any() and not a["depth"].all()
