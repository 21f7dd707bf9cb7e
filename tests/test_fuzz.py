# SPDX-License-Identifier: MIT
"""Damaged files of every kind are read rightly or refused by name: nothing else is raised, hangs, or takes over 1 GiB.

Each kind of file is written once and then damaged again and again, by a seeded generator: trial n of a kind is the
same in every run. Formats with a checksum must either give what was written or be refused. `BIFUSION_FUZZ=1000
pytest tests/test_fuzz.py` runs 1,000 trials of each kind.
"""
import os
import resource
import signal
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import CLASSES, write_scannet
from test_scannet import TABLE, write_scan
from sources.captures import CaptureFrames, Options
from sources.scannet import ScanNetFrames, ScanNetScenes
from sparse_unet import NETWORKS, Res16UNet34C
from support import checkpoint
from support.cache import FeatureCache, SuperpointCache
from support.pretrained import load_backbone

TRIALS = int(os.environ.get("BIFUSION_FUZZ", 10))
TOKENS = [b"nan", b"-inf", b"1e400", b"-1", b"0", b"65536", b"9" * 25, b"1.5", b"1_0", b"true", b"null", b"\0",
          b"\xff\xfe", b"\t", b"\n", b"\r", b" ", b"/", b"..", b"../..", b"[", b"]", b"{", b'"', b"*",
          b"[" * 3000, b"end_header\n", b"element vertex 999999999\n", b"property float x\n"]
KINDS = {}  # name: (a function of an empty folder -> the path of a file and a function that reads it, has a checksum)


def kind(name, checksum=False):
    """Registers a kind of file; the decorated function writes one into a folder -> its path, and its reader."""
    def register(make):
        KINDS[name] = make, checksum
        return make
    return register


# ------------------------------------------------------------------------------------------------------------- kinds

FRAME_FILES = {"color JPEG": "color/1.jpg", "pose": "pose/1.txt", "intrinsics": "intrinsic/intrinsic_depth.txt",
               "extrinsics": "intrinsic/extrinsic_depth.txt"}
CHECKED_FRAME_FILES = {"color PNG": "color/1.png", "depth": "depth/1.png", "label": "label-filt/1.png",
                       "instance": "instance-filt/1.png"}
SCAN_SUFFIXES = ("_vh_clean_2.ply", "_vh_clean_2.labels.ply", "_vh_clean_2.0.010000.segs.json",
                 ".aggregation.json", ".txt")


def frame_file(name):
    def make(folder):
        root = write_scannet(folder, 1, 2, suffix="jpg" if name.endswith("jpg") else "png")
        np.savetxt(root / "scene0000_00/intrinsic/extrinsic_depth.txt", np.eye(4))
        return root / "scene0000_00" / name, lambda: ScanNetFrames(root, CLASSES)[-1]
    return make


def scan_file(suffix):
    def make(folder):
        rng = np.random.default_rng(0)
        points = rng.normal(size=(60, 3)).astype(np.float32)
        write_scan(folder, "scene0000_00", points, rng.integers(0, 256, (60, 3)), nyu40=[1, 1, 5, 5, 0, 40] * 10,
                   segments=[70, 70, 12, 12, 5, 900] * 10, groups=[(0, "wall", [70]), (1, "chair", [12, 900])])
        (folder / "labels.tsv").write_text(TABLE)
        classes = {1: "wall", 2: "chair", 5: "chair", "*": None}
        label_map = folder / "labels.tsv" if suffix is None else None
        path = label_map or folder / f"scene0000_00/scene0000_00{suffix}"
        return path, lambda: ScanNetScenes(folder, classes, label_map=label_map)[0]
    return make


for name, file in FRAME_FILES.items():
    kind(name)(frame_file(file))
for name, file in CHECKED_FRAME_FILES.items():
    kind(name, checksum=True)(frame_file(file))
for suffix in SCAN_SUFFIXES:
    kind(f"scan{suffix}")(scan_file(suffix))
kind("label map")(scan_file(None))


@kind("class list")
def class_list(folder):
    write_scannet(folder, 1, 2)
    path = folder / "classes.txt"
    path.write_text("0 unlabeled\n1 wall\n2 night stand\n40 lamp\n")
    return path, lambda: ScanNetFrames(folder, path)[1]


@kind("split")
def split(folder):
    write_scannet(folder, 1, 2)
    path = folder / "val.txt"
    path.write_text("scene0000_00/1\nscene0000_00/0\n")
    return path, lambda: ScanNetFrames(folder, CLASSES, path)[0]


