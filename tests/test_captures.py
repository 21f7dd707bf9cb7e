# SPDX-License-Identifier: MIT
"""captures.py: each format, written here from its own description, gives back the points of rooms and of real frames."""
import io
import json
import re
import runpy
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import predict
import train
from check import first_fault, quick_check, unknowns
from data import PointDataset, depth_to_color, pixel_fields
from helpers import ROOT, last_checkpoint, small
from model import load_model
from predict import predict_frames
from sources import captures
from sources.captures import FORMATS, CaptureFrames, Options
from sources.open import open_frames
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames, read_ply_vertices, write_frames
from support.lens import OneCamera, distorted_pixels, undistort

ROOMS = RoomFrames("train", 1, 4, size=(60, 80))
K = ROOMS[0]["intrinsics"]  # most formats have one camera for all frames
SCENE = [{**ROOMS[i], "intrinsics": K, "depth_intrinsics": K} for i in range(len(ROOMS))]


def cam2world(frame):
    return np.linalg.inv(frame["world2cam"])


def camera_of(scene):
    """fx, fy, cx, cy."""
    return scene[0]["intrinsics"][[0, 1, 0, 1], [0, 1, 2, 2]].tolist()


def line_of(*numbers):
    return " ".join(map(repr, map(float, numbers)))


def points_of(frame):
    return pixel_fields(frame, *depth_to_color(frame))["points"]


