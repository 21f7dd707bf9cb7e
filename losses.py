# SPDX-License-Identifier: MIT
"""Losses that stay finite: CLIP consistency with its weight schedule, semantic and instance criteria.

Consistency of a fused point feature f with its CLIP target c, averaged over the valid rows:

    loss = mean_i -log sigmoid(cos_i / t),    cos_i = <f_i, c_i> / (max(|f_i|, r) max(|c_i|, r))

The sigmoid does not break such a loss: the slope of -log sigmoid never exceeds 1. What breaks it is
1 / |f| in the gradient of the normalization, epsilons that vanish in fp16, and overflow before the
norm. So everything here computes in fp32, uses a norm floor r that matters and a floor for the
temperature t, and leaves out and counts non-finite rows.

Every loss is a sum divided by a normalizer: a number of rows or of scenes. If several processes share a
batch, each criterion takes `world_mean`, a function that averages a tensor over the processes. Then the
mean of their losses (and of their gradients) equals the loss of the undivided batch. `world_mean` is
called equally often for all data, so no process waits for another. None means one process.

Imports torch.
"""
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

TEMPERATURE_FLOOR = 0.1
MAX_NEGATIVES = 512
CLIP_LOSSES = ("sigmoid", "cosine", "infonce")

NO_OBJECT_WEIGHT = 0.1  # of the class K, "no object", in the cross-entropy of the queries
MATCHING_COSTS = {"class": 0.5, "bce": 1.0, "dice": 1.0}
PADDED = -1e4  # mask logit of padding: its probability and its part of a loss are exactly 0
INSTANCE_WEIGHTS = {"class": 0.5, "bce": 1.0, "dice": 1.0, "quality": 0.5}


