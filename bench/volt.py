# SPDX-License-Identifier: MIT
"""`python -m bench volt`: a training step of Volt-S and of Res16UNet34C, on a whole scan and on drawn points.

What a step multiplies and moves is counted at the operators that torch dispatches, each of which reads its inputs and
writes its outputs once. Imports sparse_unet, volt, bench.sparse, bench.timing and torch.
"""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.sparse import room_cloud
from bench.timing import machine, now
from sparse_unet import Res16UNet34C
from volt import Volt, partition

CHANNELS = 6  # color and normal
FREE = ("empty", "detach", "new_empty", "alias")  # names of operators without a kernel, beside views


class Counts(TorchDispatchMode):
    """Kernels, bytes and floating-point operations of what runs within its context."""

    def __init__(self):
        super().__init__()
        self.total = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        schema = function._schema
        is_view = not schema.is_mutable and any(result.alias_info for result in schema.returns)
        if is_view or schema.name.split("::")[1].startswith(FREE):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.total["kernels"] += 1
        self.total["bytes"] += sum(x.numel() * x.element_size() for x in tensors)
        if function.overloadpacket in flop_registry:
            self.total["flops"] += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def drawn_points(scenes, region=100_000, points=20_000):
    """Voxels (scenes * points, 4) of points that were drawn from a part of a room."""
    parts = []
    for scene in range(scenes):
        coords = room_cloud(region, 1.5, seed=scene)
        drawn = coords[torch.randperm(region)[:points]]
        drawn[:, 0] = scene
        parts.append(drawn)
    return torch.cat(parts)


def run(args):
    device = args.device
    scenes = 8 if device == "cuda" else 2
    clouds = {"a scan of 150,000 voxels": room_cloud(150_000, 1.5),
              f"{scenes} x 20,000 drawn points": drawn_points(scenes)}
    panels = {}
    for title, coords in clouds.items():
        coords = coords.to(device)
        feats = torch.rand(len(coords), CHANNELS, device=device)
        tokens = len(partition(coords)[0])
        print(f"\n{title}, {tokens} tokens of Volt, forward and backward, float32, {machine(device)}")
        seconds = {}
        for name, build in (("Res16UNet34C", Res16UNet34C), ("Volt-S", Volt)):
            torch.manual_seed(0)
            network = build(CHANNELS).to(device)
            with Counts() as counts:  # also the warm-up
                network(coords, feats).square().mean().backward()
            total = counts.total
            start = now(device)
            network(coords, feats).square().mean().backward()
            seconds[name] = now(device) - start
            print(f"{name:14s}{total['kernels']:6d} operators {total['flops'] / 1e12:7.2f} TFLOP "
                  f"{total['bytes'] / 1e9:7.1f} GB {seconds[name]:7.2f} s")
        panels[f"training step, {title}, s"] = seconds
    return panels
