# SPDX-License-Identifier: MIT
"""`python -m bench picture`: image, truth and prediction of held-back frames of the built-in rooms, as in
the README; with --cloud FILE.ply, a merged cloud of predict.py from above: colors, classes, instances.

Imports model, predict, sources.rooms, sources.scannet and support.visualize.
"""
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model import load_model
from predict import predict_frames
from sources.rooms import RoomFrames
from sources.scannet import read_ply_vertices
from support.visualize import label_images

COLUMNS = 8  # of the legend
ROW = 24  # pixels


def legend(class_names, width):
    """The color of each class beside its name -> (H, width, 3) uint8."""
    height = -(-len(class_names) // COLUMNS) * ROW
    colors = label_images(np.arange(len(class_names)))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for i, name in enumerate(class_names):
        row, column = divmod(i, COLUMNS)
        x = column * (width // COLUMNS) + 4
        y = row * ROW + 5
        fill = tuple(colors[i].tolist())
        draw.rectangle([x, y, x + 14, y + 14], fill=fill)
        draw.text((x + 20, y - 2), name, fill="black", font=font)
    return np.asarray(image)


def from_above(points, colors, size=(400, 460)):
    """points (N, 3) meters with z up, colors (N, 3) uint8 -> (H, W, 3) uint8, an oblique parallel view."""
    angle = np.radians(35)
    c, s = np.cos(angle), np.sin(angle)
    right = np.array([c, s, 0])
    up = np.array([-s * c, c * c, s])
    towards = np.cross(right, up)  # the eye
    height, width = size
    u = points @ right
    v = -points @ up
    u -= (u.min() + u.max()) / 2
    v -= (v.min() + v.max()) / 2
    scale = 0.96 * min(width / np.ptp(u), height / np.ptp(v))
    u = (u * scale + width / 2).astype(int)
    v = (v * scale + height / 2).astype(int)
    image = np.full((height, width, 3), 255, np.uint8)
    order = np.argsort(points @ towards)  # near points are painted last
    for dv, du in np.ndindex(2, 2):
        column = np.clip(u + du, 0, width - 1)
        row = np.clip(v + dv, 0, height - 1)
        image[row[order], column[order]] = colors[order]
    return image


def draw_cloud(path):
    """Colors, classes and instances of a cloud of predict.py, without its ceiling, and a legend."""
    fields = dict.fromkeys(["x", "y", "z", "scalar_label", "scalar_instance"], ("f4",))
    fields |= dict.fromkeys(["red", "green", "blue"], ("u1",))
    cloud = read_ply_vertices(path, fields)
    header, _, _ = Path(path).read_bytes().partition(b"end_header")
    found = re.findall(r"^comment class (\d+) (.*)$", header.decode(), re.M)
    classes = {int(number): name for number, name in found}
    numbers = sorted(classes)
    names = [classes[number] for number in numbers]
    index = {number: i for i, number in enumerate(numbers)}
    labels = np.array([index.get(int(number), -1) for number in cloud["scalar_label"]])
    if "ceiling" in names:
        shown = labels != names.index("ceiling")
        cloud = cloud[shown]
        labels = labels[shown]

    channels = ("red", "green", "blue")
    points = np.stack([cloud[axis] for axis in "xyz"], 1)
    colors = np.stack([cloud[channel] for channel in channels], 1)
    instances = cloud["scalar_instance"].astype(np.int64) - 1  # 0 is none
    panels = [colors, label_images(labels), label_images(instances)]
    image = np.concatenate([from_above(points, panel) for panel in panels], 1)
    return np.concatenate([image, legend(names, image.shape[1])])


def run(args):
    """Writes image, truth and prediction of validation frames, one row per frame, or a cloud; a legend."""
    if args.cloud:
        out = args.out or "docs/cloud.png"
        Image.fromarray(draw_cloud(args.cloud)).save(out, optimize=True)
        print(f"{args.cloud}: {out}")
        return
    out = args.out or "docs/prediction.png"
    model, class_names, config = load_model(args.checkpoint, args.device)
    source = RoomFrames("val", 12, 1)
    frames = [source[i] for i in args.frames]
    rows = []
    for frame, result in zip(frames, predict_frames(model, frames, config)):
        panels = [frame["color"]]
        panels += [label_images(labels) for labels in (frame["label"], result["labels"])]
        rows.append(np.concatenate(panels, 1))
    image = np.concatenate([*rows, legend(class_names, rows[0].shape[1])])
    Image.fromarray(image).save(out, optimize=True)
    names = ", ".join(frame["name"] for frame in frames)
    print(f"image, truth and prediction of {names}: {out}")
