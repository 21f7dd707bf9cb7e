# SPDX-License-Identifier: MIT
"""`python -m bench meaning`: what CLIP's meaning is worth on the built-in rooms, without a download.

    python -m bench meaning              everything; if stopped, it goes on from the last finished training
    python -m bench meaning --seeds 1    one training per setting

First it trains a small open_clip model on crops of rooms that no training of `train.py` ever sees,
with captions made from their class names and colors. It knows the objects of such rooms, as CLIP's
published weights know the world's. Then it asks this tower by text, and trains 3D networks with it,
with the same tower at random weights, and without.
Imports data, encoder, evaluate, fusion, losses, model, train, sources/, support/files and queries.
"""
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

import train
from data import PointDataset, collate
from encoder import ATTENTIONS, Enhanced2DEncoder
from evaluate import Scores
from fusion import BiFusionEncoder
from losses import ClipConsCriterion
from model import load_model
from sources.open import open_frames
from sources.rooms import CLASSES, RoomFrames
from support.files import write_whole
from support.queries import TEMPLATES, TextQueries

# ---------------------------------------------------------------------------------------------- tower

WEIGHTS = "open_clip_pytorch_model.bin"
ROOM_SEED = 1  # train.py draws all its rooms with seed 0
CROP = 96  # pixels
TOWER_CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": CROP, "patch_size": 16, "width": 128, "layers": 5, "head_width": 32,
                       "patch_dropout": 0.5},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
COLORS = {"black": (30, 30, 30), "gray": (128, 128, 128), "white": (235, 235, 235),
          "red": (190, 50, 50), "orange": (220, 130, 40), "brown": (110, 75, 45),
          "yellow": (210, 200, 70), "green": (70, 150, 70), "blue": (60, 100, 190),
          "purple": (120, 70, 160), "pink": (220, 130, 170)}


SIDES = (56, 200)  # pixels of a random crop; its patches then resemble those of a whole image at any distance
MOST_NAMED = 3
WHOLE = 0.5  # share of the crops that show one object as a whole


