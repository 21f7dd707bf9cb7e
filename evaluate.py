# SPDX-License-Identifier: MIT
"""Scores of a model over a loader, the table that a run ends with, and images of what the network sees.

Imports torch, numpy, and its siblings data, decoder, metrics, model, support/distributed and
support/visualize.
"""
import math

import numpy as np
import torch
import torch.distributed as dist

from data import camera_height, frame_names, group_by_scene, to_device, to_tensor, unproject
from decoder import paint_instances, scene_instances
from metrics import LABEL_DIVISOR, InstanceMeter, SemanticMeter
from model import batches_for, forward_in
from support.distributed import gather_objects
from support.visualize import clouds, visualizations

# ---------------------------------------------------------------------------------------------- scores


class Scores:
    """Semantic IoU and instance AP over any number of samples.

    Mean IoU is the mean over the classes that the truth holds; a class without truth is NaN.
    """

    def __init__(self, num_classes, with_instances, min_instance_points=100, device="cpu"):
        self.with_instances = with_instances
        self.semantics = SemanticMeter(range(num_classes), device)
        self.instances = InstanceMeter(range(1, num_classes + 1), min_instance_points)

    def update(self, labels, truth):
        """Adds points: labels, truth (P,) integers, -1 = none."""
        self.semantics.update(labels, truth)

    def update_instances(self, scene, truth, truth_instances):
        """scene: masks (R, P), labels (R,), scores (R,) of a sample; truth, truth_instances (P,) int64."""
        prediction = {**scene, "labels": scene["labels"] + 1}
        self.instances.update(prediction, ground_truth_ids(truth, truth_instances))

    def synchronize(self, world_size):
        """Sums over all processes."""
        if world_size > 1:
            dist.all_reduce(self.semantics.confusion)
            scenes = gather_objects(self.instances.scenes, world_size)
            self.instances.scenes = sum(scenes, [])

    def compute(self):
        """{"miou": float, "iou": [K]}; with instances also "ap", "ap50", "ap25" and "aps", [K] of all three."""
        per_class = self.semantics.compute()["per_class"]
        has_truth = self.semantics.confusion.sum(1).cpu() > 0  # (K,)
        iou = torch.tensor([*per_class.values()], dtype=torch.float64)  # (K,)
        iou = iou.where(has_truth, torch.nan)
        mean = iou.nanmean().item()
        metrics = {"miou": mean, "iou": iou.tolist()}
        if self.with_instances:
            metrics |= self.instances.compute()
            metrics["aps"] = [*metrics.pop("per_class").values()]
        return metrics


@torch.no_grad()
def evaluate(model, loader, min_instance_points=100, amp_dtype=torch.float32, world_size=1):
    """Scores of a Segmenter over the batches of a loader, of all processes; see `Scores.compute`."""
    was_training = model.training
    model.eval()
    device = model.device
    has_decoder = model.decoder is not None
    scores = Scores(model.num_classes, has_decoder, min_instance_points, device)
    for batch in loader:
        batch = to_device(batch, device)
        labels = batch["labels"]
        out = forward_in(amp_dtype, model, batch)
        scores.update(out["logits"].argmax(1), labels)
        if not has_decoder:
            continue
        scenes = scene_instances(out["decoder"], batch["point_to_superpoint"], batch["batch"],
                                 min_points=min_instance_points)
        for b, scene in enumerate(scenes):
            points = batch["batch"] == b
            scores.update_instances(scene, labels[points], batch["instances"][points])
    model.train(was_training)
    scores.synchronize(world_size)
    return scores.compute()


def ground_truth_ids(labels, instances):
    """labels, instances (P,) int64, -1 = none -> ids (P,) of `InstanceMeter`, for labels from 1; 0 = none.

    Instances are numbered anew within each class, because the data's own numbers may exceed 999. ValueError
    if a class has more than 1,000 in this sample.
    """
    counted = (labels >= 0) & (instances >= 0)
    values, place = torch.unique(instances[counted], return_inverse=True)
    keys = labels[counted] * len(values) + place  # by class, then instance
    keys, index = torch.unique(keys, return_inverse=True)
    kinds = keys // max(len(values), 1)
    first = torch.searchsorted(kinds, kinds)
    number = torch.arange(len(keys), device=keys.device) - first
    if (number >= LABEL_DIVISOR).any():
        raise ValueError(f"a class has {number.max() + 1} instances in one sample, ScanNet's ids allow "
                         f"{LABEL_DIVISOR}")
    ids = torch.zeros_like(labels)
    keys = (kinds + 1) * LABEL_DIVISOR + number
    ids[counted] = keys[index]
    return ids


def format_metrics(metrics, class_names):
    """The table that a run ends with: IoU and, if there is one, AP of every class, and their means."""
    columns = ["IoU"]
    means = [metrics["miou"]]
    rows = [[iou] for iou in metrics["iou"]]
    if "ap" in metrics:
        columns += ["AP", "AP50", "AP25"]
        means += [metrics["ap"], metrics["ap50"], metrics["ap25"]]
        rows = [[iou, *aps] for iou, aps in zip(metrics["iou"], metrics["aps"])]
    absent = [name for name, (iou, *_) in zip(class_names, rows) if math.isnan(iou)]

    def line(title, values):
        cells = [f"{value:>8.3f}" for value in values]
        return f"{title:<24}{''.join(cells)}"

    header = [f"{name:>8}" for name in columns]
    lines = [f"{'class':<24}{''.join(header)}"]
    lines += map(line, class_names, rows)
    lines.append(line(f"mean, {len(rows) - len(absent)} classes", means))
    if absent:
        lines.append(f"without truth, left out: {', '.join(absent)}")
    return "\n".join(lines)


