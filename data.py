# SPDX-License-Identifier: MIT
"""RGB-D frames as training samples: points with features and labels, and images that they project into.

A *frame* is a dict:

    name              "scene/stem"; frames of one scene share the part before the slash
    color             (H, W, 3) uint8, RGB
    depth             (Hd, Wd) float, meters along the optical axis, 0 = unknown
    world2cam         (4, 4) float, the pose of the color camera
    depth_world2cam   (4, 4) float, the pose of the depth camera; absent: the same
    intrinsics        (3, 3) float, of the color image
    depth_intrinsics  (3, 3) float, of the depth image
    label             (H, W) or (Hd, Wd) integers, an index into the class names, -1 = none; None or absent if unlabeled
    instance          of the same shapes, any number >= 0 per object, -1 = none; None or absent if there are none
    features          (H, W, F) or (Hd, Wd, F) floats that the 3D encoder sees beside the color, intensity say,
                      which augmentation leaves alone; absent: none

Cameras have OpenCV axes (x right, y down, z forward), and pixel centers have integer coordinates. The
world's z axis points up, because augmentation turns about it; `upright` turns a source whose world has
another up.

A *source* is any sequence of frames: a list of dicts made in a notebook, or a class that reads files
when it is indexed. A source may also offer

    names             list of the frames' names, so that nothing is read to group frames into scenes
    color(index)      the color image alone
    class_names       list of K class names; training needs it
    num_skipped       number of frames left out because their pose is unknown
    num_features      3 + F, if its frames have features
    files(index)      list of all paths that a frame is read from
    color_files(index)    the same for color(index)
    settings          what else its frames depend on (a class list, say), as a string

With `files`, a second start on unchanged files reads no frame (see `check_frames`).

`PointDataset` makes samples out of a source, `SceneDataset` out of whole scans, and `collate` makes a
ragged batch out of samples. Augmentation changes `coords` and `features`. `points` stay where the
camera saw them, so projection is exact whatever the augmentation does.

Imports torch, numpy, PIL and tqdm. Readers, caches and the oversegmentation are handed in.
"""
import functools
import hashlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features as codecs
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

# --------------------------------------------------------------------------------------------- geometry

AXES = {name: np.eye(3)[axis] for axis, name in enumerate("xyz")}
AXES |= {f"-{name}": -vector for name, vector in AXES.items()}
MAX_DISTANCE = 1e4  # meters, of a camera from the origin and of a point from it: float32 resolves 1 mm


def up_rotation(up):
    """The rotation (3, 3) that makes `up` the z axis: a key of AXES, or a vector as text, "0,-0.9,0.1".

    For an axis it is a quarter or half turn, exact; for a vector the smallest rotation. Raises
    ValueError for others.
    """
    rows = {"z": ("x", "y", "z"), "-z": ("x", "-y", "-z"), "y": ("x", "-z", "y"),
            "-y": ("x", "z", "-y"), "x": ("-z", "y", "x"), "-x": ("z", "y", "-x")}
    if up in rows:
        return np.stack([AXES[name] for name in rows[up]])
    try:
        vector = np.array(up.split(","), np.float64)
    except ValueError:
        vector = np.zeros(0)
    length = np.linalg.norm(vector)
    if vector.shape != (3,) or not 1e-6 < length < np.inf:
        raise ValueError(f"up must be one of {', '.join(rows)}, or a vector x,y,z, got {up!r}")
    vector = vector / length
    if vector[2] < -0.999999:
        return up_rotation("-z")
    # Rodrigues' formula for the turn of `vector` to z
    axis = np.cross(vector, AXES["z"])
    cross = np.cross(axis, np.eye(3)).T
    return np.eye(3) + cross + cross @ cross / (1 + vector[2])


class Upright:
    """A source of frames, or of scans, in a world that is turned to z up; see `upright`."""

    def __init__(self, source, up):
        self.source = source
        self.rotation = up_rotation(up)
        self.settings = f"{getattr(source, 'settings', '')}, up {up}"

    def __getattr__(self, name):
        if name == "source":  # not there yet while a copy is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        turn = np.eye(4)
        turn[:3, :3] = self.rotation
        item = dict(self.source[index])
        for key in item.keys() & {"world2cam", "depth_world2cam"}:
            item[key] = item[key] @ turn.T
        if "points" in item:
            points = item["points"]
            item["points"] = points @ self.rotation.T.astype(points.dtype)
            item["alignment"] = turn @ item["alignment"] @ turn.T
        if "normals" in item:
            item["normals"] = turn_normals(item["normals"], self.rotation)
        return item


def upright(source, up):
    """A source whose world has `up` pointing up (see `up_rotation`) -> the same with z up.

    Points p' of the result are rotation @ p; `p' @ rotation` undoes it.
    """
    return source if up == "z" else Upright(source, up)


