# SPDX-License-Identifier: MIT
"""Instances from superpoint features: a mask transformer whose queries are the superpoints themselves.

    superpoints (S, C) = mean of the features of their points
    queries     (Q, D) = a projection of the superpoints (training: of a random half or more; evaluation: of all)
    num_layers times: masked cross-attention to the superpoints, self-attention, feed-forward, each with a post-norm
    before the first layer and after every layer, per query: class logits (K + 1), mask logits (S), and the mask
    quality, which is the predicted IoU; a mask logit is the dot product of query and superpoint

A query attends only to the superpoints inside its own mask (sigmoid >= 0.5), or to all if its mask is empty: Cheng et
al., "Masked-attention Mask Transformer", CVPR 2022. On superpoints: Sun et al., "SPFormer", AAAI 2023, and Kolodiazhnyi
et al., "OneFormer3D", CVPR 2024; for single RGB-D frames: Xu et al., "ESAM", ICLR 2025. Inference ends with matrix NMS:
Wang et al., "SOLOv2", NeurIPS 2020.

Scenes are packed and ragged, without padding: linear layers run once over the rows of all scenes, and only the
attention loops over scenes. Imports torch only.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def superpoint_index(segments, batch_idx):
    """Numbers the superpoints of a batch consecutively, scene after scene.

    segments: (N,) int64 ids, unique within a scene; or (N, 3) int64 voxel coordinates, which replace superpoints that a
        scene does not have (use coarse voxels: the masks take Q x S memory, and Q is up to S).
    batch_idx: (N,) int64, the scene of each point.
    Returns point_to_superpoint (N,) in [0, S), and superpoint_batch (S,), the scene of each superpoint, sorted.
    """
    if segments.ndim not in (1, 2) or len(segments) != len(batch_idx) or segments.is_floating_point():
        raise ValueError(f"segments must be (N,) or (N, 3) integers for batch_idx {tuple(batch_idx.shape)}, "
                         f"got {segments.dtype} {tuple(segments.shape)}")
    keys = torch.cat([batch_idx[:, None], segments.view(len(batch_idx), -1)], dim=1)
    unique_keys, point_to_superpoint = torch.unique(keys, dim=0, return_inverse=True)
    superpoint_batch = unique_keys[:, 0].contiguous()
    return point_to_superpoint, superpoint_batch


def pool(feats, index, count):
    """Mean of the rows of feats (N, C) that share an index -> (count, C); groups without a row are zero.

    index: (N,) int64 in [0, count). Sums in float32 or wider, because float16 cannot count beyond 2048.
    """
    if feats.ndim != 2 or index.shape != feats.shape[:1]:
        raise ValueError(f"feats must be (N, C) and index (N,), got {tuple(feats.shape)} and {tuple(index.shape)}")
    wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
    total = wide.new_zeros(count, feats.shape[1]).index_add(0, index, wide)
    ones = wide.new_ones(len(index))
    num_rows = ones.new_zeros(count).index_add(0, index, ones).clamp(min=1)  # bincount would wait for a GPU
    return (total / num_rows[:, None]).to(feats.dtype)


def draw_queries(superpoint_batch, seeds=None, min_share=1.0):
    """The superpoints of every scene that become queries: a random share between min_share and all of them.

    superpoint_batch: (S,) int64, sorted. seeds: B integers, or None, see `InstanceDecoder.forward`. In evaluation
    min_share is 1, and the queries are all superpoints in their order.
    Returns the queries (Q,) int64 on the CPU, scene after scene and numbered within their scene; and two lists of B
    integers, the superpoints S_b and the queries Q_b of each scene.
    """
    sizes = torch.bincount(superpoint_batch).tolist()
    drawn = []
    for size, seed in zip(sizes, [None] * len(sizes) if seeds is None else seeds):
        if min_share == 1:
            drawn.append(torch.arange(size))
            continue
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        share = torch.empty(()).uniform_(min_share, 1, generator=generator).item()
        drawn.append(torch.randperm(size, generator=generator)[:math.ceil(share * size)])
    return torch.cat(drawn), sizes, [len(index) for index in drawn]


# ----------------------------------------------------------------------------------------------------------------
# Network

class Attention(nn.Module):
    """Multi-head attention over packed scenes: the rows of a scene attend only to the source rows of that scene."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, source, x_sizes, source_sizes, allowed=None):
        """x (Q, D) attends to source (S, D) -> (Q, D).

        x_sizes, source_sizes: lists of B integers, the rows of each scene.
        allowed: B bool masks (Q_b, S_b), True where a row of x may attend to a source row, or None for everywhere.
        """
        queries = self._split_heads(self.query(x), x_sizes)            # B tensors (1, nh, Q_b, D / nh)
        keys = self._split_heads(self.key(source), source_sizes)       # B tensors (1, nh, S_b, D / nh)
        values = self._split_heads(self.value(source), source_sizes)
        if allowed is None:
            allowed = [None] * len(x_sizes)
        scenes = []
        for q, k, v, mask in zip(queries, keys, values, allowed):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (1, nh, Q_b, D / nh)
            scenes.append(y[0].transpose(0, 1).flatten(1))               # (Q_b, D)
        return self.out(torch.cat(scenes))

    def _split_heads(self, packed, sizes):
        scenes = []
        for rows in packed.split(sizes):                           # (rows, D)
            heads = rows.unflatten(1, (self.num_heads, -1))        # (rows, nh, D / nh)
            scenes.append(heads.transpose(0, 1)[None])
        return scenes


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward; each is added to the queries, then normalized."""

    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.cross_attention = Attention(dim, num_heads)
        self.self_attention = Attention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.cross_norm = nn.LayerNorm(dim)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, query, source, query_sizes, source_sizes, allowed):
        query = self.cross_norm(query + self.cross_attention(query, source, query_sizes, source_sizes, allowed))
        query = self.self_norm(query + self.self_attention(query, query, query_sizes, query_sizes))
        return self.ffn_norm(query + self.ffn(query))


class InstanceDecoder(nn.Module):
    """Class, mask and mask quality per query, and semantic logits per superpoint.

    in_channels: C of the superpoint features. num_classes: K of the data set. embed_dim: D inside the decoder.
    ffn: hidden width of the feed-forward layers. min_query_share: in training, the queries are a random share of a
    scene's superpoints, between this and all.
    """

    def __init__(self, in_channels=256, num_classes=20, embed_dim=256, num_layers=3, num_heads=8, ffn=1024,
                 min_query_share=0.5):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        if not 0 < min_query_share <= 1:
            raise ValueError(f"min_query_share must be in (0, 1], got {min_query_share}")
        C, D, K = in_channels, embed_dim, num_classes
        self.in_channels = in_channels
        self.min_query_share = min_query_share
        self.source_proj = nn.Sequential(nn.Linear(C, D), nn.LayerNorm(D), nn.ReLU())
        self.query_proj = nn.Sequential(nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D))
        self.mask_proj = nn.Sequential(nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D))
        self.layers = nn.ModuleList(DecoderLayer(D, num_heads, ffn) for _ in range(num_layers))
        self.out_norm = nn.LayerNorm(D)
        self.class_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, K + 1))
        self.quality_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))
        self.semantic_head = nn.Linear(C, K)

    def forward(self, feats, superpoint_batch, seeds=None, queries=None):
        """Predictions for a packed batch of superpoints.

        feats: (S, C) superpoint features. superpoint_batch: (S,) int64, sorted, the scene of each superpoint.
        seeds: B integers that draw the training queries of each scene, so that the draw depends neither on the other
            scenes nor on the process; None: torch's global generator draws them.
        queries: what `draw_queries` gave for these superpoints, which keeps this from waiting for a GPU; None: drawn here.
        Returns a dict:
            "layers": num_layers + 1 predictions, the last is the final one; each is a dict of tuples over B scenes,
                "class_logits" (Q_b, K + 1), the last column is "no object"; "mask_logits" (Q_b, S_b);
                "quality" (Q_b,) in (0, 1)
            "query": tuple over B scenes, (Q_b,) int64, the superpoint of the scene that each query was made from
            "semantic_logits": (S, K)
        """
        if feats.ndim != 2 or feats.shape[1] != self.in_channels or superpoint_batch.shape != feats.shape[:1]:
            raise ValueError(f"feats must be (S, {self.in_channels}) and superpoint_batch (S,), "
                             f"got {tuple(feats.shape)} and {tuple(superpoint_batch.shape)}")
        if len(feats) == 0:
            raise ValueError("no superpoint in the whole batch")
        if queries is None:
            share = self.min_query_share if self.training else 1.0
            index, sizes, query_sizes = draw_queries(superpoint_batch, seeds, share)
        else:
            index, sizes, query_sizes = queries
        query_index = index.to(feats.device).split(query_sizes)  # B tensors (Q_b,)

        source = self.source_proj(feats)                  # (S, D)
        mask_feats = self.mask_proj(feats).split(sizes)   # B tensors (S_b, D)
        picked = [scene[index] for scene, index in zip(feats.split(sizes), query_index)]
        query = self.query_proj(torch.cat(picked))        # (Q, C) -> (Q, D)

        layers = [self._predict(query, query_sizes, mask_feats)]
        for layer in self.layers:
            allowed = [attention_mask(logits) for logits in layers[-1]["mask_logits"]]
            query = layer(query, source, query_sizes, sizes, allowed)
            layers.append(self._predict(query, query_sizes, mask_feats))
        return {"layers": layers, "query": query_index, "semantic_logits": self.semantic_head(feats)}

    def _predict(self, query, query_sizes, mask_feats):
        query = self.out_norm(query)  # (Q, D)
        masks = tuple(q @ m.T for q, m in zip(query.split(query_sizes), mask_feats))  # B tensors (Q_b, S_b)
        classes = self.class_head(query)                           # (Q, K + 1)
        quality = self.quality_head(query).squeeze(1).sigmoid()    # (Q,)
        return {"class_logits": classes.split(query_sizes), "mask_logits": masks, "quality": quality.split(query_sizes)}


@torch.no_grad()
def attention_mask(mask_logits):
    """(Q, S) mask logits -> (Q, S) bool: where sigmoid >= 0.5, or everywhere in a row that has no such entry."""
    allowed = mask_logits >= 0
    return allowed | ~allowed.any(dim=1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------
# Inference

def matrix_nms(masks, labels, scores, weights):
    """SOLOv2's matrix NMS with the linear kernel: scores (R,), decayed by better masks with the same label.

    masks (R, S) bool; labels (R,); scores (R,); weights (S,), the points per superpoint, so that IoUs count points.
    Mask j keeps min over i of (1 - IoU_ij) / (1 - max over k of IoU_ki) of its score: i is any better mask, and k any
    mask better than i, so that a mask which is itself suppressed suppresses less.
    """
    if len(scores) == 0:
        return scores.clone()
    order = scores.argsort(descending=True, stable=True)
    sorted_masks = masks[order].float()
    sorted_labels = labels[order]
    overlap = (sorted_masks * weights) @ sorted_masks.T  # (R, R) points
    area = overlap.diagonal()
    iou = overlap / (area[:, None] + area - overlap).clamp(min=1)
    same_label = sorted_labels[:, None] == sorted_labels
    iou = (iou * same_label).triu(diagonal=1)  # row i suppresses column j > i
    suppressed = iou.max(dim=0).values[:, None]
    # The clamp acts only if i copies a better mask; that mask's row bounds the decay of j with a sound divisor.
    decay = (1 - iou) / (1 - suppressed).clamp(min=1e-6)
    decayed = torch.empty_like(scores)
    decayed[order] = scores[order] * decay.min(dim=0).values.clamp(max=1)
    return decayed


@torch.no_grad()
def instances_from_logits(class_logits, mask_logits, quality, point_to_superpoint, top_k=100, mask_threshold=0.5,
                          score_threshold=0.0, min_points=100):
    """Instances of one scene, best first.

    class_logits (Q, K + 1), mask_logits (Q, S), quality (Q,): the predictions of the decoder's last layer.
    point_to_superpoint: (P,) int64 in [0, S).
    A mask holds the superpoints with a mask probability above mask_threshold. The top_k pairs of query and class are
    taken by class probability times quality. Their score is that product times the mean probability inside the mask,
    decayed by matrix NMS. Instances are kept if they score above score_threshold and have at least min_points points.
    Returns {"masks": (R, P) bool, "labels": (R,) int64 in [0, K), "scores": (R,) float32}.
    """
    Q, S = mask_logits.shape
    if len(class_logits) != Q or quality.shape != (Q,):
        raise ValueError(f"{Q} mask queries, but class logits {tuple(class_logits.shape)} and quality "
                         f"{tuple(quality.shape)}")
    probability = class_logits.float().softmax(dim=1)[:, :-1]  # (Q, K)
    probability = probability * quality.float()[:, None]
    K = probability.shape[1]
    scores, best = probability.flatten().topk(min(top_k, Q * K))  # (R,)
    query = best // K
    labels = best % K

    mask_probability = mask_logits[query].float().sigmoid()  # (R, S)
    masks = mask_probability > mask_threshold
    points = torch.bincount(point_to_superpoint, minlength=S).to(mask_probability.dtype)  # (S,)
    area = masks.float() @ points
    scores = scores * (mask_probability * masks).sum(1) / masks.sum(1).clamp(min=1)
    scores = matrix_nms(masks, labels, scores, points)

    keep = ((scores > score_threshold) & (area >= min_points)).nonzero().squeeze(1)
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    return {"masks": masks[keep][:, point_to_superpoint], "labels": labels[keep], "scores": scores[keep]}


def scene_instances(output, point_to_superpoint, batch_idx, **thresholds):
    """Instances of every scene of a batch: a list of B results of `instances_from_logits`.

    output: of `InstanceDecoder`. point_to_superpoint: (N,), of `superpoint_index`. batch_idx: (N,), the scene of each
    point. thresholds: keyword arguments of `instances_from_logits`.
    """
    final = output["layers"][-1]
    scenes = []
    first = 0  # superpoints of the scenes before this one
    for b, (class_logits, mask_logits, quality) in enumerate(
            zip(final["class_logits"], final["mask_logits"], final["quality"])):
        local_index = point_to_superpoint[batch_idx == b] - first
        scenes.append(instances_from_logits(class_logits, mask_logits, quality, local_index, **thresholds))
        first += mask_logits.shape[1]
    return scenes
