# SPDX-License-Identifier: MIT
"""Sparse 3D convolution and Res16UNet34C in plain PyTorch; imports torch only.

A batch of scenes is the set of its occupied voxels: `coords` (M, 4) int64 as (batch, x, y, z), and one feature row per
voxel. A convolution has a kernel and a kernel map. The map says which input row each output row u reads at offset k:

    out[u] = sum_k kernel[k]^T in[u + offset_k * dilation * stride_in],    k = ix + K * iy + K^2 * iz

Offsets of an odd kernel are centred on 0, those of an even kernel start at 0. Stride, dilation and transposition are
properties of the map, so layers with the same resolution and kernel size share one map.

Submanifold convolution: Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", CVPR
2018. Network, state-dict keys and kernel layout: Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019, so checkpoints
trained with MinkowskiEngine load unchanged.
"""
import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

COORD_LIMIT = 2 ** 31  # voxels from the origin, in either direction


# ----------------------------------------------------------------------------------------------------------------
# Voxels and kernel maps

def _pack(coords, low, high, margin=0):
    """coords (M, 4) -> keys (M,) int64 that sort as coords do, and how much one voxel along each column adds to a key.

    `margin` unused keys after each row of voxels keep an offset of up to that size from reaching the next row.
    """
    extent = [high[0] - low[0] + 1, *(hi - lo + 1 + margin for lo, hi in zip(low[1:], high[1:]))]
    if math.prod(extent) >= 2 ** 63:
        raise ValueError(f"coords span {extent} voxels in (batch, x, y, z), a product of 2^63 or more")
    steps = [math.prod(extent[i + 1:]) for i in range(4)]
    batch, x, y, z = coords.unbind(1)
    keys = z - sum(lo * step for lo, step in zip(low, steps))  # steps[3] is 1
    return keys.add_(batch, alpha=steps[0]).add_(x, alpha=steps[1]).add_(y, alpha=steps[2]), steps


def _unique(coords, low, high):
    """Distinct rows of coords in lexicographic order, and the index of each given row among them."""
    keys, inverse = _pack(coords, low, high)[0].unique(return_inverse=True)
    return coords.new_empty(len(keys), 4).index_copy_(0, inverse, coords), inverse  # equal rows meet in one place