def unproject(uv, depth, intrinsics, world2cam):
    """Pixels uv (n, 2) at depth (n,) meters along the optical axis -> points (n, 3) float64 of the world."""
    pixels = np.column_stack([uv, np.ones(len(uv))])
    rays = pixels @ np.linalg.inv(intrinsics).T
    points_cam = rays * np.asarray(depth, np.float64)[:, None]
    cam2world = np.linalg.inv(world2cam)
    return points_cam @ cam2world[:3, :3].T + cam2world[:3, 3]


def camera_height(world2cam):
    """Poses (..., 4, 4) of a world with z up -> heights (...) of the cameras in meters."""
    down, shift = world2cam[..., :3, 2], world2cam[..., :3, 3]
    return -(down * shift).sum(-1)


def resize_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (3, 3) of an image resized from old_size to new_size (H, W): c -> (c + 0.5) s - 0.5."""
    sy = new_size[0] / old_size[0]
    sx = new_size[1] / old_size[1]
    to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    scale = np.diag([sx, sy, 1.0])
    return np.linalg.inv(to_corner) @ scale @ to_corner @ intrinsics


def crop_intrinsics(intrinsics, top, left):
    """Intrinsics (3, 3) of an image whose first `top` rows and `left` columns were cut off."""
    return np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1.0]]) @ intrinsics


# ----------------------------------------------------------------------------------------- augmentation


MAX_CELLS = 2 ** 20


def grid_cells(extent, granularity):
    """Cells (3,) of 2 * granularity that cover an extent (3,), plus one on both sides."""
    return (extent / (2 * granularity)).long() + 3


def elastic(coords, rng, granularity, magnitude):
    """Smooth random displacement: blurred normal noise on a grid of 2 * granularity, trilinear between.

    coords: (n, 3) float32; granularity and magnitude in the same unit. As in SPFormer, Mask3D and ESAM.
    The noise is clamped at 3 sigma, so no coordinate moves by more than 3 * magnitude (typically by a
    ninth of the magnitude). The grid of a large cloud is coarser: it has at most MAX_CELLS cells, so
    that it takes neither more memory nor more time than a training step.
    """
    if coords.ndim != 2 or coords.shape[1] != 3 or len(coords) == 0:
        raise ValueError(f"expected coords (n, 3) of at least one point, got shape {coords.shape}")
    if not np.isfinite(coords).all():
        raise ValueError(f"coords {coords.shape} hold NaN or inf")
    cloud = torch.from_numpy(coords)
    low, high = torch.aminmax(cloud, dim=0)
    cells = grid_cells(high - low, granularity)
    while cells.prod() > MAX_CELLS:
        granularity *= 1.1
        cells = grid_cells(high - low, granularity)
    x, y, z = cells.tolist()
    noise = rng.standard_normal((3, z, y, x), np.float32)
    noise = torch.from_numpy(noise).clamp(-3, 3)[None]  # (1, 3, z, y, x)
    for _ in range(2):
        noise = F.avg_pool3d(noise, 3, stride=1, padding=1)
    grid = ((cloud - low) / (2 * granularity) + 0.5) / (cells - 1) * 2 - 1
    grid = grid.view(1, 1, 1, -1, 3)
    shift = F.grid_sample(noise, grid, align_corners=True, padding_mode="border")
    return (cloud + magnitude * shift.view(3, -1).T).numpy()


def random_similarity(rng):
    """Flips of x and y, rotation about z, scale (0.8 to 1.2) in one matrix (3, 3); shift (3,), sigma 0.1 m."""
    angle = rng.uniform(-math.pi, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    flip_x = rng.choice([-1.0, 1.0])
    flip_y = rng.choice([-1.0, 1.0])
    flip = np.diag([flip_x, flip_y, 1.0])
    scale = rng.uniform(0.8, 1.2)
    return scale * turn @ flip, rng.normal(0, 0.1, 3)


def turn_normals(normals, matrix):
    """Unit normals (n, 3) of a cloud that a rotation, mirroring and scaling (3, 3) moved; zeros stay zeros."""
    turned = normals @ matrix.T
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    return (turned / np.maximum(length, 1e-6)).astype(np.float32)


def augment_points(coords, rng, voxel_size=0.02, elastic_p=0.5, similarity=None):
    """A similarity, random unless given, about the cloud's center, then maybe two elastic fields.

    coords (n, 3) float32 meters -> the same. Granularity 6 and 20, magnitude 40 and 160 voxels.
    """
    matrix, shift = random_similarity(rng) if similarity is None else similarity
    center = coords.mean(0)
    turned = (coords - center) @ matrix.T
    coords = (turned + center + shift).astype(np.float32)
    if rng.random() < elastic_p:
        for granularity, magnitude in ((6, 40), (20, 160)):
            coords = elastic(coords, rng, granularity * voxel_size, magnitude * voxel_size)
    return coords


def jitter_colors(colors, rng):
    """Contrast (0.8 to 1.2), shift per channel (sigma 0.05), noise (sigma 0.02) of (n, 3) in [0, 1]."""
    mean = colors.mean(0)
    contrast = rng.uniform(0.8, 1.2)
    colors = (colors - mean) * contrast + mean + rng.normal(0, 0.05, 3)
    noise = rng.standard_normal(colors.shape, np.float32)
    noisy = colors + np.float32(0.02) * noise
    return np.clip(noisy, 0, 1).astype(np.float32)


# ----------------------------------------------------------------------------------------------- frames


MATRICES = {"world2cam": (4, 4), "depth_world2cam": (4, 4),
            "intrinsics": (3, 3), "depth_intrinsics": (3, 3)}


def check_frame(frame):
    """ValueError with frame, field and shape if a frame is not as this file's docstring says."""
    name = frame.get("name")
    if not isinstance(name, str) or name.count("/") != 1 or "" in name.split("/"):
        raise ValueError(f'a frame needs a name "scene/stem", got {name!r}')

    def require(field, fits, expected):
        if not fits:
            value = frame.get(field)
            found = type(value).__name__
            if isinstance(value, np.ndarray):
                found = f"shape {value.shape} of {value.dtype}"
            raise ValueError(f"frame {name}: {field} has {found}, expected {expected}")

    def is_array(value, ndim, kinds):
        return isinstance(value, np.ndarray) and value.ndim == ndim and value.dtype.kind in kinds

    color, depth = frame.get("color"), frame.get("depth")
    is_color = is_array(color, 3, "u") and color.shape[2] == 3 and color.itemsize == 1
    require("color", is_color, "(H, W, 3) of uint8")
    require("depth", is_array(depth, 2, "f"), "(Hd, Wd) of floating-point meters")
    for field, shape in MATRICES.items():
        matrix = frame.get(field)
        if field == "depth_world2cam" and matrix is None:
            continue
        is_matrix = is_array(matrix, 2, "f") and matrix.shape == shape and np.isfinite(matrix).all()
        require(field, is_matrix, f"{shape} of finite floats")
        last_row = np.eye(shape[0])[-1]
        if np.abs(matrix[-1] - last_row).max() > 1e-6:
            raise ValueError(f"frame {name}: {field} {shape} must have the last row {last_row}, got "
                             f"{matrix[-1]}; is it transposed?")
        distance = np.abs(matrix[:3, -1]).max()
        if shape == (4, 4) and distance > MAX_DISTANCE:
            raise ValueError(f"frame {name}: {field} {shape} has a translation of {distance:.0f} m, where float32 "
                             "is too coarse: subtract an offset from the poses, or convert them to meters "
                             "(docs/cameras.md)")
    if ((depth > MAX_DISTANCE) & (depth < np.inf)).any():
        raise ValueError(f"frame {name}: depth {depth.shape} has values above {MAX_DISTANCE:.0f} m; it must be "
                         "in meters, with 0 = unknown")

    sizes = (color.shape[:2], depth.shape)
    for field, size in zip(("intrinsics", "depth_intrinsics"), sizes):
        point = frame[field][:2, 2]
        if (np.abs(point / size[::-1] - 0.5) > 2.5).any():
            raise ValueError(f"frame {name}: {field} (3, 3) has the principal point {point.tolist()}, far outside of "
                             f"the image of {size[1]} x {size[0]} pixels")
    words = f"of the size of color {sizes[0]} or depth {sizes[1]}"
    for field in ("label", "instance"):
        image = frame.get(field)
        fits = image is None or is_array(image, 2, "iu") and image.shape in sizes
        require(field, fits, f"integers {words}")
    features = frame.get("features")
    if features is not None:
        fits = is_array(features, 3, "f") and features.shape[:2] in sizes
        require("features", fits and np.isfinite(features).all(), f"finite floats {words}, and F channels")


