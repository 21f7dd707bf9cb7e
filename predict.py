# SPDX-License-Identifier: MIT
"""A trained network on frames: labels for every pixel of known depth, and scores if there are labels to compare with.

    from model import load_model
    from predict import predict_frames
    from scannet import ScanNetFrames
    model, class_names, config = load_model("runs/NAME/best.pt")
    for result in predict_frames(model, ScanNetFrames("DATA", classes=None), config):
        print(result["name"], result["labels"].shape)

Imports data, decoder, distributed, metrics, model and superpoints.
"""
import sys
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from data import PointDataset, collate, depth_to_color
from decoder import scene_instances
from distributed import gather_objects
from metrics import LABEL_DIVISOR, InstanceMeter, SemanticMeter
from model import to_device
from superpoints import oversegment


@torch.no_grad()
def evaluate(model, loader, min_instance_points=100, amp_dtype=torch.float32, world_size=1):
    """Scores of a Segmenter over a loader of labelled batches and all processes.

    Returns {"miou": float, "iou": [K]}, with an instance decoder also {"ap", "ap50", "ap25": float, "aps": [K] of (AP,
    AP50, AP25)}; a class that does not occur is NaN. The model's mode is left as it was found.
    """
    was_training = model.training
    model.eval()
    device = model.head.weight.device
    num_classes = model.head.out_features
    semantics = SemanticMeter(range(num_classes), device)
    instances = InstanceMeter(range(1, num_classes + 1), min_instance_points)
    for batch in loader:
        batch = to_device(batch, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            out = model(batch)
        semantics.update(out["logits"].argmax(1), batch["labels"])
        if model.decoder is None:
            continue
        scenes = scene_instances(out["decoder"], out["point_to_superpoint"], batch["batch"],
                                 min_points=min_instance_points)
        for b, scene in enumerate(scenes):
            points = batch["batch"] == b
            truth = ground_truth_ids(batch["labels"][points], batch["instances"][points])
            instances.update({**scene, "labels": scene["labels"] + 1}, truth)
    model.train(was_training)

    if world_size > 1:
        dist.all_reduce(semantics.confusion)
        instances.scenes = sum(gather_objects(instances.scenes, world_size), [])
    result = semantics.compute()
    metrics = {"miou": result["miou"], "iou": [result["per_class"][c] for c in range(num_classes)]}
    if model.decoder is not None:
        result = instances.compute()
        metrics |= {name: result[name] for name in ("ap", "ap50", "ap25")}
        metrics["aps"] = [result["per_class"][c] for c in range(1, num_classes + 1)]
    return metrics


def ground_truth_ids(labels, instances):
    """labels, instances (P,) int64, -1 = none -> (P,) ids of `InstanceMeter`: (label + 1) * 1000 + instance, 0 = none.

    The instances are numbered anew, because the data's own numbers may exceed 999.
    """
    number = torch.unique(instances, return_inverse=True)[1]
    return torch.where((labels >= 0) & (instances >= 0), (labels + 1) * LABEL_DIVISOR + number, 0)


def format_metrics(metrics, class_names):
    """The table that a run ends with: IoU, and AP if there is one, of every class and their means."""
    columns = ["AP", "AP50", "AP25"] if "ap" in metrics else []
    lines = [f"{'class':<24}" + "".join(f"{name:>8}" for name in ["IoU", *columns])]
    for i, name in enumerate(class_names):
        values = [metrics["iou"][i], *(metrics["aps"][i] if columns else ())]
        lines.append(f"{name:<24}" + "".join(f"{value:>8.3f}" for value in values))
    means = [metrics["miou"], *(metrics[name.lower()] for name in columns)]
    lines.append(f"{'mean':<24}" + "".join(f"{value:>8.3f}" for value in means))
    return "\n".join(lines)


@torch.no_grad()
def predict_frames(model, frames, config, instance_score=0.3, probabilities=False):
    """Labels every pixel of known depth, frame by frame; a generator of one dict per frame.

    model: a Segmenter in eval mode. frames: a sequence of frame dicts (see data.py); labels are not needed. config: the
    options that the model was trained with. instance_score: instances with a lower score are left out.
    A result holds "name", and of the depth image's size: "labels" (Hd, Wd) int64, index of the class; "instances"
    (Hd, Wd) int64, numbered from 0 with the best first, if the model has a decoder; "probabilities" (Hd, Wd, K) float32
    on demand. Pixels of unknown depth, and those outside the colour image, hold -1 (probabilities: 0). "scores" and
    "instance_labels" are lists with one entry per instance.
    """
    device = model.head.weight.device
    options = dict(num_points=sys.maxsize, image_size=tuple(config["image_size"]), color=not config["no_color"],
                   images=not config["no_clip"])
    if model.decoder is not None and config["superpoints"]:
        options["superpoints"] = partial(oversegment, count=config["superpoints"])
    for frame in frames:
        batch = to_device(collate([PointDataset([frame], **options)[0]]), device)
        out = model(batch)
        pixels = depth_to_color(frame)[0]  # flat index of each point, in the order of the points

        def to_image(values, fill=-1):
            """(N, ...) -> (Hd, Wd, ...)"""
            image = np.full((frame["depth"].size, *values.shape[1:]), fill, values.dtype)
            image[pixels] = values
            return image.reshape(*frame["depth"].shape, *values.shape[1:])

        result = {"name": frame["name"], "labels": to_image(out["logits"].argmax(1).cpu().numpy())}
        if probabilities:
            result["probabilities"] = to_image(out["logits"].float().softmax(1).cpu().numpy(), 0)
        if model.decoder is not None:
            scene, = scene_instances(out["decoder"], out["point_to_superpoint"], batch["batch"],
                                     min_points=config["min_instance_points"], score_threshold=instance_score)
            result["instances"] = to_image(paint_instances(scene["masks"]).cpu().numpy())
            result["scores"] = scene["scores"].tolist()
            result["instance_labels"] = scene["labels"].tolist()
        yield result


def paint_instances(masks):
    """masks (R, P) bool, best first -> (P,) int64: the best instance of every point, -1 = none."""
    if len(masks) == 0:
        return torch.full(masks.shape[1:], -1, device=masks.device)
    return torch.where(masks.any(0), masks.int().argmax(0), -1)  # argmax gives the first of equals
