# SPDX-License-Identifier: MIT
"""Looks a data set over before anybody trains on it, and says what is wrong and how to fix it.

    python check.py DATA                        a folder in ScanNet's exported 2D layout, or `rooms` (built in)
    python check.py DATA --train-split train.txt --val-split val.txt --up=-y --picture check.png
    python check.py DATA --intrinsics 585,585,320,240           a folder of frame-* files

Depth is reprojected into other frames of its scene, with the cameras as given and under alternatives: poses
inverted, other axes, another unit, the pose of the next frame, and so on (support/reprojection.py). A fault is
named if its alternative explains the frames as well as clean ones are explained; if none does, "no known cause
fits". What the sampled frames cannot decide is "not tested". The exit status is 1 if something is wrong.
docs/check.md has the list of faults and what was measured.

Imports numpy, PIL, and of this repository data, sources and support.
"""
import argparse
import itertools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import AXES, check_frame, depth_to_color, frame_names, pixel_fields, unproject, up_rotation
from sources.captures import FORMATS, POSES
from sources.open import open_frames
from sources.scannet import natural_key
from support.reprojection import (CLEAN, MARGIN, MIN_PAIRS, OVERLAP, Judge, fit, look_up, make_views,
                                  project, sample, small_depth, small_gray)
from support.runtime import Parser, checked_by, positive_float, positive_int, run_command

TILT = 12  # degrees between the stated and the found up direction
SPACING = (0, 1, 3, 4, 10, 11, 30, 31)  # of the frames of a run: pairs that move little, and much
VOID = r"(un(label+ed|annotated|known|defined|classified)|void|ignored?|none|no label|invalid)"
MULTIPLY = "Multiply every camera-to-world matrix from the right by the matrix of these axes"
FIXES = {
    "refused": "Training refuses it, too.",
    "no depth": "Depth is needed in some frames at least.",
    "8-bit depth": "Export 16-bit PNG with 1000 units per meter; what 8 bits lost cannot be restored.",
    "normalized depth": "Export depth in one unit, without stretching every image to its own range.",
    "far plane": "Store 0 where there is no reading.",
    "units of depth": "Store depth with 1000 units per meter.",
    "units of poses": "Multiply the translations of the poses by this factor, so that they are meters.",
    "units": "Scale the poses (structure from motion has no unit), or the depth, whichever is not in meters.",
    "colors": "Export the images again.",
    "equal poses": "Export the pose of every frame.",
    "pose inverted": "The files hold world-to-camera matrices: store their inverses (camera to world).",
    "pose half inverted": "A camera-to-world matrix is [R, t] with t the camera's place in the world.",
    "quaternion order": "Read the quaternions in this order.",
    "OpenGL axes": "Multiply every camera-to-world matrix from the right by diag(1, -1, -1, 1).",
    "camera axes": f"{MULTIPLY}; if the images lie on their side or head, turn them instead.",
    "images turned": "Turn the images, label images too (or turn the cameras about their axes).",
    "mirrored": "Undo the mirror S of the poses, by pose S, S pose or S pose S, or flip the images.",
    "color intrinsics": "Rescale intrinsic_color.txt to the size of the color images.",
    "depth intrinsics": "Rescale intrinsic_depth.txt to the size of the depth images.",
    "intrinsics of both": "Rescale intrinsic_color.txt and intrinsic_depth.txt to the sizes of the images.",
    "focal length": "Correct the intrinsics, or scale them as the images were.",
    "cropped images": "Subtract from the principal point what was cut off on the left and above.",
    "depth along the ray": "Divide depth by the length of the ray (x/z, y/z, 1) of its pixel.",
    "inverse depth": "Store depth, not its inverse or a disparity.",
    "color images turned": "Turn the color images as the depth images lie.",
    "color images mirrored": "Flip the color images.",
    "depth and color shifted in time": "Pair the two series of images by time stamp.",
    "poses off by one frame": "Pair poses and images by time stamp.",
    "depth and color cameras": "Register depth to the color camera (with the extrinsics of the two), or export "
                               "registered depth.",
    "unconfirmed": "Look at --picture, and at where poses, intrinsics and depth come from.",
    "up axis": "Pass the up direction as --up, with an equals sign.",
    "label ids": "Correct the class list, or renumber the label images.",
    "void class": "Name it `unlabeled` in the class list.",
    "resized labels": "Resize label images with nearest-neighbor interpolation.",
    "instance ids": "Write one id per object, from 1 on, and 0 for none.",
    "label folders": "Write DATA/classes.txt or pass --classes, and give every scene its label-filt.",
    "frames in both splits": "Remove them from one of the split files.",
}
UNITS = {  # factors of the translations, which poses or depth in another unit ask for
    0.001: "millimeters", 0.01: "centimeters", 5: "5000 units per meter, as TUM writes",
    4: "4000 units per meter, as Matterport3D writes", 6.5535: "6553.5 units per meter, as in NICE-SLAM's Replica",
    10: "10,000 units per meter", 0.1: "100 units per meter"}


class Row(NamedTuple):
    """Outcome of one test; verdict: "ok", "WRONG", "not tested" or "note"."""
    test: str
    verdict: str
    words: str


def wrong(fault, words):
    """The Row of a fault: what was seen, and its fix."""
    return Row(fault, "WRONG", f"{words} {FIXES[fault]}")


