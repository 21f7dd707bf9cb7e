# SPDX-License-Identifier: MIT
"""Visualizations: colors for labels and values, images of what a view shows, and colored clouds.

`visualizations` draws the views of some samples, `clouds` colors the points of a scene; `support/runlog.py` and the
tensorboard of a run show them. Colors are in [0, 1].

Imports torch, numpy, PIL.
"""
import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

MAX_CLOUD = 20_000  # points

# ---------------------------------------------------------------------------------------------- colors

NONE = 0.4  # the grey of points without a label


def oklab(rgb: Tensor) -> Tensor:
    """sRGB colours (n, 3) in [0, 1] -> OKLab (n, 3), where distances are what an eye sees.

    Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ linear.new_tensor([[0.4122214708, 0.2119034982, 0.0883024619],
                                        [0.5363325363, 0.6806995451, 0.2817188376],
                                        [0.0514459929, 0.1073969566, 0.6299787005]])
    return cones ** (1 / 3) @ cones.new_tensor([[0.2104542553, 1.9779984951, 0.0259040371],
                                                [0.7936177850, -2.4285922050, 0.7827717662],
                                                [-0.0040720468, 0.4505937099, -0.8086757660]])


@functools.cache
def distinct_colors():
    """(256, 3): ScanNet's colours of wall and floor, then each as far as possible from all before and from NONE's grey.
    """
    levels = torch.linspace(0, 1, 12, dtype=torch.float64)
    rgb = torch.cartesian_prod(levels, levels, levels)
    lab = oklab(rgb)
    # neither too dark for a darkened image nor too light for a white background, and no greys
    usable = (lab[:, 0] > 0.42) & (lab[:, 0] < 0.9) & (lab[:, 1:].norm(dim=1) > 0.06)
    rgb, lab = rgb[usable], lab[usable]
    chosen = rgb.new_tensor([[174, 199, 232], [152, 223, 138]]) / 255
    taken = oklab(torch.cat([chosen, rgb.new_full((1, 3), NONE)]))
    distance = torch.cdist(lab, taken).amin(1)
    while len(chosen) < 256:
        farthest = distance.argmax()
        chosen = torch.cat([chosen, rgb[farthest, None]])
        distance = distance.minimum((lab - lab[farthest]).norm(dim=1))
    return chosen.float()


def palette(count):
    """`count` RGB colours in [0, 1] -> (count, 3); the first ones are the easiest to tell apart, 256 differ."""
    return distinct_colors()[torch.arange(count) % 256]


def label_colors(labels: Tensor) -> Tensor:
    """labels (n,) -> (n, 3) of the palette; grey for labels below 0."""
    colors = distinct_colors().to(labels.device)[labels % 256]
    return colors.where(labels[:, None] >= 0, NONE)


def label_images(labels):
    """labels (..., H, W) integers, NumPy or torch -> (..., H, W, 3) uint8 NumPy, in the colours of `label_colors`."""
    labels = torch.as_tensor(labels)
    colors = label_colors(labels.flatten().long()) * 255
    return colors.round().byte().view(*labels.shape, 3).cpu().numpy()


def heat_colors(values: Tensor) -> Tensor:
    """values (n,) -> (n, 3), from violet (0 and less) over green to yellow (1 and more); grey for NaN."""
    stops = values.new_tensor([[0.27, 0.00, 0.33], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38],
                               [0.99, 0.91, 0.14]])
    position = values.nan_to_num().clamp(0, 1)[:, None] * (len(stops) - 1)
    weights = (1 - (position - torch.arange(len(stops), device=values.device)).abs()).clamp(min=0)  # (n, stops)
    return (weights @ stops).where(values.isfinite()[:, None], NONE)


def near_far_colors(depth: Tensor) -> Tensor:
    """depth (n,) -> (n, 3) by rank, from red (near) to blue (far)."""
    far = (depth.argsort().argsort() / max(1, len(depth) - 1))[:, None]
    return torch.cat([1 - far, far * 0.6, far], 1)


def pca_colors(feats: Tensor) -> Tensor:
    """feats (n, C >= 3) -> (n, 3) in [0, 1]: the three directions of most variance.

    Each is scaled to its 2nd to 98th percentile; everything is black if an entry is not finite.
    """
    if len(feats) == 0 or not feats.isfinite().all():
        return torch.zeros(len(feats), 3, device=feats.device)
    feats = feats.float() - feats.float().mean(0)
    _, directions = torch.linalg.eigh(feats.T @ feats)  # ascending; unlike pca_lowrank it draws no random numbers
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    feats = feats @ (directions * largest.sign())  # a sign of its own, so that colours do not flip between evaluations
    low = torch.quantile(feats, 0.02, dim=0)
    high = torch.quantile(feats, 0.98, dim=0)
    return ((feats - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def joint_pca_colors(parts):
    """List of feats (n_i, C) -> list of (n_i, 3): one principal component analysis, so that colours can be compared."""
    return pca_colors(torch.cat(parts)).split([len(part) for part in parts])


def match_instances(truth: Tensor, predicted: Tensor, iou=0.25) -> Tensor:
    """Numbers for predicted instances, so that one has the colour of the true one that it finds.

    truth (n,) of any numbers, predicted (n,) numbered from 0 with the best first, both -1 = none. Returns (R,): the
    number of the true instance with the largest IoU above `iou` that no better one has taken; otherwise a new one.
    """
    R = int(predicted.max()) + 1 if len(predicted) else 0
    ids, column = truth.unique(return_inverse=True)
    shared = torch.zeros(R, len(ids), dtype=torch.float64)
    has_instance = predicted >= 0
    pair = (predicted[has_instance], column[has_instance])
    shared.index_put_(pair, torch.ones(len(pair[0]), dtype=torch.float64), accumulate=True)
    true_sizes = torch.bincount(column, minlength=len(ids))
    overlap = shared / (shared.sum(1, keepdim=True) + true_sizes - shared).clamp(min=1)
    overlap[:, ids < 0] = 0
    new_number = max(ids.tolist(), default=-1) + 1
    numbers = []
    for r in range(R):
        best = overlap[r].argmax()
        if overlap[r, best] > iou:
            numbers.append(int(ids[best]))
            overlap[:, best] = 0
        else:
            numbers.append(new_number)
            new_number += 1
    return torch.tensor(numbers, dtype=torch.int64)


def renumber(labels: Tensor, numbers: Tensor) -> Tensor:
    """labels (n,) -> numbers[labels] (n,); -1 stays."""
    return torch.cat([numbers, numbers.new_tensor([-1])])[labels]


# ---------------------------------------------------------------------------------------------- images

SHOWN_HEIGHT = 240  # pixels
LEGEND_WIDTH = 130  # pixels


def splat(image: Tensor, uv: Tensor, colors: Tensor, radius=1) -> Tensor:
    """A darkened copy of an image with a square painted around every point.

    image (3, H, W) in [0, 1], uv (n, 2) pixels, colors (n, 3); a square has 2 * radius + 1 pixels a side and is cut at
    the border of the image.
    """
    image = image * 0.4
    h, w = image.shape[1:]
    u, v = uv.round().long().unbind(1)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            inside = (v + dy >= 0) & (v + dy < h) & (u + dx >= 0) & (u + dx < w)
            image[:, v[inside] + dy, u[inside] + dx] = colors[inside].T.to(image)
    return image


def splat_radius(num_points, image_size):
    """The radius with which the squares of so many points have together the area of an image of image_size (H, W)."""
    side = math.sqrt(image_size[0] * image_size[1] / max(1, num_points))
    return min(6, max(0, round((side - 1) / 2)))


def legend(rows, size, columns=1, pitch=15) -> Tensor:
    """rows of (color (3,) or None, text), column by column -> (3, H, W) on white; pitch: pixels from row to row.

    If not all rows fit into size (H, W), the last one says how many are missing.
    """
    height, width = size
    room = height // pitch * columns
    if len(rows) > room:
        rows = [*rows[:room - 1], (None, f"and {len(rows) - room + 1} more")]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(pitch - 4)
    for i, (color, text) in enumerate(rows):
        x = i // (height // pitch) * (width // columns) + 4
        y = i % (height // pitch) * pitch
        if color is not None:
            fill = tuple(round(255 * float(c)) for c in color)
            draw.rectangle([x, y + 2, x + pitch - 5, y + pitch - 3], fill=fill)
            x += pitch + 1
        draw.text((x, y + pitch / 2), text, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def class_rows(labels: Tensor, class_names):
    """The legend of labels (n,): the classes that occur, the most frequent first, and grey if there are points of none.
    """
    numbers, counts = labels.unique(return_counts=True)
    numbers = numbers[counts.argsort(descending=True, stable=True)].tolist()
    rows = [(palette(number + 1)[number], class_names[number]) for number in numbers if number >= 0]
    return [*rows, ([NONE] * 3, "no label")] if -1 in numbers else rows


def visualizations(views, class_names):
    """What the first views of some samples show -> {"sample/kind": image (3, H, W) in [0, 1] with a legend at its right}.

    A view is a dict: name; image (3, H, W) in [0, 1]; of the N points of the sample seen (N,) bool, uv (N, 2) pixels,
    depth (N,), truth, prediction (N,) with -1 = none, fused (N, C); optionally instances_truth (N,) with any numbers,
    instances (N,) numbered from 0 with the best first, both -1 = none, instance_labels and instance_scores (R,); gate
    (N,); clip_map (D, Hf, Wf); and other_view, the uv (n, 2) and colors (n, 3) of points of the second view. Features
    of all views share one principal component analysis. An instance that finds a true one has its colour.
    """
    fused = joint_pca_colors([view["fused"][view["seen"]] for view in views])
    clip = [None] * len(views)
    if all("clip_map" in view for view in views):
        clip = joint_pca_colors([view["clip_map"].flatten(1).T for view in views])
    named = {}
    for view, fused_colors, clip_colors in zip(views, fused, clip):
        for kind, image in sample_images(view, class_names, fused_colors, clip_colors).items():
            named[f"val_{view['name'].replace('/', '_')}/{kind}"] = image
    return named


def sample_images(view, class_names, fused_colors, clip_colors):
    """The images of one view of `visualizations`; fused_colors: of the points that it sees, clip_colors: of its cells."""
    scale = SHOWN_HEIGHT / view["image"].shape[1]
    size = SHOWN_HEIGHT, round(view["image"].shape[2] * scale)
    image = F.interpolate(view["image"][None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    grey = (image.mean(0, keepdim=True) * 8).round().expand(3, -1, -1) / 8  # a fifth of the bytes as PNG
    seen = view["seen"]
    uv, depth = view["uv"][seen], view["depth"][seen]
    named = {}

    def add(kind, shown, rows):
        rows = [(None, kind), *rows]
        named[kind] = torch.cat([shown, legend(rows, (SHOWN_HEIGHT, LEGEND_WIDTH))], 2)

    def add_points(kind, colors, rows, uv=uv, background=grey):
        add(kind, splat(background, (uv + 0.5) * scale - 0.5, colors, splat_radius(len(uv), size)), rows)

    add("image", image, [])
    near, far = (depth.min(), depth.max()) if len(depth) else (0, 0)
    add_points("input_points", near_far_colors(depth), [([1, 0, 0], f"near, {near:.1f} m"),
                                                        ([0, 0.6, 1], f"far, {far:.1f} m")])
    for kind in ("truth", "prediction"):
        add_points(kind, label_colors(view[kind][seen]), class_rows(view[kind][seen], class_names))
    if "instances" in view:
        truth = view["instances_truth"][seen]
        rows = []
        for number in truth[truth >= 0].unique():
            label = view["truth"][seen][truth == number].mode().values
            rows.append((label_colors(number[None])[0], class_names[label] if label >= 0 else "no label"))
        add_points("instances_truth", label_colors(truth), rows)
        numbers = match_instances(view["instances_truth"], view["instances"])
        instances = view["instances"][seen]
        rows = [(label_colors(numbers[r, None])[0],
                 f"{class_names[view['instance_labels'][r]]} {view['instance_scores'][r]:.2f}")
                for r in instances[instances >= 0].unique()]
        add_points("instances", label_colors(renumber(instances, numbers)), rows)
    if "gate" in view:
        rows = [(heat_colors(torch.tensor([share]))[0], f"{share:g}{text}")
                for share, text in ((1.0, ": CLIP only"), (0.75, ""), (0.5, ""), (0.25, ""), (0.0, ": 3D only"))]
        add_points("gate", heat_colors(view["gate"][seen]), rows)
    components = [(color, f"component {i}") for i, color in enumerate(torch.eye(3), 1)]
    add_points("fused_pca", fused_colors, components)
    if clip_colors is not None:
        cells = clip_colors.T.unflatten(1, view["clip_map"].shape[1:])  # (3, Hf, Wf)
        add("clip_pca", F.interpolate(cells[None], size=size, mode="nearest")[0], components)
    if "other_view" in view:
        other_uv, other_colors = view["other_view"]
        add_points("other_view", other_colors, [(None, "points of view 2"), (None, "on view 1")], other_uv, image)
    return named


# ---------------------------------------------------------------------------------------------- clouds


def clouds(views):
    """The points of several views of one scene -> {kind: (points (N, 3), colors (N, 3))}, z up, without the ceiling.

    Of the fields of `visualizations`: points (N, 3), colors (N, 3) and camera_height, metres; optionally truth,
    prediction, instances_truth, instances, gate, fused, clip (N, D), the CLIP feature at each point, 0 if no view sees
    it, and query_<name> (N,), the probability of a query. What lies half a metre above the mean camera is left out, so
    that one can look in from above.
    """
    fields = {kind: [view[kind] for view in views] for kind in views[0]
              if all(kind in view for view in views)}
    points = torch.cat(fields["points"])
    roof = sum(fields["camera_height"]) / len(views) + 0.5
    colors = {"colors": torch.cat(fields["colors"])}
    if "instances" in fields and "instances_truth" in fields:
        fields["instances"] = [renumber(instances, match_instances(truth, instances))
                               for truth, instances in zip(fields["instances_truth"], fields["instances"])]
    for kind in ("truth", "prediction", "instances_truth", "instances"):
        if kind in fields:
            colors[kind] = label_colors(torch.cat(fields[kind]))
    for kind in fields:
        if kind == "gate" or kind.startswith("query_"):
            colors[kind] = heat_colors(torch.cat(fields[kind]))
    for kind in ("fused", "clip"):
        if kind in fields:
            colors[f"{kind}_pca"] = pca_colors(torch.cat(fields[kind]))
    below = (points[:, 2] < roof).nonzero().squeeze(1)
    if len(below) > MAX_CLOUD:
        below = below[torch.linspace(0, len(below) - 1, MAX_CLOUD).long()]
    return {kind: (points[below], color[below]) for kind, color in colors.items()}
