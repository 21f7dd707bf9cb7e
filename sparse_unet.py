# SPDX-License-Identifier: MIT
"""Sparse 3D convolution and Res16UNet34C in plain PyTorch; imports torch only.

A batch of scenes is the set of its occupied voxels: `coords` (M, 4) int64 as (batch, x, y, z), and one
feature row per voxel. A kernel map says which input row each output row u reads at offset k of a kernel:

    out[u] = sum_k kernel[k]^T in[u + offset_k * dilation * stride_in],    k = ix + K * iy + K^2 * iz

Offsets of an odd kernel are centered on 0, those of an even kernel start at 0. Stride, dilation and
transposition are properties of the map, so layers of one resolution and kernel size share a map.

Submanifold convolution: Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional
Networks", CVPR 2018. Network, state-dict keys and kernel layout: Choy et al., "4D Spatio-Temporal
ConvNets", CVPR 2019, so checkpoints trained with MinkowskiEngine load unchanged.
"""
import math
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

COORD_LIMIT = 2 ** 31  # voxels from the origin, in either direction


# ------------------------------------------------------------------------------- voxels and kernel maps

def _pack(coords, low, high, margin=0):
    """coords (M, 4) -> keys (M,) int64 that sort alike, and what one voxel along each column adds to a key.

    `margin` unused keys after each row of voxels keep an offset of that size from reaching the next row.
    """
    extent = [hi - lo + 1 + margin for lo, hi in zip(low, high)]
    extent[0] -= margin
    if math.prod(extent) >= 2 ** 63:
        raise ValueError(f"coords span {extent} voxels in (batch, x, y, z), a product of 2^63 or more")
    _, x, y, z = extent
    steps = (x * y * z, y * z, z, 1)
    keys = coords.new_zeros(len(coords))
    for column, start, step in zip(coords.unbind(1), low, steps):
        keys.add_(column - start, alpha=step)
    return keys, steps


def _unique(coords, low, high):
    """Distinct rows of coords in lexicographic order, and the index of each given row among them."""
    keys, _ = _pack(coords, low, high)
    keys, inverse = keys.unique(return_inverse=True)
    rows = coords.new_empty(len(keys), 4)
    rows.index_copy_(0, inverse, coords)  # equal rows meet in one place
    return rows, inverse


def voxelize(points, batch_idx, voxel_size):
    """Voxels occupied by a packed batch of points: floor(points / voxel_size).

    points (N, 3) float, in meters like voxel_size; batch_idx (N,) int64, the scene of each point.
    Returns coords (M, 4) int64 as (batch, x, y, z) in lexicographic order, and point_to_voxel (N,) int64,
    a row of coords per point. ValueError for points that are not finite, or 2^31 voxels from the origin.
    """
    if points.shape[1:] != (3,) or not points.is_floating_point():
        raise ValueError(f"points must be (N, 3) float, got {tuple(points.shape)} {points.dtype}")
    if batch_idx.shape != points.shape[:1] or batch_idx.dtype != torch.int64:
        got = f"{tuple(batch_idx.shape)} {batch_idx.dtype}"
        raise ValueError(f"batch_idx must be ({len(points)},) int64, got {got}")
    if not voxel_size > 0:
        raise ValueError(f"voxel_size must be positive, got {voxel_size}")
    xyz = torch.floor(points / voxel_size)
    outside = ~(xyz.abs() < COORD_LIMIT).all(1)  # NaN, too
    if outside.any():
        bad = outside.nonzero()[0].item()
        raise ValueError(f"point {bad} is {points[bad].tolist()}: not finite, or beyond 2^31 voxels of "
                         f"{voxel_size} m")
    coords = torch.cat((batch_idx[:, None], xyz.long()), 1)  # (N, 4), one row per point
    if not len(coords):
        return coords, coords.new_empty(0)
    low, high = torch.stack(coords.aminmax(dim=0)).tolist()
    return _unique(coords, low, high)


