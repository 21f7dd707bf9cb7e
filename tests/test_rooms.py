# SPDX-License-Identifier: MIT
"""Properties of the built-in rooms: exact geometry without noise, honest noise, seeds, splits, contents."""
import numpy as np
import pytest

from sources import rooms
from sources.rooms import CLASSES, frames, look_at, make_room, render

INTRINSICS = np.array([[150.0, 0, 79.3], [0, 140.0, 61.1], [0, 0, 1]])
SIZE = (120, 160)


def box_scene(corners, ellipsoid=False, label=1):
    """A scene with nothing but one box or ellipsoid."""
    look = dict(rooms.make_look([0.5, 0.4, 0.3]))
    return dict(size=np.full(3, 9.0), corners=np.array([corners], float), ellipsoid=np.array([ellipsoid]),
                label=np.array([label], np.uint8), instance=np.array([7], np.uint8), look=[look], ambient=0.6,
                light=np.array([0.0, 0.0, 5.0]), tint=np.ones(3))


def world_points(depth, world2cam, intrinsics):
    """World coordinates (H, W, 3) of every pixel, in double precision."""
    v, u = np.mgrid[:depth.shape[0], :depth.shape[1]]
    camera = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T * depth[..., None].astype(float)
    cam2world = np.linalg.inv(world2cam)
    return camera @ cam2world[:3, :3].T + cam2world[:3, 3]


def views(seed, count):
    """A room and `count` noise-free renderings of it, as (world2cam, rendering) pairs."""
    scene, rng = make_room(seed), np.random.default_rng(seed)
    poses = [rooms.draw_camera(scene, rng) for _ in range(count)]
    return scene, [(pose, render(scene, pose, INTRINSICS, SIZE)) for pose in poses]


def test_depth_of_a_facing_plane_is_its_distance_along_the_axis_and_not_along_the_ray():
    pose = look_at(np.zeros(3), np.array([0.0, 3.0, 0.0]))
    depth = render(box_scene([[-50, 3, -50], [50, 4, 50]]), pose, INTRINSICS, SIZE)["depth"]
    np.testing.assert_allclose(depth, 3.0, atol=1e-6)


def test_a_box_fills_the_pixels_whose_centres_its_projection_covers():
    # Camera axes by hand: x right = world x, y down = -z, z forward = y. The face lies at depth 2.
    left, right, low, high = -0.31, 0.52, -0.23, 0.41
    pose = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    rendering = render(box_scene([[left, 2, low], [right, 2.5, high]]), pose, INTRINSICS, SIZE)
    v, u = np.mgrid[:SIZE[0], :SIZE[1]]
    x, z = 2 * (u - 79.3) / 150, -2 * (v - 61.1) / 140
    inside = (x >= left) & (x <= right) & (z >= low) & (z <= high)
    np.testing.assert_array_equal(rendering["label"], inside)
    np.testing.assert_array_equal(rendering["instance"], 7 * inside)
    np.testing.assert_array_equal(rendering["depth"] > 0, inside)
    assert not rendering["color"][~inside].any() and rendering["color"][inside].all()