def voxelize(points, batch_idx, voxel_size):
    """Voxels occupied by a packed batch of points: floor(points / voxel_size).

    points (N, 3) float, in metres like voxel_size; batch_idx (N,) int64, the scene of each point.
    Returns coords (M, 4) int64 as (batch, x, y, z) in lexicographic order, and point_to_voxel (N,) int64, a row of
    coords per point. Raises ValueError for wrong shapes, non-finite points and voxels 2^31 or more from the origin.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"points must be (N, 3) float, got {tuple(points.shape)} {points.dtype}")
    if batch_idx.shape != points.shape[:1] or batch_idx.dtype != torch.int64:
        raise ValueError(f"batch_idx must be ({len(points)},) int64, got {tuple(batch_idx.shape)} {batch_idx.dtype}")
    if not voxel_size > 0:
        raise ValueError(f"voxel_size must be positive, got {voxel_size}")
    xyz = torch.floor(points / voxel_size)
    in_range = xyz.abs() < COORD_LIMIT  # also False for NaN
    coords = torch.cat((batch_idx[:, None], xyz.long()), 1)  # (N, 4), one row per point
    if not len(coords):
        return coords, coords.new_empty(0)
    low, high, (all_in_range, *_) = torch.stack((*coords.aminmax(dim=0), in_range.all().expand(4))).tolist()
    if not all_in_range:
        bad = (~in_range).any(1).nonzero()[0].item()
        raise ValueError(f"point {bad} is {points[bad].tolist()}: not finite, or beyond 2^31 voxels of {voxel_size} m")
    if low[0] < 0:
        raise ValueError(f"batch_idx must not be negative, got {low[0]}")
    return _unique(coords, low, high)


def voxel_mean(feats, point_to_voxel, num_voxels):
    """Mean of feats (N, C) over the points of each voxel -> (num_voxels, C); point_to_voxel (N,) from `voxelize`."""
    total = feats.new_zeros(num_voxels, feats.shape[1]).index_add_(0, point_to_voxel, feats)
    ones = torch.ones(point_to_voxel.shape, device=feats.device)
    points = ones.new_zeros(num_voxels).index_add_(0, point_to_voxel, ones)  # bincount would wait for a GPU
    return total / points[:, None]


def _invert(table, num_in):
    """table (n, num_out) of rows in [0, num_in], of which only num_in may repeat in a line -> (n, num_in): where each
    row stands in its line, and num_out for rows that do not.
    """
    n, num_out = table.shape
    rows = torch.arange(num_out, dtype=table.dtype, device=table.device).expand_as(table)
    return table.new_full((n, num_in + 1), num_out).scatter_(1, table.long(), rows)[:, :-1]


class KernelMap:
    """Which input row each output row reads at each kernel offset; also serves the transposed convolution.

    table: (num_out, K^3) int32, input rows, and num_in where the voxel is empty.
    """

    def __init__(self, table, num_in):
        self.table, self.num_in, self.num_out = table, num_in, len(table)

    @cached_property
    def transposed_table(self):
        """(num_in, K^3): the output row that reads each input row, and num_out where none does."""
        return _invert(self.table.t(), self.num_in).t().contiguous()

    @cached_property
    def pairs(self):
        """The P occupied entries, sorted by offset: input rows (P,), output rows (P,), and K^3 numbers of pairs."""
        by_offset = self.table.t().contiguous()
        occupied = by_offset < self.num_in
        entries = occupied.view(-1).nonzero().squeeze(1)
        in_rows = by_offset.view(-1)[entries].long()
        out_rows = entries % max(self.num_out, 1)
        return in_rows, out_rows, occupied.sum(1).tolist()

    def blocks(self, max_rows, transposed=False):
        """Iterates over (offset, source rows, target rows): runs of at most max_rows pairs of one offset."""
        source, target, sizes = self.pairs
        if transposed:
            source, target = target, source
        offsets, lengths = [], []
        for k, size in enumerate(sizes):
            for first in range(0, size, max_rows):
                offsets.append(k)
                lengths.append(min(max_rows, size - first))
        return zip(offsets, source.split(lengths), target.split(lengths))


class VoxelGrid:
    """The occupied voxels of a batch at one stride, with the kernel maps that start here, each built once.

    coords: (M, 4) integer (batch, x, y, z), xyz multiples of `stride`, of either sign, in any order (sorted is faster).
    Raises ValueError for wrong shapes, duplicates and values out of range.
    """

    def __init__(self, coords, stride=1):
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"coords must be (M, 4) int64 (batch, x, y, z), got {tuple(coords.shape)} {coords.dtype}")
        self._set(coords.long(), stride)
        if not len(coords):
            return
        self.bounds = low, high = torch.stack(self.coords.aminmax(dim=0)).tolist()
        if low[0] < 0 or min(low) < -COORD_LIMIT or max(high) >= COORD_LIMIT:
            raise ValueError(f"coords run from {low} to {high}: batch must be >= 0 and xyz within +-2^31")
        if stride > 1 and (self.coords[:, 1:] % stride).any():
            raise ValueError(f"coords of a grid of stride {stride} must be multiples of {stride}")
        keys, _ = _pack(self.coords, low, high)
        if not (keys[1:] > keys[:-1]).all():
            keys, self.order = keys.sort()
            twins = (keys[1:] == keys[:-1]).nonzero()
            if len(twins):
                twin = self.coords[self.order[twins[0, 0]]].tolist()
                raise ValueError(f"coords hold {len(twins)} duplicates, the first is {twin}: voxelize first")

    def _set(self, coords, stride, bounds=([0] * 4, [0] * 4)):
        self.coords = coords
        self.stride = stride
        self.bounds = bounds
        self.order = None  # sorts coords; None: they are sorted
        self._maps = {}
        return self

    def __len__(self):
        return len(self.coords)

    @property
    def sorted_coords(self):
        return self.coords if self.order is None else self.coords[self.order]

    @cached_property
    def coarser(self):
        """The grid at twice the stride; the parent of voxel c is floor(c / 2s) * 2s."""
        stride = 2 * self.stride
        if not len(self):
            return VoxelGrid(self.coords, stride)
        parents = self.coords.clone()
        parents[:, 1:] = self.coords[:, 1:].div(stride, rounding_mode="floor") * stride
        low, high = ([batch] + [c // stride * stride for c in xyz] for batch, *xyz in self.bounds)
        coords = _unique(parents, low, high)[0]  # sorted and valid: checks would only wait for a GPU
        return VoxelGrid.__new__(VoxelGrid)._set(coords, stride, (low, high))

    def neighbours(self, kernel_size, dilation=1):
        """KernelMap of a stride-1 convolution on these voxels."""
        return self._map(self, kernel_size, dilation)

    def down(self, kernel_size=2, dilation=1):
        """KernelMap of a stride-2 convolution from these voxels to `coarser`, and of its transpose back."""
        return self._map(self.coarser, kernel_size, dilation)

    def _map(self, outputs, kernel_size, dilation):
        key = (outputs.stride, kernel_size, dilation)
        if key not in self._maps:
            self._maps[key] = build_kernel_map(self, outputs, kernel_size, dilation)
        return self._maps[key]


def build_kernel_map(inputs, outputs, kernel_size, dilation=1):
    """KernelMap from one VoxelGrid to another; outputs.stride must be inputs.stride or a multiple of it.

    A kernel column is the K offsets that share ix and iy. One binary search finds the first voxel of every column; z
    varies fastest in the sorted keys, so the other voxels are the next keys, and K^2 searches serve K^3 offsets. If
    both grids are the same, offset K^3 - 1 - k mirrors offset k, which halves the searches.
    """
    if kernel_size < 1 or dilation < 1 or outputs.stride % inputs.stride:
        raise ValueError(f"no map of kernel {kernel_size}, dilation {dilation} "
                         f"from stride {inputs.stride} to {outputs.stride}")
    K = kernel_size
    num_in, num_out = len(inputs), len(outputs)
    first = -(K // 2) if K % 2 else 0
    shifts = [(first + i) * dilation * inputs.stride for i in range(K)]

    # keys of both grids in one common box
    low = list(map(min, inputs.bounds[0], outputs.bounds[0]))
    high = list(map(max, inputs.bounds[1], outputs.bounds[1]))
    margin = max(map(abs, shifts))
    keys, (_, x_step, y_step, _) = _pack(inputs.sorted_coords, low, high, margin)
    queries = keys if inputs is outputs else _pack(outputs.sorted_coords, low, high, margin)[0]
    keys = torch.cat((keys, keys.new_full((1,), torch.iinfo(torch.int64).max)))  # a search may end past the last key

    mirrored = inputs is outputs and K % 2 == 1
    columns = K * K // 2 + 1 if mirrored else K * K  # of a mirrored map up to the column through the centre
    along = (torch.arange(K, device=keys.device) + first) * (dilation * inputs.stride)  # (K,), as shifts
    column_shifts = (along * x_step + along[:, None] * y_step).flatten()[:columns]
    start = queries + column_shifts[:, None]  # (columns, num_out)
    position = torch.searchsorted(keys, start + shifts[0])
    table = torch.empty(K, K * K, num_out, dtype=torch.int32, device=keys.device)
    for iz in range(K):
        target = start + shifts[iz]
        if iz:
            for _ in range(dilation):  # at most `dilation` voxels lie between two offsets of a column
                position = position + (keys[position] < target)
        table[iz, :columns] = torch.where(keys[position] == target, position, num_in)
    if mirrored and columns > 1:
        found = table[:, :columns - 1].flatten(0, 1)
        table[:, columns:] = _invert(found, num_in).view(K, columns - 1, num_out).flip(0, 1)
    table = table.view(K ** 3, num_out).t().contiguous()

    # from sorted rows back to the order of coords
    if inputs.order is not None:
        order = torch.cat((inputs.order, inputs.order.new_full((1,), num_in))).to(table.dtype)
        table = order.index_select(0, table.view(-1)).view_as(table)
    if outputs.order is not None:
        table = torch.empty_like(table).index_copy_(0, outputs.order, table)
    return KernelMap(table, num_in)


# ----------------------------------------------------------------------------------------------------------------
# Convolution

# Values per gathered block. On a CPU a block stays in the cache of one core, and the allocator reuses its pages. On a
# GPU the limit bounds memory: K^3 copies of the features of a large batch would not fit.
BLOCK, GPU_BLOCK = 2 ** 17, 2 ** 27


def _sum_dtype(dtype):
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _use_im2col(device, num_out, c_in, c_out):
    # im2col: one product for all offsets. On a CPU one product per offset is faster, because it skips empty neighbours,
    # except with few rows, where the calls cost more than they save, and with few channels (colours), where gathered
    # rows are too short. On a GPU every call is a kernel launch.
    return device.type != "cpu" or c_in < 16 or num_out * c_in * c_out < 2 ** 20


def _im2col(feats, kernel_map, transposed):
    """Iterates over blocks of output rows: (slice of rows, (rows, K^3 * C) the input features that they read)."""
    table = kernel_map.transposed_table if transposed else kernel_map.table
    padded = torch.cat((feats, feats.new_zeros(1, feats.shape[1])))
    width = table.shape[1] * feats.shape[1]
    rows = max(1, (BLOCK if feats.device.type == "cpu" else GPU_BLOCK) // width)
    for begin in range(0, len(table), rows):
        index = table[begin:begin + rows].view(-1)
        yield slice(begin, begin + rows), padded.index_select(0, index).view(-1, width)


def _convolve(feats, kernel, kernel_map, transposed):
    """feats (rows, Cin), kernel (K^3, Cin, Cout) -> (rows, Cout), summed in float32 or wider."""
    num_out = kernel_map.num_in if transposed else kernel_map.num_out
    c_in, c_out = kernel.shape[1:]
    if _use_im2col(feats.device, num_out, c_in, c_out):
        out = feats.new_empty(num_out, c_out)
        flat_kernel = kernel.reshape(-1, c_out)
        for rows, columns in _im2col(feats, kernel_map, transposed):
            torch.mm(columns, flat_kernel, out=out[rows])
        return out
    out = feats.new_zeros(num_out, c_out, dtype=_sum_dtype(feats.dtype))
    weights = kernel.unbind()
    for k, source, target in kernel_map.blocks(max(1, BLOCK // max(c_in, c_out)), transposed):
        out.index_add_(0, target, (feats.index_select(0, source) @ weights[k]).to(out.dtype))
    return out.to(feats.dtype)


def _kernel_grad(feats, grad, kernel_map, transposed):
    """Gradient of the kernel: feats (input rows, Cin), grad (output rows, Cout) -> (K^3, Cin, Cout)."""
    c_in, c_out = feats.shape[1], grad.shape[1]
    K3 = kernel_map.table.shape[1]
    if _use_im2col(feats.device, len(grad), c_in, c_out):
        products = [columns.t() @ grad[rows] for rows, columns in _im2col(feats, kernel_map, transposed)]
        if len(products) != 1:  # a sum of blocks, in float32 or wider
            zero = grad.new_zeros(K3 * c_in, c_out, dtype=_sum_dtype(feats.dtype))
            products = [sum(products, zero).to(feats.dtype)]
        return products[0].view(K3, c_in, c_out)
    out = grad.new_zeros(K3, c_in, c_out, dtype=_sum_dtype(feats.dtype))
    sums = out.unbind()
    for k, source, target in kernel_map.blocks(max(1, BLOCK // max(c_in, c_out)), transposed):
        sums[k].add_(feats.index_select(0, source).t() @ grad.index_select(0, target))
    return out.to(feats.dtype)


class _SparseConv(torch.autograd.Function):
    """Gathers once more in the backward pass, instead of keeping K^3 gathered copies of the features."""

    @staticmethod
    def forward(ctx, feats, kernel, kernel_map, transposed):
        ctx.save_for_backward(feats, kernel)
        ctx.kernel_map = kernel_map
        ctx.transposed = transposed
        return _convolve(feats, kernel, kernel_map, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        feats, kernel = ctx.saved_tensors
        grad_feats = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_feats = _convolve(grad, kernel.transpose(1, 2), ctx.kernel_map, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            grad_kernel = _kernel_grad(feats, grad, ctx.kernel_map, ctx.transposed)
        return grad_feats, grad_kernel, None, None


def sparse_conv(feats, kernel, kernel_map, transposed=False):
    """Sparse convolution, or its transpose over the same map; differentiable once, in feats and kernel.

    feats (num_in, Cin) and kernel (K^3, Cin, Cout) of the same dtype -> (num_out, Cout).
    transposed: feats (num_out, Cin) -> (num_in, Cout).
    Autocast casts both to its dtype, as in F.linear; sums over offsets stay in float32. Raises ValueError if shapes or
    dtypes disagree.
    """
    device = feats.device.type
    if torch.is_autocast_enabled(device) and feats.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        feats, kernel = feats.to(dtype), kernel.to(dtype)
    rows = kernel_map.num_out if transposed else kernel_map.num_in
    if feats.ndim != 2 or len(feats) != rows:
        raise ValueError(f"feats must be ({rows}, Cin) for this map, got {tuple(feats.shape)}")
    expected = (kernel_map.table.shape[1], feats.shape[1])
    if kernel.ndim != 3 or kernel.shape[:2] != expected or feats.dtype != kernel.dtype:
        raise ValueError(f"kernel must be {(*expected, 'Cout')} {feats.dtype} for feats {tuple(feats.shape)} "
                         f"on this map, got {tuple(kernel.shape)} {kernel.dtype}")
    return _SparseConv.apply(feats, kernel, kernel_map, transposed)


class SparseConv(nn.Module):
    """Sparse convolution, kernel (K^3, Cin, Cout); the kernel map given to forward sets the stride.

    With kernel_size 1 the kernel is (Cin, Cout), and forward needs no map. Only then there may be a bias (1, Cout).
    """

    def __init__(self, in_channels, out_channels, kernel_size, bias=False):
        super().__init__()
        shape = (in_channels, out_channels) if kernel_size == 1 else (kernel_size ** 3, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(1, out_channels)) if bias else None
        nn.init.normal_(self.kernel, std=math.sqrt(2 / (kernel_size ** 3 * out_channels)))  # He et al. 2015, fan out

    def forward(self, feats, kernel_map=None, transposed=False):
        if self.kernel.ndim == 2:
            out = feats @ self.kernel
            return out if self.bias is None else out + self.bias
        return sparse_conv(feats, self.kernel, kernel_map, transposed)

    def extra_repr(self):
        return "x".join(map(str, self.kernel.shape))


# ----------------------------------------------------------------------------------------------------------------
# Res16UNet34C

class BatchNorm(nn.Module):
    """BatchNorm1d under the key `bn`, as in MinkowskiEngine.

    One row has no variance, and a small scene often has a single voxel at the coarsest level. With fewer than two rows,
    training therefore normalizes with the running statistics and leaves them unchanged. A subclass that replaces `bn`
    handles this case itself: a synchronized norm counts the rows of all processes.
    """

    def __init__(self, channels, momentum):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, x):
        if len(x) < 2 and type(self.bn) is nn.BatchNorm1d:
            bn = self.bn
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return self.bn(x)


def norm_relu(norm, x):
    """ReLU of the norm, in place: for its backward pass, the norm saves its input and not its output."""
    return F.relu(norm(x), inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions and a residual, as in ResNet-34."""

    last_relu = True

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = SparseConv(in_channels, out_channels, 3)
        self.norm1 = BatchNorm(out_channels, momentum=0.1)
        self.conv2 = SparseConv(out_channels, out_channels, 3)
        self.norm2 = BatchNorm(out_channels, momentum=0.1)
        self.downsample = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(SparseConv(in_channels, out_channels, 1),
                                            BatchNorm(out_channels, momentum=0.02))

    def forward(self, x, kernel_map):
        out = norm_relu(self.norm1, self.conv1(x, kernel_map))
        out = self.norm2(self.conv2(out, kernel_map))
        residual = x if self.downsample is None else self.downsample(x)
        out = out + residual
        return F.relu(out, inplace=True) if self.last_relu else out


