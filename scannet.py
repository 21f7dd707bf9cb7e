# SPDX-License-Identifier: MIT
"""ScanNet (Dai et al. 2017) as its tools write it: exported RGB-D frames, and whole scans with their annotations.

`ScanNetFrames` reads the 2D layout that ScanNet's exporter writes, to which many other data sets are converted.
`ScanNetScenes` reads mesh, labels, instances and oversegmentation of whole scans. Both are sequences that read a file
when they are indexed, and both name missing files at construction. Class lists are text files, see `load_classes`.

Imports numpy, PIL.
"""
import csv
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

# ------------------------------------------------------------------------------------------------------------- files


def load_classes(path):
    """Class list with one "id name" pair per line -> {id: name}; the name `unlabeled` becomes None = ignored.

    Ids that share a name are one class. With the line "* unlabeled", ids that are not listed are ignored, too.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class list {path} does not exist")
    classes = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        key, _, name = line.strip().partition(" ")
        name = name.strip()
        if not name or not (key.isdecimal() or (key == "*" and name == "unlabeled")):
            raise ValueError(f'{path} line {number}: expected "id name" or "* unlabeled", got {line!r}')
        key = key if key == "*" else int(key)
        if key in classes:
            raise ValueError(f"{path} line {number}: id {key} is listed twice")
        classes[key] = None if name == "unlabeled" else name
    if not any(classes.values()):
        raise ValueError(f"class list {path} names no class")
    return classes


def class_index(classes):
    """{id: name or None} -> K class names in order of first appearance, and a lookup table id -> 0..K-1, -1 or -2.

    -1 means ignored and -2 not listed. The table's last entry holds for all larger ids.
    """
    names = list(dict.fromkeys(name for name in classes.values() if name is not None))
    ids = [key for key in classes if key != "*"]
    table = np.full(max(ids, default=0) + 2, -1 if "*" in classes else -2, np.int32)
    for key in ids:
        table[key] = -1 if classes[key] is None else names.index(classes[key])
    return names, table


def read_matrix(path, field, shapes):
    """Whitespace-separated text file -> float64 matrix of one of `shapes`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{field} file {path} does not exist")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    try:
        matrix = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: {field} is not a matrix of numbers: {error}") from None
    if matrix.shape not in shapes:
        raise ValueError(f"{path}: {field} has shape {matrix.shape}, expected {' or '.join(map(str, shapes))}")
    return matrix


def read_intrinsics(path, field):
    """3 x 3 or 4 x 4 text file -> (3, 3) float64 pinhole intrinsics."""
    matrix = read_matrix(path, field, [(3, 3), (4, 4)])[:3, :3]
    if not (np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0 and (matrix[2] == [0, 0, 1]).all()):
        raise ValueError(f"{path}: {field} is not a pinhole matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]]: "
                         f"{matrix.tolist()}")
    return matrix


def read_pose(path):
    """Text file of a camera-to-world matrix -> (4, 4) float64, or None if the pose is lost (inf or NaN)."""
    pose = read_matrix(path, "pose", [(4, 4)])
    if not np.isfinite(pose).all():
        return None
    turn = pose[:3, :3]
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6 or np.abs(turn @ turn.T - np.eye(3)).max() > 0.01:
        raise ValueError(f"{path}: pose is not a rotation and a shift [[R, t], [0, 1]]: {pose.tolist()}")
    return pose


def read_image(path, field):
    """PIL image, decoded to the last byte."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{field} image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken or truncated files
        raise ValueError(f"{path}: {field} image cannot be decoded: {error}") from error
    return image


def read_index_image(path, field):
    """Greyscale PNG (depth, label, instance) -> (H, W) integer array."""
    array = np.asarray(read_image(path, field))
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise ValueError(f"{path}: {field} image has shape {array.shape} of {array.dtype}, expected (H, W) of integers")
    return array


def natural_key(name):
    """Sort key that puts "frame-2" before "frame-10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------------------------ layout


