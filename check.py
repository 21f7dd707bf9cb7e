# SPDX-License-Identifier: MIT
"""Looks a data set over before anybody trains on it, and says what is wrong and how to fix it.

    python check.py DATA              ScanNet's exported 2D layout, a capture, or `rooms` (built in)
    python check.py DATA --train-split train.txt --val-split val.txt --up=-y --picture check.png
    python check.py DATA --intrinsics 585,585,320,240           a folder of frame-* files

The frames are read in other ways, too: poses inverted, other axes, another unit (support/reprojection.py).
A fault is named if its reading explains them as well as clean ones are explained; if none does, "no known
cause fits". The exit status is 1 if something is wrong. docs/check.md lists the faults.

Imports numpy, PIL, and of this repository data, sources and support.
"""
import itertools
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import (AXES, check_frame, depth_pose, depth_to_color, files_digest, frame_names, group_by_scene,
                  pixel_fields, unproject, up_rotation)
from sources.captures import FORMATS, POSES
from sources.open import open_frames
from sources.scannet import means_no_class, natural_key
from support.cache import content_key
from support.reprojection import (CLEAN, HINT, MARGIN, MIN_PAIRS, Judge, depth_and_gray, fit, look_up, make_views,
                                  off_center, project, small_depth)
from support.runtime import Parser, add_capture_options, checked_by, png_file, positive_int, run_command
from support.single import (EDGE_SHIFT, common_top, count_instances, edge_correlation, edge_match, find_filler,
                            find_up, flatness, known_values, lost_instances, mixed_pixels, peak,
                            share_below_floor, smooth_points, surface_normals, third_classes)

NUM_PAIRS = 96  # of frames that are compared
QUICK = 24  # frames that `quick_check` reads
CLEAN_PAIR = 0.7  # share of points that are confirmed if fewer than MIN_PAIRS pairs overlap, at least
TILT = 12  # degrees between the stated and the found up direction
SPACING = (0, 1, 3, 4, 10, 11, 30, 31)  # of the frames of a run: pairs that move little, and much
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
    "units": "Scale the poses (structure from motion has no unit) or the depth, whichever is not in meters.",
    "colors": "Export the images again.",
    "copied images": "Export the images again, each frame's own.",
    "equal poses": "Export the pose of every frame.",
    "pose inverted": "The files hold world-to-camera matrices: store their inverses (camera to world).",
    "pose half inverted": "A camera-to-world matrix is [R, t] with t the camera's place in the world.",
    "quaternion order": "Read the quaternions in this order.",
    "OpenGL axes": "Multiply every camera-to-world matrix from the right by diag(1, -1, -1, 1).",
    "camera axes": "Multiply every camera-to-world matrix from the right by the matrix of these axes, or turn the "
                   "images.",
    "images turned": "Turn the images, label images too (or the cameras about their axes).",
    "mirrored": "Undo the mirror S of the poses, by pose S, S pose or S pose S, or flip the images.",
    "color intrinsics": "Rescale intrinsic_color.txt to the size of the color images.",
    "depth intrinsics": "Rescale intrinsic_depth.txt to the size of the depth images.",
    "intrinsics of both": "Rescale intrinsic_color.txt and intrinsic_depth.txt to the images.",
    "focal length": "Correct the intrinsics, or scale them as the images were.",
    "cropped images": "Correct the principal point: subtract what was cut off on the left and above.",
    "color images turned": "Turn the color images as the depth images lie.",
    "color images mirrored": "Flip the color images.",
    "depth and color shifted in time": "Pair the two series of images by time stamp.",
    "poses off by one frame": "Pair poses and images by time stamp.",
    "depth and color cameras": "Give the extrinsics of the two cameras, or export registered depth.",
    "unconfirmed": "No known cause fits for sure: look at --picture, and where poses, intrinsics and depth come from.",
    "up axis": "Pass the up direction, which must be one for all scenes, as --up, with an equals sign.",
    "up axis or poses": "Check frames that overlap; if the poses are right, pass this direction as --up.",
    "label ids": "Correct the class list, or renumber the label images.",
    "void class": "Name it `unlabeled` in the class list.",
    "label images": "Pair label images with their frames, and turn them as the color images lie.",
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


def first_wrong(*faults):
    """The Row of the first of some faults (name, whether it is there, words), in a list; or []."""
    return next(([wrong(fault, words)] for fault, there, words in faults if there), [])


def first_fault(rows):
    """The name of the first fault among rows, or None."""
    return next((row.test for row in rows if row.verdict == "WRONG"), None)


