# SPDX-License-Identifier: MIT
"""RGB-D frames and scans of ScanNet (Dai et al. 2017), in files as its tools write them.

`ScanNetFrames` reads the 2D layout of ScanNet's exporter, to which many data sets are converted, and
that of its small download scannet_frames_25k; `ScanNetScenes` mesh, labels, instances and oversegmentation
of whole scans. Both read a file when they are indexed, and name missing files when they are made.

Imports numpy, PIL and support.files.
"""
import csv
import io
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.files import (as_matrix, as_pose, check_principal_point, image_size, natural_key,
                           read_bytes, read_color, read_depth, read_index_image, read_intrinsics,
                           read_json, read_pose, read_text, visible)

# --------------------------------------------------------------------------------------------- classes

UNLABELED = "unlabell?ed"  # ignored with any id
VOID = UNLABELED + r"|un(annotated|known|defined|classified)|void|ignored?|none|no ?label|n ?a|invalid"


def load_classes(path):
    """Class list with one "id name" pair per line -> {id: name}, where None means ignored.

    Ids that share a name are one class. Ignored are ids named unlabeled, 0 and 255 with a name as of
    `means_no_class`, and with a line "* unlabeled" all that are not listed.
    """
    classes = {}
    for number, line in enumerate(read_text(path, "class list").splitlines(), 1):
        if not line.strip():
            continue
        key, name = (*line.split(maxsplit=1), "")[:2]
        name = name.strip()
        is_id = key.isdecimal() and len(key) < 10
        if not name or not is_id and (key, name) != ("*", "unlabeled"):
            raise ValueError(f'{path} line {number}: expected "id name" or "* unlabeled", got {line!r}')
        key = int(key) if is_id else key
        if key in classes:
            raise ValueError(f"{path} line {number}: id {key} is listed twice")
        is_ignored = means_no_class(name, VOID if key in (0, 255) else UNLABELED)
        classes[key] = None if is_ignored else name
        if is_ignored and name != "unlabeled":
            warnings.warn(f"{path}: {name!r} (id {key}) is ignored, like 'unlabeled'")
    if not any(classes.values()):
        raise ValueError(f"class list {path} names no class")
    return classes


def means_no_class(name, words=VOID):
    """Whether a class is named as pixels without a label are: Void, <ignore>, n/a."""
    plain = re.sub(r"[\W_]+", " ", name).strip().lower()
    return re.fullmatch(words, plain) is not None


class ClassTable:
    """A class list (a file, {id: name or None}, or None: empty), and a map of its ids to class indices.

    Called with integers >= 0 of any shape, it gives int32: 0..K-1, -1 = ignored, -2 = not listed.
    Attributes: names (K) in order of appearance, ids (K), the first of each class, classes: the list.
    """

    def __init__(self, classes):
        if not isinstance(classes, dict):
            classes = {} if classes is None else load_classes(classes)
        self.classes = classes
        first = {}  # name: id
        for key, name in classes.items():
            if name is not None:
                first.setdefault(name, key)
        self.names, self.ids = list(first), list(first.values())
        index = {None: -1, **{name: number for number, name in enumerate(first)}}
        known = sorted((key, index[name]) for key, name in classes.items() if key != "*")
        self._known = np.array(known or [(-1, -1)], np.int64).T  # ids, indices
        self._other = -1 if "*" in classes else -2
        self._small = self._find(np.arange(2 ** 16))  # images hold no more than 16 bits

    def __call__(self, ids):
        return self._small[ids] if ids.dtype.itemsize < 4 else self._find(ids)

    def indices(self, ids, path):
        """The same for ids that were read from a file; ValueError if one is not listed."""
        result = self(ids)
        if result.min() < -1:
            raise ValueError(f"{path}: label {ids[result < -1][0]} is not in the class list")
        return result

    def _find(self, ids):
        known, index = self._known
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[place] == ids, index[place], self._other).astype(np.int32)


def read_label_map(path, source, target):
    """Two columns of scannetv2-labels.combined.tsv -> {source: target}, with whole numbers as int."""
    label_map = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path, "label map")), delimiter="\t"):
            key = row[source]
            if row[target]:
                label_map[int(key) if key.isdecimal() else key] = int(row[target])
    except (csv.Error, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table with names or whole numbers in columns {source} and "
                         f"{target}: {error}") from None
    if min(label_map.values(), default=-1) < 0:
        raise ValueError(f"{path}: no number, or one below 0, in column {target}")
    return label_map


