# SPDX-License-Identifier: MIT
"""scannet.py: what the files say arrives, in order, and files that are missing or malformed are named."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from helpers import CLASSES, POSE, ROOT, refused, write_scannet
from sources.rooms import RoomFrames
from sources.scannet import (GEOMETRY, ClassTable, ScanNetFrames, ScanNetScenes, check_splits,
                             frame_classes, load_classes, read_axis_alignment, read_label_map,
                             read_mesh, read_ply_vertices, write_frames)

ALIGNMENT = np.array([[0.6, -0.8, 0, 1], [0.8, 0.6, 0, -2], [0, 0, 1, 0.3], [0, 0, 0, 1.0]])
TABLE = "id\traw_category\tcategory\tcount\tnyu40id\n1\twall\twall\t9\t1\n2\tchair\tchair\t9\t5\n" \
        "88\toffice chair\tchair\t5\t5\n5\tthing\tthing\t1\t\n"


def write_ply(path, columns):
    """columns {name: (PLY type, values)} -> a binary PLY mesh with one triangle."""
    kinds = {"float": "<f4", "uchar": "u1", "ushort": "<u2"}
    count = len(next(iter(columns.values()))[1])
    vertices = np.zeros(count, [(name, kinds[kind]) for name, (kind, _) in columns.items()])
    for name, (_, values) in columns.items():
        vertices[name] = values
    properties = "".join(f"property {kind} {name}\n" for name, (kind, _) in columns.items())
    header = (f"ply\nformat binary_little_endian 1.0\ncomment a test\nelement vertex {count}\n{properties}"
              "element face 1\nproperty list uchar int vertex_indices\nend_header\n")
    triangle = b"\x03" + np.arange(3, dtype="<i4").tobytes()
    path.write_bytes(header.encode() + vertices.tobytes() + triangle)


def write_scan(root, name, points, colors, nyu40, segments, groups):
    """A tiny scan in ScanNet's layout. groups: (objectId, raw category, segment ids)."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    geometry = {axis: ("float", column) for axis, column in zip("xyz", points.T)}
    geometry |= {channel: ("uchar", column) for channel, column in zip(("red", "green", "blue"), colors.T)}
    geometry["alpha"] = "uchar", np.full(len(points), 255)
    write_ply(folder / f"{name}_vh_clean_2.ply", geometry)
    write_ply(folder / f"{name}_vh_clean_2.labels.ply", {**geometry, "label": ("ushort", nyu40)})
    alignment = " ".join(f"{x:.6f}" for x in ALIGNMENT.ravel())
    objects = [{"id": number, "objectId": number, "segments": own, "label": label} for number, label, own in groups]
    texts = {".txt": f"axisAlignment = {alignment} \ncolorHeight = 968\n",
             "_vh_clean_2.0.010000.segs.json": json.dumps({"sceneId": name, "segIndices": segments}),
             ".aggregation.json": json.dumps({"segGroups": objects})}
    for suffix, text in texts.items():
        (folder / f"{name}{suffix}").write_text(text)
    return folder


@pytest.fixture
def root(tmp_path):
    return write_scannet(tmp_path / "frames")


def frames_of(root, split=None):
    """The frames of a folder. split: what a split file holds."""
    if split is None:
        return ScanNetFrames(root, CLASSES)
    (root / "split.txt").write_text(split)
    return ScanNetFrames(root, CLASSES, root / "split.txt")


def save(path, value, shape, dtype=np.uint16):
    """An image of one value."""
    Image.fromarray(np.full(shape, value, dtype)).save(path)


# --------------------------------------------------------------------------------------------- classes


def test_a_class_list_maps_ids_to_consecutive_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeff0 unlabeled\r\n7 night stand\r\n\n3 wall\n9 wall\n* unlabeled\n".encode())
    classes = load_classes(path)
    assert classes == {0: None, 7: "night stand", 3: "wall", 9: "wall", "*": None}
    for table in (ClassTable(path), ClassTable(classes)):
        assert table.names == ["night stand", "wall"] and table.ids == [7, 3]
        for kind in (np.uint16, np.int64):
            ids = np.array([0, 7, 3, 9, 5, 65535], kind)
            assert table(ids).tolist() == [-1, 0, 1, 1, -1, -1]
    table = ClassTable({10 ** 9: "far", 3: "near"})  # takes no memory
    assert table(np.array([10 ** 9, 3, 4])).tolist() == [0, 1, -2]