def frame_names(frames):
    """The name of every frame of a source; a source without `names` is read once."""
    if hasattr(frames, "names"):
        return list(frames.names)
    return [frames[index]["name"] for index in range(len(frames))]


def describe(dataset, blank):
    """How many samples a set has, and what was not taken, as text. blank: samples without any depth."""
    frames, scenes = dataset.frames, getattr(dataset, "scenes", None)
    folders = getattr(frames, "folders", {}).values()  # of ScanNet's layout
    left_out = {"samples without depth": len(blank), "lost poses": getattr(frames, "num_skipped", 0),
                **getattr(frames, "left_out", {}), **getattr(scenes, "left_out", {}),
                "scenes' labels, which do not exist": sum("label-filt" not in kinds for kinds in folders)}
    counts = [f"{count} {what}" for what, count in left_out.items() if count]
    samples = f"{len(dataset)} {'training' if dataset.augment else 'validation'} samples"
    return ", ".join([samples, "left out: " + "; ".join(counts)] if counts else [samples])


def class_ids_of(dataset, class_names):
    """The data's ids of the classes, for the files that predict.py writes; from 1 on if it has none."""
    labeled = getattr(dataset, "scenes", dataset.frames)
    return list(getattr(labeled, "class_ids", range(1, len(class_names) + 1)))


def group_by_scene(names):
    """Names "scene/stem" -> {scene: list of indices}."""
    scenes = {}
    for index, name in enumerate(names):
        scenes.setdefault(name.split("/")[0], []).append(index)
    return scenes