class Stage(nn.Sequential):
    """BasicBlocks that share one grid and one map."""

    def __init__(self, in_channels, out_channels, num_blocks):
        widths = [in_channels] + [out_channels] * num_blocks
        super().__init__(*map(BasicBlock, widths, widths[1:]))

    def forward(self, x, kernel_map):
        for block in self:
            x = block(x, kernel_map)
        return x


PLANES = (32, 64, 128, 256, 256, 128, 96, 96)
LAYERS = (2, 3, 4, 6, 2, 2, 2, 2)
SMALL = dict(planes=(32, 32, 64, 96, 64, 48, 32, 32), layers=(1,) * 8)
NETWORKS = {  # options of Res16UNet34C
    "small": dict(**SMALL, stem=5),  # the default of train.py
    "res16unet34c": dict(planes=PLANES, layers=LAYERS, stem=5),  # ESAM, oneformer3d, Mask3D, Pointcept's MinkUNet34C
    "res16unet34c-k3": dict(planes=PLANES, layers=LAYERS, stem=3),  # UnScene3D, LanguageGroundedSemseg
    # LanguageGroundedSemseg where it learns from CLIP, whose features have both signs
    "res16unet34c-k3-clip": dict(planes=PLANES, layers=LAYERS, stem=3, last_relu=False),
    "res16unet34d-k3-clip": dict(planes=(*PLANES[:5], 256, 256, 512), layers=LAYERS, stem=3, last_relu=False),
    "minkunet18a": dict(planes=(32, 64, 128, 256, 128, 128, 96, 96), layers=(2,) * 8, stem=5)}  # OpenScene


