# SPDX-License-Identifier: MIT
"""What guards files: they are written whole or not at all, and read rightly or refused by name.

A file that cannot be read as what it should be is a FileNotFoundError or a ValueError that names it.

Imports numpy and PIL.
"""
import contextlib
import errno
import io
import json
import os
import re
import shutil
import uuid
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

MAX_BYTES = 2 ** 32  # of a file that is read at once
FOLDER = 0x10  # attribute of an entry of a zip file

# --------------------------------------------------------------------------------------------- writing


def write_whole(path, write, folder=None, sync=True):
    """Calls write(file) on a new file, which then takes the name `path`.

    Whenever that is interrupted, the old file or the whole new one is there. If it fails, OSError names
    `path`, and nothing is left. folder: where the unfinished file lies, by default beside `path`.
    sync: waits for the disk; else a power cut may leave the new name on an empty file.
    """
    path = Path(path)
    temporary = Path(folder or path.parent) / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides what the file raised
        fault = error if isinstance(error, OSError) else error.__context__
        if not isinstance(fault, OSError):
            raise
        text = fault.strerror
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            text += f", {shutil.disk_usage(temporary.parent).free / 2**30:.3f} GiB free"
        raise OSError(fault.errno, text, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ------------------------------------------------------------------------------------------------ text


def read_bytes(path, field):
    """The content of a file. FileNotFoundError if there is none, ValueError if it is over 4 GiB.

    field: what the file holds, in words for errors, here and below.
    """
    check_exists(path, field)
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f"{path}: {field} has {size:,} bytes, more than {MAX_BYTES:,}")
    return Path(path).read_bytes()


def check_exists(path, field):
    """FileNotFoundError if there is no such file."""
    if not os.path.isfile(path):
        reason = "is not a file" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"{field} {path} {reason}")


def read_text(path, field):
    """The content of a UTF-8 text file, without a byte order mark."""
    try:
        return read_bytes(path, field).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {field} is not UTF-8 text: {error}") from None


def read_json(path, field):
    """The dict that a JSON file holds."""
    try:
        content = json.loads(read_text(path, field))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {field} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {field} is a JSON {type(content).__name__}, expected an object")
    return content


def read_rows(path, field):
    """Words in each line of a text file, between spaces or commas, without empty lines and comments (#)."""
    lines = read_text(path, f"{field} file").replace(",", " ").splitlines()
    rows = [line.split() for line in lines]
    rows = [row for row in rows if row and not row[0].startswith("#")]
    if not rows:
        raise ValueError(f"{path}: {field} file without a line")
    for row in rows:
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: {field} has {len(row)} words in a line, expected {len(rows[0])}: {row}")
    return rows


# --------------------------------------------------------------------------------------------- folders