def files_digest(sources, *settings, files="files"):
    """Digest of files and settings: 16 bytes, or None if one of the sources has no `files`.

    sources: pairs (source, indices). Covers path, size and modification time of every file of these
    items, and the sources' own `settings`. files: the method of a source that names them.
    """
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    absolute = functools.cache(os.path.abspath)
    for source, indices in sources:
        if not hasattr(source, files):
            return None
        digest.update(f"{getattr(source, 'settings', '')}\n".encode())
        paths = [path for index in indices for path in getattr(source, files)(index)]
        for path in dict.fromkeys(paths):  # each once, in order
            stat = os.stat(path)
            folder, name = os.path.split(path)
            digest.update(f"{absolute(folder)}/{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.digest()


# ------------------------------------------------------------------------------------ pixels and images


def resize_image(color, image_size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8, bicubic with antialiasing; see `resize_intrinsics`."""
    if color.shape[:2] == tuple(image_size):
        return color
    image = Image.fromarray(color)
    return np.asarray(image.resize(image_size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def to_tensor(image):
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    channels_first = image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels_first, np.float32)) / 255


def stack_depth(images):
    """Depth images (..., H, W) of any sizes -> (n, ..., H, W), filled with 0 at bottom and right."""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    padded = []
    for image in images:
        right, bottom = width - image.shape[-1], height - image.shape[-2]
        padded.append(F.pad(image, (0, right, 0, bottom)))
    return torch.stack(padded)


def depth_pose(frame):
    """world2cam (4, 4) of a frame's depth camera."""
    return frame.get("depth_world2cam", frame["world2cam"])


def depth_to_color(frame):
    """The known depth pixels that the color image shows, and the color pixels that they fall on.

    Returns flat indices (n,) into depth and (n,) into color. Cameras with one pose see a point along one
    ray, so the map needs no depth: u_color = K_color inv(K_depth) u_depth. If they have two, points are
    carried over, and those that another one at their color pixel hides by more than 5 cm are left out.
    """
    depth = frame["depth"]
    height, width = frame["color"].shape[:2]
    known = np.flatnonzero((depth > 0) & np.isfinite(depth))
    two_poses = not np.array_equal(depth_pose(frame), frame["world2cam"])
    same_camera = np.array_equal(frame["intrinsics"], frame["depth_intrinsics"]) and not two_poses
    if depth.shape == (height, width) and same_camera:
        return known, known
    v, u = np.divmod(known, depth.shape[1])
    if two_poses:
        points = unproject(np.stack([u, v], 1), depth.ravel()[known], frame["depth_intrinsics"],
                           depth_pose(frame))
        rotation, shift = frame["world2cam"][:3, :3], frame["world2cam"][:3, 3]
        x, y, z = (points @ rotation.T + shift).T
        front = np.where(z > 0, z, np.inf)
        rays = np.stack([x / front, y / front, np.ones(len(z))])
        x, y = np.rint(frame["intrinsics"][:2] @ rays).astype(np.int64)
        inside = z > 0
    else:
        matrix = frame["intrinsics"] @ np.linalg.inv(frame["depth_intrinsics"])
        row_x, row_y, _ = matrix.astype(np.float32)
        u, v = u.astype(np.float32), v.astype(np.float32)
        x = np.rint(row_x[0] * u + row_x[1] * v + row_x[2]).astype(np.int64)
        y = np.rint(row_y[0] * u + row_y[1] * v + row_y[2]).astype(np.int64)
        inside = np.ones(len(known), bool)
    inside &= (x >= 0) & (x < width)
    inside &= (y >= 0) & (y < height)
    known = known[inside]
    seen = (y * width + x)[inside]
    if two_poses:
        nearest = np.full(height * width, np.inf)
        np.minimum.at(nearest, seen, z[inside])
        visible = z[inside] <= nearest[seen] + 0.05
        known, seen = known[visible], seen[visible]
    return known, seen


def register_color(frame, known, seen):
    """Depth (Hd, Wd) and colors (Hd, Wd, 3), both 0 except at the pairs of `depth_to_color`."""
    if known is seen:
        return frame["depth"], frame["color"]
    depth = np.zeros(frame["depth"].shape, np.float32)
    color = np.zeros((*depth.shape, 3), np.uint8)
    depth.reshape(-1)[known] = frame["depth"].ravel()[known]
    source = frame["color"].reshape(-1, 3)
    color.reshape(-1, 3)[known] = source[seen]
    return depth, color


def depth_normals(depth, intrinsics, known):
    """Unit normals (n, 3) of the surface at depth pixels, in the axes of the camera and towards it.

    depth (H, W), 0 or not finite = unknown; known (n,), flat indices of pixels with depth. 1 / depth of a
    plane is linear in the pixel, m . (u, v, 1), and K^T m is normal to it. The slopes of m are fitted to
    the 5 x 5 pixels around, without those that are unknown or on another surface: 3 % nearer or farther
    per pixel.
    """
    height, width = depth.shape
    inverse = np.zeros((height + 4, width + 4))
    np.divide(1, depth, out=inverse[2:-2, 2:-2], where=(depth > 0) & np.isfinite(depth))
    v, u = np.divmod(known, width)
    center = inverse[v + 2, u + 2]
    uu = vv = 1e-6  # a pixel without neighbors faces along the optical axis
    uv = us = vs = 0.0
    for dv in range(-2, 3):
        for du in range(-2, 3):
            step = inverse[v + 2 + dv, u + 2 + du] - center
            near = np.abs(step) < 0.03 * max(abs(du), abs(dv)) * center
            uu = uu + near * du * du
            uv = uv + near * du * dv
            vv = vv + near * dv * dv
            us = us + near * du * step
            vs = vs + near * dv * step
    slope_u = (vv * us - uv * vs) / (uu * vv - uv * uv)
    slope_v = (uu * vs - uv * us) / (uu * vv - uv * uv)
    plane = np.stack([slope_u, slope_v, center - slope_u * u - slope_v * v], 1)
    normals = -plane @ intrinsics
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def pixel_fields(frame, known, seen, normals=False):
    """Depth pixels `known` (n,), which fall on color pixels `seen` (n,), flat indices -> {field: (n, ...)}."""
    def rows_of(image):  # (H, W, C) or (Hd, Wd, C) -> (n, C)
        is_color_size = image.shape[:2] == frame["color"].shape[:2]
        return image.reshape(-1, *image.shape[2:])[seen if is_color_size else known]

    v, u = np.divmod(known, frame["depth"].shape[1])
    depth = frame["depth"].ravel()[known]
    points = unproject(np.stack([u, v], 1), depth, frame["depth_intrinsics"], depth_pose(frame))
    features = rows_of(frame["color"]).astype(np.float32) / 255
    if frame.get("features") is not None:
        features = np.concatenate([features, rows_of(frame["features"]).astype(np.float32)], 1)
    fields = {"points": points.astype(np.float32), "features": features}
    if normals:
        in_camera = depth_normals(frame["depth"], frame["depth_intrinsics"], known)
        fields["normals"] = turn_normals(in_camera, depth_pose(frame)[:3, :3].T)
    for key, name in (("labels", "label"), ("instances", "instance")):
        image = frame.get(name)
        if image is None:
            fields[key] = np.full(len(known), -1, np.int64)
        else:
            fields[key] = rows_of(image).astype(np.int64)
    return fields


# ---------------------------------------------------------------------------------------------- samples

PER_POINT = ("points", "coords", "features", "labels", "instances", "superpoints")
PER_VIEW = ("images", "clip_tokens", "clip_pooled", "clip_dense_map", "world2cam", "intrinsics",
            "depth", "depth_world2cam", "depth_intrinsics")


class BlankSample(ValueError):
    """A sample of which no pixel has known depth."""


class ResizedImages(Dataset):
    """The resized images (h, w, 3) uint8 of a source: what a feature cache is built from."""

    def __init__(self, frames, image_size):
        self.frames = frames
        self.image_size = image_size

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        if hasattr(self.frames, "color"):
            return resize_image(self.frames.color(index), self.image_size)
        return resize_image(self.frames[index]["color"], self.image_size)

    def signature(self, indices):
        """16 bytes that change when one of these images may have changed; None without `files`."""
        decoders = Image.__version__, codecs.version("jpg"), codecs.version("zlib")  # they decide the pixels
        files = "color_files" if hasattr(self.frames, "color_files") else "files"
        return files_digest([(self.frames, indices)], self.image_size, *decoders, files=files)


class PointDataset(Dataset):
    """Samples of points with the views that they project into; a function of (seed, epoch, index) alone.

    frames: a source of frames, see the docstring of this file.
    num_points: drawn without replacement from a sample's back-projected pixels; all of them if there
    are fewer.
    image_size: (H, W) of the images.
    num_views: consecutive frames of a scene per sample. If a scene's frames are not a multiple, its
    last sample overlaps the one before.
    augment: for training. color=False: all colors are 1. images=False: samples hold no images.
    voxel_size: meters; elastic augmentation is measured in voxels, see `augment_points`.
    feature_cache: a cache.FeatureCache built from `images_only`, or any object with get(image) ->
    tokens, pooled. Samples then hold clip_tokens, clip_pooled and, if the cache has dense features,
    clip_dense_map instead of images.
    superpoints: a callable (depth, colors, intrinsics) -> (H, W) int64. Samples then hold superpoints
    (n,), any integers, each within one view; `collate` numbers them.
    normals: features also hold unit normals, between color and other features.

    A sample: name, seed (for what the network draws), points and coords (n, 3) meters, features (n, 3 +
    F), the colors in [0, 1] and then the frames' features, labels and instances (n,) with -1 = none,
    images (V, 3, H, W) in [0, 1], world2cam (V, 4, 4), intrinsics (V, 3, 3) of the resized image, depth
    (V, Hd, Wd) meters with 0 = unknown, depth_intrinsics (V, 3, 3).
    """

    def __init__(self, frames, num_points, image_size, num_views=1, augment=False, color=True, images=True,
                 seed=0, voxel_size=0.02, feature_cache=None, superpoints=None, normals=False):
        are_sides = [isinstance(side, int) and side > 0 for side in image_size]
        if are_sides != [True, True]:
            raise ValueError(f"image_size must be (H, W) of positive integers, got {image_size!r}")
        if num_points < 1 or num_views < 1:
            raise ValueError(f"num_points and num_views must be at least 1, got {num_points}, {num_views}")
        self.frames = frames
        self.num_points = num_points
        self.image_size = tuple(image_size)
        self.num_views = num_views
        self.augment = augment
        self.color = color
        self.images = images
        self.seed = seed
        self.voxel_size = voxel_size
        self.feature_cache = feature_cache
        self.superpoints = superpoints
        self.normals = normals
        self.images_only = ResizedImages(frames, self.image_size)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch
        if len(frames) == 0:
            raise ValueError(f"{getattr(frames, 'title', type(frames).__name__)}: the source holds no frame")
        self._members = []  # frame indices of each sample
        for scene, members in group_by_scene(frame_names(frames)).items():
            if len(members) < num_views:
                raise ValueError(f"scene {scene} has {len(members)} frames, fewer than num_views={num_views}")
            for start in range(0, len(members), num_views):
                start = min(start, len(members) - num_views)
                self._members.append(members[start:start + num_views])

    def set_epoch(self, epoch):
        """Changes the draw and the augmentation of every sample, if the set is augmented."""
        self._epoch.fill_(epoch)

    def __len__(self):
        return len(self._members)

    def leave_out(self, indices):
        """Takes samples out of the set, blank ones say; those after them move up."""
        gone = set(indices)
        self._members = [views for index, views in enumerate(self._members) if index not in gone]

    def frame_indices(self, index):
        """Indices into `frames` of the views of a sample in this epoch."""
        return self._views(index, self._rng(index))

    def signature(self, indices):
        """16 bytes that change when one of these samples may have changed; None if files do not tell."""
        owner = getattr(self.superpoints, "owner", None)
        if self.superpoints is not None and owner is None:
            return None
        settings = (type(self).__name__, self.num_points, self.image_size, self.num_views, self.augment,
                    self.color, self.images, self.seed, int(self._epoch), self.voxel_size, owner,
                    self.normals)
        return files_digest(self._sources(indices), *settings)

    def __getitem__(self, index):
        rng = self._rng(index)
        frames = [self._read(view) for view in self._views(index, rng)]
        pixels = [depth_to_color(frame) for frame in frames]
        ends = np.cumsum([len(known) for known, _ in pixels])
        if ends[-1] == 0:
            names = ", ".join(frame["name"] for frame in frames)
            raise BlankSample(f"no pixel with known depth in {names}")
        drawn = self._draw(ends[-1], rng)
        parts = []
        num_pixels = 0  # of the views before: no two views share a superpoint
        for frame, (known, seen), end in zip(frames, pixels, ends):
            start = end - len(known)
            own = drawn[(drawn >= start) & (drawn < end)] - start
            part = pixel_fields(frame, known[own], seen[own], self.normals)
            if self.superpoints is not None:
                depth, colors = register_color(frame, known, seen)
                segments = self.superpoints(depth, colors, frame["depth_intrinsics"])
                part["superpoints"] = segments.ravel()[known[own]] + num_pixels
                num_pixels += segments.size
            parts.append(part)
        fields = {}
        for key in parts[0]:
            fields[key] = np.concatenate([part[key] for part in parts])
        return self._sample(frames[0]["name"], frames, fields, fields["points"], rng)

    def _rng(self, index):
        draw = 1 + int(self._epoch) if self.augment else 0
        return np.random.default_rng((self.seed, draw, index))

    def _views(self, index, rng):
        return self._members[index]

    def _sources(self, indices):
        """The pairs (source, indices) that some samples are read from."""
        views = [view for index in indices for view in self.frame_indices(index)]
        return [(self.frames, views)]

    def _read(self, view):
        frame = self.frames[view]
        check_frame(frame)
        return frame

    def _draw(self, total, rng):
        if total <= self.num_points:
            return np.arange(total)
        drawn = rng.choice(total, self.num_points, replace=False, shuffle=False)
        return np.sort(drawn)

    def _sample(self, name, frames, fields, coords, rng):
        """Views, per-point fields, and the coordinates to augment -> sample."""
        normals = fields.pop("normals", np.empty((len(coords), 0), np.float32))  # (n, 3) or (n, 0)
        if self.augment:
            similarity = random_similarity(rng)
            fields["coords"] = augment_points(coords, rng, self.voxel_size, similarity=similarity)
            normals = turn_normals(normals, similarity[0]) if self.normals else normals
        else:
            fields["coords"] = coords.astype(np.float32)
        colors = fields["features"][:, :3]
        if not self.color:
            colors = np.ones_like(colors)
        elif self.augment:
            colors = jitter_colors(colors, rng)
        others = fields["features"][:, 3:]
        fields["features"] = np.concatenate([colors, normals, others], 1)
        sample = {"name": name, "seed": int(rng.integers(2 ** 62))}
        sample |= {key: torch.from_numpy(value) for key, value in fields.items()}
        resized = [resize_intrinsics(frame["intrinsics"], frame["color"].shape[:2], self.image_size) for frame in frames]
        cameras = {"world2cam": [frame["world2cam"] for frame in frames],
                   "intrinsics": resized,
                   "depth_world2cam": [depth_pose(frame) for frame in frames],
                   "depth_intrinsics": [frame["depth_intrinsics"] for frame in frames]}
        for key, matrices in cameras.items():
            sample[key] = torch.from_numpy(np.stack(matrices).astype(np.float32))
        known = [np.where(np.isfinite(frame["depth"]), frame["depth"], 0) for frame in frames]
        sample["depth"] = stack_depth([torch.from_numpy(image).float() for image in known])
        if not self.images:
            return sample
        images = [resize_image(frame["color"], self.image_size) for frame in frames]
        if self.feature_cache is None:
            sample["images"] = torch.stack([to_tensor(image) for image in images])
            return sample
        features = zip(*(self.feature_cache.get(image) for image in images))
        for key, views in zip(("clip_tokens", "clip_pooled", "clip_dense_map"), features):
            sample[key] = torch.stack(views)
        return sample


class SceneDataset(PointDataset):
    """Samples of whole scans with `num_views` of their frames: evenly spread, or drawn if augmented.

    scenes: a sequence of scans with `names`, such as scannet.ScanNetScenes; files(index) is optional. A
    scan is a dict: name, points (P, 3) float32 meters in the world of the poses, colors (P, 3) float32
    in [0, 1], alignment (4, 4) to the axes of the 3D encoder, and optionally labels, instances and
    superpoints (P,) int64 and normals (P, 3) float32 in the axes of the points.
    frames: a source of frames of the same scenes, whose labels are not needed. All else is as in
    `PointDataset`; `coords` are aligned and augmented, and superpoints are those of the scan.
    """

    def __init__(self, scenes, frames, num_points, image_size, **options):
        super().__init__(frames, num_points, image_size, **options)
        self.scenes = scenes
        members = group_by_scene(frame_names(frames))
        for name in scenes.names:
            if name not in members:
                raise ValueError(f"scan {name} has no frame")
        self._members = [members[name] for name in scenes.names]

    def __getitem__(self, index):
        scene = self.scenes[index]
        rng = self._rng(index)
        views = self._views(index, rng)
        drawn = self._draw(len(scene["points"]), rng)
        fields = {"points": scene["points"][drawn], "features": scene["colors"][drawn]}
        for key in ("labels", "instances", "superpoints"):
            if key in scene:
                fields[key] = scene[key][drawn]
            elif key != "superpoints":
                fields[key] = np.full(len(drawn), -1, np.int64)
        rotation, shift = scene["alignment"][:3, :3], scene["alignment"][:3, 3]
        if self.normals:
            if "normals" not in scene:
                raise ValueError(f"scan {scene['name']} has no normals, which the network sees")
            fields["normals"] = turn_normals(scene["normals"][drawn], rotation)
        coords = fields["points"] @ rotation.T + shift
        frames = [self._read(view) for view in views]
        return self._sample(scene["name"], frames, fields, coords.astype(np.float32), rng)

    def _views(self, index, rng):
        members = self._members[index]
        if self.augment:
            chosen = np.sort(rng.choice(len(members), self.num_views, replace=False))
        else:
            chosen = np.linspace(0, len(members) - 1, self.num_views).round().astype(int)
        return [members[i] for i in chosen]

    def _sources(self, indices):
        views = [view for index in indices for view in self._members[index]]
        return [(self.scenes, indices), (self.frames, views)]


# ---------------------------------------------------------------------------------------------- batches


def superpoint_index(segments, batch_idx):
    """Numbers the superpoints of a batch consecutively, scene after scene.

    segments: (N,) int64 ids, unique within a scene; or (N, 3) int64 voxel coordinates, which replace
        superpoints that a scene does not have (use coarse voxels: the masks take Q x S memory, and Q is
        up to S).
    batch_idx: (N,) int64, the scene of each point.
    Returns point_to_superpoint (N,) in [0, S), and superpoint_batch (S,), the scene of each superpoint,
    sorted.
    """
    if segments.shape not in (batch_idx.shape, (len(batch_idx), 3)) or segments.is_floating_point():
        raise ValueError(f"segments must be (N,) or (N, 3) integers for batch_idx {tuple(batch_idx.shape)}, got "
                         f"{segments.dtype} {tuple(segments.shape)}")
    point_to_superpoint = batch_idx
    for column in segments.reshape(len(segments), -1).unbind(1):  # faster than rows at once, the same order
        values, rank = column.unique(return_inverse=True)
        keys = point_to_superpoint * len(values) + rank
        keys, point_to_superpoint = keys.unique(return_inverse=True)
    superpoint_batch = batch_idx.new_empty(len(keys)).index_copy_(0, point_to_superpoint, batch_idx)
    return point_to_superpoint, superpoint_batch


def collate(samples, cell=None):
    """Ragged batch: per-point fields are concatenated to (N, ...), all others stacked to (B, V, ...).

    Adds batch (N,) int64, the index of each point's sample; `name` and `seed` become lists. Depth
    images of different sizes are padded with 0 = unknown at bottom and right. Instances keep their
    numbers within the sample.
    cell: also number the superpoints of the whole batch, as `superpoint_index` does:
    point_to_superpoint (N,) and superpoint_batch (S,). Cubes of `cell` meters stand in for superpoints
    that the samples do not have.
    Raises ValueError if another field differs in shape.
    """
    batch = {key: [sample[key] for sample in samples] for key in ("name", "seed")}
    for key in samples[0]:
        if key in batch:
            continue
        values = [sample[key] for sample in samples]
        if key in PER_POINT:
            batch[key] = torch.cat(values)
            continue
        if key == "depth" and len({value.shape[0] for value in values}) == 1:
            batch[key] = stack_depth(values)
            continue
        if any(value.shape != values[0].shape for value in values):
            raise ValueError(f"{key} differs in shape within a batch: " + ", ".join(
                f"{name} {tuple(value.shape)}" for name, value in zip(batch["name"], values)))
        batch[key] = torch.stack(values)
    sizes = torch.tensor([len(sample["points"]) for sample in samples])
    batch["batch"] = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    if "depth_world2cam" in batch and torch.equal(batch["depth_world2cam"], batch["world2cam"]):
        del batch["depth_world2cam"]  # one projection serves both images
    segments = batch.pop("superpoints", None)
    if cell is not None:
        segments = (batch["points"] / cell).floor().long() if segments is None else segments
        index, owner = superpoint_index(segments, batch["batch"])
        batch |= {"point_to_superpoint": index, "superpoint_batch": owner}
    return batch


def mix_scenes(batch, share):
    """Mix3D of Nekrasov et al., 3DV 2021: the 3D encoder sees two samples of a batch as one scene.

    share: the probability that samples 0 and 1, 2 and 3, ... are mixed, drawn from their seeds. Returns the
    batch with "scene" (N,) int64, the scene of each point for the 3D encoder, and with "coords" that move
    the second half of a pair to the center of the first. Points, cameras, images and all else stay those
    of each sample.
    """
    seeds = batch["seed"]
    scene_of = list(range(len(seeds)))
    coords = batch["coords"].clone()
    for first in range(0, len(seeds) - 1, 2):
        rng = np.random.default_rng(seeds[first:first + 2])
        if rng.random() < share:
            scene_of[first + 1] = first
            left, right = (batch["batch"] == sample for sample in (first, first + 1))
            coords[right] += coords[left].mean(0) - coords[right].mean(0)
    _, scene = torch.tensor(scene_of).unique(return_inverse=True)
    return {**batch, "coords": coords, "scene": scene[batch["batch"]]}


def to_device(value, device):
    """A batch, or whatever is in it, with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(part, device) for part in value)
    return value


class CheckedSamples(Dataset):
    """(name, lowest and highest label, number of labeled points) of each sample; None for a blank one."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if isinstance(self.dataset, SceneDataset):  # all frames of a scan, also those not drawn in this epoch
            for view in self.dataset._members[index]:
                self.dataset._read(view)
        try:
            sample = self.dataset[index]
        except BlankSample:
            return None
        labels = sample["labels"]
        return sample["name"], labels.min().item(), labels.max().item(), (labels >= 0).sum().item()


def check_frames(dataset, store=None, rank=0, world_size=1, **loader_options):
    """Reads every sample of this process's share once, and of scans every frame.

    Returns the number of points with a label, and the indices of the samples that no pixel of known
    depth is in. A broken file or a label without a class raises here, by name, and superpoints are
    computed. store: a cache.Store that remembers the result under a digest of the files (path, size,
    modification time) and of all settings, so that the next start on unchanged files reads no frame.
    Sources without `files` are read every time.
    loader_options: of the DataLoader that reads.
    """
    share = range(rank, len(dataset), world_size)
    key = None if store is None else dataset.signature(share)
    known = None if key is None else store.get(key)
    if known is not None:
        labeled, *blank = np.frombuffer(known, "<i8").tolist()
        return labeled, blank
    samples = Subset(CheckedSamples(dataset), share)
    loader = DataLoader(samples, batch_size=None, **loader_options)
    num_classes = len(getattr(dataset.frames, "class_names", None) or ())
    labeled, blank = 0, []
    for index, sample in zip(share, tqdm(loader, "reading frames", unit="sample", disable=rank > 0 or None)):
        if sample is None:
            blank.append(index)
            continue
        name, low, high, count = sample
        if num_classes and not -1 <= low <= high < num_classes:
            raise ValueError(f"{name}: labels from {low} to {high}, expected -1 or an index into the {num_classes} "
                             "class names")
        labeled += count
    if key is not None:
        store.keep(key, np.array([labeled, *blank], "<i8").tobytes())
    return labeled, blank
