# SPDX-License-Identifier: MIT
"""The whole network: fused point features, and the semantics and instances that are read off them.

    from model import load_model
    model, class_names, config = load_model("runs/NAME/best.pt")     # in eval mode

`Segmenter` puts a linear semantic head and, if wanted, an instance decoder behind a `BiFusionEncoder`.
`build_model` makes one from the options of a run; another backbone or gate is one line there.

Imports torch, and its siblings data, decoder, encoder, fusion, losses, sparse_unet, volt,
support/checkpoint and support/pretrained.
"""
import os
import warnings
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from data import collate, mix_scenes
from decoder import InstanceDecoder, draw_queries, pool, unpad_scenes
from encoder import Enhanced2DEncoder, TimmTower
from fusion import BiFusionEncoder
from losses import instance_targets
from sparse_unet import COLORS, NETWORKS, PointEncoder, Res16UNet34C, SparseConv
from support.checkpoint import read_checkpoint, restore
from support.pretrained import load_backbone
from support.queries import TextQueries
from volt import SLOTS, Volt

# --backbone: what makes the network, given its number of input channels
BACKBONES = {name: partial(Res16UNet34C, **options) for name, options in NETWORKS.items()}
BACKBONES["volt-small"] = Volt
BACKBONES["volt-small-plain"] = partial(Volt, qk_norm=False)  # as published for instances
BACKBONES["volt-base"] = partial(Volt, embed_dim=768, num_heads=12, out_channels=256)


class Segmenter(nn.Module):
    """Semantic logits for every point, and instances as sets of superpoints.

    fusion: a BiFusionEncoder with outputs (N, embed_dim). decoder: an InstanceDecoder, or None for
    semantics alone. With it, the logits of a point are the sum of its own, its superpoint's, and those
    of the instances that hold its superpoint: the point sees sharper borders, the superpoint more
    context, and an instance the whole object. cell: meters; cubes of this size stand in for superpoints
    that samples do not have.
    """

    def __init__(self, fusion, num_classes, decoder=None, embed_dim=256, cell=0.2):
        super().__init__()
        self.cell = cell
        self.num_classes = num_classes
        self.fusion = fusion
        self.head = nn.Linear(embed_dim, num_classes)
        self.decoder = decoder
        if decoder is not None:  # the position separates instances that look alike
            self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, embed_dim))

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, batch, with_dense=False):
        """batch of `make_batch` -> the output of `BiFusionEncoder.forward` and of `decode`."""
        fused = self.fusion(batch, with_dense)
        return {**fused, **self.decode(fused["feat_fusion"], batch)}

    def decode(self, feat_fusion, batch):
        """Fused features (N, C) -> "logits" (N, K) and, with a decoder, "decoder", its output."""
        logits = self.head(feat_fusion)  # (N, K)
        if self.decoder is None:
            return {"logits": logits}
        point_to_superpoint, superpoint_batch = batch["point_to_superpoint"], batch["superpoint_batch"]
        S = len(superpoint_batch)

        # position of a superpoint within its scene
        center = pool(batch["coords"], point_to_superpoint, S)  # (S, 3)
        scene_center = pool(center, superpoint_batch, len(batch["name"]))  # (B, 3)
        position = self.position(center - scene_center[superpoint_batch])  # (S, C)

        feats = pool(feat_fusion, point_to_superpoint, S) + position
        decoded = self.decoder(feats, batch["queries"])
        # in float32, also under autocast: the gradient of a superpoint is a sum over its points
        superpoint_logits = decoded["semantic_logits"] + instance_logits(decoded)  # (S, K)
        wide = superpoint_logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"logits": logits + wide.index_select(0, point_to_superpoint), "decoder": decoded}

    def batch_options(self, training):
        """Keyword arguments of `make_batch` for this network, for a training step or for evaluation."""
        if self.decoder is None:
            return {}
        query_share = self.decoder.min_query_share if training else 1.0
        return dict(cell=self.cell, min_query_share=query_share, with_targets=training)


