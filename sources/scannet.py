# SPDX-License-Identifier: MIT
"""RGB-D frames and scans in files: ScanNet (Dai et al. 2017) as its tools write it, and folders of posed frames.

`ScanNetFrames` reads the 2D layout that ScanNet's exporter writes, to which many other data sets are converted.
`PosedFrames` reads unlabelled folders of frame-*.color, depth and pose files, such as 7-Scenes. `ScanNetScenes` reads
mesh, labels, instances and oversegmentation of whole scans. All are sequences that read a file when they are indexed,
and name missing files at construction. Class lists are text files, see `load_classes`.

A file that cannot be read as what it should be is a ValueError or FileNotFoundError that names it. Sizes are bounded
before memory is taken.

Imports numpy, PIL.
"""
import csv
import io
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 50_000_000  # of an image
MAX_SHIFT = 1e8  # metres; UTM and earth-centred coordinates stay below 1.1e7
# bytes of a file; what is made of one takes less than 1 GiB
MAX_IMAGE = 2 ** 28
MAX_MESH = 2 ** 27
MAX_JSON = 2 ** 25
MAX_SPLIT = 2 ** 24
MAX_LIST = 2 ** 22
MAX_MATRIX = 2 ** 16

# ------------------------------------------------------------------------------------------------------------- files