def voxel_mean(feats, point_to_voxel, num_voxels):
    """Mean of feats (N, C) over the points of each voxel -> (num_voxels, C); see `voxelize`."""
    total = feats.new_zeros(num_voxels, feats.shape[1])
    total.index_add_(0, point_to_voxel, feats)
    ones = torch.ones(len(feats), device=feats.device)
    count = ones.new_zeros(num_voxels)
    count.index_add_(0, point_to_voxel, ones)  # bincount would wait for a GPU
    return total / count[:, None]


def _invert(table, num_in):
    """table (n, num_out) of rows, or num_in for none -> (n, num_in): where each stands, or num_out."""
    n, num_out = table.shape
    rows = torch.arange(num_out, dtype=table.dtype, device=table.device)
    places = table.new_full((n, num_in + 1), num_out)
    places.scatter_(1, table.long(), rows.expand_as(table))
    return places[:, :-1]


class KernelMap:
    """Which input row each output row reads at each kernel offset; also serves the transposed convolution.

    table: (num_out, K^3) int32, input rows, and num_in where the voxel is empty. zeros: a dict that maps of
    one network share.
    """

    def __init__(self, table, num_in, zeros=None):
        self.table = table
        self.num_in = num_in
        self.num_out = len(table)
        self.zeros = {} if zeros is None else zeros

    def padded(self, feats):
        """feats (rows, C) and behind them a row of zeros, which stands for every empty voxel."""
        key = feats.shape[1], feats.dtype
        if key not in self.zeros:
            self.zeros[key] = feats.new_zeros(1, feats.shape[1])
        return torch.cat((feats, self.zeros[key]))

    @cached_property
    def transposed_table(self):
        """(num_in, K^3): the output row that reads each input row, and num_out where none does."""
        return _invert(self.table.t(), self.num_in).t().contiguous()

    @cached_property
    def pairs(self):
        """`pairs_of` the table."""
        return pairs_of(self.table, self.num_in)

    @cached_property
    def transposed_pairs(self):
        """`pairs_of` the transposed table."""
        return pairs_of(self.transposed_table, self.num_out)


class Pairs(NamedTuple):
    """The P occupied entries in some rows of a table, sorted by offset."""
    rows: slice           # of the table
    source: torch.Tensor  # (P,) rows of the features that are read
    target: torch.Tensor  # (P,) rows of the table that read them
    sizes: list           # K^3 numbers of entries
    order: torch.Tensor   # (P,) sorts them by target
    starts: torch.Tensor  # where in this order the entries of each of the rows begin

    def sums(self, products):
        """products (P, C) -> (number of rows, C), their sums by target in the order of the offsets."""
        return F.embedding_bag(self.order, products, self.starts, mode="sum")


