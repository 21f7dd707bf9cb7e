# SPDX-License-Identifier: MIT
"""`python -m bench sample`: `sample_features` against one grid_sample per scene, forward and backward.

Imports fusion, bench.timing and torch.
"""
import torch
from torch.nn import functional as F

from bench.timing import machine, median, ratio, turns
from fusion import sample_features

IMAGE_SIZE = (240, 320)


def loop_of_grid_sample(feature_map, uv, image_size, batch_idx):
    """`sample_features` scene by scene: feature_map (B, C, Hf, Wf), uv (N, 2) sorted by scene."""
    size = uv.new_tensor([image_size[1], image_size[0]])
    features = []
    for scene in range(len(feature_map)):
        grid = (uv[batch_idx == scene] + 0.5) / size * 2 - 1  # (n, 2)
        own_map = feature_map[scene:scene + 1]
        sampled = F.grid_sample(own_map, grid[None, :, None], align_corners=False, padding_mode="border")
        features.append(sampled[0, :, :, 0].T)  # (n, C)
    return torch.cat(features)


def run(args, scenes=8, points=20_000):
    device = args.device
    feature_map = torch.randn(scenes, 256, 15, 20, device=device, requires_grad=True)
    size = torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]], device=device)
    uv = torch.rand(scenes * points, 2, device=device) * size - 0.5
    batch_idx = torch.arange(scenes, device=device).repeat_interleave(points)
    cotangent = torch.randn(scenes * points, 256, device=device)

    def both_passes(function):
        features = function(feature_map, uv, IMAGE_SIZE, batch_idx)
        return torch.autograd.grad(features, feature_map, cotangent)

    inputs = feature_map, uv, IMAGE_SIZE, batch_idx
    gap = (loop_of_grid_sample(*inputs) - sample_features(*inputs)).abs().max().item()
    candidates = {"loop of grid_sample": lambda: both_passes(loop_of_grid_sample),
                  "sample_features": lambda: both_passes(sample_features)}
    seconds = turns(candidates, args.repeats, device)
    milliseconds = {name: spent * 1e3 for name, spent in median(seconds).items()}
    print(f"{scenes} scenes of {points} points, 256 channels, forward and backward, {machine(device)}: "
          f"{milliseconds['sample_features']:.0f} ms, {ratio(seconds, 'sample_features', 'loop of grid_sample')} of "
          f"the loop of grid_sample (largest difference {gap:.0e})")
    return {"sampling, forward and backward, ms": milliseconds}
