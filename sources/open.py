# SPDX-License-Identifier: MIT
"""From a path to a source of frames (see data.py): what train, predict and check read.

A new data set is a class that gives frame dicts, and one line in `open_frames`.

Imports sources.captures, sources.rooms, sources.scannet, support.files and support.lens.
"""
from pathlib import Path

import numpy as np

from sources.captures import LAYOUT, CaptureFrames, Options
from sources.rooms import RoomFrames
from sources.scannet import CloudFile, ScanNetFrames, ScanNetScenes, frame_classes, load_classes
from support.files import read_text
from support.lens import undistort


def open_frames(data, split=None, classes=None, label_map=None, intrinsics=None, labels=True,
                unlisted=False, rooms=(32, 4), format=None, pose=None, depth_scale=None):
    """The frames that `data` names -> a source, whose class_names are empty if labels are not read.

    data: a folder in ScanNet's exported 2D layout, or of captures (see captures.py), or "rooms", which are
    built in. Your own data set gets a line.
    split: a file with one `scene` or `scene/frame` per line, or None: all frames. For the rooms
    "train", "val" or "test".
    classes: a class list, as a file or {id: name}; None: data/classes.txt.
    label_map: path of scannetv2-labels.combined.tsv, if the class list holds NYU40's ids (ScanNet20).
    intrinsics: (3, 3) in pixels, of captures that do not tell them.
    format, pose, depth_scale: how a capture is read, if not as its layout says; see captures.py.
    labels: True: needed; None: read if there is a class list; False: not read.
    unlisted: ids that the class list lacks become classes "id N", after the first `num_listed` classes.
    rooms: numbers of rooms and of frames per room.

    Raises FileNotFoundError or ValueError with the name of what is missing or wrong.
    """
    told = {"--intrinsics": intrinsics, "--pose": pose, "--depth-scale": depth_scale, "--format": format}
    given = [option for option, value in told.items() if value is not None]
    no_capture = f"{' and '.join(given)} says how a capture is read, and {data} is none"
    if data == "rooms":
        if given:
            raise ValueError(no_capture)
        return RoomFrames(split or "train", *rooms)
    if not is_exported(Path(data)) or format:
        if labels:
            raise ValueError(f"{data} is not in ScanNet's layout ({LAYOUT}), and captures have no labels, which are "
                             "needed here (docs/data.md)")
        return CaptureFrames(data, format, Options(intrinsics, pose, depth_scale), split, undistort)
    if given:
        raise ValueError(no_capture)
    if not has_classes(data, classes, labels):
        return ScanNetFrames(data, None, split)

    listed = frame_classes(read_classes(data, classes), label_map)
    table = listed
    if unlisted and "*" not in listed:
        others = {key: f"id {key}" for key in range(2 ** 16) if key not in listed}
        table = {**listed, **others}
    frames = ScanNetFrames(data, table, split)
    frames.num_listed = len(set(listed.values()) - {None})
    for folder, kinds in frames.folders.items():
        if labels and "label-filt" not in kinds:
            raise FileNotFoundError(f"{folder}: the folder of labels, label-filt, does not exist")
    return frames


def is_exported(folder):
    """Whether a folder has ScanNet's exported layout; else it holds captures."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected a folder of frames; predict.py with a checkpoint takes "
                         "a .ply cloud alone (docs/captures.md#a-mesh-or-cloud-alone)")
    if not folder.is_dir():
        raise FileNotFoundError(f"frame folder {folder} does not exist")
    if (folder / "color").is_dir() and (folder / "pose").is_dir():
        raise ValueError(f"{folder} is one scene in ScanNet's layout: give {folder.resolve().parent}, "
                         "which holds it")
    return any(folder.glob("*/color")) and any(folder.glob("*/pose"))


def open_scans(scans, data, split=None, classes=None, label_map=None, labels=True, normals=False):
    """Whole scans of ScanNet in a folder, and their views, the frames in `data` -> (scans, frames).

    split, classes: as in `open_frames`. The class list holds NYU40's ids, or those of the label map
    (ScanNet200). labels: True: needed, and axis alignments, too; None: read if there is a class list
    and every scan is annotated; False: not read. If not needed, all scans or none have an alignment
    (the test split has none). normals: scans also hold the normals of their meshes.
    """
    frames = ScanNetFrames(data, None, split)
    options = dict(split=split, normals=normals)
    if labels:
        return ScanNetScenes(scans, read_classes(data, classes), label_map=label_map, **options), frames

    names = ScanNetScenes(scans, None, split, align=False).names
    texts = [Path(scans) / name / f"{name}.txt" for name in names]
    aligned = [text.is_file() and "axisAlignment" in read_text(text, "scan description") for text in texts]
    if any(aligned) and not all(aligned):
        raise ValueError(f"{texts[aligned.index(False)]} has no axisAlignment, but those of other scans "
                         "have: open them apart, with splits of their own")
    annotated = all(text.with_suffix(".aggregation.json").is_file() for text in texts)
    if annotated and has_classes(data, classes, labels):
        known = read_classes(data, classes)
        return ScanNetScenes(scans, known, label_map=label_map, align=all(aligned), **options), frames
    return ScanNetScenes(scans, None, align=all(aligned), **options), frames


def open_cloud(path, num_views, normals=False):
    """A mesh or cloud alone, a PLY file with colors -> (scans, frames) as `open_scans`.

    The frames are num_views views that see no point: black, and 10 km above, looking up.
    """
    scans = CloudFile(path, normals)
    pose = np.eye(4)
    pose[2, 3] = -1e4
    view = {"name": f"{scans.names[0]}/0", "color": np.zeros((1, 1, 3), np.uint8),
            "depth": np.zeros((1, 1), np.float32), "world2cam": pose,
            "intrinsics": np.eye(3), "depth_intrinsics": np.eye(3)}
    return scans, [view] * num_views


def has_classes(data, classes, labels):
    """Whether labels are to be read, see `open_frames`."""
    if labels is None:
        return classes is not None or (Path(data) / "classes.txt").is_file()
    return labels


def read_classes(data, classes):
    """A class list {id: name or None}, from a file, a dict, or data/classes.txt."""
    if isinstance(classes, dict):
        return classes
    return load_classes(classes or Path(data) / "classes.txt")
