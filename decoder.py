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

Scenes are packed and ragged: the linear layers of the decoder's layers run once over the rows of all scenes, without
padding. Masks and heads, and what the decoder returns, are padded to the largest scene; so is attention on a GPU, and
on a CPU it goes scene by scene.

B scenes, S superpoints of the whole batch, S_b of a scene, Q_b queries of a scene, L predictions, K classes.

Imports torch.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

PADDED = -1e4  # mask logit of a superpoint that is not there: its probability and its part of a loss are exactly 0


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

    superpoint_batch: (S,) int64, sorted. seeds: B integers, one per scene, so that the draw depends neither on the other
    scenes nor on the process; None: torch's global generator draws. In evaluation min_share is 1, and the queries are
    all superpoints in their order. Made in advance, so that the decoder never waits for a GPU.
    Returns a dict, its tensors on the CPU: "rows" (Q,) int64, the superpoint of each query, scene after scene; "query"
    (B, Q_max) int64, the same numbered within the scene, and -1 beyond its queries; "sizes" and "query_sizes", lists of
    B integers, the superpoints S_b and the queries Q_b of each scene; "padding" (B, S_max) bool, True beyond S_b.
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
    first = torch.tensor([0, *sizes]).cumsum(0).tolist()
    rows = torch.cat([index + start for index, start in zip(drawn, first)])
    query = nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
    padding = torch.arange(max(sizes)) >= torch.tensor(sizes)[:, None]
    return {"rows": rows, "query": query, "sizes": sizes, "query_sizes": [len(index) for index in drawn],
            "padding": padding}


def pad_scenes(rows, sizes):
    """rows (R, C) of B scenes, sizes: B integers that sum to R -> (B, largest of sizes, C), zero beyond a scene's rows.
    """
    longest = max(sizes)
    zeros = rows.new_zeros(longest - min(sizes), *rows.shape[1:])
    parts = [part for scene in rows.split(sizes) for part in (scene, zeros[:longest - len(scene)])]
    return torch.cat(parts).view(len(sizes), longest, *rows.shape[1:])  # one copy, and none in the backward pass


def unpad_scenes(padded, sizes):
    """The inverse of `pad_scenes`: padded (B, R_max, C) -> (R, C)."""
    longest = padded.shape[1]
    lengths = [length for size in sizes for length in (size, longest - size)]
    return torch.cat(padded.flatten(0, 1).split(lengths)[::2])


# ----------------------------------------------------------------------------------------------------------------
# Network

def attend_by_scene(q, k, v, x_sizes, source_sizes, allowed=None):
    """q (Q, nh, C), k and v (S, nh, C) of B packed scenes -> (Q, nh, C); see `Attention.forward`."""
    queries = q.transpose(0, 1).split(x_sizes, 1)  # B tensors (nh, Q_b, C)
    keys, values = (rows.transpose(0, 1).split(source_sizes, 1) for rows in (k, v))
    scenes = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values)):
        mask = None if allowed is None else allowed[b, :x_sizes[b], :source_sizes[b]]
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)  # (1, nh, Q_b, C)
        scenes.append(y[0].transpose(0, 1))
    return torch.cat(scenes)