class Crops:
    """Square crops of frames, and captions that name objects in them. Walls, floors and ceilings count as objects.

    source: frames with labels and instances (see data.py).
    """

    def __init__(self, source, smallest=150):
        self.class_names = source.class_names
        self.images = []
        self.groups = []  # (H, W): the object that a pixel shows, 256 (label + 1) + instance + 1
        self.words = {}  # (frame, object): its color
        self.objects = [[] for _ in source.class_names]  # per class (frame, object, its pixels (n,))
        for index in range(len(source)):
            frame = source[index]
            group = 256 * (frame["label"] + 1) + frame["instance"] + 1
            self.images.append(Image.fromarray(frame["color"]))
            self.groups.append(group.astype(np.int16))
            for value in np.unique(group[group >= 256]):
                pixels = np.flatnonzero(group == value).astype(np.int32)
                color = frame["color"].reshape(-1, 3)[pixels].mean(0)
                self.words[index, value] = min(COLORS, key=lambda name: np.abs(color - COLORS[name]).sum())
                if len(pixels) >= smallest:
                    self.objects[value // 256 - 1].append((index, value, pixels))

    def cut(self, index, row, column, side):
        """A square around a place in a frame, moved inside -> (CROP, CROP, 3) uint8, and its part of `groups`."""
        height, width = self.groups[index].shape
        left = np.clip(column - side / 2, 0, width - side)
        top = np.clip(row - side / 2, 0, height - side)
        box = left, top, left + side, top + side
        crop = self.images[index].resize((CROP, CROP), Image.Resampling.BILINEAR, box)
        rows = slice(int(top), int(top + side))
        return np.asarray(crop), self.groups[index][rows, int(left):int(left + side)]

    def around(self, index, value, pixels):
        """`cut` of a whole object."""
        rows, columns = np.divmod(pixels, self.images[index].width)
        side = np.clip(max(np.ptp(rows), np.ptp(columns)), 40, SIDES[1])
        return self.cut(index, np.median(rows), np.median(columns), side)

    def draw(self, kind, rng):
        """A crop in which an object of a class is seen, and its caption -> (CROP, CROP, 3) uint8, str.

        Half show one object as a whole and name it, as most captions do; the others are random squares with
        several names, because then the embedding of a scene is that of its parts, down to the single patch.
        """
        is_whole = rng.random() < WHOLE
        index, value, pixels = self.objects[kind][rng.integers(len(self.objects[kind]))]
        if is_whole:
            crop, group = self.around(index, value, pixels)
        else:
            side = math.exp(rng.uniform(*np.log(SIDES)))
            row, column = np.divmod(rng.choice(pixels), self.images[index].width) + rng.uniform(-0.3, 0.3, 2) * side
            crop, group = self.cut(index, row, column, side)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        named = [value]
        if not is_whole:
            found, count = np.unique(group, return_counts=True)
            others = found[(found >= 256) & (found != value) & (count > 0.06 * group.size)]
            named += list(rng.permutation(others)[:rng.integers(MOST_NAMED)])
        names = []
        for other in rng.permutation(named):
            name = self.class_names[other // 256 - 1]
            is_colored = rng.random() < 0.5
            names.append(f"{self.words[index, other]} {name}" if is_colored else name)
        return crop, rng.choice(TEMPLATES).format(" and a ".join(dict.fromkeys(names)))

    def batch(self, size, rng):
        """Images (size, 3, CROP, CROP) in [0, 1] and captions, all classes equally likely."""
        seen = [kind for kind, objects in enumerate(self.objects) if objects]
        crops, captions = zip(*[self.draw(kind, rng) for kind in rng.choice(seen, size)])
        return to_images(crops), list(captions)


def to_images(crops):
    """Crops (H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def train_tower(folder, rooms=320, steps=3000, batch_size=64, lr=1.5e-3, seed=0):
    """Trains the small model with open_clip's own class and loss -> CPU seconds.

    `local-dir:folder` then names it, with weights "own".
    """
    start = time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TOWER_CONFIG, indent=1))
    name = f"local-dir:{folder}"
    crops = Crops(RoomFrames("train", rooms, 3, seed=ROOM_SEED))
    print(f"{sum(map(len, crops.objects))} objects of {rooms} rooms", flush=True)

    torch.manual_seed(seed)
    model = open_clip.create_model(name, load_weights=False)
    tokenize = open_clip.get_tokenizer(name)
    criterion = open_clip.ClipLoss()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    mean = torch.tensor(TOWER_CONFIG["preprocess_cfg"]["mean"]).view(3, 1, 1)
    std = torch.tensor(TOWER_CONFIG["preprocess_cfg"]["std"]).view(3, 1, 1)
    rng = np.random.default_rng(seed)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        images, captions = crops.batch(batch_size, rng)
        image_features, text_features, scale = model((images - mean) / std, tokenize(captions))
        loss = criterion(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        total += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.process_time() - start
            print(f"step {step + 1}: loss {total / 100:.3f}, {seconds:.0f} s", flush=True)
            total = 0.0
    torch.save(model.state_dict(), folder / WEIGHTS)
    return time.process_time() - start


def named_tower(folder, weights, image_size):
    """The trained tower for weights "own", the same with random weights for None."""
    return Enhanced2DEncoder(f"local-dir:{folder}", weights, image_size=image_size)


@torch.no_grad()
def zero_shot(folder, rooms=24, most=40):
    """Accuracy of the tower, averaged over the classes, on crops of rooms that it was not trained on."""
    crops = Crops(RoomFrames("test", rooms, 3, seed=ROOM_SEED))
    tower = named_tower(folder, "own", CROP)
    text = class_queries(tower).embedding[:len(CLASSES)]  # (K, E)
    accuracy = []
    for kind, objects in enumerate(crops.objects):
        if not objects:
            continue
        _, pooled = tower.encode(to_images([crops.around(*item)[0] for item in objects[:most]]))
        accuracy.append(((pooled @ text.T).argmax(1) == kind).double().mean().item())
    return statistics.mean(accuracy)


# ---------------------------------------------------------------------------------------------- text

SIZE = (240, 320)
VAL_ROOMS = 12
FRAMES_PER_ROOM = 4
NUM_POINTS = 2048


def class_queries(tower, source="clip"):
    """One query per class of the rooms."""
    return TextQueries(tower, ", ".join(CLASSES), source)


@functools.cache
def rooms_of(split, rooms, frames_per_room):
    """Rendered once per process."""
    return open_frames("rooms", split, rooms=(rooms, frames_per_room))


def miou_of(labels, truth):
    """labels, truth (P,) -> mIoU."""
    scores = Scores(len(CLASSES), with_instances=False)
    scores.update(labels, truth)
    return scores.compute()["miou"]


@torch.no_grad()
def dense_text_miou(tower, attention):
    """Text queries with CLIP's dense features alone, averaged over all frames of a room that see a point.

    Returns the mIoU of the largest cosine, and of the largest cosine less that name's mean over all points.
    """
    frames = rooms_of("val", VAL_ROOMS, FRAMES_PER_ROOM)
    dataset = PointDataset(frames, NUM_POINTS * FRAMES_PER_ROOM, SIZE, num_views=FRAMES_PER_ROOM)
    fusion = BiFusionEncoder(tower, nn.Identity())
    queries = class_queries(tower)
    cosines, truth = [], []
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        dense = tower.encode_dense(batch["images"][0], attention)
        cosines.append(queries.cosines(fusion, batch, None, dense)[:, :len(CLASSES)])
        truth.append(batch["labels"])
    cosines, truth = torch.cat(cosines), torch.cat(truth)
    return [miou_of(values.argmax(1), truth) for values in (cosines, cosines - cosines.mean(0))]


@torch.no_grad()
def feature_text_miou(model):
    """Text queries with a network's features, on the points that validate it -> {"fused", "3d"}: mIoU."""
    dataset = PointDataset(rooms_of("val", VAL_ROOMS, FRAMES_PER_ROOM), NUM_POINTS, SIZE)
    text = class_queries(model.fusion.encoder_2d, "fused").embedding[:len(CLASSES)]  # (K, C)
    answers = {"fused": [], "3d": []}
    truth = []
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        out = model.fusion(batch)
        answers["fused"].append((out["feat_fusion"] @ text.T).argmax(1))
        answers["3d"].append((out["feat_3d"] @ text.T).argmax(1))
        truth.append(batch["labels"])
    return {name: miou_of(torch.cat(labels), torch.cat(truth)) for name, labels in answers.items()}


# ---------------------------------------------------------------------------------------------- trainings

RECIPE = (f"--no-instances --num-points {NUM_POINTS} --val-rooms {VAL_ROOMS} --workers 0 --no-check "
          f"--frames-per-room {FRAMES_PER_ROOM} --log-every 100 --eval-every 1000").split()
DATA = {"2 rooms": "--rooms 2 --epochs 72", "4 rooms": "--rooms 4 --epochs 36", "8 rooms": "--rooms 8 --epochs 18",
        "32 rooms": "--rooms 32 --epochs 4",
        "32 rooms without labels": "--rooms 32 --epochs 4 --semantic-weight 0",
        "labels in 4 of 32 rooms": "--rooms 32 --epochs 7"}
LABELED = {"labels in 4 of 32 rooms": 4}
ISOLATED = "isolated"
TOWERS = {"3D baseline": "--no-clip", "random tower": "--isolate-clip --clip-pretrained none",
          ISOLATED: "--isolate-clip"}
LOSSES = {}
for variant in ("global, sigmoid, 0.01", "point, infonce, 0.1", "point, infonce, 1", "point, cosine, 0.1, centered"):
    target, form, weight, *_ = variant.split(", ")
    LOSSES[variant] = f"--clip-warmup=-1 --clip-weights 0,{weight} --clip-target {target} --clip-loss {form}"
STUDY = (("4 rooms", TOWERS),  # in the order that matters most
         ("32 rooms", TOWERS),
         ("32 rooms without labels", ("point, infonce, 1",)),
         ("labels in 4 of 32 rooms", (*TOWERS, "point, infonce, 0.1", "point, cosine, 0.1, centered")),
         ("8 rooms", TOWERS),
         ("2 rooms", TOWERS),
         ("4 rooms", tuple(LOSSES)),
         ("32 rooms", ("point, infonce, 0.1", "point, cosine, 0.1, centered")))


def hide_labels(source, labeled_rooms):
    """The same rooms, without labels in all but the first ones."""
    hidden = copy.copy(source)
    hidden.frames = source.frames[:labeled_rooms * FRAMES_PER_ROOM]
    for frame in source.frames[labeled_rooms * FRAMES_PER_ROOM:]:
        hidden.frames.append({**frame, "label": np.full_like(frame["label"], -1)})
    return hidden


class CenteredCriterion(ClipConsCriterion):
    """Point targets less their mean over a data set: what all of them share says nothing about a point.

    mean: (C,), of the dense features in the space of the fused ones.
    """

    def __init__(self, mean, **options):
        super().__init__(1.0, **options)
        self.mean = mean

    def forward(self, feat_fusion, clip_feat, batch=None, valid=None, seed=None):
        return super().forward(feat_fusion, clip_feat - self.mean, batch, valid, seed)


@torch.no_grad()
def mean_target(tower, frames):
    """Mean (C,) of the dense targets over all cells of all frames."""
    images = [np.asarray(frames.color(index)) for index in range(len(frames))]
    maps = [tower.project_dense_target(tower.encode_dense(to_images([image]))) for image in images]
    return torch.cat(maps).mean((0, 2, 3))


def training_run(argv, data, name, tower):
    """One training -> {"miou", "fused", "3d", "cpu_seconds"}: mIoU of the head, and of text queries."""
    start = time.process_time()
    args = train.parse_args(argv)
    criterion = None
    if "centered" in name:
        frames = rooms_of("train", args.rooms, FRAMES_PER_ROOM)
        criterion = CenteredCriterion(mean_target(tower, frames), variant=args.clip_loss)

    def opened(data_option, split, *labels, rooms, **options):
        frames = rooms_of(split, *rooms)
        return hide_labels(frames, LABELED[data]) if data in LABELED and split == "train" else frames

    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(mock.patch.object(train, "open_frames", opened))
        stack.enter_context(mock.patch.object(train, "visualize", lambda *_: None))
        record = {"miou": train.main([*argv, "--runs", runs], criterion)["miou"]}
        if not args.no_clip:
            model, _, _ = load_model(next(Path(runs).glob("*/last.pt")), args.device)
            record |= feature_text_miou(model)
    return {**record, "cpu_seconds": round(time.process_time() - start)}


def training_study(args, folder, finished, save):
    """Adds to `finished`, {data: {name: {seed: record}}}, what it does not hold with these options yet."""
    weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    tower = named_tower(folder, "own", SIZE)
    trainings = [(data, name) for data, names in STUDY for name in names]
    for (data, name), seed in itertools.product(trainings, range(args.seeds)):
        options = [*RECIPE, *f"{DATA[data]} {(TOWERS | LOSSES)[name]} --seed {seed}".split()]
        key = {"options": " ".join(options)}
        if not {"--no-clip", "--clip-pretrained"} & set(options):
            key["tower"] = weights
        records = finished.setdefault(data, {}).setdefault(name, {})
        if key.items() <= records.get(str(seed), {}).items():
            continue
        named = ["--clip-model", f"local-dir:{folder}"]
        if "--clip-pretrained" not in options:
            named += ["--clip-pretrained", "own"]
        argv = [*options, *named, "--device", args.device, "--cache", str(Path(args.out) / "cache")]
        records[str(seed)] = key | training_run(argv, data, name, tower)
        save()
        print(f"{data}, {name}, seed {seed}: {records[str(seed)]['miou']:.3f}", flush=True)


# ---------------------------------------------------------------------------------------------- the command


def spread(values):
    """"mean ± standard deviation (number)"."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation} ({len(values)})"


def print_trainings(finished):
    """A Markdown table, with all trainings that are finished."""
    for data, rows in finished.items():
        print(f"\n| {data}, `{DATA[data]}` | head mIoU | text mIoU, fused | text mIoU, 3D |")
        print("| --- | --- | --- | --- |")
        for name, records in rows.items():
            cells = [spread([record[key] for record in records.values() if key in record])
                     for key in ("miou", "fused", "3d")]
            print(f"| {name} | {' | '.join(cells)} |")


def run(args):
    """Trains the tower, asks it, and fills the table."""
    folder = Path(args.tower)
    file = Path(args.out) / "meaning.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else {}

    def save():
        write_whole(file, lambda part: part.write(json.dumps(results, indent=1).encode()))

    if not (folder / WEIGHTS).exists():
        results = {"tower_seconds": train_tower(folder)}
    if "text" not in results:
        results["zero_shot"] = zero_shot(folder)
        results["text"] = {attention: dense_text_miou(named_tower(folder, "own", SIZE), attention)
                           for attention in ATTENTIONS}
        results["text"]["random tower"] = dense_text_miou(named_tower(folder, None, SIZE), "naclip")
        save()
    if "tower_seconds" in results:
        print(f"tower: {results['tower_seconds']:.0f} CPU seconds")
    print(f"zero-shot accuracy on crops of other rooms: {results['zero_shot']:.3f}")
    for name, (plain, centered) in results["text"].items():
        print(f"text mIoU of dense features, {name}: {plain:.3f}, less each name's mean {centered:.3f}")
    finished = results.setdefault("trainings", {})
    training_study(args, folder, finished, save)
    print_trainings(finished)
