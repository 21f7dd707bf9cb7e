# SPDX-License-Identifier: MIT
"""Sparse 3D convolution and Res16UNet34C in plain PyTorch; imports torch alone.

A scene is the set of its occupied cells, `coords` (M, 4) int64 as (batch, x, y, z), and one feature row for each.
A convolution is a kernel and a map that says which input row meets which kernel offset at which output row:

    out[u] = sum_k kernel[k]^T in[u + offset_k * dilation * stride_in],    k = ix + K * iy + K^2 * iz

Odd kernels are centred, even ones start at 0. Stride, dilation and transposition live in the map alone, so every
layer at one resolution shares one map. Submanifold convolution after Graham et al., "3D Semantic Segmentation with
Submanifold Sparse Convolutional Networks" (CVPR 2018); network, key names and kernel layout after Choy et al.,
"4D Spatio-Temporal ConvNets" (CVPR 2019), so that checkpoints trained with MinkowskiEngine load unchanged.
"""
import math
import pickle
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

COORD_LIMIT = 2 ** 31  # cells from the origin, on either side


# ----------------------------------------------------------------------------------------------------------------
# Cells and the maps between them

def _pack(cells, low, high, margin=0):
    """cells (M, 4) -> one int64 key each, in lexicographic order, and what a step along each column adds to it.

    `margin` empty cells after each row keep an offset of up to that size from running into the next row.
    """
    extent = [high[0] - low[0] + 1, *(hi - lo + 1 + margin for lo, hi in zip(low[1:], high[1:]))]
    if math.prod(extent) >= 2 ** 63:
        raise ValueError(f"coords span {extent} cells in (batch, x, y, z): 2^63 or more in all")
    steps = [math.prod(extent[i + 1:]) for i in range(4)]
    return sum((column - lo) * step for column, lo, step in zip(cells.unbind(1), low, steps)), steps


def _unique(cells, low, high):
    """Distinct cells in lexicographic order, and the row of each given cell among them."""
    keys, steps = _pack(cells, low, high)
    keys, inverse = keys.unique(return_inverse=True)
    columns, rest = [], keys
    for lo, step in zip(low, steps):
        column = rest // step
        columns.append(column + lo)
        rest = rest - column * step
    return torch.stack(columns, 1), inverse