def read_bytes(path, field, limit):
    """The content of a regular file. FileNotFoundError if there is none, ValueError if it has over `limit` bytes."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{field} {path} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{field} {path} is not a file")
    if status.st_size > limit:
        raise ValueError(f"{path}: {field} has {status.st_size:,} bytes, more than {limit:,}")
    with open(path, "rb") as file:
        return file.read()


def read_text(path, field, limit=MAX_LIST):
    """The content of a UTF-8 text file, without a byte order mark."""
    try:
        return read_bytes(path, field, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {field} is not UTF-8 text: {error}") from None


def load_classes(path):
    """Class list with one "id name" pair per line -> {id: name}; the name `unlabeled` becomes None = ignored.

    Ids that share a name are one class. With the line "* unlabeled", ids that are not listed are ignored, too.
    """
    classes = {}
    for number, line in enumerate(read_text(path, "class list").splitlines(), 1):
        if not line.strip():
            continue
        key, _, name = line.strip().partition(" ")
        name = name.strip()
        is_id = key.isdecimal() and len(key) <= 18  # fits 64 bits
        if not name or not name.isprintable() or not (is_id or (key == "*" and name == "unlabeled")):
            raise ValueError(f'{path} line {number}: expected "id name" or "* unlabeled", got {line!r}')
        key = key if key == "*" else int(key)
        if key in classes:
            raise ValueError(f"{path} line {number}: id {key} is listed twice")
        classes[key] = None if name == "unlabeled" else name
    if not any(classes.values()):
        raise ValueError(f"class list {path} names no class")
    return classes


class ClassTable:
    """{id: name or None} -> `names`, K class names in order of first appearance, and a map of ids to their indices.

    Called with integers >= 0 of any shape, it gives int32 of that shape: 0..K-1, -1 = ignored, -2 = not listed.
    """

    def __init__(self, classes):
        for key, name in classes.items():
            is_id = type(key) is int and key >= 0
            if not (is_id or (key == "*" and name is None)) or not (name is None or (isinstance(name, str) and name)):
                raise ValueError(f'a class list maps ids >= 0 to names or None, or "*" to None, got {key!r}: {name!r}')
        self.names = list(dict.fromkeys(name for name in classes.values() if name is not None))
        self.ids = [next(key for key in classes if classes[key] == name) for name in self.names]  # the first of each
        index = {None: -1, **{name: i for i, name in enumerate(self.names)}}
        self._other = -1 if "*" in classes else -2
        self._small = np.full(2 ** 16, self._other, np.int32)  # images hold no more than 16 bits
        self._large = {key: index[name] for key, name in classes.items() if key != "*" and key >= 2 ** 16}
        for key, name in classes.items():
            if key != "*" and key < 2 ** 16:
                self._small[key] = index[name]

    def __call__(self, ids):
        result = self._small.take(ids, mode="clip")
        large = ids >= 2 ** 16 if ids.dtype.itemsize > 2 else np.zeros(1, bool)
        if large.any():
            values, inverse = np.unique(ids[large], return_inverse=True)
            result[large] = np.array([self._large.get(value, self._other) for value in values.tolist()])[inverse]
        return result


def read_matrix(path, field, shapes):
    """Whitespace-separated text file -> float64 matrix of one of `shapes`."""
    rows = [line.split() for line in read_text(path, f"{field} file", MAX_MATRIX).splitlines() if line.strip()]
    try:
        matrix = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: {field} is not a matrix of numbers: {error}") from None
    if matrix.shape not in shapes:
        raise ValueError(f"{path}: {field} has shape {matrix.shape}, expected {' or '.join(map(str, shapes))}")
    return matrix


def check_intrinsics(matrix, path, field):
    """ValueError if (3, 3) is no pinhole matrix in pixels: focal lengths of 1 to 1e6, the rest up to 1e6."""
    focal = matrix[[0, 1], [0, 1]]
    has_zeros = matrix[1, 0] == 0 and (matrix[2] == [0, 0, 1]).all()
    if not (np.isfinite(matrix).all() and has_zeros and focal.min() > 0):
        raise ValueError(f"{path}: {field} is not a pinhole matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]]: "
                         f"{matrix.tolist()}")
    if focal.min() < 1 or np.abs(matrix).max() > 1e6:
        raise ValueError(f"{path}: {field} is not in pixels: {matrix.tolist()}")


def read_intrinsics(path, field):
    """3 x 3 or 4 x 4 text file -> (3, 3) float64 pinhole intrinsics."""
    matrix = read_matrix(path, field, [(3, 3), (4, 4)])[:3, :3]
    check_intrinsics(matrix, path, field)
    return matrix


def check_principal_point(intrinsics, size, path):
    """ValueError if the principal point is farther from an image of size (H, W) than two images."""
    for c, extent in zip(intrinsics[:2, 2], size[::-1]):
        if not -2 * extent <= c <= 3 * extent:
            raise ValueError(f"{path}: the principal point {intrinsics[:2, 2].tolist()} is far outside of the images "
                             f"of {size[1]} x {size[0]} pixels")


def check_rigid(matrix, path, field):
    """ValueError if (4, 4) is not [[R, t], [0, 1]] with det R = 1 and |t| <= MAX_SHIFT."""
    turn, shift = matrix[:3, :3], matrix[:3, 3]
    is_rigid = np.abs(turn).max() < 2 and np.abs(turn @ turn.T - np.eye(3)).max() <= 0.01 \
        and np.abs(matrix[3] - [0, 0, 0, 1]).max() <= 1e-6
    if not is_rigid:
        raise ValueError(f"{path}: {field} is not a rotation and a shift [[R, t], [0, 1]]: {matrix.tolist()}")
    if np.linalg.det(turn) < 0:
        raise ValueError(f"{path}: {field} is mirrored, det R = -1: {matrix.tolist()}")
    if np.abs(shift).max() > MAX_SHIFT:
        raise ValueError(f"{path}: {field} shifts by more than {MAX_SHIFT:.0e} m: {shift.tolist()}")


def read_pose(path):
    """Text file of a camera-to-world matrix -> (4, 4) float64, or None if the pose is lost (inf or NaN)."""
    pose = read_matrix(path, "pose", [(4, 4)])
    if not np.isfinite(pose).all():
        return None
    check_rigid(pose, path, "pose")
    return pose


# ------------------------------------------------------------------------------------------------------------ images


def decode_image(content, path, field, formats):
    """Bytes of an image file -> PIL image, verified and decoded to the last byte."""
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        size = image.size
        if size[0] * size[1] <= MAX_PIXELS:
            image.verify()  # checksums, most of which decoding ignores; afterwards the image must be opened anew
            image = Image.open(io.BytesIO(content), formats=formats)
            image.load()
    except Exception as error:  # Pillow has no common base for what broken files raise
        raise ValueError(f"{path}: {field} image cannot be decoded: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{path}: {field} image has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")
    return image


def image_size(path, field, formats=("JPEG", "PNG")):
    """(H, W) of an image file, from its header."""
    try:
        with Image.open(path, formats=formats) as image:
            return image.size[::-1]
    except Exception as error:
        raise ValueError(f"{path}: {field} image cannot be decoded: {error}") from error


def read_color(path):
    """JPEG or PNG file with 8 bits per channel -> (H, W, 3) uint8 RGB."""
    image = decode_image(read_bytes(path, "colour image", MAX_IMAGE), path, "colour", ("JPEG", "PNG"))
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P"):
        raise ValueError(f"{path}: colour image has mode {image.mode}, expected RGB, grey or a palette of 8 bits")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_index_image(path, field, bits=(8, 16)):
    """PNG with one unsigned integer per pixel: greyscale of `bits` or, if 8 bits are allowed, a palette -> (H, W)."""
    content = read_bytes(path, f"{field} image", MAX_IMAGE)
    image = decode_image(content, path, field, ("PNG",))
    depth, kind = content[24], content[25]  # of IHDR; Pillow's mode does not tell 4-bit greyscale, which it rescales
    is_grey = kind == 0 and depth in bits
    is_palette = kind == 3 and 8 in bits
    if content[12:16] != b"IHDR" or not (is_grey or is_palette):
        words = {0: "greyscale", 2: "RGB", 3: "a palette", 4: "greyscale with alpha", 6: "RGBA"}
        raise ValueError(f"{path}: {depth}-bit {field} image of {words.get(kind, 'unknown kind')}, expected greyscale "
                         f"of {' or '.join(map(str, bits))} bits")
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------------------ frames


def natural_key(name):
    """Sort key that puts "frame-2" before "frame-10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def read_split(path):
    """File with one `scene` or `scene/frame` per line -> list of pairs (scene, frame); frame "": all of the scene.

    Both are names inside the data folder, never paths out of it.
    """
    lines = read_text(path, "split file", MAX_SPLIT).splitlines()
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise ValueError(f"split file {path} is empty")
    pairs = []
    for entry in entries:
        parts = entry.removesuffix("/").split("/")
        are_names = all(part not in ("", ".", "..") and len(part.encode()) < 240 for part in parts)
        if len(parts) > 2 or not are_names or not entry.isprintable() or "\\" in entry:
            raise ValueError(f"split file {path}: {entry[:240]!r} is not the name of a scene or scene/frame")
        pairs.append((parts[0], parts[1] if len(parts) == 2 else ""))
    return pairs


