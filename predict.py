# SPDX-License-Identifier: MIT
"""A trained network on frames: labels for every pixel of known depth, merged clouds, text queries, and scores.

    python predict.py runs/NAME/best.pt --data DIR --out OUT
    python predict.py runs/NAME/best.pt --data DIR --out OUT --text "chair, red sofa | couch, something to sit on"
    python predict.py runs/NAME/best.pt --data PHONE --out OUT           a capture, see docs/captures.md
    python predict.py runs/NAME/best.pt --data cloud.ply --out OUT       a mesh or cloud alone
    python predict.py --data PHONE --out OUT --text "chair, mug"         CLIP alone, without a training
    python predict.py runs/NAME/best.pt --data DIR --scans SCANS --out OUT --submission scannet20

docs/predict.md describes what it writes. In a notebook:

    from model import load_model
    from predict import predict_frames
    from sources.open import open_frames
    model, class_names, config = load_model("runs/NAME/best.pt")
    for result in predict_frames(model, open_frames("DATA", labels=False), config):
        print(result["name"], result["labels"].shape)

The file reads from top to bottom: one sample, frames, scans, files, and the command.

Imports siblings: check, data, decoder, encoder, evaluate, fusion, model, superpoints, sources/ and support/.
"""
import json
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from check import quick_check, unknowns
from data import (PER_POINT, PER_VIEW, PointDataset, SceneDataset, camera_height, check_frame, collate,
                  depth_to_color, frame_names, group_by_scene, to_device, up_rotation, upright)
from decoder import instances_from_logits, paint_instances
from encoder import ATTENTIONS, Enhanced2DEncoder, read_config
from evaluate import Scores, format_metrics
from fusion import BiFusionEncoder
from model import load_model, make_batch
from sources.captures import FORMATS, POSES
from sources.open import open_cloud, open_frames, open_scans
from sources.scannet import load_classes
from superpoints import oversegment
from support.checkpoint import read_checkpoint
from support.clouds import NO_END, SceneMerger, write_ply, write_submission
from support.distributed import setup
from support.queries import NEUTRAL, SOURCES, TEMPLATES, TextQueries, field_names, parse_queries
from support.runlog import RunLog
from support.runtime import (Parser, add_capture_options, checked_by, configure_device, image_size,
                             loader_options, number_in, run_command, worker_count, writable_folder)
from support.visualize import clouds, heat_image, label_colors

RANDOM_CLIP = "CLIP IS RANDOMLY INITIALISED: the answers to --text mean nothing"
INSTANCE_SCORE = 0.3  # instances with a lower score are not written
MAX_POINTS = 2 ** 20  # of a scan that the network sees at once, in some 8 GB

# ------------------------------------------------------------------------------------------- one sample


