# SPDX-License-Identifier: MIT
"""What the training loop asks about its features, and the pictures that it logs.

Imports torch.
"""
import colorsys

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_rank(feats: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred rows: how many directions are in use.

    feats (N, C) -> scalar in [1, C]; 1 for fewer than two distinct rows, NaN where an entry is not finite.
    Roy and Vetterli, "The effective rank", 2007.
    """
    if not feats.isfinite().all():
        return feats.new_full((), torch.nan, dtype=torch.float32)  # LAPACK would raise, and end the run that is watched
    feats = feats.double() - feats.double().mean(0)
    values = torch.linalg.eigvalsh(feats.T @ feats).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.exp(-torch.xlogy(share, share).sum()).float()


def fusion_statistics(out, batch, max_rows=2048):
    """Scalars about one output of BiFusionEncoder, as a dict of 0-d tensors; see the README's table of tags."""
    with torch.no_grad():
        feats, valid = out["feat_fusion"].float(), out["valid"]
        rows = torch.arange(0, len(feats), max(1, -(-len(feats) // max_rows)), device=feats.device)
        stats = {"effective_rank": effective_rank(feats[rows])}
        if out["clip_global"] is None:
            return stats
        seen = valid.sum().clamp(min=1)
        alpha = out["alpha"].float().squeeze(1)
        mean = alpha.sum() / seen  # alpha is 0 where not valid
        cosine = F.cosine_similarity(feats, out["clip_global"].float()[batch["batch"]])
        return {**stats, "valid_share": valid.float().mean(), "gate_mean": mean,
                "gate_std": ((alpha - mean).square() * valid).sum().div(seen).sqrt(),
                "clip_cosine": cosine.where(valid, 0).sum() / seen}


# ---------------------------------------------------------------------------------------------- pictures


def palette(count):
    """`count` RGB colours in [0, 1], far apart in hue -> (count, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.4 * (i % 2), 1 - 0.25 * (i % 3))
                         for i in range(count)]).view(-1, 3)


def splat(image: Tensor, uv: Tensor, colors: Tensor, radius=1) -> Tensor:
    """A darkened copy of image (3, H, W) in [0, 1] with squares of 2 * radius + 1 pixels a side about uv (n, 2), in
    colors (n, 3); cut where they leave the image.
    """
    image = image * 0.4
    h, w = image.shape[1:]
    u, v = uv.round().long().unbind(1)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            inside = (v + y >= 0) & (v + y < h) & (u + x >= 0) & (u + x < w)
            image[:, v[inside] + y, u[inside] + x] = colors[inside].T.to(image)
    return image


def pca_colors(feats: Tensor) -> Tensor:
    """feats (n, C >= 3) -> (n, 3) in [0, 1]: the three directions of most variance, each scaled to its 2nd..98th
    percentile; black where an entry is not finite.
    """
    if len(feats) == 0 or not feats.isfinite().all():
        return torch.zeros(len(feats), 3, device=feats.device)
    feats = feats.float() - feats.float().mean(0)
    _, directions = torch.linalg.eigh(feats.T @ feats)  # ascending; unlike pca_lowrank it draws no random numbers
    feats = feats @ directions[:, -3:].flip(1)
    low, high = (torch.quantile(feats, q, dim=0) for q in (0.02, 0.98))
    return ((feats - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def pictures(image, uv, depth, labels, fused, clip_map):
    """Named pictures (3, H, W) in [0, 1] of one view of one sample.

    image (3, H, W); of the n >= 0 points that the view sees: uv (n, 2), depth (n,), labels {name: (n,) int64 with
    -1 = none}, fused (n, C); clip_map (C', Hf, Wf) or None. Depth is shown by rank, from red (near) to blue (far).
    """
    far = (depth.argsort().argsort() / max(1, len(depth) - 1))[:, None]
    named = {"input_points": splat(image, uv, torch.cat([1 - far, far * 0.6, far], 1), radius=0),
             "fused_pca": splat(image, uv, pca_colors(fused))}
    for name, index in labels.items():
        colors = palette(256).to(index.device)[index % 256]
        named[name] = splat(image, uv, colors.where(index[:, None] >= 0, 0.4))
    if clip_map is not None:
        cells = pca_colors(clip_map.flatten(1).T).T.unflatten(1, clip_map.shape[1:])
        named["clip_pca"] = F.interpolate(cells[None], size=image.shape[1:], mode="nearest")[0]
    return named