def check_splits(sources, kinds=("label-filt", "instance-filt")):
    """ValueError if two splits share a frame (or scan), or if some of their scenes have a folder that others lack.

    sources: one source of frames or scans per split. kinds: folders of ScanNetFrames that all scenes have, or none.
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
                has[folder / kind] = kind in present
        if any(has.values()) and not all(has.values()):
            lacking = next(folder for folder in has if not has[folder])
            having = next(folder for folder in has if has[folder])
            raise ValueError(f"{lacking} does not exist, but {having} does: all scenes need it, or none")


def color_images(folder, pattern):
    """{stem: path} of the images in a folder whose names match `pattern` (stem).suffix; two of one stem: ValueError."""
    colors = {}
    for path in folder.iterdir():
        match = re.fullmatch(pattern, path.name, re.IGNORECASE)
        if not match:
            continue
        if match[1] in colors:
            raise ValueError(f"{path} and {colors[match[1]].name} are two images of one frame")
        colors[match[1]] = path
    if not colors:
        raise ValueError(f"{folder}: no colour image (.jpg, .jpeg or .png) in it")
    return colors


class FrameFolders:
    """What sources of frames (see data.py) in scene folders share; ScanNetFrames and PosedFrames complete it.

    Attributes: names ["scene/frame"], num_skipped (frames whose pose is lost: inf or NaN), title (split or root).
    """

    class_names = ()

    def __init__(self, root, split):
        self.root = Path(root)
        self.title = str(split or root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"frame folder {self.root} does not exist")
        self.names = []
        self.num_skipped = 0
        self._scenes, self._poses, self._colors = {}, [], []  # by scene, by frame, by frame
        pairs = [(scene, "") for scene in self._all_scenes()] if split is None else read_split(split)
        for scene in dict.fromkeys(scene for scene, _ in pairs):
            if not self._has_scene(scene):
                raise FileNotFoundError(f"split file {split}: {self.root} has no scene {scene!r} with colour images")
        for scene, frame in pairs:
            if scene not in self._scenes:
                self._scenes[scene] = self._open_scene(scene)
            colors = self._scenes[scene]["colors"]
            if frame and frame not in colors:
                raise FileNotFoundError(f"split file {split}: scene {scene!r} has no colour image of frame {frame!r}")
            for stem in [frame] if frame else sorted(colors, key=natural_key):
                self._add_frame(scene, stem)
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"{split}: frame {twice} is named more than once")
        if not self.names:
            raise ValueError(f"{self.title}: no frame left ({self.num_skipped} skipped for a lost pose)")

    def _add_frame(self, scene, stem):
        color = self._scenes[scene]["colors"][stem]
        missing = self._scenes[scene]["missing"].get(stem)
        if missing is not None:
            raise FileNotFoundError(f"{missing} does not exist, but {color} does")
        pose = read_pose(self._path(scene, stem, "pose"))
        if pose is None:
            self.num_skipped += 1
            return
        self.names.append(f"{scene}/{stem}")
        self._poses.append(pose)
        self._colors.append(color)

    def __len__(self):
        return len(self.names)

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame, without reading the rest of it."""
        return read_color(self._colors[index])


