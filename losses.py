# SPDX-License-Identifier: MIT
"""Losses that stay finite: CLIP consistency with its weight schedule, semantic and instance criteria.

Consistency of a fused point feature f with its CLIP target c, over the valid rows, in its first form (of four):

    loss = loss_weight * mean_i -log sigmoid(clip(cos_i / t)),    cos_i = <f_i, c_i> / (max(|f_i|, r) max(|c_i|, r))

What breaks such a loss is not the sigmoid (the slope of -log sigmoid never passes 1) but 1 / |f| in the gradient of
the normalisation, epsilons that vanish in fp16, and overflow before the norm. So: fp32 inside, a norm floor r that
matters, a temperature floor, non-finite rows left out and counted.

Every loss here is a sum over a mass: rows, class weights, scenes. Where several processes share a batch, `world_mean`,
a function that averages a tensor over them, gives them one mass; then the mean of their losses (and gradients) is
exactly the loss of the undivided batch. It is called equally often whatever the data. None: one process.

Imports torch.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE_FLOOR = 0.1


def mean_over(total: Tensor, mass: Tensor, world_mean=None) -> Tensor:
    """total / mass, with the mass averaged over processes; where that is 0, total, which is 0 then."""
    mass = mass.to(total.dtype)
    if world_mean is not None:
        mass = world_mean(mass)
    # not clamp(min=1): a row beside a process without any is a mass of one half
    return total / torch.where(mass > 0, mass, 1)


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


# The losses of rows, (N,), from the logits cos / t of each row with its own target, positive (N,), and with targets of
# others, negative (N, M), where is_negative (N, M). In each the slopes of a row's loss sum to at most 1 in size.


def sigmoid_rows(positive: Tensor) -> Tensor:
    """-log sigmoid(positive)."""
    return F.softplus(-positive)


def cosine_rows(positive: Tensor) -> Tensor:
    """1 - cos."""
    return 1 - positive


def siglip_rows(positive: Tensor, negative: Tensor, is_negative: Tensor) -> Tensor:
    """Half of -log sigmoid(positive), and half of the mean over the negatives of -log sigmoid(-negative), if any.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, with a mean in place of the sum and its bias.
    """
    repelled = F.softplus(negative).where(is_negative, 0).sum(1) / is_negative.sum(1).clamp(min=1)
    return (F.softplus(-positive) + repelled) / 2


def infonce_rows(positive: Tensor, negative: Tensor, is_negative: Tensor) -> Tensor:
    """Half of the cross-entropy of the positive among itself and the negatives; 0 without any.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.
    """
    logits = torch.cat([positive[:, None], negative.where(is_negative, -torch.inf)], 1)
    return -logits.log_softmax(1)[:, 0] / 2


CLIP_LOSSES = {"sigmoid": sigmoid_rows, "cosine": cosine_rows, "siglip": siglip_rows, "infonce": infonce_rows}
CONTRASTIVE = ("siglip", "infonce")


def usable_rows(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None):
    """Which rows can take part, of arguments as in `clip_consistency`, whose shapes are checked here.

    Returns used (N,) bool, valid with a finite feature and target; dropped (N,) bool, valid without that; and
    candidates bool, a row of clip_feat each, those that can be negatives: of used points, or finite scene targets.
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
    feat_finite, clip_finite = feat_fusion.isfinite().all(1), clip_feat.isfinite().all(1)
    wanted = torch.ones_like(feat_finite) if valid is None else valid
    used = wanted & feat_finite & (clip_finite if per_point else clip_finite[batch])
    return used, wanted & ~used, used if per_point else clip_finite


def draw_negatives(candidates: Tensor, count: int) -> Tensor:
    """(count,) int64, rows drawn without repetition; one that is no candidate only where those run out.

    candidates (T,) bool, T >= count. By sorting random numbers: to list the candidates would wait for the device.
    """
    return torch.rand(candidates.shape, device=candidates.device).where(candidates, -1).topk(count).indices