class Res16UNet34C(nn.Module):
    """The U-Net of ESAM and Mask3D: five resolutions, 37.9 M parameters with the default planes.

    forward(coords (M, 4) int64 (batch, x, y, z), feats (M, in_channels)) -> (M, planes[-1]).
    planes, layers: channels and number of BasicBlocks of block1 to block8; NETWORKS has its relatives. stem: kernel
    size of the first convolution. last_relu: whether block8 ends in a ReLU. final: None; or (channels, bias) of a last
    linear layer, whose output it then returns. The keys of its state dict are MinkowskiEngine's.
    """

    def __init__(self, in_channels=3, planes=PLANES, layers=LAYERS, stem=5, last_relu=True, final=None):
        super().__init__()
        if len(planes) != 8 or len(layers) != 8:
            raise ValueError(f"planes and layers must have 8 entries, got {planes} and {layers}")
        p = planes
        self.out_channels = final[0] if final else p[7]
        self.options = dict(in_channels=in_channels, planes=tuple(planes), layers=tuple(layers), stem=stem,
                            last_relu=last_relu)

        self.conv0p1s1, self.bn0 = SparseConv(in_channels, p[0], stem), BatchNorm(p[0], 0.02)
        self.conv1p1s2, self.bn1 = SparseConv(p[0], p[0], 2), BatchNorm(p[0], 0.02)
        self.block1 = Stage(p[0], p[0], layers[0])
        self.conv2p2s2, self.bn2 = SparseConv(p[0], p[0], 2), BatchNorm(p[0], 0.02)
        self.block2 = Stage(p[0], p[1], layers[1])
        self.conv3p4s2, self.bn3 = SparseConv(p[1], p[1], 2), BatchNorm(p[1], 0.02)
        self.block3 = Stage(p[1], p[2], layers[2])
        self.conv4p8s2, self.bn4 = SparseConv(p[2], p[2], 2), BatchNorm(p[2], 0.02)
        self.block4 = Stage(p[2], p[3], layers[3])

        self.convtr4p16s2, self.bntr4 = SparseConv(p[3], p[4], 2), BatchNorm(p[4], 0.02)
        self.block5 = Stage(p[4] + p[2], p[4], layers[4])
        self.convtr5p8s2, self.bntr5 = SparseConv(p[4], p[5], 2), BatchNorm(p[5], 0.02)
        self.block6 = Stage(p[5] + p[1], p[5], layers[5])
        self.convtr6p4s2, self.bntr6 = SparseConv(p[5], p[6], 2), BatchNorm(p[6], 0.02)
        self.block7 = Stage(p[6] + p[0], p[6], layers[6])
        self.convtr7p2s2, self.bntr7 = SparseConv(p[6], p[7], 2), BatchNorm(p[7], 0.02)
        self.block8 = Stage(p[7] + p[0], p[7], layers[7])
        self.block8[-1].last_relu = last_relu
        self.final = SparseConv(p[7], final[0], 1, bias=final[1]) if final else nn.Identity()

    def forward(self, coords, feats):
        if feats.ndim != 2 or feats.shape != (len(coords), self.options["in_channels"]):
            raise ValueError(f"feats must be ({len(coords)}, {self.options['in_channels']}), got {tuple(feats.shape)}")
        g1 = VoxelGrid(coords)  # gN: stride N
        g2 = g1.coarser
        g4 = g2.coarser
        g8 = g4.coarser
        g16 = g8.coarser

        stem = norm_relu(self.bn0, self.conv0p1s1(feats, g1.neighbours(self.options["stem"])))
        skip2 = self.block1(norm_relu(self.bn1, self.conv1p1s2(stem, g1.down())), g2.neighbours(3))
        skip4 = self.block2(norm_relu(self.bn2, self.conv2p2s2(skip2, g2.down())), g4.neighbours(3))
        skip8 = self.block3(norm_relu(self.bn3, self.conv3p4s2(skip4, g4.down())), g8.neighbours(3))
        x = self.block4(norm_relu(self.bn4, self.conv4p8s2(skip8, g8.down())), g16.neighbours(3))

        x = norm_relu(self.bntr4, self.convtr4p16s2(x, g8.down(), transposed=True))
        x = self.block5(torch.cat((x, skip8), 1), g8.neighbours(3))
        x = norm_relu(self.bntr5, self.convtr5p8s2(x, g4.down(), transposed=True))
        x = self.block6(torch.cat((x, skip4), 1), g4.neighbours(3))
        x = norm_relu(self.bntr6, self.convtr6p4s2(x, g2.down(), transposed=True))
        x = self.block7(torch.cat((x, skip2), 1), g2.neighbours(3))
        x = norm_relu(self.bntr7, self.convtr7p2s2(x, g1.down(), transposed=True))
        return self.final(self.block8(torch.cat((x, stem), 1), g1.neighbours(3)))


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints of other projects