def missing_files(folder, names):
    """Of {stem: file name in folder}, the paths that do not exist, by stem."""
    present = set(os.listdir(folder)) if folder.is_dir() else set()  # faster than one look-up per file
    return {stem: folder / name for stem, name in names.items() if name not in present}


class ScanNetFrames(FrameFolders):
    """A source of frames (see data.py) in ScanNet's exported 2D layout, read when indexed.

    root/<scene>/{color/<n>.jpg|png, depth/<n>.png (uint16 millimetres), pose/<n>.txt (camera to world),
    intrinsic/intrinsic_{color,depth}.txt} and optionally {label-filt,instance-filt}/<n>.png (0 = no instance). The
    colour images of a scene have one size, and its depth images, because they share the scene's intrinsics.
    classes: a file for `load_classes` or its result; None: labels and instances are not read.
    split: a file with one `scene` or `scene/frame` per line; None: all frames.

    Attributes: names ["scene/frame"], class_names (K), num_skipped (frames whose pose is lost: inf or NaN), folders
    {scene folder: which of label-filt and instance-filt it has}.
    """

    def __init__(self, root, classes, split=None):
        self._labelled = classes is not None
        self.folders = {}
        if not Path(root).is_dir():
            raise FileNotFoundError(f"frame folder {root} does not exist")
        if not self._labelled:
            classes = {}
        elif not isinstance(classes, dict):
            classes = load_classes(classes)
        self._table = ClassTable(classes)
        self.class_names = self._table.names
        self.class_ids = self._table.ids
        self.settings = repr(classes)  # with the files, all that the frames depend on
        super().__init__(root, split)

    def _all_scenes(self):
        scenes = sorted((path.parent.name for path in self.root.glob("*/color")), key=natural_key)
        if not scenes:
            hint = "; for its frame-* files give --intrinsics" if any(self.root.glob("**/frame-*.pose.txt")) else ""
            raise ValueError(f"{self.root}: no <scene>/color folder in it{hint}")
        return scenes

    def _has_scene(self, scene):
        return (self.root / scene / "color").is_dir()

    def _path(self, scene, stem, kind):
        return f"{self.root}/{scene}/{kind}/{stem}.{'txt' if kind == 'pose' else 'png'}"

    def _open_scene(self, scene):
        """What the frames of a scene share: colour images and missing files by stem, intrinsics, sizes (H, W)."""
        folder = self.root / scene
        colors = color_images(folder / "color", r"(.+)\.(?:jpg|jpeg|png)")
        kinds = [kind for kind in ("label-filt", "instance-filt") if self._labelled and (folder / kind).is_dir()]
        self.folders[folder] = kinds
        missing = missing_files(folder / "pose", {stem: f"{stem}.txt" for stem in colors})
        for kind in ("depth", *kinds):
            missing |= missing_files(folder / kind, {stem: f"{stem}.png" for stem in colors})
        paths = {kind: folder / "intrinsic" / f"intrinsic_{kind}.txt" for kind in ("color", "depth")}
        info = {"colors": colors, "missing": missing, "kinds": kinds, "intrinsics_paths": paths,
                "intrinsics": read_intrinsics(paths["color"], "colour intrinsics"), "depth_intrinsics": None}
        if paths["depth"].is_file():
            info["depth_intrinsics"] = read_intrinsics(paths["depth"], "depth intrinsics")
        whole = colors.keys() - missing
        if whole:
            first = min(whole, key=natural_key)
            info["first"] = {"color": colors[first], "depth": folder / "depth" / f"{first}.png"}
            info["sizes"] = {"color": image_size(colors[first], "colour"),
                             "depth": image_size(info["first"]["depth"], "depth", ("PNG",))}
            check_principal_point(info["intrinsics"], info["sizes"]["color"], paths["color"])
            if info["depth_intrinsics"] is not None:
                check_principal_point(info["depth_intrinsics"], info["sizes"]["depth"], paths["depth"])
        return info

    def files(self, index):
        """Paths of all files that a frame is read from."""
        scene, stem = self.names[index].split("/")
        info = self._scenes[scene]
        paths = [self._path(scene, stem, kind) for kind in ("depth", *info["kinds"])]
        paths += [str(self._colors[index]), self._path(scene, stem, "pose"), str(info["intrinsics_paths"]["color"])]
        return paths + [str(info["intrinsics_paths"]["depth"])] * (info["depth_intrinsics"] is not None)

    def __getitem__(self, index):
        name = self.names[index]
        scene, stem = name.split("/")
        info = self._scenes[scene]
        path = self._path(scene, stem, "depth")
        color = self.color(index)
        depth = read_index_image(path, "depth", (16,))
        depth_intrinsics = info["depth_intrinsics"]
        if depth_intrinsics is None:
            if depth.shape != color.shape[:2]:
                raise ValueError(f"{path}: depth has size {depth.shape}, colour has size {color.shape[:2]}, and "
                                 f"{info['intrinsics_paths']['depth']} does not exist")
            depth_intrinsics = info["intrinsics"]
        self._check_size(info, "color", color, self._colors[index])
        self._check_size(info, "depth", depth, path)
        frame = {"name": name, "color": color, "depth": depth.astype(np.float32) * np.float32(0.001),
                 "label": None, "instance": None, "world2cam": np.linalg.inv(self._poses[index]),
                 "intrinsics": info["intrinsics"], "depth_intrinsics": depth_intrinsics}
        for kind in info["kinds"]:
            field = kind.removesuffix("-filt")
            frame[field] = self._read_ids(self._path(scene, stem, kind), field, color.shape[:2], depth.shape)
        return frame

    def _check_size(self, info, kind, image, path):
        """ValueError if an image is not of the size that the scene's intrinsics belong to: its first image's."""
        size = info["sizes"][kind]
        if image.shape[:2] != size:
            raise ValueError(f"{path}: the {kind} image has size {image.shape[:2]}, but {info['first'][kind].name} has "
                             f"{size}, and the intrinsics of the scene fit one size alone")

    def _read_ids(self, path, field, color_size, depth_size):
        """Label or instance image -> (H, W) int32, -1 = none."""
        ids = read_index_image(path, field)
        if ids.shape not in (color_size, depth_size):
            raise ValueError(f"{path}: {field} has size {ids.shape}, neither the colour image's {color_size} nor the "
                             f"depth image's {depth_size}")
        if field == "instance":
            return np.where(ids > 0, ids.astype(np.int32), -1)
        label = self._table(ids)
        if label.min() < -1:
            raise ValueError(f"{path}: label {ids[label < -1][0]} is not in the class list")
        return label