def visible(folder, *patterns):
    """Paths that the patterns find in a folder, pattern after pattern, without dot files."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.name[0] != "."]


def only_file(folder, pattern):
    """The one path that a pattern finds."""
    path, *others = visible(folder, pattern)
    if others:
        raise ValueError(f"{folder}: {path.name} and {others[0].name}: keep the right one")
    return path


def natural_key(name):
    """Sort key that puts "frame-2" before "frame-10", and "1.25" before "1.5"."""
    parts = re.split(r"(\d+\.?\d*)", name)
    return [(0, float(part), part) if place % 2 else (1, 0, part) for place, part in enumerate(parts)]


# -------------------------------------------------------------------------------------------- matrices


def as_matrix(values, path, field, shapes):
    """Rows of numbers, or all numbers in one row -> float64 matrix of one of `shapes`."""
    try:
        matrix = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {field} is not a matrix of numbers: {error}") from None
    is_row = matrix.size in matrix.shape
    for shape in shapes:
        if matrix.shape == shape or is_row and matrix.size == shape[0] * shape[1]:
            return matrix.reshape(shape)
    raise ValueError(f"{path}: {field} has shape {matrix.shape}, expected {' or '.join(map(str, shapes))}")


def as_pose(values, path, field="pose"):
    """[R t] as 3 or 4 rows, 12 or 16 numbers -> rigid (4, 4) float64; None if lost (inf or NaN)."""
    pose = as_matrix(values, path, field, [(4, 4), (3, 4)])
    if not np.isfinite(pose).all():
        return None
    if len(pose) == 3:
        pose = np.vstack([pose, [0, 0, 0, 1]])
    turn = pose[:3, :3]
    last_row = np.abs(pose[3] - [0, 0, 0, 1]).max()
    if np.abs(turn).max() > 2 or np.abs(turn @ turn.T - np.eye(3)).max() > 0.01 or last_row > 1e-6:
        raise ValueError(f"{path}: {field} is not a rotation and shift [[R, t], [0, 1]]: {pose.tolist()}")
    if np.linalg.det(turn) < 0:
        raise ValueError(f"{path}: {field} is mirrored, det R = -1: {pose.tolist()}")
    return pose


def quaternion_pose(numbers, path, order=(3, 4, 5, 6)):
    """Translation and quaternion (7,) -> rigid (4, 4) float64; None if lost. order: of x, y, z, w."""
    numbers = as_matrix([numbers], path, "pose", [(1, 7)])[0]
    x, y, z, w = numbers[list(order)]
    square = x * x + y * y + z * z + w * w
    if square == 0 or not np.isfinite(numbers).all():
        return None
    if not 0.8 < square < 1.2:
        raise ValueError(f"{path}: a quaternion has norm {square ** 0.5:.3f}: {numbers.tolist()}")
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix = np.eye(4)
    matrix[:3, :3] += 2 / square * (w * cross + cross @ cross)
    matrix[:3, 3] = numbers[:3]
    return matrix


def read_pose(path, field="pose"):
    """Text file of a pose -> (4, 4) float64 or None, see `as_pose`."""
    return as_pose(read_rows(path, field), path, field)


def as_intrinsics(values, path, field):
    """Rows of a 3 x 3 or 4 x 4 matrix, or fx, fy, cx, cy -> (3, 3) float64 pinhole intrinsics."""
    matrix = as_matrix(values, path, field, [(3, 3), (4, 4), (1, 4)])
    if len(matrix) == 1:
        fx, fy, cx, cy = matrix[0]
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    matrix = matrix[:3, :3]
    focal = matrix[[0, 1], [0, 1]]
    has_zeros = matrix[1, 0] == 0 and (matrix[2] == [0, 0, 1]).all()
    if not (np.isfinite(matrix).all() and has_zeros and focal.min() > 0):
        raise ValueError(f"{path}: {field} is not a pinhole matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]]: "
                         f"{matrix.tolist()}")
    if focal.min() < 1:
        raise ValueError(f"{path}: {field} is not in pixels: {matrix.tolist()}")
    return matrix


def read_intrinsics(path, field):
    """Text file of intrinsics, see `as_intrinsics`."""
    return as_intrinsics(read_rows(path, field), path, field)


def resize_intrinsics(intrinsics, old_size, new_size):
    """Intrinsics (3, 3) of an image resized from old_size to new_size, (H, W) each: c -> (c + 0.5) s - 0.5."""
    scale = np.array([new_size[1] / old_size[1], new_size[0] / old_size[0], 1.0])
    matrix = intrinsics * scale[:, None]
    matrix[:2, 2] += 0.5 * scale[:2] - 0.5
    return matrix


def check_principal_point(intrinsics, size, path):
    """ValueError if the principal point is farther from an image of size (H, W) than two images."""
    point = intrinsics[:2, 2]
    extent = np.array(size[::-1])
    if (point < -2 * extent).any() or (point > 3 * extent).any():
        raise ValueError(f"{path}: the principal point {point.tolist()} is far outside of the images of "
                         f"{size[1]} x {size[0]} pixels")


# ---------------------------------------------------------------------------------------------- images


def image_size(path, field):
    """(H, W) of an image file, from its header."""
    check_exists(path, f"{field} image")
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.size[::-1]
    except Exception as error:
        raise ValueError(f"{path}: {field} image cannot be decoded: {error}") from error


def decode_image(content, path, field, formats):
    """Bytes of an image file -> PIL image, verified and decoded to the last byte."""
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        image.verify()  # checksums, most of which decoding ignores
        image = Image.open(io.BytesIO(content), formats=formats)
        image.load()
    except Exception as error:  # Pillow has no common base for what broken files raise
        raise ValueError(f"{path}: {field} image cannot be decoded: {error}") from error
    return image


def png_header(content):
    """(bits per channel, color type) of a PNG, which Pillow may make 8-bit; (8, None) of other files."""
    return (content[24], content[25]) if content[12:16] == b"IHDR" else (8, None)


def decode_color(content, path):
    """Bytes of a JPEG or PNG with 8 bits per channel -> (H, W, 3) uint8 RGB."""
    image = decode_image(content, path, "color", ("JPEG", "PNG"))
    if png_header(content)[0] == 16:
        used = int(np.asarray(image).max()).bit_length()
        used += 0 if image.mode.startswith("I") else 8  # of RGB, Pillow keeps the upper 8 bits
        raise ValueError(f"{path}: the color image has 16 bits per channel, of which {used} are in use: save "
                         "it with 8")
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P"):
        raise ValueError(f"{path}: color image of mode {image.mode}, expected RGB, gray or a palette")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_color(path):
    """JPEG or PNG file with 8 bits per channel -> (H, W, 3) uint8 RGB."""
    return decode_color(read_bytes(path, "color image"), path)


def read_index_image(path, field, bits=(8, 16)):
    """PNG of grayscale with `bits` or, if 8 is among them, a palette -> (H, W) unsigned integers."""
    content = read_bytes(path, f"{field} image")
    image = decode_image(content, path, field, ("PNG",))
    depth, kind = png_header(content)
    is_gray = kind == 0 and depth in bits
    is_palette = kind == 3 and 8 in bits
    if not (is_gray or is_palette):
        kinds = {0: "grayscale", 2: "RGB", 3: "a palette", 4: "grayscale with alpha", 6: "RGBA"}
        raise ValueError(f"{path}: {depth}-bit {field} image of {kinds.get(kind, 'unknown kind')}, expected "
                         f"grayscale of {' or '.join(map(str, bits))} bits")
    return np.asarray(image)


def read_depth(path, units_per_meter=1000):
    """Depth along the axis of a 16-bit PNG, NPY or TIFF -> (H, W) float32 meters, 0 = no reading."""
    ending = Path(path).suffix.lower()
    if ending == ".png":
        depth = read_index_image(path, "depth", (16,))
    elif ending == ".npy":
        content = io.BytesIO(read_bytes(path, "depth"))
        try:
            depth = np.lib.format.read_array(content)
        except ValueError as error:
            raise ValueError(f"{path}: depth is not an NPY file of numbers: {error}") from None
    elif ending in (".tif", ".tiff"):
        depth = np.asarray(decode_image(read_bytes(path, "depth"), path, "depth", ("TIFF",)))
    else:
        raise ValueError(f"{path}: depth as {ending} is not read: convert it to .npy, .tiff or 16-bit .png")
    if depth.ndim != 2 or depth.dtype.kind not in "iuf":
        raise ValueError(f"{path}: depth has shape {depth.shape} of {depth.dtype}, expected (H, W) of numbers")
    return depth_in_meters(depth, units_per_meter)


def depth_in_meters(depth, units_per_meter):
    """(H, W) -> (H, W) float32 meters, 0 = no reading, for which files have 0, 65535, NaN or inf."""
    known = np.where((depth != 65535) & np.isfinite(depth), depth, 0)
    return known.astype(np.float32) * np.float32(1 / units_per_meter)


# ----------------------------------------------------------------------------------------- checkpoints


def check_torch_file(path):
    """FileNotFoundError or ValueError if a file is not what torch.save writes, with every checksum right.

    torch.load looks at no checksum, unpacks compressed entries to any size, hands out memory that nobody has
    written for an entry that is marked as a folder, and runs TorchScript (constants.pkl).
    """
    check_exists(path, "checkpoint")
    strange = []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                is_script = entry.filename.endswith("/constants.pkl")
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & FOLDER or is_script:
                    strange.append(entry.filename)
            damaged = strange or archive.testzip()
    except Exception as error:  # zipfile raises many kinds
        raise ValueError(f"{path}: not a checkpoint (a zip file of torch.save), truncated, or damaged: "
                         f"{error}") from error
    if strange:
        raise ValueError(f"{path}: not a checkpoint, torch.save writes no entry such as {strange[0]}")
    if damaged:
        raise ValueError(f"{path}: damaged, the checksum of its entry {damaged} is wrong")
