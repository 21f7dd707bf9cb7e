# SPDX-License-Identifier: MIT
"""Visualizations: colors of labels and values, images of what a view shows, and colored clouds.

`visualizations` draws the views of some samples, `clouds` colors the points of a scene; a run shows both
in TensorBoard. Colors are in [0, 1].

Imports torch, numpy, PIL.
"""
import functools
import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

MAX_CLOUD = 20_000  # points

# ---------------------------------------------------------------------------------------------- colors

NONE = 0.4  # the gray of points without a label


def oklab(rgb):
    """sRGB colors (n, 3) in [0, 1] -> OKLab (n, 3), where distances are what an eye sees.

    Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cones = linear.new_tensor([[0.4122214708, 0.2119034982, 0.0883024619],
                                  [0.5363325363, 0.6806995451, 0.2817188376],
                                  [0.0514459929, 0.1073969566, 0.6299787005]])
    to_lab = linear.new_tensor([[0.2104542553, 1.9779984951, 0.0259040371],
                                [0.7936177850, -2.4285922050, 0.7827717662],
                                [-0.0040720468, 0.4505937099, -0.8086757660]])
    return (linear @ to_cones) ** (1 / 3) @ to_lab


@functools.cache
def distinct_colors():
    """(256, 3): ScanNet's wall and floor; then each as far as possible from gray and those before it."""
    levels = torch.linspace(0, 1, 12, dtype=torch.float64)
    rgb = torch.cartesian_prod(levels, levels, levels)
    lab = oklab(rgb)
    usable = lab[:, 0] > 0.42  # on a darkened image
    usable &= lab[:, 0] < 0.9  # on white
    usable &= lab[:, 1:].norm(dim=1) > 0.06  # no grays
    rgb, lab = rgb[usable], lab[usable]
    chosen = rgb.new_tensor([[174, 199, 232], [152, 223, 138]]) / 255
    gray = rgb.new_full((1, 3), NONE)
    taken = oklab(torch.cat([chosen, gray]))
    distance = torch.cdist(lab, taken).amin(1)
    while len(chosen) < 256:
        farthest = distance.argmax()
        chosen = torch.cat([chosen, rgb[farthest, None]])
        distance = distance.minimum((lab - lab[farthest]).norm(dim=1))
    return chosen.float()


def label_colors(labels):
    """labels (n,) -> (n, 3): the first are the easiest to tell apart, 256 differ; gray below 0."""
    colors = distinct_colors().to(labels.device)
    return colors[labels % 256].where(labels[:, None] >= 0, NONE)


def label_images(labels):
    """labels (..., H, W) integers, NumPy or torch -> (..., H, W, 3) uint8 NumPy, as `label_colors`."""
    labels = torch.as_tensor(labels)
    colors = (label_colors(labels.flatten().long()) * 255).round().byte()
    return colors.view(*labels.shape, 3).cpu().numpy()


def heat_colors(values):
    """values (n,) -> (n, 3): violet (0 and less) over green to yellow (1 and more); gray for NaN."""
    stops = values.new_tensor([[0.27, 0.00, 0.33],
                               [0.23, 0.32, 0.55],
                               [0.13, 0.57, 0.55],
                               [0.37, 0.79, 0.38],
                               [0.99, 0.91, 0.14]])
    position = values.nan_to_num().clamp(0, 1) * 4
    distance = position[:, None] - torch.arange(5, device=values.device)  # (n, stops)
    weights = (1 - distance.abs()).clamp(min=0)
    known = values.isfinite()[:, None]
    return (weights @ stops).where(known, NONE)


def near_far_colors(depth):
    """depth (n,) -> (n, 3) by rank, from red (near) to blue (far)."""
    rank = depth.argsort().argsort()
    far = rank / max(1, len(depth) - 1)
    return torch.stack([1 - far, far * 0.6, far], 1)