def spread(items, count):
    """At most `count` of some items, spread over them."""
    places = np.linspace(0, len(items) - 1, min(len(items), count))
    return [items[place] for place in places.round().astype(int)]


def scene_of(frame):
    """The scene of a frame."""
    return frame["name"].split("/")[0]


def by_scene(items, name=scene_of):
    """All items, frames say, and those of each scene that has more than two, if it is not the only one -> lists."""
    scenes = {}
    for item in items:
        scenes.setdefault(name(item), []).append(item)
    return [items, *(own for own in scenes.values() if 2 < len(own) < len(items))]


def pose_range(frames):
    """The largest difference between numbers of the poses of frames."""
    return np.ptp([frame["world2cam"] for frame in frames], axis=0).max()


def some(names):
    """The first three of some names."""
    return ", ".join(names[:3])


# ------------------------------------------------------------------------------------- depth and color


def depth_of(frames):
    """The depth images of frames."""
    return [frame["depth"] for frame in frames]


def median_depth(frames):
    """Median depth of frames that have some."""
    return np.median(np.concatenate([known_values(image)[::64] for image in depth_of(frames)]))


def points_of(frame):
    """`single.smooth_points` of a frame."""
    return smooth_points(*small_depth(frame, 320))


def filler_rows(frames):
    """Values that stand for "no reading" -> frames without them, and rows."""
    rows = []
    while frames and len(rows) < 3:
        found = [(*find_filler(depth_of(part)), part) for part in by_scene(frames)]
        value, shares, part = next((one for one in found if one[0] is not None), found[0])
        if value is None:
            break
        worst = part[shares.argmax()]["name"]
        rows.append(wrong("far plane", f"{(shares > 0.005).sum()} of {len(part)} depth images hold "
                          f"{value:.6g} m in many pixels, {shares.mean():.1%} of all ({worst}: "
                          f"{shares.max():.1%})."))
        cleaned = [{**frame, "depth": np.where(frame["depth"] == value, 0, frame["depth"])} for frame in frames]
        frames = [frame for frame in cleaned if len(known_values(frame["depth"]))]
    return frames, rows


def count_levels(images):
    """The number of values of depth images if these are at most 256 levels, or 0."""
    values = np.unique(np.concatenate([known_values(image)[::4] for image in images]))
    step = np.diff(values).min(initial=values[-1])
    enough = len(values) >= 20 or values[-1] < 0.256 or len(values) > 5 and step > 0.1
    return len(values) if enough and step > values[-1] / 260 else 0


def depth_rows(frames):
    """What the values of depth images tell -> frames with known depth, without fillers, and rows."""
    blank = [frame["name"] for frame in frames if len(known_values(frame["depth"])) == 0]
    frames = [frame for frame in frames if frame["name"] not in blank]
    if not frames:
        return [], [wrong("no depth", "No pixel of the sampled frames has depth.")]
    words = f"{len(blank)} in the sample, skipped: {some(blank)}"
    notes = [Row("frames without depth", "note", words)] if blank else []
    num_levels = max(map(count_levels, map(depth_of, by_scene(frames))))
    rows = []
    if not num_levels:
        frames, rows = filler_rows(frames)
    if not frames:
        return [], rows
    return frames, rows + (range_rows(frames, num_levels) or flat_rows(frames)) + notes


def range_rows(frames, num_levels):
    """A fault if depth has impossible values. num_levels: most of `count_levels` of all frames and scenes."""
    medians = [median_depth(part) for part in by_scene(frames)]  # not of one image: that may be near
    top = common_top(depth_of(frames))
    bottom = np.median([known_values(image).min() for image in depth_of(frames)])
    return first_wrong(
        ("normalized depth", bottom < 0.02 * top,
         f"Every depth image reaches from nearly 0 to {top:.6g} m."),
        ("8-bit depth", num_levels, f"Depth has only {num_levels} values, in a scene at least; the median is "
         f"{medians[0]:.3f} m."),
        ("units of depth", min(medians) <= 0.05 or max(medians) >= 100,
         f"The median depth is {medians[0]:.3f} m; by scene, it is {min(medians):.3f} to {max(medians):.3f} m."))