class PosedFrames(FrameFolders):
    """A source of unlabelled frames (see data.py) in folders such as those of 7-Scenes, read when indexed.

    root/[<scene>/]frame-<n>{.color.jpg|png, .depth.png (uint16 millimetres, 0 and 65535 = none), .pose.txt (camera to
    world)}; frames directly in root are one scene with root's name. In 7-Scenes a scene is a folder of sequences.
    intrinsics: (3, 3) of both images of all frames, or a text file of it. 7-Scenes: f 585, c 320 240. Its depth is not
    registered to the colour images: near objects are off by some pixels.
    split: a file with one `scene` or `scene/frame-<n>` per line; None: all frames.

    Attributes: names ["scene/frame-<n>"], num_skipped (frames whose pose is lost: inf or NaN).
    """

    PATTERN = r"(frame-\d+)\.color\.(?:jpg|jpeg|png)"

    def __init__(self, root, intrinsics, split=None):
        self._intrinsics_path = None
        if isinstance(intrinsics, (str, Path)):
            self._intrinsics_path = str(intrinsics)
            intrinsics = read_intrinsics(intrinsics, "intrinsics")
        self.intrinsics = np.array(intrinsics, np.float64)
        if self.intrinsics.shape != (3, 3):
            raise ValueError(f"intrinsics have shape {self.intrinsics.shape}, expected (3, 3)")
        check_intrinsics(self.intrinsics, root, "intrinsics")
        self.settings = repr(self.intrinsics.tolist())
        self._is_scene = any(Path(root).glob("frame-*.color.*"))
        super().__init__(root, split)

    def _folder(self, scene):
        return self.root if self._is_scene else self.root / scene

    def _all_scenes(self):
        if self._is_scene:
            return [self.root.resolve().name]
        scenes = sorted({path.parent.name for path in self.root.glob("*/frame-*.color.*")}, key=natural_key)
        if not scenes:
            raise ValueError(f"{self.root}: neither frame-*.color.* nor <scene>/frame-*.color.* in it")
        return scenes

    def _has_scene(self, scene):
        if self._is_scene:
            return scene == self.root.resolve().name
        return any((self.root / scene).glob("frame-*.color.*"))

    def _path(self, scene, stem, kind):
        return f"{self._folder(scene)}/{stem}.{kind}.{'txt' if kind == 'pose' else 'png'}"

    def _open_scene(self, scene):
        """Colour images and missing files by stem."""
        folder = self._folder(scene)
        colors = color_images(folder, self.PATTERN)
        missing = missing_files(folder, {stem: f"{stem}.depth.png" for stem in colors})
        return {"colors": colors, "missing": missing | missing_files(folder, {s: f"{s}.pose.txt" for s in colors})}

    def files(self, index):
        """Paths of all files that a frame is read from."""
        scene, stem = self.names[index].split("/")
        paths = [str(self._colors[index]), self._path(scene, stem, "depth"), self._path(scene, stem, "pose")]
        return paths + [self._intrinsics_path] * (self._intrinsics_path is not None)

    def __getitem__(self, index):
        name = self.names[index]
        path = self._path(*name.split("/"), "depth")
        color = self.color(index)
        depth = read_index_image(path, "depth", (16,))
        if depth.shape != color.shape[:2]:
            raise ValueError(f"{path}: depth has size {depth.shape}, colour has size {color.shape[:2]}, but they share "
                             "their intrinsics")
        check_principal_point(self.intrinsics, depth.shape, path)
        depth = np.where(depth == 65535, 0, depth)
        return {"name": name, "color": color, "depth": depth.astype(np.float32) * np.float32(0.001), "label": None,
                "instance": None, "world2cam": np.linalg.inv(self._poses[index]), "intrinsics": self.intrinsics,
                "depth_intrinsics": self.intrinsics}


