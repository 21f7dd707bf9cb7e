# SPDX-License-Identifier: MIT
"""Instances from superpoint features: a mask transformer whose queries are the superpoints themselves.

    superpoints (S, C) = mean of the features of their points
    queries     (Q, D) = a projection of the superpoints (in training of a random half to all of them)
    num_layers times: masked cross-attention to the superpoints, self-attention, feed-forward, each with a post-norm
    before the first layer and after each:  class logits (Q, K + 1),  mask logits (Q, S) = <query, superpoint>,
                                            mask quality (Q,), the predicted IoU

A query attends to the superpoints of its own mask only (sigmoid >= 0.5; to all where there is none): Cheng et al.,
"Masked-attention Mask Transformer", CVPR 2022; on superpoints: Sun et al., "SPFormer", AAAI 2023, and Kolodiazhnyi et
al., "OneFormer3D", CVPR 2024, whose single-frame form Xu et al., "ESAM", ICLR 2025, train. Inference ends in matrix
NMS: Wang et al., "SOLOv2", NeurIPS 2020.

Scenes are packed and ragged, as everywhere. Every projection runs once over the packed rows; only the attention itself
goes scene by scene, for B is small and a padded batch would spend Q x S entries on nothing. `Segmenter` puts it behind
an encoder, or a linear semantic head alone. Imports torch only.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def superpoint_index(segments, batch):
    """Numbers the superpoints of a batch through, scene after scene.

    segments: (N,) int64, any ids that are unique within a scene; or (N, 3) int64 voxels, which serve as superpoints
    where a scene has none (make them coarse: masks take Q x S memory with Q up to S).
    batch: (N,) int64. Returns index (N,) in [0, S), non-decreasing over scenes, and superpoint_batch (S,), sorted.
    """
    if segments.ndim not in (1, 2) or len(segments) != len(batch) or segments.is_floating_point():
        raise ValueError(f"segments must be (N,) or (N, 3) integers for batch {tuple(batch.shape)}, "
                         f"got {segments.dtype} {tuple(segments.shape)}")
    keys = torch.cat([batch[:, None], segments.view(len(batch), -1)], dim=1)
    unique, index = torch.unique(keys, dim=0, return_inverse=True)
    return index, unique[:, 0].contiguous()


def pool(feats, index, count):
    """Mean of feats (N, C) over index (N,) in [0, count) -> (count, C); rows that nothing points at are zero.

    Sums in fp32 at least, for fp16 stops counting at 2048 points.
    """
    if feats.ndim != 2 or index.shape != feats.shape[:1]:
        raise ValueError(f"feats must be (N, C) and index (N,), got {tuple(feats.shape)} and {tuple(index.shape)}")
    wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
    total = wide.new_zeros(count, feats.shape[1]).index_add(0, index, wide)
    points = torch.bincount(index, minlength=count).clamp(min=1)
    return (total / points[:, None]).to(feats.dtype)


class Attention(nn.Module):
    """Multi-head attention over packed scenes: row i of a scene attends to source rows of that scene only."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, source, x_sizes, source_sizes, allowed=None):
        """x (Q, D), source (S, D), rows per scene as lists; allowed: B masks (Q_b, S_b) bool, or None. -> (Q, D)"""
        def heads(packed, sizes):  # B parts (1, nh, rows of the scene, D / nh)
            return [part.unflatten(1, (self.num_heads, -1)).transpose(0, 1)[None] for part in packed.split(sizes)]

        scenes = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, k, v, mask in zip(
            heads(self.query(x), x_sizes), heads(self.key(source), source_sizes),
            heads(self.value(source), source_sizes), allowed or [None] * len(x_sizes))]
        return self.out(torch.cat([scene[0].transpose(0, 1).flatten(1) for scene in scenes]))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each adds to the query and is normed after."""

    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.cross_attention, self.self_attention = Attention(dim, num_heads), Attention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.cross_norm, self.self_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, query, source, query_sizes, source_sizes, allowed):
        query = self.cross_norm(query + self.cross_attention(query, source, query_sizes, source_sizes, allowed))
        query = self.self_norm(query + self.self_attention(query, query, query_sizes, query_sizes))
        return self.ffn_norm(query + self.ffn(query))


class InstanceDecoder(nn.Module):
    """Class, mask and mask quality for a set of queries, and semantic logits for every superpoint.

    num_classes: K of the data set. class_agnostic: the class head says object or not (2 logits) instead of K + 1.
    min_query_share: in training, the least share of the superpoints of a scene that become queries.
    """

    def __init__(self, in_channels=256, num_classes=20, embed_dim=256, num_layers=3, num_heads=8, ffn=1024,
                 class_agnostic=False, min_query_share=0.5):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        if not 0 < min_query_share <= 1:
            raise ValueError(f"min_query_share must be in (0, 1], got {min_query_share}")
        D = embed_dim
        self.in_channels, self.min_query_share = in_channels, min_query_share
        self.source_proj = nn.Sequential(nn.Linear(in_channels, D), nn.LayerNorm(D), nn.ReLU())
        self.query_proj = nn.Sequential(nn.Linear(in_channels, D), nn.ReLU(), nn.Linear(D, D))
        self.mask_proj = nn.Sequential(nn.Linear(in_channels, D), nn.ReLU(), nn.Linear(D, D))
        self.layers = nn.ModuleList(DecoderLayer(D, num_heads, ffn) for _ in range(num_layers))
        self.out_norm = nn.LayerNorm(D)
        self.class_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(),
                                        nn.Linear(D, (1 if class_agnostic else num_classes) + 1))
        self.quality_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))
        self.semantic_head = nn.Linear(in_channels, num_classes)

    def forward(self, feats, superpoint_batch, seeds=None):
        """feats (S, C) superpoint features, superpoint_batch (S,) int64, sorted; seeds: B integers, or None.

        In training the queries of a scene are drawn by its seed, so that neither the rest of the batch nor the process
        that it runs on matters; without seeds by torch's own generator.

        Returns {
          "layers": num_layers + 1 dicts, the last is the final prediction; each holds tuples over the B scenes:
                    "class_logits" (Q_b, K + 1), the last column is "no object"; "mask_logits" (Q_b, S_b);
                    "quality" (Q_b,) in (0, 1)
          "query": tuple over scenes, (Q_b,) which superpoint of its scene a query was made of
          "semantic_logits": (S, K)}
        """
        if feats.ndim != 2 or feats.shape[1] != self.in_channels or superpoint_batch.shape != feats.shape[:1]:
            raise ValueError(f"feats must be (S, {self.in_channels}) and superpoint_batch (S,), "
                             f"got {tuple(feats.shape)} and {tuple(superpoint_batch.shape)}")
        if len(feats) == 0:
            raise ValueError("no superpoint in the whole batch")
        sizes = torch.bincount(superpoint_batch).tolist()
        query_index = tuple(self._select(size, feats.device, seed)
                            for size, seed in zip(sizes, seeds or [None] * len(sizes)))
        query_sizes = [len(index) for index in query_index]

        source, mask_feats = self.source_proj(feats), self.mask_proj(feats).split(sizes)
        picked = torch.cat([part[index] for part, index in zip(feats.split(sizes), query_index)])  # (Q, C)
        query = self.query_proj(picked)
        layers = [self._predict(query, query_sizes, mask_feats)]
        for layer in self.layers:
            allowed = [attention_mask(logits) for logits in layers[-1]["mask_logits"]]
            query = layer(query, source, query_sizes, sizes, allowed)
            layers.append(self._predict(query, query_sizes, mask_feats))
        return {"layers": layers, "query": query_index, "semantic_logits": self.semantic_head(feats)}

    def _select(self, size, device, seed):
        if not self.training:
            return torch.arange(size, device=device)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        share = torch.empty(()).uniform_(self.min_query_share, 1, generator=generator).item()
        return torch.randperm(size, generator=generator)[:math.ceil(share * size)].to(device)

    def _predict(self, query, query_sizes, mask_feats):
        query = self.out_norm(query)
        masks = tuple(q @ m.T for q, m in zip(query.split(query_sizes), mask_feats))
        return {"class_logits": self.class_head(query).split(query_sizes), "mask_logits": masks,
                "quality": self.quality_head(query).squeeze(1).sigmoid().split(query_sizes)}


@torch.no_grad()
def attention_mask(mask_logits):
    """(Q, S) logits -> (Q, S) bool, where attention may go: sigmoid >= 0.5, or everywhere in a row without any."""
    allowed = mask_logits >= 0
    return allowed | ~allowed.any(dim=1, keepdim=True)


def matrix_nms(masks, labels, scores, weights, kernel="linear", sigma=2.0):
    """Decayed scores (R,): SOLOv2's matrix NMS among masks of one label, all at once.

    masks (R, S) bool, labels (R,), scores (R,), weights (S,) points of each superpoint, so that the IoU is that of the
    points. kernel: "linear", (1 - IoU) / (1 - the suppressor's own IoU), or "gaussian", exp(-sigma (IoU^2 - own^2)).
    """
    if kernel not in ("linear", "gaussian"):
        raise ValueError(f"kernel must be 'linear' or 'gaussian', not {kernel!r}")
    if len(scores) == 0:
        return scores.clone()
    order = scores.argsort(descending=True, stable=True)
    sorted_masks, sorted_labels = masks[order].float(), labels[order]
    overlap = (sorted_masks * weights) @ sorted_masks.T
    area = overlap.diagonal()
    iou = overlap / (area[:, None] + area - overlap).clamp(min=1)
    iou = (iou * (sorted_labels[:, None] == sorted_labels)).triu(diagonal=1)  # row suppresses column
    own = iou.max(dim=0).values[:, None]
    if kernel == "linear":
        # A suppressor with IoU 1 is a copy of a mask ranked above it, whose row says the same with a sound divisor.
        decay = (1 - iou) / (1 - own).clamp(min=1e-6)
    else:
        decay = torch.exp(-sigma * (iou ** 2 - own ** 2))
    decayed = torch.empty_like(scores)
    decayed[order] = scores[order] * decay.min(dim=0).values.clamp(max=1)
    return decayed


@torch.no_grad()
def instances_from_logits(class_logits, mask_logits, index, quality=None, top_k=100, mask_threshold=0.5,
                          score_threshold=0.0, min_points=100, nms="linear", sigma=2.0):
    """Instances of one scene, best first.

    class_logits (Q, K + 1), mask_logits (Q, S), quality (Q,) or None: the last layer of the decoder. index (P,): the
    superpoint, in [0, S), of each point.
    Keeps the top_k pairs of query and class by softmax probability (times quality); the score is that times the mean
    probability inside the mask, decayed by matrix NMS (nms: "linear", "gaussian" with `sigma`, or None). Drops what
    scores <= score_threshold or has fewer than min_points points with a probability > mask_threshold.
    Returns {"masks": (R, P) bool, "labels": (R,) int64 in [0, K), "scores": (R,) fp32}.
    """
    Q, S = mask_logits.shape
    if len(class_logits) != Q or (quality is not None and quality.shape != (Q,)):
        raise ValueError(f"{Q} mask queries, but class logits {tuple(class_logits.shape)} and quality "
                         f"{None if quality is None else tuple(quality.shape)}")
    probability = class_logits.float().softmax(dim=1)[:, :-1]
    if quality is not None:
        probability = probability * quality.float()[:, None]
    K = probability.shape[1]
    scores, best = probability.flatten().topk(min(top_k, Q * K))
    query, labels = best // K, best % K

    soft = mask_logits[query].float().sigmoid()  # (R, S)
    masks = soft > mask_threshold
    points = torch.bincount(index, minlength=S).to(soft.dtype)
    area = masks.float() @ points
    scores = scores * (soft * masks).sum(1) / masks.sum(1).clamp(min=1)
    if nms is not None:
        scores = matrix_nms(masks, labels, scores, points, nms, sigma)
    keep = ((scores > score_threshold) & (area >= min_points)).nonzero().squeeze(1)
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    return {"masks": masks[keep][:, index], "labels": labels[keep], "scores": scores[keep]}


def scene_instances(output, index, batch, use_quality=True, **thresholds):
    """The instances of every scene of a batch: a list of what `instances_from_logits` returns.

    output: of `InstanceDecoder`; index (N,) and batch (N,): of `superpoint_index`; thresholds: passed on.
    """
    final = output["layers"][-1]
    scenes, first = [], 0
    for b, (class_logits, mask_logits, quality) in enumerate(
            zip(final["class_logits"], final["mask_logits"], final["quality"])):
        local = index[batch == b] - first
        first += mask_logits.shape[1]
        scenes.append(instances_from_logits(class_logits, mask_logits, local, quality if use_quality else None,
                                            **thresholds))
    return scenes


class Segmenter(nn.Module):
    """Fused point features, and what is read off them: semantics of points, instances of superpoints.

    decoder: an InstanceDecoder, or None for semantics alone. With it the logits of a point are the sum of its own and
    its superpoint's: the superpoint sees more, the point sees borders. Where a batch has no superpoints, cubes with
    `cell` metres a side stand in.
    """

    def __init__(self, fusion, num_classes, decoder=None, embed_dim=256, cell=0.2):
        super().__init__()
        self.cell = cell
        self.fusion = fusion
        self.head = nn.Linear(embed_dim, num_classes)
        self.decoder = decoder
        if decoder is not None:  # two chairs look alike: a query tells them apart by where they are
            self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, embed_dim))

    def forward(self, batch):
        """The fusion's output and logits (N, K); with a decoder also superpoint (N,), superpoint_batch (S,), decoder.
        """
        out = self.fusion(batch)
        logits = self.head(out["feat_fusion"])
        if self.decoder is None:
            return {**out, "logits": logits}
        segments = batch["superpoints"] if "superpoints" in batch else (batch["points"] / self.cell).floor().long()
        superpoint, superpoint_batch = superpoint_index(segments, batch["batch"])
        count = len(superpoint_batch)
        centre = pool(batch["coords"], superpoint, count)
        centre = centre - pool(centre, superpoint_batch, len(batch["name"]))[superpoint_batch]
        decoder = self.decoder(pool(out["feat_fusion"], superpoint, count) + self.position(centre), superpoint_batch,
                               batch.get("seed"))
        return {**out, "logits": logits + decoder["semantic_logits"][superpoint], "superpoint": superpoint,
                "superpoint_batch": superpoint_batch, "decoder": decoder}
