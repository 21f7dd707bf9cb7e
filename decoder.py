# SPDX-License-Identifier: MIT
"""Instances from superpoint features: a mask transformer whose queries are the superpoints themselves.

    superpoints (S, C) = mean of the features of their points
    queries     (Q, D) = a projection of the superpoints (training: of a random half or more)
    layers: masked cross-attention to the superpoints, self-attention, feed-forward
    before and after each layer, per query: class logits (K + 1); mask logits (S), its dot product with
        every superpoint; the quality of the mask, a predicted IoU

A query attends only to the superpoints inside its own mask, or to all if it is empty: Cheng et al.,
"Masked-attention Mask Transformer", CVPR 2022. On superpoints: Sun et al., "SPFormer", AAAI 2023;
Kolodiazhnyi et al., "OneFormer3D", CVPR 2024; Xu et al., "ESAM", ICLR 2025. Scenes of a batch are packed
row after row in the layers; masks, outputs, and attention on a GPU are padded to the largest scene.

Imports torch.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

PADDED = -1e4  # mask logit of padding: its probability and its part of a loss are exactly 0


def pool(feats, index, count):
    """Mean of the rows of feats (N, C) with the same index (N,) int64 -> (count, C), 0 without a row."""
    if feats.ndim != 2 or index.shape != feats.shape[:1]:
        raise ValueError(f"feats {tuple(feats.shape)} must be (N, C), index {tuple(index.shape)} (N,)")
    wide = feats.to(torch.promote_types(feats.dtype, torch.float32))  # float16 cannot count beyond 2048
    total = wide.new_zeros(count, feats.shape[1]).index_add(0, index, wide)
    ones = wide.new_ones(len(index))
    num_rows = ones.new_zeros(count).index_add(0, index, ones)  # bincount would wait for a GPU
    mean = total / num_rows.clamp(min=1)[:, None]
    return mean.to(feats.dtype)


def draw_queries(superpoint_batch, seeds=None, min_share=1.0):
    """The superpoints that become queries: of every scene a random share between min_share and all.

    superpoint_batch (S,) int64, sorted. seeds: B integers, on which alone the draws depend; with min_share 1,
    in evaluation, nothing is drawn. Returns a dict, its tensors on the CPU: "rows" (Q,) int64, the superpoint
    of each query, scene after scene; "query" (B, Q_max) int64, the same counted within the scene, -1 in
    padding; "sizes" and "query_sizes", lists of B integers; "padding" (B, S_max) bool, True beyond a scene.
    """
    if len(superpoint_batch) == 0:
        raise ValueError("no superpoint in the whole batch")
    sizes = torch.bincount(superpoint_batch).tolist()
    query, rows = [], []
    for b, size in enumerate(sizes):
        index = torch.arange(size)
        if min_share < 1:
            generator = torch.Generator().manual_seed(seeds[b])
            share = torch.empty(()).uniform_(min_share, 1, generator=generator)
            count = math.ceil(share.item() * size)
            index = torch.randperm(size, generator=generator)[:count]
        query.append(index)
        rows.append(index + sum(sizes[:b]))
    return {"rows": torch.cat(rows),
            "query": pad_sequence(query, batch_first=True, padding_value=-1),
            "sizes": sizes,
            "query_sizes": [len(index) for index in query],
            "padding": torch.arange(max(sizes)) >= torch.tensor(sizes)[:, None]}


def pad_scenes(rows, sizes):
    """rows (R, C) of B scenes of these sizes -> (B, R_max, C), padded with zeros."""
    longest = max(sizes)
    zeros = rows.new_zeros(longest - min(sizes), *rows.shape[1:])
    parts = []
    for scene in rows.split(sizes):
        parts += [scene, zeros[:longest - len(scene)]]
    return torch.cat(parts).unflatten(0, (len(sizes), longest))  # one copy, and none in the backward pass


def unpad_scenes(padded, sizes):
    """The inverse of `pad_scenes`: padded (B, R_max, C) -> (R, C)."""
    lengths = []
    for size in sizes:
        lengths += [size, padded.shape[1] - size]
    parts = padded.flatten(0, 1).split(lengths)
    return torch.cat(parts[::2])


def attend_by_scene(q, k, v, x_sizes, source_sizes, allowed=None):
    """q (Q, nh, C), k and v (S, nh, C) of B packed scenes -> (Q, nh, C); see `Attention.forward`."""
    queries = q.transpose(0, 1).split(x_sizes, 1)  # B tensors (nh, Q_b, C)
    keys = k.transpose(0, 1).split(source_sizes, 1)
    values = v.transpose(0, 1).split(source_sizes, 1)
    scenes = []
    for b, scene in enumerate(zip(queries, keys, values)):
        mask = None if allowed is None else allowed[b, :x_sizes[b], :source_sizes[b]]
        q, k, v = (rows[None] for rows in scene)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (1, nh, Q_b, C)
        scenes.append(y[0].transpose(0, 1))
    return torch.cat(scenes)


def attend_padded(q, k, v, x_sizes, source_sizes, allowed=None):
    """The same in one call."""
    mask = allowed
    if mask is None and min(source_sizes) < max(source_sizes):
        is_row = k.new_ones(len(k), dtype=torch.bool)
        mask = pad_scenes(is_row, source_sizes)[:, None]  # (B, 1, S_max)
    if mask is not None:  # open the rows that see nothing, as in padding: their softmax would be NaN
        mask = mask | ~mask.any(2, keepdim=True)
        mask = mask[:, None]
    q = pad_scenes(q, x_sizes).transpose(1, 2)       # (B, nh, Q_max, C)
    k = pad_scenes(k, source_sizes).transpose(1, 2)  # (B, nh, S_max, C)
    v = pad_scenes(v, source_sizes).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return unpad_scenes(y.transpose(1, 2), x_sizes)


class Attention(nn.Module):
    """Multi-head attention over packed scenes: rows attend only to source rows of their own scene."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, source, x_sizes, source_sizes, allowed=None):
        """x (Q, D) attends to source (S, D) -> (Q, D); sizes: lists of B integers, the rows of each scene;
        allowed (B, Q_max, S_max) bool: which source rows a row of x sees, None: all.
        """
        attend = attend_by_scene if x.is_cpu else attend_padded  # padding costs a CPU, calls a GPU
        heads = (self.num_heads, -1)
        q = self.query(x).unflatten(1, heads)  # (Q, nh, D / nh)
        k = self.key(source).unflatten(1, heads)
        v = self.value(source).unflatten(1, heads)
        y = attend(q, k, v, x_sizes, source_sizes, allowed)
        return self.out(y.flatten(1))


