# SPDX-License-Identifier: MIT
"""scannet.py: what the files say arrives, in order, and files that are missing or malformed are named."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import scannet
from helpers import ALIGNMENT, CLASSES, POSE, TABLE, write_scan, write_scannet


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
    ("1 0 0 0\n0 1 0\n", "pose is not a matrix"), ("a b\nc d\n", "pose is not a matrix")])
def test_malformed_poses_are_named(root, text, message):
    (root / "scene0000_00/pose/1.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"pose.1.txt: {message}"):
        scannet.ScanNetFrames(root, CLASSES)


@pytest.mark.parametrize("text, message", [("525.0\n", r"shape \(1, 1\), expected \(3, 3\) or \(4, 4\)"),
                                           ("0 0 0\n0 0 0\n0 0 1\n", "not a pinhole"),
                                           ("nan 0 1\n0 nan 1\n0 0 1\n", "not a pinhole")])
def test_malformed_intrinsics_are_named(root, text, message):
    (root / "scene0000_00/intrinsic/intrinsic_color.txt").write_text(text)
    with pytest.raises(ValueError, match=f"intrinsic_color.txt: colour intrinsics.*{message}"):
        scannet.ScanNetFrames(root, CLASSES)


def test_depth_of_another_size_needs_its_own_intrinsics(root):
    (root / "scene0000_00/intrinsic/intrinsic_depth.txt").unlink()
    with pytest.raises(ValueError, match=r"depth has size \(24, 32\), colour has size \(48, 64\), .*intrinsic_depth"):
        scannet.ScanNetFrames(root, CLASSES)[0]


@pytest.mark.parametrize("file, image, message", [
    ("depth/0.png", np.zeros((24, 32, 3), np.uint8), "8-bit depth image of RGB, expected greyscale of 16 bits"),
    ("label-filt/0.png", np.zeros((10, 12), np.uint16), r"label has size \(10, 12\)"),
    *(("label-filt/0.png", np.full((48, 64), bad, np.uint16), f"label {bad} is not in the class list")
      for bad in (3, 41, 65535))])
def test_images_of_the_wrong_kind_size_or_class_are_named(root, file, image, message):
    Image.fromarray(image).save(root / "scene0000_00" / file)
    with pytest.raises(ValueError, match=f"{file.replace('/', '.')}: {message}"):
        scannet.ScanNetFrames(root, CLASSES)[0]


@pytest.mark.parametrize("text", ["1\n", "wall 1\n", "1 wall\n1 chair\n", "* wall\n", "0 unlabeled\n", ""])
def test_malformed_class_lists_are_named(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match="classes.txt"):
        scannet.load_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("text, error, message", [
    ("", ValueError, "val.txt is empty"), ("\n \n", ValueError, "val.txt is empty"),
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
    (".txt", b"axisAlignment = 1 0 0\n", "axisAlignment has 3 finite numbers"),
    ("_vh_clean_2.0.010000.segs.json", b'{"segIndices": [1, 2]}', "2 entries, the mesh has 6 vertices"),
    ("_vh_clean_2.0.010000.segs.json", b'{"segIndices": [1, 2', "is not JSON"),
    ("_vh_clean_2.0.010000.segs.json", b"{}", "no entry segIndices"),
    (".aggregation.json", b"[]", "no entry segGroups")])
def test_malformed_files_of_a_scan_are_named(scans, suffix, content, message):
    (scans / "scene0000_00" / f"scene0000_00{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"scene0000_00{suffix}.*{message}"):
        scannet.ScanNetScenes(scans, NYU40)[0]


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
