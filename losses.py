# SPDX-License-Identifier: MIT
"""Losses that stay finite: CLIP consistency with its weight schedule, semantic and instance criteria.

Consistency of a fused point feature f with its CLIP target c, over the valid rows:

    loss = loss_weight * mean_i -log sigmoid(clip(cos_i / t)),    cos_i = <f_i, c_i> / (max(|f_i|, r) max(|c_i|, r))

What breaks such a loss is not the sigmoid (the slope of -log sigmoid never passes 1) but 1 / |f| in the gradient of
the normalisation, epsilons that vanish in fp16, and overflow before the norm. So: fp32 inside, a norm floor r that
matters, a temperature floor, non-finite rows left out and counted.

Imports torch.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE_FLOOR = 0.1


# ---------------------------------------------------------------------------------------------- CLIP consistency


def clip_loss_weight(epoch: int, boundaries=(10, 20), weights=(0.0, 0.001, 0.01)) -> float:
    """Weight of the consistency loss at an epoch (from 0): weights[i], i = how many boundaries lie before it.

    With the defaults: 0 for epochs 0 to 10, 0.001 for 11 to 20, 0.01 from 21 on.
    """
    if len(weights) != len(boundaries) + 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries {tuple(boundaries)} must ascend and have one entry less than weights "
                         f"{tuple(weights)}")
    return float(weights[sum(epoch > b for b in boundaries)])


def floored_normalize(x: Tensor, floor: float) -> Tensor:
    """x / max(|x|, floor) over the last dimension; its Jacobian has norm at most 1 / floor for every finite x.

    Rows are first divided by their largest entry where that exceeds 1, so that no square overflows.
    """
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)
    x = x / scale
    return x / torch.maximum(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor / scale)


def clip_consistency(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None, temperature=TEMPERATURE_FLOOR,
                     gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1):
    """Mean of -log sigmoid(cos / temperature) over the usable rows, in fp32 (float64 stays float64).

    feat_fusion (N, C); clip_feat (N, C), one target a point, or (B, C) with batch (N,) int64; valid (N,) bool.
    clip_feat is read as one target a point whenever it has N rows.
    Returns the loss, a scalar (a zero with a graph where no row is usable), and (2,) int64 counts: the rows that took
    part, and the valid ones that were left out because they or their target hold NaN or inf.
    """
    n = feat_fusion.shape[0]
    per_point = clip_feat.shape[0] == n
    if feat_fusion.dim() != 2 or clip_feat.dim() != 2 or feat_fusion.shape[1] != clip_feat.shape[1]:
        raise ValueError(f"feat_fusion {tuple(feat_fusion.shape)} and clip_feat {tuple(clip_feat.shape)} must be "
                         "(N, C) and (N, C) or (B, C)")
    if not per_point and batch is None:
        raise ValueError(f"clip_feat {tuple(clip_feat.shape)} has not {n} rows, so it needs batch (N,)")
    for name, mask in (("batch", batch), ("valid", valid)):
        if mask is not None and tuple(mask.shape) != (n,):
            raise ValueError(f"{name} {tuple(mask.shape)} must be ({n},), one entry a row of feat_fusion")

    with torch.autocast(feat_fusion.device.type, enabled=False):
        feat, clip = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (feat_fusion, clip_feat))
        feat_finite, clip_finite = feat.isfinite().all(1), clip.isfinite().all(1)
        # where, not a product: 0 * NaN is NaN, in the loss and in the gradient
        feat = floored_normalize(feat.where(feat_finite[:, None], 0), norm_floor)
        if gradient_flow_ratio == 0:
            clip = clip.detach()
        clip = floored_normalize(clip.where(clip_finite[:, None], 0), norm_floor)
        if 0 < gradient_flow_ratio < 1:
            clip = clip.detach() + gradient_flow_ratio * (clip - clip.detach())
        if not per_point:
            clip, clip_finite = clip[batch], clip_finite[batch]

        wanted = torch.ones_like(feat_finite) if valid is None else valid
        used = wanted & feat_finite & clip_finite
        logits = ((feat * clip).sum(1) / temperature).clamp(-clamp, clamp)
        rows = used.sum()
        loss = F.softplus(-logits).where(used, 0).sum() / rows.clamp(min=1)
        return loss, torch.stack([rows, (wanted & ~used).sum()])


class ClipConsCriterion(nn.Module):
    """Ties fused point features to CLIP's meaning, with a gradient that cannot blow up.

    For every input in fp32, fp16 or bf16, with t = max(temperature, 0.1) and `rows` the rows that take part:

        | d loss / d feat_fusion[i] |  <=  loss_weight / (rows * t * norm_floor)
        | d loss / d clip_feat[i] |    <=  gradient_flow_ratio times that, summed over the rows that share target i
        loss_weight * softplus(-m) <= loss <= loss_weight * softplus(m),    m = min(clamp, 1 / t); 0 without rows

    Derivation: |d softplus(-z) / dz| = 1 - sigmoid(z) < 1, dz / dcos = 1 / t, |dcos / df^| = |c^| <= 1 with f^, c^ the
    floored unit vectors, and |df^ / df| <= 1 / max(|f|, norm_floor): below the floor f^ = f / norm_floor, above it the
    Jacobian is the projection (I - f^ f^T) / |f|. The clamp can only lower the slope. With the default clamp of 10 and
    t >= 0.1 it never acts but on rounding, so it silences no row.

    loss_weight: what the schedule (`clip_loss_weight`) sets by epoch. temperature is floored at 0.1; the attribute
    holds the floored value. gradient_flow_ratio in [0, 1]: the share of the gradient that reaches clip_feat.
    counts (2,): rows used and non-finite rows left out, of the last call.
    """

    def __init__(self, loss_weight=0.05, temperature=0.07, gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1):
        super().__init__()
        if not (loss_weight >= 0 and temperature >= 0 and 0 <= gradient_flow_ratio <= 1 and clamp > 0
                and norm_floor > 0):
            raise ValueError(f"loss_weight={loss_weight} and temperature={temperature} must be >= 0, "
                             f"gradient_flow_ratio={gradient_flow_ratio} in [0, 1], clamp={clamp} and "
                             f"norm_floor={norm_floor} > 0")
        self.loss_weight = loss_weight
        self.temperature = max(temperature, TEMPERATURE_FLOOR)
        self.gradient_flow_ratio = gradient_flow_ratio
        self.clamp = clamp
        self.norm_floor = norm_floor
        self.counts = None

    def forward(self, feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None) -> Tensor:
        """feat_fusion (N, C), clip_feat (N, C) or (B, C) with batch (N,), valid (N,) bool -> scalar, weighted."""
        loss, self.counts = clip_consistency(feat_fusion, clip_feat, batch, valid, self.temperature,
                                             self.gradient_flow_ratio, self.clamp, self.norm_floor)
        return self.loss_weight * loss

    def extra_repr(self):
        return (f"loss_weight={self.loss_weight}, temperature={self.temperature}, clamp={self.clamp}, "
                f"norm_floor={self.norm_floor}, gradient_flow_ratio={self.gradient_flow_ratio}")


# ---------------------------------------------------------------------------------------------- Semantics


def semantic_loss(logits: Tensor, labels: Tensor, ignore_index=-1, class_weights=None) -> Tensor:
    """Weighted mean cross-entropy in fp32: sum_i w[y_i] ce_i / sum_i w[y_i] over the rows that are not ignored.

    logits (N, K), labels (N,) int64, class_weights (K,) or None -> scalar; a zero with a graph where all are ignored.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (N, K) and (N,)")
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels, class_weights, ignore_index=ignore_index, reduction="sum")
        valid = labels != ignore_index
        mass = valid.sum() if class_weights is None else class_weights[labels.clamp(min=0)].where(valid, 0).sum()
        return total / torch.where(mass > 0, mass, 1)


class SemanticCriterion(nn.Module):
    """`semantic_loss` times loss_weight; class_weights: K numbers or None."""

    def __init__(self, loss_weight=0.5, ignore_index=-1, class_weights=None):
        super().__init__()
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (N, K), labels (N,) int64 -> scalar, weighted."""
        return self.loss_weight * semantic_loss(logits, labels, self.ignore_index, self.class_weights)