def clip_consistency(feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None, temperature=TEMPERATURE_FLOOR,
                     gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1, variant="sigmoid", negatives=None,
                     world_mean=None):
    """Mean row loss of a variant of CLIP_LOSSES over the usable rows, in fp32 (float64 stays float64).

    feat_fusion (N, C); clip_feat (N, C), one target a point, or (B, C) with batch (N,) int64; valid (N,) bool.
    clip_feat is read as one target a point whenever it has N rows.
    negatives (M,) int64: the rows of clip_feat that a contrastive variant pushes every row away from, None for all;
    never a row's own target, nor one that is not usable. It takes memory for a few times N x M numbers.
    world_mean: see the top of the file.
    Returns the loss, a scalar (a zero with a graph where no row is usable), and (2,) int64 counts: the rows that took
    part, and the valid ones that were left out because they or their target hold NaN or inf.
    """
    if variant not in CLIP_LOSSES:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(CLIP_LOSSES)}")
    if negatives is not None and negatives.dim() != 1:
        raise ValueError(f"negatives {tuple(negatives.shape)} must be (M,), rows of clip_feat")
    if variant == "cosine":
        temperature, clamp = 1.0, 1.0  # rounding alone takes a cosine past 1
    used, dropped, candidates = usable_rows(feat_fusion, clip_feat, batch, valid)
    per_point = clip_feat.shape[0] == feat_fusion.shape[0]
    dtype = torch.promote_types(torch.promote_types(feat_fusion.dtype, clip_feat.dtype), torch.float32)
    with torch.autocast(feat_fusion.device.type, enabled=False):
        feat, clip = feat_fusion.to(dtype), clip_feat.to(dtype)
        # where, not a product: 0 * NaN is NaN, in the loss and in the gradient
        feat = floored_normalize(feat.where(used[:, None], 0), norm_floor)
        if gradient_flow_ratio == 0:
            clip = clip.detach()
        clip = floored_normalize(clip.where(candidates[:, None], 0), norm_floor)
        if 0 < gradient_flow_ratio < 1:
            clip = clip.detach() + gradient_flow_ratio * (clip - clip.detach())

        def logits(cosines):
            return (cosines / temperature).clamp(-clamp, clamp)

        arguments = [logits((feat * (clip if per_point else clip[batch])).sum(1))]
        if variant in CONTRASTIVE:
            rows = torch.arange(len(clip), device=clip.device)
            own = rows if per_point else batch
            negatives = rows if negatives is None else negatives
            arguments.append(logits(feat @ clip[negatives].T))
            arguments.append(candidates[negatives] & (negatives != own[:, None]))
        total = CLIP_LOSSES[variant](*arguments).where(used, 0).sum()
        return mean_over(total, used.sum(), world_mean), torch.stack([used.sum(), dropped.sum()])