def pairs_of(table, num_source):
    """A table (rows, K^3) of entries below num_source, or num_source where empty -> list of Pairs, few in each."""
    occupied = table < num_source
    counts = occupied.sum(1)
    num_parts = max(1, -(-int(counts.sum()) // MAX_PAIRS))
    num_rows = max(1, -(-len(table) // num_parts))
    parts = []
    for begin in range(0, len(table), num_rows):
        rows = slice(begin, min(begin + num_rows, len(table)))
        by_offset = table[rows].t().contiguous()
        used = occupied[rows].t().contiguous()
        entries = used.view(-1).nonzero().squeeze(1)
        source = by_offset.view(-1)[entries].long()
        target = entries % by_offset.shape[1]
        order = target.int().argsort(stable=True)
        starts = counts[rows].cumsum(0) - counts[rows]
        parts.append(Pairs(rows, source, target + begin, used.sum(1).tolist(), order, starts))
    return parts


class VoxelGrid:
    """The occupied voxels of a batch at one stride.

    coords: (M, 4) integer (batch, x, y, z), xyz multiples of `stride`, of either sign, in any order (sorted
    is faster). ValueError for duplicates and values out of range.
    """

    def __init__(self, coords, stride=1):
        if coords.shape[1:] != (4,) or coords.is_floating_point():
            got = f"{tuple(coords.shape)} {coords.dtype}"
            raise ValueError(f"coords must be (M, 4) int64 (batch, x, y, z), got {got}")
        self.coords = self.sorted_coords = coords.long()
        self.order = None  # sorts coords; None: they are sorted
        self.stride = stride
        self.bounds = (0,) * 4, (0,) * 4
        if not len(coords):
            return
        low, high = torch.stack(self.coords.aminmax(dim=0)).tolist()
        self.bounds = low, high
        if low[0] < 0 or max(map(abs, low + high)) >= COORD_LIMIT:
            raise ValueError(f"coords run from {low} to {high}: batch must be >= 0, xyz within +-2^31")
        keys, _ = _pack(self.coords, low, high)
        if not (keys.diff() > 0).all():
            keys, self.order = keys.sort()
            self.sorted_coords = self.coords[self.order]
            if not (keys.diff() > 0).all():
                raise ValueError("coords hold duplicates: voxelize first")

    def __len__(self):
        return len(self.coords)

    @cached_property
    def coarser(self):
        """The grid at twice the stride; the parent of voxel c is floor(c / 2s) * 2s."""
        stride = 2 * self.stride
        parents = self.coords.clone()
        parents[:, 1:].div_(stride, rounding_mode="floor").mul_(stride)
        low, high = self.bounds
        low = [c // stride * stride for c in low]
        coords, _ = _unique(parents, low, high)
        return VoxelGrid(coords, stride)

    def neighbors(self, kernel_size, dilation=1):
        """KernelMap of a stride-1 convolution on these voxels."""
        return build_kernel_map(self, self, kernel_size, dilation)

    def down(self, kernel_size=2, dilation=1):
        """KernelMap of a stride-2 convolution from these voxels to `coarser`, and of its transpose."""
        return build_kernel_map(self, self.coarser, kernel_size, dilation)


def build_kernel_map(inputs, outputs, kernel_size, dilation=1):
    """KernelMap from one VoxelGrid to another; outputs.stride must be a multiple of inputs.stride.

    A kernel column is the K offsets that share ix and iy. One binary search finds the first voxel of every
    column; z varies fastest in the sorted keys, so the other voxels are the next keys, and K^2 searches
    serve K^3 offsets. In a map of a grid to itself offset K^3 - 1 - k mirrors offset k: half the searches.
    """
    K = kernel_size
    num_in, num_out = len(inputs), len(outputs)
    first = -(K // 2) if K % 2 else 0
    shifts = [(first + i) * dilation * inputs.stride for i in range(K)]

    # keys of both grids in one common box
    low = list(map(min, inputs.bounds[0], outputs.bounds[0]))
    high = list(map(max, inputs.bounds[1], outputs.bounds[1]))
    margin = max(map(abs, shifts))
    keys, (_, x_step, y_step, _) = _pack(inputs.sorted_coords, low, high, margin)
    queries = keys
    if inputs is not outputs:
        queries, _ = _pack(outputs.sorted_coords, low, high, margin)
    beyond = keys.new_full((1,), 2 ** 63 - 1)
    keys = torch.cat((keys, beyond))  # a search may end past the last key

    mirrored = inputs is outputs and K % 2 == 1
    columns = K * K // 2 + 1 if mirrored else K * K  # mirrored: up to the column through the center
    along = torch.arange(K, device=keys.device) + first
    along *= dilation * inputs.stride  # (K,), as shifts
    column_shifts = along * x_step + along[:, None] * y_step  # (K, K)
    start = queries + column_shifts.view(-1, 1)[:columns]  # (columns, num_out)
    position = torch.searchsorted(keys, start + shifts[0])
    table = keys.new_empty((K, K * K, num_out), dtype=torch.int32)
    for iz in range(K):
        target = start + shifts[iz]
        if iz:
            for _ in range(dilation):  # at most `dilation` voxels lie between two offsets of a column
                position = position + (keys[position] < target)
        table[iz, :columns] = torch.where(keys[position] == target, position, num_in)
    if mirrored and columns > 1:
        found = _invert(table[:, :columns - 1].flatten(0, 1), num_in)
        found = found.view(K, columns - 1, num_out)
        table[:, columns:] = found.flip(0, 1)
    table = table.flatten(0, 1).t().contiguous()

    # from sorted rows back to the order of coords
    if inputs.order is not None:
        order = F.pad(inputs.order, (0, 1), value=num_in).to(table.dtype)
        table = order[table]
    if outputs.order is not None:
        table = torch.empty_like(table).index_copy_(0, outputs.order, table)
    return KernelMap(table, num_in)


# ------------------------------------------------------------------------------------------ convolution

# Values per gathered block. On a CPU it stays in the cache of one core, and the allocator reuses its pages.
# On a GPU the limit bounds memory: K^3 copies of the features of a large batch would not fit.
BLOCK = 2 ** 17
GPU_BLOCK = 2 ** 27
MAX_PAIRS = 2 ** 16  # about; what a CPU multiplies before it sums: the products stay in its cache


def use_im2col(device, num_out, c_in, c_out):
    """Whether one product for all offsets is faster than one per offset.

    On a CPU the latter skips empty neighbors, except with few rows, where calls dominate, and with few
    channels (colors).
    """
    return device.type != "cpu" or c_in < 16 or num_out * c_in * c_out < 2 ** 20


def _im2col(feats, kernel_map, transposed):
    """Iterates over blocks of output rows: (slice of rows, (rows, K^3 * C) features that they read)."""
    table = kernel_map.transposed_table if transposed else kernel_map.table
    padded = kernel_map.padded(feats)
    width = table.shape[1] * feats.shape[1]
    values = BLOCK if feats.device.type == "cpu" else GPU_BLOCK
    rows = max(1, values // width)
    for begin in range(0, len(table), rows):
        block = slice(begin, begin + rows)
        index = table[block].view(-1)
        yield block, padded.index_select(0, index).view(-1, width)


def _convolve(feats, kernel, kernel_map, transposed):
    """feats (rows, Cin), kernel (K^3, Cin, Cout) -> (rows, Cout), summed in float32 or wider."""
    num_out = kernel_map.num_in if transposed else kernel_map.num_out
    c_in, c_out = kernel.shape[1:]
    if use_im2col(feats.device, num_out, c_in, c_out):
        out = feats.new_empty(num_out, c_out)
        flat_kernel = kernel.reshape(-1, c_out)
        for rows, columns in _im2col(feats, kernel_map, transposed):
            torch.mm(columns, flat_kernel, out=out[rows])
        return out
    wide = torch.promote_types(feats.dtype, torch.float32)
    out = feats.new_empty(num_out, c_out)
    weights = kernel.unbind()
    for pairs in kernel_map.transposed_pairs if transposed else kernel_map.pairs:
        products = feats.new_empty(len(pairs.source), c_out, dtype=wide)
        for weight, source, product in zip(weights, pairs.source.split(pairs.sizes), products.split(pairs.sizes)):
            rows = feats.index_select(0, source)
            if wide == feats.dtype:
                torch.mm(rows, weight, out=product)
            else:
                product.copy_(rows @ weight)
        out[pairs.rows] = pairs.sums(products)
    return out


def _kernel_grad(feats, grad, kernel_map, transposed):
    """Gradient of the kernel: feats (input rows, Cin), grad (output rows, Cout) -> (K^3, Cin, Cout)."""
    c_in, c_out = feats.shape[1], grad.shape[1]
    shape = (kernel_map.table.shape[1], c_in, c_out)
    wide = torch.promote_types(feats.dtype, torch.float32)
    if use_im2col(feats.device, len(grad), c_in, c_out):
        blocks = _im2col(feats, kernel_map, transposed)
        products = [columns.t() @ grad[rows] for rows, columns in blocks]
        out, *rest = products or [grad.new_zeros(shape)]
        if rest:
            out = sum(rest, out.to(wide))
        return out.to(feats.dtype).view(shape)
    out = grad.new_zeros(shape, dtype=wide)
    sums = out.unbind()
    for pairs in kernel_map.transposed_pairs if transposed else kernel_map.pairs:
        for total, source, target in zip(sums, pairs.source.split(pairs.sizes), pairs.target.split(pairs.sizes)):
            total.add_(feats.index_select(0, source).t() @ grad.index_select(0, target))
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
    Autocast casts both to its dtype, as in F.linear; sums over offsets stay in float32.
    """
    device = feats.device.type
    if torch.is_autocast_enabled(device) and feats.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        feats, kernel = feats.to(dtype), kernel.to(dtype)
    rows = kernel_map.num_out if transposed else kernel_map.num_in
    if feats.shape[:-1] != (rows,):
        raise ValueError(f"feats must be ({rows}, Cin) for this map, got {tuple(feats.shape)}")
    expected = (kernel_map.table.shape[1], feats.shape[1])
    if kernel.shape[:-1] != expected or feats.dtype != kernel.dtype:
        raise ValueError(f"kernel must be {(*expected, 'Cout')} {feats.dtype} for feats {tuple(feats.shape)}, "
                         f"got {tuple(kernel.shape)} {kernel.dtype}")
    return _SparseConv.apply(feats, kernel, kernel_map, transposed)


class SparseConv(nn.Module):
    """Sparse convolution, kernel (K^3, Cin, Cout); the map given to forward sets the stride.

    With kernel_size 1 the kernel is (Cin, Cout) and forward needs no map. bias: (1, Cout).
    """

    def __init__(self, in_channels, out_channels, kernel_size, bias=False):
        super().__init__()
        volume = kernel_size ** 3
        kernel = torch.empty(volume, in_channels, out_channels)
        self.kernel = nn.Parameter(kernel[0] if volume == 1 else kernel)
        self.bias = nn.Parameter(torch.zeros(1, out_channels)) if bias else None
        std = math.sqrt(2 / (volume * out_channels))  # He et al. 2015, fan out
        nn.init.normal_(self.kernel, std=std)

    def forward(self, feats, kernel_map=None, transposed=False):
        if self.kernel.ndim == 2:
            out = feats @ self.kernel
            return out if self.bias is None else out + self.bias
        return sparse_conv(feats, self.kernel, kernel_map, transposed)


# ----------------------------------------------------------------------------------------- Res16UNet34C

class BatchNorm(nn.Module):
    """BatchNorm1d under the key `bn`, as in MinkowskiEngine.

    A single row, as at the coarsest level of a small scene, has no variance: running statistics serve
    then. A synchronized norm in place of `bn` counts the rows of all processes.
    """

    def __init__(self, channels, momentum=0.02):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, x):
        bn = self.bn
        if len(x) < 2 and type(bn) is nn.BatchNorm1d:
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return bn(x)


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
            conv = SparseConv(in_channels, out_channels, 1)
            self.downsample = nn.Sequential(conv, BatchNorm(out_channels))

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
PLANES_D = (32, 64, 128, 256, 256, 256, 256, 512)
PLANES_A = (32, 64, 128, 256, 128, 128, 96, 96)
PLANES_SMALL = (32, 32, 64, 96, 64, 48, 32, 32)
LAYERS = (2, 3, 4, 6, 2, 2, 2, 2)
SMALL = dict(planes=PLANES_SMALL, layers=(1,) * 8)
LARGE = dict(planes=PLANES, layers=LAYERS)
NETWORKS = {  # options of Res16UNet34C
    "small": dict(SMALL, stem=5),  # the default of train.py
    "res16unet34c": dict(LARGE, stem=5),  # ESAM, oneformer3d, Mask3D, Pointcept's MinkUNet34C
    "res16unet34c-k3": dict(LARGE, stem=3),  # UnScene3D, LanguageGroundedSemseg
    "res16unet34c-k3-clip": dict(LARGE, stem=3, last_relu=False),  # learned CLIP's features, of both signs
    "res16unet34d-k3-clip": dict(LARGE, planes=PLANES_D, stem=3, last_relu=False),
    "minkunet18a": dict(planes=PLANES_A, layers=(2,) * 8, stem=5)}  # OpenScene


def plan_unet(coords, stem=5):
    """The kernel maps of Res16UNet34C for voxels coords (M, 4): a list of ten pairs (table, num_in)."""
    grid = VoxelGrid(coords)
    table = grid.neighbors(stem).table
    # the 3 x 3 x 3 offsets in the middle of the stem's are those of the other kernels
    offsets = torch.arange(stem ** 3, device=coords.device).view(stem, stem, stem)
    middle = slice(stem // 2 - 1, stem // 2 + 2)
    inner = table.index_select(1, offsets[middle, middle, middle].flatten())
    tables = [(table, len(grid)), (inner, len(grid))]
    for _ in range(4):
        down = grid.down()
        tables.append((down.table, down.num_in))
        grid = grid.coarser
        tables.append((grid.neighbors(3).table, len(grid)))
    return tables


class Res16UNet34C(nn.Module):
    """The U-Net of ESAM and Mask3D: five resolutions, 37.9 M parameters with the default planes.

    planes, layers: channels and number of BasicBlocks of block1 to block8; NETWORKS has its relatives.
    stem: kernel size of the first convolution. last_relu: whether block8 ends in a ReLU. final: None, or
    (channels, bias) of a last linear layer. The keys of its state dict are MinkowskiEngine's.
    """

    def __init__(self, in_channels=3, planes=PLANES, layers=LAYERS, stem=5, last_relu=True, final=None):
        super().__init__()
        p1, p2, p3, p4, p5, p6, p7, p8 = planes
        self.out_channels = final[0] if final else p8
        self.options = dict(in_channels=in_channels, stem=stem, last_relu=last_relu)
        self.options |= dict(planes=tuple(planes), layers=tuple(layers))
        self.plan = partial(plan_unet, stem=stem)

        self.conv0p1s1 = SparseConv(in_channels, p1, stem)
        self.bn0 = BatchNorm(p1)
        self.conv1p1s2 = SparseConv(p1, p1, 2)
        self.bn1 = BatchNorm(p1)
        self.block1 = Stage(p1, p1, layers[0])
        self.conv2p2s2 = SparseConv(p1, p1, 2)
        self.bn2 = BatchNorm(p1)
        self.block2 = Stage(p1, p2, layers[1])
        self.conv3p4s2 = SparseConv(p2, p2, 2)
        self.bn3 = BatchNorm(p2)
        self.block3 = Stage(p2, p3, layers[2])
        self.conv4p8s2 = SparseConv(p3, p3, 2)
        self.bn4 = BatchNorm(p3)
        self.block4 = Stage(p3, p4, layers[3])

        self.convtr4p16s2 = SparseConv(p4, p5, 2)
        self.bntr4 = BatchNorm(p5)
        self.block5 = Stage(p5 + p3, p5, layers[4])
        self.convtr5p8s2 = SparseConv(p5, p6, 2)
        self.bntr5 = BatchNorm(p6)
        self.block6 = Stage(p6 + p2, p6, layers[5])
        self.convtr6p4s2 = SparseConv(p6, p7, 2)
        self.bntr6 = BatchNorm(p7)
        self.block7 = Stage(p7 + p1, p7, layers[6])
        self.convtr7p2s2 = SparseConv(p7, p8, 2)
        self.bntr7 = BatchNorm(p8)
        self.block8 = Stage(p8 + p1, p8, layers[7])
        self.block8[-1].last_relu = last_relu
        self.final = nn.Identity()
        if final:
            self.final = SparseConv(p8, final[0], 1, bias=final[1])

    def forward(self, coords, feats, tables=None):
        """coords (M, 4) int64 (batch, x, y, z), feats (M, in_channels) -> (M, planes[-1]).

        tables: what `plan` makes of coords, if somebody did so in advance.
        """
        expected = (len(coords), self.options["in_channels"])
        if feats.shape != expected:
            raise ValueError(f"feats must be {expected}, got {tuple(feats.shape)}")
        tables = self.plan(coords) if tables is None else tables
        # nN: neighbors at stride N; dN: down from stride N
        zeros = {}
        maps = [KernelMap(*pair, zeros) for pair in tables]
        n0, n1, d1, n2, d2, n4, d4, n8, d8, n16 = maps

        stem = norm_relu(self.bn0, self.conv0p1s1(feats, n0))
        skip2 = self.block1(norm_relu(self.bn1, self.conv1p1s2(stem, d1)), n2)
        skip4 = self.block2(norm_relu(self.bn2, self.conv2p2s2(skip2, d2)), n4)
        skip8 = self.block3(norm_relu(self.bn3, self.conv3p4s2(skip4, d4)), n8)
        x = self.block4(norm_relu(self.bn4, self.conv4p8s2(skip8, d8)), n16)

        x = norm_relu(self.bntr4, self.convtr4p16s2(x, d8, transposed=True))
        x = self.block5(torch.cat((x, skip8), 1), n8)
        x = norm_relu(self.bntr5, self.convtr5p8s2(x, d4, transposed=True))
        x = self.block6(torch.cat((x, skip4), 1), n4)
        x = norm_relu(self.bntr6, self.convtr6p4s2(x, d2, transposed=True))
        x = self.block7(torch.cat((x, skip2), 1), n2)
        x = norm_relu(self.bntr7, self.convtr7p2s2(x, d1, transposed=True))
        return self.final(self.block8(torch.cat((x, stem), 1), n1))


# ----------------------------------------------------------------------------------------------- points

# what a network sees of a color c in [0, 1]: (c - mean) / std; None: ones, it sees no color
COLORS = {"signed": (0.5, 0.5), "centered": (0.5, 1.0), "raw": (0.0, 1.0), "ones": None,
          "scannet": ((0.47793125906962, 0.4303257521323044, 0.3749598901421883),
                      (0.2834475483823543, 0.27566157565723015, 0.27018971370874995))}
COLORS["centred"] = COLORS["centered"]  # as older checkpoints spell it


def plan_points(batch, voxel_size, plan=None):
    """What depends on the coordinates of a batch alone, which need not wait for the step before.

    A dict of coords (M, 4) and point_to_voxel (N,), see `voxelize`, and made: [plan(coords)], if there is one.
    """
    scene = batch.get("scene", batch["batch"])  # see data.mix_scenes
    coords, point_to_voxel = voxelize(batch["coords"], scene, voxel_size)
    made = [plan(coords)] if plan else []
    return {"coords": coords, "point_to_voxel": point_to_voxel, "made": made}


class PointEncoder(nn.Module):
    """A network of voxels for points: averages their features per voxel, gives each its voxel's output.

    voxel_size: in meters. in_channels: F, the channels of the point features. out_channels: if the
    network's differ, a linear layer maps the voxels to out_channels; None: the network's. build: makes a
    module (coords (M, 4), feats (M, F)) -> (M, its out_channels) of in_channels and options; one with a
    function `plan` is called with plan(coords), too.
    color_mean, color_std: the network sees (features - color_mean) / color_std, numbers or sequences of F
    numbers; None: it sees ones, whatever the features. COLORS has those of other projects.
    """

    def __init__(self, voxel_size, in_channels=3, out_channels=96, color_mean=0.5, color_std=0.5,
                 build=Res16UNet34C, **options):
        super().__init__()
        self.in_channels = in_channels
        self.sees_features = color_mean is not None
        if not self.sees_features:
            color_mean = color_std = 1.0
        self.register_buffer("color_mean", torch.tensor(color_mean), persistent=False)
        self.register_buffer("color_std", torch.tensor(color_std), persistent=False)
        self.backbone = build(in_channels, **options)
        plan = getattr(self.backbone, "plan", None)
        self.plan = partial(plan_points, voxel_size=voxel_size, plan=plan)
        width = self.backbone.out_channels
        self.out_channels = out_channels or width
        self.project = nn.Identity()
        if width != self.out_channels:
            self.project = nn.Linear(width, self.out_channels)

    def forward(self, batch):
        """A dict of coords (N, 3) in meters, features (N, F), batch (N,) int64 -> (N, out_channels).

        "plan": what `plan` makes of the batch, if somebody did so in advance, as loaders do.
        """
        features = batch["features"]
        if self.sees_features:
            features = (features - self.color_mean) / self.color_std
        else:
            features = torch.ones_like(features)
        plan = batch.get("plan") or self.plan(batch)
        coords, point_to_voxel = plan["coords"], plan["point_to_voxel"]
        feats = voxel_mean(features, point_to_voxel, len(coords))         # (M, F)
        feats = self.project(self.backbone(coords, feats, *plan["made"]))  # (M, out_channels)
        # in float32, also under autocast: the gradient of a voxel is a sum over its points
        feats = feats.to(torch.promote_types(feats.dtype, torch.float32))
        # its backward adds rows in a fixed order; that of feats[point_to_voxel] is slower
        return feats.index_select(0, point_to_voxel)