def instance_logits(decoded):
    """What the instances say about the class of their superpoints, (S, K).

    The mean of the queries' class logits without "no object", weighted by their masks; a superpoint in
    no mask gets 0. decoded: the decoder's output, of which the last prediction is read.
    """
    is_query = (decoded["query"] >= 0)[..., None]                    # (B, Q, 1)
    held = decoded["mask_logits"][-1].sigmoid() * is_query           # (B, Q, S)
    classes = decoded["class_logits"][-1][..., :-1]                  # (B, Q, K)
    total = held.transpose(1, 2) @ classes                           # (B, S, K)
    logits = total / (1 + held.sum(1))[..., None]                    # the 1: a weak mask says little
    return unpad_scenes(logits, decoded["sizes"])


class _CastTogether(torch.autograd.Function):
    """Weights of float32 in another dtype, and their gradients in float32, in one call for all of them."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.set_materialize_grads(False)  # a weight that is not used has no gradient
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, weights)
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        wide = [None if grad is None else torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        found = [i for i, grad in enumerate(grads) if grad is not None]
        torch._foreach_copy_([wide[i] for i in found], [grads[i] for i in found])
        return None, *wide


def forward_in(dtype, model, batch, **options):
    """model(batch, **options), with autocast to dtype unless that is float32.

    Autocast casts one weight at a time, and so its gradient. Those of the trained nn.Linear and SparseConv
    are cast here, to the same bits, so a module that switches autocast off finds them in dtype.
    """
    if dtype == torch.float32:
        return model(batch, **options)
    weights = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, SparseConv):
            weights |= {f"{name}.{key}": weight for key, weight in module.named_parameters(recurse=False)
                        if weight.requires_grad and weight.dtype == torch.float32}
    with torch.autocast(model.device.type, dtype):
        cast = dict(zip(weights, _CastTogether.apply(dtype, *weights.values())))
        return functional_call(model, cast, (batch,), options)


def make_batch(samples, cell=None, min_query_share=1.0, with_targets=False, mix=0.0, plan=None):
    """Samples -> a batch with all that a step needs of it alone, so that nothing waits for a GPU later.

    cell: None for a network without decoder. Otherwise the superpoints are numbered (see
    `data.collate`), and the batch holds "queries", of `decoder.draw_queries`, and with_targets
    "targets", of `losses.instance_targets`; `Segmenter.batch_options` has the right values. mix: see
    `data.mix_scenes`. plan: a function of the 3D encoder, or None. Its result for the batch is "plan",
    which the encoder then uses: whoever changes "coords" must remove it.
    """
    batch = collate(samples, cell)
    if mix:
        batch = mix_scenes(batch, mix)
    if plan is not None:
        batch["plan"] = plan(batch)
    if cell is None:
        return batch
    batch["queries"] = draw_queries(batch["superpoint_batch"], batch["seed"], min_query_share)
    if with_targets:
        names = ("labels", "instances", "point_to_superpoint", "superpoint_batch")
        batch["targets"] = instance_targets(*(batch[name] for name in names))
    return batch


def batches_for(model, training, mix=0.0):
    """The collate_fn of a DataLoader for a Segmenter, for training steps or for evaluation."""
    plan = getattr(model.fusion.encoder_3d, "plan", None)
    return partial(make_batch, **model.batch_options(training), mix=mix, plan=plan)


# --------------------------------------------------------------------------------- building and loading


def build_tower(config):
    """The image tower that the options of a run name, or None for the 3D baseline."""
    if config["no_clip"]:
        return None
    clip = {"model_name": config["clip_model"], "image_size": tuple(config["image_size"]),
            "pretrained": None if config["clip_pretrained"] == "none" else config["clip_pretrained"],
            "trainable_blocks": config["clip_blocks"], "mean_std": config["clip_mean_std"]}
    if config.get("tower"):  # older checkpoints do not say
        return TimmTower(config["tower"], config["tower_pretrained"], **clip)
    return Enhanced2DEncoder(**clip)


def open_backbone(args):
    """The weights of --init-3d; sets args.backbone and args.colors, unless given, to what fits them."""
    network, colors, loaded = load_backbone(args.init_3d, Res16UNet34C, NETWORKS, build_volt=Volt)
    channels = network.options["in_channels"]
    if channels != 3 + 3 * args.normals:
        raise ValueError(f"--init-3d {args.init_3d} takes {channels} features per point: 3 are the color, and 6 the "
                         "color and the normal, of --normals")
    with torch.device("meta"):
        options = {name: build(channels).options for name, build in BACKBONES.items()}
    name = next((name for name, known in options.items() if network.options == known), None)
    if name is None or args.backbone not in (None, name):
        raise ValueError(f"--init-3d {args.init_3d} holds {name or 'another network'}, {network.options}, and not "
                         f"{args.backbone or 'one of --backbone ' + ', '.join(BACKBONES)}")
    if colors is None and args.colors is None:
        raise ValueError(f"--init-3d {args.init_3d} does not tell how these weights saw colors: give --colors "
                         f"{'|'.join(COLORS)}, see docs/backbones.md; {loaded}")
    args.backbone, args.colors = name, args.colors or colors
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"--backbone {args.backbone}, --colors {args.colors}: {loaded}")
    return network.state_dict()


def count_features(frames, args):
    """Features per point. ValueError if frames have some that the options do not know of."""
    number = getattr(frames, "num_features", 3)
    if number != 3 and (args.init_3d or args.colors == "scannet"):
        option = f"--init-3d {args.init_3d}" if args.init_3d else "--colors scannet"
        raise ValueError(f"{option} is for points with 3 features, the color; the data has num_features {number}")
    return number + 3 * args.normals


def feature_scale(config, in_channels):
    """Mean and std with which the network sees features, of which only colors are scaled; None: ones."""
    scale = COLORS[config["colors"]]
    if scale is None or not config.get("normals"):  # older checkpoints do not say
        return scale or (None, None)
    mean, std = (value if isinstance(value, tuple) else (value,) * 3 for value in scale)
    others = in_channels - 3
    return (*mean, *[0.0] * others), (*std, *[1.0] * others)


def build_model(config, num_classes, instances, tower, in_channels=3):
    """A Segmenter with fresh weights.

    config: the options of train.py as a dict. instances: whether it has an instance decoder. tower: the
    image encoder, see `build_tower`, or None. in_channels: width of the points' features.
    """
    color_mean, color_std = feature_scale(config, in_channels)
    width = 96 if config["backbone"] in NETWORKS else None  # None: the network's own
    options = {"drop_path": config["drop_path"]} if config.get("drop_path") else {}
    encoder_3d = PointEncoder(config["voxel_size"], in_channels, width, color_mean, color_std,
                              BACKBONES[config["backbone"]], **options)
    # another gate: pass gate=MyGate(256); another backbone: a line of BACKBONES, or a module as encoder_3d
    fusion = BiFusionEncoder(tower, encoder_3d, dim_3d=getattr(encoder_3d, "out_channels", 96))
    decoder = None
    if instances:
        size = dict(embed_dim=128, ffn=512) if config["backbone"] == "small" else {}
        decoder = InstanceDecoder(256, num_classes, **size)
    return Segmenter(fusion, num_classes, decoder, cell=4 * config["voxel_size"])


def parameter_groups(model, args):
    """AdamW groups: one per part of the model, split by whether weight decay applies (to matrices)."""
    parts = {"fusion.encoder_3d.": ("encoder_3d", args.lr_3d),
             "fusion.encoder_2d.trainable.": ("clip", args.lr_clip),
             "fusion.": ("fusion", 1.0), "": ("head", 1.0)}  # the first prefix that fits
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, lr_mult = next(parts[prefix] for prefix in parts if name.startswith(prefix))
        weight_decay = args.weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault((part, weight_decay), {
            "params": [], "name": part, "lr_mult": lr_mult, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def classify_by_name(model, class_names):
    """Makes CLIP's embeddings of the class names the classifier, which is not trained: a point takes the
    class whose name its fused feature is nearest to.
    """
    queries = TextQueries(model.fusion.encoder_2d, [[name] for name in class_names], "fused")
    model.head.weight.copy_(queries.embedding[:len(class_names)])
    model.head.bias.zero_()
    model.head.requires_grad_(False)


def load_model(path, device=None, clip_pretrained=None, tower=None, tower_pretrained=None):
    """Checkpoint of train.py -> (Segmenter in eval mode, class names, the options of its run).

    device: default cuda if there is one, else cpu. Frozen weights are not part of a checkpoint: they are
    loaded as in training, or from clip_pretrained and tower_pretrained, if their files lie elsewhere
    now. tower: an image encoder of your own that it was trained with. Raises FileNotFoundError or
    ValueError, with the path, if a file is missing, damaged, or belongs to another tower.
    """
    state = read_checkpoint(path)
    config = state["config"]
    config["clip_pretrained"] = clip_pretrained or config["clip_pretrained"]
    config["tower_pretrained"] = tower_pretrained or config.get("tower_pretrained")
    for text in state["warnings"]:
        warnings.warn(f"{path}: {text}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = restore_model(state, path, tower).to(device).eval()
    return model, state["class_names"], config


def restore_model(state, path, tower=None):
    """The network of a checkpoint or a saved step, on the CPU. state: of `read_checkpoint`."""
    config, class_names = state["config"], state["class_names"]
    for field, known in (("backbone", BACKBONES), ("colors", COLORS)):
        if config.get(field) not in tuple(known):
            raise ValueError(f"{path}: field config.{field} is {config.get(field)!r}, not one of {', '.join(known)}")
    tower = tower or build_tower(config)
    instances = any(key.startswith("decoder.") for key in state["model"])
    model = build_model(config, len(class_names), instances, tower, channels_of(state["model"]))
    weights = {**state["model"], **state.get("ema", {})}  # the average is what training evaluated
    load_weights(model, {**state, "model": weights}, path, class_names)
    return model


def channels_of(weights):
    """Input channels of the 3D encoder in a state dict; 3 if it is a module of your own."""
    prefix = "fusion.encoder_3d.backbone."
    if f"{prefix}conv0p1s1.kernel" in weights:
        return weights[f"{prefix}conv0p1s1.kernel"].shape[1]  # (K^3, F, C)
    if f"{prefix}tokenizer.proj.weight" in weights:
        return weights[f"{prefix}tokenizer.proj.weight"].shape[1] // SLOTS  # (D, SLOTS * F)
    return 3


def load_weights(model, state, path, class_names):
    """Loads the weights of a checkpoint if it belongs to this network, gate, tower and class list."""
    gate = gate_name(model)
    if state["config"].get("gate") != gate:
        raise ValueError(f"{path}: it was trained with the gate {state['config'].get('gate')}, and this network has "
                         f"{gate}")
    restore(model, state, path, class_names, fingerprint_of(model.fusion.encoder_2d))


def gate_name(model):
    """The class of a network's gate, which a checkpoint remembers; None without images."""
    return None if model.fusion.encoder_2d is None else type(model.fusion.gate).__name__


def fingerprint_of(tower):
    """What a checkpoint remembers of the image tower that it was trained with; None without one."""
    return None if tower is None else tower.fingerprint()


def compile_parts(model):
    """torch.compile, in place, for the forward methods of the dense parts: names and checkpoints stay.

    The sparse network is left out because its shapes differ in every step.
    """
    fusion, decoder = model.fusion, model.decoder
    static, dynamic = [], [fusion.proj_3d]
    if fusion.encoder_2d is not None:
        static = getattr(fusion.encoder_2d, "blocks", [])
        dynamic.append(fusion.gate)
    if decoder is not None:
        dynamic += [decoder.class_head, decoder.quality_head]
    for module in static:
        module.forward = torch.compile(module.forward)
    for module in dynamic:  # the number of points varies
        module.forward = torch.compile(module.forward, dynamic=True)


def logged_modules(model):
    """The parts of the model whose gradient norms are logged."""
    fusion = dict(model.fusion.named_children())
    parts = {name: fusion.pop(name) for name in ("encoder_3d", "encoder_2d") if name in fusion}
    heads = [module for name, module in model.named_children() if name != "fusion"]
    return {**parts, "fusion": nn.ModuleList(fusion.values()), "head": nn.ModuleList(heads)}
