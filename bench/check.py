# SPDX-License-Identifier: MIT
"""`python -m bench check`: how often check.py errs, on clean data sets and on planted faults.

Rooms from all sides, rooms with two frames, walks through rooms and real frames (../shared/data/ycbv) are written
to files, read again, and given to `check.inspect`, which decides as training and prediction do.

Imports numpy, PIL, bench.faults, and of this repository check, data, sources and support.
"""
import itertools
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from bench.faults import CLEAN, FAULTS, JITTER, Frames, make_rooms, make_video, scene_of
from check import first_fault, inspect
from sources.open import open_frames
from sources.scannet import write_frames
from support.reprojection import to_quaternion

REAL = Path(__file__).resolve().parents[2] / "shared/data/ycbv"
IN_CAPTURES = (0, 1, 3, 10, 12, 18, 21, 24, 39, 45, 48, 51)  # places in FAULTS
OUTCOMES = ("named", "no known cause", "not tested", "WRONG CAUSE", "MISSED")


def write_scannet(frames, folder):
    classes = write_frames(frames, folder)
    (folder / "classes.txt").write_text("".join(f"{key} {name or 'unlabeled'}\n" for key, name in classes.items()))
    return {}


def write_tum(frames, folder):
    """rgb.txt, depth.txt and groundtruth.txt of TUM; it has no file for the intrinsics."""
    rows = {"rgb": [], "depth": [], "groundtruth": []}
    for i, (frame, pose) in enumerate(write_images(frames, folder, 5000)):
        rows["rgb"].append(f"{i}.0 color/{i}.png")
        rows["depth"].append(f"{i}.0 depth/{i}.png")
        rows["groundtruth"].append(f"{i}.0 " + " ".join(map(str, [*pose[:3, 3], *to_quaternion(pose[:3, :3])])))
    for name in rows:
        (folder / f"{name}.txt").write_text("\n".join(rows[name]))
    return {"intrinsics": frames[0]["intrinsics"]}


def write_transforms(frames, folder):
    """transforms.json of nerfstudio: OpenGL axes, pixels from the image's corner."""
    entries = [{"file_path": f"color/{i}.png", "depth_file_path": f"depth/{i}.png",
                "transform_matrix": (pose * [1, -1, -1, 1]).tolist()}
               for i, (_, pose) in enumerate(write_images(frames, folder, 1000))]
    (fx, _, cx), (_, fy, cy), _ = frames[0]["intrinsics"]
    camera = {"fl_x": fx, "fl_y": fy, "cx": cx + 0.5, "cy": cy + 0.5}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": entries}))
    return {}


def write_images(frames, folder, units_per_meter):
    """Color and depth of the first scene as <n>.png; yields frames and their camera-to-world matrices."""
    for i, frame in enumerate(frame for frame in frames if scene_of(frame) == scene_of(frames[0])):
        depth = np.rint(frame["depth"] * units_per_meter).clip(max=65535).astype(np.uint16)
        for name, image in (("color", frame["color"]), ("depth", depth)):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        yield frame, np.linalg.inv(frame["world2cam"])


WRITERS = {"ScanNet": write_scannet, "TUM": write_tum, "transforms.json": write_transforms}


def judge(frames, layout="ScanNet"):
    """The first finding of `check.inspect` (None: nothing), and the tests that could not tell."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = WRITERS[layout](frames, Path(folder))
            source = open_frames(folder, labels=None, **options)
        except ValueError:
            return "refused", set()
        rows = inspect({"all": source})
    return first_fault(rows), {row.test for row in rows if row.verdict == "not tested"}


def outcome(fault, found, untested):
    """Which of OUTCOMES it is that `found` was told of a planted fault."""
    also = {"units of poses": ["units"], "units of depth": ["units", "8-bit depth"],
            "up axis": ["up axis or poses"]}
    if found in (fault, "refused", *also.get(fault, [])):
        return "named"
    if found in ("unconfirmed", "up axis or poses"):
        return "no known cause"
    if found is None:
        return "not tested" if fault in untested or "neighbors" in untested else "MISSED"
    return "WRONG CAUSE"


def make_sets(seeds):
    """{title: frames}, all right."""
    sets = {"few frames": make_rooms(seeds, frames_per_room=2),
            "slow walk": make_video(64, 3, speed=0.15)}  # as at 30 frames per second
    for seed in range(seeds):
        sets |= {f"walk {seed}": make_video(12, seed), f"rooms {seed}": make_rooms(seed)}
    if REAL.is_dir():
        source = open_frames(str(REAL))
        sets["ycbv"] = Frames([source[i] for i in range(0, len(source), 2)], source.class_names)
    return sets


def run(args):
    """Prints what is judged wrongly as it goes, and then the counts."""
    sets = {title: frames for title, frames in make_sets(args.seeds).items() if args.only in title}
    if not sets:
        raise ValueError(f"--only {args.only!r}: no set has this in its title")
    clean, alarms = {**CLEAN, **JITTER}, 0
    for title, name in itertools.product(sets, clean):
        found, _ = judge(clean[name](sets[title]))
        alarms += found is not None
        if found:
            print(f"false alarm: {title}, {name}: {found}", flush=True)
    planted = [("ScanNet", number) for number in range(len(FAULTS))]
    planted += list(itertools.product(("TUM", "transforms.json"), IN_CAPTURES))
    table = {}  # (layout, fault): outcomes
    for title, (layout, number) in itertools.product(sets, planted):
        fault, _, plant = FAULTS[number]
        found, untested = judge(plant(sets[title]).without_labels(), layout)
        result = outcome(fault, found, untested)
        table.setdefault((layout, fault), Counter())[result] += 1
        if result not in OUTCOMES[:2]:
            print(f"{title}, {layout}, {number} {fault}: {result}, {found}", flush=True)
    print(f"{len(CLEAN) * len(sets)} clean sets, {len(JITTER) * len(sets)} with jitter: {alarms} false alarms")
    print(f"{'layout':<16} {'fault':<32}", *(f"{name:>14}" for name in OUTCOMES))
    for (layout, fault), counts in table.items():
        print(f"{layout:<16} {fault:<32}", *(f"{counts[name]:>14}" for name in OUTCOMES))
