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
    An ignored row has no influence and gets no gradient, whatever it holds.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (N, K) and (N,)")
    if class_weights is not None and class_weights.shape != logits.shape[1:]:
        raise ValueError(f"class_weights {tuple(class_weights.shape)} must be ({logits.shape[1]},), one a class")
    with torch.autocast(logits.device.type, enabled=False):
        valid = labels != ignore_index
        # masked first: the softmax of a row with NaN has a NaN gradient even where its loss is not counted
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).where(valid[:, None], 0)
        weights = None if class_weights is None else class_weights.to(logits.dtype)
        total = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
        mass = valid.sum() if weights is None else weights[labels.where(valid, 0)].where(valid, 0).sum()
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


# ---------------------------------------------------------------------------------------------- Instances


def instance_targets(labels: Tensor, instances: Tensor, index: Tensor, superpoint_batch: Tensor):
    """The instances of every scene as masks over its superpoints.

    labels (N,) and instances (N,) int64, negative = none; index (N,), the superpoint of each point, numbered through
    scene after scene; superpoint_batch (S,), sorted.
    A superpoint lies in the instance that holds more than half of its points, so in one at most. The class of an
    instance is the most frequent label of its points. Points without label or instance count as outside.
    Returns B dicts {"masks": (G, S_b) bool, "labels": (G,) int64}, instances by ascending id. A row is empty where the
    instance has no superpoint of its own.
    """
    if not labels.shape == instances.shape == index.shape or labels.dim() != 1 or superpoint_batch.dim() != 1:
        raise ValueError(f"labels {tuple(labels.shape)}, instances {tuple(instances.shape)} and index "
                         f"{tuple(index.shape)} must be (N,), superpoint_batch {tuple(superpoint_batch.shape)} (S,)")
    S, sizes = len(superpoint_batch), torch.bincount(superpoint_batch)
    inside = (labels >= 0) & (instances >= 0)
    superpoint, label = index[inside], labels[inside]
    groups, group = torch.unique(torch.stack([superpoint_batch[superpoint], instances[inside]], 1), dim=0,
                                 return_inverse=True)
    G = len(groups)

    pairs, points = torch.unique(superpoint * G + group, return_counts=True)
    pairs = pairs[2 * points > torch.bincount(index, minlength=S)[pairs // max(G, 1)]]
    owner = torch.full((S,), -1, device=index.device)
    owner[pairs // max(G, 1)] = pairs % max(G, 1)

    K = int(label.max()) + 1 if G else 1
    group_label = torch.bincount(group * K + label, minlength=G * K).view(G, K).argmax(1)
    counts = torch.bincount(groups[:, 0], minlength=len(sizes)).tolist()
    rows = torch.arange(G, device=index.device).split(counts)
    owners = owner.split(sizes.tolist())
    return [{"masks": own == row[:, None], "labels": group_label[row]} for own, row in zip(owners, rows)]


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """1 - (2 <p, t> + 1) / (sum p + sum t + 1) over the last dimension (Milletari et al., V-Net, 2016, smoothed)."""
    return 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)


@torch.no_grad()
def match_instances(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, query: Tensor,
                    costs=(0.5, 1.0, 1.0)):
    """Each instance takes its cheapest query among those whose superpoint lies in it; so no query is taken twice.

        cost = -costs[0] * p(class of the instance) + costs[1] * BCE(mask) + costs[2] * dice(mask)

    One scene: class_logits (Q, K + 1), mask_logits (Q, S), labels (G,), masks (G, S) bool, query (Q,) the superpoint
    of each query. Returns best (G,) int64, the query taken, and matched (G,) bool, False where none lies inside.
    """
    target = masks.to(mask_logits.dtype)
    probability = mask_logits.sigmoid()
    # Summed over a mask, softplus(x) - x t is the BCE; dice as in dice_loss. As matrices, so that no (Q, G, S) is made.
    bce = (F.softplus(mask_logits).sum(1, keepdim=True) - mask_logits @ target.T) / mask_logits.shape[1]
    dice = 1 - (2 * probability @ target.T + 1) / (probability.sum(1, keepdim=True) + target.sum(1) + 1)
    cost = costs[1] * bce + costs[2] * dice - costs[0] * class_logits.softmax(1)[:, labels]  # (Q, G)
    cheapest, best = cost.where(masks[:, query].T, torch.inf).min(0)
    return best, cheapest.isfinite()


def instance_loss(layer: dict, targets: list, query, no_object_weight=0.1, costs=(0.5, 1.0, 1.0)) -> dict:
    """The four terms of one prediction layer, in fp32 (float64 stays float64).

    layer: tuples over the B scenes, "class_logits" (Q, K + 1), "mask_logits" (Q, S), "quality" (Q,). targets: of
    `instance_targets`. query: tuple over scenes, (Q,) the superpoint of each query.

        class    cross-entropy of all queries; a query without instance is of class K, with weight no_object_weight
        bce      binary cross-entropy, dice  `dice_loss`, of the masks of the matched queries
        quality  squared error of the quality against the IoU of the mask, where that exceeds 0.5

    Each is averaged within a scene, then over the scenes that have a match (class: over all), so that a batch weighs
    as its scenes one by one. Where nothing matches, a term is a zero with a graph.
    """
    device = layer["class_logits"][0].device
    terms, weights = [], []
    with torch.autocast(device.type, enabled=False):
        for class_logits, mask_logits, quality, target, index in zip(
                layer["class_logits"], layer["mask_logits"], layer["quality"], targets, query):
            if len(index) == 0:
                continue  # a scene without a point
            class_logits, mask_logits, quality = (x.to(torch.promote_types(x.dtype, torch.float32))
                                                  for x in (class_logits, mask_logits, quality))
            Q, K = class_logits.shape[0], class_logits.shape[1] - 1
            best, matched = match_instances(class_logits, mask_logits, target["labels"], target["masks"], index, costs)

            # Unmatched instances write to a spare row: no step here waits for the device.
            classes = torch.full((Q + 1,), K, device=device)
            classes[torch.where(matched, best, Q)] = torch.where(matched, target["labels"], K)
            class_weights = class_logits.new_ones(K + 1)
            class_weights[K] = no_object_weight
            class_term = F.cross_entropy(class_logits, classes[:Q], class_weights)

            logits, masks = mask_logits[best], target["masks"].to(mask_logits.dtype)  # (G, S)
            bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
            dice = dice_loss(logits.sigmoid(), masks)
            shape = logits >= 0
            overlap, union = (shape & target["masks"]).sum(1), (shape | target["masks"]).sum(1)
            iou = overlap / union.clamp(min=1)
            good = matched & (iou > 0.5)

            per_instance = ((bce, matched), (dice, matched), ((quality[best] - iou) ** 2, good))
            terms.append(torch.stack([class_term] + [x.where(w, 0).sum() / w.sum().clamp(min=1)
                                                     for x, w in per_instance]))
            weights.append(torch.stack([matched.new_ones(()), *(w.any() for _, w in per_instance)]))
        weights = torch.stack(weights)
        mean = torch.stack(terms).where(weights, 0).sum(0) / weights.sum(0).clamp(min=1)
    return dict(zip(("class", "bce", "dice", "quality"), mean))


class InstanceCriterion(nn.Module):
    """`instance_loss` of every layer, matched anew at each; weighted, and summed over terms and layers.

    class_agnostic: every instance is of class 0, for a decoder with the two class logits object and no object.
    terms: the unweighted terms of the last call, summed over layers, detached.
    """

    def __init__(self, loss_weight=1.0, class_weight=0.5, bce_weight=1.0, dice_weight=1.0, quality_weight=0.5,
                 no_object_weight=0.1, costs=(0.5, 1.0, 1.0), class_agnostic=False):
        super().__init__()
        self.loss_weight = loss_weight
        self.term_weights = {"class": class_weight, "bce": bce_weight, "dice": dice_weight, "quality": quality_weight}
        self.no_object_weight = no_object_weight
        self.costs = costs
        self.class_agnostic = class_agnostic
        self.terms = None

    def forward(self, output: dict, targets: list) -> Tensor:
        """output {"layers", "query"}: of the decoder, see `instance_loss`; targets: of `instance_targets` -> scalar."""
        if len(output["query"]) != len(targets):
            raise ValueError(f"output of {len(output['query'])} scenes, but targets of {len(targets)}")
        if self.class_agnostic:
            if output["layers"][0]["class_logits"][0].shape[1] != 2:
                raise ValueError("a class-agnostic criterion needs the class logits (Q, 2), got "
                                 f"{tuple(output['layers'][0]['class_logits'][0].shape)}")
            targets = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        layers = [instance_loss(layer, targets, output["query"], self.no_object_weight, self.costs)
                  for layer in output["layers"]]
        terms = {name: sum(layer[name] for layer in layers) for name in self.term_weights}
        self.terms = {name: term.detach() for name, term in terms.items()}
        return self.loss_weight * sum(weight * terms[name] for name, weight in self.term_weights.items())
