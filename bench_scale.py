# SPDX-License-Identifier: MIT
"""`bench.py scale`: how time and memory of projection, sampling and gate grow with the number of points.

Imports fusion.py, timing.py and torch: each size is measured in a process of its own, which should hold little else.
"""
import math

import torch
from torch import nn

from fusion import BiFusionEncoder
from timing import alone, exponent, now, where


class Given(nn.Module):
    """Stands in for both encoders of BiFusionEncoder: features that are there already."""

    image_size = (240, 320)

    def __init__(self, points, views):
        super().__init__()
        self.maps, self.feats = (nn.Parameter(torch.randn(shape)) for shape in ((views, 256, 15, 20), (points, 256)))

    def project(self, tokens, pooled):
        return self.maps, pooled

    def forward(self, coords, colors, batch):
        return self.feats


def scene_of(points, views, device):
    """A batch of one scene: points of a room, cameras in its middle that look around."""
    xyz = torch.rand(points, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([6.0, 6.0, 3.0])
    eye, cameras = torch.tensor([3.0, 3.0, 1.5]), torch.eye(4).repeat(views, 1, 1)
    for camera, angle in zip(cameras, torch.arange(views) * (2 * math.pi / views)):
        c, s = angle.cos(), angle.sin()
        camera[:3, :3] = torch.tensor([[c, s, 0], [0, 0, -1], [-s, c, 0]])
        camera[:3, 3] = -camera[:3, :3] @ eye
    intrinsics = torch.tensor([[280.0, 0, 159.5], [0, 280, 119.5], [0, 0, 1]]).repeat(1, views, 1, 1)
    batch = {"points": xyz, "coords": xyz, "colors": xyz, "batch": torch.zeros(points, dtype=torch.long),
             "world2cam": cameras[None], "intrinsics": intrinsics, "depth": torch.full((1, views, 240, 320), 4.0),
             "depth_intrinsics": intrinsics, "clip_tokens": torch.zeros(1, views, 1, 1, 1),
             "clip_pooled": torch.zeros(1, views, 256)}
    return {name: value.to(device) for name, value in batch.items()}


def plain_fusion(net, batch):
    """What BiFusionEncoder makes of a scene, a view at a time and with torch's own sampler."""
    points, feat_3d = batch["points"], net.encoder_3d.feats
    total, count = torch.zeros_like(feat_3d), points.new_zeros(len(points), 1)
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    for view, (camera, intrinsics) in enumerate(zip(batch["world2cam"][0], batch["intrinsics"][0])):
        pixel = (homogeneous @ camera[:3].T) @ intrinsics.T
        uv, depth = pixel[:, :2] / pixel[:, 2:], pixel[:, 2]
        grid = (uv + 0.5) / uv.new_tensor([320, 240]) * 2 - 1
        surface = nn.functional.grid_sample(batch["depth"][:, view:view + 1], grid[None, None], mode="nearest",
                                            align_corners=False)[0, 0, 0]
        seen = ((depth > 0) & (grid.abs() <= 1).all(1) & ((surface == 0) | (depth <= surface + 0.05)))[:, None]
        spatial = net.norm_2d(net.encoder_2d.maps[view].permute(1, 2, 0)).permute(2, 0, 1)
        sampled = nn.functional.grid_sample(spatial[None], grid[None, None], align_corners=False,
                                            padding_mode="border")[0, :, 0].T
        total, count = total + sampled.where(seen, 0), count + seen
    feat_2d = total / count.clamp(min=1)
    alpha = net.gate.gate(torch.cat([feat_3d, feat_2d], 1)).sigmoid().where(count > 0, 0)
    return feat_3d + alpha * (feat_2d - feat_3d)


def carry(plain, points, views, backward, device):
    """Seconds that one scene takes, the least of three for small ones, and on a GPU its peak in GiB."""
    torch.manual_seed(0)
    given = Given(points, views)
    net, batch, spent = BiFusionEncoder(given, given).to(device), scene_of(points, views, device), []
    net.proj_3d = nn.Identity()
    for _ in range(3):
        net.zero_grad(set_to_none=True)
        start = now(device)
        with torch.set_grad_enabled(backward):
            fused = plain_fusion(net, batch) if plain else net(batch)["feat_fusion"]
            if backward:
                fused.backward(torch.ones_like(fused))
        spent.append(now(device) - start)
        del fused
    return min(spent), torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None


def scale(args):
    """Time and memory of projection, sampling, gate from 10,000 to 1,000,000 points, against torch's own sampler."""
    sizes, views = [10_000, 31_623, 100_000, 316_228, args.points], 10
    panels = {f"seconds by points, {views} views": {}, f"GiB by points, {views} views": {}}
    print(f"a scene with {views} views, 256 channels, float32, {where(args.device)}; each size in a process of its own")
    for name, plain, backward in (("forward", False, False), ("forward and backward", False, True),
                                  ("a view at a time, forward", True, False)):
        times, peaks = [], []
        for size in sizes:
            (seconds, held), before, after = alone(carry, plain, size, views, backward, args.device)
            times.append(seconds)
            peaks.append(after - before if held is None else held)
            print(f"  {name:26s} {size:8d} points {seconds:8.3f} s  {peaks[-1]:6.2f} GiB more" +
                  (f" than the {before:.2f} before it" if held is None else ""))
        print(f"  {name:26s} exponents: time {exponent(sizes, times):.3f}, memory {exponent(sizes, peaks):.3f}")
        for panel, values in zip(panels.values(), (times, peaks)):
            panel[name] = (sizes, values)
    return panels