def translation_and_quaternion(pose):
    """tx ty tz, and qx qy qz qw by the eigenvector of eigenvalue 1."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = pose[:3, :3]
    k = np.array([[xx - yy - zz, yx + xy, zx + xz, zy - yz], [yx + xy, yy - xx - zz, zy + yz, xz - zx],
                  [zx + xz, zy + yz, zz - xx - yy, yx - xy], [zy - yz, xz - zx, yx - xy, xx + yy + zz]]) / 3
    return *pose[:3, 3], *np.linalg.eigh(k)[1][:, -1]


def save(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def in_units(frame, per_meter):
    return np.rint(frame["depth"] * per_meter).astype(np.uint16)


def write_images(folder, scene, color, depth, per_meter):
    for i, frame in enumerate(scene):
        save(folder, color.format(i), frame["color"])
        save(folder, depth.format(i), in_units(frame, per_meter))


def write_transforms(folder, scene=SCENE):
    write_images(folder, scene, "images/{}.png", "depth/{}.png", 1000)
    frames = [{"file_path": f"images/{i}.png", "depth_file_path": f"depth/{i}.png",
               "transform_matrix": (cam2world(frame) @ np.diag([1, -1, -1, 1])).tolist()} for i, frame in enumerate(scene)]
    fx, fy, cx, cy = camera_of(scene)
    camera = {"fl_x": fx, "fl_y": fy, "cx": cx + 0.5, "cy": cy + 0.5}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    return 1000, Options()


def write_tum(folder, scene=SCENE):
    write_images(folder, scene, "rgb/{}.png", "depth/{}.png", 5000)
    rows = {"rgb": ["# time file"], "depth": [], "groundtruth": ["# time tx ty tz qx qy qz qw"]}
    for i, frame in enumerate(scene):
        rows["rgb"].append(f"{i}.000 rgb/{i}.png")
        rows["depth"].append(f"{i}.015 depth/{i}.png")
        rows["groundtruth"].append(line_of(i - 0.01, *translation_and_quaternion(cam2world(frame))))
    rows["rgb"].append("99.0 rgb/0.png")  # without a depth image
    for name, lines in rows.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return 5000, Options(intrinsics=scene[0]["intrinsics"])


def write_redwood(folder, scene=SCENE):
    write_images(folder, scene, "color/{:06d}.png", "depth/{:06d}.png", 1000)
    lines = []
    for i, frame in enumerate(scene):
        lines += [f"{i} {i} {i + 1}", *(line_of(*row) for row in cam2world(frame))]
    (folder / "trajectory.log").write_text("\n".join(lines))
    (folder / "camera_intrinsic.json").write_text(json.dumps(
        {"intrinsic_matrix": scene[0]["intrinsics"].T.ravel().tolist()}))
    return 1000, Options()


def write_replica(folder, scene=SCENE):
    write_images(folder, scene, "results/frame{:06d}.png", "results/depth{:06d}.png", 6553.5)
    (folder / "traj.txt").write_text("\n".join(line_of(*cam2world(frame).ravel()) for frame in scene))
    camera = dict(zip(("fx", "fy", "cx", "cy"), camera_of(scene)), scale=6553.5)
    (folder.parent / "cam_params.json").write_text(json.dumps({"camera": camera}))
    return 6553.5, Options()


def write_posed(folder, scene=SCENE):
    """7-Scenes."""
    write_images(folder, scene, "frame-{:06d}.color.png", "frame-{:06d}.depth.png", 1000)
    for i, frame in enumerate(scene):
        np.savetxt(folder / f"frame-{i:06d}.pose.txt", cam2world(frame), "%.17g")
    return 1000, Options(intrinsics=scene[0]["intrinsics"])


def write_stray(folder, scene=SCENE):
    write_images(folder, scene, "rgb/{:06d}.png", "depth/{:06d}.png", 1000)
    lines = ["timestamp, frame, x, y, z, qx, qy, qz, qw"]
    for i, frame in enumerate(scene):
        save(folder, f"confidence/{i:06d}.png", np.full(frame["depth"].shape, 2, np.uint8))
        lines.append(line_of(i, i, *translation_and_quaternion(cam2world(frame))).replace(" ", ", "))
    (folder / "odometry.csv").write_text("\n".join(lines))
    (folder / "camera_matrix.csv").write_text("\n".join(line_of(*row).replace(" ", ", ") for row in scene[0]["intrinsics"]))
    return 1000, Options()


def write_kitti(folder, scene=SCENE):
    write_images(folder, scene, "image/{}.png", "depth/{}.png", 256)
    (folder / "poses.txt").write_text("\n".join(line_of(*cam2world(frame)[:3].ravel()) for frame in scene))
    np.savetxt(folder / "intrinsics.txt", scene[0]["intrinsics"], "%.17g")
    return 256, Options(depth_scale=256)


def write_quaternions(folder, scene=SCENE):
    """World to camera, with the real part of quaternions first."""
    write_images(folder, scene, "rgb/{}.png", "depth/{}.png", 1000)
    lines = []
    for i, frame in enumerate(scene):
        tx, ty, tz, x, y, z, w = translation_and_quaternion(frame["world2cam"])
        lines.append(line_of(i, tx, ty, tz, w, x, y, z))
    (folder / "pose.txt").write_text("\n".join(lines))
    return 1000, Options(intrinsics=scene[0]["intrinsics"], pose="w2c-wxyz")


def write_sens(folder, scene=SCENE):
    matrix = np.eye(4, dtype="<f4")
    matrix[:3, :3] = scene[0]["intrinsics"]
    height, width = scene[0]["depth"].shape
    head = struct.pack("<IQ6s", 4, 6, b"sensor")
    for m in (matrix, np.eye(4, dtype="<f4"), matrix, np.eye(4, dtype="<f4")):
        head += m.astype("<f4").tobytes()
    head += struct.pack("<iiIIIIfQ", 2, 1, width, height, width, height, 1000.0, len(scene))
    for i, frame in enumerate(scene):
        buffer = io.BytesIO()
        Image.fromarray(frame["color"]).save(buffer, "JPEG", quality=95)
        depth = zlib.compress(in_units(frame, 1000).tobytes())
        head += cam2world(frame).astype("<f4").tobytes() + struct.pack("<QQQQ", i, i, len(buffer.getvalue()), len(depth))
        head += buffer.getvalue() + depth
    (folder / "scene.sens").write_bytes(head)
    return 1000, Options()


WRITERS = {"nerfstudio": write_transforms, "tum": write_tum, "redwood": write_redwood, "replica": write_replica,
           "7scenes": write_posed, "stray": write_stray, "poses": write_kitti, "poses, w2c-wxyz": write_quaternions, "sens": write_sens}


def check_read_back(folder, scene, name):
    """Writes frames in a format, reads them again and compares them -> the source."""
    folder.mkdir()
    per_meter, options = WRITERS[name](folder, scene)
    frames = CaptureFrames(folder, options=options)
    assert len(frames) == len(scene) and frames.description.startswith(name.partition(",")[0])
    for i, expected in enumerate(scene):
        frame = frames[i]
        rounded = {**expected, "depth": (in_units(expected, per_meter) / per_meter).astype(np.float32)}
        assert np.abs(points_of(frame) - points_of(rounded)).max() < 1e-5
        if name != "sens":  # JPEG
            assert np.array_equal(frame["color"], expected["color"])
        assert frames.names[i].split("/")[0] == folder.name and frames.files(i)
    return frames


@pytest.mark.parametrize("name", WRITERS)
def test_points_and_colors_are_those_of_the_rooms(tmp_path, name):
    check_read_back(tmp_path / "capture", SCENE, name)


def rename(folder, pattern, change):
    for path in sorted(folder.glob(pattern), reverse=True):
        path.rename(path.with_name(change(path.name)))


def to_array(folder):
    """Depth images as NPY."""
    for path in list((folder / "depth").iterdir()):
        np.save(path.with_suffix(".npy"), np.asarray(Image.open(path)))
        path.unlink()


def camera_of_twice_the_size(content):
    """As nerfstudio's for images_2: the camera of the images before they were made smaller."""
    content.update(w=160, h=120, **{key: 2 * content[key] for key in ("fl_x", "fl_y", "cx", "cy")})