# ------------------------------------------------------------------------------------------------------------- scans

PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "float32": "f4", "float64": "f8"}
GEOMETRY = {**dict.fromkeys("xyz", ("f4", "f8")), **dict.fromkeys(("red", "green", "blue"), ("u1",))}


def read_ply_vertices(path, fields):
    """Vertices of a binary PLY file -> structured array (P,) with at least `fields`, {name: allowed types}."""
    content = read_bytes(path, "mesh", MAX_MESH)
    head, mark, _ = content[:2 ** 16].partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or lines[:1] != [["ply"]] or ["format", "binary_little_endian", "1.0"] not in lines:
        raise ValueError(f"{path} is not a binary_little_endian PLY file")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]] + [len(lines)]
    words = lines[elements[0]] if len(elements) > 1 else []
    if words[1:2] != ["vertex"]:
        raise ValueError(f"{path}: the first element of the mesh is not `vertex`")
    if len(words) != 3 or not words[2].isdecimal() or not 0 < len(words[2]) < 10 or int(words[2]) == 0:
        raise ValueError(f"{path}: {' '.join(words)!r} is no number of vertices")
    count = int(words[2])
    properties = [line for line in lines[elements[0]:elements[1]] if line[:1] == ["property"]]
    if any(len(line) != 3 or line[1] not in PLY_TYPES for line in properties):
        raise ValueError(f"{path}: vertices have properties other than plain numbers")
    kinds = {name: PLY_TYPES[kind] for _, kind, name in properties}
    missing = fields.keys() - kinds
    if missing:
        raise ValueError(f"{path}: vertices have no property {', '.join(sorted(missing))}, only {', '.join(kinds)}")
    if len(kinds) < len(properties):
        raise ValueError(f"{path}: two properties have one name: {', '.join(line[2] for line in properties)}")
    for name, allowed in fields.items():
        if kinds[name] not in allowed:
            raise ValueError(f"{path}: property {name} has type {kinds[name]}, expected {' or '.join(allowed)}")
    dtype = np.dtype([(name, "<" + kind) for name, kind in kinds.items()])
    start = len(head) + len(mark)
    if len(content) - start < count * dtype.itemsize:
        raise ValueError(f"{path} is truncated: {count} vertices of {dtype.itemsize} bytes, {len(content) - start} "
                         "bytes left")
    return np.frombuffer(content, dtype, count, start)


