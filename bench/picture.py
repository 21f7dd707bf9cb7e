# SPDX-License-Identifier: MIT
"""`python -m bench picture`: truth beside prediction on held-back frames of the built-in rooms, as in the README.

Imports model, predict, rooms and runlog.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model import load_model
from predict import predict_frames
from rooms import RoomFrames
from runlog import palette

LEGEND_ROW = 24  # pixels


def paint(labels, colors):
    """labels (H, W), -1 = none -> (H, W, 3) uint8."""
    return np.where((labels >= 0)[..., None], colors[labels], 40).astype(np.uint8)


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


def run(args):
    """Image, truth and prediction of two validation frames, one frame per row, and a legend."""
    model, class_names, config = load_model(args.checkpoint, args.device)
    colors = (palette(len(class_names)) * 255).byte().numpy()
    frames = RoomFrames("val", 12, 1)
    frames = [frames[i] for i in args.frames]
    rows = [np.concatenate([frame["color"], paint(frame["label"], colors), paint(result["labels"], colors)], 1)
            for frame, result in zip(frames, predict_frames(model, frames, config))]
    picture = np.concatenate([*rows, legend(class_names, colors, rows[0].shape[1])])
    Image.fromarray(picture).save(args.out, optimize=True)
    print(f"image, truth and prediction of {', '.join(frame['name'] for frame in frames)}: {args.out}")