def intrinsics_of_twice_the_size(folder):
    camera = np.diag([2, 2, 1]) @ (K + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]) - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    content = {"width": 160, "height": 120, "intrinsic_matrix": camera.T.ravel().tolist()}
    (folder / "camera_intrinsic.json").write_text(json.dumps(content))


def of_each_frame(change):
    return lambda folder: edit(folder, lambda content: [change(frame) for frame in content["frames"]])


def number_poses(folder, names):
    """Images by other names, and 8 numbers per pose, not in order."""
    for kind in ("rgb", "depth"):
        rename(folder / kind, "*", lambda name: f"new{name}")
        rename(folder / kind, "*", lambda name: f"{names[int(name[3:-4])]}.png")
    numbers = [line_of(name, *translation_and_quaternion(cam2world(frame))) for name, frame in zip(names, SCENE)]
    (folder / "pose.txt").write_text("\n".join(reversed(numbers)) + "\n \n\n")


def windows(folder):
    """Byte order marks, line ends, comments."""
    for path in folder.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + b"# made elsewhere\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))


AS_APPS_WRITE = {
    "nerfstudio, images_2": lambda f: edit(f, camera_of_twice_the_size),
    "nerfstudio, no endings": of_each_frame(lambda frame: frame.update(file_path="./" + frame["file_path"][:-4])),
    "nerfstudio, dots in names": lambda f: (rename(f / "images", "*", lambda name: f"r.{name}"), of_each_frame(
        lambda frame: frame.update(file_path=frame["file_path"].replace("/", "/r.")[:-4]))(f)),
    "nerfstudio, backslashes": of_each_frame(lambda frame: frame.update(file_path=frame["file_path"].replace("/", "\\"))),
    "nerfstudio, NeRFCapture": of_each_frame(lambda frame: frame.update(depth_path=frame.pop("depth_file_path"),
                                                                        integer_depth_scale=0.001)),
    "nerfstudio, test_frames": lambda f: edit(f, lambda content: content.update(test_frames=[content["frames"].pop()])),
    "redwood, primesense": lambda f: rename(f, "*.json", lambda name: "camera_primesense.json"),
    "redwood, larger camera": intrinsics_of_twice_the_size,
    "redwood, npy": to_array,
    "redwood, capitals": lambda f: [rename(f, f"{kind}/*", str.upper) for kind in ("color", "depth")],
    "redwood, dot files": lambda f: [(f / name).write_bytes(b"\0\xff") for name in
                                     ("._camera_intrinsic.json", "color/._000000.png", "depth/._000000.png")],
    "sens, dot files": lambda f: (f / "._scene.sens").touch(),
    "stray, npy": to_array,
    "stray, images from 1": lambda f: rename(f / "rgb", "*", lambda name: f"{int(name[:-4]) + 1:06d}.png"),
    "poses, w2c-wxyz, to 10": lambda f: (rename(f / "rgb", "3.png", lambda _: "10.png"),
                                         rename(f / "depth", "3.png", lambda _: "10.png")),
    "tum, windows": windows}


@pytest.mark.parametrize("case", AS_APPS_WRITE)
def test_what_apps_write_beside_the_description_is_read_alike(tmp_path, case):
    name, _, _ = case.rpartition(", ")
    per_meter, options = WRITERS[name](tmp_path)
    AS_APPS_WRITE[case](tmp_path)
    frames = CaptureFrames(tmp_path, options=options)
    for frame, expected in zip(frames, SCENE, strict=True):
        rounded = {**expected, "depth": (in_units(expected, per_meter) / per_meter).astype(np.float32)}
        assert np.abs(points_of(frame) - points_of(rounded)).max() < 1e-5