# what a network sees of a colour c in [0, 1]: (c - mean) / std; None: ones, it sees no colour
COLORS = {"signed": (0.5, 0.5), "centred": (0.5, 1.0), "raw": (0.0, 1.0), "ones": None,
          "scannet": ((0.47793125906962, 0.4303257521323044, 0.3749598901421883),
                      (0.2834475483823543, 0.27566157565723015, 0.27018971370874995))}
# project: prefix of its keys, kernel size of the stem, input channels, colours
PROJECTS = {"ESAM or oneformer3d": (r"(backbone|unet)\.", 5, 3, "scannet"),
            "Mask3D": (r"model\.backbone\.", 5, 3, "scannet"), "UnScene3D": (r"model\.backbone\.", 3, 3, "scannet"),
            "LanguageGroundedSemseg": (r"model\.", 3, 3, "centred"),
            "OpenScene": (r"(module\.)?net3d\.", 5, 3, "ones"),
            "Pointcept": (r"(module\.)?backbone\.", 5, 9, None)}  # until its version 1.6 signed, since then raw
OWN_PREFIX = "fusion.encoder_3d.backbone."  # in checkpoints of train.py
DTYPES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32}


def load_backbone(path, final=False):
    """A U-Net with the weights of a checkpoint, as ESAM, oneformer3d, Mask3D, UnScene3D, LanguageGroundedSemseg,
    OpenScene and Pointcept (MinkUNet34C) publish it, or as train.py writes it.

    Its size is read off the keys. The file's pickle executes nothing and needs no package: `TensorUnpickler`.
    final: keep the last layer; OpenScene's maps into CLIP's space.

    Returns a Res16UNet34C in eval mode; the name of its colours, a key of COLORS, or None if the file does not tell
    them; and a line that says what was loaded. Raises FileNotFoundError; or ValueError, with the path, if the file is
    damaged, a tensor is missing, unknown or of another shape, or holds NaN or inf.
    """
    prefix, tensors, config = read_backbone(path)
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {prefix}{key} {tuple(value.shape)} holds NaN or inf")
    options = network_options(tensors, f"{path}: {prefix}")
    project, colors, options["last_relu"] = recognize(prefix, options, config)
    dropped = []
    if not final:
        options["final"] = None
        dropped = [key for key in tensors if key.startswith("final.")]
        tensors = {key: value for key, value in tensors.items() if key not in dropped}

    with torch.device("meta"):  # a hostile file must not decide how much memory is taken
        network = Res16UNet34C(**options)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is {theirs.get(key, 'missing')}, expected {own.get(key, 'no such key')}"
                for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
    if problems:
        raise ValueError(f"{path} does not fit, {len(problems)} of {len(own)} tensors:\n  " + "\n  ".join(problems))
    network.load_state_dict(tensors, assign=True)
    return network.eval(), colors, (f"{len(tensors)} tensors from {path}, prefix {prefix!r}, project "
                                    f"{project or 'unknown'}, dropped {dropped or 'nothing'}")