def mlp(dim_in, dim, dim_out, activation=nn.ReLU):
    """Two linear layers with an activation between them."""
    return nn.Sequential(nn.Linear(dim_in, dim), activation(), nn.Linear(dim, dim_out))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward, each added to the queries and normalized."""

    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.cross_attention = Attention(dim, num_heads)
        self.self_attention = Attention(dim, num_heads)
        self.ffn = mlp(dim, ffn, dim, nn.GELU)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, query, source, query_sizes, source_sizes, allowed):
        y = self.cross_attention(query, source, query_sizes, source_sizes, allowed)
        query = self.cross_norm(query + y)
        y = self.self_attention(query, query, query_sizes, query_sizes)
        query = self.self_norm(query + y)
        return self.ffn_norm(query + self.ffn(query))


class InstanceDecoder(nn.Module):
    """Class, mask and mask quality per query, and semantic logits per superpoint; embed_dim is D."""

    def __init__(self, in_channels=256, num_classes=20, embed_dim=256, num_layers=3,
                 num_heads=8, ffn=1024):
        super().__init__()
        C, D, K = in_channels, embed_dim, num_classes
        self.in_channels = C
        self.min_query_share = 0.5  # of `draw_queries` in training
        self.source_proj = nn.Sequential(nn.Linear(C, D), nn.LayerNorm(D), nn.ReLU())
        self.query_proj = mlp(C, D, D)
        self.mask_proj = mlp(C, D, D)
        self.layers = nn.ModuleList(DecoderLayer(D, num_heads, ffn) for _ in range(num_layers))
        self.out_norm = nn.LayerNorm(D)
        self.class_head = mlp(D, D, K + 1)
        self.quality_head = mlp(D, D, 1)
        self.semantic_head = nn.Linear(C, K)

    def forward(self, feats, queries):
        """Superpoint features (S, C), scene after scene, and the result of `draw_queries` for them ->
        a dict of L = num_layers + 1 predictions, the last of them final:
            "class_logits" (L, B, Q_max, K + 1), the last column is "no object"
            "mask_logits" (L, B, Q_max, S_max), PADDED in padding; "quality" (L, B, Q_max) in (0, 1)
            "semantic_logits" (S, K); "query", "sizes" and "query_sizes" of queries
        """
        sizes = queries["sizes"]
        query_sizes = queries["query_sizes"]
        expected = (sum(sizes), self.in_channels)
        if feats.shape != expected:
            raise ValueError(f"feats must be {expected}, got {tuple(feats.shape)}")
        padding = queries["padding"].to(feats.device)
        rows = queries["rows"].to(feats.device)

        source = self.source_proj(feats)                       # (S, D)
        mask_feats = pad_scenes(self.mask_proj(feats), sizes)  # (B, S_max, D)
        query = self.query_proj(feats[rows])                   # (Q, D)

        normed, masks = [], []
        for i in range(len(self.layers) + 1):
            if i > 0:
                allowed = attention_mask(masks[-1], padding)
                query = self.layers[i - 1](query, source, query_sizes, sizes, allowed)
            rows = pad_scenes(self.out_norm(query), query_sizes)  # (B, Q_max, D)
            logits = rows @ mask_feats.transpose(1, 2)            # (B, Q_max, S_max)
            normed.append(rows.flatten(0, 1))
            masks.append(logits.masked_fill(padding[:, None], PADDED))
        masks = torch.stack(masks)  # (L, B, Q_max, S_max)
        # no view of (L, B, Q_max, D), of which a compiled head would tell one scene from several
        normed = torch.cat(normed)
        class_logits = self.class_head(normed)
        quality = self.quality_head(normed).sigmoid()
        return {"class_logits": class_logits.unflatten(0, masks.shape[:3]),
                "mask_logits": masks,
                "quality": quality.view(masks.shape[:3]),
                "query": queries["query"].to(feats.device),
                "semantic_logits": self.semantic_head(feats),
                "sizes": sizes,
                "query_sizes": query_sizes}


@torch.no_grad()
def attention_mask(mask_logits, padding):
    """Mask logits (B, Q, S), padding (B, S) -> bool: sigmoid >= 0.5; an empty row sees its scene."""
    allowed = mask_logits >= 0
    is_empty = ~allowed.any(dim=-1, keepdim=True)
    return allowed | (is_empty & ~padding[:, None])


def matrix_nms(masks, labels, scores, weights):
    """Matrix NMS with the linear kernel (Wang et al., "SOLOv2", NeurIPS 2020) -> decayed scores (R,).

    masks (R, S) bool; labels (R,); scores (R,); weights (S,), the points per superpoint, for the IoU. Mask
    j keeps min over i of (1 - IoU_ij) / (1 - max over k of IoU_ki) of its score: i is any better mask of
    its label, k any better than i, so that a mask which is itself suppressed suppresses less.
    """
    if len(scores) == 0:
        return scores.clone()
    order = scores.argsort(descending=True, stable=True)
    masks = masks[order].float()
    labels = labels[order]
    overlap = (masks * weights) @ masks.T  # (R, R) points
    area = overlap.diagonal()
    union = area[:, None] + area - overlap
    iou = overlap / union.clamp(min=1)
    same_label = labels[:, None] == labels
    iou = (iou * same_label).triu(diagonal=1)  # row i suppresses column j > i
    suppressed = iou.max(dim=0).values[:, None]
    # The clamp acts only if i copies a better mask, whose row bounds the decay with a sound divisor.
    decay = (1 - iou) / (1 - suppressed).clamp(min=1e-6)
    decay = decay.min(dim=0).values.clamp(max=1)
    decayed = torch.empty_like(scores)
    decayed[order] = scores[order] * decay
    return decayed


@torch.no_grad()
def instances_from_logits(class_logits, mask_logits, quality, point_to_superpoint, top_k=100,
                          mask_threshold=0.5, score_threshold=0.0, min_points=100):
    """Instances of one scene, best first.

    class_logits (Q, K + 1), mask_logits (Q, S), quality (Q,): predictions of the decoder's last layer.
    point_to_superpoint (P,) int64 in [0, S). A mask holds the superpoints with a mask probability above
    mask_threshold. The top_k pairs of query and class are taken by class probability times quality; times
    the mean probability inside the mask, and decayed by matrix NMS, it is the score. Instances above
    score_threshold and of at least min_points points are kept.
    Returns {"masks": (R, P) bool, "labels": (R,) int64 in [0, K), "scores": (R,) float32}.
    """
    Q, S = mask_logits.shape
    counts = (len(class_logits), Q, len(quality))
    if len(set(counts)) > 1:
        raise ValueError(f"class_logits, mask_logits and quality are of {counts} queries")
    probability = class_logits.float().softmax(dim=1)[:, :-1]  # (Q, K)
    probability = probability * quality.float()[:, None]
    K = probability.shape[1]
    scores, best = probability.flatten().topk(min(top_k, Q * K))  # (R,)
    query = best // K
    labels = best % K
    mask_probability = mask_logits[query].float().sigmoid()  # (R, S)
    masks = mask_probability > mask_threshold
    points = torch.bincount(point_to_superpoint, minlength=S).float()  # (S,)
    inside = (mask_probability * masks).sum(1)
    scores = scores * inside / masks.sum(1).clamp(min=1)
    scores = matrix_nms(masks, labels, scores, points)
    area = masks.float() @ points
    keep = (scores > score_threshold) & (area >= min_points)
    keep = keep.nonzero().squeeze(1)
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    masks = masks[keep][:, point_to_superpoint]
    return {"masks": masks, "labels": labels[keep], "scores": scores[keep]}


def scene_instances(output, point_to_superpoint, batch_idx, **thresholds):
    """The results of `instances_from_logits` for every scene, a list, with these thresholds.

    output: of `InstanceDecoder`. point_to_superpoint, batch_idx (N,): superpoint and scene of each point.
    """
    scenes = []
    for b, S in enumerate(output["sizes"]):
        Q = output["query_sizes"][b]
        class_logits = output["class_logits"][-1, b, :Q]
        mask_logits = output["mask_logits"][-1, b, :Q, :S]
        quality = output["quality"][-1, b, :Q]
        index = point_to_superpoint[batch_idx == b] - sum(output["sizes"][:b])
        scenes.append(instances_from_logits(class_logits, mask_logits, quality, index, **thresholds))
    return scenes


def paint_instances(masks):
    """masks (R, P) bool, best first -> (P,) int64: the best instance of every point, -1 = none."""
    none = ~masks.any(0, keepdim=True)  # (1, P)
    return torch.cat([none, masks]).int().argmax(0) - 1  # argmax takes the first of equals