class ScanNetFrames:
    """A source of frames (see data.py) in ScanNet's exported 2D layout, read when indexed.

    root/<scene>/{color/<n>.jpg|png, depth/<n>.png (uint16 millimetres), pose/<n>.txt (camera to world),
    intrinsic/intrinsic_{color,depth}.txt} and optionally {label-filt,instance-filt}/<n>.png (0 = no instance).
    classes: a file for `load_classes` or its result; None: labels and instances are not read.
    split: a file with one `scene` or `scene/frame` per line; None: all frames.

    Attributes: names ["scene/frame"], class_names (K), num_skipped (frames whose pose is lost: inf or NaN).
    """

    def __init__(self, root, classes, split=None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"frame folder {self.root} does not exist")
        self._labelled = classes is not None
        if not self._labelled:
            classes = {}
        elif not isinstance(classes, dict):
            classes = load_classes(classes)
        self.class_names, self._table = class_index(classes)
        self.settings = repr(classes)  # with the files, all that the frames depend on
        self.names = []
        self.num_skipped = 0
        self._scenes, self._poses, self._colors = {}, [], []  # by scene, by frame, by frame
        for entry in self._entries(split):
            scene, _, stem = entry.partition("/")
            if scene not in self._scenes:
                self._scenes[scene] = self._open_scene(scene)
            colors = self._scenes[scene]["colors"]
            if stem and stem not in colors:
                raise FileNotFoundError(f"{self.root / scene / 'color'}: no image {stem}.jpg or {stem}.png ({split})")
            for stem in [stem] if stem else sorted(colors, key=natural_key):
                self._add_frame(scene, stem)
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"{split}: frame {twice} is named more than once")
        if not self.names:
            raise ValueError(f"{split or self.root}: no frame left ({self.num_skipped} skipped for a lost pose)")

    def _add_frame(self, scene, stem):
        color = self._scenes[scene]["colors"][stem]
        missing = self._scenes[scene]["missing"].get(stem)
        if missing is not None:
            raise FileNotFoundError(f"{missing} does not exist, but {color} does")
        pose = read_pose(f"{self.root}/{scene}/pose/{stem}.txt")
        if pose is None:
            self.num_skipped += 1
            return
        self.names.append(f"{scene}/{stem}")
        self._poses.append(pose)
        self._colors.append(color)

    def _entries(self, split):
        """The lines of a split file, or all scenes."""
        if split is None:
            entries = sorted((path.parent.name for path in self.root.glob("*/color")), key=natural_key)
            if not entries:
                raise ValueError(f"{self.root}: no <scene>/color folder in it")
            return entries
        split = Path(split)
        if not split.is_file():
            raise FileNotFoundError(f"split file {split} does not exist")
        entries = split.read_text().split()
        if not entries:
            raise ValueError(f"split file {split} is empty")
        for entry in entries:
            if not (self.root / entry.split("/")[0] / "color").is_dir():
                raise FileNotFoundError(f"split file {split}: {entry!r} has no folder "
                                        f"{self.root / entry.split('/')[0] / 'color'}")
        return entries

    def _open_scene(self, scene):
        """What the frames of a scene share: colour images and missing files by stem, intrinsics."""
        folder = self.root / scene
        colors = {path.stem: path for path in (folder / "color").iterdir() if path.suffix in (".jpg", ".jpeg", ".png")}
        labelled = {kind: self._labelled and (folder / kind).is_dir() for kind in ("label-filt", "instance-filt")}
        needed = {"depth": ".png", "pose": ".txt", **{kind: ".png" for kind, present in labelled.items() if present}}
        missing = {}  # listing four folders is faster than one look-up per file
        for kind, suffix in needed.items():
            present = {path.name for path in (folder / kind).iterdir()} if (folder / kind).is_dir() else set()
            missing.update({stem: folder / kind / (stem + suffix) for stem in colors if stem + suffix not in present})
        depth_path = folder / "intrinsic" / "intrinsic_depth.txt"
        return {
            "colors": colors, "missing": missing, **labelled,
            "intrinsics": read_intrinsics(folder / "intrinsic" / "intrinsic_color.txt", "colour intrinsics"),
            "depth_intrinsics": read_intrinsics(depth_path, "depth intrinsics") if depth_path.is_file() else None,
            "depth_intrinsics_path": depth_path,
        }

    def __len__(self):
        return len(self.names)

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame, without reading the rest of it."""
        return np.asarray(read_image(self._colors[index], "colour").convert("RGB"))

    def files(self, index):
        """Paths of all files that a frame is read from."""
        scene, stem = self.names[index].split("/")
        info = self._scenes[scene]
        folder = f"{self.root}/{scene}"
        kinds = ["label-filt"] * info["label-filt"] + ["instance-filt"] * info["instance-filt"]
        paths = [f"{folder}/{kind}/{stem}.png" for kind in ("depth", *kinds)]
        paths += [str(self._colors[index]), f"{folder}/pose/{stem}.txt", f"{folder}/intrinsic/intrinsic_color.txt"]
        return paths + [str(info["depth_intrinsics_path"])] * (info["depth_intrinsics"] is not None)

    def __getitem__(self, index):
        name = self.names[index]
        scene, stem = name.split("/")
        folder = self.root / scene
        info = self._scenes[scene]
        color = self.color(index)
        depth = read_index_image(folder / "depth" / f"{stem}.png", "depth")
        depth_intrinsics = info["depth_intrinsics"]
        if depth_intrinsics is None:
            if depth.shape != color.shape[:2]:
                raise ValueError(f"{folder / 'depth' / stem}.png: depth has size {depth.shape}, colour has size "
                                 f"{color.shape[:2]}, and {info['depth_intrinsics_path']} does not exist")
            depth_intrinsics = info["intrinsics"]
        frame = {"name": name, "color": color, "depth": depth.astype(np.float32) * np.float32(0.001),
                 "label": None, "instance": None, "world2cam": np.linalg.inv(self._poses[index]),
                 "intrinsics": info["intrinsics"], "depth_intrinsics": depth_intrinsics}
        for kind in ("label", "instance"):
            if not info[f"{kind}-filt"]:
                continue
            path = folder / f"{kind}-filt" / f"{stem}.png"
            ids = read_index_image(path, kind)
            if ids.shape not in (color.shape[:2], depth.shape):
                raise ValueError(f"{path}: {kind} has size {ids.shape}, neither the colour image's {color.shape[:2]} "
                                 f"nor the depth image's {depth.shape}")
            if kind == "label":
                label = self._table.take(ids, mode="clip")
                if label.min() < -1:
                    raise ValueError(f"{path}: label {ids[label < -1][0]} is not in the class list")
                frame["label"] = label
            else:
                frame["instance"] = np.where(ids > 0, ids.astype(np.int32), -1)
        return frame


PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "float32": "f4", "float64": "f8"}


def read_ply_vertices(path, fields):
    """Vertices of a binary PLY file -> structured array (P,) with at least `fields`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"mesh {path} does not exist")
    content = path.read_bytes()
    head, mark, body = content.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or lines[0] != ["ply"] or ["format", "binary_little_endian", "1.0"] not in lines:
        raise ValueError(f"{path} is not a binary_little_endian PLY file")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]] + [len(lines)]
    if len(elements) < 2 or lines[elements[0]][1] != "vertex":
        raise ValueError(f"{path}: the first element of the mesh is not `vertex`")
    properties = [line for line in lines[elements[0]:elements[1]] if line[:1] == ["property"]]
    if any(len(line) != 3 or line[1] not in PLY_TYPES for line in properties):
        raise ValueError(f"{path}: vertices have properties other than plain numbers")
    dtype = np.dtype([(name, "<" + PLY_TYPES[kind]) for _, kind, name in properties])
    missing = set(fields) - set(dtype.names or ())
    count = int(lines[elements[0]][2])
    if missing:
        raise ValueError(f"{path}: vertices have no property {', '.join(sorted(missing))}, only {dtype.names}")
    if len(body) < count * dtype.itemsize:
        raise ValueError(f"{path} is truncated: {count} vertices of {dtype.itemsize} bytes, {len(body)} bytes left")
    return np.frombuffer(body, dtype, count)