def voxelize(points, batch, voxel_size):
    """Cells occupied by a packed batch of points: floor(points / voxel_size).

    points (N, 3) float, in metres like voxel_size; batch (N,) int64, which sample each point is of.
    Returns coords (M, 4) int64 as (batch, x, y, z) in lexicographic order, and inverse (N,) int64, the row of coords
    that each point falls into. Raises ValueError for wrong shapes, non-finite points and cells beyond 2^31.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"points must be (N, 3) float, got {tuple(points.shape)} {points.dtype}")
    if batch.shape != points.shape[:1] or batch.dtype != torch.int64:
        raise ValueError(f"batch must be ({len(points)},) int64, got {tuple(batch.shape)} {batch.dtype}")
    if not voxel_size > 0:
        raise ValueError(f"voxel_size must be positive, got {voxel_size}")
    cells = torch.floor(points / voxel_size)
    inside = cells.abs() < COORD_LIMIT  # false for NaN, too
    if not inside.all():
        bad = (~inside).any(1).nonzero()[0].item()
        raise ValueError(f"point {bad} is {points[bad].tolist()}: not finite, or beyond 2^31 cells of {voxel_size} m")
    cells = torch.cat((batch[:, None], cells.long()), 1)
    if not len(cells):
        return cells, cells.new_empty(0)
    low, high = torch.stack(cells.aminmax(dim=0)).tolist()
    if low[0] < 0:
        raise ValueError(f"batch must not be negative, got {low[0]}")
    return _unique(cells, low, high)


def voxel_mean(feats, inverse, num_voxels):
    """Mean of feats (N, C) over the points of each voxel; inverse (N,) as from `voxelize` -> (num_voxels, C)."""
    total = feats.new_zeros(num_voxels, feats.shape[1]).index_add_(0, inverse, feats)
    return total / torch.bincount(inverse, minlength=num_voxels)[:, None]


class KernelMap:
    """Which input row each output row meets at each kernel offset; read backwards it is the map of the transpose.

    table (K^3, num_out) int64 holds rows of the input, and num_in where the cell is empty.
    """

    def __init__(self, table, num_in):
        self.table, self.num_in, self.num_out = table, num_in, table.shape[1]

    @cached_property
    def transposed_table(self):
        """(K^3, num_in): the output row that each input row goes to, and num_out where there is none."""
        rows = torch.arange(self.num_out, device=self.table.device).expand_as(self.table)
        table = self.table.new_full((len(self.table), self.num_in + 1), self.num_out)
        return table.scatter_(1, self.table, rows)[:, :-1]

    @cached_property
    def pairs(self):
        """The occupied entries, offset by offset: (in_index (P,), out_index (P,), [pairs of each offset])."""
        occupied = self.table < self.num_in
        entries = occupied.view(-1).nonzero().squeeze(1)
        return self.table.view(-1)[entries], entries % max(self.num_out, 1), occupied.sum(1).tolist()

    def blocks(self, rows, transposed=False):
        """(offset, source rows, target rows) of runs of at most `rows` pairs that share an offset."""
        source, target, sizes = self.pairs
        if transposed:
            source, target = target, source
        offsets, lengths = [], []
        for k, size in enumerate(sizes):
            for first in range(0, size, rows):
                offsets.append(k)
                lengths.append(min(rows, size - first))
        return zip(offsets, source.split(lengths), target.split(lengths))


class VoxelGrid:
    """The occupied cells of a batch at one stride, with the maps that start here, each built once.

    coords (M, 4) integer (batch, x, y, z), multiples of `stride`, of any sign and in any order (sorted ones are
    faster). Raises ValueError for wrong shapes, duplicates and values out of range.
    """

    def __init__(self, coords, stride=1):
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"coords must be (M, 4) int64 (batch, x, y, z), got {tuple(coords.shape)} {coords.dtype}")
        self.coords, self.stride = coords.long(), stride
        self.order = None
        self.box = ([0] * 4, [0] * 4)
        self._maps = {}
        if not len(coords):
            return
        self.box = low, high = torch.stack(self.coords.aminmax(dim=0)).tolist()
        if low[0] < 0 or min(low) < -COORD_LIMIT or max(high) >= COORD_LIMIT:
            raise ValueError(f"coords run from {low} to {high}: batch must be >= 0 and cells within +-2^31")
        if stride > 1 and (self.coords[:, 1:] % stride).any():
            raise ValueError(f"coords of a grid of stride {stride} must be its multiples")
        keys, _ = _pack(self.coords, low, high)
        if not (keys[1:] > keys[:-1]).all():
            keys, self.order = keys.sort()
            twins = (keys[1:] == keys[:-1]).nonzero()
            if len(twins):
                twin = self.coords[self.order[twins[0, 0]]].tolist()
                raise ValueError(f"coords hold {len(twins)} duplicates, the first is {twin}: voxelize first")

    def __len__(self):
        return len(self.coords)

    @property
    def sorted_coords(self):
        return self.coords if self.order is None else self.coords[self.order]

    @cached_property
    def coarser(self):
        """The grid at twice the stride: parents floor(c / 2s) * 2s."""
        stride = 2 * self.stride
        if not len(self):
            return VoxelGrid(self.coords, stride)
        parents = torch.cat((self.coords[:, :1], self.coords[:, 1:].div(stride, rounding_mode="floor") * stride), 1)
        low, high = (box[:1] + [c // stride * stride for c in box[1:]] for box in self.box)
        return VoxelGrid(_unique(parents, low, high)[0], stride)

    def neighbours(self, kernel_size, dilation=1):
        """KernelMap of a stride-1 convolution on these cells."""
        return self._map(self, kernel_size, dilation)

    def down(self, kernel_size=2, dilation=1):
        """KernelMap of a stride-2 convolution from these cells to `coarser`, and of its transpose back."""
        return self._map(self.coarser, kernel_size, dilation)

    def _map(self, outputs, kernel_size, dilation):
        key = (outputs.stride, kernel_size, dilation)
        if key not in self._maps:
            self._maps[key] = build_kernel_map(self, outputs, kernel_size, dilation)
        return self._maps[key]


def build_kernel_map(inputs, outputs, kernel_size, dilation=1):
    """KernelMap from one VoxelGrid to another; outputs.stride must be inputs.stride or a multiple of it.

    One binary search finds the start of a kernel column along z; the sorted keys make its other cells the next ones,
    so K^2 searches serve K^3 offsets. On one and the same grid offset k mirrors K^3 - 1 - k, which halves them again.
    """
    if kernel_size < 1 or dilation < 1 or outputs.stride % inputs.stride:
        raise ValueError(f"no map of kernel {kernel_size}, dilation {dilation} "
                         f"from stride {inputs.stride} to {outputs.stride}")
    K, num_in, num_out = kernel_size, len(inputs), len(outputs)
    shifts = [(i - K // 2 if K % 2 else i) * dilation * inputs.stride for i in range(K)]
    low, high = map(min, inputs.box[0], outputs.box[0]), map(max, inputs.box[1], outputs.box[1])
    low, high, margin = list(low), list(high), max(map(abs, shifts))
    keys, (_, x_step, y_step, _) = _pack(inputs.sorted_coords, low, high, margin)
    queries, _ = _pack(outputs.sorted_coords, low, high, margin)
    keys = torch.cat((keys, keys.new_full((1,), torch.iinfo(torch.int64).max)))
    rows = torch.arange(num_out, device=keys.device)
    mirrored = inputs is outputs and K % 2 == 1
    middle = K * K // 2
    table = keys.new_empty(K ** 3, num_out)
    for column in range(middle + 1 if mirrored else K * K):
        start = queries + (shifts[column % K] * x_step + shifts[column // K] * y_step)
        position = torch.searchsorted(keys, start + shifts[0])
        for iz in range(K // 2 if mirrored and column == middle else K):
            target = start + shifts[iz]
            if iz:
                for _ in range(dilation):  # at most that many cells lie between two steps of the column
                    position = position + (keys[position] < target)
            found = torch.where(keys[position] == target, position, num_in)
            k = column + K * K * iz
            table[k] = found
            if mirrored:
                table[-1 - k] = keys.new_full((num_in + 1,), num_in).scatter_(0, found, rows)[:-1]
    if mirrored:
        table[K ** 3 // 2] = rows
    if inputs.order is not None:
        table = torch.cat((inputs.order, inputs.order.new_tensor([num_in])))[table]
    if outputs.order is not None:
        table = torch.empty_like(table).index_copy_(1, outputs.order, table)
    return KernelMap(table, num_in)


# ----------------------------------------------------------------------------------------------------------------
# Convolution

# Values in a gathered block. On a CPU it stays in a core's cache, and the allocator keeps its pages; on a GPU the bound
# is memory: K^3 copies of the features of a large batch would not fit.
BLOCK, GPU_BLOCK = 2 ** 17, 2 ** 27


def _wide(dtype):
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _use_im2col(device, num_out, c_in, c_out):
    # On a CPU the per-offset products win because they touch only the neighbours that exist, unless their calls cost
    # more than the idle products (few rows) or a gathered row is too short to fill a cache line or two (colours).
    # On a GPU each of their calls is a launch.
    return device.type != "cpu" or c_in < 16 or num_out * c_in * c_out < 2 ** 20


def _im2col(feats, table):
    """Blocks of (rows of the output, (rows, K^3 * C) the inputs they meet)."""
    padded = torch.cat((feats, feats.new_zeros(1, feats.shape[1])))
    width = len(table) * feats.shape[1]
    rows = max(1, (BLOCK if feats.device.type == "cpu" else GPU_BLOCK) // width)
    for begin in range(0, table.shape[1], rows):
        index = table[:, begin:begin + rows].t().reshape(-1)
        yield slice(begin, begin + rows), padded.index_select(0, index).view(-1, width)


def _convolve(feats, kernel, kernel_map, transposed):
    """feats (rows, Cin), kernel (K^3, Cin, Cout) -> (rows, Cout), summed in float32 or wider."""
    num_out = kernel_map.num_in if transposed else kernel_map.num_out
    c_in, c_out = kernel.shape[1:]
    if _use_im2col(feats.device, num_out, c_in, c_out):
        out, flat = feats.new_empty(num_out, c_out), kernel.reshape(-1, c_out)
        for rows, columns in _im2col(feats, kernel_map.transposed_table if transposed else kernel_map.table):
            torch.mm(columns, flat, out=out[rows])
        return out
    out, weights = feats.new_zeros(num_out, c_out, dtype=_wide(feats.dtype)), kernel.unbind()
    for k, source, target in kernel_map.blocks(max(1, BLOCK // max(c_in, c_out)), transposed):
        out.index_add_(0, target, (feats.index_select(0, source) @ weights[k]).to(out.dtype))
    return out.to(feats.dtype)


def _kernel_grad(feats, grad, kernel_map, transposed):
    """Gradient of a kernel: feats (rows, Cin), grad (rows of the output, Cout) -> (K^3, Cin, Cout)."""
    c_in, c_out = feats.shape[1], grad.shape[1]
    out = grad.new_zeros(len(kernel_map.table), c_in, c_out, dtype=_wide(feats.dtype))
    if _use_im2col(feats.device, len(grad), c_in, c_out):
        flat = out.view(-1, c_out)
        for rows, columns in _im2col(feats, kernel_map.transposed_table if transposed else kernel_map.table):
            flat += columns.t() @ grad[rows]
        return out.to(feats.dtype)
    sums = out.unbind()
    for k, source, target in kernel_map.blocks(max(1, BLOCK // max(c_in, c_out)), transposed):
        sums[k].add_(feats.index_select(0, source).t() @ grad.index_select(0, target))
    return out.to(feats.dtype)


class _SparseConv(torch.autograd.Function):
    """Gathers again in the backward pass instead of keeping K^3 gathered copies of the features."""

    @staticmethod
    def forward(ctx, feats, kernel, kernel_map, transposed):
        ctx.save_for_backward(feats, kernel)
        ctx.map = kernel_map, transposed
        return _convolve(feats, kernel, kernel_map, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (feats, kernel), (kernel_map, transposed) = ctx.saved_tensors, ctx.map
        grad_feats = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_feats = _convolve(grad, kernel.transpose(1, 2), kernel_map, not transposed)
        if ctx.needs_input_grad[1]:
            grad_kernel = _kernel_grad(feats, grad, kernel_map, transposed)
        return grad_feats, grad_kernel, None, None


def sparse_conv(feats, kernel, kernel_map, transposed=False):
    """Sparse convolution, or its transpose over the same map; differentiable once, in feats and kernel.

    feats (num_in, Cin), kernel (K^3, Cin, Cout) of one dtype, and a KernelMap -> (num_out, Cout); transposed:
    (num_out, Cin) -> (num_in, Cout). Under autocast both go to its dtype, as in F.linear, and sums over offsets stay
    in float32. Raises ValueError where shapes or dtypes disagree.
    """
    device = feats.device.type
    if torch.is_autocast_enabled(device) and feats.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        feats, kernel = feats.to(dtype), kernel.to(dtype)
    rows = kernel_map.num_out if transposed else kernel_map.num_in
    if feats.ndim != 2 or len(feats) != rows:
        raise ValueError(f"feats must be ({rows}, Cin) for this map, got {tuple(feats.shape)}")
    expected = (len(kernel_map.table), feats.shape[1])
    if kernel.ndim != 3 or kernel.shape[:2] != expected or feats.dtype != kernel.dtype:
        raise ValueError(f"kernel must be {(*expected, 'Cout')} {feats.dtype} for feats {tuple(feats.shape)} "
                         f"on this map, got {tuple(kernel.shape)} {kernel.dtype}")
    return _SparseConv.apply(feats, kernel, kernel_map, transposed)


class SparseConv(nn.Module):
    """A kernel (K^3, Cin, Cout) without bias; the map says where it is applied.

    kernel_size 1 is a product with (Cin, Cout) and needs no map.
    """

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        shape = (in_channels, out_channels) if kernel_size == 1 else (kernel_size ** 3, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.kernel, std=math.sqrt(2 / (kernel_size ** 3 * out_channels)))  # He, fan out

    def forward(self, feats, kernel_map=None, transposed=False):
        return feats @ self.kernel if self.kernel.ndim == 2 else sparse_conv(feats, self.kernel, kernel_map, transposed)

    def extra_repr(self):
        return "x".join(map(str, self.kernel.shape))


# ----------------------------------------------------------------------------------------------------------------
# Res16UNet34C

class BatchNorm(nn.Module):
    """BatchNorm1d under the key `bn`, as in MinkowskiEngine.

    Fewer than two rows have no variance: there, in training too, the running statistics serve and stay as they are.
    A coarse level of a small scene is down to one voxel easily, and that must not end a run. A norm of another class
    put in the place of `bn` decides that itself: over several processes, the rows of all of them count.
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
    """ReLU in place: the norm keeps its input for the backward pass, not its output."""
    return F.relu(norm(x), inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions and a residual, as in ResNet-34."""

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
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Stage(nn.Sequential):
    """BasicBlocks on one grid, and so on one map."""

    def __init__(self, in_channels, out_channels, blocks):
        super().__init__(*(BasicBlock(out_channels if i else in_channels, out_channels) for i in range(blocks)))

    def forward(self, x, kernel_map):
        for block in self:
            x = block(x, kernel_map)
        return x


PLANES = (32, 64, 128, 256, 256, 128, 96, 96)
LAYERS = (2, 3, 4, 6, 2, 2, 2, 2)
SMALL = dict(planes=(32, 32, 64, 96, 64, 48, 32, 32), layers=(1,) * 8)  # the default of train.py


class Res16UNet34C(nn.Module):
    """The U-Net of ESAM, Mask3D and OpenScene: five resolutions, 37.9 M parameters with the default planes.

    forward(coords (M, 4) int64 (batch, x, y, z), feats (M, in_channels)) -> (M, planes[-1]).
    planes and layers: channels and BasicBlocks of block1 to block8. State-dict keys are MinkowskiEngine's.
    """

    def __init__(self, in_channels=3, planes=PLANES, layers=LAYERS):
        super().__init__()
        if len(planes) != 8 or len(layers) != 8:
            raise ValueError(f"planes and layers must have 8 entries, got {planes} and {layers}")
        p = planes
        self.in_channels, self.out_channels = in_channels, p[7]

        self.conv0p1s1, self.bn0 = SparseConv(in_channels, p[0], 5), BatchNorm(p[0], 0.02)
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

    def forward(self, coords, feats):
        if feats.ndim != 2 or feats.shape != (len(coords), self.in_channels):
            raise ValueError(f"feats must be ({len(coords)}, {self.in_channels}), got {tuple(feats.shape)}")
        g1 = VoxelGrid(coords)  # gN: stride N
        g2 = g1.coarser
        g4 = g2.coarser
        g8 = g4.coarser
        g16 = g8.coarser

        stem = norm_relu(self.bn0, self.conv0p1s1(feats, g1.neighbours(5)))
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
        return self.block8(torch.cat((x, stem), 1), g1.neighbours(3))


def load_res16unet34c(model, checkpoint):
    """Fill a Res16UNet34C from a checkpoint of ESAM, Mask3D or OpenScene, or from one of its own.

    checkpoint: a path, or a dict of tensors, flat or under "state_dict" or "model". What stands before
    `conv0p1s1.kernel` (`backbone.`, `model.backbone.`) is the prefix of the network: keys without it are left alone,
    and `final.*` is dropped.
    Returns one line that says what was loaded. Raises FileNotFoundError, and ValueError with the list of what is
    missing, unknown or of another shape; then nothing is loaded.
    """
    name = "checkpoint"
    if not isinstance(checkpoint, dict):
        name = str(checkpoint)
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:  # torch has one for each damage
            raise ValueError(f"{name} is no checkpoint of plain tensors; if it holds other objects and you trust it, "
                             "load it with weights_only=False and save its state_dict alone") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{name} holds a {type(checkpoint).__name__}, expected a dict of tensors")
    tensors = next((checkpoint[key] for key in ("state_dict", "model") if key in checkpoint), checkpoint)
    anchor = "conv0p1s1.kernel"
    prefixes = [key[:-len(anchor)] for key in tensors if key == anchor or key.endswith("." + anchor)]
    if len(prefixes) != 1:
        raise ValueError(f"{name} has {len(prefixes)} keys that end in {anchor}, expected one; "
                         f"its keys begin {list(tensors)[:4]}")
    prefix = prefixes[0]
    found = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
    dropped = [key for key in found if key.startswith("final.")]
    found = {key: value for key, value in found.items() if key not in dropped}
    own = model.state_dict()
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in found]
    problems += [f"unknown {key}" for key in found if key not in own]
    problems += [f"{key} is {tuple(found[key].shape)}, the model has {tuple(own[key].shape)}"
                 for key in own if key in found and found[key].shape != own[key].shape]
    if problems:
        raise ValueError(f"{name} does not fit, {len(problems)} of {len(own)} tensors:\n  " + "\n  ".join(problems))
    model.load_state_dict(found)
    return (f"{len(found)} tensors from {name}, prefix {prefix!r}, dropped {dropped or 'nothing'}, "
            f"left {len(tensors) - len(found) - len(dropped)} keys of other modules")


class PointEncoder(nn.Module):
    """A sparse U-Net as a point network: voxelise, average the colours, run, give each point its voxel's feature.

    forward(points (N, 3) in units of voxel_size, colors (N, 3) in [0, 1], batch (N,) int64) -> (N, out_channels).
    Colours enter as colors * 2 - 1. Where planes[-1] is not out_channels, a linear layer on the voxels maps them.
    """

    def __init__(self, voxel_size, out_channels=96, planes=PLANES, layers=LAYERS):
        super().__init__()
        if not voxel_size > 0:
            raise ValueError(f"voxel_size must be positive, got {voxel_size}")
        self.voxel_size, self.out_channels = voxel_size, out_channels
        self.backbone = Res16UNet34C(3, planes, layers)
        self.project = nn.Identity() if planes[-1] == out_channels else nn.Linear(planes[-1], out_channels)

    def forward(self, points, colors, batch):
        if colors.shape != points.shape:
            raise ValueError(f"colors must be {tuple(points.shape)} like points, got {tuple(colors.shape)}")
        coords, inverse = voxelize(points, batch, self.voxel_size)
        feats = self.project(self.backbone(coords, voxel_mean(colors * 2 - 1, inverse, len(coords))))
        return feats.index_select(0, inverse)  # its backward adds rows in order; that of feats[inverse] is slower
