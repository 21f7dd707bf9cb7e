# SPDX-License-Identifier: MIT
"""A trained network on frames: labels for every pixel of known depth, merged clouds, text queries, and
scores.

    python predict.py runs/NAME/best.pt --data DIR --out OUT
    python predict.py runs/NAME/best.pt --data DIR --out OUT --text "chair, red sofa | couch, something to sit on"
    python predict.py runs/NAME/best.pt --data 7SCENES/chess --out OUT --intrinsics 585,585,320,240
    python predict.py runs/NAME/best.pt --data PHONE --out OUT           a capture, see docs/captures.md
    python predict.py --data PHONE --out OUT --text "chair, mug"         CLIP alone, without a training
    python predict.py runs/NAME/best.pt --data DIR --scans SCANS --out OUT --submission scannet20

docs/predict.md describes what it writes. In a notebook:

    from model import load_model
    from predict import predict_frames
    from sources.open import open_frames
    model, class_names, config = load_model("runs/NAME/best.pt")
    for result in predict_frames(model, open_frames("DATA", labels=False), config):
        print(result["name"], result["labels"].shape)

The file reads from top to bottom: prediction of one sample, text queries, files, and `main`.

Imports siblings: check, data, decoder, evaluate, model, superpoints, sources/ and support/.
"""
import json
import os
import sys
import time
from functools import partial
from os.path import samefile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from check import pinhole, quick_check, unknowns
from data import (PER_POINT, PER_VIEW, BlankSample, PointDataset, SceneDataset, camera_height, check_frames, collate,
                  depth_to_color, frame_names, group_by_scene, to_device, up_rotation, upright)
from decoder import paint_instances, scene_instances
from encoder import ATTENTIONS
from evaluate import Scores, evaluate, format_metrics
from fusion import BiFusionEncoder
from model import batches_for, build_tower, load_model, make_batch
from sources.captures import FORMATS, POSES
from sources.open import open_frames, open_scans
from sources.scannet import load_classes
from superpoints import oversegment
from support.cache import FeatureCache
from support.clouds import SceneMerger, write_ply, write_submission
from support.distributed import setup
from support.queries import NEUTRAL, TEMPLATES, TextQueries, field_names, parse_queries
from support.runlog import RunLog
from support.runtime import Parser, checked_by, configure_device, image_size, positive_float, run_command
from support.visualize import clouds, label_colors

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANDOM_CLIP = "CLIP IS RANDOMLY INITIALISED: the answers to --text mean nothing"
INSTANCE_SCORE = 0.3  # instances with a lower score are not written

# ------------------------------------------------------------------------------------------- one sample