@kind("posed frame", checksum=True)
def posed_frame(folder):
    Image.new("RGB", (32, 24)).save(folder / "frame-000000.color.png")
    Image.fromarray(np.full((24, 32), 1000, np.uint16)).save(folder / "frame-000000.depth.png")
    np.savetxt(folder / "frame-000000.pose.txt", np.eye(4))
    matrix = np.array([[30, 0, 16], [0, 30, 12], [0, 0, 1]])
    return folder / "frame-000000.depth.png", lambda: CaptureFrames(folder, options=Options(matrix))[0]


@kind("cached features", checksum=True)
def cached_features(folder):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    cache = FeatureCache(folder, "tower", lambda x: (x, x.flatten(1)[:, :5]))
    cache.build([image])
    path, = cache.store.folder.glob("??/*")
    return path, lambda: FeatureCache(folder, "tower", None).get(image)


@kind("cached superpoints", checksum=True)
def cached_superpoints(folder):
    cache = SuperpointCache(folder, lambda depth, colors, intrinsics: np.indices(depth.shape)[0], "rows")
    frame = np.ones((4, 6), np.float32), np.zeros((4, 6, 3), np.uint8), np.eye(3)
    cache(*frame)
    path, = cache.store.folder.glob("??/*")
    return path, lambda: cache(*frame)


def checkpoint_file(fields):
    def make(folder):
        torch.manual_seed(0)
        path = folder / "last.pt"
        network = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
        state = dict.fromkeys(fields, 0.5)
        state |= {"model": network.state_dict(), "config": {"lr": (0.1, "x")}, "class_names": ["wall"]}
        checkpoint.write_atomically({**state, "clip_fingerprint": None}, path)

        def read():
            state = checkpoint.read_checkpoint(path, fields)
            checkpoint.restore(network, state, path, ["wall"], None)
            return {**state, "restored": network.state_dict()}
        return path, read
    return make


kind("checkpoint", checksum=True)(checkpoint_file(checkpoint.FIELDS))
kind("saved step", checksum=True)(checkpoint_file(checkpoint.STEP_FIELDS))


@kind("foreign checkpoint", checksum=True)
def backbone(folder):
    path = folder / "backbone.pth"
    torch.manual_seed(0)
    network = Res16UNet34C(planes=(4,) * 8, layers=(1,) * 8)
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in network.state_dict().items()},
                "meta": {"time": "now", "rng": np.float64(3)}}, path)
    return path, lambda: load_backbone(path, Res16UNet34C, NETWORKS)[0].state_dict()


@kind("pickle of a foreign checkpoint")
def backbone_pickle(folder):
    path, read_backbone = backbone(folder)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = folder / "data.pkl"
    pickled.write_bytes(entries["backbone/data.pkl"])

    def read():
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (entries | {"backbone/data.pkl": pickled.read_bytes()}).items():
                archive.writestr(name, content)
        return read_backbone()
    return pickled, read


# ------------------------------------------------------------------------------------------------------------ damage


def damage(content, rng):
    """Bytes -> other bytes: one to three random edits."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = len(content)
        place = int(rng.integers(0, size + 1))
        length = int(min(rng.integers(1, 2 ** rng.integers(1, 10)), size - place))
        edit = rng.integers(8)
        if edit == 0 and length:
            content[place] ^= 1 << int(rng.integers(8))
        elif edit == 1:
            content[place:place + length] = rng.bytes(length)
        elif edit == 2:
            del content[place:place + length]
        elif edit == 3:
            content[place:place] = content[place:place + length]
        elif edit == 4:
            del content[place:]
        elif edit == 5:
            content[place:place + length] = bytes(length)
        elif edit == 6:
            content[place:place + int(rng.integers(0, 6))] = TOKENS[rng.integers(len(TOKENS))]
        elif edit == 7 and length:
            content[place] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(content)


def equal(a, b):
    """Whether two results of a reader are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


def hang(signum, frame):
    raise TimeoutError("reading takes over a minute")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_rightly_or_refused_by_name(tmp_path, name):
    make, checksum = KINDS[name]
    path, read = make(tmp_path)
    whole = path.read_bytes()
    expected = read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, hang)
    refused = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng([zlib.crc32(name.encode()), trial])
        path.write_bytes(damage(whole, rng))
        signal.alarm(60)
        try:
            result = read()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(tmp_path) in str(error), f"trial {trial} is refused without a name: {error}"
        else:
            assert not checksum or equal(result, expected), f"trial {trial} is read as something else"
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    print(f"{name}: {TRIALS} damaged, {refused} refused, {growth:.2f} GiB at most")
    assert growth < 1