@pytest.mark.parametrize("name, key, is_ignored", [
    ("Unlabeled", 7, True), ("unlabelled", 0, True), ("void", 255, True), ("Ignore", 0, True),
    ("__ignore__", 255, True), ("n/a", 0, True), ("<UNKNOWN>", 255, True), ("void", 3, False), ("ignore me", 0, False)])
def test_names_for_no_label_are_ignored_and_said(tmp_path, recwarn, name, key, is_ignored):
    (tmp_path / "classes.txt").write_text(f"{key} {name}\n1 wall\n")
    classes = load_classes(tmp_path / "classes.txt")
    assert classes == {key: None if is_ignored else name, 1: "wall"}
    assert [name in str(warning.message) for warning in recwarn] == [True] * is_ignored


@pytest.mark.parametrize("text", [
    "1\n", "wall 1\n", "1 wall\n1 chair\n", "* wall\n", "0 unlabeled\n", "", "-1 wall\n", "1" * 5000 + " wall\n"])
def test_malformed_class_lists_are_named(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with refused("classes.txt"):
        load_classes(tmp_path / "classes.txt")


def test_the_official_class_lists_are_the_benchmarks():
    ids = np.arange(2000)
    nyu40 = [*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39]
    for name, count, samples in (("scannet20", 20, {5: "chair", 39: "otherfurniture"}),
                                 ("scannet200", 200, {2: "chair", 3: "floor", 1191: "mattress"})):
        table = ClassTable(ROOT / "labels" / f"{name}.txt")
        index = table(ids)
        assert len(table.names) == count == (index >= 0).sum() and index.min() == -1
        assert all(table.names[index[key]] == name for key, name in samples.items())
        assert count == 200 or np.flatnonzero(index >= 0).tolist() == nyu40


def test_label_images_can_be_read_as_nyu40_in_the_order_of_the_list(root, tmp_path):
    (tmp_path / "labels.tsv").write_text(TABLE)
    assert read_label_map(tmp_path / "labels.tsv", "id", "nyu40id") == {1: 1, 2: 5, 88: 5}
    classes = frame_classes({5: "chair", 1: "wall"}, tmp_path / "labels.tsv")
    assert classes == {2: "chair", 88: "chair", 1: "wall", "*": None}
    frames = ScanNetFrames(root, classes)
    assert frames.class_names == ["chair", "wall"] and frames.class_ids == [2, 1]
    assert np.unique(frames[0]["label"]).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("rows", ["", "wall\tx\n", "wall\t1.5\n", "wall\t-1\n", "w" * 200_000 + "\t1\n"])
def test_malformed_label_maps_are_named(tmp_path, rows):
    for head in ("raw_category\tid\n", "a\tb\n"):
        (tmp_path / "labels.tsv").write_text(head + rows)
        with refused("labels.tsv"):
            read_label_map(tmp_path / "labels.tsv", "raw_category", "id")


# ---------------------------------------------------------------------------------------------- splits


def test_frames_are_in_numerical_order_and_splits_choose_them(tmp_path):
    root = write_scannet(tmp_path / "frames", 2, 11)
    (root / "scene0000_00").rename(root / "living room")
    assert frames_of(root).names[:11] == [f"living room/{n}" for n in range(11)]
    frames = frames_of(root, "scene0001_00\n\n  living room/10  \n")
    assert frames.names == [f"scene0001_00/{n}" for n in range(11)] + ["living room/10"]


@pytest.mark.parametrize("text, message", [
    *((text, "split.txt: no scene") for text in ("../frames/scene0000_00", "/etc", ".", "a\0b", "n" * 300)),
    *((f"scene0000_00/{text}", f"split.txt: no color image of frame '{text}'") for text in ("77", "..", "color/1"))])
def test_a_split_names_scenes_and_frames_of_the_data_alone(root, text, message):
    with refused(message, FileNotFoundError):
        frames_of(root, text)


def test_bad_splits_are_named(root):
    with refused("split.txt is empty"):
        frames_of(root, "\n \n")
    with refused("scene0000_00/1 is named more than once"):
        frames_of(root, "scene0000_00\nscene0000_00/1\n")
    with refused("split file.*other.txt", FileNotFoundError):
        ScanNetFrames(root, CLASSES, root / "other.txt")


def test_splits_that_share_a_frame_are_refused(root):
    first = frames_of(root, "scene0000_00/1\n")
    check_splits([first, frames_of(root, "scene0001_00\nscene0000_00/0\n")])
    with refused("scene0000_00/1 is in two splits, .*split.txt and .*frames"):
        check_splits([first, frames_of(root)])


@pytest.mark.parametrize("kind", ["label-filt", "instance-filt"])
def test_a_folder_that_only_some_scenes_have_is_named(root, kind):
    """Within a split and across splits; if no scene has it, it is not wanted."""
    shutil.rmtree(root / "scene0001_00" / kind)
    for texts in (("scene0000_00\nscene0001_00\n",), ("scene0000_00\n", "scene0001_00\n")):
        sources = [frames_of(root, text) for text in texts]
        with refused(f"scene0001_00/{kind} does not exist, but .*scene0000_00/{kind} does"):
            check_splits(sources)
        check_splits(sources, kinds=())
    shutil.rmtree(root / "scene0000_00" / kind)
    check_splits([frames_of(root)])


# ---------------------------------------------------------------------------------------------- frames


def test_a_frame_arrives_as_it_was_written(root):
    frames = frames_of(root)
    frame = frames[1]
    data.check_frame(frame)
    millimeters = np.asarray(Image.open(root / "scene0000_00/depth/1.png"))
    assert np.abs(frame["depth"] * 1000.0 - millimeters).max() < 1e-3
    assert np.abs(frame["world2cam"] @ POSE - np.eye(4)).max() < 1e-12
    assert (frame["color"][:, :, 2] == 10).all()
    assert np.array_equal(frames.color(1), frame["color"])
    assert np.unique(frame["label"]).tolist() == [-1, 0, 1, 2]
    assert np.unique(frame["instance"]).tolist() == [-1, 1, 2]
    assert "depth_world2cam" not in frame and not frames.left_out
    assert {Path(path).parent.name for path in frames.files(1)} == {
        "color", "depth", "pose", "label-filt", "instance-filt", "intrinsic"}


def test_labels_are_optional_and_suffixes_may_be_upper_case(tmp_path):
    root = write_scannet(tmp_path, 1, 2, labels=False, suffix="JPG")
    frame = frames_of(root)[1]
    assert frame["label"] is None and frame["instance"] is None
    assert frame["color"].shape == (48, 64, 3)


def test_the_layout_of_scannet_frames_25k_is_read(root):
    expected = frames_of(root)[0]
    for scene in (root / "scene0000_00", root / "scene0001_00"):
        for kind in ("color", "depth"):
            (scene / f"intrinsic/intrinsic_{kind}.txt").rename(scene / f"intrinsics_{kind}.txt")
        for kind in ("label", "instance"):
            (scene / f"{kind}-filt").rename(scene / kind)
    frames = frames_of(root)
    assert all(np.array_equal(frames[0][key], value) for key, value in expected.items())
    assert frames.folders[root / "scene0000_00"] == ["label-filt", "instance-filt"]


def test_extrinsics_give_color_and_depth_poses_of_their_own(root):
    """World = pose @ extrinsic @ camera, for each of the two."""
    folder = root / "scene0000_00/intrinsic"
    depth, color = np.eye(4), np.eye(4)
    np.savetxt(folder / "extrinsic_depth.txt", depth)
    np.savetxt(folder / "extrinsic_color.txt", color)
    assert "depth_world2cam" not in ScanNetFrames(root, None)[0]
    depth[:3] = POSE[:3]
    color[1, 3] = 0.02
    np.savetxt(folder / "extrinsic_depth.txt", depth)
    np.savetxt(folder / "extrinsic_color.txt", color)
    frames = ScanNetFrames(root, None)
    data.check_frame(frames[0])
    assert np.allclose(frames[0]["depth_world2cam"] @ POSE @ depth, np.eye(4))
    assert np.allclose(frames[0]["world2cam"] @ POSE @ color, np.eye(4))
    assert sum("extrinsic_" in path for path in frames.files(0)) == 2
    np.savetxt(folder / "extrinsic_depth.txt", depth * np.nan)
    with refused("extrinsics hold inf or NaN"):
        ScanNetFrames(root, None)


def test_lost_poses_are_skipped_and_counted(root):
    for frame, value in ((0, "-inf"), (2, "nan")):
        (root / f"scene0001_00/pose/{frame}.txt").write_text(f"{value} {value} {value} {value}\n" * 4)
    frames = frames_of(root)
    assert frames.num_skipped == 2 and frames.names[3:] == ["scene0001_00/1"] and len(frames) == 4
    with refused("no frame left .1 skipped"):
        frames_of(root, "scene0001_00/0\n")


def test_what_a_listing_does_not_take_is_counted(root):
    for name in ("._1.png", ".DS_Store", "5.webp", "6.bmp", "notes.txt"):
        (root / "scene0000_00/color" / name).write_bytes(b"x")
    (root / "rgb").mkdir()
    (root / "on a disk that is away").symlink_to("nowhere")
    (root / ".trash/color").mkdir(parents=True)
    frames = frames_of(root)
    assert len(frames) == 6
    assert frames.left_out["dot files"] == 2
    assert sorted(frames.left_out.values()) == [2, 2, 3]


def test_missing_files_are_named_at_once(root):
    (root / "scene0001_00/depth/1.png").unlink()
    with refused("depth/1.png does not exist, but .*color/1.png does", FileNotFoundError):
        frames_of(root)
    (root / "scene0000_00/intrinsic/intrinsic_color.txt").unlink()
    with refused("color intrinsics.*intrinsic_color.txt", FileNotFoundError):
        frames_of(root)
    for missing in (root / "nowhere", root / "scene0000_00/pose/0.txt"):
        with refused("does not exist", FileNotFoundError):
            ScanNetFrames(missing, CLASSES)
    with refused("class list", FileNotFoundError):
        ScanNetFrames(root, root / "classes.txt")
    with refused("no <scene>/color folder"):
        ScanNetFrames(root / "scene0000_00", CLASSES)
    shutil.rmtree(root / "scene0000_00/color")
    (root / "scene0000_00/color").mkdir()
    with refused("scene0000_00/color: no color image"):
        frames_of(root)


def test_two_images_of_one_frame_are_refused(root):
    Image.new("RGB", (64, 48)).save(root / "scene0001_00/color/1.JPG")
    with refused("color/1.* and 1.* are two images of one frame"):
        frames_of(root)


def test_a_camera_that_does_not_fit_is_named(root):
    folder = root / "scene0000_00/intrinsic"
    for kind in ("color", "depth"):
        path = folder / f"intrinsic_{kind}.txt"
        whole = path.read_text()
        path.write_text("50 0 950\n0 50 20\n0 0 1\n")
        with refused(rf"scene0000_00: {kind} intrinsics: the principal point \[950.0, 20.0\] is far outside"):
            frames_of(root)
        path.write_text(whole)
    (folder / "intrinsic_depth.txt").unlink()
    with refused(r"depth has size \(24, 32\), color has size \(48, 64\), .*intrinsic_depth"):
        frames_of(root)[0]


@pytest.mark.parametrize("file, value, shape, dtype, message", [
    ("depth/1.png", 1, (20, 32), "u2", r"the depth image has size \(20, 32\), but 0.png has \(24, 32\)"),
    ("color/1.png", 1, (9, 9, 3), "u1", r"the color image has size \(9, 9\), but 0.png has \(48, 64\)"),
    ("depth/1.png", 1, (24, 32), "u1", "8-bit depth image of grayscale"),
    ("label-filt/1.png", 1, (48, 64, 3), "u1", "8-bit label image of RGB"),
    ("label-filt/1.png", 1, (10, 12), "u2", r"label has size \(10, 12\)"),
    ("label-filt/1.png", 41, (48, 64), "u2", "label 41 is not in the class list"),
    ("label-filt/1.png", 65535, (48, 64), "u2", "label 65535 is not in the class list")])
def test_images_of_the_wrong_kind_size_or_class_are_named(root, file, value, shape, dtype, message):
    save(root / "scene0000_00" / file, value, shape, dtype)
    with refused(f"{file}: {message}"):
        frames_of(root)[1]


def test_frames_that_are_written_come_back(tmp_path):
    rooms = RoomFrames("train", 2, 1, size=(48, 64))
    moved = rooms[1]
    moved["depth_world2cam"] = np.linalg.inv(ALIGNMENT) @ moved["world2cam"]
    classes = write_frames(rooms, tmp_path / "plain")
    assert write_frames([moved], tmp_path / "moved") == {0: None}
    frames = ScanNetFrames(tmp_path / "plain", classes)
    assert frames.class_names == list(rooms.class_names)
    for frame, expected in ((frames[0], rooms[0]), (ScanNetFrames(tmp_path / "moved", None)[0], moved)):
        for key in {"world2cam", "depth_world2cam", "intrinsics", "depth_intrinsics"} & expected.keys():
            assert np.allclose(frame[key], expected[key])
        assert np.abs(frame["depth"] - expected["depth"]).max() <= 0.0005001
        assert frame["name"] == expected["name"]
    assert np.array_equal(frames[0]["label"], rooms[0]["label"])
    assert np.array_equal(frames[0]["instance"] >= 0, rooms[0]["instance"] >= 0)
    moved["intrinsics"] = moved["intrinsics"] * [[2], [2], [1]]
    with refused("intrinsic_color.txt: .* has another camera"):
        write_frames([moved], tmp_path / "moved")


# ----------------------------------------------------------------------------------------------- scans

NYU40 = {1: "wall", 5: "chair", "*": None}
POINTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
COLORS = np.random.default_rng(0).integers(0, 256, (6, 3))
PLY = "ply\nformat binary_little_endian 1.0\nelement vertex"
GROUP = {"objectId": 1, "label": "wall", "segments": [70]}


def read_scan(scans, classes=NYU40, label_map=None):
    return ScanNetScenes(scans, classes, label_map=label_map)[0]


@pytest.fixture
def scans(tmp_path):
    write_scan(tmp_path / "scans", "scene0000_00", POINTS, COLORS, nyu40=[1, 1, 5, 5, 0, 40],
               segments=[70, 70, 12, 12, 5, 900],
               groups=[(0, "wall", [70]), (1, "office chair", [12, 900])])
    (tmp_path / "labels.tsv").write_text(TABLE)
    return tmp_path / "scans"


def test_a_scan_arrives_as_it_was_written(scans):
    """Also beside a macOS copy of it, which would be the scan again."""
    (scans / "scene0000_00/._scene0000_00_vh_clean_2.ply").write_bytes(b"x")
    scenes = ScanNetScenes(scans, NYU40)
    scan = scenes[0]
    assert scenes.names == ["scene0000_00"] and scenes.class_names == ["wall", "chair"]
    assert scenes.left_out == {"meshes not named as their folder": 1}
    assert np.array_equal(scan["points"], POINTS)
    assert np.allclose(scan["colors"] * 255, COLORS)
    assert np.allclose(scan["alignment"], ALIGNMENT)
    assert scan["labels"].tolist() == [0, 0, 1, 1, -1, -1]
    assert scan["instances"].tolist() == [0, 0, 1, 1, -1, 1]
    assert scan["superpoints"].tolist() == [2, 2, 1, 1, 0, 3]


def test_a_label_map_names_what_the_annotation_says(scans):
    classes = {1: "wall", 88: "office chair", "*": None}
    scan = ScanNetScenes(scans, classes, label_map=scans.parent / "labels.tsv")[0]
    assert scan["labels"].tolist() == [0, 0, 1, 1, -1, 1]
    (scans.parent / "labels.tsv").write_text(TABLE.replace("office chair", "stool"))
    with refused("aggregation.json: label 'office chair' is not in the label map"):
        ScanNetScenes(scans, classes, label_map=scans.parent / "labels.tsv")[0]


def test_an_unlabeled_scan_needs_its_mesh_alone(scans):
    for path in scans.glob("*/*"):
        if not path.name.endswith("_vh_clean_2.ply"):
            path.unlink()
    scan = ScanNetScenes(scans, None, align=False)[0]
    assert set(scan) == {"name", "points", "colors", "alignment"}
    assert np.array_equal(scan["alignment"], np.eye(4))


@pytest.mark.parametrize("suffix", ["_vh_clean_2.ply", ".txt", "_vh_clean_2.labels.ply", ".aggregation.json",
                                    "_vh_clean_2.0.010000.segs.json"])
def test_missing_files_of_a_scan_are_named(scans, suffix):
    split = scans.parent / "split.txt"
    split.write_text("scene0000_00/17\nscene0000_00/18\n")
    assert len(ScanNetScenes(scans, NYU40, split)) == 1
    (scans / "scene0000_00" / f"scene0000_00{suffix}").unlink()
    with refused(f"scene0000_00{suffix}", FileNotFoundError):
        ScanNetScenes(scans, NYU40, split)


@pytest.mark.parametrize("text, message", [
    *((text, "not an ascii or binary_little_endian PLY") for text in (
        "", "ply\nformat binary_big_endian 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n",
        "ply\nformat binary_little_endian 1.0\nelement face 9\nend_header\n",
        f"{PLY} many\nproperty float x\nend_header\n", f"{PLY} 1{'0' * 20}\nproperty float x\nend_header\n",
        f"{PLY} 9\nproperty float x\nproperty list uchar int y\nend_header\n")),
    (f"{PLY} 0\nproperty float x\nend_header\n", "not plain numbers"),
    (f"{PLY} 9\nproperty text x\nend_header\n", "not plain numbers"),
    (f"{PLY} 9\nproperty float x\nend_header\n", "no property y")])
def test_malformed_meshes_are_named(scans, text, message):
    path = scans / "scene0000_00/scene0000_00_vh_clean_2.ply"
    path.write_text(text)
    with refused(f"_vh_clean_2.ply.*{message}"):
        read_ply_vertices(path, GEOMETRY)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_ascii_mesh_holds_what_the_binary_one_does(scans, newline):
    binary = read_mesh(scans / "scene0000_00/scene0000_00_vh_clean_2.ply")
    lines = ["ply", "format ascii 1.0", "comment a test", "element vertex 6", *(f"property float {c}" for c in "xyz"),
             *(f"property uchar {c}" for c in ("red", "green", "blue")), "element face 1",
             "property list uchar int vertex_indices", "end_header"]
    lines += [" ".join(map(repr, [*map(float, point), *map(int, color)])) for point, color in zip(POINTS, COLORS)]
    path = scans / "ascii.ply"
    path.write_bytes(newline.join([*lines, "3 0 1 2", ""]).encode())
    mesh = read_mesh(path)
    assert all(np.array_equal(mesh[key], binary[key]) for key in ("points", "colors"))
    path.write_text("\n".join(lines[:-1]))
    with refused(r"ascii.ply: table of 6 vertices has shape \(1, 30\), expected \(1, 36\)"):
        read_mesh(path)


@pytest.mark.parametrize("text, message", [
    ("colorHeight = 968\n", "no axisAlignment"),
    ("axisAlignment = 1 0 0\n", "axisAlignment has shape"),
    ("axisAlignment = 2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1\n", "axisAlignment is not a rotation"),
    ("axisAlignment = nan 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n", "axisAlignment is not finite")])
def test_malformed_alignments_are_named(tmp_path, text, message):
    (tmp_path / "scan.txt").write_text(text)
    with refused(f"scan.txt.*{message}"):
        read_axis_alignment(tmp_path / "scan.txt")


@pytest.mark.parametrize("value", ["3", '{"a": 1}', "[-1]", "[9.0]", '["9"]', "[null]", "[9, [9]]",
                                   "[1000000000000000000000]"])
def test_segments_that_are_no_whole_numbers_are_named(scans, value):
    for suffix, text in (("_vh_clean_2.0.010000.segs.json", f'{{"segIndices": {value}}}'),
                         (".aggregation.json", json.dumps({"segGroups": [GROUP]}).replace("[70]", value))):
        path = scans / f"scene0000_00/scene0000_00{suffix}"
        whole = path.read_text()
        path.write_text(text)
        with refused(f"{suffix}: seg.* is not a list of whole numbers"):
            read_scan(scans)
        path.write_text(whole)


@pytest.mark.parametrize("groups, message", [
    (3, "no segGroups"), ([3], "no segGroups, or one without"), ([{"label": "wall"}], "no segGroups, or one without"),
    ([{**GROUP, "objectId": -1}], "objectId is not a list of whole numbers"),
    ([{**GROUP, "segments": [71]}], "segment 71, not in"),
    ([{**GROUP, "segments": [70, 70]}], "listed twice"),
    ([GROUP, {**GROUP, "objectId": 2, "segments": [12, 70]}], "object 2 has a segment that is listed twice")])
def test_malformed_annotations_are_named(scans, groups, message):
    (scans / "scene0000_00/scene0000_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    with refused(f"aggregation.json.*{message}"):
        read_scan(scans)


def test_objects_that_are_listed_again_are_one_object(scans):
    """As in scene0217_00 of ScanNet, whose second half repeats the first under other ids."""
    path = scans / "scene0000_00/scene0000_00.aggregation.json"
    expected = read_scan(scans)
    content = json.loads(path.read_text())
    content["segGroups"] += [{**entry, "objectId": entry["objectId"] + 31} for entry in content["segGroups"]]
    path.write_text(json.dumps(content))
    assert np.array_equal(read_scan(scans)["instances"], expected["instances"])


@pytest.mark.parametrize("changes, suffix, message", [
    ({"red": ("float", np.ones(6))}, "_vh_clean_2.ply", "no property red of type"),
    ({"x": ("ushort", np.ones(6))}, "_vh_clean_2.ply", "no property x of type"),
    ({"x": ("float", np.full(6, np.nan))}, "_vh_clean_2.ply", "vertices are not finite"),
    ({"x": ("float", np.full(6, 1e9))}, "_vh_clean_2.ply", "more than 10 km from"),
    ({"label": ("float", np.ones(6))}, "_vh_clean_2.labels.ply", "no property label of type"),
    ({"label": ("ushort", np.full(6, 40))}, "_vh_clean_2.labels.ply", "label 40 is not in the class list"),
    ({"label": ("uchar", np.ones(5))}, "_vh_clean_2.labels.ply", "has 5 vertices with labels from 1, expected")])
def test_vertices_of_another_type_or_range_are_named(scans, changes, suffix, message):
    count = len(next(iter(changes.values()))[1])
    columns = {**dict.fromkeys("xyz", ("float", np.zeros(count))),
               **dict.fromkeys(("red", "green", "blue"), ("uchar", np.zeros(count))), **changes}
    write_ply(scans / f"scene0000_00/scene0000_00{suffix}", columns)
    with refused(f"scene0000_00{suffix}.*{message}"):
        ScanNetScenes(scans, {1: "wall"})[0]


def test_files_of_a_scan_that_do_not_fit_are_named(scans):
    path = scans / "scene0000_00/scene0000_00_vh_clean_2.0.010000.segs.json"
    path.write_text('{"segIndices": [1, 2]}')
    with refused("segs.json: segIndices has 2 entries, the mesh 6 vertices"):
        read_scan(scans)
    path = scans / "scene0000_00/scene0000_00_vh_clean_2.ply"
    path.write_bytes(path.read_bytes()[:-40])
    with refused("_vh_clean_2.ply is truncated: 6 vertices of 16 bytes"):
        read_scan(scans)