def pca_colors(feats):
    """feats (n, C >= 3) -> (n, 3) in [0, 1]: the three directions of most variance.

    Each is scaled to its 2nd to 98th percentile; everything is black if an entry is not finite.
    """
    if len(feats) == 0 or not feats.isfinite().all():
        return feats.new_zeros(len(feats), 3, dtype=torch.float32)
    feats = feats.float() - feats.float().mean(0)
    _, directions = torch.linalg.eigh(feats.T @ feats)  # ascending; pca_lowrank would draw random numbers
    directions = directions[:, -3:].flip(1)
    largest = directions.abs().argmax(0, keepdim=True)
    signs = directions.gather(0, largest).sign()  # so that colors do not flip between evaluations
    feats = feats @ (directions * signs)
    low = torch.quantile(feats, 0.02, dim=0)
    high = torch.quantile(feats, 0.98, dim=0)
    scaled = (feats - low) / (high - low).clamp(min=1e-6)
    return scaled.clamp(0, 1)


def joint_pca_colors(parts):
    """List of feats (n_i, C) -> list of (n_i, 3); they share one principal component analysis."""
    colors = pca_colors(torch.cat(parts))
    return colors.split([len(part) for part in parts])


def match_instances(truth, predicted, iou=0.25):
    """Numbers for predicted instances, so that each has the color of the true one that it finds.

    truth (n,) of any numbers, predicted (n,) numbered from 0 with the best first, both -1 = none. Returns
    (R,): the number of the true instance with the largest IoU above `iou` that no better one has taken;
    otherwise a new one.
    """
    R = int(predicted.max()) + 1 if len(predicted) else 0
    ids, column = truth.unique(return_inverse=True)
    num_ids = len(ids)
    found = predicted >= 0
    pairs = predicted[found] * num_ids + column[found]
    shared = torch.bincount(pairs, minlength=R * num_ids).double()
    shared = shared.view(R, num_ids)
    true_sizes = torch.bincount(column, minlength=num_ids)
    union = shared.sum(1, keepdim=True) + true_sizes - shared
    overlap = shared / union.clamp(min=1)
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


def renumber(labels, numbers):
    """labels (n,) -> numbers[labels] (n,); -1 stays."""
    return torch.cat([numbers, numbers.new_tensor([-1])])[labels]


# ---------------------------------------------------------------------------------------------- images

SHOWN_HEIGHT = 240  # pixels
LEGEND_WIDTH = 130
LEGEND_ROW = 15


def splat(image, uv, colors, radius=1):
    """A darkened copy of an image with a square painted around every point.

    image (3, H, W) in [0, 1], uv (n, 2) pixels, colors (n, 3). A square has 2 * radius + 1 pixels per side
    and is cut at the border of the image.
    """
    image = image * 0.4
    height, width = image.shape[1:]
    center_u, center_v = uv.round().long().unbind(1)
    offsets = range(-radius, radius + 1)
    for dv, du in itertools.product(offsets, offsets):
        u = center_u + du
        v = center_v + dv
        inside = (u >= 0) & (v >= 0)
        inside &= (u < width) & (v < height)
        image[:, v[inside], u[inside]] = colors[inside].T.to(image)
    return image


def splat_radius(num_points, image_size):
    """The radius with which the squares of all points together have the area of an image (H, W)."""
    side = math.sqrt(math.prod(image_size) / max(1, num_points))
    return min(6, max(0, round((side - 1) / 2)))


def legend(rows, size):
    """rows of (color (3,) or None, text) -> image (3, H, W) on white.

    If not all rows fit into size (H, W), the last one says how many are missing.
    """
    height, width = size
    room = height // LEGEND_ROW
    if len(rows) > room:
        missing = len(rows) - room + 1
        rows = [*rows[:room - 1], (None, f"and {missing} more")]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(LEGEND_ROW - 4)
    for i, (color, text) in enumerate(rows):
        left = 4
        top = i * LEGEND_ROW
        if color is not None:
            fill = tuple(round(255 * float(c)) for c in color)
            draw.rectangle([left, top + 2, left + 10, top + 12], fill=fill)
            left += 16
        draw.text((left, top + 7.5), text, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def class_rows(labels, class_names):
    """The legend of labels (n,): the classes that occur, the most frequent first; then "no label"."""
    numbers, counts = labels.unique(return_counts=True)
    numbers = numbers[counts.argsort(descending=True, stable=True)]
    pairs = zip(label_colors(numbers), numbers.tolist())
    rows = [(color, class_names[number]) for color, number in pairs if number >= 0]
    if -1 in numbers:
        rows.append(([NONE] * 3, "no label"))
    return rows


def shown_size(image):
    """image (3, H, W) in [0, 1] -> the same SHOWN_HEIGHT pixels high."""
    height, width = image.shape[1:]
    scale = SHOWN_HEIGHT / height
    size = SHOWN_HEIGHT, round(width * scale)
    resized = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)


