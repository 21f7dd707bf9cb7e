# SPDX-License-Identifier: MIT
"""Looks a data set over before anybody trains on it, and says what is wrong and how to fix it.

    python check.py DATA              ScanNet's exported 2D layout, a capture, or `rooms` (built in)
    python check.py DATA --train-split train.txt --val-split val.txt --up=-y --picture check.png
    python check.py DATA --intrinsics 585,585,320,240           a folder of frame-* files

Depth is reprojected into other frames of its scene, with the cameras as given and under alternatives:
poses inverted, other axes, another unit, the pose of the next frame, and so on
(support/reprojection.py). A fault is named if its alternative explains the frames as well as clean ones
are explained; if none does, "no known cause fits". What the sampled frames cannot decide is "not
tested". The exit status is 1 if something is wrong. docs/check.md lists the faults.

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

from data import (AXES, check_frame, depth_pose, depth_to_color, frame_names, pixel_fields, unproject,
                  up_rotation)
from sources.captures import FORMATS, POSES
from sources.open import open_frames
from sources.scannet import natural_key
from support.cache import content_key
from support.reprojection import (CLEAN, MARGIN, MIN_PAIRS, Judge, color_pixels, fit, look_up,
                                  make_views, off_center, project, sample, small_depth, small_gray)
from support.runtime import Parser, checked_by, positive_float, positive_int, run_command

TILT = 12  # degrees between the stated and the found up direction
SPACING = (0, 1, 3, 4, 10, 11, 30, 31)  # of the frames of a run: pairs that move little, and much
EDGE_SHIFT = 56  # pixels of images that are 160 wide, by which color edges may lie off depth edges
SAME_TOP = "and the largest depth is the same in all images"
VOID = r"(un(label+ed|annotated|known|defined|classified)|void|ignored?|none|no label|invalid)"
FIXES = {
    "refused": "Training refuses it, too.",
    "no depth": "Some frames need depth.",
    "8-bit depth": "Export 16-bit PNG with 1000 units per meter; what 8 bits lost cannot be restored.",
    "normalized depth": "Export depth in one unit, without stretching every image to its own range.",
    "far plane": "Store 0 where there is no reading.",
    "depth along the ray": "Divide depth by the length of the ray (x/z, y/z, 1) of its pixel.",
    "inverse depth": "Store depth, not its inverse or a disparity.",
    "units of depth": "Store depth with 1000 units per meter.",
    "units of poses": "Multiply the translations of the poses by this factor, so that they are meters.",
    "units": "Scale the poses (structure from motion has no unit) or the depth, whichever is not in "
             "meters.",
    "colors": "Export the images again.",
    "equal poses": "Export the pose of every frame.",
    "pose inverted": "The files hold world-to-camera matrices: store their inverses (camera to world).",
    "pose half inverted": "A camera-to-world matrix is [R, t] with t the camera's place in the world.",
    "quaternion order": "Read the quaternions in this order.",
    "OpenGL axes": "Multiply every camera-to-world matrix from the right by diag(1, -1, -1, 1).",
    "camera axes": "Multiply every camera-to-world matrix from the right by the matrix of these axes; if "
                   "the images lie on their side or head, turn them instead.",
    "images turned": "Turn the images, label images too (or the cameras about their axes).",
    "mirrored": "Undo the mirror S of the poses, by pose S, S pose or S pose S, or flip the images.",
    "color intrinsics": "Rescale intrinsic_color.txt to the size of the color images.",
    "depth intrinsics": "Rescale intrinsic_depth.txt to the size of the depth images.",
    "intrinsics of both": "Rescale intrinsic_color.txt and intrinsic_depth.txt to the images.",
    "focal length": "Correct the intrinsics, or scale them as the images were.",
    "cropped images": "Subtract from the principal point what was cut off on the left and above.",
    "color images turned": "Turn the color images as the depth images lie.",
    "color images mirrored": "Flip the color images.",
    "depth and color shifted in time": "Pair the two series of images by time stamp.",
    "poses off by one frame": "Pair poses and images by time stamp.",
    "depth and color cameras": "Give the extrinsics of the two cameras, or export registered depth.",
    "unconfirmed": "No known cause fits: look at --picture, and at where poses, intrinsics and depth come "
                   "from.",
    "up axis": "Pass the up direction as --up, with an equals sign.",
    "label ids": "Correct the class list, or renumber the label images.",
    "void class": "Name it `unlabeled` in the class list.",
    "resized labels": "Resize label images with nearest-neighbor interpolation.",
    "instance ids": "Write one id per object, from 1 on, and 0 for none.",
    "label folders": "Write DATA/classes.txt or pass --classes, and give every scene its label-filt.",
    "frames in both splits": "Remove them from one of the split files.",
}
UNITS = {  # factors of the translations, which poses or depth in another unit ask for
    0.001: "millimeters", 0.01: "centimeters",
    4: "4000 units per meter, as Matterport3D writes",
    5: "5000 units per meter, as TUM writes",
    6.5535: "6553.5 units per meter, as in NICE-SLAM's Replica",
    10: "10,000 units per meter", 0.1: "100 units per meter",
}


class Row(NamedTuple):
    """Outcome of one test; verdict: "ok", "WRONG", "not tested" or "note"."""
    test: str
    verdict: str
    words: str


def wrong(fault, words):
    """The Row of a fault: what was seen, and its fix."""
    return Row(fault, "WRONG", f"{words} {FIXES[fault]}")


def first_fault(rows):
    """The name of the first fault among rows, or None."""
    return next((row.test for row in rows if row.verdict == "WRONG"), None)


def some(names):
    """The first three of some names."""
    return ", ".join(names[:3])


# ----------------------------------------------------------------------------- depth and color alone


def known_depth(frame):
    """Meters (n,) of the pixels whose depth is known."""
    depth = frame["depth"]
    return depth[(depth > 0) & np.isfinite(depth)]


def median_depth(frames):
    """Median depth of frames that have some."""
    return np.median(np.concatenate([known_depth(frame)[::64] for frame in frames]))


def find_filler(frames):
    """A value of depth in many pixels of several images that no similar value comes near to.

    Returns it, or None, and the shares (F,) of the images that hold the most frequent value.
    """
    depth = np.concatenate([known_depth(frame)[::7] for frame in frames])
    values, counts = np.unique(depth, return_counts=True)
    most = counts.argmax()
    near = np.delete(counts[max(0, most - 10):most + 11], min(most, 10))
    shares = np.array([(frame["depth"] == values[most]).mean() for frame in frames])
    spread = (shares > 0.005).sum() >= max(2, 0.2 * len(frames))
    found = spread and shares.mean() > 0.002 and counts[most] > 20 * np.median(near)
    return (values[most] if found else None), shares


def filler_rows(frames):
    """Values that stand for "no reading" -> frames without them, and rows."""
    rows = []
    while frames and len(rows) < 3:
        value, shares = find_filler(frames)
        if value is None:
            break
        worst = frames[shares.argmax()]["name"]
        rows.append(wrong("far plane", f"{(shares > 0.005).sum()} of {len(frames)} depth images hold "
                          f"{value:.6g} m in many pixels, {shares.mean():.1%} of all ({worst}: "
                          f"{shares.max():.1%})."))
        cleaned = []
        for frame in frames:
            depth = np.where(frame["depth"] == value, 0, frame["depth"])
            cleaned.append({**frame, "depth": depth.astype(np.float32)})
        frames = [frame for frame in cleaned if len(known_depth(frame))]
    return frames, rows


def same_range(frames):
    """The largest depth if it is the same in all of at least 3 images, else None; and the smallest."""
    known = [known_depth(frame) for frame in frames]
    tops = np.array([depth.max() for depth in known])
    bottom = np.median([depth.min() for depth in known])
    middle = np.median(tops)
    same = len(frames) > 2 and (tops == middle).mean() > 0.9
    return (middle if same else None), bottom


def depth_rows(frames):
    """What the values of depth images tell -> frames with known depth, without fillers, and rows."""
    notes = []
    empty = [frame["name"] for frame in frames if len(known_depth(frame)) == 0]
    frames = [frame for frame in frames if frame["name"] not in empty]
    if empty:
        words = f"{len(empty)} in the sample, skipped: {some(empty)}"
        notes = [Row("frames without depth", "note", words)]
    if not frames:
        return [], [wrong("no depth", "No pixel of the sampled frames has depth.")]
    values = np.unique(np.concatenate([known_depth(frame)[::4] for frame in frames]))
    top = values[-1]
    median = median_depth(frames)
    coarse = np.diff(values).min(initial=top) > top / 260  # at most 256 levels
    is_8_bit = coarse and (len(values) >= 20 or top < 0.256)
    rows = []
    if not is_8_bit:
        frames, rows = filler_rows(frames)
        if not frames:
            return [], rows
    same_top, bottom = same_range(frames)
    if same_top and bottom < 0.02 * same_top:
        words = f"Every depth image reaches from nearly 0 to {same_top:.6g} m."
        rows.append(wrong("normalized depth", words))
    elif is_8_bit:
        words = f"Depth has only {len(values)} values, with median {median:.3f} m."
        rows.append(wrong("8-bit depth", words))
    elif not 0.05 < median < 100:
        rows.append(wrong("units of depth", f"The median depth is {median:.3f} m."))
    else:
        rows += flat_rows(frames) or [Row("depth", "ok", f"the median depth is {median:.2f} m")]
    return frames, rows + notes


def smooth_points(frame):
    """Points (h, w, 3) of a frame's depth camera, means of blocks, about 40 per row; NaN = unknown."""
    depth, intrinsics = small_depth(frame, 320)
    k = max(1, depth.shape[1] // 40)
    height, width = (size // k for size in depth.shape)
    blocks = (height, k, width, k, -1)
    depth = depth[:height * k, :width * k]
    v, u = np.indices(depth.shape)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    points = (rays * depth[..., None]).reshape(blocks).sum((1, 3))
    known = (depth > 0).reshape(blocks).sum((1, 3))
    return points / np.where(known > k * k / 2, known, np.nan)


def flatness(frame):
    """How flat the two largest planes of a frame are if depth is z, the length of the ray, or 1 / z.

    A plane's 1 / z is affine in x / z and y / z. Returns the mean log of the relative errors of 1 / z
    under these readings (3,), or None without depth.
    """
    points = smooth_points(frame).reshape(-1, 3)
    points = points[np.isfinite(points).all(1)]
    if len(points) < 100:
        return None
    depth = points[:, 2]
    rays = points / depth[:, None]
    triples = np.random.default_rng(0).integers(len(points), size=(600, 3))
    extent = np.abs(np.diff(rays[triples], axis=1)).max((1, 2))
    triples = triples[np.argsort(extent)[:150]]  # close together, so that many lie on one surface
    triples = triples[np.abs(np.linalg.det(rays[triples])) > 1e-5]
    costs = []
    for inverse in (1 / depth, np.linalg.norm(rays, axis=1) / depth, depth):
        planes = np.linalg.solve(rays[triples], inverse[triples][..., None])
        error = np.abs((rays @ planes)[..., 0] / inverse - 1)
        error = np.log(np.clip(error, 0.001, 0.05))  # (planes, n)
        first = error[error.mean(1).argmin()]
        costs.append(np.minimum(error, first).mean(1).min())
    return np.array(costs)


def flat_rows(frames):
    """A fault if the surfaces in most images are flat only if depth is something else than z."""
    costs = [flatness(frame) for frame in frames[::max(1, len(frames) // 10)]]
    costs = np.array([one for one in costs if one is not None])
    if len(costs) < 3:
        return []
    for column, fault, words in ((1, "depth along the ray", "the length of the ray"),
                                 (2, "inverse depth", "1 / z")):
        gains = costs[:, 0] - costs[:, column]
        flatter = (gains > 0).sum()
        if flatter > 0.8 * len(gains) and gains.mean() > 2 * MARGIN and costs[:, column].mean() < -4:
            words = f"In {flatter} of {len(gains)} images, surfaces are flat only if depth is {words}."
            return [wrong(fault, words)]
    return []


def color_rows(frames):
    """Means of the channels, and images that cannot be right."""
    means = np.array([frame["color"].mean((0, 1)) for frame in frames])
    ends = np.array([np.percentile(frame["color"][::4, ::4], (1, 99)) for frame in frames])
    red, green, blue = means.mean(0)
    words = f"mean red {red:.0f}, green {green:.0f}, blue {blue:.0f} of 255"
    plain = (np.ptp(ends, axis=1) < 8) | (means.max(1) < 5) | (means.min(1) > 250)
    if plain.mean() > 0.5:
        words = f"{plain.sum()} of {len(plain)} color images are black, white or of one color: {words}."
        return [wrong("colors", words)]
    if plain.any():
        words += f"; {plain.sum()} of {len(plain)} images are of one color"
    if blue > 1.1 * red:
        words += "; bluish: if wood and skin look blue, red and blue are swapped"
    return [Row("colors", "note", words)]


# ---------------------------------------------------------------------------------- depth beside color


def edge_maps(frame):
    """Where depth jumps, and how steep the color image is there, on a grid of 160 columns of depth."""
    depth, _ = small_depth(frame, 160)
    gray, intrinsics = small_gray(frame, 160)
    uv = color_pixels(frame, 160, intrinsics)
    seen = sample(gray[None], np.zeros(1, np.int64), uv[None])[0].reshape(depth.shape)
    steep = np.nan_to_num(np.log1p(np.hypot(*np.gradient(seen))))
    logs = np.log(np.where(depth > 0, depth, np.nan))
    jumps = np.fmax(*np.abs(np.gradient(logs))) > 0.02
    return jumps.astype(float), steep


def edge_correlation(frames):
    """Correlation of depth edges with color edges over shifts of the color image, summed over frames.

    Shifts in v and u are those of `peak`, of images that are 160 wide.
    """
    total = np.zeros((2 * EDGE_SHIFT + 1,) * 2)
    for frame in frames:
        jumps, steep = (image - image.mean() for image in edge_maps(frame))
        scale = jumps.std() * steep.std() * jumps.size
        if scale > 0:
            size = [extent + 2 * EDGE_SHIFT for extent in jumps.shape]
            spectrum = np.fft.rfft2(jumps, size).conj() * np.fft.rfft2(steep, size)
            shifted = np.roll(np.fft.irfft2(spectrum, size), (EDGE_SHIFT, EDGE_SHIFT), (0, 1))
            total += shifted[:len(total), :len(total)] / scale
    return total


def peak(correlation):
    """Shift (v, u) with the largest correlation."""
    return np.array(np.unravel_index(correlation.argmax(), correlation.shape)) - EDGE_SHIFT


def alignment_row(frames):
    """Whether color edges lie on depth edges. They do not if depth belongs to another camera."""
    test = "depth and color cameras"
    halves = edge_correlation(frames[::2]), edge_correlation(frames[1::2])
    both = sum(halves)
    clear = both.max() - both.mean() > 4 * both.std()
    if not clear or np.abs(peak(halves[0]) - peak(halves[1])).max() > 2:
        return Row(test, "not tested", "too few edges to tell")
    dv, du = peak(both)
    if np.hypot(du, dv) < 2 or both.max() < 1.5 * both[EDGE_SHIFT, EDGE_SHIFT]:
        return Row(test, "ok", "color edges lie on depth edges")
    focal = np.median([frame["intrinsics"][0, 0] / frame["color"].shape[1] for frame in frames])
    slope = np.hypot(du, dv) / 160 / focal
    side = "right" if du > 0 else "left"
    end = "down" if dv > 0 else "up"
    return wrong(test, f"Color edges lie off depth edges, by {abs(du) / 1.6:.1f} % of the width to the "
                 f"{side} and {abs(dv) / 1.6:.1f} % {end}, as if the color camera were turned by "
                 f"{np.degrees(np.arctan(slope)):.1f} degrees, or "
                 f"{1000 * slope * median_depth(frames):.0f} mm beside the depth camera.")


# ---------------------------------------------------------------------------------------------- cameras


def equal_pose_rows(runs, judge):
    """A fault if all poses of a scene are equal although its images are not."""
    equal = []
    for run in runs:
        poses = np.array([frame["world2cam"] for frame in run])
        if len(run) > 2 and np.ptp(poses, axis=0).max() < 1e-6:
            equal.append(run[0]["name"].split("/")[0])
    if not equal or judge.still.costs[1].mean() < np.log(0.02):
        return []
    words = f"All poses are equal, but the images are not, in {len(equal)} of {len(runs)} sampled scenes: "
    return [wrong("equal poses", f"{words}{some(equal)}.")]


def center_rows(views, frame, alone):
    """Principal points far from the middle of the images: a fault if the frames stand alone."""
    off = {"color": off_center(views, "intrinsics"), "depth": off_center(views, "depth_intrinsics")}
    far = [image for image in off if off[image] > 0.2]
    if far and alone:
        fault = "intrinsics of both" if len(far) > 1 else f"{far[0]} intrinsics"
        return [wrong(fault, f"{about_size(frame, fault)}.")]
    most = max(off.values())
    words = f"principal points lie {most:.0%} of the image off its middle: were the images cropped?"
    return [Row("principal point", "note", words)] if most > 0.1 else []


def about_size(frame, fault):
    """For which size of images intrinsics were made, and what size the images have."""
    image, field = ("depth", "depth_intrinsics")
    if fault == "color intrinsics":
        image, field = ("color", "intrinsics")
    u, v = 2 * frame[field][:2, 2] + 1
    height, width = frame[image].shape[:2]
    return f"The principal point is the middle of {u:.0f} x {v:.0f} pixels, and {image} has {width} x {height}"


def unit_row(found, judge, confirmed):
    """The Row of translations and depths that differ by a factor; if known, of the side that is wrong."""
    factor = float(np.exp(found.x))  # of the translations; depth times 1 / factor fits as well
    words = f"{confirmed}; with translations times {factor:.4g}, or depth times {1 / factor:.4g}, it is " \
        f"{found.share:.0%}"
    others = [judge.weigh_scale(found.x + step).gain for step in (-0.14, 0.14)]
    exact = max(others) < found.gain - 0.1  # not if the camera hardly moves
    for unit, name in UNITS.items():
        same = judge.weigh_scale(np.log(unit)).gain > found.gain - 0.15
        near = same and abs(np.log(factor / unit)) < (0.06 if exact else 0.3)
        if near and unit < 0.1 < judge.median_depth:
            return wrong("units of poses", f"{words}: the poses are in {name}, factor {unit}.")
        if near and exact and unit >= 0.1:
            return wrong("units of depth", f"{words}: as of {name}.")
    return wrong("units", f"{words}.")


def pose_rows(runs, up="z", num_pairs=96, num_points=300):
    """What reprojection between the frames of runs tells -> rows, a fault first."""
    views, pairs = make_views(runs)
    frames = list(itertools.chain(*runs))
    if len(pairs) > num_pairs:
        pairs = pairs[np.linspace(0, len(pairs) - 1, num_pairs).round().astype(int)]
    judge = Judge(views, pairs, num_points)
    count = judge.overlapping()
    confirmed = f"{judge.given.share():.0%} of the points are confirmed by a neighbor ({count} " \
        "overlapping pairs)"
    rows = equal_pose_rows(runs, judge)
    if rows:
        return rows

    upright = -views.world2cam[:, 1, :3].mean(0) @ up_rotation(up)[2] > 0.3
    tried = judge.weigh_all(upright)
    found = best_fit(tried)
    mirrored = (np.linalg.det(views.world2cam[:, :3, :3]) < 0).sum()
    noisy = judge.still.share() >= CLEAN and judge.given.cost() - judge.still.cost() > MARGIN
    if mirrored and not (found and found.fault == "mirrored"):
        words = f"{mirrored} of {len(frames)} rotations have determinant -1."
        rows.append(wrong("mirrored", words))
    elif found and found.fault == "units" and found.share < 0.97 and same_range(frames)[0]:
        rows.append(wrong("normalized depth", f"{confirmed}, {SAME_TOP}."))
    elif found and found.fault == "units":
        rows.append(unit_row(found, judge, confirmed))
    elif found:
        words = f"{confirmed}; with {found.words} it is {found.share:.0%}, and a pair fits better by " \
            f"{found.gain:.1f} log units."
        if "intrinsics" in found.fault:
            words += f" {about_size(frames[0], found.fault)}."
        rows.append(wrong(found.fault, words))
    elif not next(one for one in tried if one.fault == "cropped images").worse:
        rows += center_rows(views, frames[0], count < MIN_PAIRS)
    if not first_fault(rows):
        rows.append(alignment_row(frames))
    if noisy:
        words = "poses that do not move explain the frames better than their own"
        rows.append(Row("noise of poses", "note", words))
    elif not first_fault(rows) and count >= MIN_PAIRS:
        rows += unconfirmed_rows(judge, frames, confirmed, any(one.helps for one in tried))
    if not first_fault(rows):
        rows.append(Row("neighbors", "ok" if count >= MIN_PAIRS else "not tested", confirmed))
    return rows + other_rows(tried, rows)


def best_fit(tried):
    """Of alternatives that fit, the first one that gains about as much as the best; None without any."""
    fitting = [one for one in tried if one.fits]
    most = max((one.gain for one in fitting), default=0)
    return next((one for one in fitting if one.gain > most - 0.1), None)


def unconfirmed_rows(judge, frames, confirmed, helped):
    """A fault if the frames contradict each other, though no alternative fits.

    helped: an alternative is clearly better than what is given.
    """
    given = judge.given
    if given.share() < CLEAN:
        if same_range(frames)[0]:
            return [wrong("normalized depth", f"{confirmed}, {SAME_TOP}.")]
        worst = min(range(len(frames)), key=judge.share_of)
        words = f"{confirmed}, where clean captures reach {CLEAN:.0%}; of {frames[worst]['name']} it is " \
            f"{judge.share_of(worst):.0%}."
        return [wrong("unconfirmed", words)]
    if helped:
        words = f"{confirmed}, but other readings of the frames are better, and none is good."
        return [wrong("unconfirmed", words)]
    return []


def other_rows(tried, rows):
    """Rows of faults that were not found: their alternatives are worse, or cannot be told from the rest."""
    fault = first_fault(rows)
    others = []
    for test in sorted({one.fault for one in tried} - {row.test for row in rows}):
        own = [one for one in tried if one.fault == test]
        if fault:
            others.append(Row(test, "not tested", f"first fix: {fault}"))
        elif all(one.worse for one in own):
            loss = -max(one.gain for one in own)
            others.append(Row(test, "ok", f"explains a pair worse by {loss:.2f} log units"))
        else:
            others.append(Row(test, "not tested", "too little overlap or motion to tell"))
    return others


# ---------------------------------------------------------------------------------------------- up axis


def normals_of(frame):
    """World normals (n, 3) of smoothed points, towards the camera."""
    points = smooth_points(frame)
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(down, across)
    normals *= -np.sign((normals * points[1:-1, 1:-1]).sum(-1, keepdims=True))
    normals = normals[np.isfinite(normals).all(-1)]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    return normals @ depth_pose(frame)[:3, :3]


def world_up(frames):
    """Up (3,) of a scene: the most frequent normal near the cameras' mean up; zero if unclear."""
    cameras = -np.mean([frame["world2cam"][1, :3] for frame in frames], 0)
    normals = np.concatenate([normals_of(frame) for frame in frames])
    near = normals[normals @ cameras > 0.6 * np.linalg.norm(cameras)]
    if np.linalg.norm(cameras) < 0.5 or len(near) < 30:
        return np.zeros(3)
    votes = near[::len(near) // 100 + 1] @ near.T > 0.985  # within 10 degrees
    if votes.sum(1).max() < 0.05 * len(normals):
        return np.zeros(3)
    up = near[votes[votes.sum(1).argmax()]].mean(0)
    up = near[near @ up > 0.985 * np.linalg.norm(up)].sum(0)
    return up / np.linalg.norm(up)


def up_rows(runs, up):
    """The direction that the scenes agree on, beside the stated one -> rows, and the world's up or None."""
    found = [one for one in map(world_up, runs) if one.any()]
    mean = np.mean(found or [np.zeros(3)], 0)
    length = np.linalg.norm(mean)
    if length < 0.94:  # they do not agree within 20 degrees
        words = "the scenes do not agree" if found else "cameras and surfaces do not tell it"
        return [Row("up axis", "not tested", words)], None
    mean /= length
    angle = np.degrees(np.arccos(np.clip(mean @ up_rotation(up)[2], -1, 1)))
    vector = ",".join(f"{x:.3f}" for x in mean + 0.0)
    words = f"cameras and surfaces say {vector}, {angle:.0f} degrees from --up {up}"
    if angle < TILT:
        return [Row("up axis", "ok", words)], mean
    axis = max(AXES, key=lambda name: AXES[name] @ mean)
    is_axis = AXES[axis] @ mean > np.cos(np.radians(TILT))
    return [wrong("up axis", f"{words}: --up={axis if is_axis else vector}.")], mean


# ------------------------------------------------------------------------------------- labels and splits


class Labels(NamedTuple):
    """What a sample of label images holds."""
    counts: np.ndarray  # (1 + K,) pixels per class, ignored ones first
    borders: np.ndarray  # (2,) pixels between two classes, and those of them of a third class
    fields: list  # per frame, `data.pixel_fields` of every eighth pixel, and "scene"


def third_classes(label):
    """Pixels of a label image that lie between two classes, and those of them of a third class (2,)."""
    result = np.zeros(2, np.int64)
    for image in (label, label.T):
        before, middle, after = image[:-4], image[2:-2], image[4:]
        border = (before != after) & (np.minimum(np.minimum(before, middle), after) >= 0)
        third = border & (middle != before) & (middle != after)
        result += border.sum(), third.sum()
    return result


def class_names(source):
    """The names of a source's classes; if it has none, of as many as may occur."""
    return list(getattr(source, "class_names", ())) or [f"class {i}" for i in range(1000)]


def read_labels(source, num_frames):
    """Frames spread over a source -> Labels; instances only of frames that have some."""
    counts = np.zeros(1 + len(class_names(source)), np.int64)
    labels = Labels(counts, np.zeros(2, np.int64), [])
    places = np.linspace(0, len(source) - 1, min(len(source), num_frames))
    for place in places.round().astype(int):
        frame = source[place]
        if frame.get("label") is None:
            continue
        counts += np.bincount(frame["label"].ravel() + 1, minlength=len(counts))
        labels.borders[:] += third_classes(frame["label"])
        known, seen = depth_to_color(frame)
        fields = pixel_fields(frame, known[::8], seen[::8])
        fields["scene"] = frame["name"].split("/")[0]
        if frame.get("instance") is None:
            del fields["instances"]
        labels.fields.append(fields)
    return labels


def below_floor(fields, names, up):
    """Mean share of a frame's points that lie 20 cm below what is called floor; 0 without a floor."""
    below = []
    for own in fields if up is not None and "floor" in names else ():
        floor = own["labels"] == names.index("floor")
        if floor.sum() > 0.01 * len(floor):
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
    words = [f"ignored {ignored:.0%}"] + [f"{names[i]} {shares[i]:.0%}" for i in order[:8]]
    rows = [Row("labels", "note", ", ".join(words))]
    void = [names[i] for i in order if re.fullmatch(VOID, names[i].strip().lower())]
    if void:
        rows.append(wrong("void class", f"The class {void[0]!r} would be trained and scored."))

    border, third = labels.borders
    outside = [names[i] for i in order if i >= num_listed]
    below = below_floor(labels.fields, names, up)
    if third > 0.2 * border:
        words = f"On {third / border:.0%} of the borders between two classes lies a line of a third one."
        rows.append(wrong("resized labels", words))
    elif outside:
        words = f"{sum(shares[num_listed:]):.1%} of the pixels have ids that the class list lacks: "
        rows.append(wrong("label ids", f"{words}{', '.join(outside[:8])}."))
    elif below > 0.2:
        words = f"{below:.0%} of the points lie below what the class list calls floor"
        rows.append(wrong("label ids", f"{words}: ids are shifted or permuted."))
    else:
        rows.append(Row("label ids", "ok", f"{len(order)} of {num_listed} classes occur"))
    return rows


def instance_rows(fields, names, trusted=True):
    """Whether instance ids separate objects, from the fields of `read_labels`. trusted: the labels are right."""
    fields = [own for own in fields if "instances" in own]
    if not fields:
        return [Row("instance ids", "not tested", "the frames have no instances")]
    tables = []  # per frame, rows (label, instance, pixels)
    for own in fields:
        pairs = np.stack([own["labels"], own["instances"]], 1)[own["labels"] >= 0]
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        tables.append(np.column_stack([pairs, counts]))
    lost = trusted and lost_instances(np.concatenate(tables), names)
    tables = [table[table[:, 1] >= 0] for table in tables]
    labels, instances, counts = np.concatenate(tables).T
    if len(counts) == 0:
        return [wrong("instance ids", "No labelled pixel has an instance.")]

    mixed = 0  # pixels whose instance belongs, in their frame, mostly to another class
    for table in tables:
        for instance in np.unique(table[:, 1]):
            pixels = table[table[:, 1] == instance, 2]
            mixed += pixels.sum() - pixels.max()
    words = f"{mixed / counts.sum():.1%} of the pixels have an instance that is mostly of another class"
    stuff = {names[i] for i in labels} & {"wall", "floor", "ceiling"}
    one_to_one = len(set(zip(labels, instances))) == len(set(labels)) == len(set(instances))
    if mixed > 0.1 * counts.sum():
        return [wrong("instance ids", f"{words}.")]
    if stuff and one_to_one and len({own["scene"] for own in fields}) > 1:
        words = "Each class has the same instance id in all scenes: they are the labels again."
        return [wrong("instance ids", words)]
    if lost:
        return [wrong("instance ids", f"{lost}: objects with id 0 count as none.")]
    return [Row("instance ids", "ok", words)]


def lost_instances(table, names):
    """Words about pixels without instance in classes that have some; "" if they are few.

    table: rows (label, instance, pixels), instance -1 = none.
    """
    total = np.bincount(table[:, 0], table[:, 2], len(names))
    none = table[table[:, 1] < 0]
    without = np.bincount(none[:, 0], none[:, 2], len(names))
    things = without < 0.5 * total
    share = without[things].sum() / max(total[things].sum(), 1)
    if share > 0.01:
        return f"{share:.1%} of the pixels of classes with instances have none"
    empty = [names[i] for i in np.flatnonzero((total > 0) & (without == total))]
    empty = [name for name in empty if name not in ("wall", "floor", "ceiling")]
    if len(empty) == 1 and things.sum() >= 5:
        return f"Only the class {empty[0]} has no instances"
    return ""


def folder_rows(sources):
    """Files that were left out, and scenes whose labels training would miss."""
    rows = []
    has = {}  # scene folder: label-filt is there
    for source in sources:
        for folder in getattr(source, "folders", ()):
            has[folder] = (folder / "label-filt").is_dir()
        left_out = dict(getattr(source, "left_out", {}))
        if getattr(source, "num_skipped", 0):
            left_out["frames with a lost pose"] = source.num_skipped
        if left_out:
            words = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            rows.append(Row("left out", "note", words))
    lacking = [str(folder) for folder in has if not has[folder]]
    labelled = any(getattr(source, "class_names", ()) for source in sources)
    if any(has.values()) and not labelled:
        rows.append(wrong("label folders", "There are label-filt folders, but no class list."))
    elif any(has.values()) and lacking:
        words = f"{len(lacking)} of {len(has)} scenes have no label-filt: {some(lacking)}."
        rows.append(wrong("label folders", words))
    return rows


def split_rows(names, occurring):
    """Frames that two splits share, and classes that one lacks.

    names, occurring: {title: frames or class names}.
    """
    rows = []
    for (a, in_a), (b, in_b) in itertools.combinations(names.items(), 2):
        twice = sorted(set(in_a) & set(in_b), key=natural_key)
        row = Row("frames in both splits", "ok", f"none in {a} and {b}")
        if twice:
            row = wrong("frames in both splits", f"{a} and {b} share {len(twice)}: {some(twice)}.")
        rows.append(row)
    for title, own in occurring.items():
        lacking = sorted(set().union(*occurring.values()) - own)
        if lacking:
            words = f"not in the sample of {title}: {', '.join(lacking)}"
            rows.append(Row("classes of a split", "note", words))
    return rows


# ----------------------------------------------------------------------------------------------- running


def sample_runs(names, num_frames):
    """Runs of up to 8 frames of a scene, close and far in time, spread over a source.

    names: "scene/stem" in order. Returns lists of positions.
    """
    span = SPACING[-1] + 1 if len(names) > num_frames else len(SPACING)
    runs = []
    for _, scene in itertools.groupby(range(len(names)), lambda i: names[i].split("/")[0]):
        scene = list(scene)
        for start in range(0, len(scene), span):
            chunk = scene[start:start + span]
            order = dict.fromkeys((*SPACING, *range(span)))
            chosen = [chunk[i] for i in order if i < len(chunk)]
            runs.append(sorted(chosen[:min(len(SPACING), num_frames)]))
    runs = [run for run in runs if len(run) > 1] or runs
    count = num_frames * len(runs) // sum(map(len, runs))
    places = np.linspace(0, len(runs) - 1, max(1, min(len(runs), count)))
    return [runs[place] for place in places.round().astype(int)]


def read_runs(sources, num_frames):
    """`sample_runs` of all sources together -> lists of frames without labels, with their positions."""
    places = {}
    for source in sources:
        for index, name in enumerate(frame_names(source)):
            places[name] = (source, index)
    names = sorted(places, key=natural_key)
    runs = []
    for run in sample_runs(names, num_frames):
        frames = []
        for position in run:
            source, index = places[names[position]]
            frame = {**source[index], "position": position}
            frames.append({**frame, "label": None, "instance": None})
        runs.append(frames)
    return runs


def geometry_rows(runs, up="z", num_pairs=96, num_points=300):
    """What runs of frames tell without labels -> rows, and the world's up (3,) or None."""
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
    other = [row for row in rows if row.test != "far plane"]  # without those values the rest can be tested
    if first_fault(other) or not frames:
        return rows + [Row("poses and intrinsics", "not tested", f"first fix: {first_fault(rows)}")], None
    other = pose_rows(runs, up, num_pairs, num_points)
    if first_fault(other):
        return rows + other + [Row("up axis", "not tested", f"first fix: {first_fault(other)}")], None
    found, world = up_rows(runs, up)
    return rows + other + found, world


def quick_check(frames, up="z"):
    """The part of `inspect` that training and prediction run on a source of frames -> list of Row.

    Reads at most 24 frames. Verdict "WRONG" is a fault, "not tested" what the sample cannot tell.
    """
    return geometry_rows(read_runs([frames], 24), up, num_pairs=40, num_points=200)[0]


def unknowns(rows):
    """What the rows of `quick_check` could not tell, as sentences for a training or a prediction."""
    untested = {row.test for row in rows if row.verdict == "not tested"}
    if "neighbors" in untested:
        yield "too few frames overlap to tell whether the poses are right"
    elif "up axis" in untested:
        yield "cameras and surfaces do not tell which way is up: --up is taken as it is"


def check_cameras(dataset, store, up, data):
    """`quick_check` of a data set for training -> what could not be told, as sentences.

    ValueError if something is wrong. data: what --data names. store: a cache.Store that remembers which
    files were right.
    """
    signature = dataset.signature(range(len(dataset)))
    key = signature and content_key("cameras", signature)
    if key and store.get(key) is not None:
        return []
    frames = getattr(dataset.frames, "source", dataset.frames)  # as in the files, not turned upright
    rows = quick_check(frames, up)
    faults = [f"{row.test}: {row.words}" for row in rows if row.verdict == "WRONG"]
    if faults:
        raise ValueError(f"{data}: {' '.join(faults)} `python check.py {data} --up={up}` tells more; "
                         "--no-check insists")
    if key:
        store.put(key, b"right")
    return unknowns(rows)


def inspect(sources, up="z", num_frames=48, picture=None):
    """All tests on {title: source of frames}, one source per split -> rows.

    The first `num_listed` classes of a source are in its class list; without this attribute, all are.
    """
    first = next(iter(sources.values()))
    names = class_names(first)
    runs = read_runs(sources.values(), num_frames)
    labels = {title: read_labels(source, num_frames) for title, source in sources.items()}
    if picture:
        contact_sheet(runs, picture)
    rows, world = geometry_rows(runs, up)
    counts, borders, fields = zip(*labels.values())
    fields = list(itertools.chain(*fields))
    merged = Labels(sum(counts), sum(borders), fields)
    own = label_rows(merged, names, getattr(first, "num_listed", len(names)), world)
    rows += own + instance_rows(fields, names, trusted=not first_fault(own)) + folder_rows(sources.values())
    occurring = {}
    for title, own in labels.items():
        occurring[title] = {names[i] for i in np.flatnonzero(own.counts[1:])}
    return rows + split_rows({title: frame_names(sources[title]) for title in sources}, occurring)


def open_sources(args):
    """The splits that are named, or else all frames -> {title: source}."""
    splits = [path for path in (*args.split, args.train_split, args.val_split) if path] or [None]
    if args.data == "rooms":
        splits = ["train", "val"]
    sources = {}
    for split in splits:
        source = open_frames(args.data, split, args.classes, intrinsics=args.intrinsics, labels=None,
                             unlisted=True, rooms=(8, 4), format=args.format, pose=args.pose,
                             depth_scale=args.depth_scale)
        if hasattr(source, "description"):
            print(source.description)
        sources[str(split or args.data)] = source
    return sources


def pinhole(text):
    """An argparse type: "fx,fy,cx,cy" -> intrinsics (3, 3)."""
    try:
        fx, fy, cx, cy = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected fx,fy,cx,cy in pixels, got {text!r}") from None
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def contact_sheet(runs, path):
    """Writes an image of pairs of frames, one per run, that are far apart but see much of the same."""
    tiles = []
    for run in [run for run in runs if len(run) > 1][:12]:
        views, pairs = make_views([run])
        result = fit(views, pairs)
        near = result.overlap >= 0.7 * result.overlap.max()
        place = (np.abs(pairs[:, 0] - pairs[:, 1]) * near).argmax()
        share = result.share(np.arange(len(pairs)) == place)
        a, b = (run[i] for i in pairs[place])
        tiles.append(draw_pair(a, b, share))
    if not tiles:
        return
    width = max(tile.width for tile in tiles) + 10
    height = max(tile.height for tile in tiles) + 10
    rows = -(-len(tiles) // 3)
    sheet = Image.new("RGB", (min(3, len(tiles)) * width, rows * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 3 * width, number // 3 * height))
    sheet.save(path)


def draw_pair(a, b, share):
    """Frame b, darkened, with points of frame a in it, colored by how far b's depth is from theirs."""
    depth, intrinsics = small_depth(a, 40)
    v, u = np.nonzero(depth)
    points = unproject(np.stack([u, v], 1), depth[v, u], intrinsics, depth_pose(a))
    in_depth, in_color = (pose[:3, :3] @ points.T + pose[:3, 3:] for pose in (depth_pose(b), b["world2cam"]))
    uv, predicted = project(b["depth_intrinsics"], in_depth[None])
    seen = look_up(b["depth"][None], np.zeros(1, np.int64), uv)[0][0]
    error = np.maximum(np.abs(predicted[0] - seen) / np.maximum(seen, 1e-9), 1e-9)
    red = np.clip(np.log(error / 0.002) / np.log(25), 0, 1)  # of 0.2 % .. 5 %
    colors = 255 * np.clip(np.stack([2 * red, 2 - 2 * red, 0 * red], 1), 0, 1)
    colors[seen == 0] = 200

    height, width = b["color"].shape[:2]
    image = Image.fromarray(b["color"] // 2 + 20).resize((480, round(480 * height / width)))
    draw = ImageDraw.Draw(image)
    places = project(b["intrinsics"], in_color[None])[0][0].T * 480 / width
    for (x, y), color in zip(places, colors.astype(int).tolist()):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=tuple(color))
    tile = Image.new("RGB", (480, image.height + 30), "white")
    tile.paste(image, (0, 30))
    caption = f"points of {a['name']} in {b['name']}: {share:.0%} confirmed\n" \
        "depth error: green 0.2 %, yellow 1 %, red 5 % and more; gray: no depth"
    ImageDraw.Draw(tile).text((2, 0), caption, fill="black")
    return tile


def main(argv=None):
    """The command; returns its exit status, 1 if something is wrong."""
    parser = Parser("check.py", "Says what is wrong with a data set.")
    parser.add_argument("data", help="'rooms' (built in), a folder in ScanNet's exported 2D layout, or a "
                        "capture")
    parser.add_argument("--split", nargs="+", default=[], help="files with one scene or scene/frame per "
                        "line; not given: all frames")
    parser.add_argument("--train-split", help="likewise")
    parser.add_argument("--val-split", help="likewise")
    parser.add_argument("--classes", help="class list, one 'id name' pair per line; not given: "
                        "DATA/classes.txt")
    parser.add_argument("--up", type=checked_by(up_rotation), default="z", help="the world's up: an axis, "
                        "negative ones as --up=-y, or a vector, --up=0,-0.9,0.1")
    parser.add_argument("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="pixels, of all color "
                        "images, for frame-* files and captures that do not tell them")
    parser.add_argument("--format", choices=tuple(FORMATS), help="of a capture, see docs/captures.md")
    parser.add_argument("--pose", choices=POSES, help="direction and quaternion order of a capture")
    parser.add_argument("--depth-scale", type=positive_float, help="units of depth per meter of a capture")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="write a contact sheet of "
                        "reprojected points")
    parser.add_argument("--frames", type=positive_int, default=48, help="frames that are read for the "
                        "poses, and as many per split for the labels")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.picture and (args.picture.suffix != ".png" or not args.picture.absolute().parent.is_dir()):
        parser.error(f"--picture {args.picture}: expected the name of a .png file in a folder that exists")
    given = (args.split, args.train_split, args.val_split, args.classes, args.format)
    if args.data == "rooms" and (any(given) or args.intrinsics is not None):
        parser.error("the built-in rooms take no splits, --classes, --intrinsics or --format")

    rows = inspect(open_sources(args), args.up, args.frames, args.picture)
    for row in sorted(rows, key=lambda row: row.verdict == "WRONG"):
        text = f"{row.verdict:<11} {row.test:<33} {row.words}"
        print(textwrap.fill(text, 120, subsequent_indent=46 * " ", break_long_words=False,
                            break_on_hyphens=False))
    count = sum(row.verdict == "WRONG" for row in rows)
    print(f"\n{count} {'thing is' if count == 1 else 'things are'} wrong." if count else
          "\nNothing wrong was found.")
    return int(count > 0)


if __name__ == "__main__":
    run_command(main)
