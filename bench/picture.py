# SPDX-License-Identifier: MIT
"""`python -m bench picture`: truth beside prediction on held-back frames of the built-in rooms, as in the README; with
--cloud FILE.ply, a merged cloud of predict.py from above: colours, classes and instances.

Imports model, predict, rooms, runlog and scannet.
"""
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model import load_model
from predict import predict_frames
from sources.rooms import RoomFrames
from support.visualize import label_images
from sources.scannet import read_ply_vertices

LEGEND_ROW = 24  # pixels


def legend(class_names, colors, width, columns=8):
    """The colour of every class beside its name -> (rows * LEGEND_ROW, width, 3) uint8."""
    rows = -(-len(class_names) // columns)
    image = Image.new("RGB", (width, rows * LEGEND_ROW), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for i, name in enumerate(class_names):
        x = i % columns * (width // columns) + 4
        y = i // columns * LEGEND_ROW + 5
        draw.rectangle([x, y, x + 14, y + 14], fill=tuple(int(c) for c in colors[i]))
        draw.text((x + 20, y - 2), name, fill="black", font=font)
    return np.asarray(image)


def from_above(points, colors, size=(400, 460)):
    """points (N, 3) metres with z up, colors (N, 3) uint8 -> (H, W, 3) uint8, seen obliquely and without perspective."""
    azimuth, tilt = np.radians(35), np.radians(35)
    right = np.array([np.cos(azimuth), np.sin(azimuth), 0])
    up = np.array([-np.sin(azimuth) * np.cos(tilt), np.cos(azimuth) * np.cos(tilt), np.sin(tilt)])
    towards = np.cross(right, up)  # the eye
    u, v = points @ right, -points @ up
    height, width = size
    scale = 0.96 * min(width / np.ptp(u), height / np.ptp(v))
    u = ((u - (u.min() + u.max()) / 2) * scale + width / 2).astype(int)
    v = ((v - (v.min() + v.max()) / 2) * scale + height / 2).astype(int)
    image = np.full((height, width, 3), 255, np.uint8)
    order = np.argsort(points @ towards)  # near points are painted last
    for dy, dx in np.ndindex(2, 2):
        image[np.clip(v[order] + dy, 0, height - 1), np.clip(u[order] + dx, 0, width - 1)] = colors[order]
    return image


def draw_cloud(path):
    """Colours, classes and instances of a cloud of predict.py, without its ceiling, and a legend."""
    fields = {name: ("f4",) for name in ("x", "y", "z", "scalar_label", "scalar_instance")}
    cloud = read_ply_vertices(path, fields | {name: ("u1",) for name in ("red", "green", "blue")})
    head = Path(path).read_bytes().partition(b"end_header")[0].decode()
    classes = {int(number): name for number, name in re.findall(r"^comment class (\d+) (.*)$", head, re.M)}
    names = [classes[number] for number in sorted(classes)]
    index = {number: i for i, number in enumerate(sorted(classes))}
    labels = np.array([index.get(int(number), -1) for number in cloud["scalar_label"]])
    shown = labels != (names.index("ceiling") if "ceiling" in names else len(names))
    cloud, labels = cloud[shown], labels[shown]
    instances = cloud["scalar_instance"].astype(np.int64) - 1  # 0 is none

    points = np.stack([cloud[axis] for axis in "xyz"], 1)
    colors = np.stack([cloud[channel] for channel in ("red", "green", "blue")], 1)
    panels = [from_above(points, c) for c in (colors, label_images(labels), label_images(instances))]
    image = np.concatenate(panels, 1)
    return np.concatenate([image, legend(names, label_images(np.arange(len(names))), image.shape[1])])


def run(args):
    """Image, truth and prediction of two validation frames, one frame per row, and a legend; or a cloud."""
    out = args.out or f"docs/{'cloud' if args.cloud else 'prediction'}.png"
    if args.cloud:
        Image.fromarray(draw_cloud(args.cloud)).save(out, optimize=True)
        print(f"{args.cloud}: {out}")
        return
    model, class_names, config = load_model(args.checkpoint, args.device)
    colors = label_images(np.arange(len(class_names)))
    frames = RoomFrames("val", 12, 1)
    frames = [frames[i] for i in args.frames]
    rows = [np.concatenate([frame["color"], label_images(frame["label"]), label_images(result["labels"])], 1)
            for frame, result in zip(frames, predict_frames(model, frames, config))]
    picture = np.concatenate([*rows, legend(class_names, colors, rows[0].shape[1])])
    Image.fromarray(picture).save(out, optimize=True)
    print(f"image, truth and prediction of {', '.join(frame['name'] for frame in frames)}: {out}")
