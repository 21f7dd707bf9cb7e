# SPDX-License-Identifier: MIT
"""Looks a data set over before anybody trains on it, and says what is wrong and how to mend it (docs/check.md).

    python check.py DATA                         a folder in ScanNet's exported 2D layout, or `rooms` (built in)
    python check.py DATA --train-split train.txt --val-split val.txt --up=-y --picture check.png
    python check.py DATA --intrinsics 585,585,320,240            a folder of frame-* files

Depth is reprojected into other frames of its scene, with the cameras as given and under alternatives: poses inverted,
other axes, other units, the pose of the next frame, and so on. A fault is named if its alternative explains the data
clearly better. What the sampled frames cannot decide is "not tested". The exit code is 1 if something is wrong.

Imports numpy, PIL, and of this repository data and sources.
"""
import argparse
import itertools
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import depth_to_color, pixel_fields, resize_intrinsics, unproject
from sources.open import open_frames
from sources.scannet import natural_key

AXES = {sign + "xyz"[axis]: (-1 if sign else 1) * np.eye(3)[axis] for sign in ("", "-") for axis in range(3)}
MARGIN = 0.15  # log units by which an alternative must explain a pair better; on clean sets none gains 0.01
MIN_PAIRS = 3  # overlapping pairs that a test needs
MENDS = {
    "unreadable": "Correct the file that the message names.",
    "pose inverted": "The files hold world-to-camera matrices: store their inverses (camera to world).",
    "OpenGL axes": "Multiply every camera-to-world matrix from the right by diag(1, -1, -1, 1).",
    "camera axes": "Multiply every camera-to-world matrix from the right by the diagonal matrix of these signs.",
    "mirrored poses": "Rotations need determinant 1: undo the mirror S, by pose S, S pose or S pose S.",
    "millimetres in poses": "Multiply the translations of the poses by this factor, so that they are metres.",
    "depth scale": "Store depth with 1000 units per metre.",
    "frames without depth": "Take them out of the split, or out of the folder.",
    "8-bit depth": "Export depth as 16-bit PNG with 1000 units per metre; what 8 bits lost cannot be restored.",
    "colour intrinsics": "Rescale intrinsic_color.txt to the size of the colour images.",
    "depth intrinsics": "Rescale intrinsic_depth.txt to the size of the depth images.",
    "intrinsics of both": "Rescale intrinsic_color.txt and intrinsic_depth.txt to the sizes of the images.",
    "depth and colour shifted in time": "Pair the two series of images by time stamp.",
    "poses off by one frame": "Pair poses and images by time stamp.",
    "unconfirmed": "Look at --picture, and at where poses, intrinsics and depth come from.",
    "up axis": "Pass the right axis as --up (a negative one as --up=-y).",
    "label ids": "Correct the class list, or renumber the label images.",
    "instance ids": "Write one id per object and 0 for none.",
    "label folders": "Write DATA/classes.txt or pass --classes, and give every scene its label-filt.",
    "frames in both splits": "Remove them from one of the split files.",
}


class Row(NamedTuple):
    """Outcome of one test; verdict: "ok", "WRONG", "not tested" or "note"."""
    test: str
    verdict: str
    words: str


def wrong(fault, words):
    """The Row of a fault: what was seen, and its mend."""
    return Row(fault, "WRONG", f"{words} {MENDS[fault]}")


def unreadable(error):
    """The rows of a data set that a reader refuses."""
    return [wrong("unreadable", f"{error}. Nothing else was tested.")]


# --------------------------------------------------------------------------------------------------- pairs of frames


def project(points, world2cam, intrinsics):
    """World points (n, 3) -> pixels (2, n), far outside if a point is not in front of the camera, and depth (n,)."""
    camera = world2cam[:3, :3] @ points.T + world2cam[:3, 3:]
    front = camera[2] > 1e-6
    uv = (intrinsics @ (camera / np.where(front, camera[2], 1)))[:2]
    return np.where(front, np.clip(uv, -1e6, 1e6), -1e6), camera[2]


