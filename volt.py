# SPDX-License-Identifier: MIT
"""Volt, the Volume Transformer: a transformer over volumetric patches in plain PyTorch; imports torch only.

Every scene is cut into patches of K = 5 voxels a side, which do not overlap. Each patch that holds a
voxel is a token, a linear map of all its slots; empty slots are zero:

    token = Linear(K^3 * Cin -> D)(slots),    slot of a voxel = (x % K) * K^2 + (y % K) * K + z % K

Pre-norm blocks follow. Their attention is over all tokens of a scene, with rotary embeddings of the
patches' positions along three axes. Each voxel then reads its slot of a map in the other direction:

    voxel = Linear(C -> K^3 * C)(Linear(D -> C)(token))[slot]

Yilmaz et al., "Volume Transformer: Revisiting Vanilla Transformers for 3D Scene Understanding", ECCV
2026, arXiv 2604.19609. The keys of the state dict are theirs, so that published weights load unchanged.
"""
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 5  # voxels a side
SLOTS = PATCH ** 3
HEAD = 64  # channels of an attention head, two per frequency
FREQUENCIES = (12, 12, 8)  # of the rotary embedding along x, y and z
THETA = 100.0  # the largest frequency, 1 radian per patch, over the smallest


def partition(coords):
    """Cuts each scene of coords (M, 4) int64 (batch, x, y, z) into patches, from its minimum on.

    Returns position (T, 3) int64, of each patch in its scene, from 0, sorted by scene; row (M,) int64, of
    each voxel among the T * SLOTS slots; and lengths, a list of the numbers of patches of the scenes.
    Raises ValueError for a negative batch index, for duplicates, and for bounds of 2^63 or more voxels.
    """
    if not len(coords):
        return coords[:, 1:], coords[:, 0], [0]
    batch = coords[:, 0]
    xyz = coords[:, 1:]
    low, high = torch.stack(coords.aminmax(dim=0)).tolist()
    num_scenes = high[0] + 1
    extent = [(end - start) // PATCH + 1 for start, end in zip(low[1:], high[1:])]
    num_voxels = num_scenes * math.prod(extent) * SLOTS
    if low[0] < 0 or num_voxels >= 2 ** 63:
        raise ValueError(f"coords run from {low} to {high}: batch must be >= 0 and the box < 2^63 voxels")

    # a key per voxel, which sorts by scene, patch and slot
    scene = batch[:, None].expand(-1, 3)
    origin = coords.new_full((num_scenes, 3), 2 ** 62)
    origin.scatter_reduce_(0, scene, xyz, "amin")
    xyz = xyz - origin.gather(0, scene)
    patch = xyz // PATCH
    digits = torch.cat((patch, xyz % PATCH), 1)  # (M, 6)
    key = batch
    bases = (*extent, PATCH, PATCH, PATCH)
    for digit, base in zip(digits.unbind(1), bases):
        key = key * base + digit

    keys, index = (key // SLOTS).unique(return_inverse=True)  # (T,), and the patch of each voxel
    row = index * SLOTS + key % SLOTS
    twins = len(row) - len(row.unique())
    if twins:
        raise ValueError(f"coords hold {twins} duplicates: voxelize first")
    position = patch.new_empty(len(keys), 3).index_copy_(0, index, patch)  # equal rows meet
    owner = batch.new_empty(len(keys)).index_copy_(0, index, batch)
    lengths = torch.bincount(owner).tolist()
    return position, row, lengths


class Tokenizer(nn.Module):
    """Voxel features (M, Cin) -> tokens (T, D), a linear map of all slots of a patch."""

    def __init__(self, in_channels, embed_dim):
        super().__init__()
        self.proj = nn.Linear(SLOTS * in_channels, embed_dim)

    def forward(self, feats, row, num_patches):
        slots = feats.new_zeros(num_patches * SLOTS, feats.shape[1])
        slots = slots.index_copy(0, row, feats)
        return self.proj(slots.view(-1, self.proj.in_features))


class Detokenizer(nn.Module):
    """Tokens (T, C) -> voxel features (M, C): a linear map to all slots; each voxel reads its own."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, SLOTS * channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, row):
        slots = self.proj(x).view(-1, len(self.bias))  # (T * SLOTS, C)
        return slots.index_select(0, row) + self.bias


def rotary_phases(position, dtype):
    """Positions (T, 3) -> exp(i * angle) (T, 1, HEAD / 2), by which each pair of channels is turned."""
    angles = []
    for axis, count in enumerate(FREQUENCIES):
        exponent = torch.linspace(0, 1, count, dtype=dtype, device=position.device)
        angles.append(position[:, axis, None] * THETA ** -exponent)
    angles = torch.cat(angles, 1)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, phases):
    """x (T, nh, HEAD) -> the same with pairs of adjacent channels turned, in the precision of phases."""
    pairs = x.to(phases.real.dtype).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * phases
    return torch.view_as_real(turned).flatten(-2)


def attend(q, k, v, lengths):
    """Attention among the tokens of each scene; q, k, v and the output are (sum(lengths), nh, HEAD).

    Scene by scene there is neither padding nor a mask, so that every device takes its fastest kernel.
    """
    def by_scene(x):  # (1, nh, L, HEAD) each
        return x.transpose(0, 1)[None].split(lengths, 2)

    out = map(F.scaled_dot_product_attention, by_scene(q), by_scene(k), by_scene(v))
    return torch.cat([x.squeeze(0).transpose(0, 1) for x in out])


class Attention(nn.Module):
    """Multi-head attention with rotary embeddings and, with qk_norm, normalized queries and keys."""

    def __init__(self, embed_dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.q_norm = nn.LayerNorm(HEAD) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(HEAD) if qk_norm else nn.Identity()

    def forward(self, x, phases, lengths):
        qkv = self.qkv(x).view(-1, 3, self.num_heads, HEAD)
        q, k, v = qkv.unbind(1)  # (T, nh, HEAD)
        q = rotate(self.q_norm(q), phases).to(v.dtype)
        k = rotate(self.k_norm(k), phases).to(v.dtype)
        return self.proj(attend(q, k, v, lengths).flatten(1))


def drop_path(x, rate, training):
    """Stochastic depth: zeroes rows of x (T, D) with probability `rate` and scales the others up."""
    if rate == 0 or not training:
        return x
    kept = x.new_empty(len(x), 1).bernoulli_(1 - rate)
    return x * kept / (1 - rate)


class Block(nn.Module):
    """A pre-norm transformer block. In training, its updates of a token are dropped at a rate."""

    def __init__(self, embed_dim, num_heads, qk_norm, drop_rate):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(embed_dim)
        fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        fc2 = nn.Linear(4 * embed_dim, embed_dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))

    def forward(self, x, phases, lengths):
        update = self.attn(self.norm1(x), phases, lengths)
        x = x + drop_path(update, self.drop_rate, self.training)
        update = self.mlp(self.norm2(x))
        return x + drop_path(update, self.drop_rate, self.training)


class Rows(nn.Sequential):
    """Layers for any number of rows (T, C): norms of fewer than two use their running statistics."""

    def forward(self, x):
        for layer in self:
            if len(x) < 2 and type(layer) is nn.BatchNorm1d:  # a synchronized norm counts rows itself
                x = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
                                 eps=layer.eps)
            else:
                x = layer(x)
        return x


class Decoder(nn.Module):
    """Tokens (T, D) -> voxel features (M, C)."""

    def __init__(self, embed_dim, channels):
        super().__init__()
        batch_norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
        linear = nn.Linear(embed_dim, channels, bias=False)
        self.pre = Rows(batch_norm(embed_dim), nn.GELU(), linear, batch_norm(channels), nn.GELU())
        self.unembed = Detokenizer(channels)
        self.post = Rows(batch_norm(channels), nn.GELU())

    def forward(self, x, row):
        return self.post(self.unembed(self.pre(x), row))


class Volt(nn.Module):
    """The Volume Transformer; the defaults are Volt-S, and 768, 12, 12, 256 from embed_dim on are Volt-B.

    in_channels: 6 in published weights, color in [0, 1] and unit normal. embed_dim: 64 per head.
    qk_norm: whether queries and keys are normalized. drop_path: rate of the last block; the first has 0.
    """

    def __init__(self, in_channels=6, embed_dim=384, depth=12, num_heads=6, out_channels=128,
                 qk_norm=True, drop_path=0.0):
        super().__init__()
        if embed_dim != HEAD * num_heads:
            raise ValueError(f"embed_dim must be {HEAD} per head, got {embed_dim} for {num_heads} heads")
        self.out_channels = out_channels
        self.options = dict(in_channels=in_channels, embed_dim=embed_dim, depth=depth,
                            out_channels=out_channels, qk_norm=qk_norm)
        self.tokenizer = Tokenizer(in_channels, embed_dim)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qk_norm, rate) for rate in rates)
        self.decoder = Decoder(embed_dim, out_channels)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    plan = staticmethod(partition)

    def forward(self, coords, feats, patches=None):
        """coords (M, 4) int64 (batch, x, y, z) in any order, feats (M, in_channels) -> (M, out_channels).

        patches: what `plan` makes of coords, if somebody did so in advance.
        """
        if coords.shape[1:] != (4,) or coords.is_floating_point():
            raise ValueError(f"coords must be (M, 4) int64, got {tuple(coords.shape)} {coords.dtype}")
        expected = (len(coords), self.options["in_channels"])
        if feats.shape != expected:
            raise ValueError(f"feats must be {expected}, got {tuple(feats.shape)}")
        position, row, lengths = self.plan(coords.long()) if patches is None else patches
        phases = rotary_phases(position, torch.promote_types(feats.dtype, torch.float32))
        x = self.tokenizer(feats, row, len(position))
        x = x.to(feats.dtype)  # also under autocast: the sum over blocks
        for block in self.blocks:
            x = block(x, phases, lengths)
        return self.decoder(x, row)
