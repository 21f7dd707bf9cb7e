# SPDX-License-Identifier: MIT
"""What the training loop asks about its features, where a step stopped being finite, and the pictures that it logs.

Imports torch.
"""
import colorsys
from collections import defaultdict

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


def thinned(feats, max_rows=2048):
    """Every k-th row, at most max_rows of them: a spectrum does not need more."""
    return feats[::max(1, -(-len(feats) // max_rows))]


def fusion_statistics(out, batch):
    """Scalars about one output of BiFusionEncoder, as a dict of 0-d tensors; see the README's table of tags."""
    with torch.no_grad():
        feats, valid = out["feat_fusion"].float(), out["valid"]
        stats = {"effective_rank": effective_rank(thinned(feats))}
        if out["clip_global"] is None:
            return stats
        seen = valid.sum().clamp(min=1)
        alpha = out["alpha"].float().squeeze(1)
        mean = alpha.sum() / seen  # alpha is 0 where not valid
        cosine = F.cosine_similarity(feats, out["clip_global"].float()[batch["batch"]])
        return {**stats, "valid_share": valid.float().mean(), "gate_mean": mean,
                "gate_std": ((alpha - mean).square() * valid).sum().div(seen).sqrt(),
                "clip_cosine": cosine.where(valid, 0).sum() / seen}


# ---------------------------------------------------------------------------------------------- who fights whom


@torch.no_grad()
def pairwise_cosine(feats: Tensor) -> Tensor:
    """Mean cosine of two different rows of feats (n, C), without an (n, n) matrix: 1 = all point one way; 0: n < 2."""
    n = len(feats)
    unit = F.normalize(feats.double(), dim=1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / max(1, n * (n - 1))).float()


def term_statistics(terms: dict, out: dict, scale=1.0) -> dict:
    """How the loss terms pull at the fused features, as a dict of 0-d tensors; see the README's table of tags.

    terms: {name: weighted scalar} with a graph, which is kept; out: the model's output that they were made of. With g_i
    the gradient of term i at feat_fusion and g their sum: |g_i|, cos(g_i, g_j), and the share <g_i, g> / <g, g> of the
    step that a term explains; shares sum to 1, one below 0 is overruled by the others.
    scale: of the loss, so that half precision does not lose small gradients.
    """
    fused = out["feat_fusion"]
    grads = {}
    for name, term in terms.items():
        grad, = torch.autograd.grad(term * scale, fused, retain_graph=True, materialize_grads=True)
        grads[name] = grad.flatten().float() / scale
    names, total = list(grads), sum(grads.values())
    tiny = torch.finfo(total.dtype).tiny
    stats = {f"grad_norm_{name}": grad.norm() for name, grad in grads.items()}
    stats |= {f"share_{name}": grad @ total / (total @ total).clamp(min=tiny) for name, grad in grads.items()}
    stats |= {f"cosine_{a}_{b}": F.cosine_similarity(grads[a], grads[b], 0, tiny)
              for i, a in enumerate(names) for b in names[i + 1:]}
    with torch.no_grad():
        feats, baseline, valid = (thinned(out[name]) for name in ("feat_fusion", "feat_3d", "valid"))
        baseline = baseline.float()
        drift = (feats.float() - baseline).norm(dim=1) / baseline.norm(dim=1).clamp(min=1e-6)
        return {**stats, "pairwise_cosine": pairwise_cosine(feats), "effective_rank": effective_rank(feats),
                "drift": drift.where(valid, 0).sum() / valid.sum().clamp(min=1)}


# ---------------------------------------------------------------------------------------------- the sentry


def tensors_of(value):
    """Every floating-point tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def is_finite(value):
    """Whether every tensor in nested tuples, lists and dicts is free of NaN and inf."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(value))


def locate_nonfinite(model, batch, losses, scale=1.0):
    """Where a step first stops being finite: a list of findings, the likeliest cause first; empty where it is finite.

    losses: `batch -> {name: scalar}`, runs the model; scale: of the loss in the backward pass. One pass forward and one
    backward a term, with hooks on every module; gradients are left as they are, buffers of the model are not. What does
    not depend on the data is run on any data, so that several processes may look together.
    """
    findings = []
    for name, value in batch.items():
        bad = torch.zeros(0) if not isinstance(value, Tensor) else ~value.isfinite()
        if bad.any():
            first = bad.nonzero()[0].tolist()
            sample = int(batch["batch"][first[0]]) if len(value) == len(batch["batch"]) else first[0]
            findings.append(f"input: field {name!r} of sample {batch['name'][sample]} holds {int(bad.sum())} values "
                            f"that are not finite, the first at {first} of {tuple(value.shape)}")
    findings += [f"weight: {name} {tuple(value.shape)} holds {int((~value.isfinite()).sum())} values that are not "
                 "finite" for name, value in (*model.named_parameters(), *model.named_buffers())
                 if not is_finite(value)]

    outputs, gradients = [], defaultdict(list)  # names in the order in which they were found
    term = None

    def after(name):
        def hook(module, inputs, output):
            if not is_finite(output):
                outputs.append((name, type(module).__name__, is_finite(inputs)))
            for tensor in tensors_of(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: None if grad.isfinite().all() else gradients[term].append(name))
        return hook

    handles = [module.register_forward_hook(after(name)) for name, module in model.named_modules() if name]
    terms = losses(batch)
    for handle in handles:
        handle.remove()
    if outputs:
        name, kind, fed = outputs[0]
        findings.append(f"module: {name} ({kind}) is the first with an output that is not finite; its input is "
                        f"{'finite' if fed else 'not either'}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for term, value in terms.items():
        finite = bool(value.isfinite())
        if not finite:
            findings.append(f"loss: {term} is {value.item()}")
        grads = torch.autograd.grad(value * scale, list(parameters.values()), retain_graph=True, allow_unused=True)
        bad = [name for name, grad in zip(parameters, grads) if grad is not None and not grad.isfinite().all()]
        if finite and bad:  # of a loss that is not finite nothing else is to be expected
            where = f"at the output of module {gradients[term][0]}" if gradients[term] else f"at weight {bad[-1]}"
            findings.append(f"gradient: of {term}, first not finite {where} and so at {len(bad)} of {len(grads)} "
                            f"weights, with a loss scale of {scale:g}")
    return findings


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