def attend_padded(q, k, v, x_sizes, source_sizes, allowed=None):
    """The same in one call."""
    q, k, v = pad_scenes(q, x_sizes), pad_scenes(k, source_sizes), pad_scenes(v, source_sizes)  # (B, longest, nh, C)
    mask = allowed
    if mask is None and min(source_sizes) < max(source_sizes):
        mask = pad_scenes(k.new_ones(sum(source_sizes), dtype=torch.bool), source_sizes)[:, None]  # (B, 1, S_max)
    if mask is not None:  # open the rows that see nothing, those of padding among them: their softmax would be NaN
        mask = (mask | ~mask.any(2, keepdim=True))[:, None]
    q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))  # (B, nh, longest, C)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return unpad_scenes(y.transpose(1, 2), x_sizes)


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
        allowed: (B, largest of x_sizes, largest of source_sizes) bool, True where a row of x may attend to a source row,
            False in padding; None: everywhere.
        """
        attend = attend_by_scene if x.device.type == "cpu" else attend_padded  # a CPU pays for padding, a GPU for calls
        q, k, v = (rows.unflatten(1, (self.num_heads, -1))  # (rows, nh, D / nh)
                   for rows in (self.query(x), self.key(source), self.value(source)))
        return self.out(attend(q, k, v, x_sizes, source_sizes, allowed).flatten(1))


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

    def forward(self, feats, queries):
        """Predictions for a packed batch of superpoints.

        feats: (S, C) superpoint features, scene after scene. queries: the result of `draw_queries` for them.
        Returns a dict of num_layers + 1 = L predictions, the last of which is the final one:
            "class_logits" (L, B, Q_max, K + 1), the last column is "no object"
            "mask_logits" (L, B, Q_max, S_max), PADDED beyond the S_b superpoints of a scene
            "quality" (L, B, Q_max) in (0, 1)
            "query" (B, Q_max), the superpoint of the scene that each query was made from, -1 beyond its Q_b queries
            "semantic_logits" (S, K)
            "sizes", "query_sizes": lists of B integers, S_b and Q_b
        """
        sizes, query_sizes = queries["sizes"], queries["query_sizes"]
        if feats.shape != (sum(sizes), self.in_channels):
            raise ValueError(f"feats must be ({sum(sizes)}, {self.in_channels}), got {tuple(feats.shape)}")
        if len(feats) == 0:
            raise ValueError("no superpoint in the whole batch")
        rows, query_index, padding = (queries[key].to(feats.device) for key in ("rows", "query", "padding"))

        source = self.source_proj(feats)                       # (S, D)
        mask_feats = pad_scenes(self.mask_proj(feats), sizes)  # (B, S_max, D)
        query = self.query_proj(feats[rows])                   # (Q, C) -> (Q, D)

        states = [self._predict_masks(query, query_sizes, mask_feats, padding)]
        for layer in self.layers:
            allowed = attention_mask(states[-1][1], padding)
            query = layer(query, source, query_sizes, sizes, allowed)
            states.append(self._predict_masks(query, query_sizes, mask_feats, padding))

        normed, masks = zip(*states)
        masks = torch.stack(masks)  # (L, B, Q_max, S_max)
        shape = masks.shape[:3]
        # no view of (L, B, Q_max, D), of which a compiled head would tell one scene from several
        rows = torch.cat([layer.flatten(0, 1) for layer in normed])
        return {"class_logits": self.class_head(rows).unflatten(0, shape),
                "mask_logits": masks,
                "quality": self.quality_head(rows).view(shape).sigmoid(),
                "query": query_index,
                "semantic_logits": self.semantic_head(feats),
                "sizes": sizes,
                "query_sizes": query_sizes}

    def _predict_masks(self, query, query_sizes, mask_feats, padding):
        """query (Q, D) -> normalized and padded (B, Q_max, D), and mask logits (B, Q_max, S_max)."""
        normed = pad_scenes(self.out_norm(query), query_sizes)
        logits = normed @ mask_feats.transpose(1, 2)
        return normed, logits.masked_fill(padding[:, None], PADDED)


@torch.no_grad()
def attention_mask(mask_logits, padding):
    """(B, Q, S) mask logits, padding (B, S) -> bool: sigmoid >= 0.5; a row without any such entry sees its whole scene.
    """
    allowed = mask_logits >= 0
    is_empty = ~allowed.any(dim=-1, keepdim=True)
    return allowed | (is_empty & ~padding[:, None])


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

    output: of `InstanceDecoder`. point_to_superpoint (N,), batch_idx (N,): the superpoint and the scene of each point.
    thresholds: keyword arguments of `instances_from_logits`.
    """
    class_logits, mask_logits, quality = (output[key][-1] for key in ("class_logits", "mask_logits", "quality"))
    scenes = []
    first = 0  # superpoints of the scenes before this one
    for b, (S, Q) in enumerate(zip(output["sizes"], output["query_sizes"])):
        local_index = point_to_superpoint[batch_idx == b] - first
        scenes.append(instances_from_logits(class_logits[b, :Q], mask_logits[b, :Q, :S], quality[b, :Q], local_index,
                                            **thresholds))
        first += S
    return scenes


def paint_instances(masks):
    """masks (R, P) bool, best first -> (P,) int64: the best instance of every point, -1 = none."""
    if len(masks) == 0:
        return torch.full(masks.shape[1:], -1, device=masks.device)
    return torch.where(masks.any(0), masks.int().argmax(0), -1)  # argmax gives the first of equals
