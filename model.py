# SPDX-License-Identifier: MIT
"""The whole network: fused point features, and the semantics and instances that are read off them.

    from model import load_model
    model, class_names, config = load_model("runs/NAME/best.pt")          # in eval mode, ready for predict.predict_frames

`Segmenter` puts a linear semantic head and, if wanted, an instance decoder behind a `BiFusionEncoder`. `build_model`
makes one from the options of a run, a plain dict; `load_model` from a checkpoint. Another backbone or gate is one line
of `build_model`.

Imports torch, and its siblings checkpoint, decoder, encoder, fusion, sparse_unet.
"""
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from support.checkpoint import read_checkpoint, restore
from decoder import InstanceDecoder, draw_queries, pool, superpoint_index, unpad_scenes
from encoder import Enhanced2DEncoder, set_tf32
from fusion import BiFusionEncoder
from sparse_unet import COLORS, NETWORKS, PointEncoder


class Segmenter(nn.Module):
    """Semantic logits for every point, and instances as sets of superpoints.

    fusion: a BiFusionEncoder with outputs (N, embed_dim). decoder: an InstanceDecoder, or None for semantics alone.
    With a decoder, the logits of a point are the sum of its own, its superpoint's, and those of the instances that hold
    its superpoint: the point sees sharper borders, the superpoint more context, and an instance the whole object. If a
    batch has no superpoints, cubes of `cell` metres stand in for them.
    """

    def __init__(self, fusion, num_classes, decoder=None, embed_dim=256, cell=0.2):
        super().__init__()
        self.cell = cell
        self.fusion = fusion
        self.head = nn.Linear(embed_dim, num_classes)
        self.decoder = decoder
        if decoder is not None:  # the position separates instances that look alike
            self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, embed_dim))

    def forward(self, batch):
        """batch of `data.collate` -> the output of `fusion` and "logits" (N, K).

        With a decoder also "point_to_superpoint" (N,) in [0, S), "superpoint_batch" (S,) and "decoder", its output.
        """
        out = self.fusion(batch)
        out["logits"] = self.head(out["feat_fusion"])  # (N, K)
        if self.decoder is None:
            return out
        if "queries" not in batch:
            batch = number_superpoints(batch, self.cell, self.decoder.min_query_share if self.decoder.training else 1.0)
        point_to_superpoint, superpoint_batch = batch["point_to_superpoint"], batch["superpoint_batch"]
        S = len(superpoint_batch)

        # position of a superpoint within its scene
        centre = pool(batch["coords"], point_to_superpoint, S)  # (S, 3)
        scene_centre = pool(centre, superpoint_batch, len(batch["name"]))  # (B, 3)
        position = self.position(centre - scene_centre[superpoint_batch])  # (S, C)

        feats = pool(out["feat_fusion"], point_to_superpoint, S) + position
        decoded = self.decoder(feats, superpoint_batch, queries=batch["queries"])
        # in float32, also under autocast: the gradient of a superpoint is a sum over its points
        logits = decoded["semantic_logits"] + asked_logits(decoded["padded"], batch["queries"]["sizes"])  # (S, K)
        wide = logits.to(torch.promote_types(out["logits"].dtype, torch.float32))
        out["logits"] = out["logits"] + wide.index_select(0, point_to_superpoint)
        return {**out, "point_to_superpoint": point_to_superpoint, "superpoint_batch": superpoint_batch,
                "decoder": decoded}


def asked_logits(predictions, sizes):
    """What the instances say about the class of the superpoints: (S, K), the mean of the queries' class logits without
    "no object", weighted by their masks. A superpoint that is in no mask gets 0.

    predictions: "padded" of the decoder's output, of which the last layer is asked. sizes: S_b of each scene.
    """
    is_query = (predictions["query"] >= 0)[..., None]                        # (B, Q, 1)
    held = predictions["mask_logits"][-1].sigmoid() * is_query               # (B, Q, S)
    classes = predictions["class_logits"][-1][..., :-1]                      # (B, Q, K)
    logits = held.transpose(1, 2) @ classes / (1 + held.sum(1))[..., None]   # the 1: a weak mask says little
    return unpad_scenes(logits, sizes)


def number_superpoints(batch, cell=0.2, min_query_share=1.0):
    """A batch with what the decoder needs of it and the network does not change, so that nothing waits for a GPU later.

    Adds point_to_superpoint (N,), superpoint_batch (S,) and queries, the result of `decoder.draw_queries`. A batch
    without superpoints gets cubes of `cell` metres.
    """
    segments = batch["superpoints"] if "superpoints" in batch else (batch["points"] / cell).floor().long()
    point_to_superpoint, superpoint_batch = superpoint_index(segments, batch["batch"])
    return {**batch, "point_to_superpoint": point_to_superpoint, "superpoint_batch": superpoint_batch,
            "queries": draw_queries(superpoint_batch, batch.get("seed"), min_query_share)}


def build_encoder_2d(config):
    """The CLIP tower that the options of a run name, or None for the 3D baseline."""
    if config["no_clip"]:
        return None
    pretrained = None if config["clip_pretrained"] == "none" else config["clip_pretrained"]
    return Enhanced2DEncoder(config["clip_model"], pretrained, image_size=tuple(config["image_size"]),
                             trainable_blocks=config["clip_blocks"], mean_std=config["clip_mean_std"])