def check_ids(name, ids, size, ignore=None):
    """ValueError if ids are not (n,) int64 in [0, size) or `ignore`.

    On CUDA the device asserts the range; tracing (torch.compile, torch.export, torch.func) skips it.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional int64, got {tuple(ids.shape)} {ids.dtype}")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    message = f"{name} {tuple(ids.shape)} must lie in [0, {size})"
    fits = (ids >= 0) & (ids < size)
    if ignore is not None:
        fits |= ids == ignore
        message += f" or be {ignore}"
    if ids.is_cuda:
        torch._assert_async(fits.all(), message)
    elif ids.device.type == "cpu" and not fits.all():
        raise ValueError(message)


def mean_over(total, normalizer, world_mean=None):
    """total / normalizer, which is averaged over processes first; total, a 0 then, if it is 0."""
    normalizer = normalizer.to(total.dtype)
    if world_mean is not None:
        normalizer = world_mean(normalizer)
    # Not clamp(min=1): one row here and none in a second process give a normalizer of one half.
    return total / torch.where(normalizer > 0, normalizer, 1)


# ------------------------------------------------------------------------------------ CLIP consistency


def clip_loss_weight(epoch, boundaries=(10, 20), weights=(0.0, 0.001, 0.01)):
    """Weight of the consistency loss at an epoch: weights[number of boundaries below the epoch].

    With the defaults: 0 for epochs 0 to 10, 0.001 for 11 to 20, 0.01 from 21 on.
    """
    if len(weights) != len(boundaries) + 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries {tuple(boundaries)} must ascend and have one entry less than "
                         f"weights {tuple(weights)}")
    stage = sum(epoch > boundary for boundary in boundaries)
    return float(weights[stage])


def rows_and_norms(x, usable, clamp, norm_floor, dtype):
    """Usable rows of x (T, C), clamped, in dtype; max(|row|, norm_floor) (T,); number of entries clamped.

    Other rows become 0. If squares may overflow, a row with entries above 1 and its norm are both divided
    by the largest of them, which leaves their quotient as it is.
    """
    # Select, do not multiply: 0 * NaN is NaN, in the loss and in the gradient.
    rows = x.to(dtype).where(usable[:, None], 0)
    whole = rows
    if clamp is not None:
        rows = rows.clamp(-clamp, clamp)
    count = torch.count_nonzero(rows != whole)
    if clamp is None or clamp > 1e15:  # squares may overflow float32
        scale = largest_entry(rows).clamp(min=1)
        rows = rows / scale[:, None]
        norm_floor = norm_floor / scale
    norms = torch.linalg.vector_norm(rows, dim=1)
    return rows, norms.clamp(min=norm_floor), count


def largest_entry(x):
    """x (T, C) -> max |x| of every row (T,); NaN if the row holds one."""
    return x.detach().abs().amax(1)


def scale_gradient(x, ratio):
    """x itself, bit-exact, with ratio times its gradient."""
    if ratio == 0:
        return x.detach()
    if ratio == 1:
        return x
    return x.detach() + ratio * (x - x.detach())


def common_dtype(*tensors):
    """The dtype of the arithmetic: fp32, or float64 if any tensor is float64."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def usable_rows(feat_fusion, clip_feat, batch=None, valid=None):
    """Which rows can take part, as bool masks. Arguments as in `clip_consistency`, checked here.

        used (N,)      valid points whose feature and target are finite
        dropped (N,)   valid points that are left out because either is not
        targets (T,)   rows of clip_feat that may be read: of used points, or finite scene targets
    """
    n = feat_fusion.shape[0]  # len() would fix the size of an export
    T = clip_feat.shape[0]
    shapes = f"feat_fusion {tuple(feat_fusion.shape)} and clip_feat {tuple(clip_feat.shape)}"
    is_matrix = feat_fusion.dim() == clip_feat.dim() == 2
    if not is_matrix or feat_fusion.shape[1] != clip_feat.shape[1]:
        raise ValueError(f"{shapes} must be (N, C) and (N, C) or (B, C)")
    if batch is None and T != n:
        raise ValueError(f"{shapes} differ in their rows: give batch (N,), the scene of each point")
    for name, mask in (("batch", batch), ("valid", valid)):
        if mask is not None and tuple(mask.shape) != (n,):
            raise ValueError(f"{name} {tuple(mask.shape)} must be ({n},), one entry per point")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    if batch is not None:
        check_ids("batch", batch, T)

    feat_finite = largest_entry(feat_fusion).isfinite()
    clip_finite = largest_entry(clip_feat).isfinite()
    own_finite = clip_finite if batch is None else clip_finite[batch]
    wanted = torch.ones_like(feat_finite) if valid is None else valid
    used = wanted & feat_finite & own_finite
    return used, wanted & ~used, used if batch is None else clip_finite


def draw_negatives(candidates, count, seed=None):
    """Draws `count` of T rows without repetition, candidates (T,) bool before the rest -> (count,) int64."""
    generator = None
    if seed is not None:
        generator = torch.Generator(candidates.device).manual_seed(seed)
    order = torch.rand(candidates.shape, device=candidates.device, generator=generator)
    # sorts random numbers, because listing the candidates would wait for the device
    return order.where(candidates, -1).topk(count).indices


