# SPDX-License-Identifier: MIT
"""Normals as features of points: of depth images, of meshes, and through training to prediction."""
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import train
from data import PointDataset, SceneDataset, depth_normals, turn_normals, up_rotation, upright
from helpers import intrinsics_of, last_checkpoint, small
from model import feature_scale, load_model
from predict import predict_frames
from sources.rooms import RoomFrames
from sources.scannet import ScanNetScenes, vertex_normals
from volt import Volt
from test_scannet import ALIGNMENT, write_scan

SIZE = (96, 128)
CAMERA = intrinsics_of(SIZE)
FRONT = np.array([0, 0, -1.0])
TILTED = np.array([-0.48, 0.36, -0.8])
FLOOR = np.array([0.28, -0.96, 0])


def plane_depth(normal):
    """Depth (H, W) of the plane with a normal towards the camera, 1 m away; 0 where no ray meets it within 5 m."""
    v, u = np.mgrid[:SIZE[0], :SIZE[1]]
    pixels = np.stack([u, v, np.ones_like(u)], 2)
    rays = pixels @ np.linalg.inv(CAMERA).T
    depth = 1 / np.maximum(-(rays @ normal), 0.1)
    return np.where(depth < 5, depth, 0)


def largest_angle(depth, pixels, normal):
    """Degrees between a normal and those of a depth image at some pixels."""
    cosine = depth_normals(depth, CAMERA, pixels) @ normal
    return np.degrees(np.arccos(cosine.clip(-1, 1))).max()


@pytest.fixture
def room():
    """One frame of a room, under the name of a scan."""
    frame = RoomFrames("train", 1, 1, size=(48, 64))[0]
    frame["name"] = "scene0000_00/0"
    return frame


@pytest.fixture
def scans(tmp_path):
    """A scan of five vertices, of which the first three make a face."""
    points = np.random.default_rng(0).normal(size=(5, 3))
    points = points.astype(np.float32)
    write_scan(tmp_path, "scene0000_00", points, np.zeros((5, 3)), np.ones(5), [0] * 5, [])
    return ScanNetScenes(tmp_path, None, normals=True)


@pytest.mark.parametrize("normal", [FRONT, TILTED, FLOOR])
def test_depth_of_a_plane_gives_its_normal_towards_the_camera(normal):
    depth = plane_depth(normal)
    assert largest_angle(depth, np.flatnonzero(depth), normal) < 0.01


def test_a_surface_behind_an_edge_does_not_bend_normals():
    depth = plane_depth(FRONT)
    depth[:, 64:] = 2 * plane_depth(TILTED)[:, 64:]
    left = np.arange(depth.size) % SIZE[1] < 64
    assert largest_angle(depth, np.flatnonzero(left), FRONT) < 0.01
    assert largest_angle(depth, np.flatnonzero(~left), TILTED) < 0.01


def test_a_pixel_without_neighbors_faces_the_camera():
    depth = np.zeros(SIZE)
    depth[0, 0] = 1
    depth[0, 1] = np.inf
    pixels = np.array([0])
    assert largest_angle(depth, pixels, FRONT) < 0.01


def test_normals_of_frames_are_features_in_the_axes_of_the_world():
    frames = RoomFrames("train", 1, 1)
    options = dict(num_points=3000, image_size=SIZE)
    plain = PointDataset(frames, **options)[0]
    sample = PointDataset(frames, normals=True, **options)[0]
    colors, normals = sample["features"].split(3, 1)
    assert torch.equal(colors, plain["features"])
    assert torch.allclose(normals.norm(dim=1), torch.ones(3000))
    floor = sample["labels"] == frames.class_names.index("floor")
    assert normals[floor, 2].median() > 0.99

    rotation = torch.from_numpy(up_rotation("-y")).float()
    turned = PointDataset(upright(frames, "-y"), normals=True, **options)[0]
    assert torch.allclose(turned["features"][:, 3:], normals @ rotation.T, atol=1e-5)


def test_augmentation_turns_and_mirrors_normals_with_the_points(room):
    options = dict(num_points=10 ** 6, image_size=SIZE, normals=True)
    plain = PointDataset([room], **options)[0]
    normals = plain["features"][:, 3:]
    augmented = PointDataset([room], augment=True, **options)
    mirrored = set()
    for epoch in range(12):
        augmented.set_epoch(epoch)
        sample = augmented[0]
        points = sample["points"] - sample["points"].mean(0)
        coords = sample["coords"] - sample["coords"].mean(0)
        matrix, *_ = torch.linalg.lstsq(points, coords)
        error = (points @ matrix - coords).abs().max()
        if error > 1e-3:  # bent by elastic fields
            continue
        expected = F.normalize(normals @ matrix)
        assert torch.allclose(sample["features"][:, 3:], expected, atol=1e-3)
        mirrored.add(matrix.det().item() < 0)
    assert mirrored == {False, True}