def recognize(prefix, options, config):
    """The project that has such keys and shapes or None; its colours or None; whether its network ends in a ReLU."""
    if prefix == OWN_PREFIX:
        network = NETWORKS.get(config.get("backbone"), {})
        return "BiFusion", config.get("colors"), network.get("last_relu", True)
    shape = options["stem"], options["in_channels"]
    project = next((name for name, (pattern, *known, _) in PROJECTS.items()
                    if re.fullmatch(pattern, prefix) and tuple(known) == shape), None)
    colors = PROJECTS[project][3] if project else None
    width = options["final"][0] if options["final"] else None
    if project == "Mask3D" and width not in (20, 200):
        colors = None  # trained on S3DIS or STPLS3D, whose colours have another mean and std than ScanNet's
    learns_from_clip = project == "LanguageGroundedSemseg" and (width is None or options["planes"][7] == 512)
    return project, colors, not learns_from_clip


def network_options(tensors, where):
    """The tensors of a network by key -> the options of Res16UNet34C that give these keys and shapes."""
    planes, layers = [], []
    for i in range(1, 9):
        kernels = [value for key, value in tensors.items() if re.fullmatch(rf"block{i}\.\d+\.conv2\.kernel", key)]
        if not kernels or kernels[0].ndim != 3:
            raise ValueError(f"{where}block{i} has no conv2.kernel of 3 dimensions")
        planes.append(kernels[0].shape[2])
        layers.append(len(kernels))
    stem = tensors["conv0p1s1.kernel"]
    if stem.ndim != 3 or len(stem) not in (27, 125):
        raise ValueError(f"{where}conv0p1s1.kernel has shape {tuple(stem.shape)}, expected (27 or 125, Cin, Cout)")
    final = None
    if "final.kernel" in tensors and tensors["final.kernel"].ndim:
        final = tensors["final.kernel"].shape[-1], "final.bias" in tensors
    return dict(in_channels=stem.shape[1], planes=planes, layers=layers, stem=round(len(stem) ** (1 / 3)), final=final)


