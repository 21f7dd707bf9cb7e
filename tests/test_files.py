# SPDX-License-Identifier: MIT
"""files.py: what is written is whole or absent, and what cannot be read rightly is refused by name."""
import builtins
import errno
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import POSE, refused
from support import files

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (24, 32, 3), np.uint8)
GRAY = COLOR[:, :, 0]
DEPTH = RNG.integers(1000, 3000, (24, 32)).astype(np.uint16)


# --------------------------------------------------------------------------------------------- writing


def write(path, content=b"new"):
    files.write_whole(path, lambda file: file.write(content))


def save(path):
    files.write_whole(path, lambda file: torch.save(torch.zeros(1000), file))


def stop(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch, broken):
    path = tmp_path / "x"
    write(path, b"old")
    if broken != "write":
        monkeypatch.setattr(os, broken, stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, lambda file: file.write(b"ne") and broken == "write" and stop())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_the_whole_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths[0]) or replace(*paths))
    write(tmp_path / "x")
    write(tmp_path / "x")
    assert calls[0] == calls[2] == 3
    assert calls[1] != calls[3], "two writes share a temporary file"


@pytest.mark.parametrize("write", [write, save])
def test_a_full_disk_is_one_line_with_path_and_free_space_and_leaves_the_old_file(tmp_path, monkeypatch, write):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    full = lambda path, mode: builtins.open("/dev/full", mode)  # noqa: E731
    monkeypatch.setattr(files, "open", full, raising=False)
    with refused(f"No space left on device, [0-9.]+ GiB free: '{path}'", OSError) as error:
        write(path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_other_faults_keep_their_kind(tmp_path):
    with refused("No such file.*gone/x'", FileNotFoundError):
        write(tmp_path / "gone/x")
    with refused("of torch", RuntimeError):
        files.write_whole(tmp_path / "x", lambda file: (_ for _ in ()).throw(RuntimeError("of torch")))
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------- text and matrices


def test_text_is_utf8_of_at_most_4_gib_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffwall\r\n".encode())
    assert files.read_text(path, "list") == "wall\r\n"
    path.write_bytes(b"\xff")
    with refused("x.txt: list is not UTF-8"):
        files.read_text(path, "list")
    os.truncate(path, files.MAX_BYTES + 1)  # takes no space
    with refused("x.txt: list has 4,294,967,297 bytes"):
        files.read_text(path, "list")
    for name, reason in (("gone.txt", "does not exist"), (".", "is not a file")):
        with refused(f"list {tmp_path / name} {reason}", FileNotFoundError):
            files.read_text(tmp_path / name, "list")


@pytest.mark.parametrize("text, message", [
    ("[1]", "a JSON list"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")])
def test_json_that_holds_no_object_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with refused(f"x.json: notes .*{message}"):
        files.read_json(tmp_path / "x.json", "notes")


@pytest.mark.parametrize("rows", [POSE, POSE[:3], POSE.ravel(), POSE[:3].ravel().tolist(), POSE.astype(str)])
def test_a_pose_is_three_or_four_rows_or_twelve_or_sixteen_numbers(rows):
    assert np.array_equal(files.as_pose(rows, "file"), POSE)


@pytest.mark.parametrize("rows, message", [
    (np.eye(3), r"pose has shape \(3, 3\), expected \(4, 4\) or \(3, 4\)"), ([], "pose has shape"),
    ([1, 2, 3], "pose has shape"), (5, r"pose has shape \(\)"), ([["1", "0"], ["0"]], "pose is not a matrix"), ("a", "pose is not a matrix"),
    (np.zeros((4, 4)), "pose is not a rotation"), (POSE.T, "pose is not a rotation"),
    (POSE * 3, "pose is not a rotation"), (POSE @ np.diag([1, 1, -1, 1]), "pose is mirrored, det R = -1")])
def test_what_is_no_pose_is_named(rows, message):
    with refused(f"file: .*{message}"):
        files.as_pose(rows, "file")


def test_a_lost_pose_is_none_and_one_in_utm_coordinates_is_not():
    for value in (-np.inf, np.nan):
        assert files.as_pose(np.where(POSE == POSE[0, 3], value, POSE), "file") is None
    far = POSE + [[0, 0, 0, 4.5e5], [0, 0, 0, 9.9e6], [0, 0, 0, 300], [0, 0, 0, 0]]
    assert np.array_equal(files.as_pose(far, "file"), far)


@pytest.mark.parametrize("text, message", [
    ("525.0\n", r"shape \(1, 1\), expected \(3, 3\) or \(4, 4\)"), ("0 0 0\n0 0 0\n0 0 1\n", "not a pinhole"),
    ("nan 0 1\n0 nan 1\n0 0 1\n", "not a pinhole"), ("50 0 31\n3 50 23\n0 0 1\n", "not a pinhole"),
    ("0.8 0 0.5\n0 1.1 0.5\n0 0 1\n", "not in pixels")])
def test_what_are_no_intrinsics_in_pixels_is_named(tmp_path, text, message):
    (tmp_path / "k.txt").write_text(text)
    with refused(f"k.txt: intrinsics.*{message}"):
        files.read_intrinsics(tmp_path / "k.txt", "intrinsics")


# ---------------------------------------------------------------------------------------------- images


def png_chunk(name, content):
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def write_png(path, samples, bits, color_type, size=None):
    """A PNG of a kind that Pillow cannot write: samples (H, W, C); its header may claim another size."""
    height, width = size or samples.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [png_chunk(b"IHDR", head), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_colors_arrive_and_truncated_images_are_named(tmp_path, suffix):
    path = tmp_path / f"1.{suffix}"
    Image.fromarray(COLOR).save(path)
    image = files.read_color(path)
    assert image.dtype == np.uint8 and image.shape == COLOR.shape
    assert suffix == "jpg" or np.array_equal(image, COLOR)
    assert files.image_size(path, "color") == (24, 32)
    content = path.read_bytes()
    for keep in (0, 4, 20, 60, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:keep])
        with refused(f"1.{suffix}: color image cannot be decoded"):
            files.read_color(path)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pixels_of_a_jpeg_lie_as_they_are_stored_as_its_depth_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOR).save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert np.abs((files.read_color(tmp_path / "x.jpg") - 1.0 * COLOR) @ [0.299, 0.587, 0.114]).mean() < 20
    assert files.image_size(tmp_path / "x.jpg", "color") == (24, 32)


@pytest.mark.parametrize("largest, bits", [(255, 8), (1023, 10), (65535, 16)])
@pytest.mark.parametrize("channels, color_type", [(3, 2), (1, 0)])
def test_color_images_of_16_bits_are_refused_with_the_bits_in_use(tmp_path, largest, bits, channels, color_type):
    write_png(tmp_path / "x.png", np.full((4, 5, channels), largest), 16, color_type)
    with refused(f"x.png: .*16 bits per channel, of which {bits} are in use"):
        files.read_color(tmp_path / "x.png")


def test_zero_and_65535_mean_no_reading(tmp_path):
    depth = DEPTH.copy()
    depth[0, :2] = 0, 65535
    Image.fromarray(depth).save(tmp_path / "d.png")
    read = files.read_depth(tmp_path / "d.png")
    assert read.dtype == np.float32 and (read[0, :2] == 0).all()
    assert np.array_equal(read.ravel()[2:], depth.ravel()[2:].astype(np.float32) * np.float32(0.001))
    assert np.abs(files.read_depth(tmp_path / "d.png", 5000) * 5 - read).max() < 1e-6


@pytest.mark.parametrize("image, bits, message", [
    (COLOR, (16,), "8-bit label image of RGB, expected grayscale of 16 bits"),
    (GRAY, (16,), "8-bit label image of grayscale, expected grayscale of 16 bits"),
    (GRAY > 9, (8, 16), "1-bit label image of grayscale, expected grayscale of 8 or 16")])
def test_images_of_indices_of_another_kind_are_named(tmp_path, image, bits, message):
    Image.fromarray(image).save(tmp_path / "x.png")
    with refused(f"x.png: {message}"):
        files.read_index_image(tmp_path / "x.png", "label", bits)


def test_palette_images_hold_indices(tmp_path):
    image = Image.fromarray(GRAY).convert("P")
    image.putpalette([7] * 768)
    image.save(tmp_path / "x.png")
    assert np.array_equal(files.read_index_image(tmp_path / "x.png", "label"), GRAY)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP"])
def test_formats_other_than_jpeg_and_png_are_not_decoded(tmp_path, kind):
    Image.fromarray(GRAY).save(tmp_path / "x.png", kind)
    for read in (files.read_color, files.read_depth):
        with refused("x.png: .* image cannot be decoded"):
            read(tmp_path / "x.png")


def test_an_image_that_claims_a_huge_size_is_not_decoded(tmp_path):
    write_png(tmp_path / "x.png", COLOR, 16, 2, size=(20_000, 20_000))
    with refused("x.png: color image cannot be decoded: .*exceeds limit"):
        files.read_color(tmp_path / "x.png")


# ----------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(99.0), "b": torch.ones(3)}, path)
    files.check_torch_file(path)
    return path


def test_a_flipped_bit_in_any_entry_is_named(checkpoint):
    content = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    assert len(entries) > 3
    for entry in entries:
        start = entry.header_offset
        head = sum(struct.unpack("<HH", content[start + 26:start + 30]))  # name and extra field
        damaged = bytearray(content)
        damaged[start + 30 + head + entry.file_size // 2] ^= 4
        checkpoint.write_bytes(damaged)
        with refused(f"x.pt: damaged, .*{entry.filename} is wrong"):
            files.check_torch_file(checkpoint)


@pytest.mark.parametrize("name, value", [
    ("compress_type", zipfile.ZIP_DEFLATED), ("external_attr", files.FOLDER), ("filename", "x/constants.pkl")])
def test_an_entry_that_torch_does_not_write_is_refused(checkpoint, tmp_path, name, value):
    """Compressed, it could unpack to any size; a folder would be read from memory that nobody has written."""
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                setattr(entry, name, value)
            archive.writestr(entry, content)
    with refused("y.pt: not a checkpoint"):
        files.check_torch_file(tmp_path / "y.pt")