def build_model(config, num_classes, instances, encoder_2d, in_channels=3):
    """A Segmenter with fresh weights.

    config: the options of train.py as a dict. instances: whether it has an instance decoder. encoder_2d: see
    `build_encoder_2d`. in_channels: width of the points' features.
    """
    is_small = config["backbone"] == "small"
    color_mean, color_std = COLORS[config["colors"]] or (None, None)
    encoder_3d = PointEncoder(config["voxel_size"], in_channels, color_mean=color_mean, color_std=color_std,
                              **NETWORKS[config["backbone"]])
    # another gate: pass gate=MyGate(256); another backbone: pass it as encoder_3d, with dim_3d= if it is not 96 wide
    fusion = BiFusionEncoder(encoder_2d, encoder_3d, depth_tolerance=config["depth_tolerance"])
    decoder = None
    if instances:
        decoder = InstanceDecoder(256, num_classes, **(dict(embed_dim=128, ffn=512) if is_small else {}))
    return Segmenter(fusion, num_classes, decoder, cell=4 * config["voxel_size"])


def load_model(path, device=None, clip_pretrained=None):
    """Checkpoint of train.py -> (Segmenter in eval mode, class names, the options of its run as a dict).

    device: default cuda if there is one, else cpu. CLIP's frozen weights are not part of a checkpoint: they are loaded
    as in training, or from clip_pretrained, if their file lies elsewhere now. Raises FileNotFoundError or ValueError,
    with the path, if a file is missing, damaged, or belongs to another tower.
    """
    state = read_checkpoint(path)
    config, class_names = state["config"], state["class_names"]
    config["clip_pretrained"] = clip_pretrained or config["clip_pretrained"]
    for text in state["warnings"]:
        warnings.warn(f"{path}: {text}")
    model = restore_model(state, path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), class_names, config


def restore_model(state, path):
    """The network of a checkpoint or a saved step, on the CPU. state: what `read_checkpoint` made of the file at path."""
    config, class_names = state["config"], state["class_names"]
    for field, known in (("backbone", NETWORKS), ("colors", COLORS)):
        if config.get(field) not in tuple(known):
            raise ValueError(f"{path}: field config.{field} is {config.get(field)!r}, not one of {', '.join(known)}")
    encoder_2d = build_encoder_2d(config)
    instances = any(key.startswith("decoder.") for key in state["model"])
    stem = state["model"].get("fusion.encoder_3d.backbone.conv0p1s1.kernel", torch.empty(1, 3, 1))  # (K^3, F, C)
    model = build_model(config, len(class_names), instances, encoder_2d, stem.shape[1])
    restore(model, state, path, class_names, encoder_2d.fingerprint() if encoder_2d is not None else None)
    return model


def to_device(value, device):
    """A batch, or whatever is in it, with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(part, device) for part in value)
    return value


def gpu_settings(deterministic=False):
    """How a GPU computes; call it before the first tensor is made there. A CPU is not concerned.

    deterministic: a run gives the same numbers every time, as on a CPU, where torch has such kernels for it; it warns
    where it has none. Sums then take sorted instead of atomic additions, which is slower.
    """
    # Products of float32 round their factors to TF32. `Enhanced2DEncoder.encode` turns that off, because a cache stores
    # its features.
    set_tf32(products=True, convolutions=True)
    # Sums of half-precision products stay in float32, also between the parts into which a long product is split.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # cuDNN's attention plans anew for each shape; the numbers of queries and superpoints are new in each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without a fixed workspace, cuBLAS varies
        torch.use_deterministic_algorithms(True, warn_only=True)


def keep_buffers():
    """Makes glibc keep the memory of large buffers for the next ones; without glibc it does nothing.

    By default glibc hands them back to the system, which clears them page by page when they are asked for again: a
    sixth of a training step or of a prediction on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        if libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25):  # M_MMAP_THRESHOLD; old versions refuse above 2^25
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def prepare_device(device, deterministic=False):
    """Settings of the process that suit its device."""
    if device.type == "cuda":
        gpu_settings(deterministic)
    else:
        keep_buffers()


def run_command(main):
    """Runs a script's `main`: what a user can mend is one line on stderr and exit status 2; --debug shows a traceback."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if "--debug" in sys.argv:
            raise
        text = str(error)
        if "Original Traceback" in text:  # of a worker; it ends with "type: message"
            text = text.strip().splitlines()[-1].partition(": ")[2]
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
    finally:
        kill_workers()


def kill_workers():
    """Ends workers of loaders that an error has left behind: they outlive the signal that would end them."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader raises for every worker that is killed
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def compile_parts(model):
    """torch.compile, in place, for the dense parts; names and checkpoints stay as they are.

    It compiles forward methods, not modules: instances of one class share their compiled code, of which torch keeps a
    limited number of versions. The sparse network is left out because its shapes differ in every step.
    """
    fusion, decoder = model.fusion, model.decoder
    static, dynamic = [], [fusion.proj_3d]
    if fusion.encoder_2d is not None:
        static = fusion.encoder_2d.blocks
        dynamic = [*dynamic, fusion.gate]
    if decoder is not None:
        dynamic += [decoder.class_head, decoder.quality_head]
    for module in static:
        module.forward = torch.compile(module.forward)
    for module in dynamic:  # the number of points varies
        module.forward = torch.compile(module.forward, dynamic=True)