def frame_classes(classes, label_map=None):
    """Class list {id: name} for label images of ScanNet's exporter, which hold ids of its label table.

    label_map: path of scannetv2-labels.combined.tsv, if the list's ids are NYU40's (ScanNet20) and not the
    table's (ScanNet200). The classes keep their order; ids that are not listed are then ignored.
    """
    if label_map is None:
        return classes
    nyu40 = read_label_map(label_map, "id", "nyu40id")
    of_table = {"*": None}
    for own, name in classes.items():
        of_table |= {key: name for key in sorted(nyu40) if nyu40[key] == own}
    return of_table


# ---------------------------------------------------------------------------------------------- splits


def read_split(path):
    """File with one `scene` or `scene/frame` per line -> pairs (scene, frame); frame "": the scene."""
    lines = [line.strip() for line in read_text(path, "split file").splitlines()]
    pairs = [tuple(line.removesuffix("/").partition("/")[::2]) for line in lines if line]
    if not pairs:
        raise ValueError(f"split file {path} is empty")
    return pairs


def check_splits(sources, kinds=("label-filt", "instance-filt")):
    """ValueError if two splits share a frame (or scan), or some scenes have a folder that others lack.

    sources: one source of frames or scans per split. kinds: folders that all scenes have, or none.
    """
    found = {}  # name: title of its source
    for source in sources:
        title = getattr(source, "title", type(source).__name__)
        for name in getattr(source, "names", ()):
            if name in found:
                raise ValueError(f"{name} is in two splits, {found[name]} and {title}")
            found[name] = title
    for kind in kinds:
        has = {}
        for source in sources:
            for folder, present in getattr(source, "folders", {}).items():
                has[folder] = kind in present
        if len(set(has.values())) == 2:
            lacking, having = min(has, key=has.get), max(has, key=has.get)
            raise ValueError(f"{lacking / kind} does not exist, but {having / kind} does: all scenes need "
                             "it, or none")


# ---------------------------------------------------------------------------------------------- frames


class Scene(NamedTuple):
    """What the frames of a scene share."""
    folder: Path
    colors: dict    # stem: path of the color image
    folders: dict   # "pose", "depth" and, if they are read, "label" and "instance": name of the folder
    matrices: dict  # "color intrinsics", ...: a matrix
    cameras: list   # files that these were read from
    sizes: dict     # "color", "depth": (H, W) of the first image, and its path

    def path(self, kind, stem):
        ending = "txt" if kind == "pose" else "png"
        return f"{self.folder}/{self.folders[kind]}/{stem}.{ending}"

    def list_files(self):
        """What `path` may name, as a set: one listing per folder instead of a look at every file."""
        folders = [f"{self.folder}/{name}" for name in self.folders.values()]
        return {f"{folder}/{name}" for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}