def read_backbone(path):
    """The prefix of a U-Net's keys in a checkpoint, its tensors (float32 or int64) by key without the prefix, and
    train.py's config, empty in other files.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"it has {len(pickles)} entries data.pkl")
            state = TensorUnpickler(io.BytesIO(read_entry(archive, pickles[0]))).load()
            nested = next((state[key] for key in ("state_dict", "model") if key in state), state)
            anchor = "conv0p1s1.kernel"
            keys = [key for key, value in nested.items() if isinstance(key, str) and isinstance(value, StoredTensor)]
            prefixes = [key[:-len(anchor)] for key in keys if key == anchor or key.endswith("." + anchor)]
            if len(prefixes) != 1:
                raise ValueError(f"{len(prefixes)} keys end in {anchor}, expected one; its keys begin {keys[:4]}")
            folder = pickles[0][:-len("data.pkl")]
            parts = re.compile(re.escape(prefixes[0]) + r"(conv\d|convtr\d|bn\d|bntr\d|block\d|final\.)")
            stored = {key[len(prefixes[0]):]: nested[key] for key in keys if parts.match(key)}
            if 2 * sum(math.prod(map(abs, tensor.size)) for tensor in stored.values()) > os.path.getsize(path):
                raise ValueError("its tensors claim more values than fit in it, at 2 bytes each")
            found = {key: tensor.read(archive, folder) for key, tensor in stored.items()}
            config = state["config"] if prefixes[0] == OWN_PREFIX else {}
            for field, known in (("colors", COLORS), ("backbone", NETWORKS)):
                if config.get(field) not in (None, *known):
                    raise ValueError(f"its config has {field} {config[field]!r}")
    except Exception as error:  # pickle and zipfile raise many kinds
        raise ValueError(f"{path}: not a checkpoint in the zip format of torch.save, damaged, or without a U-Net "
                         f"({type(error).__name__}: {error})") from error
    return prefixes[0], found, config


def read_entry(archive, name):
    """The bytes of an entry of a zip file, whose checksum zipfile checks; refused if it is larger than in the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