class ClipConsCriterion(nn.Module):
    """Ties fused point features to CLIP's meaning, with a gradient that cannot blow up.

    With z+ = clip(cos / t, +-clamp) of a row with its target, z_j of it with each of its J negatives (in the interval:
    the most that a row has), m = min(clamp, 1 / t), and t = max(temperature, 0.1):

        variant    loss of a row                                            lies in
        sigmoid    softplus(-z+)                                            [softplus(-m), softplus(m)]
        cosine     1 - cos; it has no clamp, and t = 1 below                [0, 2]
        siglip     1/2 softplus(-z+) + 1/2 mean_j softplus(z_j)             [1/2 softplus(-m), softplus(m)]
        infonce    1/2 log(exp(z+) + sum_j exp(z_j)) - 1/2 z+               [0, 1/2 log(1 + J exp(2 m))]

    loss = loss_weight * mean over the `rows` that take part, 0 without any. Its gradient, for every variant, for every
    input in fp32, fp16 or bf16:

        | d loss / d feat_fusion[i] |  <=  loss_weight / (rows * t * norm_floor)
        | d loss / d clip_feat[k] |    <=  gradient_flow_ratio times that, for each row it is positive or negative to

    Derivation. A row's loss has the slopes s in its logits: sigmoid s+ = -(1 - sigmoid(z+)); cosine s+ = -1; siglip
    s+ = -(1 - sigmoid(z+)) / 2, s_j = sigmoid(z_j) / 2J; infonce s+ = -(1 - p+) / 2, s_j = p_j / 2 with the softmax p,
    so sum_j p_j = 1 - p+. Hence |s+| + sum_j |s_j| <= 1 in all. dz / dcos = 1 / t, or 0 where clamped; |dcos / df^| =
    |c^| <= 1 with f^, c^ the floored unit vectors; and |df^ / df| <= 1 / max(|f|, norm_floor): below the floor f^ =
    f / norm_floor, above it the Jacobian is the projection (I - f^ f^T) / |f|. The same with f and c exchanged, where a
    row counts |s|: in siglip and infonce at most half, for a negative of siglip at most 1 / 2J. With the default clamp
    of 10 and t >= 0.1 the clamp never acts but on rounding, so it silences no row.

    Negatives are the other rows of clip_feat: other scenes' targets, or those of other points that take part. Where
    clip_feat has more than max_negatives rows, that many usable ones are drawn anew at each call, for all rows alike.
    Without a negative siglip keeps its positive half and infonce is 0. A process sees no negatives but its own. Points
    of one image patch have almost the same target, so that some negatives are false ones.

    loss_weight: what the schedule (`clip_loss_weight`) sets by epoch. temperature is floored at 0.1; the attribute
    holds the floored value. gradient_flow_ratio in [0, 1]: the share of the gradient that reaches clip_feat.
    world_mean: see the top of the file; `rows` is then the mean number of rows of a process, and the interval is that
    of the mean loss over the processes.
    counts (2,): rows used and non-finite rows left out, of the last call, in this process.
    """

    def __init__(self, loss_weight=0.05, temperature=0.07, gradient_flow_ratio=0.0, clamp=10.0, norm_floor=0.1,
                 variant="sigmoid", max_negatives=512, world_mean=None):
        super().__init__()
        if not (loss_weight >= 0 and temperature >= 0 and 0 <= gradient_flow_ratio <= 1 and clamp > 0
                and norm_floor > 0 and max_negatives >= 1):
            raise ValueError(f"loss_weight={loss_weight} and temperature={temperature} must be >= 0, "
                             f"gradient_flow_ratio={gradient_flow_ratio} in [0, 1], clamp={clamp} and "
                             f"norm_floor={norm_floor} > 0, max_negatives={max_negatives} >= 1")
        if variant not in CLIP_LOSSES:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(CLIP_LOSSES)}")
        self.loss_weight = loss_weight
        self.temperature = max(temperature, TEMPERATURE_FLOOR)
        self.gradient_flow_ratio = gradient_flow_ratio
        self.clamp = clamp
        self.norm_floor = norm_floor
        self.variant = variant
        self.max_negatives = max_negatives
        self.world_mean = world_mean
        self.counts = None

    def forward(self, feat_fusion: Tensor, clip_feat: Tensor, batch=None, valid=None) -> Tensor:
        """feat_fusion (N, C), clip_feat (N, C) or (B, C) with batch (N,), valid (N,) bool -> scalar, weighted."""
        negatives = None
        if self.variant in CONTRASTIVE and clip_feat.shape[0] > self.max_negatives:
            *_, candidates = usable_rows(feat_fusion, clip_feat, batch, valid)
            negatives = draw_negatives(candidates, self.max_negatives)
        loss, self.counts = clip_consistency(feat_fusion, clip_feat, batch, valid, self.temperature,
                                             self.gradient_flow_ratio, self.clamp, self.norm_floor, self.variant,
                                             negatives, self.world_mean)
        return self.loss_weight * loss

    def extra_repr(self):
        return (f"loss_weight={self.loss_weight}, temperature={self.temperature}, clamp={self.clamp}, "
                f"norm_floor={self.norm_floor}, gradient_flow_ratio={self.gradient_flow_ratio}, "
                f"variant={self.variant!r}, max_negatives={self.max_negatives}")


# ---------------------------------------------------------------------------------------------- Semantics


