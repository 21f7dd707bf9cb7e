# SPDX-License-Identifier: MIT
"""`python -m bench check`: how often check.py errs, on clean data sets and on planted faults.

Every set is written to files, most in ScanNet's layout, read again, and given to `check.inspect` and to
`check.quick_check`, which training and prediction run. The sets are rooms that are seen from all sides,
walks through rooms, and the real frames of ../shared/data/ycbv where they lie.

Imports numpy, PIL, tqdm, bench.faults, and of this repository check, data, sources and support.
"""
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.faults import CLEAN, FAULTS, JITTER, Frames, make_rooms, make_video
from check import first_fault, inspect, quick_check
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
    for name, lines in rows.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {"intrinsics": frames[0]["intrinsics"]}


def write_transforms(frames, folder):
    """transforms.json of nerfstudio: OpenGL axes, pixels from the image's corner."""
    entries = [{"file_path": f"color/{i}.png", "depth_file_path": f"depth/{i}.png",
                "transform_matrix": (pose * [1, -1, -1, 1]).tolist()}
               for i, (_, pose) in enumerate(write_images(frames, folder, 1000))]
    matrix = frames[0]["intrinsics"]
    camera = {"fl_x": matrix[0, 0], "fl_y": matrix[1, 1], "cx": matrix[0, 2] + 0.5, "cy": matrix[1, 2] + 0.5}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": entries}))
    return {}


def write_images(frames, folder, units_per_meter):
    """Color and depth as <n>.png; yields frames and their camera-to-world matrices."""
    for i, frame in enumerate(frames):
        depth = np.rint(frame["depth"] * units_per_meter).clip(max=65535).astype(np.uint16)
        for name, image in (("color", frame["color"]), ("depth", depth)):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        yield frame, np.linalg.inv(frame["world2cam"])


WRITERS = {"ScanNet": write_scannet, "TUM": write_tum, "transforms.json": write_transforms}


def judge(frames, layout="ScanNet"):
    """First findings of `inspect` and `quick_check` (None: nothing), and the tests that cannot tell."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = WRITERS[layout](frames, Path(folder))
            source = open_frames(folder, labels=None, **options)
        except ValueError:
            return "refused", "refused", set()
        rows, quick = inspect({"all": source}), quick_check(source)
    return first_fault(rows), first_fault(quick), {row.test for row in rows if row.verdict == "not tested"}


def outcome(fault, found, untested):
    """Which of OUTCOMES it is that `found` was told of a planted fault."""
    if found in (fault, "refused") or found == "units" and fault.startswith("units of"):
        return "named"
    if found == "unconfirmed":
        return "no known cause"
    if found is None:
        return "not tested" if fault in untested or "neighbors" in untested else "MISSED"
    return "WRONG CAUSE"


def make_sets(seeds):
    """{title: frames}, all right."""
    sets = {f"rooms {seed}": make_rooms(seed) for seed in range(seeds)}
    sets |= {f"walk {seed}": make_video(12, seed) for seed in range(1, seeds + 1)}
    if REAL.is_dir():
        source = open_frames(str(REAL))
        sets["ycbv"] = Frames([source[i] for i in range(len(source))], source.class_names)
    return sets


def run(args):
    """Prints false alarms, outcomes, and every set that was judged wrongly."""
    sets = make_sets(args.seeds)
    alarms, table, words, differ = [], {}, [], 0
    clean = [(title, name, plant) for title in sets for name, plant in {**CLEAN, **JITTER}.items()]
    for title, name, plant in tqdm(clean, "clean", disable=None):
        found = judge(plant(sets[title]))[:2]
        if any(found):
            alarms.append(f"{title}, {name}: {found}")
    planted = [(title, "ScanNet", number) for title in sets for number in range(len(FAULTS))]
    planted += [(title, layout, number) for title in sets for layout in ("TUM", "transforms.json")
                for number in IN_CAPTURES]
    for title, layout, number in tqdm(planted, "faults", disable=None):
        fault, _, plant = FAULTS[number]
        found, quick, untested = judge(plant(sets[title]), layout)
        result = outcome(fault, found, untested)
        differ += found != quick
        table.setdefault((layout, fault), Counter())[result] += 1
        if result not in OUTCOMES[:2] or found != quick:
            words.append(f"{title}, {layout}, {number} {fault}: {result}, {found}; training: {quick}")
    print(f"{len(clean)} clean variants, {len(alarms)} false alarms")
    print(*alarms, sep="\n")
    print(f"{'layout':<16} {'fault':<32}", *(f"{name:>14}" for name in OUTCOMES))
    for (layout, fault), counts in table.items():
        print(f"{layout:<16} {fault:<32}", *(f"{counts[name]:>14}" for name in OUTCOMES))
    print(f"of {len(planted)} planted faults, training judges {differ} otherwise")
    print(*words, sep="\n")