def clip_consistency(feat_fusion, clip_feat, batch=None, valid=None, variant="sigmoid",
                     temperature=TEMPERATURE_FLOOR, gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1, seed=None,
                     world_mean=None):
    """Mean over the usable rows of a loss of cos, the cosine of a fused feature with its CLIP target.

    variant: "sigmoid", -log sigmoid(cos / temperature); "cosine", 1 - cos; or "infonce", half the
        cross-entropy of the target among itself and its negatives (van den Oord et al., Representation
        Learning with Contrastive Predictive Coding, 2018): the other usable rows of clip_feat; of more
        than MAX_NEGATIVES rows that many, drawn by the seed (None: by the global generator). Without any
        the loss is 0. Takes memory for a few times N x M numbers.
    feat_fusion (N, C); clip_feat (N, C), one target per point, or (B, C), one per scene, with batch (N,)
        int64, the scene of each point, also if B = N; valid (N,) bool.
    clamp: both features are clamped to +-clamp, entry by entry, before the norm; None: not. An entry
        beyond it gets no gradient.

    Computes in fp32; float64 stays float64. Returns the loss, a scalar (a zero with a graph if no row is
    usable), and counts (3,) int64: rows used; valid rows left out because they or their target hold NaN
    or inf; entries clamped in the used rows of feat_fusion and the readable ones of clip_feat.
    """
    if variant not in CLIP_LOSSES:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(CLIP_LOSSES)}")
    used, dropped, targets = usable_rows(feat_fusion, clip_feat, batch, valid)
    dtype = common_dtype(feat_fusion, clip_feat)
    with torch.autocast(feat_fusion.device.type, enabled=False):
        feat, feat_norm, feat_clamped = rows_and_norms(feat_fusion, used, clamp, norm_floor, dtype)
        clip = scale_gradient(clip_feat, gradient_flow_ratio)
        clip, clip_norm, clip_clamped = rows_and_norms(clip, targets, clamp, norm_floor, dtype)
        clip = clip / clip_norm[:, None]
        own = clip if batch is None else clip[batch]  # (N, C)
        cosine = (feat * own).sum(1) / feat_norm
        cosine = cosine.clamp(-1, 1)  # rounding alone takes it past 1
        if variant == "sigmoid":
            row_loss = F.softplus(-cosine / temperature)  # -log sigmoid(cosine / temperature)
        elif variant == "cosine":
            row_loss = 1 - cosine
        else:
            T = clip.shape[0]
            rows = torch.arange(T, device=clip.device)
            negatives = draw_negatives(targets, MAX_NEGATIVES, seed) if T > MAX_NEGATIVES else rows
            others = feat @ clip[negatives].T / feat_norm[:, None]  # (N, M)
            others = others.clamp(-1, 1) / temperature
            row = rows if batch is None else batch
            is_negative = targets[negatives] & (negatives != row[:, None])
            others = others.where(is_negative, -torch.inf)
            positive = cosine[:, None] / temperature
            logits = torch.cat([positive, others], 1)
            row_loss = -logits.log_softmax(1)[:, 0] / 2

        total = row_loss.where(used, 0).sum()
        loss = mean_over(total, used.sum(), world_mean)
    counts = [used.sum(), dropped.sum(), feat_clamped + clip_clamped]
    return loss, torch.stack(counts)


