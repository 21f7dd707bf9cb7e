# SPDX-License-Identifier: MIT
"""Captures of phones, RGB-D cameras and their tools as frames (see data.py), read in place.

    python sources/captures.py DIR                what lies there, and how it is read
    python sources/captures.py DIR --to OUT       the same in ScanNet's layout, for other tools

A format is one function `folder, options -> list of View`, and one line of FORMATS. Docs:
docs/captures.md.

Imports numpy, PIL, and support/files.py.
"""
import argparse
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # of the repository
from support.files import (as_matrix, as_pose, check_intrinsics, decode_color, decode_image, depth_in_meters, image_size,
                           read_bytes, read_color, read_index_image, read_intrinsics, read_json, read_rows)

MAX_GAP = 0.02  # seconds between two images, or an image and a pose, that belong together
OPENGL = np.diag([1.0, -1, -1, 1])  # from OpenCV's camera axes to OpenGL's (x right, y up, z backward)
ORDERS = ("xyzw", "wxyz")
POSES = ("c2w", "w2c", *ORDERS, "w2c-xyzw", "w2c-wxyz")  # --pose


class View(NamedTuple):
    """One frame of a capture, as its files describe it."""

    stem: str
    color: object                    # path of an image, or (path, offset, bytes) of one inside a file
    depth: object                    # path, or (path, offset, bytes, (H, W))
    cam2world: np.ndarray            # (4, 4), OpenCV axes; None: lost
    intrinsics: np.ndarray           # (3, 3) of the color image, integer pixel centers
    units_per_meter: float           # of depth
    depth_intrinsics: object = None  # (3, 3); None: those of color, scaled to the depth image's size
    depth_cam2world: object = None   # (4, 4), if the depth camera has another pose
    confidence: object = None        # path of an image; 0 = no reading
    distortion: tuple = ()           # (model, coefficients), see `undistortion`


class Options(NamedTuple):
    """What the caller knows and the files do not say; None: not given."""

    intrinsics: object = None   # (3, 3) of the color images
    pose: object = None         # one of POSES
    depth_scale: object = None  # units of depth per meter


# ---------------------------------------------------------------------------------------------- poses


def quaternion_rotation(q, path):
    """(4,) as x, y, z, w -> rotation (3, 3). ValueError if its norm is not near 1."""
    norm = np.linalg.norm(q)
    if not 0.9 < norm < 1.1:
        raise ValueError(f"{path}: a quaternion has norm {norm:.3f}: {q.tolist()}")
    x, y, z, w = q / norm
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def parse_pose(numbers, path, pose=None, order="xyzw"):
    """A pose as 7 numbers (translation and quaternion), 12 (3 x 4) or 16 (4 x 4) -> cam2world (4, 4),
    or None if lost.

    order: of quaternions in this format; pose: one of POSES overrules it, and the direction.
    """
    numbers = as_matrix([numbers], path, "pose", [(1, 7), (1, 12), (1, 16)])[0]
    words = (pose or "").split("-")
    order = next((name for name in ORDERS if name in words), order)
    if len(numbers) != 7:
        matrix = as_pose(numbers, path)
    elif np.isfinite(numbers).all() and np.abs(numbers[3:]).any():
        q = numbers[3:] if order == "xyzw" else numbers[[4, 5, 6, 3]]
        matrix = np.eye(4)
        matrix[:3, :3] = quaternion_rotation(q, path)
        matrix[:3, 3] = numbers[:3]
    else:
        matrix = None
    if matrix is None or "w2c" not in words:
        return matrix
    return np.linalg.inv(matrix)


# ---------------------------------------------------------------------------------------------- files