@pytest.mark.parametrize("names", [(1.25, 1.5, 1.75, 2.0), (1, 2, 9, 10),
                                   (13 * 10 ** 17, 13 * 10 ** 17 + 33333333, 14 * 10 ** 17, 2 * 10 ** 18)])
def test_poses_with_numbers_belong_to_images_in_their_order(tmp_path, names):
    write_kitti(tmp_path)
    rename(tmp_path, "image", lambda _: "rgb")
    rename(tmp_path, "poses.txt", lambda _: "pose.txt")
    number_poses(tmp_path, names)
    for frame, expected in zip(CaptureFrames(tmp_path), SCENE, strict=True):
        assert np.allclose(frame["world2cam"], expected["world2cam"]) and np.array_equal(frame["color"], expected["color"])


@pytest.mark.parametrize("model", [{"is_fisheye": True, "k1": 0.1}, {"camera_model": "PINHOLE", "k1": 0.1}, {"k2": 0.1}])
def test_any_lens_with_coefficients_is_straightened(tmp_path, model):
    write_transforms(tmp_path)
    edit(tmp_path, lambda content: content.update(model))
    called = []
    CaptureFrames(tmp_path, undistort=lambda image, k, *lens: called.append(lens) or image)[0]
    kind = "OPENCV_FISHEYE" if "is_fisheye" in model else "OPENCV"
    assert called == 2 * [(kind, (*(model.get(name, 0) for name in ("k1", "k2")), *(3 - 1 * ("is_fisheye" in model)) * (0,)))]


@pytest.mark.parametrize("case, words", [("tum", "3 frames, 2 without a pose"), ("nerfstudio", "1 frames without depth"),
                                         ("redwood", "1 folders without a capture")])
def test_what_is_left_out_is_counted(tmp_path, case, words):
    folder = tmp_path / "all/a"
    folder.mkdir(parents=True)
    _, options = WRITERS[case](folder)
    if case == "tum":
        lines = (folder / "groundtruth.txt").read_text().splitlines()
        (folder / "groundtruth.txt").write_text("\n".join(lines[:-1]))
    elif case == "nerfstudio":
        edit(folder, lambda content: content["frames"][1].pop("depth_file_path"))
    else:
        (tmp_path / "all/away").symlink_to("nowhere")
        (tmp_path / "all/.hidden").mkdir()
        write_redwood(tmp_path / "all/.hidden")
    frames = CaptureFrames(tmp_path / "all", options=options)
    assert words in frames.description and len(frames) == (4 if case == "redwood" else 3)


@pytest.mark.parametrize("name", ["nerfstudio", "tum", "redwood", "stray", "sens"])
def test_real_frames_come_back_from_every_format_and_nothing_is_wrong_with_them(tmp_path, shared, name):
    source = ScanNetFrames(shared / "data/ycbv", None)
    half = np.diag([0.5, 0.5, 1])
    scene = []
    for frame in (source[i] for i in range(6)):  # every second pixel of every second row: quicker
        camera = half @ frame["intrinsics"]
        images = {key: frame[key][::2, ::2].copy() for key in ("color", "depth")}
        scene.append({**frame, **images, "intrinsics": camera, "depth_intrinsics": camera})
    frames = check_read_back(tmp_path / "capture", scene, name)
    rows = quick_check(frames)
    assert first_fault(rows) is None and not any("the poses" in words for words in unknowns(rows))


def test_several_captures_in_a_folder_are_scenes_and_a_split_chooses(tmp_path):
    """Also if they are links to folders of one name."""
    root, split = tmp_path / "all", tmp_path / "split.txt"
    root.mkdir()
    for scene in "ab":
        (tmp_path / scene / "capture").mkdir(parents=True)
        write_redwood(tmp_path / scene / "capture")
        (root / scene).symlink_to(tmp_path / scene / "capture")
    assert len(CaptureFrames(root)) == 2 * len(SCENE)
    split.write_text("b/000001\n")
    assert CaptureFrames(root, split=split).names == ["b/000001"]
    split.write_text("b/000001\nc\n")
    with pytest.raises(FileNotFoundError, match="split.txt: no scene or frame 'c'"):
        CaptureFrames(root, split=split)