class ScanNetFrames:
    """A source of frames (see data.py) in ScanNet's exported 2D layout, read when indexed.

    root/<scene>/{color/<n>.jpg|png, depth/<n>.png (uint16 millimeters, 0 and 65535 = none), pose/<n>.txt
    (camera to world), intrinsic/intrinsic_{color,depth}.txt} and optionally label-filt/<n>.png,
    instance-filt/<n>.png (0 = none) and intrinsic/extrinsic_{color,depth}.txt. In scannet_frames_25k these
    are label, instance and intrinsics_{color,depth}.txt. The color images of a scene have one size, and its
    depth images, because they share the scene's intrinsics.

    An extrinsic maps a camera to the device, whose pose the pose file then is: "the mapping to base
    frame in a multi-view setup (typically it's depth to color; and the color extrinsic is the
    identity)", says sensorData.h of ScanNet's SensReader. In ScanNet itself both are the identity.

    classes: a file for `load_classes` or its result; None: labels and instances are not read.
    split: a file with one `scene` or `scene/frame` per line; None: all frames.

    Attributes: names ["scene/frame"], class_names and class_ids (K), num_skipped (frames whose pose is
    lost: inf or NaN), left_out {what was not taken, in words: how many}, folders {scene folder: which of
    label-filt and instance-filt it has}, title (split or root).
    """

    def __init__(self, root, classes, split=None):
        self.root = Path(root)
        self.title = str(split or root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"frame folder {self.root} does not exist")
        self._labeled = classes is not None
        self._table = ClassTable(classes)
        self.class_names, self.class_ids = self._table.names, self._table.ids
        self.settings = repr(self._table.classes)  # with the files, all that the frames depend on
        self.folders = {}
        self.left_out = Counter()
        self.num_skipped = 0
        self.names = []
        self._frames = []  # (scene, stem, pose)
        folders = {path.name: path for path in visible(self.root, "*") if path.is_dir() or not path.exists()}
        scenes = {name: path for name, path in folders.items() if (path / "color").is_dir()}
        if not scenes:
            raise ValueError(f"{self.root}: no <scene>/color folder in it")
        if len(folders) > len(scenes):
            self.left_out["folders (or links to nothing) without a folder `color`"] = len(folders) - len(scenes)
        opened = {}
        pairs = [(name, "") for name in sorted(scenes, key=natural_key)] if split is None else read_split(split)
        for name, frame in pairs:
            if name not in scenes:
                raise FileNotFoundError(f"split file {split}: no scene {name!r} with color images in {self.root}")
            if name not in opened:
                scene = self._open_scene(scenes[name])
                opened[name] = scene, scene.list_files()
            scene, files = opened[name]
            if frame and frame not in scene.colors:
                raise FileNotFoundError(f"split file {split}: no color image of frame {frame!r} in scene {name!r}")
            for stem in [frame] if frame else sorted(scene.colors, key=natural_key):
                self._add_frame(f"{name}/{stem}", scene, files, stem)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"{split}: frame {twice[0]} is named more than once")
        if not self.names:
            raise ValueError(f"{self.title}: no frame left ({self.num_skipped} skipped for a lost pose)")

    def _open_scene(self, folder):
        colors = {}
        for path in sorted((folder / "color").iterdir()):
            is_image = path.suffix.lower() in (".jpg", ".jpeg", ".png")
            if path.name.startswith("."):
                self.left_out["dot files"] += 1
            elif not is_image:
                self.left_out["files with other endings than .jpg, .jpeg and .png"] += 1
            elif path.stem in colors:
                raise ValueError(f"{path} and {colors[path.stem].name} are two images of one frame")
            else:
                colors[path.stem] = path
        if not colors:
            raise ValueError(f"{folder / 'color'}: no color image (.jpg, .jpeg or .png) in it")

        is_small = (folder / "intrinsics_color.txt").is_file()  # scannet_frames_25k
        folders = {"pose": "pose", "depth": "depth"}
        for kind in ("label", "instance") if self._labeled else ():
            name = kind if is_small else f"{kind}-filt"
            if (folder / name).is_dir():
                folders[kind] = name
        self.folders[folder] = [f"{kind}-filt" for kind in ("label", "instance") if kind in folders]
        return Scene(folder, colors, folders, *self._read_cameras(folder, is_small), {})

    def _read_cameras(self, folder, is_small):
        """Matrices by name, and the files that they are read from."""
        matrices, files = {}, []
        intrinsics = "intrinsics_{}.txt" if is_small else "intrinsic/intrinsic_{}.txt"
        for kind in ("color", "depth"):
            for field, pattern, read in (("intrinsics", intrinsics, read_intrinsics),
                                         ("extrinsics", "intrinsic/extrinsic_{}.txt", read_pose)):
                path = folder / pattern.format(kind)
                if path.is_file() or (kind, field) == ("color", "intrinsics"):
                    matrices[f"{kind} {field}"] = read(path, f"{kind} {field}")
                    files.append(path)
        if any(matrix is None for matrix in matrices.values()):
            raise ValueError(f"{folder}/intrinsic: extrinsics hold inf or NaN")
        return matrices, files

    def _add_frame(self, name, scene, files, stem):
        for path in (scene.path(kind, stem) for kind in scene.folders):
            if path not in files:
                raise FileNotFoundError(f"{path} does not exist, but {scene.colors[stem]} does")
        if not scene.sizes:
            for kind, path in (("color", scene.colors[stem]), ("depth", scene.path("depth", stem))):
                size = image_size(path, kind)
                scene.sizes[kind] = size, path
                field = f"{kind} intrinsics"
                if field in scene.matrices:
                    check_principal_point(scene.matrices[field], size, f"{scene.folder}: {field}")
        pose = read_pose(scene.path("pose", stem))
        if pose is None:
            self.num_skipped += 1
        else:
            self.names.append(name)
            self._frames.append((scene, stem, pose))

    def __len__(self):
        return len(self.names)

    def files(self, index):
        """Paths of all files that a frame is read from."""
        scene, stem, _ = self._frames[index]
        paths = [scene.path(kind, stem) for kind in scene.folders]
        return list(map(str, (scene.colors[stem], *paths, *scene.cameras)))

    def color_files(self, index):
        """The same for `color`."""
        scene, stem, _ = self._frames[index]
        return [str(scene.colors[stem])]

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame, without reading the rest of it."""
        scene, stem, _ = self._frames[index]
        return read_color(scene.colors[stem])

    def __getitem__(self, index):
        scene, stem, pose = self._frames[index]
        path = scene.path("depth", stem)
        color = self.color(index)
        depth = read_depth(path)
        intrinsics = scene.matrices["color intrinsics"]
        if "depth intrinsics" not in scene.matrices and depth.shape != color.shape[:2]:
            raise ValueError(f"{path}: depth has size {depth.shape}, color has size {color.shape[:2]}, and "
                             "depth has no intrinsics of its own (intrinsic_depth.txt)")
        for kind, image, file in (("color", color, scene.colors[stem]), ("depth", depth, path)):
            size, first = scene.sizes[kind]
            if image.shape[:2] != size:
                raise ValueError(f"{file}: the {kind} image has size {image.shape[:2]}, but {Path(first).name} "
                                 f"has {size}, and the intrinsics of the scene fit one size alone")
        color_pose = pose @ scene.matrices.get("color extrinsics", np.eye(4))
        depth_pose = pose @ scene.matrices.get("depth extrinsics", np.eye(4))
        frame = {"name": self.names[index], "color": color, "depth": depth, "label": None, "instance": None,
                 "world2cam": np.linalg.inv(color_pose), "intrinsics": intrinsics,
                 "depth_intrinsics": scene.matrices.get("depth intrinsics", intrinsics)}
        if not np.array_equal(color_pose, depth_pose):
            frame["depth_world2cam"] = np.linalg.inv(depth_pose)
        for kind in scene.folders.keys() & {"label", "instance"}:
            path = scene.path(kind, stem)
            ids = read_index_image(path, kind)
            if ids.shape not in (color.shape[:2], depth.shape):
                raise ValueError(f"{path}: {kind} has size {ids.shape}, neither the color image's "
                                 f"{color.shape[:2]} nor the depth image's {depth.shape}")
            if kind == "label":
                frame["label"] = self._table.indices(ids, path)
            else:
                frame["instance"] = np.where(ids > 0, ids.astype(np.int32), -1)
        return frame


def write_frames(frames, root):
    """Writes a source of frames in ScanNet's exported layout -> its class list {id: name or None}.

    Depth is rounded to millimeters. ValueError if a camera changes within a scene, which has one file of it.
    """
    for index in range(len(frames)):
        frame = frames[index]
        scene, stem = frame["name"].split("/")
        millimeters = np.rint(frame["depth"] * 1000)
        images = {f"color/{stem}.jpg": frame["color"],
                  f"depth/{stem}.png": np.where(millimeters < 65535, millimeters, 0).astype(np.uint16)}
        for kind in ("label", "instance"):
            if frame.get(kind) is not None:
                images[f"{kind}-filt/{stem}.png"] = (frame[kind] + 1).astype(np.uint16)  # 0 = none
        extrinsics = np.eye(4)
        if "depth_world2cam" in frame:
            extrinsics = frame["world2cam"] @ np.linalg.inv(frame["depth_world2cam"])
        matrices = {f"pose/{stem}.txt": np.linalg.inv(frame["world2cam"]),
                    "intrinsic/intrinsic_color.txt": frame["intrinsics"],
                    "intrinsic/intrinsic_depth.txt": frame["depth_intrinsics"],
                    "intrinsic/extrinsic_depth.txt": extrinsics}
        for name, content in {**images, **matrices}.items():
            path = Path(root) / scene / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in images:
                Image.fromarray(content).save(path, quality=95)
            elif path.exists() and not np.allclose(np.loadtxt(path), content, atol=1e-6):
                raise ValueError(f"{path}: {frame['name']} has another camera than the frames before it")
            else:
                np.savetxt(path, content)
    return {0: None, **dict(enumerate(getattr(frames, "class_names", ()), 1))}


# ----------------------------------------------------------------------------------------------- scans

PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
             "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
             "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}
WHOLE = ("u1", "u2", "u4", "i1", "i2", "i4")
GEOMETRY = {**dict.fromkeys("xyz", ("f4", "f8")), **dict.fromkeys(("red", "green", "blue"), ("u1",))}


def read_ply_vertices(path, fields):
    """Vertices of a PLY file that begins with them -> structured array (P,). fields: {name: allowed types}."""
    content = read_bytes(path, "mesh")
    header = re.match(rb"ply.*?\nend_header\r?\n", content[:2 ** 16], re.DOTALL)
    text = header[0].decode("ascii", "replace").replace("\r", "") if header else ""
    text = re.sub(r"(comment|obj_info).*\n", "", text)
    match = re.match(r"ply\nformat (ascii|binary_little_endian) 1.0\n"
                     r"element vertex (\d{1,9})\n((?:property \w+ \S+\n)+)(?:element|end_header)", text)
    if not match:
        raise ValueError(f"{path} is not an ascii or binary_little_endian PLY file that begins with its vertices")
    count = int(match[2])
    properties = [line.split()[1:] for line in match[3].splitlines()]
    types = {name: PLY_TYPES.get(word) for word, name in properties}
    if len(types) < len(properties) or None in types.values() or count == 0:
        raise ValueError(f"{path}: {count} vertices with properties {properties}, not plain numbers")
    for name, allowed in fields.items():
        if types.get(name) not in allowed:
            raise ValueError(f"{path}: vertices have no property {name} of type {allowed}, but {types}")
    dtype = np.dtype([(name, f"<{kind}") for name, kind in types.items()])
    start = header.end()
    if match[1] == "ascii":
        words = content[start:].split(None, count * len(types))[:count * len(types)]
        table = as_matrix([words], path, f"table of {count} vertices", [(1, count * len(types))])
        vertices = np.empty(count, dtype)
        for name, column in zip(types, table.reshape(count, -1).T):
            vertices[name] = column
        return vertices
    if len(content) - start < count * dtype.itemsize:
        raise ValueError(f"{path} is truncated: {count} vertices of {dtype.itemsize} bytes, "
                         f"{len(content) - start} bytes left")
    return np.frombuffer(content, dtype, count, start)


def read_ply_triangles(path):
    """Triangles of a binary PLY file that ends with its faces -> (F, 3) int64 indices of vertices.

    Raises ValueError for a file without faces, or with others than triangles.
    """
    content = read_bytes(path, "mesh")
    head = content[:2 ** 16].partition(b"end_header\n")[0]
    match = re.search(rb"element face (\d{1,9})\nproperty list u(?:char|int8) u?int(?:32)? vertex_ind\w+\n$", head)
    count = int(match[1]) if match else 0
    dtype = np.dtype([("corners", "u1"), ("vertices", "<u4", 3)])
    if count * dtype.itemsize > len(content):
        raise ValueError(f"{path} is truncated: {count} faces")
    faces = np.frombuffer(content, dtype, count, len(content) - count * dtype.itemsize)
    if count == 0 or (faces["corners"] != 3).any():
        raise ValueError(f"{path} has no normals: it does not end with triangles, a list of vertex_indices each")
    return faces["vertices"].astype(np.int64)


def vertex_normals(points, triangles):
    """Unit normals (P, 3) float32 of a mesh, the mean of its faces by area; 0 at a vertex without face.

    points (P, 3); triangles (F, 3) indices, counter-clockwise seen from outside.
    """
    a, b, c = points[triangles].astype(np.float64).transpose(1, 0, 2)
    faces = np.cross(b - a, c - a)  # (F, 3), twice the area long
    corners = triangles.ravel()
    total = [np.bincount(corners, np.repeat(axis, 3), len(points)) for axis in faces.T]
    normals = np.stack(total, 1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0).astype(np.float32)


def read_mesh(path, normals=False):
    """A PLY file with colors -> points, colors and, if asked for, normals, as of `ScanNetScenes`."""
    mesh = read_ply_vertices(path, GEOMETRY)
    points = np.stack([mesh[axis] for axis in "xyz"], 1).astype(np.float32)
    colors = np.stack([mesh[channel] for channel in ("red", "green", "blue")], 1).astype(np.float32)
    if not (np.abs(points) < 1e4).all():  # also NaN
        raise ValueError(f"{path}: vertices are not finite, or more than 10 km from the origin, where float32 is too "
                         "coarse: subtract an offset (docs/cameras.md)")
    fields = {"points": points, "colors": colors / 255}
    if normals:
        triangles = read_ply_triangles(path)
        if triangles.max() >= len(points):
            raise ValueError(f"{path}: a face has vertex {triangles.max()} of {len(points)}")
        fields["normals"] = vertex_normals(points, triangles)
    return fields


class CloudFile:
    """A mesh or cloud in one PLY file, as a scan without labels: what data.SceneDataset takes."""

    class_names = ()

    def __init__(self, path, normals=False):
        self.names = [Path(path).stem]
        self.scan = {"name": self.names[0], **read_mesh(path, normals), "alignment": np.eye(4)}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {**self.scan, "name": self.names[index]}


def read_axis_alignment(path):
    """<scene>.txt -> (4, 4) float64 that turns walls parallel to x and y, and the floor to z = 0."""
    for line in read_text(path, "scan description").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            matrix = as_pose(value.split(), path, "axisAlignment")
            if matrix is None:
                raise ValueError(f"{path}: axisAlignment is not finite")
            return matrix
    raise ValueError(f"{path} has no axisAlignment (scans of the test split have none: align=False)")


def whole_numbers(values, path, field):
    """List of whole numbers >= 0 -> int64 array (n,)."""
    try:
        numbers = np.array(values)
        if numbers.ndim != 1 or numbers.size and (numbers.dtype != np.int64 or numbers.min() < 0):
            raise ValueError(f"shape {numbers.shape} of {numbers.dtype}")
    except ValueError as error:
        raise ValueError(f"{path}: {field} is not a list of whole numbers >= 0: {error}") from None
    return numbers.astype(np.int64)


def read_groups(path):
    """.aggregation.json -> objects of a scan, as tuples (objectId, label, segments (n,) int64).

    An object that is listed again with the same segments and label, as in scene0217_00, is left out.
    """
    groups = {}
    listed = read_json(path, "annotation").get("segGroups")
    for group in listed if isinstance(listed, list) else [None]:
        if not isinstance(group, dict) or not {"segments", "objectId", "label"} <= group.keys():
            raise ValueError(f"{path}: no segGroups, or one without segments, objectId or label")
        object_id, = whole_numbers([group["objectId"]], path, "objectId")
        segments = whole_numbers(group["segments"], path, "segments of a group")
        key = str(group["label"]), segments.tobytes()
        groups.setdefault(key, (object_id, str(group["label"]), segments))
    return list(groups.values())


class ScanNetScenes:
    """Whole scans of ScanNet, read when indexed: what data.SceneDataset takes.

    A scan is a dict: name, points (P, 3) float32 meters in the world of the camera poses, colors (P, 3)
    float32 in [0, 1], alignment (4, 4) float64 (identity if align=False) and, if `classes` is given, labels
    and instances (P,) int64 with -1 = none and superpoints (P,) int64 of the mesh's oversegmentation.

    root/<scene>/<scene>{_vh_clean_2.ply, .txt} and, for labels, {_vh_clean_2.0.010000.segs.json,
    .aggregation.json, _vh_clean_2.labels.ply}.
    classes: a file for `load_classes` or its result, with ids of NYU40, as in labels.ply (ScanNet20).
    label_map: path of scannetv2-labels.combined.tsv. The ids are then that table's, found by the annotated
    names (ScanNet200).
    split: a file with one `scene` (or `scene/frame`) per line; None: all scans.
    normals: scans also hold normals (P, 3) float32, from the faces of the mesh.

    Attributes: names ["scene"], class_names and class_ids (K), left_out {what was not taken: how many},
    title (split or root).
    """

    def __init__(self, root, classes, split=None, label_map=None, align=True, normals=False):
        self.root = Path(root)
        self.title = str(split or root)
        self.align = align
        self.normals = normals
        if not self.root.is_dir():
            raise FileNotFoundError(f"scan folder {self.root} does not exist")
        self._table = ClassTable(classes)
        self.class_names, self.class_ids = self._table.names, self._table.ids
        self._label_map = None if label_map is None else read_label_map(label_map, "raw_category", "id")
        self.settings = repr((self._table.classes, self._label_map, align, normals))
        self._suffixes = ["_vh_clean_2.ply"] + [".txt"] * align
        self._labeled = classes is not None
        if self._labeled:
            self._suffixes += ["_vh_clean_2.0.010000.segs.json", ".aggregation.json"]
            self._suffixes += ["_vh_clean_2.labels.ply"] * (label_map is None)
        meshes = list(self.root.glob("*/*_vh_clean_2.ply"))
        present = {path.parent.name for path in meshes if path.name.startswith(path.parent.name)}
        self.left_out = +Counter({"meshes not named as their folder": len(meshes) - len(present)})
        self.names = sorted(present)
        if split is not None:
            self.names = list(dict.fromkeys(scene for scene, _ in read_split(split)))
        for name in self.names:
            for suffix in self._suffixes:
                if name not in present or not self._path(name, suffix).is_file():
                    raise FileNotFoundError(f"{self._path(name, suffix)} does not exist")
        if not self.names:
            raise ValueError(f"{self.root}: no scan in it")

    def files(self, index):
        """Paths of all files that a scan is read from."""
        return [self._path(self.names[index], suffix) for suffix in self._suffixes]

    def _path(self, name, suffix):
        return self.root / name / (name + suffix)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        scan = {"name": name, **read_mesh(self._path(name, "_vh_clean_2.ply"), self.normals), "alignment": np.eye(4)}
        count = len(scan["points"])
        if self.align:
            scan["alignment"] = read_axis_alignment(self._path(name, ".txt"))
        if not self._labeled:
            return scan
        ids, instances, segments = self._read_annotation(name, count)
        path = self._path(name, ".aggregation.json")
        if self._label_map is None:
            path = self._path(name, "_vh_clean_2.labels.ply")
            ids = read_ply_vertices(path, {"label": WHOLE})["label"].astype(np.int64)
            if len(ids) != count or ids.min() < 0:
                raise ValueError(f"{path} has {len(ids)} vertices with labels from {ids.min()}, expected "
                                 f"labels >= 0 of the {count} vertices of the mesh")
        labels = self._table.indices(ids, path).astype(np.int64)
        return {**scan, "labels": labels, "instances": instances, "superpoints": segments}

    def _read_annotation(self, name, count):
        """Ids (0 without a label map), instances and segments, numbered from 0; each (count,) int64."""
        path = self._path(name, "_vh_clean_2.0.010000.segs.json")
        numbers = whole_numbers(read_json(path, "annotation").get("segIndices"), path, "segIndices")
        segment_ids, segments = np.unique(numbers, return_inverse=True)
        if len(segments) != count:
            raise ValueError(f"{path}: segIndices has {len(segments)} entries, the mesh {count} vertices")
        path = self._path(name, ".aggregation.json")
        ids = np.zeros(len(segment_ids), np.int64)  # per segment
        instances = np.full(len(segment_ids), -1)
        for object_id, label, own in read_groups(path):
            unknown = np.setdiff1d(own, segment_ids)
            if len(unknown):
                raise ValueError(f"{path}: object {object_id} has segment {unknown[0]}, not in segs.json")
            place = np.searchsorted(segment_ids, own)
            if len(np.unique(place)) < len(place) or (instances[place] >= 0).any():
                raise ValueError(f"{path}: object {object_id} has a segment that is listed twice")
            instances[place] = object_id
            if self._label_map is not None:
                if label not in self._label_map:
                    raise ValueError(f"{path}: label {label!r} is not in the label map")
                ids[place] = self._label_map[label]
        return ids[segments], instances[segments], segments