class ClipConsCriterion(nn.Module):
    """Ties fused point features to CLIP's meaning, with a gradient that cannot blow up.

    With z+ = cos / t of a row with its target, z_j of it with each of its J negatives, and
    t = max(temperature, 0.1) (1 for cosine):

        variant    loss of a row                                     lies in
        sigmoid    softplus(-z+)                                     [softplus(-1 / t), softplus(1 / t)]
        cosine     1 - cos                                           [0, 2]
        infonce    1/2 log(exp(z+) + sum_j exp(z_j)) - 1/2 z+        [0, 1/2 log(1 + J exp(2 / t))]

    loss = loss_weight * mean over the `rows` that take part, 0 without any. For every variant, and for
    every input in fp32, fp16 or bf16, its gradient is bounded:

        | d loss / d feat_fusion[i] |  <=  loss_weight / (rows * t * norm_floor)
        | d loss / d clip_feat[k] |    <=  gradient_flow_ratio times that, per row whose positive or
                                           negative it is

    Derivation, by the chain rule. f is a feature, f' the same clamped entry by entry,
    f^ = f' / max(|f'|, norm_floor); c^ likewise.
        loss to logits   The slopes of a row's loss are: sigmoid s+ = -(1 - sigmoid(z+)); cosine s+ = -1;
                         infonce s+ = -(1 - p+) / 2 and s_j = p_j / 2 with the softmax p, so
                         sum_j p_j = 1 - p+. In all of them |s+| + sum_j |s_j| <= 1.
        logits to f^     dz / dcos = 1 / t, and |dcos / df^| = |c^| <= 1.
        f^ to f'         |df^ / df'| <= 1 / max(|f'|, norm_floor): below the floor f^ = f' / norm_floor,
                         above it the Jacobian is the projection (I - f^ f^T) / |f'|.
        f' to f          The Jacobian of the clamp is diagonal with entries 0 and 1; its norm is at most 1.
    The same holds with f and c exchanged; there a row of infonce counts |s+| <= 1/2 for its target and
    |s_j| <= 1/2 for a negative.

    loss_weight: what the schedule (`clip_loss_weight`) sets by epoch.
    temperature: floored at 0.1; the attribute holds the floored value.
    gradient_flow_ratio in [0, 1]: the share of the gradient that reaches clip_feat.
    clamp, variant: see `clip_consistency`.
    world_mean: see the top of the file; `rows` is then the mean number of rows per process, and the
        interval that of the mean loss. infonce takes the negatives of its own process only.
    """

    def __init__(self, loss_weight=0.05, temperature=0.07, gradient_flow_ratio=0.0, clamp=10.0,
                 norm_floor=0.1, variant="sigmoid", world_mean=None):
        super().__init__()
        limits = [loss_weight >= 0, temperature >= 0, 0 <= gradient_flow_ratio <= 1, norm_floor > 0]
        if not all(limits) or (clamp is not None and not clamp > 0):
            raise ValueError(f"loss_weight={loss_weight} and temperature={temperature} must be >= 0, "
                             f"gradient_flow_ratio={gradient_flow_ratio} in [0, 1], "
                             f"norm_floor={norm_floor} > 0, clamp={clamp} > 0 or None")
        self.loss_weight = loss_weight
        self.temperature = max(temperature, TEMPERATURE_FLOOR)
        self.gradient_flow_ratio = gradient_flow_ratio
        self.clamp = clamp
        self.norm_floor = norm_floor
        self.variant = variant
        self.world_mean = world_mean

    def forward(self, feat_fusion, clip_feat, batch=None, valid=None, seed=None):
        """feat_fusion (N, C), clip_feat (N, C), or (B, C) with batch (N,), valid (N,) -> loss, counts.

        The loss is a weighted scalar; counts (3,) of this process and seed: see `clip_consistency`.
        """
        loss, counts = clip_consistency(
            feat_fusion, clip_feat, batch, valid, self.variant, self.temperature, self.gradient_flow_ratio,
            self.clamp, self.norm_floor, seed=seed, world_mean=self.world_mean)
        return self.loss_weight * loss, counts


# ------------------------------------------------------------------------------------ Semantics