@pytest.mark.parametrize("seed", range(5))
def test_box_depth_is_the_nearest_crossing_of_its_six_planes(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(-1, 0, 3), rng.uniform(0.1, 1, 3)
    eye = rng.normal(size=3)
    eye *= 3 / np.linalg.norm(eye)
    pose = look_at(eye, rng.uniform(-0.5, 0.5, 3), roll=rng.uniform(-1, 1))
    depth = render(box_scene([low, high]), pose, INTRINSICS, SIZE)["depth"]
    # Independent: every face as a plane, the hit kept where it falls into the face's rectangle.
    rays = world_points(np.ones(SIZE), pose, INTRINSICS) - eye
    expected, margin = np.full(SIZE, np.inf), np.full(SIZE, np.inf)
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        for plane in (low[axis], high[axis]):
            t = (plane - eye[axis]) / rays[..., axis]
            hit = eye + t[..., None] * rays
            slack = np.minimum(hit - low, high - hit)[..., others].min(-1)
            expected = np.where((slack >= 0) & (t > 0), np.minimum(expected, t), expected)
            margin = np.minimum(margin, np.abs(slack))
    expected[np.isinf(expected)] = 0
    clear = margin > 1e-5  # a ray through an edge may fall on either side
    assert clear.mean() > 0.99 and (expected > 0).any()
    np.testing.assert_allclose(depth[clear], expected[clear], atol=2e-5)


def test_ellipsoid_depth_solves_its_quadratic():
    eye, half, centre = np.array([3.0, -1.0, 0.7]), np.array([0.5, 0.3, 0.4]), np.array([0.1, 0.2, 0.3])
    pose = look_at(eye, centre)
    depth = render(box_scene([centre - half, centre + half], ellipsoid=True), pose, INTRINSICS, SIZE)["depth"]
    d = (world_points(np.ones(SIZE), pose, INTRINSICS) - eye) / half
    o = (eye - centre) / half
    a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum() - 1
    discriminant = b * b - a * c
    clear = np.abs(discriminant) > 1e-3
    expected = np.where(discriminant > 0, (-b - np.sqrt(np.maximum(discriminant, 0))) / a, 0)
    assert (expected[clear] > 0).sum() > 200
    np.testing.assert_allclose(depth[clear], expected[clear], atol=2e-5)


def test_what_lies_behind_the_camera_or_around_it_is_not_seen():
    pose = look_at(np.zeros(3), np.array([0.0, 1.0, 0.0]))
    for corners in ([[-1, -3, -1], [1, -2, 1]], [[-1, -1, -1], [1, 1, 1]]):
        rendering = render(box_scene(corners), pose, INTRINSICS, SIZE)
        assert not any(image.any() for image in rendering.values())


def test_a_box_that_reaches_behind_the_camera_is_not_cut_off():
    pose = look_at(np.zeros(3), np.array([0.0, 1.0, 0.0]))
    rendering = render(box_scene([[-9, -9, -2], [9, 9, -1]]), pose, INTRINSICS, SIZE)
    v = np.arange(SIZE[0])
    expected = np.where(140 / np.maximum(v - 61.1, 1e-9) <= 9, 140 / np.maximum(v - 61.1, 1e-9), 0)
    np.testing.assert_allclose(rendering["depth"][:, 80], expected, atol=1e-5)


def test_renderings_scale_with_the_intrinsics():
    scene, [(pose, _)] = views(3, 1)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    big = np.linalg.inv(half) @ np.diag([3, 3, 1]) @ half @ INTRINSICS  # every third pixel centre coincides
    small = render(scene, pose, INTRINSICS, SIZE)
    large = render(scene, pose, big, (3 * SIZE[0], 3 * SIZE[1]))
    same = large["label"][1::3, 1::3] == small["label"]
    assert same.mean() > 0.999
    close = np.isclose(large["depth"][1::3, 1::3], small["depth"], atol=1e-3)
    assert close.mean() > 0.999


@pytest.mark.parametrize("seed", range(4))
def test_noise_free_pixels_lie_on_the_surface_of_a_box_of_their_label_and_instance(seed):
    scene, renderings = views(seed, 3)
    for pose, rendering in renderings:
        points = world_points(rendering["depth"], pose, INTRINSICS).reshape(-1, 3)
        distance = np.full(len(points), np.inf)
        surfaces = zip(*(scene[key] for key in ("corners", "ellipsoid", "label", "instance")))
        for corners, ellipsoid, label, instance in surfaces:
            mine = (rendering["label"].ravel() == label) & (rendering["instance"].ravel() == instance)
            centre, half = corners.mean(0), np.ptp(corners, axis=0) / 2
            q = points[mine] - centre
            if ellipsoid:
                off = np.abs(np.linalg.norm(q / half, axis=1) - 1) * half.min()
            else:
                outside = np.linalg.norm(np.maximum(np.abs(q) - half, 0), axis=1)
                off = np.maximum(outside, np.abs((np.abs(q) - half).max(1)))
            distance[mine] = np.minimum(distance[mine], off)
        assert distance.max() < 1e-4


def test_points_of_one_frame_meet_the_same_depth_and_label_in_another():
    scene, renderings = views(10, 6)
    rng, met, hidden = np.random.default_rng(0), 0, 0
    for pose, a in renderings:
        points = world_points(a["depth"], pose, INTRINSICS)
        for other, _ in renderings:
            for v, u in rng.integers(0, SIZE, (15, 2)):
                x, y, z = other[:3, :3] @ points[v, u] + other[:3, 3]
                if z < 0.1 or abs(x / z) > 1 or abs(y / z) > 1:
                    continue
                through = np.array([[1, 0, -x / z], [0, 1, -y / z], [0, 0, 1.0]])  # one pixel, centred on the point
                b = {key: image[0, 0] for key, image in render(scene, other, through, (1, 1)).items()}
                assert b["depth"] < z + 1e-4  # nothing is seen through
                if b["depth"] > z - 1e-4:
                    met += 1
                    assert (b["label"], b["instance"]) == (a["label"][v, u], a["instance"][v, u])
                hidden += b["depth"] < z - 0.05
    assert met > 100 and hidden > 5, (met, hidden)


def test_an_instance_has_one_label_and_stuff_and_unlabeled_have_none():
    for frame in frames("train", 4, 4, size=SIZE):
        scene = make_room([0, int(frame["name"][5:9]), 0, 0])
        owner = {i: set(scene["label"][scene["instance"] == i]) for i in scene["instance"]}
        for instance in np.unique(frame["instance"]):
            labels = set(np.unique(frame["label"][frame["instance"] == instance]))
            if instance:
                assert labels == owner[instance] and min(labels) > rooms.STUFF
            else:
                assert labels <= {0, *range(1, rooms.STUFF + 1)}


def test_objects_lie_inside_the_room_and_pieces_do_not_intersect():
    for seed in range(30):
        scene = make_room(seed)
        objects = scene["label"] > rooms.STUFF
        assert (scene["corners"][objects] > -1e-6).all() and (scene["corners"][objects] < scene["size"] + 1e-6).all()
        assert (scene["corners"][:, 1] > scene["corners"][:, 0]).all()
        names = np.array(("unlabeled", *CLASSES))[scene["label"]]
        pieces = [np.stack([c[:, 0].min(0), c[:, 1].max(0)]) for c in
                  (scene["corners"][scene["instance"] == i] for i in np.unique(scene["instance"][
                      objects & ~np.isin(names, rooms.PANELS)]))]
        for i, a in enumerate(pieces):
            assert all((a[0] > b[1]).any() or (a[1] < b[0]).any() for b in pieces[:i])


def test_panels_are_flush_with_the_wall_and_no_class_has_its_own_sizes_or_heights():
    sizes = {name: [] for name in rooms.PANELS + rooms.BOXES}
    for seed in range(150):
        scene = make_room(seed)
        for box, label in zip(scene["corners"], scene["label"]):
            name = CLASSES[label - 1] if label else None
            if name in sizes:
                extent = box[1] - box[0]
                if name in rooms.PANELS:
                    assert extent[:2].min() < 0.01
                    assert np.minimum(box[0], scene["size"] - box[1])[:2].min() < 1e-9
                sizes[name].append([extent[:2].max(), extent[2], box[0, 2]])
    for group in (rooms.PANELS, rooms.BOXES):
        for column in range(3 if group is rooms.PANELS else 2):
            values = [np.sort([row[column] for row in sizes[name]]) for name in group]
            for i, a in enumerate(values):
                for b in values[:i]:  # two-sample Kolmogorov-Smirnov at the 0.1 % level
                    cdf_a, cdf_b = (np.searchsorted(x, np.concatenate([a, b]), "right") / len(x) for x in (a, b))
                    assert np.abs(cdf_a - cdf_b).max() < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


def test_cameras_are_rigid_at_eye_height_in_free_space_and_look_everywhere():
    shots = frames("val", 12, 6, seed=5, size=(12, 16))
    headings, pitches = [], []
    for shot in shots:
        rotation, shift = shot["world2cam"][:3, :3], shot["world2cam"][:3, 3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0 and (shot["world2cam"][3] == [0, 0, 0, 1]).all()
        eye = -rotation.T @ shift
        scene = make_room([1, int(shot["name"][3:7]), 0, 5])
        assert 1.1 < eye[2] < 1.9 and (eye > 0).all() and (eye < scene["size"]).all()
        assert not ((eye > scene["corners"][:, 0] - 0.2) & (eye < scene["corners"][:, 1] + 0.2)).all(1).any()
        assert rotation[1, 2] < -0.7  # the image's y axis points down
        headings.append(np.arctan2(*rotation[2, 1::-1]))
        pitches.append(np.arcsin(rotation[2, 2]))
    assert np.histogram(headings, 8, (-np.pi, np.pi))[0].min() > 0
    assert min(pitches) < -0.3 and max(pitches) > 0.1


def test_every_class_occurs_and_its_pixels_are_no_rarity():
    shots = frames("train", 20, 6, size=(60, 80))
    seen = np.array([[(shot["label"] == 1 + k).mean() > 0.004 for k in range(len(CLASSES))] for shot in shots])
    share = dict(zip(CLASSES, seen.mean(0)))
    assert min(share.values()) > 0.15, share
    assert max((shot["label"] == 0).mean() for shot in shots) < 0.3


def test_frames_are_the_same_at_every_call_and_the_first_ones_whatever_is_asked_for():
    few, many = frames("train", 2, 2, seed=3, size=(30, 40)), frames("train", 3, 4, seed=3, size=(30, 40))
    by_name = {frame["name"]: frame for frame in many}
    assert len(by_name) == 12 and [frame["name"] for frame in few] == ["train0000/0", "train0000/1", "train0001/0",
                                                                       "train0001/1"]
    for frame in few:
        for key, value in frame.items():
            np.testing.assert_array_equal(value, by_name[frame["name"]][key])


def test_splits_and_seeds_share_no_room_and_no_rendering():
    seen, names = {}, set()
    for split in rooms.SPLITS:
        for seed in (0, 1, 2**32, 2**32 + 1, 2**64):
            for frame in frames(split, 4, 1, seed=seed, size=(6, 8)):
                name = frame["name"]
                scene = make_room([rooms.SPLITS.index(split), int(name.split("/")[0][len(split):]), 0, seed])
                for key in (scene["size"].tobytes(), frame["world2cam"].tobytes()):
                    assert key not in seen, (seen[key], split, seed, name)
                    seen[key] = (split, seed, name)
                names.add((split, name))
    assert len({name for _, name in names}) == len(names)  # no name is used in two splits


def test_frames_hold_the_documented_types():
    [frame] = frames("test", 1, 1, size=(48, 64))
    shapes = dict(color=(48, 64, 3), depth=(48, 64), label=(48, 64), instance=(48, 64), world2cam=(4, 4),
                  intrinsics=(3, 3), depth_intrinsics=(3, 3))
    types = dict(color=np.uint8, depth=np.float32, label=np.uint8, instance=np.uint8, world2cam=np.float64,
                 intrinsics=np.float64, depth_intrinsics=np.float64)
    assert set(frame) == {"name", *shapes}
    for key, shape in shapes.items():
        assert frame[key].shape == shape and frame[key].dtype == types[key]
    assert frame["label"].max() <= len(CLASSES) and np.isfinite(frame["depth"]).all() and frame["depth"].min() >= 0
    assert frames("train", 0, 3) == [] and frames("train", 3, 0) == []


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
    slab = box_scene([[-50, 3, -50], [50, 4, 50]])
    pose = look_at(np.zeros(3), np.array([0.4, 3.0, 0.2]))
    a = render(slab, pose, INTRINSICS, SIZE, np.random.default_rng(0))
    other = slab | dict(label=np.array([5], np.uint8), look=[rooms.make_look([0.9, 0.1, 0.1])])
    b = render(other, pose, INTRINSICS, SIZE, np.random.default_rng(0))
    np.testing.assert_array_equal(a["depth"], b["depth"])
    assert (a["label"] != b["label"]).all() and (a["color"] != b["color"]).any()


def test_rendering_leaves_scene_and_camera_as_they_were():
    scene, rng = make_room(2), np.random.default_rng(0)
    poses = [rooms.draw_camera(scene, rng) for _ in range(12)]  # enough to see every kind of surface
    before = {key: np.copy(value) for key, value in scene.items() if key != "look"}
    palettes = [look["palette"].copy() for look in scene["look"]]
    for pose in poses:
        arguments = pose.copy(), INTRINSICS.copy()
        render(scene, *arguments, SIZE, rng)
        np.testing.assert_array_equal(arguments[0], pose)
        np.testing.assert_array_equal(arguments[1], INTRINSICS)
    for key, value in before.items():
        np.testing.assert_array_equal(scene[key], value)
    for look, palette in zip(scene["look"], palettes):
        np.testing.assert_array_equal(look["palette"], palette)


def test_bad_arguments_are_named():
    scene = make_room(0)
    with pytest.raises(ValueError, match="split.*'training'"):
        frames("training", 1, 1)
    with pytest.raises(ValueError, match="num_rooms=-1"):
        frames("train", -1, 1)
    with pytest.raises(ValueError, match="seed=-3"):
        frames("train", 1, 1, seed=-3)
    with pytest.raises(ValueError, match=r"size=\(0, 40\)"):
        frames("train", 1, 1, size=(0, 40))
    with pytest.raises(ValueError, match=r"world2cam.*\(3, 3\)"):
        render(scene, np.eye(3), INTRINSICS, SIZE)
    with pytest.raises(ValueError, match=r"intrinsics.*\(4, 4\)"):
        render(scene, np.eye(4), np.eye(4), SIZE)


def test_room_frames_are_the_rendered_ones_with_labels_from_zero_and_minus_one_for_none():
    raw, source = frames("val", 2, 2, seed=3, size=(60, 80)), rooms.RoomFrames("val", 2, 2, seed=3, size=(60, 80))
    assert len(source) == 4 and source.class_names == list(CLASSES) and source.num_skipped == 0
    for i, frame in enumerate(raw):  # images hold 1 + class, and instances from 1; 0 = none
        assert source.names[i] == frame["name"] and np.array_equal(source.color(i), frame["color"])
        expected = {**frame, "label": frame["label"].astype(int) - 1,
                    "instance": np.where(frame["instance"] == 0, -1, frame["instance"].astype(int))}
        for key, value in source[i].items():
            np.testing.assert_array_equal(value, expected[key])
    assert source[0]["label"].min() == -1 and source[0]["instance"].min() == -1
