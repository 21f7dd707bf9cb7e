# SPDX-License-Identifier: MIT
"""scannet.py: what the files say arrives, in order, and files that are missing or malformed are named."""
import contextlib
import json
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from sources import scannet
from helpers import ALIGNMENT, CLASSES, POSE, TABLE, write_ply, write_scan, write_scannet


@pytest.fixture
def root(tmp_path):
    return write_scannet(tmp_path / "frames")


def test_label_and_instance_folders_are_optional(tmp_path):
    frames = scannet.ScanNetFrames(write_scannet(tmp_path, 1, 2, labels=False, suffix="jpg"), CLASSES)
    assert frames[1]["label"] is None and frames[1]["instance"] is None and frames[1]["color"].shape == (48, 64, 3)


def test_depth_is_read_in_metres_and_poses_as_camera_to_world(root):
    frame = scannet.ScanNetFrames(root, CLASSES)[1]
    millimetres = np.asarray(Image.open(root / "scene0000_00/depth/1.png"))
    assert frame["depth"].dtype == np.float32 and np.abs(frame["depth"] * 1000.0 - millimetres).max() < 1e-3
    assert np.abs(frame["world2cam"] @ POSE - np.eye(4)).max() < 1e-12


def test_lost_poses_are_skipped_and_counted(root):
    for frame, value in ((0, "-inf"), (2, "nan")):
        (root / f"scene0001_00/pose/{frame}.txt").write_text(f"{value} {value} {value} {value}\n" * 4)
    frames = scannet.ScanNetFrames(root, CLASSES)
    assert frames.num_skipped == 2 and frames.names[3:] == ["scene0001_00/1"] and len(frames) == 4


def test_frames_are_in_numerical_order_and_splits_choose_them(tmp_path):
    root = write_scannet(tmp_path / "frames", 2, 12)
    frames = scannet.ScanNetFrames(root, CLASSES)
    assert frames.names[:12] == [f"scene0000_00/{n}" for n in range(12)]
    split = tmp_path / "val.txt"
    split.write_text("scene0001_00\nscene0000_00/11\n")
    frames = scannet.ScanNetFrames(root, CLASSES, split)
    assert frames.names == [f"scene0001_00/{n}" for n in range(12)] + ["scene0000_00/11"]


def test_class_list_maps_ids_to_consecutive_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("0 unlabeled\n7 night stand\n\n3 wall\n9 wall\n* unlabeled\n")
    classes = scannet.load_classes(path)
    assert classes == {0: None, 7: "night stand", 3: "wall", 9: "wall", "*": None}
    table = scannet.ClassTable(classes)
    assert table.names == ["night stand", "wall"]
    assert table(np.array([0, 7, 3, 9, 5, 65535], np.uint16)).tolist() == [-1, 0, 1, 1, -1, -1]


def test_ids_outside_of_a_list_with_a_wildcard_are_ignored(root):
    Image.fromarray(np.full((48, 64), 1190, np.uint16)).save(root / "scene0000_00/label-filt/0.png")
    frames = scannet.ScanNetFrames(root, {**CLASSES, "*": None})
    assert (frames[0]["label"] == -1).all() and frames.class_names == ["wall", "chair", "lamp"]