def is_wrong(rows):
    """Whether one of some rows is a fault."""
    return any(row.verdict == "WRONG" for row in rows)


# ------------------------------------------------------------------------------------------ depth and color alone


def known_depth(frame):
    """Meters (n,) of the pixels whose depth is known."""
    return frame["depth"][(frame["depth"] > 0) & np.isfinite(frame["depth"])]


def without_value(frame, value):
    """A frame in which a value of depth means unknown."""
    return {**frame, "depth": np.where(frame["depth"] == value, 0, frame["depth"]).astype(np.float32)}


def find_filler(frames):
    """A value that many pixels of several images hold, and hardly any other value near it -> (value, shares (F,))."""
    depth = np.concatenate([known_depth(frame)[::7] for frame in frames])
    values, counts = np.unique(depth, return_counts=True)
    most = counts.argmax()
    near = np.delete(counts[max(0, most - 10):most + 11], min(most, 10))
    shares = np.array([(frame["depth"] == values[most]).mean() for frame in frames])
    common = (shares > 0.005).sum() >= max(2, 0.2 * len(frames)) and shares.mean() > 0.002
    return (values[most], shares) if common and counts[most] > 20 * np.median(near) else (None, shares)


def depth_rows(frames):
    """What the values of depth images tell -> (frames with known depth, without fillers, rows)."""
    rows = []
    empty = [frame["name"] for frame in frames if len(known_depth(frame)) == 0]
    frames = [frame for frame in frames if frame["name"] not in empty]
    if not frames:
        return [], [wrong("no depth", "No pixel of the sampled frames has depth.")]
    if empty:
        rows = [Row("frames without depth", "note", f"{len(empty)} of the sample, skipped: {', '.join(empty[:3])}")]

    for _ in range(3):
        value, shares = find_filler(frames)
        if value is None:
            break
        words = f"{(shares > 0.005).sum()} of {len(frames)} depth images hold {value:.6g} m in many pixels, " \
            f"{shares.mean():.1%} of all ({frames[shares.argmax()]['name']}: {shares.max():.1%})."
        rows.append(wrong("far plane", words))
        frames = [frame for frame in (without_value(frame, value) for frame in frames) if len(known_depth(frame))]
        if not frames:
            return [], rows

    known = [known_depth(frame) for frame in frames]
    values = np.unique(np.concatenate([depth[::4] for depth in known]))
    median = np.median(np.concatenate([depth[::64] for depth in known]))
    coarse = np.diff(values).min(initial=values[-1]) > values[-1] / 260  # at most 256 levels
    ends = np.array([(depth.min(), depth.max()) for depth in known])
    same_top = len(frames) > 2 and (ends[:, 1] == np.median(ends[:, 1])).mean() > 0.9
    if same_top and np.median(ends[:, 0]) < 0.02 * ends[:, 1].max():
        words = f"Every depth image reaches from nearly 0 to {np.median(ends[:, 1]):.6g} m."
        rows.append(wrong("normalized depth", words))
    elif coarse and (len(values) >= 20 or values[-1] < 0.256):
        rows.append(wrong("8-bit depth", f"Depth has only {len(values)} values, with median {median:.3f} m."))
    elif not 0.05 < median < 100:
        rows.append(wrong("units of depth", f"The median depth is {median:.3f} m."))
    else:
        rows += flat_rows(frames) or [Row("depth", "ok", f"the median depth is {median:.2f} m")]
    return frames, rows


