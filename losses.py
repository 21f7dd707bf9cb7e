# SPDX-License-Identifier: MIT
"""Losses that stay finite: CLIP consistency with its weight schedule, semantic and instance criteria.

Consistency of a fused point feature f with its CLIP target c, averaged over the valid rows:

    loss = mean_i -log sigmoid(cos_i / t),    cos_i = <f_i, c_i> / (max(|f_i|, r) max(|c_i|, r))

The sigmoid does not break such a loss: the slope of -log sigmoid never exceeds 1. What breaks it is 1 / |f| in the
gradient of the normalization, epsilons that vanish in fp16, and overflow before the norm. So everything here computes
in fp32, uses a norm floor r that matters and a floor for the temperature t, and leaves out and counts non-finite rows.

Every loss is a sum divided by a normalizer: a number of rows or of scenes. If several processes share a batch, each
criterion takes `world_mean`, a function that averages a tensor over the processes. The normalizer then is the same in
all of them, and the mean of their losses (and of their gradients) equals the loss of the undivided batch.
`world_mean` is called equally often for all data, so no process waits for another. None means one process.

A new loss term is one more criterion here and one entry in the dict of weights in the training script.

Imports torch.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE_FLOOR = 0.1
MAX_NEGATIVES = 512
CLIP_LOSSES = ("sigmoid", "cosine", "infonce")

NO_OBJECT_WEIGHT = 0.1  # of the class K, "no object", in the cross-entropy of the queries
MATCHING_COSTS = {"class": 0.5, "bce": 1.0, "dice": 1.0}
PADDED = -1e4  # mask logit of a superpoint that is not there: its probability and its part of a loss are exactly 0
INSTANCE_WEIGHTS = {"class": 0.5, "bce": 1.0, "dice": 1.0, "quality": 0.5}


def transformed() -> bool:
    """Whether torch.compile, torch.export or a torch.func transform traces: values then cannot be read, nor kept."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def check_ids(name, ids: Tensor, size: int, ignore=None):
    """Raises ValueError if ids are not int64 in [0, size), except `ignore`. On CUDA the device asserts their range.

    Their range is not checked while something traces (`transformed`).
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {ids.dtype}")
    if transformed():
        return
    fits = (ids >= 0) & (ids < size)
    if ignore is not None:
        fits |= ids == ignore
    message = f"{name} {tuple(ids.shape)} must lie in [0, {size})" + ("" if ignore is None else f" or be {ignore}")
    if ids.is_cuda:
        torch._assert_async(fits.all(), message)
    elif ids.device.type == "cpu" and not fits.all():
        raise ValueError(message)


def mean_over(total: Tensor, normalizer: Tensor, world_mean=None) -> Tensor:
    """total / normalizer, with the normalizer averaged over processes. If that is 0, total (which then is 0 too)."""
    normalizer = normalizer.to(total.dtype)
    if world_mean is not None:
        normalizer = world_mean(normalizer)
    # Not clamp(min=1): one row here and none in a second process give a normalizer of one half.
    return total / torch.where(normalizer > 0, normalizer, 1)


# ---------------------------------------------------------------------------------------------- CLIP consistency


def clip_loss_weight(epoch: int, boundaries=(10, 20), weights=(0.0, 0.001, 0.01)) -> float:
    """Weight of the consistency loss at an epoch (counted from 0): weights[number of boundaries below the epoch].

    With the defaults: 0 for epochs 0 to 10, 0.001 for 11 to 20, 0.01 from 21 on.
    Raises ValueError if the boundaries do not ascend or do not have one entry less than the weights.
    """
    if len(weights) != len(boundaries) + 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries {tuple(boundaries)} must ascend and have one entry less than weights "
                         f"{tuple(weights)}")
    stage = sum(epoch > boundary for boundary in boundaries)
    return float(weights[stage])


def rows_and_norms(x: Tensor, usable: Tensor, clamp, norm_floor: float, dtype: torch.dtype):
    """The usable rows of x (T, C) in dtype, their entries clamped to +-clamp, and max(|row|, norm_floor).

    Rows that are not usable become 0, whatever they hold. Returns rows (T, C), norms (T,), and the number of entries
    clamped. If squares of entries may overflow, a row with entries above 1 and its norm are both divided by the largest
    of them: their quotient stays as it is.
    """
    # Select, do not multiply: 0 * NaN is NaN, in the loss and in the gradient.
    rows = x.to(dtype).where(usable[:, None], 0)
    count = usable.new_zeros((), dtype=torch.int64)
    if clamp is not None:
        whole = rows
        rows = rows.clamp(-clamp, clamp)
        count = torch.count_nonzero(rows != whole)
    if clamp is None or clamp > 1e15:  # squares may overflow float32
        scale = largest_entry(rows).clamp(min=1)
        rows = rows / scale[:, None]
        norm_floor = norm_floor / scale
    return rows, torch.linalg.vector_norm(rows, dim=1).clamp(min=norm_floor), count


def largest_entry(x: Tensor) -> Tensor:
    """x (T, C) -> max |x| of every row (T,); NaN if the row holds one."""
    return x.detach().abs().amax(1)


def scale_gradient(x: Tensor, ratio: float) -> Tensor:
    """x itself, bit-exact, with ratio times its gradient."""
    if ratio == 0:
        return x.detach()
    if ratio == 1:
        return x
    return x.detach() + ratio * (x - x.detach())


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or float64 if any tensor is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def usable_rows(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None):
    """Which rows can take part. Arguments as in `clip_consistency`; raises ValueError if they do not fit.

    Returns three bool masks:
        used (N,)      valid points whose feature and target are finite
        dropped (N,)   valid points that are left out because either is not
        targets (T,)   rows of clip_feat that may be read: of used points, or finite scene targets
    """
    n = feat_fusion.shape[0]
    if feat_fusion.dim() != 2 or clip_feat.dim() != 2 or feat_fusion.shape[1] != clip_feat.shape[1]:
        raise ValueError(f"feat_fusion {tuple(feat_fusion.shape)} and clip_feat {tuple(clip_feat.shape)} must be "
                         "(N, C) and (N, C) or (B, C)")
    if batch is None and clip_feat.shape[0] != n:
        raise ValueError(f"clip_feat {tuple(clip_feat.shape)} does not have {n} rows, so it needs batch (N,)")
    for name, mask in (("batch", batch), ("valid", valid)):
        if mask is not None and tuple(mask.shape) != (n,):
            raise ValueError(f"{name} {tuple(mask.shape)} must be ({n},), one entry per row of feat_fusion")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    if batch is not None:
        check_ids("batch", batch, clip_feat.shape[0])

    feat_finite = largest_entry(feat_fusion).isfinite()
    clip_finite = largest_entry(clip_feat).isfinite()
    wanted = torch.ones_like(feat_finite) if valid is None else valid
    used = wanted & feat_finite & (clip_finite if batch is None else clip_finite[batch])
    return used, wanted & ~used, used if batch is None else clip_finite


def clip_consistency(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None, temperature=TEMPERATURE_FLOOR,
                     gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1, variant="sigmoid", world_mean=None):
    """Mean over the usable rows of -log sigmoid(cos / temperature) (variant "sigmoid") or of 1 - cos ("cosine").

    feat_fusion (N, C); clip_feat (N, C), one target per point, or (B, C), one per scene, with batch (N,) int64, the
    scene of each point; valid (N,) bool. If batch is given, clip_feat holds scenes, also if there are N of them.
    clamp: both features are clamped to +-clamp, entry by entry, before the norm; None: not. An entry beyond it gets no
    gradient. world_mean: see the top of the file. Computes in fp32; float64 stays float64.

    Returns the loss, a scalar (a zero with a graph if no row is usable), and counts (3,) int64: the rows used; the
    valid rows left out because they or their target hold NaN or inf; the entries clamped, of the used rows of
    feat_fusion and of the rows of clip_feat that may be read.
    """
    used, dropped, targets = usable_rows(feat_fusion, clip_feat, batch, valid)
    dtype = common_dtype(feat_fusion, clip_feat)
    with torch.autocast(feat_fusion.device.type, enabled=False):
        feat, feat_norm, feat_clamped = rows_and_norms(feat_fusion, used, clamp, norm_floor, dtype)
        clip, clip_norm, clip_clamped = rows_and_norms(scale_gradient(clip_feat, gradient_flow_ratio), targets, clamp,
                                                       norm_floor, dtype)
        clip = clip / clip_norm[:, None]
        if batch is not None:
            clip = clip[batch]  # (N, C)

        cosine = ((feat * clip).sum(1) / feat_norm).clamp(-1, 1)  # rounding alone takes it past 1
        if variant == "sigmoid":
            row_loss = F.softplus(-cosine / temperature)  # -log sigmoid(cosine / temperature)
        elif variant == "cosine":
            row_loss = 1 - cosine
        else:
            raise ValueError(f"variant={variant!r} must be sigmoid or cosine; infonce is `clip_infonce`")

        loss = mean_over(row_loss.where(used, 0).sum(), used.sum(), world_mean)
    return loss, torch.stack([used.sum(), dropped.sum(), feat_clamped + clip_clamped])


def draw_negatives(candidates: Tensor, count: int, generator=None) -> Tensor:
    """Draws rows of candidates (T,) bool, T >= count, without repetition -> (count,) int64.

    A row that is no candidate is drawn only after all candidates. Sorts random numbers: listing the candidates would
    wait for the device.
    """
    order = torch.rand(candidates.shape, device=candidates.device, generator=generator)
    return order.where(candidates, -1).topk(count).indices


def clip_infonce(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None, temperature=TEMPERATURE_FLOOR,
                 gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1, negatives=None, generator=None, world_mean=None):
    """Mean over the usable rows of half the cross-entropy of a row's own target among itself and the negatives.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018. Arguments and results as in
    `clip_consistency`, and negatives (M,) int64, rows of clip_feat. None: all rows; if there are more than
    MAX_NEGATIVES, that many usable ones, drawn anew in each call by `generator`, a torch.Generator of the device; None:
    the global one. A negative is skipped for the rows whose own target it is, and for all rows if it is not usable.
    Without any negative the loss is 0. Takes memory for a few times N x M numbers.
    """
    if negatives is not None and negatives.dim() != 1:
        raise ValueError(f"negatives {tuple(negatives.shape)} must be (M,), rows of clip_feat")
    if negatives is not None:
        check_ids("negatives", negatives, clip_feat.shape[0])
    used, dropped, targets = usable_rows(feat_fusion, clip_feat, batch, valid)
    dtype = common_dtype(feat_fusion, clip_feat)
    rows = torch.arange(clip_feat.shape[0], device=clip_feat.device)
    own = rows if batch is None else batch  # (N,)
    if negatives is None:
        negatives = rows if rows.shape[0] <= MAX_NEGATIVES else draw_negatives(targets, MAX_NEGATIVES, generator)

    with torch.autocast(feat_fusion.device.type, enabled=False):
        feat, feat_norm, feat_clamped = rows_and_norms(feat_fusion, used, clamp, norm_floor, dtype)
        clip, clip_norm, clip_clamped = rows_and_norms(scale_gradient(clip_feat, gradient_flow_ratio), targets, clamp,
                                                       norm_floor, dtype)
        clip = clip / clip_norm[:, None]

        positive = ((feat * clip[own]).sum(1) / feat_norm).clamp(-1, 1) / temperature  # (N,)
        negative = (feat @ clip[negatives].T / feat_norm[:, None]).clamp(-1, 1) / temperature  # (N, M)
        is_negative = targets[negatives] & (negatives != own[:, None])
        logits = torch.cat([positive[:, None], negative.where(is_negative, -torch.inf)], 1)
        row_loss = -logits.log_softmax(1)[:, 0] / 2

        loss = mean_over(row_loss.where(used, 0).sum(), used.sum(), world_mean)
    return loss, torch.stack([used.sum(), dropped.sum(), feat_clamped + clip_clamped])


class ClipConsCriterion(nn.Module):
    """Ties fused point features to CLIP's meaning, with a gradient that cannot blow up.

    With z+ = cos / t of a row with its target, z_j of it with each of its J negatives, and t = max(temperature, 0.1)
    (1 for cosine):

        variant    loss of a row                                     lies in
        sigmoid    softplus(-z+)                                     [softplus(-1 / t), softplus(1 / t)]
        cosine     1 - cos                                           [0, 2]
        infonce    1/2 log(exp(z+) + sum_j exp(z_j)) - 1/2 z+        [0, 1/2 log(1 + J exp(2 / t))]

    loss = loss_weight * mean over the `rows` that take part, 0 without any. For every variant, and for every input in
    fp32, fp16 or bf16, its gradient is bounded:

        | d loss / d feat_fusion[i] |  <=  loss_weight / (rows * t * norm_floor)
        | d loss / d clip_feat[k] |    <=  gradient_flow_ratio times that, for each row it is positive or negative to

    Derivation, by the chain rule. f is a feature, f' the same clamped entry by entry, f^ = f' / max(|f'|, norm_floor);
    c^ likewise.
        loss to logits   The slopes of a row's loss are: sigmoid s+ = -(1 - sigmoid(z+)); cosine s+ = -1; infonce
                         s+ = -(1 - p+) / 2 and s_j = p_j / 2 with the softmax p, so sum_j p_j = 1 - p+.
                         In all of them |s+| + sum_j |s_j| <= 1.
        logits to f^     dz / dcos = 1 / t, and |dcos / df^| = |c^| <= 1.
        f^ to f'         |df^ / df'| <= 1 / max(|f'|, norm_floor): below the floor f^ = f' / norm_floor, above it the
                         Jacobian is the projection (I - f^ f^T) / |f'|.
        f' to f          The Jacobian of the clamp is diagonal with entries 0 and 1, so its norm is at most 1.
    The same with f and c exchanged; there a row of infonce counts |s+| <= 1/2 for its target and |s_j| <= 1/2 for a
    negative.

    loss_weight: what the schedule (`clip_loss_weight`) sets by epoch.
    temperature: floored at 0.1; the attribute holds the floored value.
    gradient_flow_ratio in [0, 1]: the share of the gradient that reaches clip_feat.
    clamp: of the entries of both features, before the norm; None: not. It silences the entries it touches.
    variant: one of CLIP_LOSSES.
    world_mean: see the top of the file; `rows` is then the mean number of rows per process, and the interval is that
        of the mean loss over the processes. infonce takes the negatives of its own process only.
    """

    def __init__(self, loss_weight=0.05, temperature=0.07, gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1,
                 variant="sigmoid", world_mean=None):
        super().__init__()
        if not (loss_weight >= 0 and temperature >= 0 and 0 <= gradient_flow_ratio <= 1 and norm_floor > 0
                and (clamp is None or clamp > 0)):
            raise ValueError(f"loss_weight={loss_weight} and temperature={temperature} must be >= 0, "
                             f"gradient_flow_ratio={gradient_flow_ratio} in [0, 1], norm_floor={norm_floor} > 0, "
                             f"clamp={clamp} > 0 or None")
        if variant not in CLIP_LOSSES:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(CLIP_LOSSES)}")
        self.loss_weight = loss_weight
        self.temperature = max(temperature, TEMPERATURE_FLOOR)
        self.gradient_flow_ratio = gradient_flow_ratio
        self.clamp = clamp
        self.norm_floor = norm_floor
        self.variant = variant
        self.world_mean = world_mean

    def forward(self, feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None, generator=None):
        """feat_fusion (N, C), clip_feat (N, C), or (B, C) with batch (N,), valid (N,) bool -> loss, counts.

        The loss is a weighted scalar. counts (3,) int64 of this process: rows used, non-finite rows left out, entries
        clamped. generator: draws the negatives of infonce; None: the global one.
        """
        settings = dict(temperature=self.temperature, gradient_flow_ratio=self.gradient_flow_ratio, clamp=self.clamp,
                        norm_floor=self.norm_floor, world_mean=self.world_mean)
        if self.variant == "infonce":
            loss, counts = clip_infonce(feat_fusion, clip_feat, batch, valid, generator=generator, **settings)
        else:
            loss, counts = clip_consistency(feat_fusion, clip_feat, batch, valid, variant=self.variant, **settings)
        return self.loss_weight * loss, counts

    def extra_repr(self):
        return (f"loss_weight={self.loss_weight}, temperature={self.temperature}, clamp={self.clamp}, "
                f"norm_floor={self.norm_floor}, gradient_flow_ratio={self.gradient_flow_ratio}, "
                f"variant={self.variant!r}")


# ---------------------------------------------------------------------------------------------- Semantics


def semantic_loss(logits: Tensor, labels: Tensor, ignore_index=-1, world_mean=None) -> Tensor:
    """Mean cross-entropy in fp32 over the rows that are not ignored.

    logits (N, K), labels (N,) int64 -> scalar; a zero with a graph if all rows are ignored. An ignored row has no
    influence and gets no gradient, whatever it holds. world_mean: see the top of the file.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (N, K) and (N,)")
    check_ids("labels", labels, logits.shape[1], ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        valid = labels != ignore_index
        # Mask first: the softmax of a row with NaN has a NaN gradient even if its loss is not counted.
        logits = logits.to(common_dtype(logits)).where(valid[:, None], 0)
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
        return mean_over(total, valid.sum(), world_mean)


class SemanticCriterion(nn.Module):
    """`semantic_loss`; world_mean: see the top of the file."""

    def __init__(self, ignore_index=-1, world_mean=None):
        super().__init__()
        self.ignore_index = ignore_index
        self.world_mean = world_mean

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (N, K), labels (N,) int64 -> scalar."""
        return semantic_loss(logits, labels, self.ignore_index, self.world_mean)


# ---------------------------------------------------------------------------------------------- Instances


def instance_targets(labels: Tensor, instances: Tensor, index: Tensor, superpoint_batch: Tensor):
    """The instances of every scene as masks over its superpoints, G_b of scene b.

    labels (N,) and instances (N,) int64, negative = none; index (N,), the superpoint of each point, numbered through
    scene after scene; superpoint_batch (S,), the scene of each superpoint, sorted.

    A superpoint belongs to the instance that holds more than half of its points, so to at most one. The class of an
    instance is the most frequent label of its points. Points without a label or an instance count as outside.

    Returns a dict, instances by ascending id: "masks" (B, G_max, S_max) bool, False beyond a scene's; "labels"
    (B, G_max) int64, -1 beyond them; "sizes" (B,), S_b. A mask is empty if its instance owns no superpoint. Raises
    ValueError for other shapes.
    """
    if not labels.shape == instances.shape == index.shape or labels.dim() != 1 or superpoint_batch.dim() != 1:
        raise ValueError(f"labels {tuple(labels.shape)}, instances {tuple(instances.shape)} and index "
                         f"{tuple(index.shape)} must be (N,), superpoint_batch {tuple(superpoint_batch.shape)} (S,)")
    S = len(superpoint_batch)
    sizes = torch.bincount(superpoint_batch)  # (B,), superpoints per scene
    inside = (labels >= 0) & (instances >= 0)
    superpoint = index[inside]
    label = labels[inside]
    ids, rank = instances[inside].unique(return_inverse=True)
    keys, group = (superpoint_batch[superpoint] * len(ids) + rank).unique(return_inverse=True)  # (G,), (points inside,)
    G = len(keys)

    # Number of points per (superpoint, instance) pair that occurs
    pairs, points = torch.unique(superpoint * G + group, return_counts=True)
    superpoint_points = torch.bincount(index, minlength=S)
    pairs = pairs[2 * points > superpoint_points[pairs // max(G, 1)]]
    owner = torch.full((S,), -1, device=index.device)
    owner[pairs // max(G, 1)] = pairs % max(G, 1)

    # Most frequent label per instance
    K = int(label.max()) + 1 if G else 1
    group_label = torch.bincount(group * K + label, minlength=G * K).view(G, K).argmax(1)

    # By scene, padded
    counts = torch.bincount(keys // max(len(ids), 1), minlength=len(sizes)).tolist()
    instance = pad_rows(torch.arange(G, device=index.device).split(counts), -2)  # (B, G_max)
    owner = pad_rows(owner.split(sizes.tolist()), -1)                           # (B, S_max)
    return {"masks": owner[:, None] == instance[..., None], "labels": pad_rows(group_label.split(counts), -1),
            "sizes": sizes}


def pad_rows(rows, value):
    """B tensors (R_b,) -> (B, R_max), filled up with value; R_max is 1 at least."""
    longest = max(1, *map(len, rows))
    return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """1 - (2 <p, t> + 1) / (sum p + sum t + 1) over the last dimension (Milletari et al., V-Net, 2016, smoothed)."""
    return 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)


@torch.no_grad()
def match_instances(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, query: Tensor,
                    sizes=None):
    """Each instance takes its cheapest query among those whose superpoint it owns; so no query is taken twice.

        cost = -0.5 * p(class of the instance) + BCE(mask) + dice(mask)          (weights: MATCHING_COSTS)

    class_logits (..., Q, K + 1), mask_logits (..., Q, S), labels (..., G), masks (..., G, S) bool, query (..., Q) the
    superpoint of each query; leading dimensions, layers and scenes or none, are matched independently. Padding is -1 in
    query and labels, PADDED in mask_logits, False in masks; sizes (..., 1, 1) is then the number of superpoints.
    Returns best (..., G) int64, the query taken, and matched (..., G) bool, False if the instance owns the superpoint
    of no query.
    """
    target = masks.to(mask_logits.dtype).transpose(-1, -2)  # (..., S, G)
    probability = mask_logits.sigmoid()
    sizes = mask_logits.shape[-1] if sizes is None else sizes
    # Summed over a mask, softplus(x) - x t is the BCE; dice as in dice_loss. As matrix products, to make no (Q, G, S).
    bce = (F.softplus(mask_logits).sum(-1, keepdim=True) - mask_logits @ target) / sizes
    dice = 1 - (2 * probability @ target + 1) / (probability.sum(-1, keepdim=True) + target.sum(-2, keepdim=True) + 1)
    column = labels.clamp(min=0)[..., None, :].expand(bce.shape)
    class_probability = class_logits.softmax(-1).gather(-1, column)
    cost = (MATCHING_COSTS["bce"] * bce + MATCHING_COSTS["dice"] * dice
            - MATCHING_COSTS["class"] * class_probability)  # (..., Q, G)
    row = query.clamp(min=0)[..., None].expand(*query.shape, masks.shape[-2])
    inside = masks.transpose(-1, -2).gather(-2, row) & (query >= 0)[..., None]  # (..., Q, G)
    cheapest, best = cost.where(inside, torch.inf).min(-2)
    return best, cheapest.isfinite()


def scene_terms(class_logits: Tensor, mask_logits: Tensor, quality: Tensor, query: Tensor, targets: dict):
    """The terms of `instance_losses` scene by scene: predictions of L layers and B scenes, and their targets ->
    terms (L, B, 4), counted (L, B, 4) bool: whether the scene has the term.
    """
    L, B, Q = quality.shape
    K = class_logits.shape[3] - 1
    labels, masks = targets["labels"].expand(L, -1, -1), targets["masks"]
    sizes = targets["sizes"].clamp(min=1)[:, None]  # (B, 1)
    best, matched = match_instances(class_logits, mask_logits, labels, masks, query, sizes[..., None])  # (L, B, G)

    # Unmatched instances write to a spare query Q: nothing here waits for the device.
    classes = torch.full((L, B, Q + 1), K, device=query.device)
    classes.scatter_(2, torch.where(matched, best, Q), torch.where(matched, labels, K))
    classes = classes[..., :Q]
    class_weights = class_logits.new_ones(K + 1)
    class_weights[K] = NO_OBJECT_WEIGHT
    cross_entropy = F.cross_entropy(class_logits.flatten(0, 2), classes.flatten(), class_weights, reduction="none")
    total = cross_entropy.view(L, B, Q).where(query >= 0, 0).sum(2)
    class_term = mean_over(total, class_weights[classes].where(query >= 0, 0).sum(2))  # (L, B)

    logits = mask_logits.gather(2, best[..., None].expand(-1, -1, -1, mask_logits.shape[3]))  # (L, B, G, S)
    target = masks.to(mask_logits.dtype).expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(3) / sizes  # (L, B, G)
    dice = dice_loss(logits.sigmoid(), target)
    shape = logits >= 0
    iou = (shape & masks).sum(3) / (shape | masks).sum(3).clamp(min=1)
    error = (quality.gather(2, best) - iou) ** 2
    good = matched & (iou > 0.5)

    values = torch.stack([bce, dice, error], 2)            # (L, B, 3, G)
    chosen = torch.stack([matched, matched, good], 2)
    means = values.where(chosen, 0).sum(3) / chosen.sum(3).clamp(min=1)
    has_queries = (query[:, :1] >= 0).expand(L, B, 1)
    return torch.cat([class_term[..., None], means], 2), torch.cat([has_queries, chosen.any(3)], 2)


def instance_losses(output: dict, targets: dict, world_mean=None) -> Tensor:
    """The four raw terms of L predictions -> (L, 4), in fp32 (float64 stays float64), in the order of INSTANCE_WEIGHTS.

    output: of the decoder, padded to the largest of B scenes: "class_logits" (L, B, Q, K + 1), "mask_logits"
    (L, B, Q, S), PADDED in padding, "quality" (L, B, Q), "query" (B, Q), the superpoint of each query, -1 in padding.
    targets: from `instance_targets`. Each prediction is matched anew.

        class    cross-entropy of all queries; a query without instance has class K and weight NO_OBJECT_WEIGHT
        bce      binary cross-entropy of the masks of the matched queries
        dice     `dice_loss` of the same masks
        quality  squared error of the quality against the IoU of the mask, for matched queries with IoU above 0.5

    Each term is averaged within a scene, then over the scenes that have a match (class: over all), so that the scenes
    of a batch weigh the same. Without any match a term is a zero with a graph. world_mean: see the top of the file; it
    is called once per prediction, on the number of scenes of each term (4,).
    """
    if len(output["query"]) != len(targets["labels"]):
        raise ValueError(f"output of {len(output['query'])} scenes, but targets of {len(targets['labels'])}")
    with torch.autocast(output["query"].device.type, enabled=False):
        inputs = [output[name] for name in ("class_logits", "mask_logits", "quality")]
        terms, counted = scene_terms(*(x.to(common_dtype(x)) for x in inputs), output["query"], targets)
        total = terms.where(counted, 0).sum(1)  # (L, 4)
        scenes = counted.sum(1).to(total.dtype)
        if world_mean is not None:
            scenes = torch.stack([world_mean(layer) for layer in scenes])
        return mean_over(total, scenes)


class InstanceCriterion(nn.Module):
    """`instance_losses` summed over all predictions. world_mean: see the top of the file."""

    def __init__(self, world_mean=None):
        super().__init__()
        self.world_mean = world_mean

    def forward(self, output: dict, targets: dict) -> dict:
        """output, targets: see `instance_losses` -> {"class", "bce", "dice", "quality"}, raw scalars."""
        return dict(zip(INSTANCE_WEIGHTS, instance_losses(output, targets, self.world_mean).sum(0)))
