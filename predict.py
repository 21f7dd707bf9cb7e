# SPDX-License-Identifier: MIT
"""A trained network on frames: labels for every pixel of known depth, merged clouds, text queries, and scores.

    python predict.py runs/NAME/best.pt --data DIR --out OUT
    python predict.py runs/NAME/best.pt --data DIR --out OUT --text "chair, red sofa | couch, something to sit on"
    python predict.py runs/NAME/best.pt --data 7SCENES/chess --out OUT --intrinsics 585,585,320,240
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
import re
import sys
import time
from functools import partial
from os.path import samefile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from check import pinhole, quick_check
from data import (PER_POINT, PER_VIEW, PointDataset, SceneDataset, camera_height, depth_to_color, group_by_scene,
                  to_device, up_rotation, upright)
from decoder import paint_instances, scene_instances
from evaluate import Scores, evaluate, format_metrics
from model import batches_for, load_model
from sources.open import open_frames, open_scans
from sources.scannet import load_classes
from superpoints import oversegment
from support.cache import FeatureCache
from support.clouds import MERGE_VOXEL, SceneMerger, write_ply, write_submission
from support.distributed import setup
from support.runlog import RunLog
from support.runtime import Parser, checked_by, configure_device, run_command
from support.visualize import clouds, label_colors

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INSTANCE_SCORE = 0.3  # instances with a lower score are not written

# ---------------------------------------------------------------------------------------------- one sample


def fuse_in_draws(fusion, batch, draw_size, at_once=8):
    """Fused features of all points of one sample, as if they were drawn in training: (N, C), and the gate (N,).

    Every point is in exactly one of several random draws of at most draw_size points, which are independent samples for
    the network, `at_once` of them per forward pass. Images are encoded once. The draws depend on the number of points
    alone. The gate is averaged over channels.
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

    sample: of a data set that draws every point, with z up. queries: a TextQueries. Holds points (N, 3), of the data's
    own world, colors (N, 3), truth and truth_instances (N,), probabilities (N, K), labels (N,), gate (N,), and with
    queries cosines (N, T). If the model has a decoder, also "scene", all instances as decoder.instances_from_logits gives
    them, and of those that score above instance_score instance_labels and scores (R,), and instances (N,), the best one
    at each point, -1 = none. camera_height is the mean height of its cameras, meters along the world's up axis.
    """
    device = model.head.weight.device
    batch = to_device(batches_for(model, training=False)([sample]), device)
    points = sample["points"].numpy()
    if config["up"] != "z":
        points = (points @ up_rotation(config["up"])).astype(np.float32)
    colors = batch["features"][:, :3]
    if config["no_color"]:
        batch["features"] = torch.cat([torch.ones_like(colors), batch["features"][:, 3:]], 1)
    dense = None
    if model.fusion.encoder_2d is not None:  # each image is encoded once
        encode = model.fusion.encoder_2d.encode
        if queries is not None and queries.source == "clip":
            encode = model.fusion.encoder_2d.encode_with_dense
        tokens, pooled, *dense = encode(batch.pop("images")[0])
        batch |= {"clip_tokens": tokens[None], "clip_pooled": pooled[None]}
    num_views = batch["world2cam"].shape[1]
    draw_size = max(1, config["num_points"] * num_views // config["num_views"])
    feat_fusion, gate = fuse_in_draws(model.fusion, batch, draw_size)

    # the rest of the network sees all points at once, so a superpoint is the mean of all of its points
    out = model.decode(feat_fusion, batch)
    probabilities = out["logits"].float().softmax(1)
    result = {"points": torch.from_numpy(points).to(device), "colors": colors, "truth": batch["labels"],
              "truth_instances": batch["instances"], "camera_height": camera_height(batch["world2cam"][0]).mean(),
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


def sample_options(model, config):
    """Keyword arguments of data.PointDataset that draw every point of a frame, with its color."""
    options = dict(num_points=sys.maxsize, image_size=tuple(config["image_size"]), images=not config["no_clip"])
    if model.decoder is not None and config["superpoints"]:
        options["superpoints"] = partial(oversegment, count=config["superpoints"])
    return options


def predict_frames(model, frames, config, instance_score=INSTANCE_SCORE, probabilities=False, queries=None):
    """Labels every pixel of known depth, frame by frame; a generator of one dict per frame.

    model: a Segmenter in eval mode. frames: a sequence of frame dicts (see data.py); labels are not needed. config: the
    options that the model was trained with. instance_score: instances with a lower score are left out. queries: a
    TextQueries.
    A result holds "name", and of the depth image's size: "labels" (Hd, Wd) int64, index of the class; "instances"
    (Hd, Wd) int64, numbered from 0 with the best first, if the model has a decoder; "probabilities" (Hd, Wd, K) float32
    on demand; "queries" (Hd, Wd, Q) float32, the probability of every query. Pixels of unknown depth, and those outside
    the colour image, hold -1 (probabilities and queries: 0). "scores" and "instance_labels" are lists with one entry
    per instance. "points" is the result of `predict_sample`, with one row per point.
    """
    options = sample_options(model, config)
    frames = upright(frames, config["up"])
    for index in range(len(frames)):
        frame = frames[index]
        points = predict_sample(model, PointDataset([frame], **options)[0], config, queries, instance_score)
        pixels = depth_to_color(frame)[0]  # flat index of each point, in the order of the points

        def to_image(values, fill=-1):
            """(N, ...) -> (Hd, Wd, ...)"""
            values = values.cpu().numpy()
            image = np.full((frame["depth"].size, *values.shape[1:]), fill, values.dtype)
            image[pixels] = values
            return image.reshape(*frame["depth"].shape, *values.shape[1:])

        result = {"name": frame["name"], "points": points, "labels": to_image(points["labels"])}
        if probabilities:
            result["probabilities"] = to_image(points["probabilities"], 0)
        if queries is not None:
            result["queries"] = to_image(queries.probabilities(points["cosines"]), 0)
        if "instances" in points:
            result["instances"] = to_image(points["instances"])
            result["scores"] = points["scores"].tolist()
            result["instance_labels"] = points["instance_labels"].tolist()
        yield result


# ---------------------------------------------------------------------------------------------- text

TEMPLATES = ("a {} in a scene", "a photo of a {}.", "a photo of the {}.", "a photo of a {} in a room.",
             "a photo of the large {}.", "a photo of the small {}.", "there is a {} in the scene.")
NEUTRAL = ("object", "things", "stuff", "texture")  # compete with the queries, so that one query alone means something
TEXT_SCALE = 40.0


def parse_queries(text):
    """"chair, red sofa | couch" -> [["chair"], ["red sofa", "couch"]]: queries, each with its names."""
    queries = [[name.strip() for name in query.split("|")] for query in text.split(",")]
    for names in queries:
        if "" in names:
            raise ValueError(f"--text {text!r}: an empty name; write queries as \"chair, red sofa | couch\"")
    fields = field_names(queries)
    for field in fields:
        if fields.count(field) > 1 or field in ("label", "instance", "confidence", "gate"):
            raise ValueError(f"--text {text!r}: the field scalar_{field} of a PLY file would be written twice")
    return queries


def field_names(queries):
    """Names of the PLY fields of queries: their first names, or query_1 and so on for other scripts than ASCII."""
    names = [re.sub(r"\W+", "_", names[0]).strip("_") for names in queries]
    return [name if name.isascii() and name else f"query_{number}" for number, name in enumerate(names, 1)]


class TextQueries:
    """Queries in words, compared with CLIP's dense features or with the network's fused ones.

    encoder_2d: an Enhanced2DEncoder. text: see `parse_queries`. source: "clip": the dense features of CLIP itself;
    "fused": the network's, which only a trained consistency loss ties to text.
    A name is the normalized mean of its normalized embeddings in TEMPLATES. A point's logits are TEXT_SCALE times its
    cosines with all names, NEUTRAL ones included; a query gets the largest probability among its names.
    """

    def __init__(self, encoder_2d, text, source="clip"):
        if encoder_2d is None:
            raise ValueError("text queries need a network with a CLIP tower, and this one was trained with --no-clip")
        self.names = parse_queries(text)
        self.source = source
        names = [*sum(self.names, []), *NEUTRAL]  # T
        prompts = [template.format(name) for name in names for template in TEMPLATES]
        embedding = F.normalize(encoder_2d.encode_prompts(prompts).float(), dim=1)
        self.embedding = F.normalize(embedding.unflatten(0, (len(names), -1)).mean(1), dim=1)  # (T, E)
        if source == "fused":
            self.embedding = F.normalize(encoder_2d.project_global(self.embedding), dim=1)  # (T, 256)

    def cosines(self, fusion, batch, feat_fusion, dense=None):
        """Cosines (N, T) of the points of one sample with all names; with "clip" they are 0 if no view sees a point.

        feat_fusion (N, C), of the network. dense (V, E, Hf, Wf): CLIP's dense features of the sample's views. A point
        takes the interpolated cosines of the cells around it: that needs T channels per point instead of E.
        """
        if self.source == "fused":
            return F.normalize(feat_fusion.float(), dim=1) @ self.embedding.T
        maps = torch.einsum("vehw,te->vthw", dense, self.embedding)
        return fusion.sample(batch, fusion.encoder_2d.image_size, [maps])[1][0]

    def probabilities(self, cosines):
        """Cosines (N, T) -> the probability of each query (N, Q); 0 for cosines of 0."""
        likely = (TEXT_SCALE * cosines).softmax(1) * cosines.any(1, keepdim=True)
        columns = likely.split([*map(len, self.names), len(NEUTRAL)], 1)[:-1]
        return torch.stack([column.amax(1) for column in columns], 1)


# ---------------------------------------------------------------------------------------------- files


def write_frame(folder, stem, result, class_ids):
    """label/<stem>.png, instance/<stem>.png (0 = none) and instance/<stem>.txt: number, class id, confidence per line.
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