def semantic_loss(logits, labels, ignore_index=-1, world_mean=None, label_smoothing=0.0):
    """Mean cross-entropy in fp32 over the rows that are not ignored.

    label_smoothing: the share of the target that is spread evenly over all classes.

    logits (N, K), labels (N,) int64 -> scalar; a zero with a graph if all rows are ignored. An ignored
    row has no influence and gets no gradient, whatever it holds.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, K), labels {tuple(labels.shape)} (N,)")
    check_ids("labels", labels, logits.shape[1], ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        valid = labels != ignore_index
        # Mask first: the softmax of a row with NaN has a NaN gradient even if its loss is not counted.
        logits = logits.to(common_dtype(logits))
        logits = logits.where(valid[:, None], 0)
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum",
                                label_smoothing=label_smoothing)
        return mean_over(total, valid.sum(), world_mean)


def lovasz_loss(logits, labels, ignore_index=-1):
    """The Lovasz-softmax loss of Berman et al., CVPR 2018: 1 - IoU, extended to probabilities.

    Per class, errors |truth - probability| in descending order are weighted by how much each lowers the
    IoU as one more mistake. Mean over the classes that occur in labels; 0 with a graph if none does. Of
    this process alone: IoU is no sum over rows. logits (N, K), labels (N,) int64 -> scalar.
    """
    check_ids("labels", labels, logits.shape[1], ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        valid = (labels != ignore_index)[:, None]
        logits = logits.to(common_dtype(logits)).where(valid, 0)
        classes = labels.where(valid[:, 0], 0)
        truth = F.one_hot(classes, logits.shape[1]) * valid  # (N, K)
        errors = (truth - logits.softmax(1)).abs() * valid  # ignored rows sort last and add 0
        errors, order = errors.sort(dim=0, descending=True)
        truth = truth.gather(0, order)
        total = truth.sum(0)  # (K,)
        intersection = total - truth.cumsum(0)
        union = total + (1 - truth).cumsum(0)
        jaccard = 1 - intersection.to(errors.dtype) / union  # (N, K), with the rows so far as mistakes
        start = jaccard.new_zeros(1, len(total))
        slopes = jaccard.diff(dim=0, prepend=start)
        occurs = total > 0
        per_class = (errors * slopes).sum(0)  # (K,)
        return mean_over((per_class * occurs).sum(), occurs.sum())


class SemanticCriterion(nn.Module):
    """`semantic_loss`; world_mean: see the top of the file."""

    def __init__(self, ignore_index=-1, world_mean=None, label_smoothing=0.0):
        super().__init__()
        self.ignore_index = ignore_index
        self.world_mean = world_mean
        self.label_smoothing = label_smoothing

    def forward(self, logits, labels):
        """logits (N, K), labels (N,) int64 -> scalar."""
        return semantic_loss(logits, labels, self.ignore_index, self.world_mean, self.label_smoothing)


# ------------------------------------------------------------------------------------ Instances


def instance_targets(labels, instances, index, superpoint_batch):
    """The instances of every scene as masks over its superpoints.

    labels (N,) and instances (N,) int64, negative = none; index (N,), the superpoint of each point,
    numbered through all scenes; superpoint_batch (S,), the scene of each superpoint, sorted.

    A superpoint belongs to the instance that holds more than half of its points, so to at most one. The
    class of an instance is the most frequent label of its points. Points without label or instance count
    as outside. Returns a dict, instances by ascending id: "masks" (B, G_max, S_max) bool, False in
    padding, empty if the instance owns no superpoint; "labels" (B, G_max) int64, -1 in padding; "sizes"
    (B,), superpoints per scene. Raises ValueError for other shapes.
    """
    is_flat = labels.dim() == superpoint_batch.dim() == 1
    if not is_flat or not labels.shape == instances.shape == index.shape:
        shapes = [tuple(x.shape) for x in (labels, instances, index, superpoint_batch)]
        raise ValueError(f"labels, instances, index {shapes[:3]} must be (N,), superpoint_batch {shapes[3]} (S,)")
    S = len(superpoint_batch)
    sizes = torch.bincount(superpoint_batch)  # (B,)
    inside = (labels >= 0) & (instances >= 0)
    superpoint = index[inside]
    label = labels[inside]
    ids, rank = instances[inside].unique(return_inverse=True)
    num_ids = max(len(ids), 1)
    scene_and_rank = superpoint_batch[superpoint] * num_ids + rank
    keys, group = scene_and_rank.unique(return_inverse=True)  # (G,), (points inside,)
    G = len(keys)

    # Number of points per (superpoint, instance) pair that occurs
    pairs, points = torch.unique(superpoint * G + group, return_counts=True)
    superpoint_points = torch.bincount(index, minlength=S)
    has_most = 2 * points > superpoint_points[pairs // max(G, 1)]
    pairs = pairs[has_most]
    owner = torch.full((S,), -1, device=index.device)
    owner[pairs // max(G, 1)] = pairs % max(G, 1)

    # Most frequent label per instance
    K = int(label.max()) + 1 if G else 1
    votes = torch.bincount(group * K + label, minlength=G * K)
    group_label = votes.view(G, K).argmax(1)

    # By scene, padded
    counts = torch.bincount(keys // num_ids, minlength=len(sizes)).tolist()
    instance = torch.arange(G, device=index.device).split(counts)
    instance = pad_sequence(instance, batch_first=True, padding_value=-2)               # (B, G_max)
    owner = owner.split(sizes.tolist())
    owner = pad_sequence(owner, batch_first=True, padding_value=-1)                     # (B, S_max)
    labels = group_label.split(counts)
    labels = pad_sequence(labels, batch_first=True, padding_value=-1)                   # (B, G_max)
    masks = owner[:, None] == instance[..., None]
    return {"masks": masks, "labels": labels, "sizes": sizes}


def dice_loss(probability, target):
    """1 - (2 <p, t> + 1) / (sum p + sum t + 1) over the last dimension (Milletari et al., V-Net, 2016)."""
    overlap = (probability * target).sum(-1)
    area = probability.sum(-1) + target.sum(-1)
    return 1 - (2 * overlap + 1) / (area + 1)


@torch.no_grad()
def match_instances(class_logits, mask_logits, labels, masks, query, sizes=None):
    """Each instance takes its cheapest query among those whose superpoint it owns: none is taken twice.

        cost = -0.5 * p(class of the instance) + BCE(mask) + dice(mask)        (weights: MATCHING_COSTS)

    class_logits (..., Q, K + 1), mask_logits (..., Q, S), labels (..., G), masks (..., G, S) bool, query
    (..., Q) the superpoint of each query; the leading dimensions are those of layers and scenes. Padding
    is -1 in query and labels, PADDED in mask_logits, False in masks; sizes (..., 1, 1) is then the number
    of superpoints. Returns best (..., G) int64, the query taken, and matched (..., G) bool, False if the
    instance owns the superpoint of no query.
    """
    sizes = mask_logits.shape[-1] if sizes is None else sizes
    target = masks.to(mask_logits.dtype).transpose(-1, -2)  # (..., S, G)
    probability = mask_logits.sigmoid()
    # Summed over a mask, softplus(x) - x t is the BCE. As matrix products, to make no (Q, G, S).
    base = F.softplus(mask_logits).sum(-1, keepdim=True)
    bce = (base - mask_logits @ target) / sizes
    area = probability.sum(-1, keepdim=True) + target.sum(-2, keepdim=True)
    dice = 1 - (2 * probability @ target + 1) / (area + 1)  # as in dice_loss
    column = labels.clamp(min=0)[..., None, :]
    class_probability = class_logits.softmax(-1).take_along_dim(column, -1)
    cost = MATCHING_COSTS["bce"] * bce + MATCHING_COSTS["dice"] * dice
    cost = cost - MATCHING_COSTS["class"] * class_probability  # (..., Q, G)

    row = query.clamp(min=0)[..., None]
    inside = masks.transpose(-1, -2).take_along_dim(row, -2)
    inside = inside & (query >= 0)[..., None]  # (..., Q, G)
    cheapest, best = cost.where(inside, torch.inf).min(-2)
    return best, cheapest.isfinite()


def class_terms(class_logits, query, labels, best, matched):
    """Cross-entropy of the queries of each scene (L, B); an unmatched query has the class "no object"."""
    L, B, Q = class_logits.shape[:3]
    K = class_logits.shape[3] - 1  # "no object"
    # Unmatched instances write to a spare query Q, so that nothing waits for the device.
    classes = torch.full((L, B, Q + 1), K, device=query.device)
    labels = torch.where(matched, labels, K)
    classes.scatter_(2, torch.where(matched, best, Q), labels)
    classes = classes[..., :Q]
    weights = class_logits.new_ones(K + 1)
    weights[K] = NO_OBJECT_WEIGHT
    logits = class_logits.flatten(0, 2)
    loss = F.cross_entropy(logits, classes.flatten(), weights, reduction="none")
    is_query = query >= 0
    total = loss.view(L, B, Q).where(is_query, 0)
    normalizer = weights[classes].where(is_query, 0)
    return mean_over(total.sum(2), normalizer.sum(2))


def scene_terms(class_logits, mask_logits, quality, query, targets):
    """The terms of `instance_losses` per scene: terms (L, B, 4), and whether the scene has them, bool."""
    L, B, Q = quality.shape
    labels = targets["labels"].expand(L, -1, -1)
    masks = targets["masks"]
    sizes = targets["sizes"].clamp(min=1)[:, None]  # (B, 1)
    best, matched = match_instances(class_logits, mask_logits, labels, masks, query, sizes[..., None])
    class_term = class_terms(class_logits, query, labels, best, matched)

    logits = mask_logits.take_along_dim(best[..., None], 2)  # (L, B, G, S)
    target = masks.to(mask_logits.dtype).expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = bce.sum(3) / sizes
    dice = dice_loss(logits.sigmoid(), target)
    predicted = logits >= 0
    union = (predicted | masks).sum(3)
    iou = (predicted & masks).sum(3) / union.clamp(min=1)
    error = (quality.gather(2, best) - iou) ** 2
    good = matched & (iou > 0.5)

    values = torch.stack([bce, dice, error], 2)        # (L, B, 3, G)
    chosen = torch.stack([matched, matched, good], 2)
    total = values.where(chosen, 0).sum(3)
    means = total / chosen.sum(3).clamp(min=1)
    has_queries = (query[:, :1] >= 0).expand(L, B, 1)
    terms = torch.cat([class_term[..., None], means], 2)
    return terms, torch.cat([has_queries, chosen.any(3)], 2)


def instance_losses(output, targets, world_mean=None):
    """The four raw terms of L predictions -> (L, 4), in the order of INSTANCE_WEIGHTS.

    output: of the decoder, padded to the largest of B scenes: "class_logits" (L, B, Q, K + 1),
    "mask_logits" (L, B, Q, S), PADDED in padding, "quality" (L, B, Q), "query" (B, Q), the superpoint of
    each query, -1 in padding. targets: from `instance_targets`. Each prediction is matched anew.

        class    cross-entropy of all queries; without an instance: class K, weight NO_OBJECT_WEIGHT
        bce      binary cross-entropy of the masks of the matched queries
        dice     `dice_loss` of the same masks
        quality  squared error of the quality against the IoU of the mask, if that exceeds 0.5

    Each term is averaged within a scene, then over the scenes that have a match (class: over all), so
    that scenes weigh the same. Without any match a term is a zero with a graph. Computes in fp32; float64
    stays float64. world_mean is called once per prediction, on the number of scenes of each term (4,).
    """
    if len(output["query"]) != len(targets["labels"]):
        raise ValueError(f"output of {len(output['query'])} scenes, targets of {len(targets['labels'])}")
    with torch.autocast(output["query"].device.type, enabled=False):
        inputs = [output[name] for name in ("class_logits", "mask_logits", "quality")]
        inputs = [x.to(common_dtype(x)) for x in inputs]
        terms, counted = scene_terms(*inputs, output["query"], targets)
        total = terms.where(counted, 0).sum(1)  # (L, 4)
        scenes = counted.sum(1).to(total.dtype)
        if world_mean is not None:
            scenes = torch.stack([world_mean(layer) for layer in scenes])
        return mean_over(total, scenes)


class InstanceCriterion(nn.Module):
    """`instance_losses` summed over all predictions; world_mean: see the top of the file."""

    def __init__(self, world_mean=None):
        super().__init__()
        self.world_mean = world_mean

    def forward(self, output, targets):
        """output, targets: see `instance_losses` -> {"class", "bce", "dice", "quality"}, raw scalars."""
        terms = instance_losses(output, targets, self.world_mean).sum(0)
        return dict(zip(INSTANCE_WEIGHTS, terms))