def semantic_loss(logits: Tensor, labels: Tensor, ignore_index=-1, class_weights=None, world_mean=None) -> Tensor:
    """Weighted mean cross-entropy in fp32: sum_i w[y_i] ce_i / sum_i w[y_i] over the rows that are not ignored.

    logits (N, K), labels (N,) int64, class_weights (K,) or None -> scalar; a zero with a graph where all are ignored.
    An ignored row has no influence and gets no gradient, whatever it holds. world_mean: see the top of the file.
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
        return mean_over(total, mass, world_mean)


class SemanticCriterion(nn.Module):
    """`semantic_loss` times loss_weight; class_weights: K numbers or None; world_mean: see the top of the file."""

    def __init__(self, loss_weight=0.5, ignore_index=-1, class_weights=None, world_mean=None):
        super().__init__()
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.world_mean = world_mean
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (N, K), labels (N,) int64 -> scalar, weighted."""
        return self.loss_weight * semantic_loss(logits, labels, self.ignore_index, self.class_weights,
                                                self.world_mean)


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


def instance_loss(layer: dict, targets: list, query, no_object_weight=0.1, costs=(0.5, 1.0, 1.0),
                  world_mean=None) -> dict:
    """The four terms of one prediction layer, in fp32 (float64 stays float64).

    layer: tuples over the B scenes, "class_logits" (Q, K + 1), "mask_logits" (Q, S), "quality" (Q,). targets: of
    `instance_targets`. query: tuple over scenes, (Q,) the superpoint of each query.

        class    cross-entropy of all queries; a query without instance is of class K, with weight no_object_weight
        bce      binary cross-entropy, dice  `dice_loss`, of the masks of the matched queries
        quality  squared error of the quality against the IoU of the mask, where that exceeds 0.5

    Each is averaged within a scene, then over the scenes that have a match (class: over all), so that a batch weighs
    as its scenes one by one. Where nothing matches, a term is a zero with a graph. world_mean: see the top of the file;
    it is called once, on the number of scenes of each term (4,).
    """
    device = layer["class_logits"][0].device
    terms, weights = [], []
    with torch.autocast(device.type, enabled=False):
        for class_logits, mask_logits, quality, target, index in zip(
                layer["class_logits"], layer["mask_logits"], layer["quality"], targets, query):
            class_logits, mask_logits, quality = (x.to(torch.promote_types(x.dtype, torch.float32))
                                                  for x in (class_logits, mask_logits, quality))
            if len(index) == 0:  # a scene without a point: zeros with a graph, of no weight
                terms.append(class_logits.sum().expand(4))
                weights.append(torch.zeros(4, dtype=torch.bool, device=device))
                continue
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
        mean = mean_over(torch.stack(terms).where(weights, 0).sum(0), weights.sum(0), world_mean)
    return dict(zip(("class", "bce", "dice", "quality"), mean))


class InstanceCriterion(nn.Module):
    """`instance_loss` of every layer, matched anew at each; weighted, and summed over terms and layers.

    class_agnostic: every instance is of class 0, for a decoder with the two class logits object and no object.
    world_mean: see the top of the file; called once a layer.
    terms: the unweighted terms of the last call, summed over layers, detached.
    """

    def __init__(self, loss_weight=1.0, class_weight=0.5, bce_weight=1.0, dice_weight=1.0, quality_weight=0.5,
                 no_object_weight=0.1, costs=(0.5, 1.0, 1.0), class_agnostic=False, world_mean=None):
        super().__init__()
        self.loss_weight = loss_weight
        self.term_weights = {"class": class_weight, "bce": bce_weight, "dice": dice_weight, "quality": quality_weight}
        self.no_object_weight = no_object_weight
        self.costs = costs
        self.class_agnostic = class_agnostic
        self.world_mean = world_mean
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
        layers = [instance_loss(layer, targets, output["query"], self.no_object_weight, self.costs, self.world_mean)
                  for layer in output["layers"]]
        terms = {name: sum(layer[name] for layer in layers) for name in self.term_weights}
        self.terms = {name: term.detach() for name, term in terms.items()}
        return self.loss_weight * sum(weight * terms[name] for name, weight in self.term_weights.items())