def prepare(sample, batch_options, num_points, num_views, at_once, plan=None):
    """A sample of which every point is used -> the batch of `model.make_batch`, with "draws".

    Every point is in exactly one of several random draws of at most num_points per num_views, which
    are independent scenes for the network, as in training. They depend on the number of points alone.
    An entry of "draws" holds at_once of them: "rows" (n,), "batch" (n,), their "count" and, if the 3D
    encoder plans (see `make_batch`), "plan". A worker may do this, as it needs no network.
    """
    batch = make_batch([sample], **batch_options)
    n = len(batch["points"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    draw_size = max(1, num_points * len(sample["world2cam"]) // num_views)
    draws = order.tensor_split(-(-n // draw_size))
    batch["draws"] = []
    for start in range(0, len(draws), at_once):
        some = draws[start:start + at_once]
        sizes = torch.tensor([len(draw) for draw in some])
        owner = torch.arange(len(some)).repeat_interleave(sizes)
        draw = {"rows": torch.cat(some), "batch": owner, "count": len(some)}
        if plan is not None:
            draw["plan"] = plan({"coords": batch["coords"][draw["rows"]], "batch": owner})
        batch["draws"].append(draw)
    return batch


def preparation(model, config):
    """`prepare` as a function of a sample, for a Segmenter and the options that it was trained with."""
    return partial(prepare, batch_options=model.batch_options(training=False),
                   num_points=config["num_points"], num_views=config["num_views"],
                   at_once=8 if model.device.type == "cpu" else sys.maxsize,  # a CPU reuses small buffers
                   plan=getattr(model.fusion.encoder_3d, "plan", None))


def fuse_draws(fusion, batch, names=("feat_fusion",)):
    """Named outputs of `fusion` for a batch of `prepare` with encoded images -> {name: (N, C)}, gate
    (N,).
    """
    n = len(batch["points"])
    feats = {}
    gate = batch["points"].new_empty(n, dtype=torch.float32)
    for draw in batch["draws"]:
        rows = draw["rows"]
        part = dict(draw)
        for key in ("points", "coords", "features"):
            part[key] = batch[key][rows]
        for key in batch.keys() & set(PER_VIEW):
            part[key] = batch[key].expand(draw["count"], *batch[key].shape[1:])
        fused = fusion(part)
        for name in names:
            if name not in feats:
                feats[name] = fused[name].new_empty(n, fused[name].shape[1])
            feats[name][rows] = fused[name]
        gate[rows] = fused["alpha"].float().mean(1)
    return feats, gate


def known_fields(batch, up):
    """What is known of the points of a batch without a network. up: of the data's own world."""
    points = batch["points"]
    if up != "z":
        points = torch.from_numpy((points.numpy() @ up_rotation(up)).astype(np.float32))
    height = camera_height(batch["world2cam"][0]).mean()
    return {"points": points, "colors": batch["features"][:, :3], "truth": batch["labels"],
            "truth_instances": batch["instances"], "camera_height": height}


@torch.no_grad()
def predict_batch(model, batch, config, queries=None, instance_score=INSTANCE_SCORE):
    """The network's answers for all points of one sample, a dict of tensors on the CPU.

    batch: of `prepare`, with z up. queries: a TextQueries. Holds points (N, 3), of the data's own
    world, colors (N, 3), truth and truth_instances (N,), probabilities (N, K), labels (N,), gate (N,),
    camera_height (mean, meters along the world's up axis), and with queries cosines (N, T). With a
    decoder also "scene", all instances as decoder.instances_from_logits gives them, and of those that
    score above instance_score instance_labels and scores (R,), and instances (N,), the best one at
    each point, -1 = none.
    """
    result = known_fields(batch, config["up"])
    batch = to_device(batch, model.device)
    if config["no_color"]:
        colors, others = batch["features"].tensor_split([3], 1)
        batch["features"] = torch.cat([torch.ones_like(colors), others], 1)
    dense = []
    tower = model.fusion.encoder_2d
    if tower is not None:  # each image is encoded once
        encode = tower.encode if queries is None else partial(queries.encode, tower)
        tokens, pooled, *dense = encode(batch.pop("images")[0])
        batch |= {"clip_tokens": tokens[None], "clip_pooled": pooled[None]}
    asked = "feat_3d" if queries is not None and queries.source == "3d" else "feat_fusion"
    feats, gate = fuse_draws(model.fusion, batch, {"feat_fusion", asked})

    # the rest of the network sees all points at once, so a superpoint is the mean of all of its points
    out = model.decode(feats["feat_fusion"], batch)
    probabilities = out["logits"].float().softmax(1).cpu()
    result |= {"gate": gate.cpu(), "probabilities": probabilities, "labels": probabilities.argmax(1)}
    if queries is not None:
        result["cosines"] = queries.cosines(model.fusion, batch, feats[asked], *dense).cpu()
    if model.decoder is not None:
        last = {key: out["decoder"][key][-1, 0] for key in ("class_logits", "mask_logits", "quality")}
        scene = instances_from_logits(**last, point_to_superpoint=batch["point_to_superpoint"],
                                      min_points=config["min_instance_points"])
        scores = scene["scores"].cpu()
        good = int((scores > instance_score).sum())  # the best come first
        result |= {"scene": scene, "instances": paint_instances(scene["masks"][:good]).cpu(),
                   "instance_labels": scene["labels"][:good].cpu(), "scores": scores[:good]}
    return result


@torch.no_grad()
def ask_batch(fusion, batch, up, queries, are_classes):
    """CLIP's own answers for all points of one sample, as of `predict_batch`, without a training.

    fusion: a BiFusionEncoder whose tower has dense features. Each query is a class; without are_classes
    they are not those of the data's labels, which are left out. The gate says whether a view sees a point.
    """
    result = known_fields(batch, up)
    if not are_classes:
        result["truth"] = torch.full_like(result["truth"], -1)
    batch = to_device(batch, queries.embedding.device)
    *_, dense = queries.encode(fusion.encoder_2d, batch["images"][0])
    cosines = queries.cosines(fusion, batch, None, dense).cpu()
    probabilities = queries.probabilities(cosines)
    return {**result, "gate": cosines.any(1).float(), "probabilities": probabilities,
            "labels": probabilities.argmax(1), "cosines": cosines}


# --------------------------------------------------------------------------------------------- frames


def cloud_voxel(frames):
    """The voxels of a merged scene, in meters: two pixels of the median depth, from 2 mm to 2 cm.

    frames: of the scene, in order; the first with known depth decides.
    """
    for frame in frames:
        known = frame["depth"][(frame["depth"] > 0) & np.isfinite(frame["depth"])]
        if len(known):
            pixel = np.median(known) / frame["depth_intrinsics"][0, 0]
            return float(np.clip(2 * pixel, 0.002, 0.02))
    return 0.02


def sample_options(model, config):
    """Keyword arguments of data.PointDataset that draw every point of a frame, with its color."""
    options = {"num_points": sys.maxsize, "image_size": tuple(config["image_size"]),
               "images": not config["no_clip"], "normals": config.get("normals", False)}  # older ones do not say
    if model.decoder is not None and config["superpoints"]:
        options["superpoints"] = partial(oversegment, count=config["superpoints"])
    return options


class PreparedFrames(Dataset):
    """Of each frame: name, shape of the depth image, flat depth pixel of each point, batch of `prepare`.

    The batch is None if no pixel has known depth. options: of a PointDataset.
    """

    def __init__(self, frames, options, prepare_sample):
        self.frames = frames
        self.options = options
        self.prepare_sample = prepare_sample

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        frame = self.frames[index]
        check_frame(frame)
        pixels, _ = depth_to_color(frame)
        batch = None
        if len(pixels):
            batch = self.prepare_sample(PointDataset([frame], **self.options)[0])
        return frame["name"], frame["depth"].shape, pixels, batch


def in_order(function, items, threads):
    """function(item) of each item, in order; up to `threads` items are worked on ahead."""
    if threads == 0:
        yield from map(function, items)
        return
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def predict_frames(model, frames, config, instance_score=INSTANCE_SCORE, probabilities=False, queries=None,
                   workers=0, threads=0):
    """Labels every pixel of known depth, frame by frame; a generator of one dict per frame.

    model: a Segmenter in eval mode. frames: a sequence of frame dicts (see data.py); labels are not
    needed. config: the options that the model was trained with. instance_score: instances with a lower
    score are left out. queries: a TextQueries. workers: processes that read frames. threads: that work
    ahead with the network. A result holds "name", and of the depth image's size: "labels" (Hd, Wd)
    int64, index of the class; "instances" (Hd, Wd) int64, numbered from 0 with the best first, if the
    model has a decoder; "probabilities" (Hd, Wd, K) float32 on demand; "queries" (Hd, Wd, Q) float32,
    the probability of every query, and then also "colors" (Hd, Wd, 3). Pixels of unknown depth, and
    those outside the color image, hold -1 (probabilities and queries: 0). "scores" and
    "instance_labels" are lists with one entry per instance. "points" is the result of `predict_batch`;
    None for a frame without any depth, which holds nothing else but "labels".
    """
    answer = partial(predict_batch, model, config=config, queries=queries, instance_score=instance_score)
    options = sample_options(model, config)
    prepared = PreparedFrames(upright(frames, config["up"]), options, preparation(model, config))
    return label_frames(answer, prepared, queries, probabilities, workers, threads)


def label_frames(answer, frames, queries=None, probabilities=False, workers=0, threads=0):
    """The results of `predict_frames` for PreparedFrames. answer: as `predict_batch`, of a batch."""
    def label(item):
        name, shape, pixels, batch = item

        def to_image(values, fill=-1):
            """(N, ...) -> (Hd, Wd, ...)"""
            values = values.numpy()
            image = np.full((math.prod(shape), *values.shape[1:]), fill, values.dtype)
            image[pixels] = values
            return image.reshape(*shape, *values.shape[1:])

        if batch is None:
            return {"name": name, "points": None, "labels": np.full(shape, -1)}
        points = answer(batch)
        result = {"name": name, "points": points, "labels": to_image(points["labels"])}
        if probabilities:
            result["probabilities"] = to_image(points["probabilities"], 0)
        if queries is not None:
            result["queries"] = to_image(queries.probabilities(points["cosines"]), 0)
            result["colors"] = to_image(points["colors"], 0)
        if "instances" in points:
            result["instances"] = to_image(points["instances"])
            result["scores"] = points["scores"].tolist()
            result["instance_labels"] = points["instance_labels"].tolist()
        return result

    loader = DataLoader(frames, batch_size=None, collate_fn=as_is, **loader_options(workers))
    return in_order(label, loader, threads)


def collate_one(sample):
    """A batch of one sample."""
    return collate([sample])


def as_is(item):
    """What a DataLoader does to an item: nothing."""
    return item


# ---------------------------------------------------------------------------------------------- scans


def predict_scans(model, scans, frames, config, queries, output, ids):
    """Predicts every scan, a large one tile by tile, and writes and scores it."""
    options = sample_options(model, config)
    options.pop("superpoints", None)  # scans bring their own
    dataset = SceneDataset(upright(scans, config["up"]), upright(frames, config["up"]),
                           num_views=config["num_views"], **options)
    prepare_sample = preparation(model, config)
    for index in tqdm(range(len(dataset)), unit="scan", disable=None):
        name = scans.names[index]
        sample = dataset[index]
        tiles = split_into_tiles(sample["points"], MAX_POINTS)
        if ids is not None and len(tiles) > 1:
            raise ValueError(f"scan {name}: --submission is for scans of at most {MAX_POINTS:,} points, "
                             f"and it has {len(sample['points']):,}")
        results = []
        for rows in tiles:
            part = {key: value[rows] if key in PER_POINT else value for key, value in sample.items()}
            result = predict_batch(model, prepare_sample(part), config, queries)
            result["confidence"] = result.pop("probabilities").amax(1)
            if ids is None:
                result.pop("scene", None)  # its masks would fill the memory
            results.append(result)
        output.add_scan(name, results[0] if len(tiles) == 1 else join_tiles(results, tiles), ids)


def split_into_tiles(points, most):
    """Points (N, 3) -> rows of tiles: halves across the longer horizontal side down to `most` points.
    """
    tiles = [torch.arange(len(points))]
    while len(tiles[0]) > most:  # the largest
        halves = []
        for rows in tiles:
            plan = points[rows, :2]
            axis = (plan.amax(0) - plan.amin(0)).argmax()
            halves += rows[plan[:, axis].argsort()].tensor_split(2)
        tiles = [rows.sort().values for rows in halves]
    return tiles


def join_tiles(results, tiles):
    """The results of `predict_batch` for tiles -> one. An object that a seam cuts is two instances."""
    order = torch.cat(tiles)
    joined = {"camera_height": results[0]["camera_height"]}
    if "instances" in results[0]:
        shift = 0
        for result in results:
            result["instances"] += shift * (result["instances"] >= 0)
            shift += len(result["scores"])
        for key in ("scores", "instance_labels"):
            joined[key] = torch.cat([result[key] for result in results])
    for key in results[0].keys() - joined.keys():
        values = torch.cat([result.pop(key) for result in results])
        joined[key] = torch.empty_like(values).index_copy_(0, order, values)
    return joined


# ---------------------------------------------------------------------------------------------- files


def write_frame(folder, stem, result, class_ids, query_names=()):
    """Writes label/<stem>.png, instance/<stem>.png and .txt, query/<stem>.png: see docs/predict.md."""
    def save(kind, image):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / kind / f"{stem}.png")

    save("label", class_ids[result["labels"]].astype(np.uint16))  # the last class id stands for "none"
    if "instances" in result:
        save("instance", (result["instances"] + 1).astype(np.uint16))
        lines = [f"{number} {class_ids[label]} {score!r}\n" for number, (label, score) in
                 enumerate(zip(result["instance_labels"], result["scores"]), 1)]
        (folder / "instance" / f"{stem}.txt").write_text("".join(lines))
    if query_names and "queries" in result:
        save("query", heat_image(result["colors"], result["queries"], query_names))


def benchmark_ids(benchmark, class_names):
    """The ids (K,) that a benchmark, "scannet20" or "scannet200", gives to the classes of a network."""
    path = Path(__file__).parent / "labels" / f"{benchmark}.txt"
    ids = {name: key for key, name in load_classes(path).items() if name is not None}
    foreign = [name for name in class_names if name not in ids]
    if foreign:
        raise ValueError(f"--submission {benchmark}: {path} does not list the network's classes "
                         f"{', '.join(foreign)}")
    return np.array([ids[name] for name in class_names])


# ------------------------------------------------------------------------------------------ the command


def parse_args(argv=None):
    """The options of the command."""
    parser = Parser("predict.py", "Labels every pixel of known depth and merges the frames of a scene.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="of train.py; not given: CLIP alone answers --text")
    add("--data", required=True, help="folder in ScanNet's exported 2D layout, labeled or not; a "
        "capture, see docs/captures.md; a .ply cloud alone; or 'rooms' (built in)")
    add("--out", required=True, type=writable_folder, help="folder to write into")
    add("--split", help="file with one scene or scene/frame per line; not given: everything")
    add("--classes", help="class list of the data, one 'id name' pair per line; not given: "
        "classes.txt in the folder, else that of the training")
    add("--label-map", help="as in train.py; not given: as in training, if its class list is used")
    add("--scans", help="folder of whole ScanNet scans: points from there, views from --data")
    add_capture_options(parser, FORMATS, POSES)
    add("--up", type=checked_by(up_rotation), help="axis that points up; not given: as in training, "
        "or z")
    add("--text", help="queries: \"chair, red sofa | couch\"; | separates names of one query")
    add("--text-from", choices=SOURCES, default="clip", help="what the text is compared with: "
        "CLIP's dense features; fused or 3D ones of the network, if its consistency loss was on; "
        "mean of clip and fused")
    add("--attention", choices=ATTENTIONS, help="of CLIP's dense features; not given: naclip")
    add("--text-embeddings", metavar="FILE", help="vectors of another text encoder, see docs/towers.md")
    add("--clip-model", help="without a checkpoint: of open_clip; not given: ViT-B-16")
    add("--image-size", type=image_size, help="without a checkpoint: height,width that CLIP sees; "
        "not given: the whole patches nearest to 240,320")
    add("--clip-pretrained", metavar="FILE", help="CLIP's weights, if they do not lie where they "
        "lay in training; without a checkpoint also an open_clip tag, openai if not given")
    add("--tower-pretrained", metavar="FILE", help="the same of --tower")
    add("--cloud-voxel", type=number_in(float, 1e-4, 100.0), help="meters, of merged clouds; not given: two pixels "
        "of a scene's median depth, from 0.002 to 0.02")
    add("--tensorboard", action="store_true", help="also show the clouds: tensorboard --logdir OUT")
    add("--submission", choices=("scannet20", "scannet200"), help="write its files; needs --scans")
    add("--workers", type=worker_count, help="that read frames; not given: one per two cores, up "
        "to 8")
    add("--device", help="not given: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    if args.submission and not args.scans:
        parser.error("--submission needs --scans: the benchmark scores the vertices of whole scans")
    of_captures = any(x is not None for x in (args.format, args.pose, args.depth_scale, args.intrinsics))
    if of_captures and args.scans:
        parser.error("--scans and the options of captures (--intrinsics, --pose, ...) exclude each other")
    given = args.split or args.classes or args.label_map or args.scans or of_captures
    takes_no = "no --split, --classes, --label-map, --scans or options of captures (--intrinsics, --pose, ...)"
    if args.data == "rooms" and given:
        parser.error(f"the built-in rooms take {takes_no}")
    if args.data.endswith(".ply") and (given or args.checkpoint is None):
        parser.error(f"a cloud alone needs a checkpoint, and takes {takes_no}")
    asks = args.text or args.checkpoint is None and args.classes
    if args.checkpoint and not asks and (args.text_from != "clip" or args.attention or args.text_embeddings):
        parser.error("--text-from, --attention and --text-embeddings need --text")
    if args.checkpoint and (args.clip_model or args.image_size):
        parser.error("with a checkpoint, --clip-model and --image-size are those of the training")
    if args.checkpoint is None and (args.scans or args.text_from != "clip" or args.tower_pretrained or not asks):
        parser.error("without a checkpoint CLIP alone answers --text or --classes, and only in frames: give no "
                     "--scans, --text-from or --tower-pretrained")
    for folder in (args.data, args.scans):
        parser.keep_apart("--out", args.out, folder)
    args.out = Path(args.out)
    return args


def find_classes(args, config, class_names):
    """The class list {id: name} of the data in the network's order, None if it has other classes.

    Sets args.label_map to the training's if its class list is used.
    """
    trained_with = config["classes"] or f"{config['data']}/classes.txt"
    path = args.classes
    if path is None:
        found = filter(os.path.isfile, (f"{args.data}/classes.txt", trained_with))
        path = next(found, None)
        if path is None:
            return None
    classes = load_classes(path)
    names = {name for name in classes.values() if name is not None}
    if names != set(class_names):
        text = f"{path}: its classes {sorted(names)} are not the network's, {sorted(class_names)}"
        if args.classes:
            raise ValueError(text)
        print(f"{text}, so labels of the data are not read")
        return None
    given = args.classes or args.label_map
    if not given and os.path.isfile(trained_with) and os.path.samefile(path, trained_with):
        if bool(args.scans) == bool(config["scans"]):
            args.label_map = config["label_map"]
        elif not config["label_map"]:  # ids of scans are NYU40's, those of exported frames the table's
            print(f"{path}: its ids may be others here than in training, so labels of the data are not "
                  "read; give --classes, and --label-map if they need it")
            return None
    place = {name: i for i, name in enumerate(class_names)}
    return dict(sorted(classes.items(), key=lambda item: place.get(item[1], -1)))


def open_source(args, config, classes, class_names=None):
    """What --data and --scans name -> frames, scans or None. Labels are read if there are classes."""
    labels = None if classes is not None else False
    scans = None
    if args.data.endswith(".ply"):
        scans, frames = open_cloud(args.data, config["num_views"], config.get("normals", False))
        if not config["no_clip"]:
            warn(f"{args.data} has no frames: no view sees its points, so the network gets no CLIP features")
    elif args.scans:
        scans, frames = open_scans(args.scans, args.data, args.split, classes, args.label_map, labels,
                                   config.get("normals", False))
    else:  # of the built-in rooms those that validate a training with these options
        val_rooms = config.get("val_rooms", -(-config["rooms"] * 3 // 8))  # older checkpoints do not say
        rooms = val_rooms, config["frames_per_room"]
        split = "val" if args.data == "rooms" else args.split
        frames = open_frames(args.data, split, classes, args.label_map, args.intrinsics, labels,
                             rooms=rooms, format=args.format, pose=args.pose, depth_scale=args.depth_scale)
        if hasattr(frames, "description"):
            print(frames.description)
    names = (scans or frames).class_names
    if class_names and names and list(names) != class_names:
        raise ValueError(f"--data {args.data}: its classes {', '.join(names)} are not those of "
                         f"{args.checkpoint}")
    return frames, scans


def warn(text):
    """A text that nobody overlooks."""
    tqdm.write(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n", file=sys.stderr)


def open_queries(args, model, config):
    """The TextQueries of --text, or None."""
    if args.text is None:
        return None
    if config["clip_pretrained"] == "none":
        warn(RANDOM_CLIP)
    elif args.text_from != "clip":
        state = read_checkpoint(args.checkpoint)
        for reason in text_doubts(config, state["epoch"] - (state["next_step"] == 0)):
            warn(f"--text-from {args.text_from}: {reason}, so these features hardly answer to text")
    queries = TextQueries(model.fusion.encoder_2d, args.text, args.text_from, args.attention,
                          args.text_embeddings)
    say_queries(queries)
    return queries


def text_doubts(config, last_epoch):
    """Reasons why a network's features may not answer to text. last_epoch: of its training, from 0."""
    if max(config["clip_weights"]) == 0:
        return ["the consistency loss had no weight in training"]
    reasons = []
    target = config.get("clip_target", "global")  # older checkpoints do not say
    if target != "point":
        reasons.append(f"its consistency loss had --clip-target {target} and not point")
    end = config["clip_warmup"][-1]
    if last_epoch <= end:
        reasons.append(f"the training ended with epoch {last_epoch}, within --clip-warmup, which lasts to {end}")
    return reasons


def say_queries(queries):
    """Prints what the answers depend on."""
    for field, names in zip(field_names(queries.names), queries.names):
        print(f"query {field}: {', '.join(names)}")
    print(f"beside them: {', '.join(NEUTRAL)}; {queries.origin}")


def warn_of_faults(args, frames, up):
    """What the quick part of check.py finds in somebody's frames; ValueError if no network takes them."""
    if args.data == "rooms" or args.data.endswith(".ply"):
        return
    rows = quick_check(frames, up)
    for row in rows:
        if row.test == "refused":
            raise ValueError(f"{args.data}: {row.words}")
        if row.verdict == "WRONG":
            warn(f"{args.data} looks wrong: {row.test}: {row.words} `python check.py` tells more.")
    for text in unknowns(rows):
        print(text)


def write_classes(path, ids, class_names):
    """Writes the class list of the output; ids: of the training's class list, one per name.

    Returns the ids (K + 1,), the last for pixels without a label.
    """
    ids = np.array(ids)
    none = 65535 if 0 in ids else 0
    if ids.max() > 65534:
        raise ValueError(f"class id {ids.max()} does not fit into a 16-bit image")
    lines = [f"{none} unlabeled\n"] + [f"{key} {name}\n" for key, name in zip(ids, class_names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return np.append(ids, none)


SCORED = ("labels", "truth", "instances", "instance_labels", "scores", "truth_instances")


class Output:
    """What a run of the command writes into its folder, and what it counts and scores on the way.

    args: of the command. up: of the data's world, see `data.up_rotation`. new_scores: a function that
    makes empty `Scores`. comments: lines for the header of PLY files.
    """

    def __init__(self, args, up, class_ids, class_names, queries, new_scores, comments):
        self.start = time.perf_counter()
        self.folder = args.out
        self.log_up = up if args.tensorboard else None
        self.drawn_queries = [names[0] for names in queries.names] if args.text else []
        self.class_ids = write_classes(args.out / "classes.txt", class_ids, class_names)
        self.class_names = class_names
        self.queries = queries
        self.comments = comments
        self.points = new_scores()  # every pixel, or every vertex of scans
        self.merged = new_scores()
        self.counts = np.zeros(len(class_names), np.int64)
        self.num_blank = 0  # frames without any depth
        self.scenes = {}

    def add_frame(self, result):
        """Images and scores of a result of `predict_frames`."""
        scene, stem = result["name"].split("/", 1)
        write_frame(self.folder / scene, stem, result, self.class_ids, self.drawn_queries)
        if result["points"] is None:
            self.num_blank += 1
        else:
            self.score(self.points, result["points"])

    def score(self, scores, points):
        """Counts the labels of points and, if there is truth, scores them."""
        points = {key: torch.as_tensor(points[key]) for key in SCORED if key in points}
        labels, truth = points["labels"], points["truth"]
        if scores is self.points:
            self.counts += torch.bincount(labels, minlength=len(self.class_names)).numpy()
        if not (truth >= 0).any():
            return
        scores.update(labels, truth)
        if "instances" in points:
            numbers = torch.arange(len(points["scores"]))
            masks = points["instances"] == numbers[:, None]
            scene = {"masks": masks, "labels": points["instance_labels"], "scores": points["scores"]}
            scores.update_instances(scene, truth, points["truth_instances"])

    def add_cloud(self, name, cloud, camera_height):
        """The PLY files of a cloud as of `SceneMerger.cloud`. camera_height: mean, meters."""
        scalars = {"label": self.class_ids[cloud["labels"]], "confidence": cloud["confidence"],
                   "gate": cloud["gate"]}
        entry = {"points": len(cloud["labels"]), "instances": []}
        if "instances" in cloud:
            scalars["instance"] = cloud["instances"] + 1
            sizes = np.bincount(scalars["instance"], minlength=len(cloud["scores"]) + 1)
            found = zip(cloud["instance_labels"], sizes[1:].tolist(), cloud["scores"].tolist())
            for number, (label, size, score) in enumerate(found, 1):
                instance = {"id": number, "class": self.class_names[label], "points": size, "confidence": score}
                entry["instances"].append(instance)
        if self.queries is not None:
            scalars |= dict(zip(field_names(self.queries.names), cloud["queries"].T))
        painted = label_colors(torch.as_tensor(cloud["labels"])).numpy()
        write_ply(self.folder / f"{name}.ply", cloud["points"], cloud["colors"], scalars, self.comments)
        write_ply(self.folder / f"{name}_labels.ply", cloud["points"], painted, scalars, self.comments)
        self.scenes[name] = entry
        if self.log_up is not None:
            self.show_cloud(name, cloud, camera_height)

    def show_cloud(self, name, cloud, camera_height):
        """The same cloud in TensorBoard; every scene is a run."""
        view = {"points": cloud["points"] @ up_rotation(self.log_up).T, "colors": cloud["colors"],
                "prediction": cloud["labels"], "gate": cloud["gate"]}
        if "instances" in cloud:
            view["instances"] = cloud["instances"]
        if (cloud["truth"] >= 0).any():
            view["truth"], view["instances_truth"] = cloud["truth"], cloud["truth_instances"]
        if self.queries is not None:
            fields = [f"query_{field}" for field in field_names(self.queries.names)]
            view |= dict(zip(fields, cloud["queries"].T))
        view = {kind: torch.as_tensor(values) for kind, values in view.items()}
        colored = clouds([{**view, "camera_height": camera_height}])
        for old in (self.folder / name).glob("events.out.tfevents*"):
            old.unlink()
        log = RunLog(self.folder / name)
        log.add_clouds({f"{kind}/{name}": shown for kind, shown in colored.items()})
        log.close()

    def add_scan(self, name, points, ids):
        """The files of a scan, a result of `predict_batch`; ids: of a benchmark, or None."""
        cloud = {key: value.numpy() for key, value in points.items() if key != "scene"}
        if self.queries is not None:
            cloud["queries"] = self.queries.probabilities(points["cosines"]).numpy()
        self.add_cloud(name, cloud, float(points["camera_height"]))
        self.score(self.points, points)
        if ids is not None:
            scene = {key: value.cpu().numpy() for key, value in points.get("scene", {}).items()}
            write_submission(self.folder / "submission", name, cloud["labels"], scene or None, ids)


def use_cores(workers, device):
    """Options of `label_frames`: on a CPU two frames share the cores, each with half of the threads."""
    cores = torch.get_num_threads()
    threads = 1 if device.type == "cuda" else min(2, cores)
    torch.set_num_threads(cores // threads)
    return {"workers": max(1, min(8, cores // 2)) if workers is None else workers, "threads": threads}


def predict_scenes(label, frames, config, queries, output, voxel_size):
    """Labels every frame, merges the frames of a scene, and writes and scores both.

    label: frames -> results of `predict_frames`. voxel_size: meters, or None. While a merger ends early for want
    of memory, the frames that see what lies behind it are labeled again: see docs/predict.md#merging.
    """
    def results_of(members):
        return tqdm(label(frames=Subset(frames, members)), total=len(members), unit="frame", disable=None)

    def write(name, merger, heights):
        cloud = merger.cloud(config["min_instance_points"], queries)
        output.add_cloud(name, cloud, sum(heights) / len(heights))
        output.score(output.merged, cloud)

    scenes = group_by_scene(frame_names(frames))
    results = iter(results_of(sum(scenes.values(), [])))
    for scene, members in scenes.items():
        voxel = voxel_size or cloud_voxel(frames[member] for member in members)
        new_merger = partial(SceneMerger, len(output.class_names), voxel)
        merger = new_merger(tile=(0, NO_END))
        heights = []
        spans = {}  # of the frames, see `SceneMerger.add`
        for member, result in zip(members, results):
            output.add_frame(result)
            if result["points"] is not None:
                spans[member] = merger.add(result["points"])
                heights.append(float(result["points"]["camera_height"]))
        if not heights:
            continue
        write(scene if merger.end == NO_END else f"{scene}_tile1", merger, heights)
        start = min(first for first, _ in spans.values())
        number = 1
        while merger.end < NO_END:
            width = 2 * (merger.end - start)  # a tile that may be wider has more frames, most of them in vain
            start = merger.end
            merger = new_merger(tile=(start, min(start + width, NO_END)))
            seeing = [member for member, (first, last) in spans.items() if first < merger.end and last >= start]
            for result in results_of(seeing):
                merger.add(result["points"])
            if len(merger.keys):
                number += 1
                write(f"{scene}_tile{number}", merger, heights)


def write_summary(args, config, frames, scans, output):
    """Prints scores, writes summary.json and says what was done; returns its content."""
    seconds = time.perf_counter() - output.start
    kind, piece = ("frame", "pixel") if scans is None else ("scan", "vertex")
    count = len(frames if scans is None else scans)
    total = int(output.counts.sum())
    share = output.counts / max(total, 1)
    skipped = getattr(frames, "num_skipped", 0)
    summary = {
        "checkpoint": args.checkpoint,
        "options": {key: str(value) for key, value in vars(args).items() if value is not None},
        "training": config if args.checkpoint else None,
        "rotation_to_z_up": up_rotation(config["up"]).tolist(),
        f"{kind}s": count, "frames_skipped": skipped, "frames_without_depth": output.num_blank,
        "seconds": seconds, f"seconds_per_{kind}": seconds / count,
        "points": total, "share_of_points": dict(zip(output.class_names, share.tolist())),
        "queries": None if output.queries is None else output.queries.described(),
        "scores": print_scores(output, f"every {piece}"),
        "scenes": output.scenes}
    summary = json.loads(json.dumps(summary), parse_constant=lambda name: None)  # NaN is not JSON
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{count} {kind}s, {skipped} frames skipped for a lost pose, {output.num_blank} without depth, "
          f"{seconds / count:.2f} s per {kind}; {len(output.scenes)} clouds in {args.out}")
    return summary


def print_scores(output, whole):
    """Prints scores -> {which points: metrics}, empty without truth. whole: the name of the first."""
    if not output.points.semantics.confusion.any():
        return {}
    scores = {whole: output.points.compute()}
    print(format_metrics(scores[whole], output.class_names))
    if output.merged.semantics.confusion.any():
        scores["merged scenes"] = output.merged.compute()
    for name, metrics in scores.items():
        means = {key: value for key, value in metrics.items() if key not in ("iou", "aps")}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))
    return scores


def open_tower(args):
    """The CLIP tower of --clip-model, for images of --image-size."""
    name = args.clip_model or "ViT-B-16"
    patch = read_config(name)["model_cfg"]["vision_cfg"].get("patch_size")
    if not patch:
        raise ValueError(f"--clip-model {name} has no dense features that answer to text; open_clip's own "
                         "vision transformers have, such as ViT-B-16")
    whole = tuple(round(side / patch) * patch for side in (240, 320))
    pretrained = None if args.clip_pretrained == "none" else args.clip_pretrained or "openai"
    return Enhanced2DEncoder(name, pretrained, image_size=args.image_size or whole)


def ask(args, device, tower=None):
    """The command without a checkpoint: CLIP's dense features answer text, merged over frames."""
    config = {"up": args.up or "z", "min_instance_points": 1, "rooms": 32, "frames_per_room": 4}
    classes = None if args.classes is None else load_classes(args.classes)
    frames, _ = open_source(args, config, classes)
    warn_of_faults(args, frames, config["up"])
    if tower is None:
        tower = open_tower(args)
        if args.clip_pretrained == "none":
            warn(RANDOM_CLIP)
    height, width = tower.image_size
    if args.image_size not in (None, (height, width)):
        raise ValueError(f"--image-size {args.image_size}: the tower takes images of {height},{width}")
    print(f"CLIP sees images of {height} x {width} pixels")
    fusion = BiFusionEncoder(tower, nn.Identity()).to(device).eval()
    names = parse_queries(args.text) if args.text else [[name] for name in frames.class_names]
    class_names = [first for first, *_ in names]
    are_classes = class_names == list(frames.class_names)
    if args.classes and not are_classes:
        raise ValueError(f"--text {args.text!r} and --classes {args.classes} name other classes; give one of "
                         "them, or the same names in the same order, with synonyms")
    queries = TextQueries(fusion.encoder_2d, names, attention=args.attention,
                          embeddings=args.text_embeddings)
    say_queries(queries)
    class_ids = getattr(frames, "class_ids", None) or range(1, len(names) + 1)
    comments = [f"CLIP {getattr(tower, 'model_name', type(tower).__name__)}"]
    new_scores = partial(Scores, len(names), False)
    output = Output(args, config["up"], class_ids, class_names, queries, new_scores, comments)
    options = dict(num_points=sys.maxsize, image_size=(height, width))

    def label(frames):
        answer = partial(ask_batch, fusion, up=config["up"], queries=queries, are_classes=are_classes)
        prepared = PreparedFrames(upright(frames, config["up"]), options, collate_one)
        return label_frames(answer, prepared, queries, **use_cores(args.workers, device))

    predict_scenes(label, frames, config, queries, output, args.cloud_voxel)
    return write_summary(args, config, frames, None, output)


def main(argv=None, tower=None):
    """One run of the command; returns the content of summary.json. tower: see `model.load_model`."""
    args = parse_args(argv)
    _, _, device = setup(args.device)
    configure_device(device)
    if args.checkpoint is None:
        return ask(args, device, tower)
    model, class_names, config = load_model(args.checkpoint, device, args.clip_pretrained, tower,
                                            args.tower_pretrained)
    config["up"] = args.up or config["up"]
    ids = benchmark_ids(args.submission, class_names) if args.submission else None
    classes = find_classes(args, config, class_names)
    frames, scans = open_source(args, config, classes, class_names)
    warn_of_faults(args, frames, config["up"])
    queries = open_queries(args, model, config)
    comments = [f"checkpoint {args.checkpoint}"]
    comments += [f"class {key} {name}" for key, name in zip(config["class_ids"], class_names)]
    new_scores = partial(Scores, len(class_names), model.decoder is not None, config["min_instance_points"])
    output = Output(args, config["up"], config["class_ids"], class_names, queries, new_scores, comments)
    if scans is not None:
        predict_scans(model, scans, frames, config, queries, output, ids)
    else:
        label = partial(predict_frames, model, config=config, queries=queries, **use_cores(args.workers, device))
        predict_scenes(label, frames, config, queries, output, args.cloud_voxel)
    return write_summary(args, config, frames, scans, output)


if __name__ == "__main__":
    run_command(main)