def flat_rows(frames):
    """A fault if the surfaces in most images of a scene are flat only if depth is something else than z."""
    costs = [(scene_of(frame), flatness(points_of(frame))) for frame in frames[::max(1, len(frames) // 20)]]
    costs = [one for one in costs if one[1] is not None]
    for scene in dict.fromkeys([None, *(scene for scene, _ in costs)]):  # None: all of them
        own = np.array([cost for name, cost in costs if scene in (None, name)]).reshape(-1, 3)
        for column, fault, words in ((1, "depth along the ray", "the length of the ray"),
                                     (2, "inverse depth", "1 / z")):
            gains = own[:, 0] - own[:, column]
            flatter = (gains > 0).sum()
            enough = len(gains) > 2 and flatter > 0.8 * len(gains) and gains.mean() > 2 * MARGIN
            if enough and own[:, column].mean() < -4:
                return [wrong(fault, f"In {flatter} of {len(gains)} images{f' of {scene}' if scene else ''}, "
                              f"surfaces are flat only if depth is {words}.")]
    return [Row("depth", "ok", f"the median depth is {median_depth(frames):.2f} m")]


def color_rows(frames):
    """Means of the channels, and images that cannot be right."""
    means = np.array([frame["color"].mean((0, 1)) for frame in frames])
    ends = np.array([np.percentile(frame["color"][::4, ::4], (1, 99)) for frame in frames])
    red, green, blue = means.mean(0)
    words = f"mean red {red:.0f}, green {green:.0f}, blue {blue:.0f} of 255"
    scenes = group_by_scene(frame_names(frames)).items()
    bluish = [scene for scene, own in scenes if means[own, 2].mean() > 1.1 * means[own, 0].mean()]
    plain = (np.ptp(ends, axis=1) < 8) | (means.max(1) < 5) | (means.min(1) > 250)
    mostly = [scene for scene, own in scenes if len(own) > 2 and plain[own].mean() > 0.5]
    if plain.mean() > 0.2 or mostly:
        words = f"{plain.sum()} of {len(plain)} color images are black, white or of one color: {words}."
        return [wrong("colors", words)]
    if plain.any():
        words += f"; {plain.sum()} of {len(plain)} images are of one color"
    if bluish:
        words += f"; bluish in {some(bluish)}: if wood and skin look blue, red and blue are swapped"
    return [Row("colors", "note", words)]


def fingerprints(frame):
    """{field: a number that tells its image from others}; without images of one value."""
    images = {key: frame[key] for key in ("color", "depth", "label") if frame.get(key) is not None}
    varied = {key: image for key, image in images.items() if (image != image.ravel()[:1]).any()}
    return {key: hash(image.tobytes()) for key, image in varied.items()}


def copy_rows(frames):
    """Faults of images that are copies of each other, in other scenes or with other poses."""
    in_scene = Counter(scene_of(frame) for frame in frames)
    groups = {}
    for frame in frames:
        for key in fingerprints(frame).items():
            groups.setdefault(key, []).append(frame)
    rows = {}
    for (field, _), group in groups.items():
        scenes = {scene_of(frame) for frame in group}
        moved = pose_range(group) > 0.001
        most = 2 * len(group) > in_scene[scene_of(group[0])]  # not a few images that were stored twice
        if len(scenes) > 1 or moved and most:
            told = "in two scenes" if len(scenes) > 1 else "with other poses"
            words = f"{len(group)} of {len(frames)} sampled {field} images are one, {told}: "
            rows[field] = wrong("copied images", f"{words}{some([frame['name'] for frame in group])}.")
    return list(rows.values())


def alignment_row(frames):
    """Whether color edges lie on depth edges. They do not if depth belongs to another camera."""
    test = "depth and color cameras"
    images = [depth_and_gray(frame, 160) for frame in frames]
    halves = edge_correlation(images[::2]), edge_correlation(images[1::2])
    both = sum(halves)
    clear = both.max() - both.mean() > 5 * both.std()  # some of 12,769 shifts reach 4 by chance
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
    equal = [scene_of(run[0]) for run in runs if len(run) > 2 and pose_range(run) < 1e-6]
    if not equal or judge.still.costs[1].mean() < np.log(0.02):
        return []
    words = f"All poses are equal, but the images are not, in {len(equal)} of {len(runs)} sampled scenes: "
    return [wrong("equal poses", f"{words}{some(equal)}.")]


def center_rows(views, frame):
    """A fault of intrinsics that were made for another size of images: both coordinates are off alike."""
    off = {"color": off_center(views, "intrinsics"), "depth": off_center(views, "depth_intrinsics")}
    far = [image for image in off if np.abs(off[image]).min() > 0.2 and np.ptp(off[image]) < 0.1]
    if not far:
        return []
    fault = "intrinsics of both" if len(far) > 1 else f"{far[0]} intrinsics"
    return [wrong(fault, f"{about_size(frame, fault)}.")]


def about_size(frame, fault):
    """For which size of images intrinsics were made, and what size the images have."""
    image, field = ("depth", "depth_intrinsics")
    if fault == "color intrinsics":
        image, field = ("color", "intrinsics")
    u, v = 2 * frame[field][:2, 2] + 1
    height, width = frame[image].shape[:2]
    return f"The principal point is the middle of {u:.0f} x {v:.0f} pixels, and {image} has {width} x {height}"


def unit_row(found, judge, told):
    """The Row of translations and depths that differ by a factor; if known, of the side that is wrong."""
    factor = float(np.exp(found.x))  # of the translations; depth times 1 / factor fits as well
    words = f"{told}; with translations times {factor:.4g}, or depth times {1 / factor:.4g}, it is " \
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


def pose_rows(runs, up):
    """What reprojection between the frames of runs tells -> rows, a fault first."""
    views, pairs = make_views(runs)
    judge = Judge(views, pairs[spread(range(len(pairs)), NUM_PAIRS)])
    frames = list(itertools.chain(*runs))
    count = judge.overlapping()
    told = f"{judge.given.share():.0%} of the points are confirmed by a neighbor ({count} overlapping pairs)"
    rows = equal_pose_rows(runs, judge)
    if rows:
        return rows

    upright = -views.world2cam[:, 1, :3].mean(0) @ up_rotation(up)[2] > 0.3
    tried = judge.weigh_all(upright)
    rows = cause_rows(judge, tried, frames, told)
    if not rows:
        cropped = next(one for one in tried if one.fault == "cropped images")
        rows = center_rows(views, frames[0]) if count < MIN_PAIRS and not cropped.worse else []
        aligned = [alignment_row(part) for part in by_scene(frames)]
        rows += [row for row in aligned if row.verdict == "WRONG"][:1] or aligned[:1]
    if not first_fault(rows):
        rows += unconfirmed_rows(judge, frames, told, any(one.helps for one in tried))
    if not first_fault(rows) and not judge.noisy():
        rows += scene_rows(judge, tried, frames, upright)
    if first_fault(rows):
        return rows
    if any(row.test == "neighbors" for row in rows):
        return rows + other_rows(tried, rows)
    unclear = ""
    if judge.noisy():
        unclear = ", but the poses cannot be tested: poses that do not move explain the frames better"
    elif count < MIN_PAIRS:
        unclear = ", too few to tell whether the poses are right"
    return rows + [Row("neighbors", "not tested" if unclear else "ok", told + unclear), *other_rows(tried, rows)]


def scene_rows(judge, tried, frames, upright):
    """A fault of one scene only: where an alternative helps or points are lost, its pairs are weighed alone."""
    scenes = np.array([scene_of(frame) for frame in frames])
    noisy = []
    for scene in dict.fromkeys(scenes):
        own = scenes[judge.pairs[:, 0]] == scene
        gains = [one.gains[own] for one in tried if np.ndim(one.gains)]
        helped = any(gain[np.isfinite(gain)].sum() > HINT * own.sum() for gain in gains)
        suspicious = helped or judge.given.share(own) < 0.95
        if not suspicious or own.all() or own.sum() < MIN_PAIRS:
            continue
        part = Judge(judge.views, judge.pairs[own])
        if part.noisy():
            noisy.append(scene)
            continue
        told = f"{part.given.share():.0%} of the points of scene {scene} are confirmed by a neighbor " \
            f"({part.overlapping()} overlapping pairs)"
        again = part.weigh_all(upright)
        rows = cause_rows(part, again, frames, told) or unconfirmed_rows(
            part, frames, told, any(one.helps for one in again))
        if rows:
            return rows
    words = "have poses that cannot be tested: poses that do not move explain their frames better"
    return [Row("neighbors", "not tested", f"{some(noisy)} {words}")] if noisy else []


def cause_rows(judge, tried, frames, told):
    """The cause that explains the frames, if one does. told: words about the poses as given."""
    fitting = [one for one in tried if one.fits]
    most = max((one.gain for one in fitting), default=0)
    found = next((one for one in fitting if one.gain > most - 0.1), None)  # the first of about the best
    fault = found and found.fault
    mirrored = (np.linalg.det(judge.views.world2cam[:, :3, :3]) < 0).sum()
    if mirrored and fault != "mirrored":
        return [wrong("mirrored", f"{mirrored} of {len(frames)} rotations have determinant -1.")]
    if found is None:
        return []
    rivals = {one.fault for one in tried if one.fault != fault and found.rivaled_by(one)}
    if rivals:
        names = " or ".join([fault, *sorted(rivals)])
        return [wrong("unconfirmed", f"{told}; what is wrong may be: {names}. The frames cannot tell which.")]
    if fault == "units":
        is_stretched = found.share < 0.97 and common_top(depth_of(frames))
        return [stretched_row(told) if is_stretched else unit_row(found, judge, told)]
    words = f"{told}; with {found.words} it is {found.share:.0%}, and a pair fits better by " \
        f"{found.gain:.1f} log units."
    if "intrinsics" in fault:
        words += f" {about_size(frames[0], fault)}."
    return [wrong(fault, words)]


def stretched_row(told):
    """The fault of images that are stretched to their own ranges. told: words about the poses as given."""
    return wrong("normalized depth", f"{told}, and the largest depth is the same in all images.")


def unconfirmed_rows(judge, frames, told, helped):
    """A fault if the frames contradict each other, though no alternative fits.

    helped: an alternative is clearly better than what is given.
    """
    enough = judge.overlapping() >= MIN_PAIRS
    share = judge.given.share()
    moves = not judge.noisy()
    contradicted = moves and judge.overlapping() and share < (CLEAN if enough else CLEAN_PAIR)
    if contradicted and common_top(depth_of(frames)):
        return [stretched_row(told)]
    worst = min(range(len(frames)), key=judge.share_of)
    alike = judge.look_alikes(judge.given)
    return first_wrong(
        ("unconfirmed", contradicted, f"{told}, where clean captures reach {CLEAN:.0%}; "
         f"of {frames[worst]['name']} it is {judge.share_of(worst):.0%}."),
        ("unconfirmed", alike >= MIN_PAIRS,
         f"{alike} pairs of frames show the same, but with their poses they cannot."),
        ("unconfirmed", helped and enough and moves,
         f"{told}, but other readings of the frames are better, and none is good."))


def other_rows(tried, rows):
    """Rows of faults that were not found: their alternatives are worse, or cannot be told apart."""
    others = []
    for test in sorted({one.fault for one in tried} - {row.test for row in rows}):
        own = [one for one in tried if one.fault == test]
        row = Row(test, "not tested", "too little overlap or motion to tell")
        if all(one.worse for one in own):
            loss = -max(one.gain for one in own)
            row = Row(test, "ok", f"explains a pair worse by {loss:.2f} log units")
        others.append(row)
    return others


# ---------------------------------------------------------------------------------------------- up axis


def world_up(frames):
    """Up (3,) of a scene, from its surfaces and cameras; zero if unclear."""
    cameras = -np.mean([frame["world2cam"][1, :3] for frame in frames], 0)
    normals = [surface_normals(points_of(frame)) @ depth_pose(frame)[:3, :3] for frame in frames]
    return find_up(np.concatenate(normals), cameras)


def up_rows(runs, up, confirmed):
    """The direction that the scenes agree on, beside the stated one -> rows, and the world's up or None.

    confirmed: whether frames confirm each other's poses. If not, these may be what is wrong.
    """
    found = [(scene_of(run[0]), one) for run, one in zip(runs, map(world_up, runs)) if one.any()]
    mean = np.mean([one for _, one in found] or [np.zeros(3)], 0)
    length = np.linalg.norm(mean)
    for (a, up_a), (b, up_b) in itertools.combinations(found, 2):
        if confirmed and a != b and up_a @ up_b < 0.5:
            told = [",".join(f"{x:.2f}" for x in one + 0.0) for one in (up_a, up_b)]
            return [wrong("up axis", f"Surfaces and cameras of {a} say {told[0]}, of {b} {told[1]}.")], None
    if length < 0.94:  # they do not agree within 20 degrees
        words = "the scenes do not agree" if found else "cameras and surfaces do not tell it"
        return [Row("up axis", "not tested", words)], None
    mean /= length
    angle = np.degrees(np.arccos(np.clip(mean @ up_rotation(up)[2], -1, 1)))
    vector = ",".join(f"{x:.3f}" for x in mean + 0.0)
    words = f"cameras and surfaces say {vector}, {angle:.0f} degrees from --up {up}"
    if angle < TILT:
        return [Row("up axis", "ok", words)], mean
    if not confirmed:
        return [wrong("up axis or poses", f"{words}, and too few frames overlap to confirm the poses.")], None
    axis = max(AXES, key=lambda name: AXES[name] @ mean)
    is_axis = AXES[axis] @ mean > np.cos(np.radians(TILT))
    return [wrong("up axis", f"{words}: --up={axis if is_axis else vector}.")], mean


# ---------------------------------------------------------------------------------- labels and splits


def class_names(source):
    """The names of a source's classes; if it has none, of as many as may occur."""
    return list(getattr(source, "class_names", ())) or [f"class {i}" for i in range(1000)]


def read_labels(source, num_frames):
    """Frames spread over a source -> a dict per frame with labels: `pixel_fields` of every eighth pixel.

    Without "instances" if the frame has none; also "scene", "borders" (2,), see `third_classes`, and
    "counts" (1 + K,), pixels per class, ignored ones first.
    """
    num_classes = len(class_names(source))
    labels = []
    for place in spread(range(len(source)), num_frames):
        frame = source[place]
        if frame.get("label") is None:
            continue
        known, seen = depth_to_color(frame)
        fields = pixel_fields(frame, known[::8], seen[::8])
        if frame.get("instance") is None:
            del fields["instances"]
        counts = np.bincount(frame["label"].ravel() + 1, minlength=1 + num_classes)
        own = {"scene": scene_of(frame), "counts": counts, "borders": third_classes(frame["label"])}
        labels.append({**fields, **own})
    return labels


def label_image_rows(runs):
    """A fault if the borders of labels lie on edges of depth only if label images are turned, or a neighbor's."""
    readings = {"as they are": [], "flipped left to right": [], "flipped upside down": [],
                "turned by 180 degrees": [], "of the next frame": [], "of the previous frame": []}
    for run in runs:
        frames = [frame for frame in run if np.shape(frame.get("label")) == frame["color"].shape[:2]]
        for i, frame in enumerate(frames):
            label = frame["label"]
            next_one, previous = (frames[j % len(frames)]["label"] for j in (i + 1, i - 1))
            images = (label, label[:, ::-1], label[::-1], label[::-1, ::-1], next_one, previous)
            for matches, image in zip(readings.values(), images):
                gray = (image.astype(np.int64) * 97 % 251).astype(np.float32)[..., None]  # classes differ clearly
                matches.append(edge_match(*depth_and_gray({**frame, "color": gray}, 160)))
    given, *others = map(np.array, readings.values())
    for words, other in zip([*readings][1:], others):
        better = (other > given + 0.05).sum()
        if better > max(2, 0.8 * len(given)):
            return [wrong("label images", f"In {better} of {len(given)} frames, borders of labels lie on edges of "
                          f"depth only with the label images {words}.")]
    return []


def label_rows(labels, names, num_listed, up):
    """Label ids. names: of all classes; those from num_listed on are not in the class list.

    up: the world's up (3,), or None if it is unknown.
    """
    if not labels:
        return [Row("label ids", "not tested", "the frames have no labels")]
    counts = sum(own["counts"] for own in labels)
    constant = len(labels) > 2 and all(np.count_nonzero(own["counts"]) == 1 for own in labels)
    empty = first_wrong(
        ("label ids", not any(counts[1:]), "No pixel of the sampled label images has a label."),
        ("label ids", constant, "Every sampled label image holds only one value."))
    if empty:
        return empty
    ignored, *shares = counts / counts.sum()
    order = [i for i in np.argsort(-counts[1:], kind="stable") if shares[i] > 0]
    words = [f"ignored {ignored:.0%}"] + [f"{names[i]} {shares[i]:.0%}" for i in order[:8]]
    rows = [Row("labels", "note", ", ".join(words))]
    void = [names[i] for i in order if means_no_class(names[i])]
    rows += first_wrong(("void class", void, f"The class {some(void)!r} would be trained and scored."))
    parts = by_scene(labels, lambda own: own["scene"])
    borders = np.array([sum(own["borders"] for own in part) for part in parts])
    third = (borders[:, 1] / np.maximum(borders[:, 0], 100)).max()
    outside = [names[i] for i in order if i >= num_listed]
    below = max(share_below_floor(part, names, up) for part in parts)
    faults = first_wrong(
        ("resized labels", third > 0.2,
         f"On {third:.0%} of the borders between two classes, in a scene at least, lies a line of a third one."),
        ("label ids", outside, f"{sum(shares[num_listed:]):.1%} of the pixels have ids that the class list "
         f"lacks: {', '.join(outside[:8])}."),
        ("label ids", below > 0.2, f"{below:.0%} of the points lie below what the class list calls floor: "
         "ids are shifted or permuted."))
    fine = Row("label ids", "ok", f"{len(order)} of {num_listed} classes occur")
    return rows + (faults or [fine])


def instance_rows(labels, names, ids=(), trusted=True):
    """Whether instance ids separate objects, from what `read_labels` gives.

    ids: of the classes in the class list, if known. trusted: the labels are right.
    """
    fields = [own for own in labels if "instances" in own and any(own["counts"][1:])]
    if not fields:
        return [Row("instance ids", "not tested", "no labeled frame has instances")]
    tables = [count_instances(own["labels"], own["instances"]) for own in fields]
    lost = trusted and lost_instances(np.concatenate(tables), names, ids)
    tables = [table[table[:, 1] >= 0] for table in tables]
    labels, instances, counts = np.concatenate(tables).T
    if len(counts) == 0:
        return [wrong("instance ids", "No labeled pixel has an instance.")]

    mixed = sum(map(mixed_pixels, tables)) / counts.sum()
    words = f"{mixed:.1%} of the pixels have an instance that is mostly of another class"
    stuff = {names[i] for i in labels} & {"wall", "floor", "ceiling"}
    one_to_one = len(set(zip(labels, instances))) == len(set(labels)) == len(set(instances))
    again = stuff and one_to_one and len({own["scene"] for own in fields}) > 1
    return first_wrong(
        ("instance ids", mixed > 0.1, f"{words}."),
        ("instance ids", again,
         "Each class has the same instance id in all scenes: they are the labels again."),
        ("instance ids", lost, lost)) or [Row("instance ids", "ok", words)]


def folder_rows(sources):
    """Files that were left out, and scenes whose labels training would miss."""
    rows = []
    has = {}  # scene folder: label-filt is there
    for source in sources:
        has |= {folder: (folder / "label-filt").is_dir() for folder in getattr(source, "folders", ())}
        left_out = dict(getattr(source, "left_out", {}))
        left_out["frames with a lost pose"] = getattr(source, "num_skipped", 0)
        words = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        if words:
            rows.append(Row("left out", "note", words))
    lacking = [str(folder) for folder in has if not has[folder]]
    listed = any(getattr(source, "class_names", ()) for source in sources)
    words = f"{len(lacking)} of {len(has)} scenes have no label-filt: {some(lacking)}."
    return rows + first_wrong(
        ("label folders", any(has.values()) and not listed,
         "There are label-filt folders, but no class list."),
        ("label folders", any(has.values()) and lacking, words))


def split_rows(sources):
    """Frames that two splits {title: source} share."""
    rows = []
    for a, b in itertools.combinations(sources, 2):
        twice = set(frame_names(sources[a])) & set(frame_names(sources[b]))
        twice = sorted(twice, key=natural_key)
        words = f"{a} and {b} share {len(twice)}: {some(twice)}."
        fine = Row("frames in both splits", "ok", f"none in {a} and {b}")
        rows += first_wrong(("frames in both splits", twice, words)) or [fine]
    return rows


# -------------------------------------------------------------------------------------------- running


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
    return spread(runs, max(1, count))


def choose_runs(sources, num_frames):
    """`sample_runs` of all sources together -> lists of (source, index, position)."""
    places = {}
    for source in sources:
        for index, name in enumerate(frame_names(source)):
            places[name] = (source, index)
    names = sorted(places, key=natural_key)
    return [[(*places[names[position]], position) for position in run] for run in sample_runs(names, num_frames)]


def read_runs(sources, num_frames):
    """`choose_runs` -> lists of frames, with their positions."""
    return [[{**source[index], "position": position} for source, index, position in run]
            for run in choose_runs(sources, num_frames)]


def geometry_rows(runs, up="z"):
    """What runs of frames tell by color, depth and cameras -> rows, and the world's up (3,) or None."""
    frames = list(itertools.chain(*runs))
    try:
        for frame in frames:
            check_frame(frame)
    except ValueError as error:
        return [wrong("refused", f"{error}.")], None
    def hiding(rows):  # a far plane does not hide other faults: its values are taken out
        return first_fault(row for row in rows if row.test != "far plane")

    rows = copy_rows(frames)
    frames, found = depth_rows(frames)
    rows += found
    kept = {frame["name"]: frame for frame in frames}
    runs = [[kept[frame["name"]] for frame in run if frame["name"] in kept] for run in runs]
    runs = [run for run in runs if run]
    if runs:
        rows += color_rows(frames)
    if runs and not hiding(rows):
        rows += pose_rows(runs, up)
    if runs and not hiding(rows):
        found, world = up_rows(runs, up, any(row[:2] == ("neighbors", "ok") for row in rows))
        return rows + found, world
    return rows + [Row("other tests", "not tested", f"first fix: {first_fault(rows)}")], None


def quick_check(frames, up="z"):
    """The part of `inspect` that training and prediction run on a source of frames -> list of Row.

    Reads at most QUICK frames. Verdict "WRONG" is a fault, "not tested" what the sample cannot tell.
    """
    return geometry_rows(read_runs([frames], QUICK), up)[0]


def unknowns(rows):
    """What the rows of `quick_check` could not tell, as sentences for a training or a prediction."""
    if first_fault(rows):
        return  # to be fixed first
    untested = {row.test: row.words for row in rows if row.verdict == "not tested"}
    if "neighbors" in untested:
        yield untested["neighbors"]
        return
    if untested.pop("up axis", None):
        yield "cameras and surfaces do not tell which way is up: --up is taken as it is"
    if untested:
        yield f"too little overlap, motion or texture to test: {', '.join(untested)}"


def check_cameras(dataset, store, up, data):
    """`quick_check` of a data set for training -> what could not be told, as sentences.

    ValueError if something is wrong. data: what --data names. store: a cache.Store that remembers which
    files were right.
    """
    frames = getattr(dataset.frames, "source", dataset.frames)  # as in the files, not turned upright
    read = [index for run in choose_runs([frames], QUICK) for _, index, _ in run]
    signature = files_digest([(frames, read)], up)
    key = signature and content_key("cameras", signature)
    if key and store.get(key) is not None:
        return []
    rows = quick_check(frames, up)
    faults = [f"{row.test}: {row.words}" for row in rows if row.verdict == "WRONG"]
    if faults:
        raise ValueError(f"{data}: {' '.join(faults)} `python check.py {data} --up={up}` tells more; "
                         "--no-check insists")
    if key:
        store.keep(key, b"right")
    return unknowns(rows)


def inspect(sources, up="z", num_frames=48, picture=None):
    """All tests on {title: source of frames}, one source per split -> rows.

    The first `num_listed` classes of a source are in its class list; without this attribute, all are.
    """
    first = next(iter(sources.values()))
    names = class_names(first)
    runs = read_runs(sources.values(), num_frames)
    labels = [own for source in sources.values() for own in read_labels(source, num_frames)]
    if picture:
        contact_sheet(runs, picture)
    rows, world = geometry_rows(runs, up)
    found = label_rows(labels, names, getattr(first, "num_listed", len(names)), world)
    if not first_fault(rows + found):
        found += label_image_rows(runs)
    rows += found + instance_rows(labels, names, getattr(first, "class_ids", []), not first_fault(found))
    return rows + folder_rows(sources.values()) + split_rows(sources)


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
    width, height = np.max([tile.size for tile in tiles], 0) + 10
    sheet = Image.new("RGB", (min(3, len(tiles)) * width, -(-len(tiles) // 3) * height), "white")
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
    parser.add_argument("data", help="'rooms' (built in), or a folder in ScanNet's exported 2D layout or of captures")
    parser.add_argument("--split", nargs="+", default=[], help="files of lines `scene` or `scene/frame`; else all")
    parser.add_argument("--train-split", help="likewise")
    parser.add_argument("--val-split", help="likewise")
    parser.add_argument("--classes", help="list of lines `id name`; else DATA/classes.txt")
    parser.add_argument("--up", type=checked_by(up_rotation), default="z",
                        help="the world's up: an axis (negative ones as --up=-y) or a vector (--up=0,-0.9,0.1)")
    add_capture_options(parser, FORMATS, POSES)
    parser.add_argument("--picture", metavar="FILE.png", type=png_file, help="write a sheet of reprojected points")
    parser.add_argument("--frames", type=positive_int, default=48,
                        help="number that is read for the poses, and per split for the labels")
    args = parser.parse_args(argv)
    if args.data == "rooms" and (args.split or args.train_split or args.val_split or args.classes):
        parser.error("the built-in rooms take no splits and no --classes")

    rows = inspect(open_sources(args), args.up, args.frames, args.picture)
    for row in sorted(rows, key=lambda row: row.verdict == "WRONG"):
        text = f"{row.verdict:<11} {row.test:<33} {row.words}"
        print(textwrap.fill(text, 120, subsequent_indent=46 * " ", break_long_words=False,
                            break_on_hyphens=False))
    count = sum(row.verdict == "WRONG" for row in rows)
    print(f"\n{count} {'thing is' if count == 1 else 'things are'} wrong." if count else
          f"\n{'; '.join(['Nothing wrong was found', *unknowns(rows)])}.")
    return int(count > 0)


if __name__ == "__main__":
    run_command(main)
