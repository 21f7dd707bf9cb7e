# SPDX-License-Identifier: MIT
"""Weights of other projects for a sparse U-Net or a Volt, read as they are published, without the
packages that wrote them.

A checkpoint is a zip file with a pickle, which may name any function. `TensorUnpickler` builds tensors
and plain containers alone: nothing that a file names is imported or called.

Imports torch and support.files.
"""
import pickle
import pickletools
import re
import types
import zipfile
from collections import OrderedDict

import torch

from support.files import check_torch_file

# project: prefix of its keys, kernel size of the stem, input channels, colors (of sparse_unet.COLORS)
PROJECTS = {"ESAM or oneformer3d": (r"(backbone|unet)\.", 5, 3, "scannet"),
            "Mask3D": (r"model\.backbone\.", 5, 3, "scannet"),
            "UnScene3D": (r"model\.backbone\.", 3, 3, "scannet"),
            "LanguageGroundedSemseg": (r"model\.", 3, 3, "centered"),
            "OpenScene": (r"(module\.)?net3d\.", 5, 3, "ones"),
            "Pointcept": (r"(module\.)?backbone\.", 5, 9, None)}  # signed until its version 1.6, then raw
OWN_PREFIX = "fusion.encoder_3d.backbone."  # in checkpoints of train.py
UNET, VOLT = "conv0p1s1.kernel", "tokenizer.proj.weight"  # a key that every such network has
PARTS = {UNET: r"(conv\d|convtr\d|bn\d|bntr\d|block\d|final\.)",  # how the keys of such a network begin
         VOLT: r"(tokenizer|blocks|decoder)\."}


def load_backbone(path, build, networks, final=False, build_volt=None):
    """A U-Net or a Volt with the weights of a checkpoint, as the PROJECTS or the Volt project publish
    it, or as train.py writes it.

    build: sparse_unet.Res16UNet34C, which makes a U-Net; its options are read off keys and shapes.
    networks: {--backbone of train.py: options}. final: keep the last layer; OpenScene's maps into
    CLIP's space. build_volt: volt.Volt, which makes a Volt.

    Returns the network in eval mode; the name of its colors, a key of sparse_unet.COLORS, or None if
    the file does not tell them; and a line that says what was loaded. Raises FileNotFoundError; or
    ValueError, with the path, if the file is damaged, a tensor is missing, unknown or of another shape,
    or holds NaN or inf.
    """
    anchor, prefix, tensors, config = read_backbone(path)
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {prefix}{key} {tuple(value.shape)} holds NaN or inf")
    dropped = []
    if anchor == VOLT:
        build = build_volt
        options = volt_options(tensors, f"{path}: {prefix}")
        project, colors = ("BiFusion", config.get("colors")) if prefix == OWN_PREFIX else ("Volt", "raw")
    else:
        options = network_options(tensors, f"{path}: {prefix}")
        project, colors, options["last_relu"] = recognize(prefix, options, config, networks)
    if anchor == UNET and not final:
        options["final"] = None
        dropped = [key for key in tensors if key.startswith("final.")]
        tensors = {key: value for key, value in tensors.items() if key not in dropped}

    with torch.device("meta"):  # the file's shapes take no memory until they are known to fit
        network = build(**options)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is {theirs.get(key, 'missing')}, expected {own.get(key, 'no such key')}"
                for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{path} does not fit, {len(problems)} of {len(own)} tensors:\n  {lines}")
    network.load_state_dict(tensors, assign=True)
    loaded = f"{len(tensors)} tensors from {path}, prefix {prefix!r}, project {project or 'unknown'}, dropped " \
             f"{dropped or 'nothing'}"
    return network.eval(), colors, loaded


def recognize(prefix, options, config, networks):
    """The project of such keys and shapes or None; its colors or None; whether it ends in a ReLU."""
    if prefix == OWN_PREFIX:
        network = networks.get(config.get("backbone"), {})
        return "BiFusion", config.get("colors"), network.get("last_relu", True)
    shape = (options["stem"], options["in_channels"])
    project = colors = None
    for name, (pattern, *known, seen) in PROJECTS.items():
        if re.fullmatch(pattern, prefix) and tuple(known) == shape:
            project, colors = name, seen
    width = options["final"][0] if options["final"] else None
    if project == "Mask3D" and width not in (20, 200):
        colors = None  # S3DIS or STPLS3D, whose colors have another mean and std than ScanNet's
    learns_from_clip = width is None or options["planes"][7] == 512
    return project, colors, not (project == "LanguageGroundedSemseg" and learns_from_clip)


