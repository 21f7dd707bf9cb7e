# SPDX-License-Identifier: MIT
"""`python -m bench scale`: how time and memory of projection, sampling and gate grow with the number of points.

On a CPU each size is measured in a fresh process, which should hold little else. Imports fusion, bench.timing, torch.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from bench.timing import exponent, in_fresh_process, machine, now
from fusion import BiFusionEncoder

VIEWS = 10
H, W = 240, 320


class Given(nn.Module):
    """Stands in for both encoders of BiFusionEncoder: features that do not have to be computed."""

    image_size = (H, W)

    def __init__(self, points, views):
        super().__init__()
        self.maps = nn.Parameter(torch.randn(views, 256, 15, 20))
        self.feats = nn.Parameter(torch.randn(points, 256))

    def project(self, tokens, pooled):
        return self.maps, pooled

    def forward(self, batch):
        return self.feats


def given_fusion(points, views):
    """A BiFusionEncoder without encoders."""
    given = Given(points, views)
    fusion = BiFusionEncoder(given, given)
    fusion.proj_3d = nn.Identity()
    return fusion


def scene_of(points, views):
    """A batch of one scene: points of a room of 6 x 6 x 3 m, and cameras in its middle that look around."""
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(points, 3, generator=generator) * torch.tensor([6.0, 6.0, 3.0])
    eye = torch.tensor([3.0, 3.0, 1.5])
    world2cam = torch.eye(4).repeat(views, 1, 1)
    for view in range(views):
        angle = view * 2 * math.pi / views
        c, s = math.cos(angle), math.sin(angle)
        rotation = torch.tensor([[c, s, 0], [0, 0, -1], [-s, c, 0]])
        world2cam[view, :3, :3] = rotation
        world2cam[view, :3, 3] = -rotation @ eye
    intrinsics = torch.tensor([[280.0, 0, 159.5], [0, 280, 119.5], [0, 0, 1]])
    intrinsics = intrinsics.repeat(1, views, 1, 1)
    return {
        "points": xyz, "coords": xyz, "features": xyz,
        "batch": torch.zeros(points, dtype=torch.long),
        "world2cam": world2cam[None],
        "intrinsics": intrinsics,
        "depth": torch.full((1, views, H, W), 4.0),
        "depth_intrinsics": intrinsics,
        "clip_tokens": torch.zeros(1, views, 1, 1, 1),
        "clip_pooled": torch.zeros(1, views, 256)}


def plain_fusion(fusion, batch):
    """What `fusion` makes of one scene, view by view, with torch's own sampler -> (N, 256)."""
    points = batch["points"]
    feat_3d = fusion.encoder_3d.feats
    total = torch.zeros_like(feat_3d)
    count = points.new_zeros(len(points), 1)
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    size = points.new_tensor([W, H])
    cameras = zip(batch["world2cam"][0], batch["intrinsics"][0])
    for view, (world2cam, intrinsics) in enumerate(cameras):
        pixel = (homogeneous @ world2cam[:3].T) @ intrinsics.T  # (N, 3)
        depth = pixel[:, 2]
        grid = (pixel[:, :2] / pixel[:, 2:] + 0.5) / size * 2 - 1
        surface = F.grid_sample(batch["depth"][:, view:view + 1], grid[None, None], mode="nearest",
                                align_corners=False)[0, 0, 0]  # (N,)
        in_image = (depth > 0) & (grid.abs() <= 1).all(1)
        seen = (in_image & ((surface == 0) | (depth <= surface + 0.05)))[:, None]
        feature_map = fusion.encoder_2d.maps[view].permute(1, 2, 0)
        feature_map = fusion.norm_2d(feature_map).permute(2, 0, 1)
        sampled = F.grid_sample(feature_map[None], grid[None, None], align_corners=False,
                                padding_mode="border")[0, :, 0].T  # (N, 256)
        total = total + sampled.where(seen, 0)
        count = count + seen
    fused, _ = fusion.gate(feat_3d, total / count.clamp(min=1), count[:, 0] > 0)
    return fused


def measure(plain, points, backward, device):
    """Seconds of one scene, the least of three, and on a GPU its peak in GiB, else None."""
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    fusion = given_fusion(points, VIEWS).to(device)
    batch = {name: value.to(device) for name, value in scene_of(points, VIEWS).items()}
    spent = []
    for _ in range(3):
        fusion.zero_grad(set_to_none=True)
        start = now(device)
        with torch.set_grad_enabled(backward):
            fused = plain_fusion(fusion, batch) if plain else fusion(batch)["feat_fusion"]
        if backward:
            fused.backward(torch.ones_like(fused))
        spent.append(now(device) - start)
        del fused
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None
    return min(spent), peak


def run(args):
    largest = math.log10(args.max_points)
    sizes = [round(10 ** (4 + (largest - 4) * i / 4)) for i in range(5)]  # from 10,000 on
    seconds_panel, memory_panel = {}, {}
    print(f"one scene, {VIEWS} views, 256 channels, float32, {machine(args.device)}")
    for name, plain, backward in (("forward", False, False), ("forward and backward", False, True),
                                  ("view by view with grid_sample, forward", True, False)):
        times, peaks = [], []
        for size in sizes:
            if args.device == "cuda":
                seconds, peak = measure(plain, size, backward, args.device)
                note = ""
            else:
                (seconds, _), before, after = in_fresh_process(measure, plain, size, backward, args.device)
                peak = after - before
                note = f" more than the {before:.2f} before it"
            times.append(seconds)
            peaks.append(peak)
            print(f"  {name:38s} {size:8d} points {seconds:8.3f} s  {peak:6.2f} GiB{note}")
        growth = f"time {exponent(sizes, times):.3f}, memory {exponent(sizes, peaks):.3f}"
        print(f"  {name:38s} exponents: {growth}")
        seconds_panel[name] = (sizes, times)
        memory_panel[name] = (sizes, peaks)
    return {f"seconds by points, {VIEWS} views": seconds_panel,
            f"GiB by points, {VIEWS} views": memory_panel}