def read_axis_alignment(path):
    """<scene>.txt -> (4, 4) float64 that moves the scan's walls parallel to x and y and its floor to z = 0."""
    for line in read_text(path, "scan description").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            try:
                matrix = np.array(value.split(), np.float64)
            except ValueError as error:
                raise ValueError(f"{path}: axisAlignment: {error}") from None
            if matrix.size != 16 or not np.isfinite(matrix).all():
                raise ValueError(f"{path}: axisAlignment has {np.isfinite(matrix).sum()} finite numbers, expected 16")
            matrix = matrix.reshape(4, 4)
            check_rigid(matrix, path, "axisAlignment")
            return matrix
    raise ValueError(f"{path} has no axisAlignment (scans of the test split have none: align=False)")


def read_json(path, field):
    """The list `field` of a JSON file that holds one object."""
    try:
        content = json.loads(read_text(path, "annotation", MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or field not in content:
        raise ValueError(f"{path} has no entry {field}")
    if not isinstance(content[field], list):
        raise ValueError(f"{path}: {field} is no list")
    return content[field]


def whole_numbers(values, path, field):
    """List of whole numbers from 0 to 2^31 - 1 -> int64 array (n,)."""
    are_ints = isinstance(values, list) and not set(map(type, values)) - {int}
    if not are_ints or min(values, default=0) < 0 or max(values, default=0) >= 2 ** 31:
        raise ValueError(f"{path}: {field} is not a list of whole numbers from 0 to 2^31 - 1")
    return np.array(values, np.int64)


def read_groups(path):
    """.aggregation.json -> objects of a scan, as tuples (objectId, label, segments (n,) int64).

    An object that is listed again with the same segments and label, as in scene0217_00 of ScanNet, is left out.
    """
    groups, seen = [], set()
    for number, group in enumerate(read_json(path, "segGroups")):
        field = f"segGroups[{number}]"
        if not isinstance(group, dict) or not {"segments", "objectId", "label"} <= group.keys():
            raise ValueError(f"{path}: {field} lacks segments, objectId or label")
        segments = whole_numbers(group["segments"], path, f"{field}.segments")
        object_id, = whole_numbers([group["objectId"]], path, f"{field}.objectId")
        if not isinstance(group["label"], str):
            raise ValueError(f"{path}: {field}.label is no text")
        key = group["label"], segments.tobytes()
        if key not in seen:
            groups.append((object_id, group["label"], segments))
            seen.add(key)
    return groups


def read_label_map(path, source, target):
    """Two columns of scannetv2-labels.combined.tsv -> {source: target}, with whole numbers as int.

    ("raw_category", "id") gives the id of an annotation's label; ("id", "nyu40id") maps ids of label images to NYU40.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, "label map"), newline=""), delimiter="\t"))
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from None
    if not rows or not {source, target} <= rows[0].keys():
        raise ValueError(f"{path} is no table with columns {source} and {target}")
    label_map = {}
    for number, row in enumerate(rows, 2):
        key, value = row[source], row[target]
        if not value:
            continue
        if not key or not value.isdecimal() or len(value) > 18:
            raise ValueError(f"{path} row {number}: {source} {key!r} and {target} {value!r}, expected a name or id and "
                             "a whole number")
        label_map[int(key) if key.isdecimal() and len(key) <= 18 else key] = int(value)
    return label_map


def remap_classes(classes, label_map):
    """Class list {id: name} and label map {other id: id} -> class list {other id: name}; unlisted ids are ignored."""
    order = list(classes)  # of the names, also in the result
    known = sorted((order.index(value), key) for key, value in label_map.items() if value in classes)
    return {**{key: classes[order[place]] for place, key in known}, "*": None}


def frame_classes(classes, label_map=None):
    """Class list {id: name} for label images of ScanNet's exporter, whose ids are those of its label table.

    classes: a class list {id: name}. label_map: path of scannetv2-labels.combined.tsv, if the ids of that list are
    NYU40's (ScanNet20); ScanNet200's are the table's.
    """
    if label_map is None:
        return classes
    return remap_classes(classes, read_label_map(label_map, "id", "nyu40id"))


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

    Attributes: names ["scene"], class_names (K), title (split or root).
    """

    def __init__(self, root, classes, split=None, label_map=None, align=True):
        self.root = Path(root)
        self.title = str(split or root)
        self.align = align
        self._labelled = classes is not None
        if not self.root.is_dir():
            raise FileNotFoundError(f"scan folder {self.root} does not exist")
        if not isinstance(classes, dict):
            classes = load_classes(classes) if self._labelled else {}
        self._table = ClassTable(classes)
        self.class_names = self._table.names
        self.class_ids = self._table.ids
        self._label_map = None if label_map is None else read_label_map(label_map, "raw_category", "id")
        self.settings = repr((classes, self._label_map, align))  # with the files, all that the scans depend on
        if split is None:
            self.names = sorted(path.parent.name for path in self.root.glob("*/*_vh_clean_2.ply"))
        else:
            self.names = list(dict.fromkeys(scene for scene, _ in read_split(split)))
        if not self.names:
            raise ValueError(f"{self.root}: no scan in it")
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
        mesh = read_ply_vertices(path, GEOMETRY)
        scan = {"name": name, "points": np.stack([mesh["x"], mesh["y"], mesh["z"]], 1).astype(np.float32),
                "colors": np.stack([mesh["red"], mesh["green"], mesh["blue"]], 1).astype(np.float32) / 255,
                "alignment": read_axis_alignment(self._path(name, ".txt")) if self.align else np.eye(4)}
        if not (np.abs(scan["points"]) <= MAX_SHIFT).all():  # NaN is not
            raise ValueError(f"{path}: vertices are not finite, or beyond {MAX_SHIFT:.0e} m")
        if not self._labelled:
            return scan
        ids, instances, segments = self._read_annotation(name, len(mesh))
        if self._label_map is None:
            path = self._path(name, "_vh_clean_2.labels.ply")
            ids = read_ply_vertices(path, {"label": ("u1", "u2", "u4", "i1", "i2", "i4")})["label"].astype(np.int64)
            if len(ids) != len(mesh) or ids.min() < 0:
                raise ValueError(f"{path} has {len(ids)} vertices with labels from {ids.min()}, expected labels >= 0 "
                                 f"of the {len(mesh)} vertices of the mesh")
        else:
            path = self._path(name, ".aggregation.json")
        labels = self._table(ids).astype(np.int64)
        if labels.min() < -1:
            raise ValueError(f"{path}: label {ids[labels < -1][0]} is not in the class list")
        return {**scan, "labels": labels, "instances": instances, "superpoints": segments}

    def _read_annotation(self, name, count):
        """Ids (0 without a label map), instances and segments, each (count,) int64; segments are numbered from 0."""
        path = self._path(name, "_vh_clean_2.0.010000.segs.json")
        segment_ids, segments = np.unique(whole_numbers(read_json(path, "segIndices"), path, "segIndices"),
                                          return_inverse=True)
        if len(segments) != count:
            raise ValueError(f"{path}: segIndices has {len(segments)} entries, the mesh has {count} vertices")
        path = self._path(name, ".aggregation.json")
        ids = np.zeros(len(segment_ids), np.int64)  # per segment
        instances = np.full(len(segment_ids), -1)
        for object_id, label, own in read_groups(path):
            unknown = np.setdiff1d(own, segment_ids)
            if len(unknown):
                raise ValueError(f"{path}: object {object_id} has segment {unknown[0]}, which segs.json lacks")
            place = np.searchsorted(segment_ids, own)
            if len(np.unique(place)) < len(place) or (instances[place] >= 0).any():
                raise ValueError(f"{path}: object {object_id} has a segment that is listed twice")
            instances[place] = object_id
            if self._label_map is not None:
                if label not in self._label_map:
                    raise ValueError(f"{path}: label {label!r} is not in the label map")
                ids[place] = self._label_map[label]
        return ids[segments], instances[segments], segments