def log_metrics(log, metrics, class_names):
    """Writes what `evaluate` returns, and sums it up in one line."""
    scores = {name: value for name, value in metrics.items() if name not in ("iou", "aps")}
    for name, value in scores.items():
        log.add_scalar(f"val/{name}", value)
    for name, value in zip(class_names, metrics["iou"]):
        log.add_scalar(f"val_iou/{name}", value)
    shown = {name.replace("miou", "mIoU").replace("ap", "AP"): value for name, value in scores.items()}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())


# ---------------------------------------------------------------------------------------------- images


def visualize(log, model, dataset, class_names, min_instance_points):
    """Writes what the network makes of 4 samples, and of the cloud of the first scene, to TensorBoard."""
    names = frame_names(dataset.frames)
    samples = range(len(dataset))
    first_names = [names[dataset.frame_indices(index)[0]] for index in samples]
    scene, members = next(iter(group_by_scene(first_names).items()))
    shown = evenly(samples, 4)
    in_cloud = evenly(members, 8)
    model.eval()
    views = {}
    for index in {*shown, *in_cloud}:
        views[index] = first_view(model, dataset, index, min_instance_points)
    model.train()
    log.add_images(visualizations([views[index] for index in shown], class_names))
    merged = clouds([views[index] for index in in_cloud])
    # TensorBoard shows what stands before the "/"
    log.add_clouds({f"{kind}/{scene}": cloud for kind, cloud in merged.items()})


def evenly(items, count):
    """At most `count` items, evenly spread."""
    count = min(count, len(items))
    places = np.linspace(0, len(items) - 1, count).round()
    return [items[int(place)] for place in places]


@torch.no_grad()
def first_view(model, dataset, index, min_instance_points):
    """What the network makes of a sample, from its first frame, as `visualizations` and `clouds` take it."""
    batch = batches_for(model, training=False)([dataset[index]])
    batch = to_device(batch, model.device)
    out = model(batch)
    frames = dataset.frame_indices(index)
    images = [to_tensor(dataset.images_only[frame]) for frame in frames]  # V of (3, H, W)
    size = images[0].shape[1:]
    uv, visible, _ = model.fusion.project(batch, size)
    pose = batch["world2cam"][0, 0]
    view = {"uv": uv[:, 0],
            "seen": visible[:, 0],
            "depth": batch["points"] @ pose[2, :3] + pose[2, 3],
            "camera_height": camera_height(pose),
            "points": batch["points"],
            "colors": batch["features"][:, :3],
            "truth": batch["labels"],
            "prediction": out["logits"].argmax(1),
            "fused": out["feat_fusion"].float()}
    if out["clip_global"] is not None:
        view["gate"] = out["alpha"].float().mean(1)
        view["clip_map"], view["clip"] = clip_features(model, batch, size)
    if model.decoder is not None:
        scene, = scene_instances(out["decoder"], batch["point_to_superpoint"], batch["batch"],
                                 min_points=min_instance_points, score_threshold=0.3)
        view["instances"] = paint_instances(scene["masks"])
        view["instance_labels"] = scene["labels"]
        view["instance_scores"] = scene["scores"]
        view["instances_truth"] = batch["instances"]
    view = {key: value.cpu() for key, value in view.items()}
    view |= {"name": batch["name"][0], "image": images[0]}
    if len(images) > 1:
        view["other_view"] = second_on_first_view(model, batch, images)
    return view


def clip_features(model, batch, image_size):
    """CLIP's tokens of the first view (D, Hf, Wf), and at each point (N, D), 0 if no view sees it."""
    if "clip_tokens" in batch:
        tokens = batch["clip_tokens"][0]  # (V, D, Hf, Wf)
    else:
        tokens, _ = model.fusion.encoder_2d.encode(batch["images"][0])
    tokens = tokens.float()
    _, (at_points,) = model.fusion.sample(batch, image_size, [tokens])
    return tokens[0], at_points


def second_on_first_view(model, batch, images, count=4000):
    """Points of the second view's depth on the first view's image: uv (n, 2), and their colors (n, 3).

    They do not fit that image if a pose is wrong.
    """
    pose = batch.get("depth_world2cam", batch["world2cam"])
    pose = pose[0, 1].cpu().double()
    intrinsics = batch["depth_intrinsics"][0, 1].cpu().double()
    depth = batch["depth"][0, 1].cpu()
    v, u = depth.nonzero(as_tuple=True)
    step = max(1, len(u) // count)
    v, u = v[::step], u[::step]
    pixels = torch.stack([u, v], 1)
    points = unproject(pixels.numpy(), depth[v, u].numpy(), intrinsics.numpy(), pose.numpy())
    scene = {"points": torch.from_numpy(points).float(),
             "batch": torch.zeros(len(points), dtype=torch.int64),
             "world2cam": batch["world2cam"][:, :2].cpu(),
             "intrinsics": batch["intrinsics"][:, :2].cpu()}
    first, second = images[:2]
    uv, visible, _ = model.fusion.project(scene, first.shape[1:])
    uv = uv[visible.all(1)]  # (n, 2, 2)
    u, v = uv[:, 1].round().long().T
    return uv[:, 0], second[:, v, u].T
