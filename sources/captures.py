# SPDX-License-Identifier: MIT
"""Captures of phones, RGB-D cameras and their tools as frames (see data.py), read in place.

    python sources/captures.py DIR                what lies there, and how it is read
    python sources/captures.py DIR --to OUT       the same in ScanNet's layout, for other tools

A format is one function `folder, options -> list of View`, and one line of FORMATS (docs/captures.md).

Imports numpy and support/files.py.
"""
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # of the repository
from support.files import (as_intrinsics, as_matrix, as_pose, check_exists, decode_color, depth_in_meters,
                           image_size, natural_key, only_file, quaternion_pose, read_color, read_depth,
                           read_index_image, read_intrinsics, read_json, read_rows, read_text,
                           resize_intrinsics, visible)

MAX_GAP = 0.02  # seconds between two images, or an image and a pose, that belong together
OPENGL = np.diag([1.0, -1, -1, 1])  # from OpenCV's camera axes to OpenGL's (x right, y up, z backward)
COLORS = (".jpg", ".jpeg", ".png")
DEPTHS = (".png", ".npy", ".tif", ".tiff")
LENSES = {"OPENCV": ("k1", "k2", "p1", "p2", "k3"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
LAYOUT = "SCENE/{color/N.jpg,depth/N.png,pose/N.txt,intrinsic/intrinsic_color.txt}"  # ScanNet's
POSES = ("w2c", "wxyz", "w2c-wxyz")  # --pose: other than camera to world, quaternions xyzw


class View(NamedTuple):
    """One frame of a capture, as its files describe it."""
    stem: str
    color: Path                      # of an image
    depth: Path                      # None: there is none
    cam2world: np.ndarray            # (4, 4), OpenCV axes; None: lost
    units_per_meter: float           # of depth
    intrinsics: np.ndarray           # (3, 3) of the color image, integer pixel centers
    size: tuple = (None, None)       # (H, W) of images that intrinsics are made for; None: of this one
    depth_intrinsics: object = None  # (3, 3); None: those of color, scaled to the depth image's size
    depth_cam2world: object = None   # (4, 4), if the depth camera has another pose
    confidence: object = None        # path of an image; 0 = no reading
    distortion: tuple = ()           # (model, coefficients), see support/lens.py
    part: tuple = ()                 # of a .sens file: offset, bytes of color, bytes of depth, (H, W) of depth


class Options(NamedTuple):
    """What the caller knows and the files do not say; None: not given."""
    intrinsics: object = None   # (3, 3) of the color images
    pose: object = None         # one of POSES
    depth_scale: object = None  # units of depth per meter


def parse_pose(numbers, path, options, axes=np.eye(4)):
    """A pose in a file -> cam2world (4, 4), or None if it is lost.

    numbers: 7, translation and quaternion, or a matrix as of `as_pose`. axes (4, 4): from the camera with
    OpenCV's axes to the file's.
    """
    how = options.pose or ""
    if np.shape(numbers) == (7,):
        matrix = quaternion_pose(numbers, path, [4, 5, 6, 3] if "wxyz" in how else [3, 4, 5, 6])
    else:
        matrix = as_pose(numbers, path)
    return None if matrix is None else (np.linalg.inv(matrix) if "w2c" in how else matrix) @ axes


def images_in(folder, *patterns, endings=COLORS):
    """The images that the first of the patterns finds which finds any, by name -> list of paths."""
    for pattern in patterns:
        paths = [path for path in visible(folder, pattern) if path.suffix.lower() in endings]
        if paths:
            return sorted(paths, key=lambda path: natural_key(path.stem))
    raise FileNotFoundError(f"{folder}: no image ({', '.join(endings)}); looked for {', '.join(patterns)}")


def from_folders(folder, options, path, rows, camera=None, units_per_meter=1000,
                 colors=("color/*", "rgb/*", "image/*", "images/*"), depths="depth/*"):
    """Views of images and of rows of poses, of a file, in the same order. camera: as of `camera_in`, the default."""
    camera = camera or camera_in(folder, options)
    colors, depths = images_in(folder, *colors), images_in(folder, depths, endings=DEPTHS)
    if not len(colors) == len(depths) == len(rows):
        raise ValueError(f"{folder}: {len(colors)} color images, {len(depths)} depth images and {len(rows)} poses")
    numbers = re.compile(r"\D*(\d{1,8})")  # of names such as frame000012; time stamps have more digits, or a point
    found = [(numbers.fullmatch(color.stem), numbers.fullmatch(depth.stem)) for color, depth in zip(colors, depths)]
    shifts = [int(color[1]) - int(depth[1]) if color and depth else 0 for color, depth in found]
    if len(set(shifts)) > 1:
        odd = shifts.index(min(shifts, key=shifts.count))
        raise ValueError(f"{colors[odd]} would go with {depths[odd].name}: is an image missing?")
    return [View(color.stem, color, depth, parse_pose(row, path, options), units_per_meter, **camera)
            for color, depth, row in zip(colors, depths, rows)]


def camera_in(folder, options, patterns=("*intrinsic.json", "camera.json", "camera_*.json", "intrinsics.txt")):
    """Intrinsics of options, or of the first file that the patterns find -> fields of View."""
    if options.intrinsics is not None:
        return {"intrinsics": options.intrinsics}
    paths = visible(folder, *patterns)
    if not paths:
        raise ValueError(f"{folder}: looked for intrinsics in {', '.join(patterns)} (Open3D's JSON, or 3 x 3); "
                         "give one, or --intrinsics FX,FY,CX,CY")
    path = paths[0]
    if path.suffix != ".json":
        return {"intrinsics": read_intrinsics(path, "intrinsics")}
    values = read_json(path, "intrinsics")
    matrix, = required(values, ["intrinsic_matrix"], path)
    size = values.get("height"), values.get("width")
    return {"intrinsics": as_intrinsics(np.reshape(matrix, (3, -1)).T, path, "intrinsic_matrix"), "size": size}


def required(values, names, where):
    """The values of some names; ValueError if one is missing."""
    lacking = [name for name in names if name not in values]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    return [values[name] for name in names]


# -------------------------------------------------------------------------------------------- formats


def read_transforms(folder, options):
    """transforms.json of nerfstudio and instant-ngp: OpenGL axes, pixel centers at 0.5."""
    path = folder / "transforms.json"
    scene = read_json(path, "transforms")
    views = []
    for number, frame in enumerate([*scene.get("frames", ()), *scene.get("test_frames", ())]):
        where = f"{path}: frame {number}"
        values = {**scene, **frame}
        color, matrix = required(values, ("file_path", "transform_matrix"), where)
        color = folder / color.replace("\\", "/")
        if color.suffix.lower() not in COLORS and not color.is_file():  # as instant-ngp writes it
            color = color.with_name(f"{color.name}.png")
        depth = values.get("depth_file_path", values.get("depth_path"))
        depth = depth and folder / depth.replace("\\", "/")
        cam2world = parse_pose(matrix, where, options, OPENGL)
        unit = values.get("depth_unit_scale_factor", values.get("integer_depth_scale", 0.001))
        camera = transforms_camera(values, color, where)
        views.append(View(f"{number:06d}", color, depth, cam2world, unit and 1 / unit, **camera))
    if all(view.depth is None for view in views):
        raise ValueError(f"{path}: no list of frames with depth_file_path: 3D points need depth")
    return views


def transforms_camera(values, color, where):
    """The camera and lens of an entry of transforms.json -> fields of View."""
    size = values.get("h"), values.get("w")
    height, width = image_size(color, "color") if None in size else size
    values = {"cx": width / 2, "cy": height / 2, **values}
    if "fl_x" not in values:
        angle, = required(values, ["camera_angle_x"], f"{where} lacks fl_x, and")
        values["fl_x"] = width / 2 / np.tan(angle / 2)
    fx, cx, cy = (values[name] for name in ("fl_x", "cx", "cy"))
    intrinsics = as_intrinsics([[fx, values.get("fl_y", fx), cx - 0.5, cy - 0.5]], where, "intrinsics")
    model = values.get("camera_model", "OPENCV_FISHEYE" if values.get("is_fisheye") else "OPENCV")
    if model in ("PINHOLE", "SIMPLE_PINHOLE"):
        model = "OPENCV"
    names = LENSES.get(model, ())
    if not names or values.get("k4") and "k4" not in names:
        raise ValueError(f"{where} has camera_model {model} (k4: {values.get('k4', 0)}), which is not read: "
                         "undistort to PINHOLE")
    coefficients = tuple(float(values.get(name) or 0) for name in names)
    has_lens = any(coefficients) or model == "OPENCV_FISHEYE"
    return {"intrinsics": intrinsics, "size": size, "distortion": (model, coefficients) if has_lens else ()}


def read_tum(folder, options):
    """TUM RGB-D: "seconds file" in rgb.txt and depth.txt, "seconds t q" in groundtruth.txt."""
    camera = camera_in(folder, options)
    times, rows = {}, {}
    for name in ("rgb", "depth", "groundtruth"):
        path = folder / f"{name}.txt"
        rows[name] = read_rows(path, name)
        times[name] = as_matrix([[row[0] for row in rows[name]]], path, "times", [(1, len(rows[name]))])[0]

    def nearest(name, time):  # None: not within MAX_GAP
        place = np.abs(times[name] - time).argmin()
        return rows[name][place][1:] if abs(times[name][place] - time) <= MAX_GAP else None

    views = []
    for time, (_, file, *_) in zip(times["rgb"], rows["rgb"]):
        depth, pose = nearest("depth", time), nearest("groundtruth", time)
        depth = depth and folder / depth[0]
        pose = pose and parse_pose(pose, path, options)
        views.append(View(Path(file).stem, folder / file, depth, pose, 5000, **camera))
    return views


def read_replica(folder, options):
    """NICE-SLAM's Replica: traj.txt, 16 numbers per line, results/, cam_params.json there or above."""
    path = next(folder.glob("cam_params.json"), folder.parent / "cam_params.json")
    values = read_json(path, "cam_params").get("camera", {})
    *numbers, scale = required(values, ("fx", "fy", "cx", "cy", "scale"), f"{path}: camera")
    camera = {"intrinsics": as_intrinsics([numbers], path, "camera"), "size": (values.get("h"), values.get("w"))}
    path = folder / "traj.txt"
    return from_folders(folder, options, path, read_rows(path, "poses"), camera, scale, ["results/frame*"],
                        "results/depth*")


def read_redwood(folder, options):
    """Open3D and Redwood: trajectory.log with 3 numbers and a 4 x 4 matrix per pose."""
    path = folder / "trajectory.log"
    words = read_text(path, "poses file").split()
    return from_folders(folder, options, path, [words[i + 3:i + 19] for i in range(0, len(words), 19)])


def read_pose_list(folder, options):
    """A pose per line: 7 numbers t q (or 8, after a time or number), 12 (KITTI) or 16."""
    path = only_file(folder, "pose*.txt")
    rows = read_rows(path, "poses")
    if len(rows[0]) == 8:
        rows = [row[1:] for row in sorted(rows, key=lambda row: float(row[0]))]
    return from_folders(folder, options, path, rows)


def read_posed(folder, options):
    """7-Scenes: frame-<n>.color.jpg|png, .depth.png and .pose.txt."""
    camera = camera_in(folder, options)
    views = []
    for color in images_in(folder, "frame-*.color.*"):
        stem = color.name.split(".")[0]
        path = folder / f"{stem}.pose.txt"
        pose = parse_pose(read_rows(path, "pose"), path, options)
        views.append(View(stem, color, folder / f"{stem}.depth.png", pose, 1000, **camera))
    return views


def read_stray(folder, options):
    """Stray Scanner: odometry.csv, camera_matrix.csv, depth/, confidence/; rgb/ instead of rgb.mp4."""
    if not (folder / "rgb").is_dir():
        raise FileNotFoundError(f"{folder}: no rgb/; unpack the video: mkdir rgb && ffmpeg -i rgb.mp4 rgb/%06d.png")
    path = folder / "odometry.csv"
    header, *rows = read_rows(path, "odometry")
    names = ("x", "y", "z", "qx", "qy", "qz", "qw")
    rows = [required(dict(zip(header, row)), names, f"{path}: the first line") for row in rows]
    views = from_folders(folder, options, path, rows, camera_in(folder, options, ["camera_matrix.csv"]))
    folder = folder / "confidence"
    if not folder.is_dir():
        return views
    return [view._replace(confidence=folder / f"{view.depth.stem}.png") for view in views]


SENS_HEAD = struct.Struct("<64f2i4IfQ")  # 4 matrices, 2 compressions, 4 sizes, units per meter, frames
SENS_FRAME = struct.Struct("<16f4Q")     # pose, 2 time stamps, bytes of color and depth


def read_sens(folder, options):
    """ScanNet's .sens, version 4: places of JPEG or PNG color and zlib depth in the file."""
    path = only_file(folder, "*.sens")
    content = np.memmap(path, np.uint8, "r")
    views, place = [], 12
    try:
        version, length = struct.unpack_from("<IQ", content)
        place += length
        *matrices, color_kind, depth_kind, _, _, width, height, units, count = SENS_HEAD.unpack_from(content, place)
        if version != 4 or color_kind not in (1, 2) or depth_kind != 1:
            raise ValueError(f"{path}: version {version}, compressions {color_kind} and {depth_kind} are not read")
        color, color_pose, depth, depth_pose = np.array(matrices).reshape(4, 4, 4)
        place += SENS_HEAD.size
        for number in range(count):
            *pose, _, _, color_size, depth_size = SENS_FRAME.unpack_from(content, place)
            start = place + SENS_FRAME.size
            place = start + color_size + depth_size
            poses = [parse_pose(pose, f"{path}: frame {number}", options, axes) for axes in (color_pose, depth_pose)]
            part = start, color_size, depth_size, (height, width)
            views.append(View(str(number), path, path, poses[0], units, color[:3, :3],
                              depth_intrinsics=depth[:3, :3], depth_cam2world=poses[1], part=part))
    except struct.error:
        place = len(content) + 1
    if place > len(content):
        raise ValueError(f"{path}: truncated after {len(views)} frames")
    return views


# name: what must lie in the folder, how poses are read, the reader; the first that fits is taken
FORMATS = {
    "nerfstudio": ("transforms.json", "camera to world, OpenGL axes", read_transforms),
    "sens": ("*.sens", "camera to world", read_sens),
    "stray": ("odometry.csv", "camera to world, quaternions xyzw", read_stray),
    "tum": ("groundtruth.txt", "camera to world, quaternions xyzw", read_tum),
    "redwood": ("trajectory.log", "camera to world", read_redwood),
    "replica": ("results/frame*", "camera to world", read_replica),
    "7scenes": ("frame-*.color.*", "camera to world", read_posed),
    "poses": ("pose*.txt", "camera to world, quaternions xyzw", read_pose_list),
}


def read_views(folder, name, options):
    """The views of a capture; errors point to the paragraph of its format."""
    try:
        views = FORMATS[name][2](folder, options)
        return [checked(view, options.depth_scale or view.units_per_meter) for view in views]
    except (ValueError, TypeError, AttributeError, FileNotFoundError) as error:  # null in JSON, say
        where = "" if str(folder) in str(error) else f"{folder}: "
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}{error} (read as {name}, see docs/captures.md#{name})") from error


def checked(view, units):
    """A View whose files exist, with units of depth per meter, and intrinsics of its color image's size."""
    if view.cam2world is None or view.depth is None:
        return view
    if not 0 < units < np.inf:
        raise ValueError(f"{view.depth}: {units} units of depth per meter, expected a number > 0")
    for path in filter(None, (view.color, view.depth, view.confidence)):
        check_exists(path, "image")
    view = view._replace(units_per_meter=units)
    if None in view.size:
        return view
    (height, width), size = view.size, image_size(view.color, "color")
    if not 0.98 < size[0] * width / max(size[1] * height, 1) < 1.02:
        raise ValueError(f"{view.color}: {size[1]} x {size[0]} pixels, but its camera is for {width} x {height}: "
                         "turned or cropped?")
    return view._replace(intrinsics=resize_intrinsics(view.intrinsics, view.size, size))


class CaptureFrames:
    """A source of frames (see data.py): a folder that holds one capture, which is a scene, or several.

    format: a key of FORMATS; None: what lies there decides. split: a file with one `scene` or `scene/stem`
    per line; None: all frames. undistort: that of support/lens.py, for lenses with a distortion.

    Attributes: names, num_skipped (frames with a lost pose), left_out {what was not taken: how many},
    description (how it is read, in a line).
    """

    class_names = ()

    def __init__(self, root, format=None, options=Options(), split=None, undistort=None):
        root = Path(root).resolve()
        self.undistort = undistort
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder of a capture")
        formats = [format] if format else FORMATS

        def format_of(folder):  # the first whose files it has, or None
            return next((name for name in formats if visible(folder, FORMATS[name][0])), None)

        folders = [path for path in visible(root, "*") if path.is_dir() or not path.exists()]  # a link to nothing
        found = {folder: format_of(folder) for folder in ([root] if format_of(root) else folders)}
        kinds = sorted(set(found.values()) - {None})
        if not kinds:
            looked_for = ", ".join(FORMATS[name][0] for name in formats)
            raise ValueError(f"{root}: no {format or 'capture'} in it; looked for {looked_for} there and in its "
                             f"folders (docs/captures.md#{format or 'formats'}), and for ScanNet's {LAYOUT}")
        self.settings = repr((options, kinds))
        views = [(f"{folder.name}/{view.stem}", view) for folder in filter(found.get, found)
                 for view in read_views(folder, found[folder], options)]
        if split is not None:
            wanted = {line.strip() for line in read_text(split, "split file").splitlines()} - {""}
            views = [(name, view) for name, view in views if {name, name.split("/")[0]} & wanted]
            unknown = wanted - {part for name, _ in views for part in (name, name.split("/")[0])}
            if unknown:
                raise FileNotFoundError(f"split file {split}: no scene or frame {min(unknown)!r} in {root}")
        whole = [(name, view) for name, view in views if view.cam2world is not None and view.depth is not None]
        self.names = [name for name, _ in whole]
        self.views = [view for _, view in whole]
        self.num_skipped = sum(view.cam2world is None for _, view in views)
        self.left_out = +Counter({"folders without a capture": list(found.values()).count(None),
                                  "frames without depth": len(views) - len(self.views) - self.num_skipped})
        words = [f"{name}: {FORMATS[name][0]}, {options.pose or FORMATS[name][1]}" for name in kinds]
        words += [f"{len(self.views)} frames, {self.num_skipped} without a pose"]
        words += [f"left out: {count} {reason}" for reason, count in self.left_out.items()]
        words += [f"{scale:g} units of depth per meter" for scale in {view.units_per_meter for view in self.views}]
        self.description = "; ".join(words)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{root}: two images are named {Counter(self.names).most_common(1)[0][0]}")
        if not self.views:
            raise ValueError(f"{split or root}: no frame left ({self.description})")

    def __len__(self):
        return len(self.views)

    def files(self, index):
        """Paths of all files that a frame is read from."""
        view = self.views[index]
        return [str(path) for path in (view.color, view.depth, view.confidence) if path is not None]

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame."""
        view = self.views[index]
        if view.part:
            content = np.memmap(view.color, np.uint8, "r", *view.part[:2])
            image = decode_color(content.tobytes(), view.color)
        else:
            image = read_color(view.color)
        return self.undistort(image, view.intrinsics, *view.distortion) if view.distortion else image

    def __getitem__(self, index):
        view = self.views[index]
        color, depth = self.color(index), read_depth_of(view)
        depth_intrinsics = view.depth_intrinsics
        if depth_intrinsics is None:
            depth_intrinsics = resize_intrinsics(view.intrinsics, color.shape[:2], depth.shape)
        if view.distortion:
            depth = self.undistort(depth, depth_intrinsics, *view.distortion)
        frame = {"name": self.names[index], "color": color, "depth": depth,
                 "world2cam": np.linalg.inv(view.cam2world), "intrinsics": view.intrinsics,
                 "depth_intrinsics": depth_intrinsics}
        own = view.depth_cam2world
        if own is not None and not np.array_equal(own, view.cam2world):
            frame["depth_world2cam"] = np.linalg.inv(own)
        return frame


def read_depth_of(view):
    """Depth (Hd, Wd) float32 meters of a View, 0 = no reading."""
    if view.part:
        offset, color_size, size, shape = view.part
        content = np.memmap(view.depth, np.uint8, "r", offset + color_size, size)
        try:
            depth = np.frombuffer(zlib.decompress(content), "<u2").reshape(shape)
        except (zlib.error, ValueError) as error:
            raise ValueError(f"{view.depth}: depth of frame {view.stem} is damaged: {error}") from None
        return depth_in_meters(depth, view.units_per_meter)
    depth = read_depth(view.depth, view.units_per_meter)
    if view.confidence is None:
        return depth
    confidence = read_index_image(view.confidence, "confidence")
    if confidence.shape != depth.shape:
        raise ValueError(f"{view.confidence}: {confidence.shape} is not the size of depth {depth.shape}")
    return np.where(confidence > 0, depth, 0)


def main(argv=None):
    from sources.scannet import write_frames  # here, because all else needs no sibling
    from support.lens import OneCamera, undistort
    from support.runtime import Parser, add_capture_options, writable_folder
    parser = Parser("captures.py", "Says how a capture is read; exports it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=writable_folder, help="write it in ScanNet's layout into this folder")
    add_capture_options(parser, FORMATS, POSES)
    args = parser.parse_args(argv)
    options = Options(args.intrinsics, args.pose, args.depth_scale)
    parser.keep_apart("--to", args.to, args.folder)
    frames = CaptureFrames(args.folder, args.format, options, undistort=undistort)
    print(frames.description)
    if args.to:
        write_frames(OneCamera(frames), args.to)


if __name__ == "__main__":
    from support.runtime import run_command
    run_command(main)