# ---------------------------------------------------------------------------------------------- the command


def parse_args(argv=None):
    """The options of the command."""
    parser = Parser("predict.py", "Labels every pixel of known depth and merges the frames of a scene.")
    parser.add_argument("checkpoint", help="a best.pt or last.pt of train.py")
    parser.add_argument("--data", required=True, help="folder in ScanNet's exported 2D layout, labelled or not; with "
                        "--intrinsics a folder of frame-*.color.*, .depth.png, .pose.txt; or 'rooms' (built in)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write into")
    parser.add_argument("--split", help="file with one scene or scene/frame per line; not given: everything")
    parser.add_argument("--classes", help="class list of the data, one 'id name' pair per line; not given: classes.txt "
                        "in the folder, else the list that the network was trained with")
    parser.add_argument("--label-map", help="scannetv2-labels.combined.tsv, as in train.py; not given: that of training, "
                        "if its class list is used")
    parser.add_argument("--scans", help="folder of whole ScanNet scans: points from there, views from --data")
    parser.add_argument("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="of all frame-* images, pixels")
    parser.add_argument("--up", type=checked_by(up_rotation), help="axis of the data's world that points up; not given: as in "
                        "training")
    parser.add_argument("--text", help='queries, such as "chair, red sofa | couch, something to sit on"; | separates '
                        "names of one query")
    parser.add_argument("--text-from", choices=("clip", "fused"), default="clip", help="compare the text with CLIP's "
                        "dense features or with the network's own, if its consistency loss was on")
    parser.add_argument("--tensorboard", action="store_true", help="also show the merged clouds in TensorBoard's mesh "
                        "view: tensorboard --logdir OUT")
    parser.add_argument("--submission", choices=("scannet20", "scannet200"), help="write files for this benchmark; "
                        "needs --scans")
    parser.add_argument("--clip-pretrained", metavar="FILE", help="CLIP's weights, if they do not lie where "
                        "they lay in training")
    parser.add_argument("--cache", default=".cache", help="folder for what scoring reads; 'none': keep nothing")
    parser.add_argument("--device", help="not given: cuda if there is one, else cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.submission and not args.scans:
        parser.error("--submission needs --scans: the benchmark scores the vertices of whole scans")
    if args.intrinsics is not None and args.scans:
        parser.error("--intrinsics and --scans exclude each other")
    if args.data == "rooms" and (args.split or args.classes or args.scans or args.intrinsics is not None):
        parser.error("the built-in rooms take no --split, --classes, --scans or --intrinsics")
    if args.text is None and args.text_from != "clip":
        parser.error("--text-from needs --text")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder")
    return args


def find_classes(args, config, class_names):
    """The class list {id: name} of the data in the network's order, or None if there is none of the same classes.

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
        scans, frames = open_scans(args.scans, args.data, args.split, classes, args.label_map, labels)
    else:  # of the built-in rooms those that validate a training with these options
        val_rooms = config.get("val_rooms", -(-config["rooms"] * 3 // 8))  # older checkpoints do not say
        rooms = val_rooms, config["frames_per_room"]
        split = "val" if args.data == "rooms" else args.split
        frames = open_frames(args.data, split, classes, args.label_map, args.intrinsics, labels, rooms=rooms)
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
        warn("CLIP IS RANDOMLY INITIALISED: the answers to --text mean nothing")
    elif args.text_from == "fused" and max(config["clip_weights"]) == 0:
        warn("--text-from fused: the consistency loss had no weight in training, so the answers mean nothing")
    queries = TextQueries(model.fusion.encoder_2d, args.text, args.text_from)
    for field, names in zip(field_names(queries.names), queries.names):
        print(f"query {field}: {', '.join(names)}")
    print(f"beside them: {', '.join(NEUTRAL)}; templates: {', '.join(TEMPLATES)}")
    return queries


def write_classes(path, classes, class_names):
    """Writes the class list of the output and returns its ids (K + 1,), the last for pixels without a label.

    The ids are those of the data's class list (the first of several), and 1 + index if there is none.
    """
    ids = np.arange(1, len(class_names) + 1)
    if classes is not None:
        known = {name: key for key, name in reversed(classes.items())}
        ids = np.array([known[name] for name in class_names])
    none = 65535 if 0 in ids else 0
    if ids.max() > 65534:
        raise ValueError(f"class id {ids.max()} does not fit into a 16-bit image")
    lines = [f"{none} unlabeled\n"] + [f"{key} {name}\n" for key, name in zip(ids, class_names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return np.append(ids, none)


class Output:
    """What a run of the command writes into its folder, and what it counts and scores on the way.

    new_scores: a function that makes empty `Scores`. comments: lines for the header of PLY files. log_up: the axis of
    the data's world that points up, if the clouds are to be shown in TensorBoard; or None.
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
        self.scenes = {}

    def add_frame(self, result):
        """Images and scores of a result of `predict_frames`."""
        scene, stem = result["name"].split("/", 1)
        write_frame(self.folder / scene, stem, result, self.class_ids)
        self.score(self.points, result["points"])

    def score(self, scores, points):
        """Counts points with their labels, truth and instances; nothing if no point has a true label."""
        labels, truth = torch.as_tensor(points["labels"]), torch.as_tensor(points["truth"])
        if scores is self.points:
            self.counts += torch.bincount(labels, minlength=len(self.class_names)).cpu().numpy()
        if not (truth >= 0).any():
            return
        scores.update(labels, truth)
        if "instances" in points:
            instances, kinds = torch.as_tensor(points["instances"]), torch.as_tensor(points["instance_labels"])
            scene = {"masks": instances == torch.arange(len(kinds), device=instances.device)[:, None], "labels": kinds,
                     "scores": torch.as_tensor(points["scores"])}
            scores.update_instances(scene, truth, torch.as_tensor(points["truth_instances"]))

    def add_cloud(self, name, cloud, camera_height):
        """The PLY files of a scene; cloud: as `SceneMerger.cloud` gives it. camera_height: mean, metres."""
        scalars = {"label": self.class_ids[cloud["labels"]], "confidence": cloud["confidence"], "gate": cloud["gate"]}
        entry = {"points": len(cloud["labels"]), "instances": []}
        if "instances" in cloud:
            scalars["instance"] = cloud["instances"] + 1
            sizes = np.bincount(cloud["instances"] + 1, minlength=len(cloud["scores"]) + 1)[1:]
            for i, label in enumerate(cloud["instance_labels"]):
                entry["instances"].append({"id": i + 1, "class": self.class_names[label], "points": int(sizes[i]),
                                           "confidence": float(cloud["scores"][i])})
        if self.queries is not None:
            scalars |= dict(zip(field_names(self.queries.names), cloud["queries"].T))
        write_ply(self.folder / f"{name}.ply", cloud["points"], cloud["colors"], scalars, self.comments)
        painted = label_colors(torch.as_tensor(cloud["labels"])).numpy()
        write_ply(self.folder / f"{name}_labels.ply", cloud["points"], painted, scalars, self.comments)
        self.scenes[name] = entry
        if self.log_up is not None:
            self.show_cloud(name, cloud, camera_height)

    def show_cloud(self, name, cloud, camera_height):
        """The same cloud in TensorBoard; every scene is a run."""
        view = {"points": cloud["points"] @ up_rotation(self.log_up).T, "colors": cloud["colors"], "prediction": cloud["labels"],
                "gate": cloud["gate"]}
        if "instances" in cloud:
            view["instances"] = cloud["instances"]
        if (cloud["truth"] >= 0).any():
            view |= {"truth": cloud["truth"], "instances_truth": cloud["truth_instances"]}
        if self.queries is not None:
            fields = [f"query_{field}" for field in field_names(self.queries.names)]
            view |= dict(zip(fields, cloud["queries"].T))
        view = {kind: torch.as_tensor(values) for kind, values in view.items()} | {"camera_height": camera_height}
        for old in (self.folder / name).glob("events.out.tfevents*"):
            old.unlink()
        log = RunLog(self.folder / name)
        log.add_clouds({f"{kind}/{name}": shown for kind, shown in clouds([view]).items()})
        log.close()

    def add_scan(self, name, points, ids):
        """The files of a scan, a result of `predict_sample`; ids: of a benchmark, or None."""
        cloud = {key: value.cpu().numpy() for key, value in points.items() if isinstance(value, torch.Tensor)}
        cloud["confidence"] = cloud["probabilities"].max(1)
        if self.queries is not None:
            cloud["queries"] = self.queries.probabilities(points["cosines"]).cpu().numpy()
        self.add_cloud(name, cloud, float(points["camera_height"]))
        self.score(self.points, points)
        if ids is not None:
            scene = {key: value.cpu().numpy() for key, value in points["scene"].items()} if "scene" in points else None
            write_submission(self.folder / "submission", name, cloud["labels"], scene, ids)


def same_points(model, config, frames, scans, cache):
    """A loader of the points that `train.py --eval` draws from these frames, which have z up."""
    options = sample_options(model, config)
    options |= {"num_points": config["num_points"], "num_views": config["num_views"], "seed": config["seed"],
                "color": not config["no_color"]}
    if scans is not None:
        options.pop("superpoints", None)  # scans bring their own
        dataset = SceneDataset(scans, frames, **options)
    else:
        dataset = PointDataset(frames, **options)
    encoder = model.fusion.encoder_2d
    if encoder is not None and config["clip_blocks"] == 0 and cache != "none":  # features in fp16, as in training
        device = model.head.weight.device
        owner = f"clip {encoder.fingerprint()}"
        features = FeatureCache(cache, owner, lambda images: encoder.encode(images.to(device)))
        features.build(dataset.images_only)
        dataset.feature_cache = features
    return DataLoader(dataset, config["batch_size"], collate_fn=batches_for(model, training=False))


def main(argv=None):
    """One run of the command; returns the content of summary.json."""
    args = parse_args(argv)
    _, _, device = setup(args.device)
    configure_device(device)
    model, class_names, config = load_model(args.checkpoint, device, args.clip_pretrained)
    config["up"] = args.up or config["up"]
    ids = benchmark_ids(args.submission, class_names) if args.submission else None
    classes = find_classes(args, config, class_names)
    frames, scans = open_source(args, config, classes, class_names)
    for fault, words in quick_check(frames, config["up"]) if args.data != "rooms" else ():
        warn(f"{args.data} looks wrong: {fault}: {words} `python check.py` tells more.")
    queries = open_queries(args, model, config)
    class_ids = write_classes(args.out / "classes.txt", classes, class_names)
    comments = [f"checkpoint {args.checkpoint}", *(f"class {key} {name}" for key, name in zip(class_ids, class_names))]
    new_scores = partial(Scores, len(class_names), model.decoder is not None, config["min_instance_points"])
    output = Output(args.out, class_ids, class_names, queries, new_scores, comments,
                    config["up"] if args.tensorboard else None)

    # every point
    start = time.perf_counter()
    options = sample_options(model, config)
    if scans is not None:
        options.pop("superpoints", None)
        dataset = SceneDataset(upright(scans, config["up"]), upright(frames, config["up"]),
                               num_views=config["num_views"], **options)
        for index in tqdm(range(len(dataset)), unit="scan"):
            output.add_scan(dataset.scenes.names[index], predict_sample(model, dataset[index], config, queries), ids)
    else:
        bar = tqdm(total=len(frames), unit="frame")
        for scene, members in group_by_scene(frames.names).items():
            merger = SceneMerger(len(class_names), min(MERGE_VOXEL, config["voxel_size"]))
            heights = []
            for result in predict_frames(model, Subset(frames, members), config, queries=queries):
                output.add_frame(result)
                merger.add(result["points"])
                heights.append(float(result["points"]["camera_height"]))
                bar.update()
            cloud = merger.cloud(config["min_instance_points"], queries)
            output.add_cloud(scene, cloud, sum(heights) / len(heights))
            output.score(output.merged, cloud)
        bar.close()
    seconds = time.perf_counter() - start

    # scores
    count = len(frames if scans is None else scans)
    kind = "frame" if scans is None else "scan"
    skipped = getattr(frames, "num_skipped", 0)
    scores = {}
    if output.points.semantics.confusion.any():
        smallest = min(map(len, group_by_scene(frames.names).values()))
        if smallest >= config["num_views"]:
            turned = [None if source is None else upright(source, config["up"]) for source in (frames, scans)]
            loader = same_points(model, config, *turned, args.cache)
            scores["the points that train.py --eval draws"] = evaluate(model, loader, config["min_instance_points"],
                                                                       AMP_DTYPES[config["amp"]])
            print(format_metrics(*scores.values(), class_names))
        else:
            print(f"a scene has {smallest} frames, fewer than the {config['num_views']} views of a sample in training: no "
                  "scores of the points that train.py --eval draws")
        scores["every pixel" if scans is None else "every vertex"] = output.points.compute()
        if scans is None:
            scores["merged scenes"] = output.merged.compute()
        for name, metrics in scores.items():
            print(f"{name}: " + ", ".join(f"{key} {metrics[key]:.3f}" for key in metrics if key not in ("iou", "aps")))
    share = output.counts / max(output.counts.sum(), 1)
    options = {key: str(value) for key, value in vars(args).items() if value is not None}
    summary = {
        "checkpoint": args.checkpoint, "options": options,
        "training": config, f"{kind}s": count, "frames_skipped": skipped, "seconds": seconds,
        f"seconds_per_{kind}": seconds / count, "points": int(output.counts.sum()),
        "share_of_points": dict(zip(class_names, share.tolist())),
        "queries": None if queries is None else {"names": queries.names, "neutral": NEUTRAL, "templates": TEMPLATES},
        "scores": scores, "scenes": output.scenes}
    summary = json.loads(json.dumps(summary), parse_constant=lambda name: None)  # NaN is not JSON
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{count} {kind}s, {skipped} frames skipped for a lost pose, {seconds / count:.2f} s per {kind}; "
          f"{len(output.scenes)} scenes in {args.out}")
    return summary


if __name__ == "__main__":
    run_command(main)