def fuse_in_draws(fusion, batch, draw_size, at_once=8):
    """Fused features of all points of one sample, as if they were drawn in training: (N, C), and the
    gate (N,).

    Every point is in exactly one of several random draws of at most draw_size points, which are
    independent samples for the network, `at_once` of them per forward pass. Images are encoded once.
    The draws depend on the number of points alone. The gate is averaged over channels.
    """
    n = len(batch["points"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(batch["points"].device)
    draws = order.tensor_split(-(-n // draw_size))
    feat_fusion = gate = None
    for start in range(0, len(draws), at_once):
        some = draws[start:start + at_once]
        rows = torch.cat(some)
        sizes = torch.tensor([len(draw) for draw in some], device=rows.device)
        part = {key: batch[key][rows] for key in PER_POINT if key in batch}
        part["batch"] = torch.repeat_interleave(torch.arange(len(some), device=rows.device), sizes)
        part |= {key: batch[key].expand(len(some), *batch[key].shape[1:]) for key in PER_VIEW if key in batch}
        fused = fusion(part)
        if feat_fusion is None:
            feat_fusion = fused["feat_fusion"].new_empty(n, fused["feat_fusion"].shape[1])
            gate = fused["alpha"].new_empty(n, dtype=torch.float32)
        feat_fusion[rows] = fused["feat_fusion"]
        gate[rows] = fused["alpha"].float().mean(1)
    return feat_fusion, gate


@torch.no_grad()
def predict_sample(model, sample, config, queries=None, instance_score=INSTANCE_SCORE):
    """The network's answers for all points of one sample, a dict of tensors on the model's device.

    sample: of a data set that draws every point, with z up. queries: a TextQueries. Holds points (N,
    3), of the data's own world, colors (N, 3), truth and truth_instances (N,), probabilities (N, K),
    labels (N,), gate (N,), and with queries cosines (N, T). If the model has a decoder, also "scene",
    all instances as decoder.instances_from_logits gives them, and of those that score above
    instance_score instance_labels and scores (R,), and instances (N,), the best one at each point, -1 =
    none. camera_height is the mean height of its cameras, meters along the world's up axis.
    """
    device = model.head.weight.device
    batch = to_device(make_batch([sample], **model.batch_options(training=False)), device)
    colors = batch["features"][:, :3]
    if config["no_color"]:
        batch["features"] = torch.cat([torch.ones_like(colors), batch["features"][:, 3:]], 1)
    dense = None
    tower = model.fusion.encoder_2d
    if tower is not None:  # each image is encoded once
        images = batch.pop("images")[0]
        tokens, pooled, *dense = tower.encode(images) if queries is None else queries.encode(tower, images)
        batch |= {"clip_tokens": tokens[None], "clip_pooled": pooled[None]}
    num_views = batch["world2cam"].shape[1]
    draw_size = max(1, config["num_points"] * num_views // config["num_views"])
    feat_fusion, gate = fuse_in_draws(model.fusion, batch, draw_size)

    # the rest of the network sees all points at once, so a superpoint is the mean of all of its points
    out = model.decode(feat_fusion, batch)
    probabilities = out["logits"].float().softmax(1)
    result = {"points": own_world(sample["points"], config["up"]).to(device), "colors": colors,
              "truth": batch["labels"], "truth_instances": batch["instances"],
              "camera_height": camera_height(batch["world2cam"][0]).mean(),
              "gate": gate, "probabilities": probabilities, "labels": probabilities.argmax(1)}
    if queries is not None:
        result["cosines"] = queries.cosines(model.fusion, batch, feat_fusion, *dense)
    if model.decoder is not None:
        scene, = scene_instances(out["decoder"], batch["point_to_superpoint"], batch["batch"],
                                 min_points=config["min_instance_points"])
        good = scene["scores"] > instance_score
        result |= {"scene": scene, "instances": paint_instances(scene["masks"][good]),
                   "instance_labels": scene["labels"][good], "scores": scene["scores"][good]}
    return result


@torch.no_grad()
def ask_sample(fusion, sample, up, queries):
    """CLIP's own answers for all points of one sample, without a trained network: as of `predict_sample`.

    fusion: a BiFusionEncoder whose tower has dense features. Every query is a class; the gate is 1 if a view sees it.
    """
    batch = to_device(collate([sample]), queries.embedding.device)
    *_, dense = queries.encode(fusion.encoder_2d, batch["images"][0])
    cosines = queries.cosines(fusion, batch, None, dense)
    probabilities = queries.probabilities(cosines)
    return {"points": own_world(sample["points"], up).to(cosines.device), "colors": batch["features"][:, :3],
            "truth": batch["labels"], "truth_instances": batch["instances"],
            "camera_height": camera_height(batch["world2cam"][0]).mean(), "gate": cosines.any(1).float(),
            "probabilities": probabilities, "labels": probabilities.argmax(1), "cosines": cosines}


def own_world(points, up):
    """Points (N, 3) of a world with z up, back in the data's own."""
    if up == "z":
        return points
    return torch.from_numpy((points.numpy() @ up_rotation(up)).astype(np.float32))


def cloud_voxel(frame):
    """The voxel size for merging the frames of a scene, meters: two pixels of the median depth, from 2
    mm to 2 cm.

    A room gets 1 to 2 cm, a table top a few millimeters.
    """
    depth = frame["depth"]
    known = depth[(depth > 0) & np.isfinite(depth)]
    if len(known) == 0:
        return 0.02
    pixel = np.median(known) / frame["depth_intrinsics"][0, 0]
    return float(np.clip(2 * pixel, 0.002, 0.02))


def sample_options(model, config):
    """Keyword arguments of data.PointDataset that draw every point of a frame, with its color."""
    options = dict(num_points=sys.maxsize, image_size=tuple(config["image_size"]), images=not config["no_clip"],
                   normals=config.get("normals", False))  # older checkpoints do not say
    if model.decoder is not None and config["superpoints"]:
        options["superpoints"] = partial(oversegment, count=config["superpoints"])
    return options


def predict_frames(model, frames, config, instance_score=INSTANCE_SCORE, probabilities=False, queries=None):
    """Labels every pixel of known depth, frame by frame; a generator of one dict per frame.

    model: a Segmenter in eval mode. frames: a sequence of frame dicts (see data.py); labels are not
    needed. config: the options that the model was trained with. instance_score: instances with a lower
    score are left out. queries: a TextQueries. A result holds "name", and of the depth image's size:
    "labels" (Hd, Wd) int64, index of the class; "instances" (Hd, Wd) int64, numbered from 0 with the
    best first, if the model has a decoder; "probabilities" (Hd, Wd, K) float32 on demand; "queries"
    (Hd, Wd, Q) float32, the probability of every query. Pixels of unknown depth, and those outside the
    colour image, hold -1 (probabilities and queries: 0). "scores" and "instance_labels" are lists with
    one entry per instance. "points" is the result of `predict_sample`, with one row per point; None for
    a frame without any depth, which holds nothing else but "labels".
    """
    answer = partial(predict_sample, model, config=config, queries=queries, instance_score=instance_score)
    return label_frames(answer, frames, sample_options(model, config), config["up"], queries, probabilities)


def label_frames(answer, frames, options, up, queries=None, probabilities=False):
    """The results of `predict_frames`. answer: sample -> result of `predict_sample`. options: of the PointDataset."""
    frames = upright(frames, up)
    for index in range(len(frames)):
        frame = frames[index]
        blank = np.full(frame["depth"].shape, -1)
        result = {"name": frame["name"], "points": None, "labels": blank}
        try:
            sample = PointDataset([frame], **options)[0]
        except BlankSample:
            yield result
            continue
        points = answer(sample)
        pixels = depth_to_color(frame)[0]  # flat index of each point, in the order of the points

        def to_image(values, fill=-1):
            """(N, ...) -> (Hd, Wd, ...)"""
            values = values.cpu().numpy()
            image = np.full((blank.size, *values.shape[1:]), fill, values.dtype)
            image[pixels] = values
            return image.reshape(*blank.shape, *values.shape[1:])

        result |= {"points": points, "labels": to_image(points["labels"])}
        if probabilities:
            result["probabilities"] = to_image(points["probabilities"], 0)
        if queries is not None:
            result["queries"] = to_image(queries.probabilities(points["cosines"]), 0)
        if "instances" in points:
            result["instances"] = to_image(points["instances"])
            result["scores"] = points["scores"].tolist()
            result["instance_labels"] = points["instance_labels"].tolist()
        yield result


# ---------------------------------------------------------------------------------------------- files


def write_frame(folder, stem, result, class_ids):
    """label/<stem>.png, instance/<stem>.png (0 = none) and instance/<stem>.txt: number, class id,
    confidence per line.
    """
    images = {"label": class_ids[result["labels"]]}  # the last class id stands for "none"
    if "instances" in result:
        images["instance"] = result["instances"] + 1
    for kind, image in images.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint16)).save(folder / kind / f"{stem}.png")
    if "instances" in result:
        lines = [f"{number} {class_ids[label]} {score!r}\n" for number, (label, score) in
                 enumerate(zip(result["instance_labels"], result["scores"]), 1)]
        (folder / "instance" / f"{stem}.txt").write_text("".join(lines))


def benchmark_ids(benchmark, class_names):
    """The ids (K,) that a benchmark, "scannet20" or "scannet200", gives to the classes of a network."""
    path = Path(__file__).parent / "labels" / f"{benchmark}.txt"
    ids = {name: key for key, name in load_classes(path).items() if name is not None}
    foreign = [name for name in class_names if name not in ids]
    if foreign:
        raise ValueError(f"--submission {benchmark}: {path} does not list the network's classes {', '.join(foreign)}")
    return np.array([ids[name] for name in class_names])


# ------------------------------------------------------------------------------------------ the command


def parse_args(argv=None):
    """The options of the command."""
    parser = Parser("predict.py", "Labels every pixel of known depth and merges the frames of a scene.")
    parser.add_argument("checkpoint", nargs="?", help="a best.pt or last.pt of train.py; not given: --text is "
        "answered by CLIP alone, without a trained network")
    parser.add_argument("--data", required=True, help="folder in ScanNet's exported 2D layout, "
        "labelled or not; with --intrinsics a folder of frame-*.color.*, .depth.png, .pose.txt; or "
        "'rooms' (built in)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write into")
    parser.add_argument("--split", help="file with one scene or scene/frame per line; not given: "
        "everything")
    parser.add_argument("--classes", help="class list of the data, one 'id name' pair per line; not "
        "given: classes.txt in the folder, else the list that the network was trained with")
    parser.add_argument("--label-map", help="scannetv2-labels.combined.tsv, as in train.py; not given: "
        "that of training, if its class list is used")
    parser.add_argument("--scans", help="folder of whole ScanNet scans: points from there, views from "
        "--data")
    parser.add_argument("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="pixels, of all color "
        "images, for frame-* files and captures that do not tell them")
    parser.add_argument("--format", choices=tuple(FORMATS), help="of a capture; not given: what lies in the "
        "folder decides, see docs/captures.md")
    parser.add_argument("--pose", choices=POSES, help="overrules direction and quaternion order of a capture")
    parser.add_argument("--depth-scale", type=positive_float, help="units of depth per meter of a capture, if "
        "no file tells")
    parser.add_argument("--up", type=checked_by(up_rotation), help="axis of the data's world that "
        "points up; not given: as in training")
    parser.add_argument("--text", help="queries, such as \"chair, red sofa | couch, something to sit "
        "on\"; | separates names of one query")
    parser.add_argument("--text-from", choices=("clip", "fused"), default="clip",
        help="compare the text with CLIP's dense features or with the network's own, if its "
        "consistency loss was on")
    parser.add_argument("--attention", choices=ATTENTIONS, help="of CLIP's dense features, see docs/towers.md; "
        "not given: naclip")
    parser.add_argument("--clip-model", default="ViT-B-16", help="without a checkpoint: an open_clip vision "
        "transformer")
    parser.add_argument("--image-size", type=image_size, default=(240, 320), help="without a checkpoint: "
        "height,width that CLIP sees")
    parser.add_argument("--cloud-voxel", type=positive_float, help="meters, the voxels of merged clouds; not "
                        "given: two pixels of a scene's median depth, from 0.002 to 0.02")
    parser.add_argument("--tensorboard", action="store_true", help="also show the merged clouds in "
        "TensorBoard's mesh view: tensorboard --logdir OUT")
    parser.add_argument("--submission", choices=("scannet20", "scannet200"), help="write files for "
        "this benchmark; needs --scans")
    parser.add_argument("--clip-pretrained", metavar="FILE", help="CLIP's weights, if they do not lie "
        "where they lay in training; without a checkpoint also an open_clip tag, openai if not given")
    parser.add_argument("--cache", default=".cache", help="folder for what scoring reads; 'none': keep "
        "nothing")
    parser.add_argument("--device", help="not given: cuda if there is one, else cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.submission and not args.scans:
        parser.error("--submission needs --scans: the benchmark scores the vertices of whole scans")
    if args.intrinsics is not None and args.scans:
        parser.error("--intrinsics and --scans exclude each other")
    if args.data == "rooms" and (args.split or args.classes or args.scans or args.intrinsics is not None):
        parser.error("the built-in rooms take no --split, --classes, --scans or --intrinsics")
    asks = args.text or args.checkpoint is None and args.classes
    if not asks and (args.text_from != "clip" or args.attention):
        parser.error("--text-from and --attention need --text")
    if args.checkpoint is None and (args.scans or args.text_from != "clip" or not (args.text or args.classes)):
        parser.error("without a checkpoint, --text or --classes says what to look for, and CLIP alone answers in frames")
    out = args.out.resolve()
    for option, folder in (("--data", args.data), ("--scans", args.scans)):
        if folder is not None and (out == Path(folder).resolve() or out in Path(folder).resolve().parents):
            parser.error(f"--out {args.out} is or holds {option} {folder}: nothing is written among the data")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"--out {args.out}: {existing} is not a folder that can be written to")
    return args


def find_classes(args, config, class_names):
    """The class list {id: name} of the data in the network's order, or None if there is none of the
    same classes.

    Sets args.label_map to the training's if its class list is used.
    """
    own, trained_with = f"{args.data}/classes.txt", config["classes"] or f"{config['data']}/classes.txt"
    paths = [args.classes] if args.classes else [own, trained_with]
    for path in paths:
        if not args.classes and not Path(path).is_file():
            continue
        classes = load_classes(path)
        names = {name for name in classes.values() if name is not None}
        if names != set(class_names):
            if args.classes:
                raise ValueError(f"{path}: its classes {sorted(names)} are not the network's, {sorted(class_names)}")
            print(f"{path}: its classes are not the network's, so labels of the data are not read")
            return None
        if not args.classes and not args.label_map and Path(trained_with).is_file() and samefile(path, trained_with):
            if bool(args.scans) == bool(config["scans"]):
                args.label_map = config["label_map"]
            elif not config["label_map"]:  # ids of scans are NYU40's, those of exported frames the table's
                print(f"{path}: its ids may be others here than in training, so labels of the data are not read; give "
                      "--classes, and --label-map if they need it")
                return None
        place = {name: i for i, name in enumerate(class_names)}
        return dict(sorted(classes.items(), key=lambda item: place.get(item[1], -1)))
    return None


def open_source(args, config, classes, class_names):
    """What --data and --scans name -> frames, scans or None. Labels are read if there is a class list."""
    labels = None if classes is not None else False
    scans = None
    if args.scans:
        scans, frames = open_scans(args.scans, args.data, args.split, classes, args.label_map, labels,
                                   config.get("normals", False))
    else:  # of the built-in rooms those that validate a training with these options
        val_rooms = config.get("val_rooms", -(-config["rooms"] * 3 // 8))  # older checkpoints do not say
        rooms = val_rooms, config["frames_per_room"]
        split = "val" if args.data == "rooms" else args.split
        frames = open_frames(args.data, split, classes, args.label_map, args.intrinsics, labels, rooms=rooms,
                             format=args.format, pose=args.pose, depth_scale=args.depth_scale)
        if hasattr(frames, "description"):
            print(frames.description)
    names = (scans or frames).class_names
    if names and list(names) != class_names:
        raise ValueError(f"--data {args.data}: its classes {', '.join(names)} are not those of {args.checkpoint}")
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
    elif args.text_from == "fused" and max(config["clip_weights"]) == 0:
        warn("--text-from fused: the consistency loss had no weight in training, so the answers mean nothing")
    queries = TextQueries(model.fusion.encoder_2d, args.text, args.text_from, args.attention)
    say_queries(queries)
    return queries


def say_queries(queries):
    """Prints what the answers depend on."""
    for field, names in zip(field_names(queries.names), queries.names):
        print(f"query {field}: {', '.join(names)}")
    print(f"beside them: {', '.join(NEUTRAL)}; templates: {', '.join(TEMPLATES)}")


def warn_of_faults(args, frames, up):
    """What the quick part of check.py finds in somebody's frames."""
    if args.data == "rooms":
        return
    rows = quick_check(frames, up)
    for row in rows:
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

    new_scores: a function that makes empty `Scores`. comments: lines for the header of PLY files.
    log_up: the data's up, see `data.up_rotation`, if the clouds are to be shown in TensorBoard; or
    None.
    """

    def __init__(self, folder, class_ids, class_names, queries, new_scores, comments, log_up):
        self.folder = folder
        self.log_up = log_up
        self.class_ids = class_ids
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
        write_frame(self.folder / scene, stem, result, self.class_ids)
        if result["points"] is None:
            self.num_blank += 1
        else:
            self.score(self.points, result["points"])

    def score(self, scores, points):
        """Counts points with their labels, truth and instances; nothing if no point has a true label."""
        points = {key: torch.as_tensor(points[key]) for key in SCORED if key in points}
        labels, truth = points["labels"], points["truth"]
        if scores is self.points:
            self.counts += torch.bincount(labels, minlength=len(self.class_names)).cpu().numpy()
        if not (truth >= 0).any():
            return
        scores.update(labels, truth)
        if "instances" in points:
            kinds = points["instance_labels"]
            numbers = torch.arange(len(kinds), device=kinds.device)
            scene = {"masks": points["instances"] == numbers[:, None], "labels": kinds, "scores": points["scores"]}
            scores.update_instances(scene, truth, points["truth_instances"])

    def add_cloud(self, name, cloud, camera_height):
        """The PLY files of a scene; cloud: as `SceneMerger.cloud` gives it. camera_height: mean,
        meters.
        """
        scalars = {"label": self.class_ids[cloud["labels"]], "confidence": cloud["confidence"],
                   "gate": cloud["gate"]}
        entry = {"points": len(cloud["labels"]), "instances": []}
        if "instances" in cloud:
            scalars["instance"] = cloud["instances"] + 1
            sizes = np.bincount(cloud["instances"] + 1, minlength=len(cloud["scores"]) + 1)[1:].tolist()
            for i, (label, score) in enumerate(zip(cloud["instance_labels"], cloud["scores"].tolist())):
                entry["instances"].append({"id": i + 1, "class": self.class_names[label], "points": sizes[i],
                                           "confidence": score})
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
        """The files of a scan, a result of `predict_sample`; ids: of a benchmark, or None."""
        cloud = to_numpy(points)
        cloud["confidence"] = cloud["probabilities"].max(1)
        if self.queries is not None:
            cloud["queries"] = self.queries.probabilities(points["cosines"]).cpu().numpy()
        self.add_cloud(name, cloud, float(points["camera_height"]))
        self.score(self.points, points)
        if ids is not None:
            scene = to_numpy(points["scene"]) if "scene" in points else None
            write_submission(self.folder / "submission", name, cloud["labels"], scene, ids)


def to_numpy(values):
    """The tensors of a dict as arrays."""
    return {key: value.cpu().numpy() for key, value in values.items() if isinstance(value, torch.Tensor)}


def predict_scans(model, scans, frames, config, queries, output, ids):
    """Predicts every scan, and writes and scores it."""
    options = sample_options(model, config)
    options.pop("superpoints", None)  # scans bring their own
    dataset = SceneDataset(upright(scans, config["up"]), upright(frames, config["up"]),
                           num_views=config["num_views"], **options)
    for index in tqdm(range(len(dataset)), unit="scan", disable=None):
        result = predict_sample(model, dataset[index], config, queries)
        output.add_scan(scans.names[index], result, ids)


def predict_scenes(label, frames, config, queries, output, voxel_size):
    """Labels every frame, merges the frames of a scene, and writes and scores both.

    label: frames -> results of `predict_frames`. voxel_size: meters, or None.
    """
    bar = tqdm(total=len(frames), unit="frame", disable=None)
    for scene, members in group_by_scene(frame_names(frames)).items():
        merger = SceneMerger(len(output.class_names), voxel_size or cloud_voxel(frames[members[0]]))
        heights = []
        for result in label(frames=Subset(frames, members)):
            output.add_frame(result)
            bar.update()
            if result["points"] is not None:
                merger.add(result["points"])
                heights.append(float(result["points"]["camera_height"]))
        if heights:
            cloud = merger.cloud(config["min_instance_points"], queries)
            output.add_cloud(scene, cloud, sum(heights) / len(heights))
            output.score(output.merged, cloud)
    bar.close()


def same_points(model, config, frames, scans, cache):
    """A loader of the points that `train.py --eval` draws from these frames."""
    options = sample_options(model, config)
    options |= {"num_points": config["num_points"], "num_views": config["num_views"], "seed": config["seed"],
                "color": not config["no_color"]}
    frames = upright(frames, config["up"])
    if scans is None:
        dataset = PointDataset(frames, **options)
        dataset.leave_out(check_frames(dataset)[1])
    else:
        options.pop("superpoints", None)
        dataset = SceneDataset(upright(scans, config["up"]), frames, **options)
    tower = model.fusion.encoder_2d
    if tower is not None and config["clip_blocks"] == 0 and cache != "none":  # features in fp16, as in training
        device = model.head.weight.device
        features = FeatureCache(cache, f"clip {tower.fingerprint()}", lambda images: tower.encode(images.to(device)))
        features.build(dataset.images_only)
        dataset.feature_cache = features
    return DataLoader(dataset, config["batch_size"], collate_fn=batches_for(model, training=False))


def write_summary(args, config, frames, scans, output, seconds, scores):
    """Writes summary.json and says what was done; returns its content."""
    kind, count = ("frame", len(frames)) if scans is None else ("scan", len(scans))
    skipped = getattr(frames, "num_skipped", 0)
    total = int(output.counts.sum())
    share = output.counts / max(total, 1)
    summary = {
        "checkpoint": args.checkpoint,
        "options": {key: str(value) for key, value in vars(args).items() if value is not None},
        "training": config,
        "rotation_to_z_up": up_rotation(config["up"]).tolist(),
        f"{kind}s": count, "frames_skipped": skipped, "frames_without_depth": output.num_blank,
        "seconds": seconds, f"seconds_per_{kind}": seconds / count,
        "points": total, "share_of_points": dict(zip(output.class_names, share.tolist())),
        "queries": None if output.queries is None else output.queries.described(),
        "scores": scores,
        "scenes": output.scenes}
    summary = json.loads(json.dumps(summary), parse_constant=lambda name: None)  # NaN is not JSON
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{count} {kind}s, {skipped} frames skipped for a lost pose, {output.num_blank} without depth, "
          f"{seconds / count:.2f} s per {kind}; {len(output.scenes)} scenes in {args.out}")
    return summary


def score_all(model, config, frames, scans, output, cache):
    """{which points: metrics}, printed; empty if nothing has a true label."""
    if not output.points.semantics.confusion.any():
        return {}
    scores = {}
    smallest = min(map(len, group_by_scene(frame_names(frames)).values()))
    if smallest >= config["num_views"]:
        loader = same_points(model, config, frames, scans, cache)
        metrics = evaluate(model, loader, config["min_instance_points"], AMP_DTYPES[config["amp"]])
        scores["the points that train.py --eval draws"] = metrics
        print(format_metrics(metrics, output.class_names))
    else:
        print(f"a scene has {smallest} frames, fewer than the {config['num_views']} views of a sample in training: "
              "no scores of the points that train.py --eval draws")
    if scans is None:
        scores["every pixel"] = output.points.compute()
        scores["merged scenes"] = output.merged.compute()
    else:
        scores["every vertex"] = output.points.compute()
    for name, metrics in scores.items():
        means = {key: value for key, value in metrics.items() if key not in ("iou", "aps")}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))
    return scores


def ask(args, device, tower=None):
    """The command without a checkpoint: text answered by CLIP's dense features, merged over the frames of a scene."""
    config = {"no_clip": False, "clip_model": args.clip_model, "clip_pretrained": args.clip_pretrained or "openai",
              "clip_mean_std": None, "clip_blocks": 0, "image_size": args.image_size, "up": args.up or "z",
              "min_instance_points": 1}
    classes = None if args.classes is None else load_classes(args.classes)
    frames = open_frames(args.data, args.split, classes, args.label_map, args.intrinsics,
                         False if classes is None else None, format=args.format, pose=args.pose,
                         depth_scale=args.depth_scale)
    warn_of_faults(args, frames, config["up"])
    if config["clip_pretrained"] == "none":
        warn(RANDOM_CLIP)
    fusion = BiFusionEncoder(tower or build_tower(config), nn.Identity()).to(device).eval()
    names = parse_queries(args.text) if args.text else [[name] for name in frames.class_names]
    if classes is not None and [first for first, *_ in names] != frames.class_names:
        raise ValueError(f"--text {args.text!r} and --classes {args.classes} name other classes; give one of them, or "
                         "the same names in the same order, with synonyms")
    queries = TextQueries(fusion.encoder_2d, names, attention=args.attention)
    say_queries(queries)
    class_names = [first for first, *_ in names]
    class_ids = write_classes(args.out / "classes.txt", getattr(frames, "class_ids", range(1, len(names) + 1)) or
                              range(1, len(names) + 1), class_names)
    output = Output(args.out, class_ids, class_names, queries, partial(Scores, len(names), False),
                    [f"CLIP {args.clip_model}"], config["up"] if args.tensorboard else None)
    options = dict(num_points=sys.maxsize, image_size=tuple(args.image_size))
    answer = partial(ask_sample, fusion, up=config["up"], queries=queries)
    start = time.perf_counter()
    predict_scenes(partial(label_frames, answer, options=options, up=config["up"], queries=queries), frames, config,
                   queries, output, args.cloud_voxel)
    scores = {}
    if output.points.semantics.confusion.any():
        scores = {"every pixel": output.points.compute(), "merged scenes": output.merged.compute()}
        print(format_metrics(scores["merged scenes"], class_names))
    return write_summary(args, config, frames, None, output, time.perf_counter() - start, scores)


def main(argv=None, tower=None):
    """One run of the command; returns the content of summary.json. tower: see `model.load_model`."""
    args = parse_args(argv)
    _, _, device = setup(args.device)
    configure_device(device)
    if args.checkpoint is None:
        return ask(args, device, tower)
    model, class_names, config = load_model(args.checkpoint, device, args.clip_pretrained, tower)
    config["up"] = args.up or config["up"]
    ids = benchmark_ids(args.submission, class_names) if args.submission else None
    classes = find_classes(args, config, class_names)
    frames, scans = open_source(args, config, classes, class_names)
    warn_of_faults(args, frames, config["up"])
    queries = open_queries(args, model, config)
    class_ids = write_classes(args.out / "classes.txt", config["class_ids"], class_names)
    comments = [f"checkpoint {args.checkpoint}"]
    comments += [f"class {key} {name}" for key, name in zip(class_ids, class_names)]
    new_scores = partial(Scores, len(class_names), model.decoder is not None, config["min_instance_points"])
    output = Output(args.out, class_ids, class_names, queries, new_scores, comments,
                    config["up"] if args.tensorboard else None)

    start = time.perf_counter()
    if scans is not None:
        predict_scans(model, scans, frames, config, queries, output, ids)
    else:
        label = partial(predict_frames, model, config=config, queries=queries)
        predict_scenes(label, frames, config, queries, output, args.cloud_voxel)
    seconds = time.perf_counter() - start
    scores = score_all(model, config, frames, scans, output, args.cache)
    return write_summary(args, config, frames, scans, output, seconds, scores)


if __name__ == "__main__":
    run_command(main)