def heat_image(colors, heats, names):
    """An image, and beside it the heat of each query on it, with their names -> (H', W', 3) uint8 NumPy.

    colors (H, W, 3) and heats (H, W, Q) in [0, 1], NumPy; names: Q texts. The scale is `heat_colors`'.
    """
    image = torch.from_numpy(colors).float().permute(2, 0, 1)
    gray = image.mean(0)
    layers = {"image": image}
    for q, name in enumerate(names):
        heat = torch.from_numpy(heats[:, :, q].flatten())
        painted = heat_colors(heat).T.view_as(image)
        layers[name] = 0.4 * gray + 0.6 * painted
    panels = []
    for name, layer in layers.items():
        panel = shown_size(layer)
        title = legend([(None, name)], (LEGEND_ROW, panel.shape[2]))
        panels.append(torch.cat([title, panel], 1))
    row = torch.cat(panels, 2)  # (3, H', W')
    pixels = (row * 255).round().byte()
    return pixels.permute(1, 2, 0).numpy()


def visualizations(views, class_names):
    """What some views of samples show -> {"sample/kind": image (3, H, W) in [0, 1] with its legend}.

    A view is a dict: name; image (3, H, W) in [0, 1]; of the N points of the sample seen (N,) bool,
    uv (N, 2) pixels, depth (N,), truth, prediction (N,) with -1 = none, fused (N, C). Optional:
    instances_truth (N,) with any numbers, instances (N,) numbered from 0 with the best first, both -1 = none,
    instance_labels and instance_scores (R,); gate (N,); clip_map (D, Hf, Wf); and other_view, the uv (n, 2)
    and colors (n, 3) of points of the second view. Features of all views share one principal component
    analysis. An instance that finds a true one has its color.
    """
    fused = joint_pca_colors([view["fused"][view["seen"]] for view in views])
    clip = [None] * len(views)
    if all("clip_map" in view for view in views):
        clip = joint_pca_colors([view["clip_map"].flatten(1).T for view in views])
    named = {}
    for view, *colors in zip(views, fused, clip):
        name = view["name"].replace("/", "_")
        for kind, image in sample_images(view, class_names, *colors).items():
            named[f"val_{name}/{kind}"] = image
    return named


def sample_images(view, class_names, fused_colors, clip_colors):
    """The images of one view; fused_colors (n, 3) of the points that it sees, clip_colors of its cells."""
    image = shown_size(view["image"])
    size = image.shape[1:]
    scale = SHOWN_HEIGHT / view["image"].shape[1]
    gray = image.mean(0, keepdim=True).expand(3, -1, -1)
    gray = (gray * 8).round() / 8  # a fifth of the bytes as PNG

    def paint(background, uv, colors):
        radius = splat_radius(len(uv), size)
        return splat(background, (uv + 0.5) * scale - 0.5, colors, radius)

    components = list(zip(torch.eye(3), ["component 1", "component 2", "component 3"]))
    layers = point_layers(view, class_names)
    layers["fused_pca"] = fused_colors, components
    uv = view["uv"][view["seen"]]
    shown = {kind: (paint(gray, uv, colors), rows) for kind, (colors, rows) in layers.items()}
    shown["image"] = image, []
    if clip_colors is not None:
        cells = clip_colors.T.unflatten(1, view["clip_map"].shape[1:])  # (3, Hf, Wf)
        cells = F.interpolate(cells[None], size=size, mode="nearest")[0]
        shown["clip_pca"] = cells, components
    if "other_view" in view:
        rows = [(None, "points of view 2"), (None, "on view 1")]
        shown["other_view"] = paint(image, *view["other_view"]), rows
    for kind, (painted, rows) in shown.items():
        margin = legend([(None, kind), *rows], (SHOWN_HEIGHT, LEGEND_WIDTH))
        shown[kind] = torch.cat([painted, margin], 2)
    return shown