def read_axis_alignment(path):
    """<scene>.txt -> (4, 4) float64 that moves the scan's walls parallel to x and y and its floor to z = 0."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"scan description {path} does not exist")
    for line in path.read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            matrix = np.array(value.split(), np.float64)
            if matrix.size != 16 or not np.isfinite(matrix).all():
                raise ValueError(f"{path}: axisAlignment has {matrix.size} finite numbers, expected 16")
            return matrix.reshape(4, 4)
    raise ValueError(f"{path} has no axisAlignment (scans of the test split have none: align=False)")


def read_json(path, field):
    """The value of `field` in a JSON file that holds one object."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotation {path} does not exist")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or field not in content:
        raise ValueError(f"{path} has no entry {field}")
    return content[field]


def read_label_map(path, source, target):
    """Two columns of scannetv2-labels.combined.tsv -> {source: target}, with whole numbers as int.

    ("raw_category", "id") gives the id of an annotation's label; ("id", "nyu40id") maps ids of label images to NYU40.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"label map {path} does not exist")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {source, target} <= rows[0].keys():
        raise ValueError(f"{path} is no table with columns {source} and {target}")

    def value(text):
        return int(text) if text.isdecimal() else text

    return {value(row[source]): value(row[target]) for row in rows if row[target]}


def remap_classes(classes, label_map):
    """Class list {id: name} and label map {other id: id} -> class list {other id: name}; unlisted ids are ignored.

    For ScanNet20 on label images: remap_classes(load_classes("labels/scannet20.txt"),
    read_label_map("scannetv2-labels.combined.tsv", "id", "nyu40id")). ScanNet200 uses the ids of the images.
    """
    return {**{key: classes[value] for key, value in label_map.items() if value in classes}, "*": None}


class ScanNetScenes:
    """Whole scans of ScanNet, read when indexed: what data.SceneDataset takes.

    A scan is a dict: name, points (P, 3) float32 metres in the world of the camera poses, colors (P, 3) float32 in
    [0, 1], alignment (4, 4) float64 (identity if align=False) and, if `classes` is given, labels and instances (P,)
    int64 with -1 = none and superpoints (P,) int64 from the mesh's oversegmentation.

    root/<scene>/<scene>{_vh_clean_2.ply, .txt} and, for labels, {_vh_clean_2.0.010000.segs.json, .aggregation.json,
    _vh_clean_2.labels.ply}.
    classes: a file for `load_classes` or its result. Its ids are those of NYU40, as in labels.ply (ScanNet20).
    label_map: path of scannetv2-labels.combined.tsv. The ids are then that table's, found by the annotated names
    (ScanNet200).
    split: a file with one `scene` (or `scene/frame`) per line; None: all scans.

    Attributes: names ["scene"], class_names (K).
    """

    def __init__(self, root, classes, split=None, label_map=None, align=True):
        self.root = Path(root)
        self.align = align
        self._labelled = classes is not None
        if not self.root.is_dir():
            raise FileNotFoundError(f"scan folder {self.root} does not exist")
        if not isinstance(classes, dict):
            classes = load_classes(classes) if self._labelled else {}
        self.class_names, self._table = class_index(classes)
        self._label_map = None if label_map is None else read_label_map(label_map, "raw_category", "id")
        self.settings = repr((classes, self._label_map, align))  # with the files, all that the scans depend on
        if split is None:
            self.names = sorted(path.parent.name for path in self.root.glob("*/*_vh_clean_2.ply"))
        elif Path(split).is_file():
            self.names = list(dict.fromkeys(entry.split("/")[0] for entry in Path(split).read_text().split()))
        else:
            raise FileNotFoundError(f"split file {split} does not exist")
        if not self.names:
            raise ValueError(f"{split or self.root}: no scan in it")
        self._suffixes = ["_vh_clean_2.ply"] + [".txt"] * align
        if self._labelled:
            self._suffixes += ["_vh_clean_2.0.010000.segs.json", ".aggregation.json"]
            self._suffixes += ["_vh_clean_2.labels.ply"] * (self._label_map is None)
        for index in range(len(self.names)):
            for path in self.files(index):
                if not path.is_file():
                    raise FileNotFoundError(f"{path} does not exist")

    def files(self, index):
        """Paths of all files that a scan is read from."""
        return [self._path(self.names[index], suffix) for suffix in self._suffixes]

    def _path(self, name, suffix):
        return self.root / name / (name + suffix)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        path = self._path(name, "_vh_clean_2.ply")
        mesh = read_ply_vertices(path, ["x", "y", "z", "red", "green", "blue"])
        scan = {"name": name, "points": np.stack([mesh["x"], mesh["y"], mesh["z"]], 1).astype(np.float32),
                "colors": np.stack([mesh["red"], mesh["green"], mesh["blue"]], 1).astype(np.float32) / 255,
                "alignment": read_axis_alignment(self._path(name, ".txt")) if self.align else np.eye(4)}
        if not np.isfinite(scan["points"]).all():
            raise ValueError(f"{path}: vertices are not finite")
        if not self._labelled:
            return scan
        path = self._path(name, "_vh_clean_2.0.010000.segs.json")
        segment_ids, segments = np.unique(read_json(path, "segIndices"), return_inverse=True)
        if len(segments) != len(mesh):
            raise ValueError(f"{path}: segIndices has {len(segments)} entries, the mesh has {len(mesh)} vertices")
        path = self._path(name, ".aggregation.json")
        ids = np.zeros(len(segment_ids), np.int64)  # per segment
        instances = np.full(len(segment_ids), -1)
        for group in read_json(path, "segGroups"):
            own = np.isin(segment_ids, group["segments"])
            instances[own] = group["objectId"]
            if self._label_map is not None:
                if group["label"] not in self._label_map:
                    raise ValueError(f"{path}: label {group['label']!r} is not in the label map")
                ids[own] = self._label_map[group["label"]]
        ids = ids[segments]
        if self._label_map is None:
            path = self._path(name, "_vh_clean_2.labels.ply")
            ids = read_ply_vertices(path, ["label"])["label"].astype(np.int64)
            if len(ids) != len(mesh):
                raise ValueError(f"{path} has {len(ids)} vertices, the mesh has {len(mesh)}")
        labels = self._table.take(ids, mode="clip").astype(np.int64)
        if labels.min() < -1:
            raise ValueError(f"{path}: label {ids[labels < -1][0]} is not in the class list")
        return {**scan, "labels": labels, "instances": instances[segments], "superpoints": segments}