def test_missing_files_are_named_before_training_starts(root):
    (root / "scene0001_00/depth/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="depth.1.png"):
        scannet.ScanNetFrames(root, CLASSES)
    (root / "scene0000_00/intrinsic/intrinsic_color.txt").unlink()
    with pytest.raises(FileNotFoundError, match="colour intrinsics.*intrinsic_color.txt"):
        scannet.ScanNetFrames(root, CLASSES)
    for missing in (root / "nowhere", root / "scene0000_00/pose/0.txt"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            scannet.ScanNetFrames(missing, CLASSES)
    with pytest.raises(FileNotFoundError, match="class list"):
        scannet.ScanNetFrames(root, root / "classes.txt")


@pytest.mark.parametrize("kind", ["color", "depth", "label-filt", "instance-filt"])
def test_truncated_images_are_named(root, kind):
    for suffix in ("png", "jpg") if kind == "color" else ("png",):
        if suffix == "jpg":
            (root / "scene0000_00/color/1.png").unlink()
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(
                root / "scene0000_00/color/1.jpg")
        path = root / "scene0000_00" / kind / f"1.{suffix}"
        content = path.read_bytes()
        for keep in (0, 4, 20, 60, len(content) // 2):
            path.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=f"{kind}.1.{suffix}.*cannot be decoded"):
                scannet.ScanNetFrames(root, CLASSES)[1]


@pytest.mark.parametrize("text, message", [
    ("1 0 0\n0 1 0\n0 0 1\n", r"pose has shape \(3, 3\), expected \(4, 4\)"),
    ("0 0 0 0\n" * 4, "pose is not a rotation"),
    ("1 0 0 0\n0 1 0 0\n0 0 1 0\n2 3 4 1\n", "pose is not a rotation"),
    ("3 0 0 0\n0 3 0 0\n0 0 3 0\n0 0 0 1\n", "pose is not a rotation"), ("", "pose has shape"),
    ("1 0 0 0\n0 1 0 0\n0 0 -1 0\n0 0 0 1\n", "pose is mirrored, det R = -1"),
    ("1 0 0 2e8\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "pose shifts by more than 1e.08 m"),
    ("1e300 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "pose is not a rotation"),
    ("1 0 0 0\n0 1 0\n", "pose is not a matrix"), ("a b\nc d\n", "pose is not a matrix"),
    ("1 " * 40_000, "pose file has 80,000 bytes")])
def test_malformed_poses_are_named(root, text, message):
    (root / "scene0000_00/pose/1.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"pose.1.txt: {message}"):
        scannet.ScanNetFrames(root, CLASSES)


@pytest.mark.parametrize("text, message", [("525.0\n", r"shape \(1, 1\), expected \(3, 3\) or \(4, 4\)"),
                                           ("0 0 0\n0 0 0\n0 0 1\n", "not a pinhole"),
                                           ("nan 0 1\n0 nan 1\n0 0 1\n", "not a pinhole"),
                                           ("50 0 31\n3 50 23\n0 0 1\n", "not a pinhole"),
                                           ("0.8 0 0.5\n0 1.1 0.5\n0 0 1\n", "not in pixels"),
                                           ("5e7 0 31\n0 5e7 23\n0 0 1\n", "not in pixels")])
def test_malformed_intrinsics_are_named(root, text, message):
    (root / "scene0000_00/intrinsic/intrinsic_color.txt").write_text(text)
    with pytest.raises(ValueError, match=f"intrinsic_color.txt: colour intrinsics.*{message}"):
        scannet.ScanNetFrames(root, CLASSES)


@pytest.mark.parametrize("kind", ["color", "depth"])
def test_a_principal_point_far_outside_of_the_images_is_named(root, kind):
    np.savetxt(root / f"scene0000_00/intrinsic/intrinsic_{kind}.txt", np.array([[50, 0, 950], [0, 50, 20], [0, 0, 1]]))
    with pytest.raises(ValueError, match=rf"intrinsic_{kind}.txt: the principal point \[950.0, 20.0\] is far outside"):
        scannet.ScanNetFrames(root, CLASSES)


def test_poses_in_utm_coordinates_are_read(root):
    pose = POSE + [[0, 0, 0, 4.5e5], [0, 0, 0, 9.9e6], [0, 0, 0, 300], [0, 0, 0, 0]]
    np.savetxt(root / "scene0000_00/pose/0.txt", pose)
    assert np.abs(np.linalg.inv(scannet.ScanNetFrames(root, CLASSES)[0]["world2cam"]) - pose).max() < 1e-6


def test_depth_of_another_size_needs_its_own_intrinsics(root):
    (root / "scene0000_00/intrinsic/intrinsic_depth.txt").unlink()
    with pytest.raises(ValueError, match=r"depth has size \(24, 32\), colour has size \(48, 64\), .*intrinsic_depth"):
        scannet.ScanNetFrames(root, CLASSES)[0]


@pytest.mark.parametrize("file, image, message", [
    ("depth/0.png", np.zeros((24, 32, 3), np.uint8), "8-bit depth image of RGB, expected greyscale of 16 bits"),
    ("depth/0.png", np.zeros((24, 32), np.uint8), "8-bit depth image of greyscale, expected greyscale of 16 bits"),
    ("depth/0.png", np.zeros((20, 32), np.uint16), r"the depth image has size \(20, 32\), but .*png has \(24, 32\)"),
    ("color/0.png", np.zeros((9, 9, 3), np.uint8), r"the color image has size \(9, 9\), but 0.png has \(48, 64\)"),
    ("color/0.png", np.zeros((48, 64), np.uint16), "colour image has mode I"),
    ("label-filt/0.png", np.zeros((48, 64, 3), np.uint8), "8-bit label image of RGB"),
    ("label-filt/0.png", np.zeros((48, 64), bool), "1-bit label image of greyscale, expected greyscale of 8"),
    ("label-filt/0.png", np.zeros((10, 12), np.uint16), r"label has size \(10, 12\)"),
    *(("label-filt/0.png", np.full((48, 64), bad, np.uint16), f"label {bad} is not in the class list")
      for bad in (3, 41, 65535))])
def test_images_of_the_wrong_kind_size_or_class_are_named(root, file, image, message):
    frames = scannet.ScanNetFrames(root, CLASSES)
    Image.fromarray(image).save(root / "scene0000_00" / file)
    with pytest.raises(ValueError, match=f"{file.replace('/', '.')}: {message}"):
        frames[0]


def test_images_of_two_sizes_in_a_scene_are_refused_because_they_share_intrinsics(root):
    Image.fromarray(np.ones((48, 64), np.uint16)).save(root / "scene0000_00/depth/1.png")
    frames = scannet.ScanNetFrames(root, CLASSES)
    with pytest.raises(ValueError, match=r"depth/1.png: the depth image has size \(48, 64\), but 0.png has \(24, 32\)"):
        frames[1]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP"])
def test_formats_other_than_jpeg_and_png_are_not_decoded(root, kind):
    for path in (root / "scene0000_00/color/1.png", root / "scene0000_00/label-filt/1.png"):
        whole = path.read_bytes()
        Image.open(path).convert("L").save(path, kind)
        with pytest.raises(ValueError, match="1.png: .* image cannot be decoded"):
            scannet.ScanNetFrames(root, CLASSES)[1]
        path.write_bytes(whole)


def with_size(content, width, height):
    """A PNG whose header claims another size, with a valid checksum."""
    head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


@pytest.mark.parametrize("width, height, message", [(20_000, 20_000, "cannot be decoded: .*exceeds limit"),
                                                    (10_000, 6_000, "has 10000 x 6000 pixels, more than 50,000,000"),
                                                    (2 ** 31 - 1, 1, "cannot be decoded: .*exceeds limit")])
def test_images_that_claim_a_huge_size_take_no_memory(root, width, height, message):
    frames = scannet.ScanNetFrames(root, CLASSES)
    for kind in ("color", "depth", "instance-filt"):
        path = root / f"scene0000_00/{kind}/1.png"
        whole = path.read_bytes()
        path.write_bytes(with_size(whole, width, height))
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"{kind}/1.png: .*image ({message})"):
            frames[1]
        assert tracemalloc.get_traced_memory()[1] < 2 ** 22
        tracemalloc.stop()
        path.write_bytes(whole)


def test_every_flipped_bit_of_a_png_is_noticed_or_changes_nothing(root):
    """Also those that decoding alone does not notice."""
    path = root / "scene0000_00/depth/0.png"
    whole = path.read_bytes()
    image = scannet.read_index_image(path, "depth", (16,))
    silent = refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        try:
            assert np.array_equal(scannet.read_index_image(path, "depth", (16,)), image)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            with contextlib.suppress(Exception):
                silent += not np.array_equal(np.asarray(Image.open(path)), image)
    assert refused >= len(whole) // 7 - 1 and silent > 0


def test_palette_images_hold_indices(root):
    path = root / "scene0000_00/label-filt/0.png"
    ids = np.asarray(Image.open(path)).astype(np.uint8)
    image = Image.new("P", ids.shape[::-1])
    image.putdata(ids.ravel().tolist())
    image.putpalette([7] * 768)
    expected = scannet.ScanNetFrames(root, CLASSES)[0]["label"]
    image.save(path)
    assert np.array_equal(scannet.ScanNetFrames(root, CLASSES)[0]["label"], expected)


# ------------------------------------------------------------------------------------------------------------ folders


def test_upper_case_suffixes_are_read(root):
    path = root / "scene0000_00/color/1.png"
    path.rename(path.with_suffix(".PNG"))
    assert (scannet.ScanNetFrames(root, CLASSES)[1]["color"][:, :, 2] == 10).all()


def test_two_images_of_one_frame_are_refused(root):
    Image.new("RGB", (64, 48)).save(root / "scene0001_00/color/1.JPG")
    with pytest.raises(ValueError, match=r"color.1.* and 1.* are two images of one frame"):
        scannet.ScanNetFrames(root, CLASSES)


def test_a_scene_without_colour_images_is_named(root):
    for path in (root / "scene0001_00/color").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="scene0001_00/color: no colour image"):
        scannet.ScanNetFrames(root, CLASSES)


def split_frames(root, *texts):
    """One source per split."""
    for number, text in enumerate(texts):
        (root / f"{number}.txt").write_text(text)
    return [scannet.ScanNetFrames(root, CLASSES, root / f"{number}.txt") for number in range(len(texts))]


def test_splits_that_share_a_frame_are_refused(root):
    scannet.check_splits(split_frames(root, "scene0000_00/1\n", "scene0001_00\nscene0000_00/0\n"))
    with pytest.raises(ValueError, match="scene0000_00/1 is in two splits, .*0.txt and .*1.txt"):
        scannet.check_splits(split_frames(root, "scene0000_00/1\n", "scene0001_00\nscene0000_00\n"))


@pytest.mark.parametrize("kind", ["label-filt", "instance-filt"])
def test_a_folder_that_only_some_scenes_have_is_named(root, kind):
    """Within a split and across splits; if no scene has it, it is not wanted."""
    shutil.rmtree(root / "scene0001_00" / kind)
    for texts in (("scene0000_00\nscene0001_00\n",), ("scene0000_00\n", "scene0001_00\n")):
        sources = split_frames(root, *texts)
        with pytest.raises(ValueError, match=f"scene0001_00/{kind} does not exist, but .*scene0000_00/{kind} does"):
            scannet.check_splits(sources)
        scannet.check_splits(sources, kinds=())
    shutil.rmtree(root / "scene0000_00" / kind)
    scannet.check_splits(split_frames(root, "scene0000_00\n", "scene0001_00\n"))


@pytest.mark.parametrize("text", ["1\n", "wall 1\n", "1 wall\n1 chair\n", "* wall\n", "0 unlabeled\n", "", "-1 wall\n",
                                  "1.5 wall\n", "1" * 5000 + " wall\n", "1 wa\x1b[2Jll\n", "1 t\udce9l\n"])
def test_malformed_class_lists_are_named(tmp_path, text):
    (tmp_path / "classes.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="classes.txt"):
        scannet.load_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("classes", [{"1": "wall"}, {-1: "wall"}, {1.0: "wall"}, {1: 5}, {1: ""}, {"*": "wall"}])
def test_class_dicts_of_another_form_are_refused(root, classes):
    with pytest.raises(ValueError, match="a class list maps ids >= 0 to names"):
        scannet.ScanNetFrames(root, classes)


def test_large_ids_take_no_memory():
    tracemalloc.start()
    table = scannet.ClassTable({10 ** 17: "far", 70_000: None, 3: "near"})
    index = table(np.array([[3, 10 ** 17, 70_000], [4, 65_536, 2 ** 62]]))
    assert tracemalloc.get_traced_memory()[1] < 2 ** 23
    tracemalloc.stop()
    assert index.tolist() == [[1, 0, -1], [-2, -2, -2]] and table.names == ["far", "near"]
    assert scannet.ClassTable({3: "near", "*": None})(np.array([3, 2 ** 62])).tolist() == [0, -1]


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeff1 wall\r\n2 chair\r\n".encode())
    assert scannet.load_classes(tmp_path / "classes.txt") == {1: "wall", 2: "chair"}


@pytest.mark.parametrize("text, error, message", [
    ("", ValueError, "val.txt is empty"), ("\n \n", ValueError, "val.txt is empty"),
    *((text, ValueError, "val.txt: .* is not the name of a scene") for text in (
        "../frames/scene0000_00", "/etc/passwd", ".", "scene0000_00/..", "scene0000_00/color/1", "a\\\\b", "//", "a\0b",
        "n" * 300)),
    ("scene0009_00\n", FileNotFoundError, "val.txt: .* has no scene 'scene0009_00'"),
    ("scene0000_00/77\n", FileNotFoundError, "val.txt: .*no colour image of frame '77'"),
    ("scene0000_00\nscene0000_00/1\n", ValueError, "scene0000_00/1 is named more than once")])
def test_bad_splits_are_named(root, tmp_path, text, error, message):
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(error, match=message):
        scannet.ScanNetFrames(root, CLASSES, tmp_path / "val.txt")
    with pytest.raises(FileNotFoundError, match="split file"):
        scannet.ScanNetFrames(root, CLASSES, tmp_path / "other.txt")


def test_a_folder_without_usable_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no <scene>/color folder"):
        scannet.ScanNetFrames(tmp_path, CLASSES)
    root = write_scannet(tmp_path / "frames", 1, 1)
    (root / "scene0000_00/pose/0.txt").write_text("inf inf inf inf\n" * 4)
    with pytest.raises(ValueError, match="no frame left .1 skipped"):
        scannet.ScanNetFrames(root, CLASSES)


# ------------------------------------------------------------------------------------------------------ posed frames

KINECT = np.array([[585, 0, 320], [0, 585, 240], [0, 0, 1.0]])


def write_posed(folder, frames=2, suffix="png", size=(48, 64), first=0):
    """A folder as in 7-Scenes; colour and depth hold the frame's number, the first depth pixel 65535."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + frames):
        stem = folder / f"frame-{number:06d}"
        Image.fromarray(np.full((*size, 3), number, np.uint8)).save(f"{stem}.color.{suffix}")
        depth = np.full(size, 1000 + number, np.uint16)
        depth[0, 0] = 65535
        Image.fromarray(depth).save(f"{stem}.depth.png")
        np.savetxt(f"{stem}.pose.txt", POSE)
    return folder


SMALL = np.array([[58.5, 0, 32], [0, 58.5, 24], [0, 0, 1.0]])


def test_posed_frames_arrive_as_they_were_written(tmp_path):
    """Also with the intrinsics in a file, and frames directly in the folder."""
    root = write_posed(tmp_path / "chess/seq-01").parent
    write_posed(root / "seq-02", 11)
    np.savetxt(tmp_path / "k.txt", SMALL)
    for frames in (scannet.PosedFrames(root, SMALL), scannet.PosedFrames(str(root), tmp_path / "k.txt")):
        assert frames.names[:3] == ["seq-01/frame-000000", "seq-01/frame-000001", "seq-02/frame-000000"]
        assert len(frames) == 13 and frames.num_skipped == 0 and frames.class_names == ()
        frame = frames[12]
        data.check_frame(frame)
        assert frame["name"] == "seq-02/frame-000010" and (frame["color"] == 10).all()
        assert frame["depth"][0, 0] == 0 and np.abs(frame["depth"].ravel()[1:] - 1.01).max() < 1e-6
        assert np.abs(frame["world2cam"] @ POSE - np.eye(4)).max() < 1e-12 and frame["label"] is None
        assert np.array_equal(frame["intrinsics"], SMALL) and np.array_equal(frame["depth_intrinsics"], SMALL)
        assert np.array_equal(frames.color(12), frame["color"])
        assert all(Path(path).is_file() for path in frames.files(12))
    alone = scannet.PosedFrames(root / "seq-01", SMALL)
    assert alone.names == ["seq-01/frame-000000", "seq-01/frame-000001"]
    (tmp_path / "split.txt").write_text("seq-02/frame-000003\nseq-01\n")
    frames = scannet.PosedFrames(root, SMALL, tmp_path / "split.txt")
    assert frames.names == ["seq-02/frame-000003", "seq-01/frame-000000", "seq-01/frame-000001"]


def test_posed_frames_skip_lost_poses_and_take_jpeg(tmp_path):
    write_posed(tmp_path / "a", 3, "JPG")
    (tmp_path / "a/frame-000001.pose.txt").write_text("-inf -inf -inf -inf\n" * 4)
    frames = scannet.PosedFrames(tmp_path, SMALL)
    assert frames.names == ["a/frame-000000", "a/frame-000002"] and frames.num_skipped == 1


@pytest.mark.parametrize("change, error, message", [
    (lambda root: (root / "a/frame-000001.depth.png").unlink(), FileNotFoundError, "frame-000001.depth.png does not"),
    (lambda root: (root / "a/frame-000001.pose.txt").unlink(), FileNotFoundError, "frame-000001.pose.txt does not"),
    (lambda root: write_posed(root / "a", 2, "jpg"), ValueError, "two images of one frame"),
    (lambda root: Image.fromarray(np.ones((9, 9), np.uint16)).save(root / "a/frame-000001.depth.png"), ValueError,
     r"frame-000001.depth.png: depth has size \(9, 9\), colour has size \(48, 64\)"),
    (lambda root: Image.fromarray(np.ones((48, 64), np.uint8)).save(root / "a/frame-000001.depth.png"), ValueError,
     "frame-000001.depth.png: 8-bit depth"),
    (lambda root: np.savetxt(root / "a/frame-000001.pose.txt", np.diag([1, 1, -1, 1])), ValueError,
     "frame-000001.pose.txt: pose is mirrored")])
def test_faults_of_posed_frames_are_named(tmp_path, change, error, message):
    write_posed(tmp_path / "a")
    change(tmp_path)
    with pytest.raises(error, match=message):
        scannet.PosedFrames(tmp_path, SMALL)[1]


def test_posed_frames_refuse_other_intrinsics_and_folders(tmp_path):
    write_posed(tmp_path / "frames/a")
    for intrinsics, message in ((np.eye(4), "shape"), (np.zeros((3, 3)), "not a pinhole"),
                                (KINECT * [[1], [1], [2]], "not a pinhole"),
                                (np.diag([0.9, 0.9, 1]), "not in pixels")):
        with pytest.raises(ValueError, match=message):
            scannet.PosedFrames(tmp_path / "frames", intrinsics)
    with pytest.raises(ValueError, match="principal point"):
        scannet.PosedFrames(tmp_path / "frames", KINECT + [[0, 0, 0], [0, 0, 1000], [0, 0, 0]])[0]
    with pytest.raises(ValueError, match="neither frame-"):
        scannet.PosedFrames(tmp_path, KINECT)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scannet.PosedFrames(tmp_path / "nowhere", KINECT)


# ------------------------------------------------------------------------------------------------------------- scans

@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    write_scan(tmp_path / "scans", "scene0000_00", rng.normal(size=(6, 3)).astype(np.float32),
               rng.integers(0, 256, (6, 3)), [1, 1, 5, 5, 0, 40], [70, 70, 12, 12, 5, 900],
               [(0, "wall", [70]), (1, "office chair", [12, 900])])
    (tmp_path / "labels.tsv").write_text(TABLE)
    return tmp_path / "scans"


NYU40 = {1: "wall", 5: "chair", "*": None}


def test_a_scan_arrives_as_it_was_written(scans):
    scenes = scannet.ScanNetScenes(scans, NYU40)
    scan, rng = scenes[0], np.random.default_rng(0)
    assert len(scenes) == 1 and scenes.names == ["scene0000_00"] and scenes.class_names == ["wall", "chair"]
    assert np.array_equal(scan["points"], rng.normal(size=(6, 3)).astype(np.float32))
    assert np.abs(scan["colors"] * 255 - rng.integers(0, 256, (6, 3))).max() < 1e-4
    assert np.allclose(scan["alignment"], ALIGNMENT)
    assert scan["labels"].tolist() == [0, 0, 1, 1, -1, -1]
    assert scan["instances"].tolist() == [0, 0, 1, 1, -1, 1]
    assert scan["superpoints"].tolist() == [2, 2, 1, 1, 0, 3]


def test_a_label_map_names_what_the_annotation_says(scans):
    classes = {1: "wall", 88: "office chair", "*": None}
    scan = scannet.ScanNetScenes(scans, classes, label_map=scans.parent / "labels.tsv")[0]
    assert scan["labels"].tolist() == [0, 0, 1, 1, -1, 1]


def test_an_unlabelled_scan_needs_its_mesh_alone(scans):
    for path in scans.glob("*/*"):
        if not path.name.endswith("_vh_clean_2.ply"):
            path.unlink()
    scan = scannet.ScanNetScenes(scans, None, align=False)[0]
    assert set(scan) == {"name", "points", "colors", "alignment"} and np.array_equal(scan["alignment"], np.eye(4))
    with pytest.raises(FileNotFoundError, match="scene0000_00.txt"):
        scannet.ScanNetScenes(scans, None)


def test_label_images_can_be_read_as_nyu40(root, tmp_path):
    (tmp_path / "labels.tsv").write_text(TABLE)
    label_map = scannet.read_label_map(tmp_path / "labels.tsv", "id", "nyu40id")
    assert label_map == {1: 1, 2: 5, 88: 5}
    frames = scannet.ScanNetFrames(root, scannet.remap_classes({1: "wall", 5: "chair"}, label_map))
    assert frames.class_names == ["wall", "chair"] and np.unique(frames[0]["label"]).tolist() == [-1, 0, 1]
    classes = scannet.frame_classes({5: "chair", 1: "wall"}, tmp_path / "labels.tsv")
    assert classes == {2: "chair", 88: "chair", 1: "wall", "*": None}
    assert scannet.ScanNetFrames(root, classes).class_names == ["chair", "wall"]  # the order of the list


def test_names_of_scenes_may_hold_spaces(root, tmp_path):
    (root / "scene0000_00").rename(root / "living room")
    (tmp_path / "split.txt").write_text("living room/1\n\n  scene0001_00/2  \n")
    assert scannet.ScanNetFrames(root, None, tmp_path / "split.txt").names == ["living room/1", "scene0001_00/2"]


def test_official_class_lists():
    """ScanNet's benchmark: 20 NYU40 ids and 200 ids of its own table."""
    folder = Path(scannet.__file__).parent / "labels"
    ids = np.arange(2000)
    table = scannet.ClassTable(scannet.load_classes(folder / "scannet20.txt"))
    names, index = table.names, table(ids)
    assert np.flatnonzero(index >= 0).tolist() == [*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39] and len(names) == 20
    assert names[index[5]] == "chair" and names[index[39]] == "otherfurniture"
    assert index[13] == index[0] == index[-1] == -1
    table = scannet.ClassTable(scannet.load_classes(folder / "scannet200.txt"))
    names, index = table.names, table(ids)
    assert len(names) == 200 and (index >= 0).sum() == 200 and names[index[1191]] == "mattress"
    assert names[index[2]] == "chair" and names[index[3]] == "floor" and index[0] == index[12] == index[1177] == -1


@pytest.mark.parametrize("suffix", ["_vh_clean_2.ply", ".txt", "_vh_clean_2.labels.ply", ".aggregation.json",
                                    "_vh_clean_2.0.010000.segs.json"])
def test_missing_files_of_a_scan_are_named(scans, suffix):
    split = scans.parent / "split.txt"
    split.write_text("scene0000_00/17\nscene0000_00/18\n")
    assert len(scannet.ScanNetScenes(scans, NYU40, split)) == 1
    (scans / "scene0000_00" / f"scene0000_00{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=f"scene0000_00{suffix}"):
        scannet.ScanNetScenes(scans, NYU40, split)


@pytest.mark.parametrize("suffix, content, message", [
    ("_vh_clean_2.ply", b"", "not a binary_little_endian PLY"),
    ("_vh_clean_2.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nend_header\n0 0 0\n", "not a binary_little_endian"),
    ("_vh_clean_2.ply", b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nproperty float x\nend_header\n",
     "no property blue, green, red, y, z"),
    ("_vh_clean_2.ply", b"ply\nformat binary_little_endian 1.0\nelement face 9\nend_header\n", "not `vertex`"),
    (".txt", b"colorHeight = 968\n", "no axisAlignment"),
    ("_vh_clean_2.ply", b"end_header\n", "not a binary_little_endian"),
    ("_vh_clean_2.ply", b"ply\nformat binary_little_endian 1.0\nelement\nend_header\n", "not `vertex`"),
    *(("_vh_clean_2.ply", f"ply\nformat binary_little_endian 1.0\nelement vertex{count}\nproperty float x\nend_header\n"
       .encode(), "no number of vertices") for count in ("", " 0", " -3", " many", " 1" + "0" * 20)),
    (".txt", b"axisAlignment = 1 0 0\n", "axisAlignment has 3 finite numbers"),
    (".txt", b"axisAlignment = 1 0 0 a\n", "axisAlignment: could not convert"),
    (".txt", b"axisAlignment = 1 0 0 0 0 1 0 0 0 0 -1 0 0 0 0 1\n", "axisAlignment is mirrored"),
    (".txt", b"axisAlignment = 2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1\n", "axisAlignment is not a rotation"),
    *(("_vh_clean_2.0.010000.segs.json", b'{"segIndices": %s}' % value, "segIndices is no") for value in (
        b"3", b'{"a": 1}')),
    *(("_vh_clean_2.0.010000.segs.json", b'{"segIndices": [70, 70, 12, 12, 5, %s]}' % value,
       "segIndices is not a list of whole numbers") for value in (b"-1", b"900.0", b'"900"', b"true", b"NaN", b"null",
                                                                  b"[900]", b"9" * 30)),
    ("_vh_clean_2.0.010000.segs.json", b"[" * 100_000, "is not JSON"),
    ("_vh_clean_2.0.010000.segs.json", b"\xff", "is not UTF-8 text"),
    *((".aggregation.json", b'{"segGroups": [%s]}' % group, rf"segGroups\[0\].* {words}") for group, words in (
        (b"3", "lacks"), (b'{"objectId": 1, "label": "wall"}', "lacks segments, objectId or label"),
        (b'{"objectId": -1, "label": "wall", "segments": []}', "is not a list of whole"),
        (b'{"objectId": 1, "label": ["wall"], "segments": []}', "is no text"),
        (b'{"objectId": 1, "label": "wall", "segments": [1.5]}', "is not a list of whole"))),
    (".aggregation.json", b'{"segGroups": [{"objectId": 1, "label": "wall", "segments": [71]}]}', "segment 71, which"),
    (".aggregation.json", b'{"segGroups": [{"objectId": 1, "label": "wall", "segments": [70, 70]}]}', "listed twice"),
    (".aggregation.json", b'{"segGroups": [{"objectId": 1, "label": "wall", "segments": [70]}, '
     b'{"objectId": 2, "label": "wall", "segments": [12, 70]}]}', "object 2 has a segment that is listed twice"),
    ("_vh_clean_2.0.010000.segs.json", b'{"segIndices": [1, 2]}', "2 entries, the mesh has 6 vertices"),
    ("_vh_clean_2.0.010000.segs.json", b'{"segIndices": [1, 2', "is not JSON"),
    ("_vh_clean_2.0.010000.segs.json", b"{}", "no entry segIndices"),
    (".aggregation.json", b"[]", "no entry segGroups")])
def test_malformed_files_of_a_scan_are_named(scans, suffix, content, message):
    (scans / "scene0000_00" / f"scene0000_00{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"scene0000_00{suffix}.*{message}"):
        scannet.ScanNetScenes(scans, NYU40)[0]


def test_objects_that_are_listed_again_are_one_object(scans):
    """As in scene0217_00 of ScanNet, whose second half repeats the first under other ids."""
    path = scans / "scene0000_00/scene0000_00.aggregation.json"
    expected = scannet.ScanNetScenes(scans, NYU40)[0]
    content = json.loads(path.read_text())
    content["segGroups"] += [{**group, "objectId": group["objectId"] + 31} for group in content["segGroups"]]
    path.write_text(json.dumps(content))
    assert np.array_equal(scannet.ScanNetScenes(scans, NYU40)[0]["instances"], expected["instances"])


@pytest.mark.parametrize("changes, suffix, message", [
    ({"red": ("float", np.ones(6))}, "_vh_clean_2.ply", "property red has type f4, expected u1"),
    ({"x": ("ushort", np.ones(6))}, "_vh_clean_2.ply", "property x has type u2, expected f4 or f8"),
    ({"x": ("float", np.full(6, np.nan))}, "_vh_clean_2.ply", "vertices are not finite"),
    ({"x": ("float", np.full(6, 1e9))}, "_vh_clean_2.ply", "beyond 1e.08 m"),
    ({"label": ("float", np.ones(6))}, "_vh_clean_2.labels.ply", "property label has type f4"),
    ({"label": ("uchar", np.ones(5))}, "_vh_clean_2.labels.ply", "has 5 vertices with labels from 1, expected")])
def test_vertices_of_another_type_or_range_are_named(scans, changes, suffix, message):
    count = len(next(iter(changes.values()))[1])
    columns = {**{axis: ("float", np.zeros(count)) for axis in "xyz"},
               **{channel: ("uchar", np.zeros(count)) for channel in ("red", "green", "blue")}, **changes}
    write_ply(scans / f"scene0000_00/scene0000_00{suffix}", columns)
    with pytest.raises(ValueError, match=f"scene0000_00{suffix}.*{message}"):
        scannet.ScanNetScenes(scans, NYU40)[0]


@pytest.mark.parametrize("rows", ["", "wall\tx\n", "wall\t1.5\n", "wall\t-1\n", "\t1\n", "w" * 200_000 + "\t1\n",
                                  "w\udcff\t1\n"])
def test_malformed_label_maps_are_named(tmp_path, rows):
    (tmp_path / "labels.tsv").write_bytes(("raw_category\tid\n" + rows).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="labels.tsv"):
        scannet.read_label_map(tmp_path / "labels.tsv", "raw_category", "id")


def test_a_truncated_mesh_and_labels_outside_of_the_list_are_named(scans):
    path = scans / "scene0000_00" / "scene0000_00_vh_clean_2.ply"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="_vh_clean_2.ply is truncated: 6 vertices of 16 bytes"):
        scannet.ScanNetScenes(scans, NYU40)[0]
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="labels.ply: label 40 is not in the class list"):
        scannet.ScanNetScenes(scans, {0: None, 1: "wall", 5: "chair"})[0]
    (scans.parent / "labels.tsv").write_text(TABLE.replace("office chair", "stool"))
    with pytest.raises(ValueError, match="aggregation.json: label 'office chair' is not in the label map"):
        scannet.ScanNetScenes(scans, NYU40, label_map=scans.parent / "labels.tsv")[0]
    (scans.parent / "labels.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="no table with columns raw_category and id"):
        scannet.ScanNetScenes(scans, NYU40, label_map=scans.parent / "labels.tsv")