def point_layers(view, class_names):
    """{kind: (colors (n, 3) of the points that a view sees, rows of the legend)}."""
    seen = view["seen"]
    depth = view["depth"][seen]
    near = depth.min() if len(depth) else 0
    far = depth.max() if len(depth) else 0
    rows = [([1, 0, 0], f"near, {near:.1f} m"),
            ([0, 0.6, 1], f"far, {far:.1f} m")]
    layers = {"input_points": (near_far_colors(depth), rows)}
    for kind in ("truth", "prediction"):
        labels = view[kind][seen]
        layers[kind] = label_colors(labels), class_rows(labels, class_names)
    if "instances" in view:
        layers |= instance_layers(view, class_names)
    if "gate" in view:
        texts = ["1: CLIP only", "0.75", "0.5", "0.25", "0: 3D only"]
        rows = list(zip(heat_colors(torch.linspace(1, 0, 5)), texts))
        layers["gate"] = heat_colors(view["gate"][seen]), rows
    return layers


def instance_layers(view, class_names):
    """The layers of true and of predicted instances."""
    seen = view["seen"]
    truth = view["instances_truth"][seen]
    true_rows = []
    for number in truth[truth >= 0].unique():
        label = view["truth"][seen][truth == number].mode().values
        name = class_names[label] if label >= 0 else "no label"
        true_rows.append((label_colors(number[None])[0], name))

    numbers = match_instances(view["instances_truth"], view["instances"])
    instances = view["instances"][seen]
    rows = []
    for r in instances[instances >= 0].unique():
        name = class_names[view["instance_labels"][r]]
        text = f"{name} {view['instance_scores'][r]:.2f}"
        rows.append((label_colors(numbers[r, None])[0], text))
    colors = label_colors(renumber(instances, numbers))
    return {"instances_truth": (label_colors(truth), true_rows),
            "instances": (colors, rows)}


# ---------------------------------------------------------------------------------------------- clouds


def clouds(views):
    """The points of the views of a scene -> {kind: (points (N, 3), colors (N, 3))}, without the ceiling.

    Of the fields of `visualizations`: points (N, 3), colors (N, 3) and camera_height, meters, z up. Optional:
    truth, prediction, instances_truth, instances, gate, fused, clip (N, D), the CLIP feature at each point,
    0 if no view sees it, and query_<name> (N,), the probability of a query. Points half a meter above the
    mean camera are left out, so that one can look in from above.
    """
    fields = {}
    for kind in views[0]:
        if all(kind in view for view in views):
            fields[kind] = [view[kind] for view in views]
    if "instances" in fields and "instances_truth" in fields:
        pairs = zip(fields["instances_truth"], fields["instances"])
        fields["instances"] = [renumber(found, match_instances(truth, found)) for truth, found in pairs]

    colors = {}
    for kind, values in fields.items():
        if kind in ("truth", "prediction", "instances_truth", "instances"):
            colors[kind] = label_colors(torch.cat(values))
        elif kind == "gate" or kind.startswith("query_"):
            colors[kind] = heat_colors(torch.cat(values))
        elif kind in ("fused", "clip"):
            colors[f"{kind}_pca"] = pca_colors(torch.cat(values))
        elif kind == "colors":
            colors[kind] = torch.cat(values)

    points = torch.cat(fields["points"])
    roof = sum(fields["camera_height"]) / len(views) + 0.5
    below = (points[:, 2] < roof).nonzero().squeeze(1)
    if len(below) > MAX_CLOUD:
        kept = torch.linspace(0, len(below) - 1, MAX_CLOUD)
        below = below[kept.long()]
    return {kind: (points[below], color[below]) for kind, color in colors.items()}