def images_in(folder, names):
    """Images in the first of the subfolders `names` that exists, by name -> list of paths."""
    place = next((folder / name for name in names if (folder / name).is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{folder}: none of the folders {', '.join(names)} is there")
    endings = (".jpg", ".jpeg", ".png")
    paths = [path for path in place.iterdir() if path.suffix.lower() in endings and path.name[0] != "."]
    if not paths:
        raise FileNotFoundError(f"{place}: no image (.jpg, .jpeg or .png) in it")
    return sorted(paths, key=lambda path: (len(path.stem), path.stem))  # 2 before 10


def as_views(folder, colors, depths, poses, **shared):
    """A View per color image, depth image and pose; ValueError with their numbers if they differ."""
    if not len(colors) == len(depths) == len(poses):
        raise ValueError(f"{folder}: {len(colors)} color images, {len(depths)} depth images and {len(poses)} poses")
    return [View(stem=color.stem, color=color, depth=depth, cam2world=pose, **shared)
            for color, depth, pose in zip(colors, depths, poses)]


def pinhole_of(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def given(options, format, what):
    """The intrinsics of the options; ValueError that says what to give if they are not there."""
    if options.intrinsics is None:
        raise ValueError(f"{format} captures do not tell their intrinsics: give {what}")
    return options.intrinsics


def resized(intrinsics, old_size, new_size):
    """Intrinsics of an image resized from old_size to new_size, (H, W) each: c -> (c + 0.5) s - 0.5."""
    scale = np.array([new_size[1] / old_size[1], new_size[0] / old_size[0], 1.0])
    matrix = intrinsics * scale[:, None]
    matrix[:2, 2] += 0.5 * scale[:2] - 0.5
    return matrix


# -------------------------------------------------------------------------------------------- formats


def read_transforms(folder, options):
    """nerfstudio's and instant-ngp's transforms.json: Polycam, Record3D, NeRFCapture, KIRI, ScanNet++
    iPhone.

    OpenGL axes; the principal point counts from the image's corner, so its pixel centers lie at 0.5.
    """
    path = folder / "transforms.json"
    scene = read_json(path, "transforms")
    frames = scene.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: it has no list of frames")
    scale = scene.get("depth_unit_scale_factor", scene.get("integer_depth_scale", 0.001))
    views = []
    for number, frame in enumerate(frames):
        where = f"{path}: frames[{number}]"
        values = {**scene, **frame}
        if not {"file_path", "transform_matrix"} <= values.keys():
            raise ValueError(f"{where} lacks file_path or transform_matrix")
        depth = values.get("depth_file_path", values.get("depth_path"))
        if depth is None:
            raise ValueError(f"{where} has no depth_file_path: depth is needed for 3D points")
        color = folder / values["file_path"]
        if not color.suffix:  # as instant-ngp writes it
            color = color.with_suffix(".png")
        cam2world = as_pose(values["transform_matrix"], where)
        views.append(View(
            stem=f"{number:06d}", color=color, depth=folder / depth,
            cam2world=None if cam2world is None else cam2world @ OPENGL,
            intrinsics=transforms_intrinsics(values, color, where),
            units_per_meter=options.depth_scale or 1 / scale,
            distortion=transforms_distortion(values, where)))
    return views


def transforms_intrinsics(values, color, where):
    """The pinhole matrix of an entry of transforms.json, with integer pixel centers."""
    if "fl_x" in values:
        fx = values["fl_x"]
        fy = values.get("fl_y", fx)
    elif "camera_angle_x" in values:
        width = values.get("w") or image_size(color, "color")[1]
        fx = fy = width / 2 / np.tan(values["camera_angle_x"] / 2)
    else:
        raise ValueError(f"{where} has neither fl_x nor camera_angle_x")
    if "cx" in values and "cy" in values:
        cx, cy = values["cx"], values["cy"]
    else:
        height, width = image_size(color, "color")
        cx, cy = width / 2, height / 2
    matrix = pinhole_of(fx, fy, cx - 0.5, cy - 0.5)
    check_intrinsics(matrix, where, "intrinsics")
    return matrix


def transforms_distortion(values, where):
    """(model, coefficients) of an entry of transforms.json, or () if there is no distortion."""
    model = values.get("camera_model", "OPENCV")
    names = {"OPENCV": ("k1", "k2", "p1", "p2", "k3"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
    if model in ("PINHOLE", "SIMPLE_PINHOLE"):
        return ()
    if model not in names:
        raise ValueError(f"{where} has camera_model {model}, which is not read: undistort the images to PINHOLE")
    coefficients = tuple(float(values.get(name, 0)) for name in names[model])
    return (model, coefficients) if any(coefficients) or model == "OPENCV_FISHEYE" else ()


def read_tum(folder, options):
    """TUM RGB-D: rgb.txt, depth.txt and groundtruth.txt, lines "seconds file" and "seconds tx ty tz qx
    qy qz qw".
    """
    intrinsics = given(options, "TUM", "--intrinsics 517.3,516.5,318.6,255.3 (fr1), 520.9,521.0,325.1,249.7 (fr2), "
                       "535.4,539.2,320.1,247.6 (fr3), or those of your camera")
    tables = {}
    for name in ("rgb", "depth", "groundtruth"):
        path = folder / f"{name}.txt"
        rows = [row for row in read_rows(path, name) if not row[0].startswith("#")]
        times = as_matrix([row[:1] for row in rows], path, "time stamps", [(len(rows), 1)])[:, 0]
        order = np.argsort(times, kind="stable")
        tables[name] = times[order], [rows[i][1:] for i in order]
    times, files = tables["rgb"]
    views = []
    for time, (file, *_) in zip(times, files):
        depth, pose = (nearest(*tables[name], time) for name in ("depth", "groundtruth"))
        if depth is not None and pose is not None:
            cam2world = parse_pose(pose, folder / "groundtruth.txt", options.pose)
            views.append(View(stem=Path(file).stem, color=folder / file, depth=folder / depth[0], cam2world=cam2world,
                              intrinsics=intrinsics, units_per_meter=options.depth_scale or 5000))
    if not views:
        raise ValueError(f"{folder}: no image has a depth image and a pose within {MAX_GAP} s")
    return views


def nearest(times, rows, time):
    """The row whose time stamp is nearest, or None if none is within MAX_GAP."""
    place = np.clip(np.searchsorted(times, time), 1, len(times) - 1) if len(times) > 1 else 0
    around = [max(place - 1, 0), place]
    best = min(around, key=lambda i: abs(times[i] - time))
    return rows[best] if abs(times[best] - time) <= MAX_GAP else None


def read_trajectory_log(folder, options):
    """Open3D and Redwood: trajectory.log, five lines a pose, images in color/ or image/ and depth/."""
    path = folder / "trajectory.log"
    rows = read_rows(path, "trajectory")
    if len(rows) % 5:
        raise ValueError(f"{path}: {len(rows)} lines are no multiple of 5: numbers, and a 4 x 4 matrix")
    poses = [parse_pose(sum(rows[i + 1:i + 5], []), path, options.pose) for i in range(0, len(rows), 5)]
    return from_folders(folder, options, poses, "Redwood", 1000)


def read_replica(folder, options):
    """NICE-SLAM's Replica: traj.txt, 16 numbers a line, results/frame*.jpg and depth*.png,
    ../cam_params.json.
    """
    path = next((p / "cam_params.json" for p in (folder, folder.parent) if (p / "cam_params.json").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: cam_params.json lies neither there nor beside it")
    camera = read_json(path, "cam_params").get("camera", {})
    lacking = {"fx", "fy", "cx", "cy", "scale"} - camera.keys()
    if lacking:
        raise ValueError(f"{path}: camera lacks {', '.join(sorted(lacking))}")
    intrinsics = pinhole_of(*(camera[name] for name in ("fx", "fy", "cx", "cy")))
    check_intrinsics(intrinsics, path, "camera")
    images = images_in(folder, ["results"])
    colors = [image for image in images if image.stem.startswith("frame")]
    depths = [image for image in images if image.stem.startswith("depth")]
    poses = [parse_pose(row, folder / "traj.txt", options.pose) for row in read_rows(folder / "traj.txt", "poses")]
    return as_views(folder, colors, depths, poses, intrinsics=intrinsics,
                    units_per_meter=options.depth_scale or camera["scale"])


def read_pose_list(folder, options):
    """A list of poses, a line per image: 7 numbers t q (or 8, after a time or number), 12 or 16 numbers
    (KITTI's).
    """
    path = next(folder / name for name in POSE_LISTS if (folder / name).is_file())
    rows = [row for row in read_rows(path, "poses") if not row[0].startswith("#")]
    poses = [parse_pose(row[1:] if len(row) == 8 else row, path, options.pose) for row in rows]
    return from_folders(folder, options, poses, f"{path.name}'s", 1000)


POSE_LISTS = ("poses.txt", "pose.txt", "traj.txt")


def from_folders(folder, options, poses, format, units_per_meter):
    """Views of images in color/, rgb/ or image/ and in depth/, in order, with intrinsics from a file or
    the options.
    """
    intrinsics = options.intrinsics
    for name in ("camera_intrinsic.json", "intrinsic.json"):
        if intrinsics is None and (folder / name).is_file():
            numbers = read_json(folder / name, "intrinsics").get("intrinsic_matrix", [])
            intrinsics = as_matrix([numbers], folder / name, "intrinsic_matrix", [(1, 9)]).reshape(3, 3).T  # Open3D's
            check_intrinsics(intrinsics, folder / name, "intrinsic_matrix")
    if intrinsics is None and (folder / "intrinsics.txt").is_file():
        intrinsics = read_intrinsics(folder / "intrinsics.txt", "intrinsics")
    if intrinsics is None:
        intrinsics = given(options, format, "camera_intrinsic.json, intrinsics.txt, or --intrinsics FX,FY,CX,CY")
    colors = images_in(folder, ["color", "rgb", "image", "images"])
    depths = images_in(folder, ["depth"])
    return as_views(folder, colors, depths, poses, intrinsics=intrinsics,
                    units_per_meter=options.depth_scale or units_per_meter)


def read_stray(folder, options):
    """Stray Scanner: odometry.csv, camera_matrix.csv, depth/, confidence/, and rgb.mp4 as images in
    rgb/.
    """
    if not (folder / "rgb").is_dir():
        raise FileNotFoundError(f"{folder}: unpack the video first: mkdir rgb && ffmpeg -i rgb.mp4 -start_number 0 "
                                "rgb/%06d.png")
    path = folder / "odometry.csv"
    header, *rows = [" ".join(row).replace(",", " ").split() for row in read_rows(path, "odometry")]
    lacking = {"x", "y", "z", "qx", "qy", "qz", "qw"} - set(header)
    if lacking:
        raise ValueError(f"{path}: the first line lacks {', '.join(sorted(lacking))}: {header}")
    columns = [header.index(name) for name in ("x", "y", "z", "qx", "qy", "qz", "qw")]
    poses = [parse_pose([row[i] for i in columns], path, options.pose) for row in rows]
    matrix = [" ".join(row).replace(",", " ").split() for row in read_rows(folder / "camera_matrix.csv", "camera")]
    intrinsics = as_matrix(matrix, folder / "camera_matrix.csv", "camera_matrix", [(3, 3)])
    check_intrinsics(intrinsics, folder / "camera_matrix.csv", "camera_matrix")
    views = as_views(folder, images_in(folder, ["rgb"]), images_in(folder, ["depth"]), poses, intrinsics=intrinsics,
                     units_per_meter=options.depth_scale or 1000)
    if not (folder / "confidence").is_dir():
        return views
    return [view._replace(confidence=folder / "confidence" / view.depth.name) for view in views]


SENS_HEAD = struct.Struct("<64f2i4IfQ")  # 4 matrices, 2 compressions, 4 sizes, units per meter, number of frames
SENS_FRAME = struct.Struct("<16f4Q")     # pose, 2 time stamps, bytes of color and depth


def read_sens(folder, options):
    """ScanNet's .sens, version 4, read in place: JPEG or PNG color, zlib depth. An index of offsets is
    built once.
    """
    path = next(folder.glob("*.sens"))
    size = path.stat().st_size
    views = []
    with open(path, "rb") as file:
        version, length = struct.unpack("<IQ", read_exactly(file, 12, path))
        if version != 4 or length > 4096:
            raise ValueError(f"{path}: not a .sens file of version 4")
        file.seek(length, 1)
        *numbers, color_kind, depth_kind, _, _, width, height, units, count = SENS_HEAD.unpack(
            read_exactly(file, SENS_HEAD.size, path))
        if color_kind not in (1, 2) or depth_kind != 1:
            raise ValueError(f"{path}: color of compression {color_kind} and depth of {depth_kind} are not read, only "
                             "PNG, JPEG and zlib")
        color, color_pose, depth, depth_pose = np.array(numbers).reshape(4, 4, 4)
        for number in range(count):
            *pose, _, _, color_size, depth_size = SENS_FRAME.unpack(read_exactly(file, SENS_FRAME.size, path))
            place = file.tell()
            if place + color_size + depth_size > size:
                raise ValueError(f"{path}: truncated in frame {number} of {count}")
            file.seek(color_size + depth_size, 1)
            cam2world = as_pose(pose, f"{path}: frame {number}")
            lost = cam2world is None
            views.append(View(
                stem=str(number), color=(path, place, color_size),
                depth=(path, place + color_size, depth_size, (height, width)),
                cam2world=None if lost else cam2world @ color_pose,
                depth_cam2world=None if lost else cam2world @ depth_pose,
                intrinsics=color[:3, :3], depth_intrinsics=depth[:3, :3],
                units_per_meter=options.depth_scale or units))
    return views


def read_exactly(file, count, path):
    content = file.read(count)
    if len(content) < count:
        raise ValueError(f"{path}: truncated at byte {file.tell()}")
    return content


# name: what is said of it, what must lie in the folder, its reader; the first that fits is taken
FORMATS = {
    "nerfstudio": ("transforms.json, OpenGL axes", "transforms.json", read_transforms),
    "sens": (".sens, camera to world", "*.sens", read_sens),
    "stray": ("Stray Scanner's odometry.csv, camera to world, quaternions xyzw", "odometry.csv", read_stray),
    "tum": ("rgb.txt, depth.txt, groundtruth.txt, camera to world, quaternions xyzw", "groundtruth.txt", read_tum),
    "redwood": ("trajectory.log, camera to world", "trajectory.log", read_trajectory_log),
    "replica": ("traj.txt with cam_params.json, camera to world", "results/frame*", read_replica),
    "poses": ("a list of poses, camera to world, quaternions xyzw", "pose*.txt", read_pose_list),
}


def format_of(folder, format=None):
    """The name of the format of a capture in a folder, or None. format: insist on that one."""
    names = [format] if format else FORMATS
    return next((name for name in names if any(folder.glob(FORMATS[name][1]))), None)


# ---------------------------------------------------------------------------------------------- frames


class CaptureFrames:
    """A source of frames (see data.py): a folder with one capture, which is a scene, or a folder of
    such folders.

    format: a key of FORMATS; None: what lies there decides. options: what the files do not say. split:
    a file with one `scene` or `scene/stem` per line; None: all frames. undistort: of support/lens.py.
    No format has labels.

    Attributes: names, num_skipped (frames with a lost pose), description (how it is read, in a line).
    """

    class_names = ()

    def __init__(self, root, format=None, options=Options(), split=None, undistort=None):
        root = Path(root)
        self.undistort = undistort
        self.title = str(split or root)
        folders = [folder for folder in (root, *sorted(root.iterdir())) if folder.is_dir()]
        found = {folder: format_of(folder, format) for folder in folders}
        if found[root]:
            found = {root: found[root]}
        found = {folder: name for folder, name in found.items() if name}
        if not found:
            looked_for = ", ".join(pattern for _, pattern, _ in FORMATS.values())
            raise ValueError(f"{root}: no {format or 'capture'} in it; looked for {looked_for} there and in its "
                             "folders, see docs/captures.md")
        self.settings = repr((options, sorted(found.values())))
        self.names, self.views, self.num_skipped = [], [], 0
        wanted = None if split is None else {tuple(row[0].partition("/")[::2]) for row in read_rows(split, "split")}
        for folder, name in found.items():
            scene = folder.resolve().name
            for view in FORMATS[name][2](folder, options):
                if wanted is not None and not {(scene, ""), (scene, view.stem)} & wanted:
                    continue
                if view.cam2world is None:
                    self.num_skipped += 1
                    continue
                if view.distortion and undistort is None:
                    raise ValueError(f"{folder}: its lens has a distortion, and no function to undo it is given")
                self.names.append(f"{scene}/{view.stem}")
                self.views.append(view)
        if not self.views:
            raise ValueError(f"{self.title}: no frame left ({self.num_skipped} skipped for a lost pose)")
        names = sorted(set(found.values()))
        kinds = "; ".join(f"{name}: {FORMATS[name][0]}" for name in names)
        scales = sorted({view.units_per_meter for view in self.views})
        self.description = (f"{kinds}; {len(self.views)} frames, {self.num_skipped} without a pose, "
                            f"{', '.join(f'{scale:g}' for scale in scales)} units of depth per meter")

    def __len__(self):
        return len(self.views)

    def files(self, index):
        """Paths of all files that a frame is read from."""
        view = self.views[index]
        parts = [part for part in (view.color, view.depth, view.confidence) if part is not None]
        return [str(part[0] if isinstance(part, tuple) else part) for part in parts]

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame."""
        view = self.views[index]
        if isinstance(view.color, tuple):
            image = decode_color(part_of(*view.color), view.color[0])
        else:
            image = read_color(view.color)
        return self._straight(image, view.intrinsics, view.distortion)

    def _straight(self, image, intrinsics, distortion):
        return self.undistort(image, intrinsics, *distortion) if distortion else image

    def __getitem__(self, index):
        view = self.views[index]
        color = self.color(index)
        depth = read_depth_of(view)
        depth_intrinsics = view.depth_intrinsics
        if depth_intrinsics is None:
            depth_intrinsics = resized(view.intrinsics, color.shape[:2], depth.shape)
        depth = self._straight(depth, depth_intrinsics, view.distortion)
        frame = {"name": self.names[index], "color": color, "depth": depth, "label": None, "instance": None,
                 "world2cam": np.linalg.inv(view.cam2world), "intrinsics": view.intrinsics,
                 "depth_intrinsics": depth_intrinsics}
        if view.depth_cam2world is not None and not np.array_equal(view.depth_cam2world, view.cam2world):
            frame["depth_world2cam"] = np.linalg.inv(view.depth_cam2world)
        return frame


def part_of(path, offset, size):
    """Bytes of a part of a file."""
    with open(path, "rb") as file:
        file.seek(offset)
        return read_exactly(file, size, path)


def read_depth_of(view):
    """Depth (Hd, Wd) float32 meters of a View, 0 = no reading: 16-bit PNG, NPY, or TIFF of floats."""
    path = view.depth
    if isinstance(path, tuple):
        path, offset, size, shape = path
        depth = np.frombuffer(zlib.decompress(part_of(path, offset, size)), "<u2")
        return depth_in_meters(depth.reshape(shape), view.units_per_meter)
    ending = path.suffix.lower()
    if ending == ".png":
        depth = depth_in_meters(read_index_image(path, "depth", (16,)), view.units_per_meter)
    elif ending in (".npy", ".tif", ".tiff"):
        content = read_bytes(path, "depth")
        if ending == ".npy":
            depth = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            depth = np.asarray(decode_image(content, path, "depth", ("TIFF",)))
        if depth.ndim != 2 or depth.dtype.kind not in "uf":
            raise ValueError(f"{path}: depth has shape {depth.shape} of {depth.dtype}, expected (H, W) of numbers")
        depth = np.nan_to_num(depth.astype(np.float32), nan=0, posinf=0, neginf=0) / np.float32(view.units_per_meter)
    else:
        raise ValueError(f"{path}: depth as {ending} is not read: convert it to .npy, .tiff or 16-bit .png")
    if view.confidence is not None:
        confidence = read_index_image(view.confidence, "confidence")
        if confidence.shape != depth.shape:
            raise ValueError(f"{view.confidence}: confidence {confidence.shape} is not of the size of depth "
                             f"{depth.shape}")
        depth = np.where(confidence > 0, depth, 0)
    return depth


def main(argv=None):
    parser = argparse.ArgumentParser("captures.py", description="Says how a capture is read, and exports it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="write it in ScanNet's layout into this folder")
    parser.add_argument("--format", choices=FORMATS, help="not given: what lies in the folder decides")
    parser.add_argument("--pose", choices=POSES, help="overrules direction and quaternion order of the format")
    parser.add_argument("--depth-scale", type=float, help="units of depth per meter, if no file tells")
    parser.add_argument("--intrinsics", help="FX,FY,CX,CY of the color images, if no file tells")
    args = parser.parse_args(argv)
    intrinsics = args.intrinsics and pinhole_of(*map(float, args.intrinsics.split(",")))
    frames = CaptureFrames(args.folder, args.format, Options(intrinsics, args.pose, args.depth_scale))
    print(frames.description)
    if args.to:
        from sources.scannet import write_frames
        write_frames(frames, args.to)
        print(f"{len(frames)} frames in {args.to}")


if __name__ == "__main__":
    main()