class StoredTensor(NamedTuple):
    """A tensor in a checkpoint that has not been read yet."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple
    stride: tuple

    def read(self, archive, folder):
        """Its values, from an open zip file, which checks their checksum; float32, or int64 for whole numbers."""
        values = torch.frombuffer(bytearray(read_entry(archive, f"{folder}data/{self.key}")), dtype=self.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        fits = all(n > 0 for n in self.size) and min(self.offset, *self.stride, 0) == 0
        if not fits or last >= len(values) or math.prod(self.size) > len(values):
            raise ValueError(f"storage {self.key} has {len(values)} values, which do not make {self}")
        values = values.as_strided(self.size, self.stride, self.offset)
        return values.to(torch.float32 if self.dtype.is_floating_point else torch.int64).contiguous()


class Inert:
    """Stands in for every class and function that a pickle names and `TensorUnpickler` does not know; does nothing."""

    def __new__(cls, *args, **options):
        return super().__new__(cls)

    def ignore(self, *args, **options):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = ignore


class TensorUnpickler(pickle._Unpickler):
    """Reads the pickle of a torch.save file: plain containers, `StoredTensor`, and `Inert` for all else.

    Nothing that the file names is imported or called. The class is pickle's own in Python: the one in C takes as much
    memory as the largest index that a file names.
    """

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: StoredTensor(*storage, offset, size, stride)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        return DTYPES.get(name, Inert) if module == "torch" else Inert

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        return key, dtype


# ----------------------------------------------------------------------------------------------------------------
# Points

class PointEncoder(nn.Module):
    """A sparse U-Net for points: averages point features per voxel, and gives each point its voxel's output.

    voxel_size: in metres. in_channels: F, the channels of the point features. out_channels: if the network's differ, a
    linear layer maps the voxels to out_channels. network: options of `Res16UNet34C`.
    color_mean, color_std: the network sees (features - color_mean) / color_std, numbers or sequences of F numbers; None:
    it sees ones, whatever the features. COLORS has those of other projects.
    """

    def __init__(self, voxel_size, in_channels=3, out_channels=96, color_mean=0.5, color_std=0.5, **network):
        super().__init__()
        if not voxel_size > 0:
            raise ValueError(f"voxel_size must be positive, got {voxel_size}")
        self.voxel_size, self.in_channels, self.out_channels = voxel_size, in_channels, out_channels
        self.sees_features = color_mean is not None
        for name, value in (("color_mean", color_mean), ("color_std", color_std)):
            value = torch.tensor(value if self.sees_features else 1.0)
            if value.shape not in ((), (in_channels,)) or not value.isfinite().all() or name == "color_std" and (
                    value <= 0).any():
                raise ValueError(f"{name} must be a finite number or {in_channels} of them, positive for color_std; got "
                                 f"{value.tolist()}")
            self.register_buffer(name, value, persistent=False)
        self.backbone = Res16UNet34C(in_channels, **network)
        width = self.backbone.out_channels
        self.project = nn.Identity() if width == out_channels else nn.Linear(width, out_channels)

    def forward(self, batch):
        """batch, a dict of "coords" (N, 3) in metres, "features" (N, F) and "batch" (N,) int64, the scene of each point
        -> (N, out_channels).
        """
        coords, features, batch_idx = batch["coords"], batch["features"], batch["batch"]
        if features.shape != (len(coords), self.in_channels):
            raise ValueError(f"features must be ({len(coords)}, {self.in_channels}), got {tuple(features.shape)}")
        if self.sees_features:
            features = (features - self.color_mean) / self.color_std
        else:
            features = torch.ones_like(features)
        voxels, point_to_voxel = voxelize(coords, batch_idx, self.voxel_size)  # (M, 4), (N,)
        feats = voxel_mean(features, point_to_voxel, len(voxels))  # (M, F)
        feats = self.project(self.backbone(voxels, feats))         # (M, out_channels)
        # in float32, also under autocast: the gradient of a voxel is a sum over its points
        feats = feats.to(torch.promote_types(feats.dtype, torch.float32))
        return feats.index_select(0, point_to_voxel)  # its backward adds rows in a fixed order; feats[...]'s is slower