def test_low_confidence_and_lost_poses_are_left_out(tmp_path):
    write_stray(tmp_path)
    save(tmp_path, "confidence/000000.png", np.zeros((60, 80), np.uint8))
    text = (tmp_path / "odometry.csv").read_text().splitlines()
    text[2] = "1.5, 000001" + 7 * ", nan"
    (tmp_path / "odometry.csv").write_text("\n".join(text))
    frames = CaptureFrames(tmp_path)
    assert frames.num_skipped == 1 and not frames[0]["depth"].any() and frames[1]["depth"].any()


def test_depth_of_another_size_gets_the_cameras_of_its_size(tmp_path):
    write_transforms(tmp_path)
    for i, frame in enumerate(SCENE):
        save(tmp_path, f"depth/{i}.png", in_units(frame, 1000)[2::5, 2::5])  # the centers of blocks of 5 x 5
    expected = {**SCENE[0], "depth": np.zeros((60, 80), np.float32)}
    expected["depth"][2::5, 2::5] = in_units(SCENE[0], 1000)[2::5, 2::5] / 1000
    assert np.abs(points_of(CaptureFrames(tmp_path)[0]) - points_of(expected)).max() < 1e-5


@pytest.mark.parametrize("unit", [1.0, 0.001])
@pytest.mark.parametrize("ending, dtype", [("npy", np.float32), ("npy", np.float64), ("npy", np.uint16),
                                           ("tiff", np.float32), ("tif", np.uint16)])
def test_depth_may_be_npy_or_tiff_in_any_unit_with_nan_and_inf_as_no_reading(tmp_path, ending, dtype, unit):
    write_transforms(tmp_path)
    values = (SCENE[0]["depth"] / unit).astype(dtype)
    if dtype != np.uint16:
        values[0, :2] = np.nan, np.inf
    path = tmp_path / f"depth/0.{ending}"
    np.save(path, values) if ending == "npy" else Image.fromarray(values).save(path)
    edit(tmp_path, lambda s: s["frames"][0].update(depth_file_path=f"depth/0.{ending}", depth_unit_scale_factor=unit))
    expected = np.where(np.isfinite(values), values * unit, 0)
    depth = CaptureFrames(tmp_path)[0]["depth"]
    assert depth.dtype == np.float32 and np.abs(depth - expected).max() < 1e-6


def test_the_direction_of_any_format_can_be_overruled(tmp_path):
    write_transforms(tmp_path)
    expected = CaptureFrames(tmp_path)[1]["world2cam"]
    edit(tmp_path, lambda s: [f.update(transform_matrix=np.linalg.inv(f["transform_matrix"]).tolist()) for f in s["frames"]])
    frames = CaptureFrames(tmp_path, options=Options(pose="w2c"))
    assert np.allclose(frames[1]["world2cam"], expected) and "transforms.json, w2c;" in frames.description


def test_each_frame_may_have_a_camera_of_its_own(tmp_path):
    write_transforms(tmp_path)
    edit(tmp_path, lambda s: s["frames"][1].update(fl_x=ROOMS[1]["intrinsics"][0, 0]))
    frames = CaptureFrames(tmp_path)
    assert np.array_equal(frames[0]["intrinsics"], K)
    assert frames[1]["intrinsics"][0, 0] == ROOMS[1]["intrinsics"][0, 0] != K[0, 0]


@pytest.mark.parametrize("model, coefficients", [("OPENCV", (0.2, -0.1, 0.003, -0.002, 0.05)),
                                                 ("OPENCV_FISHEYE", (0.1, -0.02, 0.003, 0.001))])
def test_colors_of_a_lens_are_interpolated_where_it_put_them(model, coefficients):
    """An image that holds 3 times its column and row; tests/test_fusion.py compares the lens with OpenCV's."""
    k = np.array([[90.0, 0, 39], [0, 88, 31], [0, 0, 1]])
    v, u = np.indices((60, 80))
    seen = np.stack([3 * u, 3 * v, 0 * u], 2).astype(np.uint8)
    x, y = distorted_pixels((60, 80), (90.0, 88.0, 39.0, 31.0), model, coefficients)
    inside = (x > 0) & (x < 79) & (y > 0) & (y < 59)
    straight = undistort(seen, k, model, coefficients)
    error = straight[..., :2] - 3 * np.stack([x, y], 2)
    assert inside.mean() > 0.8 and np.abs(error[inside]).max() < 0.51
    assert not straight[(x > 79.5) | (y > 59.5)].any()