def reproject(a, b, num_points=1500):
    """About num_points pixels of frame a's depth, seen from frame b.

    Returns world points (n, 3), their depth (n,) from b, and the depth (n,) that b has there, 0 = unknown or outside.
    """
    height, width = a["depth"].shape
    step = max(1, int(np.sqrt(height * width / num_points)))
    v, u = np.mgrid[step // 2:height:step, step // 2:width:step].reshape(2, -1)
    z = a["depth"][v, u]
    u, v, z = (values[(z > 0) & np.isfinite(z)] for values in (u, v, z))
    points = unproject(np.stack([u, v], 1), z, a["depth_intrinsics"], a["world2cam"])
    uv, predicted = project(points, b["world2cam"], b["depth_intrinsics"])
    x, y = np.rint(uv).astype(np.int64)
    inside = (x >= 0) & (x < b["depth"].shape[1]) & (y >= 0) & (y < b["depth"].shape[0])
    seen = np.where(inside, b["depth"][y * inside, x * inside], 0)
    return points, predicted, np.where(np.isfinite(seen), seen, 0)


def agrees(predicted, seen):
    """Whether depths (n,) are the same within max(5 cm, 2 %)."""
    return np.abs(predicted - seen) < np.maximum(0.05, 0.02 * seen)


def gray_at(points, frame):
    """What frame's colour image (its green channel) shows at world points: bilinear samples (n,), NaN outside."""
    image = frame["color"][..., 1]
    uv, _ = project(points, frame["world2cam"], frame["intrinsics"])
    size = np.array(image.shape[::-1])[:, None]
    inside = ((uv >= 0) & (uv <= size - 1)).all(0)
    corner = np.clip(uv.astype(np.int64), 0, size - 2)
    value = np.where(inside, 0.0, np.nan)
    for dx, dy in np.ndindex(2, 2):
        weight = 1 - np.abs(uv - corner - [[dx], [dy]])
        value += image[corner[1] + dy, corner[0] + dx] * weight[0] * weight[1]
    return value


def compare(a, b):
    """How well frame a, moved into frame b, fits what b shows: (overlap, share that agrees, depth cost, colour cost).

    Overlap is the share of points that fall on known depth; less than a tenth gets the worst costs. The depth cost is
    the mean log of the relative error, clipped to 0.0005 .. 0.1. The colour cost is log(1 - correlation), over points
    that are not hidden. Neither depends on the scale of a scene.
    """
    points, predicted, seen = reproject(a, b)
    on_depth = np.flatnonzero(seen)
    overlap = len(on_depth) / max(len(seen), 1)
    if len(on_depth) < 50 or overlap < 0.1:
        return overlap, 0.0, np.log(0.1), 0.0
    points, predicted, seen = points[on_depth], predicted[on_depth], seen[on_depth]
    depth_cost = np.log(np.clip(np.abs(predicted - seen) / seen, 0.0005, 0.1)).mean()
    gray_a, gray_b = gray_at(points, a), gray_at(points, b)
    use = np.isfinite(gray_a) & np.isfinite(gray_b) & (predicted < 1.1 * seen)
    color_cost = 0.0
    if use.sum() >= 50 and np.ptp(gray_a[use]) > 0 and np.ptp(gray_b[use]) > 0:
        color_cost = np.log(np.clip(1 - np.corrcoef(gray_a[use], gray_b[use])[0, 1], 0.005, 1))
    return overlap, agrees(predicted, seen).mean(), depth_cost, color_cost


def compare_runs(runs):
    """`compare` for all pairs within each run of frames -> (P, 4), NaN if one of the two is missing."""
    pairs = [pair for run in runs for pair in itertools.combinations(run, 2)]
    table = [compare(a, b) if a and b else (np.nan,) * 4 for a, b in pairs]
    return np.array(table).reshape(-1, 4)


def confirmed_share(table):
    """Share of points that agree, over the pairs that overlap by a tenth; 0 without any."""
    table = table[table[:, 0] >= 0.1]
    return (table[:, 0] * table[:, 1]).sum() / max(table[:, 0].sum(), 1e-9)


# ------------------------------------------------------------------------------------------------------- alternatives


def with_poses(change):
    """An alternative: run -> run with other world2cam (4, 4)."""
    return lambda run: [{**frame, "world2cam": change(frame["world2cam"])} for frame in run]


def with_neighbour(keys, offset):
    """An alternative: fields taken from the next (1) or previous (-1) frame; None at the end of a run."""
    def change(run):
        shifted = run[1:] + [None] if offset > 0 else [None] + run[:-1]
        return [other and {**frame, **{key: other[key] for key in keys}} for frame, other in zip(run, shifted)]
    return change


def alternatives():
    """Yields (fault, words, function run -> run)."""
    yield "pose inverted", "inverted poses", with_poses(np.linalg.inv)
    for signs in itertools.product((1, -1), repeat=3):
        if signs != (1, 1, 1):
            fault = "camera axes" if np.prod(signs) > 0 else "mirrored poses"
            fault = "OpenGL axes" if signs == (1, -1, -1) else fault
            yield fault, f"camera axes times {signs}", with_poses(np.diag([*signs, 1.0]).__matmul__)
    # A factor on depth is tested as its inverse on the translations, which gives the same relative errors.
    scales = [("millimetres in poses", "translations", scale, scale) for scale in (0.001, 0.01)]
    scales += [("depth scale", "depth", scale, 1 / scale) for scale in (0.001, 0.01, 0.1, 0.2, 0.25, 4, 5, 10)]
    for fault, what, scale, factor in scales:
        matrix = np.ones((4, 4))
        matrix[:3, 3] = factor
        yield fault, f"{what} times {scale}", with_poses(matrix.__mul__)
    for offset, which in ((1, "next"), (-1, "previous")):
        for fault, what, keys in (("poses off by one frame", "pose", ["world2cam"]),
                                  ("depth and colour shifted in time", "depth", ["depth", "depth_intrinsics"]),
                                  ("depth and colour shifted in time", "colour", ["color", "intrinsics"])):
            yield fault, f"the {what} of the {which} frame", with_neighbour(keys, offset)


class Weighed(NamedTuple):
    """An alternative against what is given; neither better nor worse: the pairs cannot tell."""
    fault: str
    words: str
    gain: float = 0.0  # log units by which it explains a pair better
    cost: float = 0.0  # of the pairs that overlap under it
    share: float = 0.0  # of points that agree under the alternative
    better: bool = False
    worse: bool = False


def weigh(fault, words, given, other):
    """Tables (P, 4) of `compare_runs` for what is given and for an alternative, over pairs in which either overlaps."""
    use = np.isfinite(other[:, 0]) & (np.fmax(given[:, 0], other[:, 0]) >= 0.1)
    if use.sum() < MIN_PAIRS:
        return Weighed(fault, words)
    parts = given[use, 2:] - other[use, 2:]  # (pairs, depth and colour)
    gains = parts.sum(1)
    share = confirmed_share(other[use])
    overlapping = other[use & (other[:, 0] >= 0.1)]
    better = (len(overlapping) >= MIN_PAIRS and share > 0.4 and parts.mean(0).min() > -0.05
              and gains.mean() > MARGIN and gains.clip(min=0).sum() > -3 * gains.clip(max=0).sum())
    cost = overlapping[:, 2:].sum(1).mean() if better else 0.0
    return Weighed(fault, words, gains.mean(), cost, share, better, gains.mean() < -0.05)


def intrinsics_rows(runs):
    """Principal points against the images' centres -> (runs, with rescaled intrinsics if they are wrong, rows)."""
    frames = list(itertools.chain(*runs))
    off = []
    for image, field in (("color", "intrinsics"), ("depth", "depth_intrinsics")):
        centres = [(frame[field][:2, 2] + 0.5) / frame[image].shape[1::-1] for frame in frames]
        if np.abs(np.median(centres, 0) - 0.5).max() > 0.15:
            off.append((image, field))
    if not off:
        return runs, [Row("intrinsics", "ok", "principal points are near the centres of the images")]
    mended = [[dict(frame) for frame in run] for run in runs]
    for frame, (image, field) in itertools.product(itertools.chain(*mended), off):
        u, v = frame[field][:2, 2]
        frame[field] = resize_intrinsics(frame[field], (2 * v + 1, 2 * u + 1), frame[image].shape)
    if weigh("", "", compare_runs(runs), compare_runs(mended)).worse:
        return runs, [Row("intrinsics", "ok", "principal points are off the centres, but neighbours confirm them")]
    image, field = off[0]
    u, v = 2 * frames[0][field][:2, 2] + 1
    height, width = frames[0][image].shape[:2]
    fault = "intrinsics of both" if len(off) == 2 else {"color": "colour", "depth": "depth"}[image] + " intrinsics"
    words = f"The principal point is the centre of {u:.0f} x {v:.0f} pixels; the {image} image has {width} x {height}."
    return mended, [wrong(fault, words)]


def pose_rows(runs, quick=False):
    """What reprojection says about runs of frames. quick: alternatives only if neighbours do not confirm the frames."""
    runs, rows = intrinsics_rows(runs)
    given = compare_runs(runs)
    share, num_pairs = confirmed_share(given), (given[:, 0] >= 0.1).sum()
    confirmed = f"{share:.0%} of the points are confirmed by a neighbour ({num_pairs} overlapping pairs)"
    tried = []
    if not quick or num_pairs < MIN_PAIRS or share < 0.2:
        tried = [weigh(fault, words, given, compare_runs([change(run) for run in runs]))
                 for fault, words, change in alternatives()]
    found = min((one for one in tried if one.better), key=lambda one: one.cost, default=None)
    rotations = [frame["world2cam"][:3, :3] for frame in itertools.chain(*runs)]
    mirrored = (np.linalg.det(rotations) < 0).sum()
    if mirrored and (not found or found.fault != "mirrored poses"):
        rows.append(wrong("mirrored poses", f"{mirrored} of {len(rotations)} rotations have determinant -1."))
    if found:
        rows.append(wrong(found.fault, f"{confirmed}; with {found.words} it is {found.share:.0%}, and depth and colour "
                          f"fit better by {found.gain:.1f} log units per pair."))
    elif num_pairs >= MIN_PAIRS and share < 0.2:
        rows.append(wrong("unconfirmed", f"Only {confirmed}, and no alternative explains why."))
    else:
        rows.append(Row("neighbours", "ok" if num_pairs >= MIN_PAIRS else "not tested", confirmed))
    for fault in sorted({one.fault for one in tried} - {row.test for row in rows}):
        own = [one for one in tried if one.fault == fault]
        if found or not all(one.worse for one in own):
            reason = f"first mend: {found.fault}" if found else "too little overlap or motion to tell"
            rows.append(Row(fault, "not tested", reason))
        else:
            rows.append(Row(fault, "ok", f"explains a pair worse by {-max(one.gain for one in own):.2f} log units"))
    return rows


# -------------------------------------------------------------------------------------------------- depth and up axis


def known_depth(frame):
    """Metres (n,) of the pixels whose depth is known."""
    return frame["depth"][(frame["depth"] > 0) & np.isfinite(frame["depth"])]


def empty_rows(frames):
    """Frames of which no pixel has depth: a training that takes its points from them would refuse them."""
    empty = [frame["name"] for frame in frames if len(known_depth(frame)) == 0]
    if not empty:
        return []
    return [wrong("frames without depth", f"No pixel of {len(empty)} of {len(frames)} sampled frames has depth: "
                  f"{', '.join(empty[:3])}.")]


def depth_rows(frames):
    """Rows about the values of depth images alone: their number and their median."""
    known = [known_depth(frame) for frame in frames]
    values = np.unique(np.concatenate([depth[::4] for depth in known]))
    if len(values) == 0:
        return [wrong("depth scale", "No pixel of the sampled frames has depth.")]
    median = np.median(np.concatenate([depth[::64] for depth in known]))
    coarse = np.diff(values).min(initial=values[-1]) > values[-1] / 260  # at most 256 levels
    if coarse and (len(values) >= 20 or values[-1] < 0.256):
        return [wrong("8-bit depth", f"Depth has only {len(values)} values, with median {median:.3f} m.")]
    if not 0.05 < median < 100:
        return [wrong("depth scale", f"The median depth is {median:.3f} m.")]
    return [Row("depth", "ok", f"the median depth is {median:.2f} m")]


def normals_of(frame):
    """World normals (n, 3), towards the camera, on a grid of 80 columns of depth pixels."""
    step = max(2, frame["depth"].shape[1] // 80)
    depth = frame["depth"][::step, ::step].astype(np.float64)
    v, u = step * np.indices(depth.shape)
    grid = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(frame["depth_intrinsics"]).T * depth[..., None]
    middle, right, below = grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1]
    known = (depth[:-1, :-1] > 0) & (depth[:-1, 1:] > 0) & (depth[1:, :-1] > 0)
    normals = np.cross(below - middle, right - middle)[known]
    normals *= -np.sign((normals * middle[known]).sum(1, keepdims=True))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    return normals @ frame["world2cam"][:3, :3]


def world_up(frames):
    """Up (3,) of a scene: the most frequent surface normal near the cameras' mean up vector; zero if unclear."""
    cameras = -np.mean([frame["world2cam"][1, :3] for frame in frames], 0)
    normals = np.concatenate([normals_of(frame) for frame in frames])
    near = normals[normals @ cameras > 0.6 * np.linalg.norm(cameras)]
    if np.linalg.norm(cameras) < 0.5 or len(near) < 100:
        return np.zeros(3)
    votes = near[::len(near) // 100] @ near.T > 0.985  # within 10 degrees
    up = near[votes[votes.sum(1).argmax()]].sum(0)
    return up / np.linalg.norm(up) if votes.sum(1).max() > 0.03 * len(normals) else np.zeros(3)


def up_rows(runs, up):
    """The axis that the scenes agree on, beside the stated one -> rows, and the world's up (3,) or None."""
    found = [one for one in map(world_up, runs) if one.any()]
    mean = np.mean(found or [np.zeros(3)], 0)
    axis = max(AXES, key=lambda name: AXES[name] @ mean)
    if AXES[axis] @ mean < 0.94:  # 20 degrees
        return [Row("up axis", "not tested", "cameras and surfaces do not tell it")], None
    words = f"cameras and surfaces say {axis}, --up says {up}"
    return [Row("up axis", "ok", words) if axis == up else wrong("up axis", f"{words}.")], mean


# ------------------------------------------------------------------------------------------------- labels and splits


def read_labels(source, num_names, num_frames):
    """Frames spread over a source -> pixels per label (num_names + 1,), ignored first, and a dict of arrays per frame.

    These are `data.pixel_fields` of every eighth pixel, with the frame's scene, and without instances if it has none.
    """
    counts, fields = np.zeros(num_names + 1, np.int64), []
    for index in np.linspace(0, len(source) - 1, min(len(source), num_frames)).round().astype(int):
        frame = source[index]
        if frame.get("label") is not None:
            counts += np.bincount(frame["label"].ravel() + 1, minlength=num_names + 1)
            fields.append(pixel_fields(frame, *(pixels[::8] for pixels in depth_to_color(frame))))
            fields[-1]["scene"] = frame["name"].split("/")[0]
            if frame.get("instance") is None:
                del fields[-1]["instances"]
    return counts, fields


def label_rows(counts, fields, names, num_classes, up):
    """Label ids, from what `read_labels` gives. names: of all labels; those from num_classes on are not listed.

    up: the world's up (3,), or None if it is unknown.
    """
    if not fields:
        return [Row("label ids", "not tested", "the frames have no labels")]
    ignored, *shares = counts / counts.sum()
    order = [i for i in np.argsort(-counts[1:], kind="stable") if shares[i] > 0]
    words = ", ".join([f"ignored {ignored:.0%}"] + [f"{names[i]} {shares[i]:.0%}" for i in order[:8]])
    rows = [Row("labels", "note", words)]
    below = []  # per frame, the share of its points that lie 20 cm below the middle of its floor
    for points, labels in ((own["points"], own["labels"]) for own in fields):
        floor = labels == names.index("floor") if up is not None and "floor" in names else np.zeros(1, bool)
        if floor.mean() > 0.01:
            height = points @ up
            below.append((height < np.median(height[floor]) - 0.2).mean())
    outside = [names[i] for i in order if i >= num_classes]
    if outside:
        words = f"{sum(shares[num_classes:]):.1%} of the pixels have ids that the class list lacks"
        rows.append(wrong("label ids", f"{words}: {', '.join(outside[:8])}."))
    elif below and np.mean(below) > 0.2:
        words = f"{np.mean(below):.0%} of the points lie below what the class list calls floor"
        rows.append(wrong("label ids", f"{words}: ids are shifted or permuted."))
    else:
        rows.append(Row("label ids", "ok", f"{len(order)} of {num_classes} classes occur"))
    return rows


def instance_rows(fields, names):
    """Whether instance ids separate objects, from what `read_labels` gives."""
    fields = [own for own in fields if "instances" in own]
    if not fields:
        return [Row("instance ids", "not tested", "the frames have no instances")]
    triples = []  # (label, instance, pixels) per frame
    for own in fields:
        both = (own["labels"] >= 0) & (own["instances"] >= 0)
        pairs, counts = np.unique(own["labels"][both] << 32 | own["instances"][both], return_counts=True)
        triples.append(np.column_stack([pairs >> 32, pairs & (1 << 32) - 1, counts]))
    labels, instances, counts = np.concatenate(triples).T
    if len(counts) == 0:
        return [wrong("instance ids", "No labelled pixel has an instance.")]
    mixed = 0  # pixels whose instance belongs, in their frame, mostly to another class
    for triple in triples:
        for instance in np.unique(triple[:, 1]):
            pixels = triple[triple[:, 1] == instance, 2]
            mixed += pixels.sum() - pixels.max()
    words = f"{mixed / counts.sum():.1%} of the pixels have an instance that is mostly of another class"
    if mixed > 0.1 * counts.sum():
        return [wrong("instance ids", f"{words}.")]
    stuff = {names[i] for i in labels} & {"wall", "floor", "ceiling"}
    one_to_one = len(set(zip(labels, instances))) == len(set(labels)) == len(set(instances))
    if stuff and one_to_one and len({own["scene"] for own in fields}) > 1:
        return [wrong("instance ids", "Each class has the same instance id in all scenes: they are the labels again.")]
    return [Row("instance ids", "ok", words)]


def folder_rows(sources):
    """Scenes whose labels training would miss: without label-filt beside others that have it, or without class list."""
    has = {}  # scene folder: label-filt is there
    for source in sources:
        has |= {folder: (folder / "label-filt").is_dir() for folder in getattr(source, "folders", ())}
    lacking = [str(folder) for folder, labelled in has.items() if not labelled]
    if not any(has.values()):
        return []
    if not any(getattr(source, "class_names", ()) for source in sources):
        return [wrong("label folders", "There are label-filt folders, but no class list.")]
    if lacking:
        return [wrong("label folders", f"{len(lacking)} of {len(has)} scenes have no label-filt: "
                      f"{', '.join(lacking[:3])}.")]
    return []


def split_rows(names, occurring):
    """Frames that two splits share, and classes that one lacks. names, occurring: {title: frames or class names}."""
    rows = []
    for (a, in_a), (b, in_b) in itertools.combinations(names.items(), 2):
        twice = sorted(set(in_a) & set(in_b), key=natural_key)
        rows.append(Row("frames in both splits", "ok", f"none in {a} and {b}"))
        if twice:
            rows[-1] = wrong(rows[-1].test, f"{a} and {b} share {len(twice)}: {', '.join(twice[:3])}.")
    for title, own in occurring.items():
        lacking = sorted(set().union(*occurring.values()) - own)
        if lacking:
            rows.append(Row("classes of a split", "note", f"not in the sample of {title}: {', '.join(lacking)}"))
    return rows


# ------------------------------------------------------------------------------------------------------------- running


def contact_sheet(runs, path):
    """Writes an image with a tile per run: two of its frames that are far apart, but see much of the same."""
    tiles = []
    for run in [run for run in runs if len(run) > 1][:12]:
        overlap = {(i, j): compare(run[i], run[j])[0] for i, j in itertools.combinations(range(len(run)), 2)}
        pairs = [pair for pair in overlap if overlap[pair] >= 0.7 * max(overlap.values())]
        i, j = max(pairs, key=lambda pair: pair[1] - pair[0])
        tiles.append(draw_pair(run[i], run[j]))
    width, height = (max((tile.size[axis] for tile in tiles), default=1) + 10 for axis in range(2))
    sheet = Image.new("RGB", (min(3, max(1, len(tiles))) * width, max(1, -(-len(tiles) // 3)) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 3 * width, number // 3 * height))
    sheet.save(path)


def draw_pair(a, b):
    """Tile: frame b, darkened, with points of frame a in it, coloured by how far b's depth is from theirs."""
    points, predicted, seen = reproject(a, b, 900)
    uv, _ = project(points, b["world2cam"], b["intrinsics"])
    error = np.abs(predicted - seen) / np.maximum(seen, 1e-9)
    redness = np.clip(np.log(np.maximum(error, 1e-9) / 0.002) / np.log(25), 0, 1)  # of 0.2 % .. 5 %
    colors = 255 * np.clip(np.stack([2 * redness, 2 - 2 * redness, 0 * redness], 1), 0, 1)
    colors[seen == 0] = 200
    height, width = b["color"].shape[:2]
    image = Image.fromarray(b["color"] // 2 + 20).resize((480, round(480 * height / width)))
    draw = ImageDraw.Draw(image)
    for (u, v), color in zip(uv.T * 480 / width, colors.astype(int).tolist()):
        draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill=tuple(color))
    tile = Image.new("RGB", (480, image.height + 30), "white")
    tile.paste(image, (0, 30))
    caption = f"points of {a['name']} in {b['name']}: {compare(a, b)[1]:.0%} agree\n" \
        "depth error: green 0.2 %, yellow 1 %, red 5 % and more; grey: no depth"
    ImageDraw.Draw(tile).text((2, 0), caption, fill="black")
    return tile


def names_of(source):
    """The names of a source's frames, which are read if it has no list of them."""
    return source.names if hasattr(source, "names") else [source[i]["name"] for i in range(len(source))]


def sample_runs(names, num_frames, length):
    """Runs of at most `length` consecutive frames of a scene, spread evenly over a source -> lists of positions."""
    chunks = []
    for _, scene in itertools.groupby(range(len(names)), lambda i: names[i].split("/")[0]):
        scene = list(scene)
        chunks += [scene[i:i + length] for i in range(0, len(scene), length)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1] or chunks
    count = max(1, min(len(chunks), num_frames * len(chunks) // sum(map(len, chunks))))
    return [chunks[i] for i in np.linspace(0, len(chunks) - 1, count).round().astype(int)]


def read_runs(sources, num_frames, length):
    """`sample_runs` of all sources together -> lists of frames without labels."""
    places = {name: (source, i) for source in sources for i, name in enumerate(names_of(source))}
    names = sorted(places, key=natural_key)
    runs = []
    for run in sample_runs(names, num_frames, length):
        frames = [source[i] for source, i in (places[names[position]] for position in run)]
        runs.append([{**frame, "label": None, "instance": None} for frame in frames])
    return runs


def geometry_rows(runs, up="z", quick=False):
    """Everything that runs of consecutive frames tell without labels -> rows, and the world's up (3,) or None."""
    rows = depth_rows([frame for run in runs for frame in run])
    if rows[0].verdict == "ok":
        rows += pose_rows(runs, quick)
    fault = next((row.test for row in rows if row.verdict == "WRONG"), None)
    if fault:
        untested = ["up axis"] if len(rows) > 1 else ["poses and intrinsics", "up axis"]
        return rows + [Row(test, "not tested", f"first mend: {fault}") for test in untested], None
    found, mean = up_rows(runs, up)
    if quick and found[0].verdict == "WRONG":  # wrong poses look like another up axis if the camera hardly moves
        return geometry_rows(runs, up)
    return rows + found, mean


def quick_check(frames, up="z", num_pairs=24):
    """What cannot be right in a sample of a source of frames (see data.py) -> list of (fault, words).

    Reads about 2/3 num_pairs frames. up: a key of AXES. Tests median depth, principal point, determinant of the
    rotation, share of points that a neighbouring frame confirms (with alternatives if it is low), and up axis.
    """
    rows, _ = geometry_rows(read_runs([frames], num_pairs * 2 // 3, 4), up, quick=True)
    return [(row.test, row.words) for row in rows if row.verdict == "WRONG"]


def inspect(sources, num_classes=1000, up="z", num_frames=48, picture=None):
    """All tests on {title: source of frames}, a source per split -> rows. num_classes: see `label_rows`."""
    names = getattr(next(iter(sources.values())), "class_names", [f"class {i}" for i in range(1000)])
    try:
        runs = read_runs(sources.values(), num_frames, min(8, num_frames))
        labels = {title: read_labels(source, len(names), num_frames) for title, source in sources.items()}
    except (FileNotFoundError, ValueError) as error:  # what a reader refuses is a finding, too
        return unreadable(error)
    if picture:
        contact_sheet(runs, picture)
    rows, world = geometry_rows(runs, up)
    counts = sum(counts for counts, _ in labels.values())
    fields = list(itertools.chain(*(fields for _, fields in labels.values())))
    rows += label_rows(counts, fields, names, num_classes, world) + instance_rows(fields, names)
    rows += empty_rows(list(itertools.chain(*runs))) + folder_rows(sources.values())
    occurring = {title: {names[i] for i in np.flatnonzero(counts[1:])} for title, (counts, _) in labels.items()}
    return rows + split_rows({title: names_of(source) for title, source in sources.items()}, occurring)


def open_sources(args):
    """The splits that are named, or else all frames -> {title: source}."""
    splits = [path for path in (*args.split, args.train_split, args.val_split) if path] or [None]
    if args.data == "rooms":
        splits = ["train", "val"]
    options = {"classes": args.classes, "intrinsics": args.intrinsics, "labels": None, "unlisted": True,
               "rooms": (8, 4)}
    return {str(split or args.data): open_frames(args.data, split, **options) for split in splits}


def pinhole(text):
    """An argparse type: "fx,fy,cx,cy" -> intrinsics (3, 3)."""
    try:
        fx, fy, cx, cy = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected fx,fy,cx,cy in pixels, got {text!r}") from None
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def main(argv=None):
    """The command; returns its exit code, 1 if something is wrong."""
    parser = argparse.ArgumentParser("check.py", description="Says what is wrong with a data set.")
    parser.add_argument("data", help="'rooms' (built in) or a folder in ScanNet's exported 2D layout")
    parser.add_argument("--split", nargs="+", default=[], help="files with one scene or scene/frame per line; not "
                        "given: all frames")
    parser.add_argument("--train-split", help="likewise")
    parser.add_argument("--val-split", help="likewise")
    parser.add_argument("--classes", help="class list, one 'id name' pair per line; not given: DATA/classes.txt")
    parser.add_argument("--up", choices=AXES, default="z", help="the world's up axis; negative ones as --up=-y")
    parser.add_argument("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="DATA is a folder of frame-*.color.*,"
                        " .depth.png and .pose.txt, whose images have these, in pixels")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="write a contact sheet of reprojected points")
    parser.add_argument("--frames", type=int, default=48, help="frames that are read for the poses, and as many per "
                        "split for the labels")
    args = parser.parse_args(argv)
    if args.frames < 1:
        parser.error(f"--frames must be at least 1, got {args.frames}")
    if args.picture and (args.picture.suffix != ".png" or not args.picture.absolute().parent.is_dir()):
        parser.error(f"--picture {args.picture}: expected the name of a .png file in a folder that exists")
    if args.data == "rooms" and (args.split or args.train_split or args.val_split or args.classes
                                 or args.intrinsics is not None):
        parser.error("the built-in rooms take no splits, --classes or --intrinsics")
    try:
        sources = open_sources(args)
    except (FileNotFoundError, ValueError) as error:
        rows = unreadable(error)
    else:
        rows = inspect(sources, getattr(next(iter(sources.values())), "num_listed", 1000), args.up, args.frames, args.picture)
    for row in sorted(rows, key=lambda row: row.verdict == "WRONG"):
        print(textwrap.fill(f"{row.verdict:<11} {row.test:<33} {row.words}", 120, subsequent_indent=46 * " ",
                            break_long_words=False, break_on_hyphens=False))
    count = sum(row.verdict == "WRONG" for row in rows)
    print(f"\n{count} {'thing is' if count == 1 else 'things are'} wrong." if count else "\nNothing wrong was found.")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