def test_scaling_leaves_unit_normals_and_zeros():
    normals = np.eye(4)[:, :3]
    scaling = 3 * np.eye(3)
    assert np.array_equal(turn_normals(normals, scaling), normals)


def test_a_vertex_has_the_mean_normal_of_its_faces_by_area():
    origin = np.zeros(3)
    x, y, z = np.eye(3)
    points = np.stack([origin, 2 * x, 2 * y, z, origin])
    triangles = np.array([[0, 1, 2], [0, 2, 3]])  # areas 2 and 1, facing z and x
    normals = vertex_normals(points, triangles)
    shared = (x + 2 * z) / 5 ** 0.5
    expected = np.stack([shared, z, shared, x, origin])
    assert np.allclose(normals, expected)


@pytest.mark.parametrize("up", ["z", "x"])
def test_normals_of_a_mesh_are_aligned_for_the_encoder(scans, room, up):
    a, b, c, *_ = scans[0]["points"]
    normal = np.cross(b - a, c - a)
    normal = normal / np.linalg.norm(normal)
    assert np.allclose(scans[0]["normals"][:3], normal, atol=1e-5)

    dataset = SceneDataset(upright(scans, up), upright([room], up), 10, SIZE, normals=True)
    expected = up_rotation(up) @ ALIGNMENT[:3, :3] @ normal
    assert np.allclose(dataset[0]["features"][:3, 3:], expected, atol=1e-5)


def test_scans_without_faces_are_refused_by_name(scans, room):
    plain = ScanNetScenes(scans.root, None)
    dataset = SceneDataset(plain, [room], 10, SIZE, normals=True)
    with pytest.raises(ValueError, match="scan scene0000_00 has no normals"):
        dataset[0]

    path, *_ = scans.files(0)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"element face 1", b"element face 0"))
    with pytest.raises(ValueError, match="vh_clean_2.ply has no normals"):
        scans[0]
    corners = np.array([0, 1, 5], "<i4")
    path.write_bytes(content[:-12] + corners.tobytes())
    with pytest.raises(ValueError, match="vh_clean_2.ply: a face has vertex 5 of 5"):
        scans[0]


def test_weights_that_see_normals_need_them_and_a_checkpoint_remembers(tmp_path, monkeypatch, quick_runs):
    tiny = partial(Volt, embed_dim=64, num_heads=1, depth=2, out_channels=32)
    monkeypatch.setitem(model.BACKBONES, "volt-small", tiny)
    weights = {f"backbone.{key}": value for key, value in tiny(6).state_dict().items()}
    torch.save({"ema_state_dict": weights}, tmp_path / "volt.pth")
    more = f"--init-3d {tmp_path / 'volt.pth'} --no-clip --no-instances --epochs 1"
    options = small(tmp_path, *more.split())
    with pytest.raises(ValueError, match="volt.pth takes 6 features per point: .* --normals"):
        train.main(options)

    train.main([*options, "--normals"])
    path = last_checkpoint(tmp_path)
    network, _, config = load_model(path, "cpu")
    encoder = network.fusion.encoder_3d
    assert config["backbone"] == "volt-small"
    assert config["colors"] == "raw"
    assert config["normals"]
    assert isinstance(encoder.backbone, Volt)
    assert encoder.out_channels == 32
    frames = RoomFrames("val", 1, 1)
    result, = predict_frames(network, frames, config)
    assert (result["labels"] >= 0).any()
    train.main(["--resume", str(path), "--epochs", "2", "--device", "cpu"])


def test_normals_stay_as_they_are_whatever_the_scale_of_colors():
    config = {"colors": "scannet", "normals": True}
    mean, std = feature_scale(config, 6)
    assert mean[3:] == (0, 0, 0)
    assert std[3:] == (1, 1, 1)
    assert feature_scale({"colors": "signed"}, 6) == (0.5, 0.5)
    with pytest.raises(SystemExit):
        train.parse_args(["--normals", "--colors", "ones"])