REFUSED = {
    "no unit": (lambda f: edit(f, lambda s: s.update(depth_unit_scale_factor=0)), "0.png: 0 units of depth per meter, expected a number > 0"),
    "no frames": (lambda f: (f / "transforms.json").write_text("{}"), "transforms.json: no list of frames"),
    "no depth": (lambda f: edit(f, lambda s: [frame.pop("depth_file_path") for frame in s["frames"]]), "depth_file_path"),
    "no camera": (lambda f: edit(f, lambda s: s.pop("fl_x")), "fl_x"),
    "k4": (lambda f: edit(f, lambda s: s.update(k4=0.1)), "k4: 0.1"),
    "turned": (lambda f: edit(f, lambda s: s.update(w=60, h=80)), "0.png: 80 x 60 pixels, but its camera is for 60 x 80"),
    "empty npy": (lambda f: array_of(f, b""), "0.npy: depth is not an NPY file"),
    "npz": (lambda f: array_of(f, b"PK" + 20 * b"1"), "0.npy: depth is not an NPY file"),
    "other lens": (lambda f: edit(f, lambda s: s.update(camera_model="EQUIRECTANGULAR")), "EQUIRECTANGULAR"),
    "mirrored": (lambda f: edit(f, lambda s: s["frames"][0].update(transform_matrix=np.diag([1, 1, -1, 1]).tolist())),
                 "mirrored"),
    "other depth": (lambda f: (edit(f, lambda s: s["frames"][0].update(depth_file_path="depth/0.exr")),
                               (f / "depth/0.exr").touch()), "depth as .exr is not read: convert it to .npy"),
    "not json": (lambda f: (f / "transforms.json").write_text("{"), "JSON"),
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "is not a folder of a capture"),
    "nothing": (lambda f: (f / "transforms.json").unlink(), "docs/captures.md.*SCENE/.color/N.jpg")}


def array_of(folder, content):
    edit(folder, lambda s: s["frames"][0].update(depth_file_path="depth/0.npy"))
    (folder / "depth/0.npy").write_bytes(content)


REFUSED_OTHERS = {
    "redwood, another number": (lambda f: (f / "depth/000003.png").rename(f / "depth/000007.png"),
                                "000003.png would go with 000007.png"),
    "redwood, no matrix": (lambda f: (f / "camera_intrinsic.json").write_text("{}"), "lacks intrinsic_matrix"),
    "replica, scale 0": (lambda f: (f / "cam_params.json").write_text(json.dumps({"camera": dict.fromkeys(
        ("fx", "fy", "cx", "cy"), 50) | {"scale": 0}})), "000000.png: 0 units of depth per meter, .*read as replica"),
    "sens, no unit": (lambda f: (f / "scene.sens").write_bytes((f / "scene.sens").read_bytes().replace(
        struct.pack("<f", 1000), struct.pack("<f", np.nan))), "scene.sens: nan units of depth per meter, expected"),
    "stray, cut": (lambda f: (f / "odometry.csv").write_text((f / "odometry.csv").read_text()[:-40]), "words in a line"),
    "stray, empty": (lambda f: (f / "odometry.csv").write_text(""), "odometry.csv: odometry file without a line"),
    "stray, video": (lambda f: (f / "rgb").rename(f / "video"), "unpack the video: .*ffmpeg"),
    "tum, empty": (lambda f: (f / "depth.txt").write_text("# time file"), "depth.txt: depth file without a line"),
    "tum, short": (lambda f: (f / "rgb.txt").write_text("1 a.png\n2"), "rgb has 1 words in a line, expected 2"),
    "tum, twice": (lambda f: (f / "rgb.txt").write_text(2 * "1 rgb/1.png\n"), "two images are named .*/1"),
    "sens, two": (lambda f: (f / "other.sens").write_bytes(b""), "other.sens and scene.sens"),
    "sens, empty": (lambda f: (f / "scene.sens").write_bytes(b""), "empty file"),
    "sens, damaged": (lambda f: (f / "scene.sens").write_bytes((f / "scene.sens").read_bytes()[:-300] + bytes(300)),
                      "scene.sens: depth of frame 3 is damaged"),
    "poses, w2c-wxyz, two": (lambda f: (f / "poses.txt").touch(), "pose.txt and poses.txt")}