def smooth_points(frame):
    """Camera points (h, w, 3) of a frame, means of blocks on a grid of about 40 columns; NaN = unknown."""
    depth, intrinsics = small_depth(frame, 320)
    k = max(1, depth.shape[1] // 40)
    height, width = (size // k for size in depth.shape)
    depth = depth[:height * k, :width * k]
    v, u = np.indices(depth.shape)
    points = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T * depth[..., None]
    known = (depth > 0).reshape(height, k, width, k, 1).sum((1, 3))
    return points.reshape(height, k, width, k, 3).sum((1, 3)) / np.where(known > k * k / 2, known, np.nan)


def flatness(frame):
    """How flat the two largest planes of a frame are if depth is z, the length of the ray, or 1 / z.

    A plane's 1 / z is affine in x / z and y / z. -> mean log of the relative error of 1 / z (3,), or None.
    """
    points = smooth_points(frame).reshape(-1, 3)
    points = points[np.isfinite(points).all(1)]
    if len(points) < 100:
        return None
    rays = points / points[:, 2:]
    rng = np.random.default_rng(0)
    triples = rng.integers(len(points), size=(600, 3))
    extent = np.abs(np.diff(rays[triples], axis=1)[..., :2]).max((1, 2))
    triples = triples[np.argsort(extent)[:150]]  # close together, so that many lie on one surface
    triples = triples[np.abs(np.linalg.det(rays[triples])) > 1e-5]
    costs = []
    for inverse in (1 / points[:, 2], np.linalg.norm(rays, axis=1) / points[:, 2], points[:, 2]):
        planes = np.linalg.solve(rays[triples], inverse[triples][..., None])
        error = np.abs((rays @ planes)[..., 0] / inverse - 1)
        error = np.log(np.clip(error, 0.001, 0.05))
        best = error[error.mean(1).argmin()]
        costs.append(np.minimum(error, best).mean(1).min())
    return np.array(costs)


def flat_rows(frames):
    """A fault if surfaces are flat in most images only if depth is something else than z."""
    costs = [flatness(frame) for frame in frames[:48:4]] or [None]
    costs = np.array([one for one in costs if one is not None]).reshape(-1, 3)
    for column, fault, words in ((1, "depth along the ray", "depth were the length of the ray"),
                                 (2, "inverse depth", "depth were 1 / z")):
        gains = costs[:, 0] - costs[:, column]
        if len(gains) > 2 and gains.mean() > MARGIN and (gains > 0).mean() > 0.8 and costs[:, column].mean() < -4.4:
            return [wrong(fault, f"In {(gains > 0).sum()} of {len(gains)} images flat surfaces would be flat if {words}.")]
    return []


def color_rows(frames):
    """Means of the channels, and images that cannot be right."""
    means = np.array([frame["color"].mean((0, 1)) for frame in frames])
    ranges = np.array([np.subtract(*np.percentile(frame["color"][::4, ::4], (99, 1))) for frame in frames])
    words = "mean red {:.0f}, green {:.0f}, blue {:.0f} of 255".format(*means.mean(0))
    flat = (ranges < 8) | (means.max(1) < 5) | (means.min(1) > 250)
    if flat.mean() > 0.5:
        return [wrong("colors", f"{flat.sum()} of {len(flat)} color images are black, white or of one color: {words}.")]
    if means[:, 2].mean() > 1.1 * means[:, 0].mean():
        words += "; bluish: if wood and skin look blue, red and blue are swapped"
    return [Row("colors", "note", words + f"; {flat.sum()} images of one color" * bool(flat.sum()))]


# ------------------------------------------------------------------------------------------- cameras and alignment


def edge_maps(frame, width=160):
    """Where depth jumps and how steep the color image is there, both (h, w) on the grid of a small depth image."""
    depth, depth_intrinsics = small_depth(frame, width)
    gray, intrinsics = small_gray(frame, width)
    v, u = np.indices(depth.shape).reshape(2, -1)
    uv = (intrinsics @ np.linalg.inv(depth_intrinsics) @ np.stack([u, v, np.ones_like(u)]))[:2]
    seen = sample(gray[None], np.zeros(1, np.int64), uv[None])[0].reshape(depth.shape)
    steep = np.nan_to_num(np.log1p(np.hypot(*np.gradient(seen))))
    log_depth = np.log(np.where(depth > 0, depth, np.nan))
    jumps = np.fmax(*np.abs(np.gradient(log_depth))) > 0.02
    return jumps.astype(float), steep


def edge_correlation(frames):
    """Correlation of depth edges with color edges -> array (2 m + 1, 2 m + 1) over shifts of the color image, in
    1/160 of the width, from -m to m = 32; the mean over frames.
    """
    total = np.zeros((65, 65))
    for frame in frames:
        jumps, steep = (image - image.mean() for image in edge_maps(frame))
        scale = jumps.std() * steep.std() * jumps.size
        if scale > 0:
            size = [2 * extent + 128 for extent in jumps.shape]
            spectrum = np.fft.rfft2(jumps, size).conj() * np.fft.rfft2(steep, size)
            shifted = np.fft.irfft2(spectrum, size) / scale
            total += np.roll(shifted, (32, 32), (0, 1))[:65, :65]
    return total / len(frames)


def alignment_rows(frames):
    """Whether color edges lie on depth edges: they do not if depth belongs to another camera than color."""
    halves = [edge_correlation(frames[start::2]) for start in (0, 1)] if len(frames) >= 4 else []
    peaks = [np.array(np.unravel_index(half.argmax(), half.shape)) - 32 for half in halves]
    if not halves or np.abs(peaks[0] - peaks[1]).max() > 2:
        return [Row("depth and color cameras", "not tested", "too few edges to tell")]
    both = sum(halves)
    score = (both.max() - both.mean()) / both.std()
    dv, du = np.array(np.unravel_index(both.argmax(), both.shape)) - 32
    if score < 5:
        return [Row("depth and color cameras", "not tested", "too few edges to tell")]
    if max(abs(du), abs(dv)) < 2 or both.max() < 1.5 * both[31:34, 31:34].max():
        return [Row("depth and color cameras", "ok", "color edges lie on depth edges")]
    shift = np.hypot(du, dv) / 160
    focal = np.median([frame["intrinsics"][0, 0] / frame["color"].shape[1] for frame in frames])
    median = np.median(np.concatenate([known_depth(frame)[::64] for frame in frames]))
    words = f"Color edges lie {abs(du) / 1.6:.1f} % of the width to the {'right' if du > 0 else 'left'} and " \
        f"{abs(dv) / 1.6:.1f} % {'below' if dv > 0 else 'above'} depth edges, as from a color camera turned by " \
        f"{np.degrees(np.arctan(shift / focal)):.1f} degrees, or {1000 * shift / focal * median:.0f} mm beside."
    return [wrong("depth and color cameras", words)]


def still_rows(runs, judge):
    """A fault if all poses of a scene are equal although its images are not."""
    equal = []
    for run in runs:
        poses = np.array([frame["world2cam"] for frame in run])
        if len(run) > 2 and np.ptp(poses, axis=0).max() < 1e-6:
            equal.append(run[0]["name"].split("/")[0])
    if not equal or judge.still.costs[1].mean() < np.log(0.02):
        return []
    words = f"All poses of {len(equal)} of {len(runs)} sampled scenes are equal, but the images are not: " \
        f"{', '.join(equal[:3])}."
    return [wrong("equal poses", words)]


def center_rows(runs):
    """A fault if principal points are far from the centers of the images, for frames that do not overlap."""
    off = []
    for image, field, fault in (("color", "intrinsics", "color intrinsics"),
                                ("depth", "depth_intrinsics", "depth intrinsics")):
        frames = list(itertools.chain(*runs))
        centers = [(frame[field][:2, 2] + 0.5) / frame[image].shape[1::-1] for frame in frames]
        if np.abs(np.median(centers, 0) - 0.5).max() > 0.2:
            off.append(fault)
    if not off:
        return []
    fault = "intrinsics of both" if len(off) > 1 else off[0]
    return [wrong(fault, describe_centers(runs[0][0], fault))]


def describe_centers(frame, fault):
    """For which size of images the intrinsics were made, and what size they have."""
    image, field = ("color", "intrinsics") if fault == "color intrinsics" else ("depth", "depth_intrinsics")
    u, v = 2 * frame[field][:2, 2] + 1
    height, width = frame[image].shape[:2]
    return f"The principal point is the center of {u:.0f} x {v:.0f} pixels; the {image} image has {width} x {height}."


def unit_row(found, judge, confirmed, median):
    """The Row of translations and depths that differ by a factor: which side is wrong, if that is known."""
    factor = float(np.exp(found.x))  # of the translations; depth times 1 / factor fits as well
    words = f"{confirmed}; with translations times {factor:.4g}, or depth times {1 / factor:.4g}, it is {found.share:.0%}"
    less = [judge.weigh_scale(found.x + step).gain for step in (-0.14, 0.14)]
    exact = max(less) < found.gain - 0.1  # not so if the camera hardly moves
    for unit, words_of_unit in UNITS.items():
        gain = judge.weigh_scale(np.log(unit)).gain
        near = abs(np.log(factor / unit)) < (0.06 if exact else 0.3) and gain > found.gain - 0.15
        if near and unit < 0.1 < median < 30:
            return wrong("units of poses", f"{words}: the poses are in {words_of_unit}, factor {unit}.")
        if near and exact and unit >= 0.1:
            return wrong("units of depth", f"{words}: as of {words_of_unit}.")
    return wrong("units", f"{words}.")


def pose_rows(runs, up="z", num_pairs=96, num_points=300):
    """What reprojection between the frames of runs tells -> rows, a fault first."""
    views, pairs = make_views(runs)
    frames = list(itertools.chain(*runs))
    if len(pairs) > num_pairs:
        pairs = pairs[np.linspace(0, len(pairs) - 1, num_pairs).round().astype(int)]
    judge = Judge(views, pairs, num_points)
    share, count = judge.given.share(), judge.overlapping()
    confirmed = f"{share:.0%} of the points are confirmed by a neighbor ({count} overlapping pairs)"
    rows = still_rows(runs, judge)
    if rows:
        return rows
    upright = np.mean([-frame["world2cam"][1, :3] @ up_rotation(up)[2] for frame in frames]) > 0.3
    tried = judge.weigh_all(upright)
    fitting = [one for one in tried if one.fits]
    most = max((one.gain for one in fitting), default=0)
    found = next((one for one in fitting if one.gain > most - 0.1), None)
    helping = any(one.helps for one in tried)
    still = judge.still.share() >= CLEAN and judge.given.cost() - judge.still.cost() > MARGIN
    mirrored = (np.linalg.det([frame["world2cam"][:3, :3] for frame in frames]) < 0).sum()

    if mirrored and not (found and found.fault == "mirrored"):
        rows.append(wrong("mirrored", f"{mirrored} of {len(frames)} rotations have determinant -1."))
    elif found and found.fault == "units":
        median = np.median(views.depth[views.depth > 0])
        rows.append(unit_row(found, judge, confirmed, median))
    elif found:
        words = f"{confirmed}; with {found.words} it is {found.share:.0%}, and a pair fits better by {found.gain:.1f} log units."
        if "intrinsics" in found.fault:
            words += f" {describe_centers(frames[0], found.fault)}"
        rows.append(wrong(found.fault, words))
    elif count < MIN_PAIRS:
        rows += center_rows(runs)
    if not is_wrong(rows):
        rows += alignment_rows(frames)
    if not is_wrong(rows) and count >= MIN_PAIRS and not still:
        rows += unconfirmed_rows(judge, frames, confirmed, helping)
    if still:
        rows.append(Row("noise of poses", "note", "poses that do not move explain the frames better than their own"))
    if not is_wrong(rows):
        rows.append(Row("neighbors", "ok" if count >= MIN_PAIRS else "not tested", confirmed))
    return rows + [untested_row(fault, [one for one in tried if one.fault == fault], rows)
                   for fault in sorted({one.fault for one in tried} - {row.test for row in rows})]


def unconfirmed_rows(judge, frames, confirmed, helping):
    """A fault if the frames contradict each other and no alternative fits."""
    given = judge.given
    if given.share() >= CLEAN and (not helping):
        return []
    shares = []
    for place in range(len(frames)):
        own = (judge.pairs == place).any(1) & (given.overlap >= OVERLAP)
        shares.append(given.share(own) if own.any() else 1)
    worst = int(np.argmin(shares))
    words = f"{confirmed}, where clean captures reach {CLEAN:.0%}; of {frames[worst]['name']} {shares[worst]:.0%}."
    if given.share() >= CLEAN:
        words = f"{confirmed}, but other readings of the frames fit better, though none fits well."
    return [wrong("unconfirmed", f"{words} No known cause fits.")]


def untested_row(fault, own, rows):
    """The Row of a fault that was not found: all its alternatives explain the frames worse, or cannot be told."""
    first = next((row.test for row in rows if row.verdict == "WRONG"), None)
    if first:
        return Row(fault, "not tested", f"first fix: {first}")
    if not all(one.worse for one in own):
        return Row(fault, "not tested", "too little overlap or motion to tell")
    return Row(fault, "ok", f"explains a pair worse by {-max(one.gain for one in own):.2f} log units")


# -------------------------------------------------------------------------------------------- up axis


def normals_of(frame):
    """World normals (n, 3) of smoothed points, towards the camera."""
    points = smooth_points(frame)
    normals = np.cross(points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2])
    normals *= -np.sign((normals * points[1:-1, 1:-1]).sum(-1, keepdims=True))
    normals = normals[np.isfinite(normals).all(-1)]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    return normals @ frame["world2cam"][:3, :3]


def world_up(frames):
    """Up (3,) of a scene: the most frequent surface normal near the cameras' mean up vector; zero if unclear."""
    cameras = -np.mean([frame["world2cam"][1, :3] for frame in frames], 0)
    normals = np.concatenate([normals_of(frame) for frame in frames])
    near = normals[normals @ cameras > 0.6 * np.linalg.norm(cameras)]
    if np.linalg.norm(cameras) < 0.5 or len(near) < 30:
        return np.zeros(3)
    votes = near[::len(near) // 100 + 1] @ near.T > 0.985  # within 10 degrees
    up = near[votes[votes.sum(1).argmax()]].mean(0)
    up = near[near @ up > 0.985 * np.linalg.norm(up)].sum(0)
    return up / np.linalg.norm(up) if votes.sum(1).max() > 0.05 * len(normals) else np.zeros(3)


def up_rows(runs, up):
    """The direction that the scenes agree on, beside the stated one -> rows, and the world's up (3,) or None."""
    found = [one for one in map(world_up, runs) if one.any()]
    mean = np.mean(found or [np.zeros(3)], 0)
    if np.linalg.norm(mean) < 0.94:  # 20 degrees
        return [Row("up axis", "not tested", "cameras and surfaces do not tell it")], None
    mean /= np.linalg.norm(mean)
    stated = up_rotation(up)[2]
    angle = np.degrees(np.arccos(np.clip(mean @ stated, -1, 1)))
    words = f"cameras and surfaces say ({mean[0]:.2f}, {mean[1]:.2f}, {mean[2]:.2f}), {angle:.0f} degrees from --up {up}"
    if angle < TILT:
        return [Row("up axis", "ok", words)], mean
    axis = max(AXES, key=lambda name: AXES[name] @ mean)
    name = axis if AXES[axis] @ mean > np.cos(np.radians(TILT)) else ",".join(f"{x:.3f}" for x in mean)
    return [wrong("up axis", f"{words}: --up={name}.")], mean


# ---------------------------------------------------------------------------------------------- labels and splits


class Labels(NamedTuple):
    """What a sample of a source's label images holds."""
    counts: np.ndarray  # (1 + K,) pixels per class, ignored ones first
    fields: list  # per frame, `data.pixel_fields` of every eighth pixel, and its scene; instances only if it has some
    borders: np.ndarray  # number of borders between two classes, and of those with a third class on the border


def third_classes(label):
    """Pixels (2,) of a label image between two classes, and those of them that hold a third one."""
    borders = np.zeros(2, np.int64)
    for image in (label, label.T):
        before, middle, after = image[:-4], image[2:-2], image[4:]
        border = (before != after) & (before >= 0) & (after >= 0) & (middle >= 0)
        borders += border.sum(), (border & (middle != before) & (middle != after)).sum()
    return borders


def read_labels(source, num_frames):
    """Frames spread over a source -> Labels."""
    labels = Labels(np.zeros(len(class_names(source)) + 1, np.int64), [], np.zeros(2, np.int64))
    for index in np.linspace(0, len(source) - 1, min(len(source), num_frames)).round().astype(int):
        frame = source[index]
        if frame.get("label") is None:
            continue
        labels.counts[:] += np.bincount(frame["label"].ravel() + 1, minlength=len(labels.counts))
        labels.borders[:] += third_classes(frame["label"])
        known, seen = (pixels[::8] for pixels in depth_to_color(frame))
        fields = pixel_fields(frame, known, seen)
        fields["scene"] = frame["name"].split("/")[0]
        if frame.get("instance") is None:
            del fields["instances"]
        labels.fields.append(fields)
    return labels


def class_names(source):
    """The names of a source's classes; if it has none, of as many as can occur."""
    return list(getattr(source, "class_names", ())) or [f"class {i}" for i in range(1000)]


def below_floor(fields, names, up):
    """Mean share of a frame's points that lie 20 cm below the middle of what is called floor; 0 without any."""
    below = []
    for own in fields if up is not None and "floor" in names else ():
        floor = own["labels"] == names.index("floor")
        if floor.mean() > 0.01:
            height = own["points"] @ up
            below.append((height < np.median(height[floor]) - 0.2).mean())
    return np.mean(below) if below else 0


def label_rows(labels, names, num_listed, up):
    """Label ids. names: of all classes; those from num_listed on are not in the class list.

    up: the world's up (3,), or None if it is unknown.
    """
    if not labels.fields:
        return [Row("label ids", "not tested", "the frames have no labels")]
    ignored, *shares = labels.counts / labels.counts.sum()
    order = [i for i in np.argsort(-labels.counts[1:], kind="stable") if shares[i] > 0]
    words = ", ".join([f"ignored {ignored:.0%}"] + [f"{names[i]} {shares[i]:.0%}" for i in order[:8]])
    rows = [Row("labels", "note", words)]
    void = [names[i] for i in order if re.fullmatch(VOID, names[i].strip().lower())]
    if void:
        rows.append(wrong("void class", f"The class {void[0]!r} would be trained and scored."))

    border, third = labels.borders
    outside = [names[i] for i in order if i >= num_listed]
    below = below_floor(labels.fields, names, up)
    if third > 0.2 * border:
        words = f"On {third / border:.0%} of the borders between two classes lies a thin line of a third one."
        return rows + [wrong("resized labels", words)]
    if outside:
        words = f"{sum(shares[num_listed:]):.1%} of the pixels have ids that the class list lacks"
        return rows + [wrong("label ids", f"{words}: {', '.join(outside[:8])}.")]
    if below > 0.2:
        words = f"{below:.0%} of the points lie below what the class list calls floor"
        return rows + [wrong("label ids", f"{words}: ids are shifted or permuted.")]
    return rows + [Row("label ids", "ok", f"{len(order)} of {num_listed} classes occur")]


def instance_rows(fields, names):
    """Whether instance ids separate objects, from the fields of `read_labels`."""
    fields = [own for own in fields if "instances" in own]
    if not fields:
        return [Row("instance ids", "not tested", "the frames have no instances")]
    triples = []  # (label, instance, pixels) per frame
    for own in fields:
        labelled = own["labels"] >= 0
        pairs = np.stack([own["labels"], own["instances"]], 1)[labelled]
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        triples.append(np.column_stack([pairs, counts]))
    every = np.concatenate(triples)
    labels, instances, counts = every[every[:, 1] >= 0].T
    if len(counts) == 0:
        return [wrong("instance ids", "No labelled pixel has an instance.")]

    mixed = 0  # pixels whose instance belongs, in their frame, mostly to another class
    for triple in triples:
        for instance in np.unique(triple[triple[:, 1] >= 0, 1]):
            pixels = triple[triple[:, 1] == instance, 2]
            mixed += pixels.sum() - pixels.max()
    words = f"{mixed / counts.sum():.1%} of the pixels have an instance that is mostly of another class"
    if mixed > 0.1 * counts.sum():
        return [wrong("instance ids", f"{words}.")]
    stuff = {names[i] for i in labels} & {"wall", "floor", "ceiling"}
    one_to_one = len(set(zip(labels, instances))) == len(set(labels)) == len(set(instances))
    if stuff and one_to_one and len({own["scene"] for own in fields}) > 1:
        return [wrong("instance ids", "Each class has the same instance id in all scenes: they are the labels again.")]
    lost = lost_instances(every, names)
    if lost:
        return [wrong("instance ids", f"{lost}: objects with id 0 are taken for none.")]
    return [Row("instance ids", "ok", words)]


def lost_instances(triples, names):
    """Words about pixels that lack an instance although their class has some, or "" if there are few of them."""
    without, total = np.zeros((2, len(names)))
    np.add.at(total, triples[:, 0], triples[:, 2])
    none = triples[triples[:, 1] < 0]
    np.add.at(without, none[:, 0], none[:, 2])
    things = (without < 0.5 * total)
    share = without[things].sum() / max(total[things].sum(), 1)
    if share > 0.01:
        return f"{share:.1%} of the pixels of classes with instances have none"
    empty = [i for i in np.flatnonzero((without == total) & (total > 0)) if names[i] not in ("wall", "floor", "ceiling")]
    if len(empty) == 1 and things.sum() >= 5:
        return f"No pixel of {names[empty[0]]} has an instance, but those of {things.sum()} other classes have"
    return ""


def folder_rows(sources):
    """Files that were left out, and scenes whose labels training would miss."""
    rows = []
    has = {}  # scene folder: label-filt is there
    for source in sources:
        has |= {folder: (folder / "label-filt").is_dir() for folder in getattr(source, "folders", ())}
        left_out = dict(getattr(source, "left_out", {}))
        if getattr(source, "num_skipped", 0):
            left_out["frames with a lost pose"] = source.num_skipped
        if left_out:
            words = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            rows.append(Row("left out", "note", f"{getattr(source, 'title', '')}: {words}".lstrip(": ")))
    lacking = [str(folder) for folder, labelled in has.items() if not labelled]
    if any(has.values()) and not any(getattr(source, "class_names", ()) for source in sources):
        rows.append(wrong("label folders", "There are label-filt folders, but no class list."))
    elif any(has.values()) and lacking:
        rows.append(wrong("label folders", f"{len(lacking)} of {len(has)} scenes have no label-filt: "
                          f"{', '.join(lacking[:3])}."))
    return rows


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


# ----------------------------------------------------------------------------------------------------------- running


def sample_runs(names, num_frames):
    """Runs of up to 8 frames of a scene, close and far in time, spread over a source -> lists of positions."""
    length = min(len(SPACING), num_frames)
    chunks = []
    for _, scene in itertools.groupby(range(len(names)), lambda i: names[i].split("/")[0]):
        scene = list(scene)
        span = len(SPACING) if len(names) <= num_frames else SPACING[-1] + 1
        chunks += [scene[start:start + span] for start in range(0, len(scene), span)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1] or chunks
    chunks = [[chunk[i] for i in sorted(spread(len(chunk))[:length])] for chunk in chunks]
    count = max(1, min(len(chunks), num_frames * len(chunks) // sum(map(len, chunks))))
    return [chunks[i] for i in np.linspace(0, len(chunks) - 1, count).round().astype(int)]


def spread(count):
    """The numbers below count, those of SPACING first."""
    return [i for i in dict.fromkeys((*SPACING, *range(SPACING[-1]))) if i < count]


def read_runs(sources, num_frames):
    """`sample_runs` of all sources together -> lists of frames without labels, each with its position."""
    places = {name: (source, i) for source in sources for i, name in enumerate(frame_names(source))}
    names = sorted(places, key=natural_key)
    runs = []
    for run in sample_runs(names, num_frames):
        frames = []
        for position in run:
            source, i = places[names[position]]
            frames.append({**source[i], "label": None, "instance": None, "position": position})
        runs.append(frames)
    return runs


def geometry_rows(runs, up="z", num_pairs=96, num_points=300):
    """What runs of frames tell without labels -> rows, and the world's up (3,) or None. Training refuses faults."""
    frames = list(itertools.chain(*runs))
    try:
        for frame in frames:
            check_frame(frame)
    except ValueError as error:
        return [wrong("refused", f"{error}.")], None
    frames, rows = depth_rows(frames)
    rows += color_rows(frames) if frames else []
    kept = {frame["name"]: frame for frame in frames}
    runs = [[kept[frame["name"]] for frame in run if frame["name"] in kept] for run in runs]
    runs = [run for run in runs if run]
    if is_wrong(row for row in rows if row.test != "far plane"):
        return rows + [Row("poses and intrinsics", "not tested", "fix this first")], None
    rows += pose_rows(runs, up, num_pairs, num_points)
    if is_wrong(row for row in rows if row.test != "far plane"):
        return rows + [Row("up axis", "not tested", "fix this first")], None
    found, mean = up_rows(runs, up)
    return rows + found, mean


def quick_check(frames, up="z"):
    """The part of `inspect` that training and prediction run on a sample of a source of frames -> list of Row.

    Reads at most 24 frames. A row whose verdict is "WRONG" is a fault, and "not tested" what the sample cannot tell.
    """
    return geometry_rows(read_runs([frames], 24), up, num_pairs=40, num_points=200)[0]


def inspect(sources, up="z", num_frames=48, picture=None):
    """All tests on {title: source of frames}, a source per split -> rows.

    A source's `num_listed` classes are in its class list, all if it has no such attribute.
    """
    first = next(iter(sources.values()))
    names = class_names(first)
    runs = read_runs(sources.values(), num_frames)
    labels = {title: read_labels(source, num_frames) for title, source in sources.items()}
    if picture:
        contact_sheet(runs, picture)
    rows, world = geometry_rows(runs, up)
    fields = list(itertools.chain(*(own.fields for own in labels.values())))
    merged = Labels(sum(own.counts for own in labels.values()), fields, sum(own.borders for own in labels.values()))
    rows += label_rows(merged, names, getattr(first, "num_listed", len(names)), world)
    rows += instance_rows(fields, names) + folder_rows(sources.values())
    occurring = {title: {names[i] for i in np.flatnonzero(own.counts[1:])} for title, own in labels.items()}
    return rows + split_rows({title: frame_names(source) for title, source in sources.items()}, occurring)


def open_sources(args):
    """The splits that are named, or else all frames -> {title: source}."""
    splits = [path for path in (*args.split, args.train_split, args.val_split) if path] or [None]
    if args.data == "rooms":
        splits = ["train", "val"]
    options = {"classes": args.classes, "intrinsics": args.intrinsics, "labels": None, "unlisted": True,
               "rooms": (8, 4), "format": args.format, "pose": args.pose, "depth_scale": args.depth_scale}
    sources = {str(split or args.data): open_frames(args.data, split, **options) for split in splits}
    for source in sources.values():
        if hasattr(source, "description"):
            print(source.description)
    return sources


def pinhole(text):
    """An argparse type: "fx,fy,cx,cy" -> intrinsics (3, 3)."""
    try:
        fx, fy, cx, cy = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected fx,fy,cx,cy in pixels, got {text!r}") from None
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


# ------------------------------------------------------------------------------------------------------- the picture


def contact_sheet(runs, path):
    """Writes an image with a tile per run: two of its frames that are far apart, but see much of the same."""
    tiles = []
    for run in [run for run in runs if len(run) > 1][:12]:
        views, pairs = make_views([run])
        result = fit(views, pairs)
        far = np.abs(np.diff(pairs))[:, 0] * (result.overlap >= 0.7 * result.overlap.max())
        place = far.argmax()
        a, b = (run[i] for i in pairs[place])
        tiles.append(draw_pair(a, b, result.share(np.arange(len(pairs)) == place)))
    width, height = (max((tile.size[axis] for tile in tiles), default=1) + 10 for axis in range(2))
    sheet = Image.new("RGB", (min(3, max(1, len(tiles))) * width, max(1, -(-len(tiles) // 3)) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 3 * width, number // 3 * height))
    sheet.save(path)


def draw_pair(a, b, share):
    """Tile: frame b, darkened, with points of frame a in it, colored by how far b's depth is from theirs."""
    depth, intrinsics = small_depth(a, 40)
    v, u = np.nonzero(depth)
    points = unproject(np.stack([u, v], 1), depth[v, u], intrinsics, a["world2cam"])
    points = (points @ b["world2cam"][:3, :3].T + b["world2cam"][:3, 3]).T[None]
    uv, predicted = project(b["depth_intrinsics"], points)
    seen = look_up(b["depth"][None], np.zeros(1, np.int64), uv, 0)[0][0]
    error = np.abs(predicted[0] - seen) / np.maximum(seen, 1e-9)
    redness = np.clip(np.log(np.maximum(error, 1e-9) / 0.002) / np.log(25), 0, 1)  # of 0.2 % .. 5 %
    colors = 255 * np.clip(np.stack([2 * redness, 2 - 2 * redness, 0 * redness], 1), 0, 1)
    colors[seen == 0] = 200
    height, width = b["color"].shape[:2]
    image = Image.fromarray(b["color"] // 2 + 20).resize((480, round(480 * height / width)))
    draw = ImageDraw.Draw(image)
    places = project(b["intrinsics"], points)[0][0].T * 480 / width
    for (x, y), color in zip(places, colors.astype(int).tolist()):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=tuple(color))
    tile = Image.new("RGB", (480, image.height + 30), "white")
    tile.paste(image, (0, 30))
    caption = f"points of {a['name']} in {b['name']}: {share:.0%} confirmed\n" \
        "depth error: green 0.2 %, yellow 1 %, red 5 % and more; gray: no depth"
    ImageDraw.Draw(tile).text((2, 0), caption, fill="black")
    return tile


# -------------------------------------------------------------------------------------------------------- the command


def main(argv=None):
    """The command; returns its exit status, 1 if something is wrong."""
    parser = Parser("check.py", "Says what is wrong with a data set.")
    parser.add_argument("data", help="'rooms' (built in), a folder in ScanNet's exported 2D layout, or a capture")
    parser.add_argument("--split", nargs="+", default=[], help="files with one scene or scene/frame per line; "
                        "not given: all frames")
    parser.add_argument("--train-split", help="likewise")
    parser.add_argument("--val-split", help="likewise")
    parser.add_argument("--classes", help="class list, one 'id name' pair per line; not given: DATA/classes.txt")
    parser.add_argument("--up", type=checked_by(up_rotation), default="z", help="the world's up: an axis, "
                        "negative ones as --up=-y, or a vector, --up=0,-0.9,0.1")
    parser.add_argument("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="pixels, of all color images, for "
                        "frame-* files and captures that do not tell them")
    parser.add_argument("--format", choices=tuple(FORMATS), help="of a capture, see docs/captures.md")
    parser.add_argument("--pose", choices=POSES, help="direction and quaternion order of a capture")
    parser.add_argument("--depth-scale", type=positive_float, help="units of depth per meter of a capture")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="write a contact sheet of reprojected "
                        "points")
    parser.add_argument("--frames", type=positive_int, default=48, help="frames that are read for the poses, and "
                        "as many per split for the labels")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.picture and (args.picture.suffix != ".png" or not args.picture.absolute().parent.is_dir()):
        parser.error(f"--picture {args.picture}: expected the name of a .png file in a folder that exists")
    if args.data == "rooms" and (args.split or args.train_split or args.val_split or args.classes
                                 or args.intrinsics is not None):
        parser.error("the built-in rooms take no splits, --classes or --intrinsics")
    rows = inspect(open_sources(args), args.up, args.frames, args.picture)
    for row in sorted(rows, key=lambda row: row.verdict == "WRONG"):
        text = f"{row.verdict:<11} {row.test:<33} {row.words}"
        print(textwrap.fill(text, 120, subsequent_indent=46 * " ", break_long_words=False, break_on_hyphens=False))
    count = sum(row.verdict == "WRONG" for row in rows)
    print(f"\n{count} {'thing is' if count == 1 else 'things are'} wrong." if count else "\nNothing wrong was found.")
    return int(count > 0)


if __name__ == "__main__":
    run_command(main)