def network_options(tensors, where):
    """The tensors of a network by key -> the options of Res16UNet34C with these keys and shapes."""
    planes, layers = [], []
    for i in range(1, 9):
        pattern = rf"block{i}\.\d+\.conv2\.kernel"
        kernels = [value for key, value in tensors.items() if re.fullmatch(pattern, key)]
        if not kernels or kernels[0].ndim != 3:
            raise ValueError(f"{where}block{i} has no conv2.kernel of 3 dimensions")
        planes.append(kernels[0].shape[2])
        layers.append(len(kernels))
    stem = tensors[UNET]
    if stem.ndim != 3 or len(stem) not in (27, 125):
        raise ValueError(f"{where}{UNET} has shape {tuple(stem.shape)}, not (27 or 125, Cin, Cout)")
    final = None
    if "final.kernel" in tensors and tensors["final.kernel"].ndim:
        final = tensors["final.kernel"].shape[-1], "final.bias" in tensors
    size = round(len(stem) ** (1 / 3))
    return dict(in_channels=stem.shape[1], planes=planes, layers=layers, stem=size, final=final)


def volt_options(tensors, where):
    """The tensors of a network by key -> the options of Volt with these keys and shapes."""
    weight = tensors[VOLT]
    bias = tensors.get("decoder.unembed.bias")
    if weight.ndim != 2 or weight.shape[0] % 64 or weight.shape[1] % 125 or bias is None:
        raise ValueError(f"{where}{VOLT} has shape {tuple(weight.shape)}, not (64 per head, 125 per channel), or "
                         "there is no decoder.unembed.bias")
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    return dict(in_channels=weight.shape[1] // 125, embed_dim=len(weight), depth=len(blocks),
                num_heads=len(weight) // 64, out_channels=len(bias),
                qk_norm="blocks.0.attn.q_norm.weight" in tensors)


def read_backbone(path):
    """The anchor of a network in a checkpoint, UNET or VOLT; the prefix of its keys; its tensors
    (float32 or int64) by key without that prefix; and train.py's config, empty in other files.

    A moving average of the weights is taken if there is one, because its training evaluated that.
    """
    check_torch_file(path)
    try:
        state = read_tensors(path)
        fields = ("ema_state_dict", "state_dict", "model")
        nested = next((state[key] for key in fields if state.get(key) is not None), state)
        if "clip_fingerprint" in state:  # of train.py
            nested = {**nested, **state.get("ema", {})}
        tensors = {key: value for key, value in nested.items() if isinstance(value, torch.Tensor)}
        anchors = [(key, anchor) for key in tensors for anchor in PARTS if f".{key}".endswith(f".{anchor}")]
        if len(anchors) != 1:
            raise ValueError(f"{len(anchors)} keys end in {UNET} or {VOLT}, expected one; the first are "
                             f"{list(tensors)[:3]}")
        (key, anchor), = anchors
        prefix = key.removesuffix(anchor)
        found = {}
        for key, value in tensors.items():
            if re.match(re.escape(prefix) + PARTS[anchor], key):
                dtype = torch.float32 if value.is_floating_point() else torch.int64
                found[key[len(prefix):]] = value.to(dtype).contiguous()
        config = state["config"] if prefix == OWN_PREFIX else {}
    except Exception as error:  # torch and pickle raise many kinds
        raise ValueError(f"{path}: no checkpoint with a known network, {type(error).__name__}: {error}") from error
    return anchor, prefix, found, config


# ---------------------------------------------------------------------------------------------- pickles


class Inert:
    """Stands in for every class and function that `TensorUnpickler` does not know; does nothing."""

    def __new__(cls, *args, **options):
        return super().__new__(cls)

    def ignore(self, *args, **options):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = ignore


class TensorUnpickler(pickle.Unpickler):
    """Builds plain containers, tensors, and `Inert` for all else; torch.load tells it to read storages.

    It makes every class and function anew, because a pickle may set their attributes.
    """

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        return type(name, (Inert,), {})


def rebuild_tensor(storage, offset, size, stride, *rest):
    """A tensor over a storage, which must be large enough."""
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, offset)


def read_tensors(path):
    """What torch.save wrote, with `Inert` for every object that is not a tensor or plain container."""
    with zipfile.ZipFile(path) as archive:
        name, = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
        content = archive.read(name)
    for opcode, index, _ in pickletools.genops(content):
        if "PUT" in opcode.name and index > len(content):  # pickle would take memory for as many
            raise ValueError(f"its pickle numbers an object {index}")
    reader = types.SimpleNamespace(__name__="tensors", Unpickler=TensorUnpickler)
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