@pytest.mark.parametrize("case", REFUSED_OTHERS)
def test_files_that_do_not_belong_together_or_are_damaged_are_named(tmp_path, case):
    folder = tmp_path / "capture"
    folder.mkdir()
    _, options = WRITERS[case.rpartition(", ")[0]](folder)
    spoil, message = REFUSED_OTHERS[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(CaptureFrames(folder, options=options))


def edit(folder, change):
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_was_looked_for(tmp_path, fault):
    write_transforms(tmp_path)
    spoil, message = REFUSED[fault]
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CaptureFrames(tmp_path)[0]


@pytest.mark.parametrize("name", ["tum", "7scenes", "poses, w2c-wxyz"])
def test_cameras_that_no_file_tells_are_asked_for_and_taken_from_a_file(tmp_path, name):
    _, options = WRITERS[name](tmp_path)
    kind = name.partition(",")[0]
    with pytest.raises(ValueError, match=rf"looked for intrinsics .* --intrinsics .*docs/captures.md#{kind}\)"):
        CaptureFrames(tmp_path)
    np.savetxt(tmp_path / "intrinsics.txt", K, "%.17g")
    assert np.array_equal(CaptureFrames(tmp_path, options=Options(pose=options.pose))[0]["intrinsics"], K)


@pytest.mark.parametrize("name, file", [("7scenes", "frame-000001.depth.png"), ("7scenes", "frame-000001.pose.txt"),
                                        ("nerfstudio", "images/1.png"), ("stray", "confidence/000001.png"),
                                        ("replica", "results/depth000001.png"), ("tum", "depth.txt")])
def test_missing_files_are_named_at_once_with_the_paragraph_of_the_format(tmp_path, name, file):
    (tmp_path / "a").mkdir()
    _, options = WRITERS[name](tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    missing = "4 color images, 3 depth images" if name == "replica" else f"{file} does not exist"
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{missing}.*read as {name}, .*captures.md#{name}\)"):
        CaptureFrames(tmp_path / "a", options=options)


@pytest.mark.parametrize("given", [{"pose": "w2c"}, {"depth_scale": 5000.0}, {"intrinsics": K}])
def test_options_of_captures_are_refused_for_other_layouts(tmp_path, given):
    write_frames(SCENE, tmp_path)
    for data in (tmp_path, "rooms"):
        with pytest.raises(ValueError, match=f"--{next(iter(given)).replace('_', '-')} says how a capture is read"):
            open_frames(data, labels=False, **given)


@pytest.mark.parametrize("out", [".", "capture", "capture/../capture", "link"])
def test_an_export_is_not_written_over_its_capture(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "capture").mkdir()
    (tmp_path / "link").symlink_to("capture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        captures.main(["capture", "--to", out])
    assert f"--to {out} is or holds capture" in capsys.readouterr().err


def test_every_format_has_a_paragraph_of_its_own():
    page = (ROOT / "docs/captures.md").read_text()
    assert re.findall(r"^### (\w+)", page, re.M) == list(FORMATS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_capture_that_was_exported_elsewhere_is_the_same(tmp_path, name, monkeypatch):
    """From any folder, by the command itself; distortion is undone."""
    source = tmp_path / "capture"
    source.mkdir()
    _, options = WRITERS[name](source)
    if name == "nerfstudio":
        edit(source, lambda s: s.update(k1=0.01))
    monkeypatch.chdir(tmp_path)
    given = ["--pose", options.pose] if options.pose else []
    given += ["--depth-scale", str(options.depth_scale)] if options.depth_scale else []
    given += ["--intrinsics", ",".join(map(repr, camera_of(SCENE)))] if options.intrinsics is not None else []
    monkeypatch.setattr("sys.argv", ["captures.py", "capture", "--to", "out", *given])
    monkeypatch.setattr("sys.path", ["", *sys.path])
    runpy.run_path(str(ROOT / "sources/captures.py"), run_name="__main__")
    exported = open_frames("out", labels=False)
    with pytest.raises(ValueError, match="capture is one scene in ScanNet's layout: give .*/out, which holds it"):
        open_frames("out/capture", labels=False)
    frames = CaptureFrames(source, options=options, undistort=undistort)
    assert exported.names == frames.names
    for one, other in zip(exported, frames):
        assert np.abs(one["depth"] - other["depth"]).max() <= 0.000501
        assert all(np.abs(one[key] - other[key]).max() < 1e-6 for key in ("world2cam", "intrinsics", "depth_intrinsics"))


def test_exported_frames_share_a_camera_and_points_and_colors_stay_on_their_surface(tmp_path):
    """Two lenses see a tilted wall, whose brightness grows with x."""
    v, u = np.indices((60, 80))
    scene = []
    for focal, center in ((70.0, 39.5), (77.0, 43.25)):
        camera = np.array([[focal, 0, center], [0, focal, 29.5], [0, 0, 1]])
        slope = (u - center) / focal
        depth = (2 / (1 - 0.3 * slope)).astype(np.float32)  # z = 2 + 0.3 x
        color = np.stack(3 * [128 + 80 * slope * depth], 2).round().astype(np.uint8)
        scene.append({**SCENE[0], "color": color, "depth": depth, "intrinsics": camera, "world2cam": np.eye(4)})
    source = tmp_path / "capture"
    source.mkdir()
    write_transforms(source, scene)
    edit(source, lambda s: s["frames"][1].update(fl_x=77.0, fl_y=77.0, cx=43.75))
    captures.main([str(source), "--to", str(tmp_path / "out")])
    for frame in open_frames(tmp_path / "out", labels=False):
        assert np.array_equal(frame["depth_intrinsics"], scene[0]["intrinsics"])
        fields = pixel_fields(frame, *depth_to_color(frame))
        x, _, z = fields["points"].T
        assert len(x) > 3500 and np.abs(z - 2 - 0.3 * x).max() < 0.3 * 0.5 / 70 * z.max() + 0.0006
        assert np.median(np.abs(fields["features"][:, 0] * 255 - 128 - 80 * x)) < 1.5  # JPEG errs beside black
    with pytest.raises(ValueError, match="b/1: depth has size .60, 80., frames before it have .30, 40."):
        list(OneCamera([{**scene[0], "name": "b/0", "depth": scene[0]["depth"][::2, ::2]},
                        {**scene[1], "name": "b/1"}]))


# ------------------------------------------------------------------------------------- a cloud alone


def write_cloud(path, sample):
    """An ascii PLY file of the points of a sample."""
    colors = (sample["features"] * 255).round().int().tolist()
    lines = ["ply", "format ascii 1.0", f"element vertex {len(colors)}", *(f"property float {c}" for c in "xyz"),
             *(f"property uchar {c}" for c in ("red", "green", "blue")), "end_header"]
    lines += [" ".join(map(repr, row)) for row in map(list.__add__, sample["points"].tolist(), colors)]
    path.write_text("\n".join(lines))


def predict_cloud(checkpoint, folder, frame):
    """Predicts the points of a frame as a cloud without it -> vertices of what is written."""
    write_cloud(folder / "cloud.ply", PointDataset([frame], 10 ** 6, (96, 128))[0])
    predict.main([str(checkpoint), "--data", str(folder / "cloud.ply"), "--out", str(folder / "out"), "--device", "cpu"])
    return read_ply_vertices(folder / "out/cloud.ply", dict.fromkeys(["scalar_label", "scalar_gate"], ("f4",)))


def test_a_network_without_clip_labels_a_cloud_as_it_labels_the_frame_of_these_points(tmp_path, quick_runs):
    train.main(small(tmp_path, "--no-clip --no-instances --epochs 1"))
    model, _, config = load_model(last_checkpoint(tmp_path), "cpu")
    vertices = predict_cloud(last_checkpoint(tmp_path), tmp_path, ROOMS[0])
    result, = predict_frames(model, [ROOMS[0]], config)
    labels = np.array(config["class_ids"])[result["labels"][ROOMS[0]["depth"] > 0]]
    assert np.array_equal(vertices["scalar_label"], labels)


def test_no_view_sees_a_cloud_alone_and_a_network_with_clip_says_so(tmp_path, trained, capsys):
    vertices = predict_cloud(last_checkpoint(trained[0]), tmp_path, ROOMS[0])
    assert not vertices["scalar_gate"].any()
    assert capsys.readouterr().err.count("no view sees its points") == 1
    with pytest.raises(ValueError, match="cloud.ply is a file, expected a folder of frames"):
        open_frames(tmp_path / "cloud.ply", labels=False)
    with pytest.raises(SystemExit):
        predict.main(["--data", str(tmp_path / "cloud.ply"), "--out", str(tmp_path / "out"), "--text", "chair"])
    assert "a cloud alone needs a checkpoint" in capsys.readouterr().err
