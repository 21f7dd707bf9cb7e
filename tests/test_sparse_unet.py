# SPDX-License-Identifier: MIT
"""Sparse convolution against MinkowskiEngine's own figures, dense conv3d, finite differences and its symmetries.

tests/data holds every eighth row of what MinkowskiEngine 0.5.4 computed on a synthetic room; if the full figures lie
beside the repository, they are used instead. `value` makes the weights from their state-dict keys.
"""
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparse_unet
from helpers import refused
from sparse_unet import (SMALL, BatchNorm, PointEncoder, Res16UNet34C, VoxelGrid, sparse_conv, voxel_mean,
                         voxelize)

DATA = Path(__file__).parent / "data"
CONVOLUTIONS = ("conv_k1s1", "conv_k2s2", "conv_k3s1", "conv_k3s1d2", "conv_k5s1", "convtr_k2s2")
TINY = dict(planes=(8,) * 8, layers=(1,) * 8)


def value(key, shape, kind):
    """The tensor that belongs to a state-dict key, as the figures were made."""
    seed = zlib.crc32(key.encode()) & 0x7fffffff
    r = np.random.RandomState(seed).randn(*shape)
    if kind == "kernel":
        volume = shape[0] if len(shape) == 3 else 1
        r *= (1.6 / (shape[-2] * max(1.0, 0.35 * volume))) ** 0.5
    elif kind == "weight":
        r = 1 + 0.2 * r
    elif kind in ("bias", "running_mean"):
        r = 0.1 * r
    elif kind == "running_var":
        r = 1 + 0.3 * abs(r)
    return torch.from_numpy(r.astype(np.float32))


def load_figures(path, prefix=""):
    arrays = np.load(path)
    return {prefix + key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].ndim}


@pytest.fixture(scope="module")
def figures():
    """Of every `step`-th row of outputs and gradients, or of all if the full figures lie beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "oracle"
    if not folder.is_dir():
        return {"step": 8, **load_figures(DATA / "minkowski.npz")}
    full = {"step": 1}
    for name in (*CONVOLUTIONS, "res16unet34c"):
        full |= load_figures(folder / f"{name}.npz", f"{name}.")
    full["coords"] = full["res16unet34c.coords"]
    full["feats3"] = full["res16unet34c.feats"]
    full["feats8"] = full["conv_k3s1.in_feats"]
    return full


def error(actual, expected):
    """Largest difference relative to the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.abs().max()).item()


def lexsort(coords):
    columns = coords.numpy().T
    return torch.from_numpy(np.lexsort(columns[::-1]))


def cloud(cells, span, samples=2, seed=0):
    """Distinct random cells of any sign, unsorted."""
    g = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, samples, (cells, 1), generator=g)
    xyz = torch.randint(-span, span, (cells, 3), generator=g)
    coords = torch.cat((batch, xyz), 1).unique(dim=0)
    return coords[torch.randperm(len(coords), generator=g)]


def features_of(coords, channels=3):
    return torch.randn(len(coords), channels, dtype=torch.float64)


def surfaces(points=600, seed=0):
    """A batch of points on three walls of a room, two scenes."""
    g = torch.Generator().manual_seed(seed)
    number = torch.arange(points)
    xyz = torch.rand(points, 3, generator=g)
    xyz[number, number % 3] = 0
    colors = torch.rand(points, 3, generator=g)
    return {"coords": xyz - 0.3, "features": colors, "batch": number * 2 // points}


def encode(encoder, points):
    """The output of a PointEncoder for points of one scene, which are their own features."""
    batch = torch.zeros(len(points), dtype=torch.int64)
    return encoder({"coords": points, "features": points, "batch": batch})


@pytest.fixture(params=[64, 2000])
def algorithm(request, monkeypatch):
    """Both ways to compute a convolution, whatever the shape would choose, in blocks that several rows fill."""
    per_offset = request.param == 64
    monkeypatch.setattr(sparse_unet, "BLOCK", request.param)
    monkeypatch.setattr(sparse_unet, "MAX_PAIRS", request.param)
    monkeypatch.setattr("sparse_unet.use_im2col", lambda *shape: not per_offset)


# ---------------------------------------------------------------------- what MinkowskiEngine computes


def convolve(name, grid, feats, kernel):
    """The convolution of that name -> its output, and the coordinates of its rows."""
    if name == "convtr_k2s2":
        down = value(f"{name}.down.kernel", (8, 8, 8), "kernel")
        middle = sparse_conv(feats, down, grid.down())
        return sparse_conv(middle, kernel, grid.down(), transposed=True), grid.coords
    if name == "conv_k2s2":
        return sparse_conv(feats, kernel, grid.down()), grid.coarser.coords
    dilation = 2 if name.endswith("d2") else 1
    kernel_map = grid.neighbors(int(name[6]), dilation)
    return sparse_conv(feats, kernel.view(-1, 8, 6), kernel_map), grid.coords


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_are_those_of_minkowski_engine(figures, name, algorithm):
    coords = figures["coords"].long()
    theirs = figures.get(f"{name}.out_coords", coords).long()
    feats = figures["feats8"].clone().requires_grad_()
    shape = figures[f"{name}.grad_kernel"].shape
    kernel = value(f"{name}.kernel", shape, "kernel").requires_grad_()
    out, ours = convolve(name, VoxelGrid(coords), feats, kernel)
    rows = torch.empty(len(ours), dtype=torch.int64)  # our row of each of their coordinates
    rows[lexsort(theirs)] = lexsort(ours)
    assert torch.equal(ours[rows], theirs)
    cotangent = 10 * value(f"{name}.cotangent", out.shape, "bias")
    (out[rows] * cotangent).sum().backward()
    step = figures["step"]
    assert error(out[rows][::step], figures[f"{name}.out_feats"]) < 1e-5
    assert error(feats.grad[::step], figures[f"{name}.grad_in"]) < 1e-5
    assert error(kernel.grad, figures[f"{name}.grad_kernel"]) < 1e-5


@pytest.fixture(scope="module")
def weights():
    state = Res16UNet34C().state_dict()
    for key, tensor in state.items():
        kind = key.rpartition(".")[2]
        if tensor.ndim:
            state[key] = value(key, tensor.shape, kind)
    return state


def test_state_dict_has_the_keys_and_shapes_of_minkowski_engine(weights):
    expected = json.loads((DATA / "res16unet34c.json").read_text())["parameters"]
    assert {key: list(tensor.shape) for key, tensor in weights.items()} == expected
    parameters = [key for key in weights if key.endswith(("kernel", "weight", "bias"))]
    assert sum(weights[key].numel() for key in parameters) == 37_854_112
    assert len(expected) == 372


def test_eval_output_and_gradients_of_the_network_are_those_of_minkowski_engine(figures, weights):
    net = Res16UNet34C().eval().double()
    net.load_state_dict(weights)
    step = figures["step"]
    feats = figures["feats3"].double().requires_grad_()
    out = net(figures["coords"].long(), feats)
    cotangent = 10 * value("res16unet34c.cotangent", out.shape, "bias").double()
    (out * cotangent).sum().backward()
    assert error(out[::step], figures["res16unet34c.out_eval"]) < 1e-6
    assert error(feats.grad[::step], figures["res16unet34c.grad_in_eval"]) < 1e-6
    norms = json.loads((DATA / "res16unet34c.json").read_text())["grad_norm_eval"]
    for key, parameter in net.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[key], rel=1e-6), key


def test_train_output_and_running_statistics_are_those_of_minkowski_engine(figures, weights):
    net = Res16UNet34C()
    net.load_state_dict(weights)
    with torch.no_grad():
        out = net(figures["coords"].long(), figures["feats3"])
    assert error(out[::figures["step"]], figures["res16unet34c.out_train"]) < 1e-4
    assert error(net.bn0.bn.running_mean, figures["res16unet34c.running_mean_bn0"]) < 1e-4
    assert error(net.block8[1].norm2.bn.running_var, figures["res16unet34c.running_var_block8"]) < 1e-4


# --------------------------------------------------------------------------------- dense convolution


def dense(coords, feats, low, size):
    b, x, y, z = (coords - low).unbind(1)
    volume = feats.new_zeros(2, size, size, size, feats.shape[1])
    volume = volume.index_put((b, x, y, z), feats)
    return volume.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_both_passes_equal_dense_conv3d_and_its_transpose(K, stride, dilation, algorithm):
    grid = VoxelGrid(cloud(300, 5, seed=K))
    outputs = grid if stride == 1 else grid.coarser
    kernel_map = grid.neighbors(K, dilation) if stride == 1 else grid.down(K, dilation)
    reach = K // 2 * dilation  # of the kernel, beyond the cells
    low = torch.tensor([0, *[-6 - reach] * 3])
    first = torch.tensor([0, *[-reach * (K % 2)] * 3])
    kernel = torch.randn(K ** 3, 3, 2, dtype=torch.float64, requires_grad=True)
    cube = kernel.view(K, K, K, 3, 2).permute(2, 1, 0, 3, 4)  # z, y, x -> x, y, z
    for transposed, source, target in ((False, grid, outputs), (True, outputs, grid)):
        feats = features_of(source.coords).requires_grad_()
        out = sparse_conv(feats, kernel, kernel_map, transposed)
        volume = dense(source.coords, feats, low, 12 + 2 * reach)
        if transposed:
            full = F.conv_transpose3d(volume, cube.permute(3, 4, 0, 1, 2), dilation=dilation)
        else:
            full = F.conv3d(volume, cube.permute(4, 3, 0, 1, 2), dilation=dilation)
        shift = -first if transposed else first
        b, x, y, z = (target.coords - low + shift).unbind(1)
        expected = full[b, :, x, y, z]
        assert out.shape == (len(target), 2)
        assert error(out, expected) < 1e-12
        cotangent = torch.randn_like(out)
        ours = torch.autograd.grad(out, (feats, kernel), cotangent)
        theirs = torch.autograd.grad(expected, (feats, kernel), cotangent, retain_graph=True)
        assert max(map(error, ours, theirs)) < 1e-12


def test_coarser_cells_are_the_floored_parents_at_every_stride():
    grid = VoxelGrid(cloud(400, 20))
    for stride in (2, 4, 8, 16, 32, 64):
        scale = torch.tensor([1, stride, stride, stride])
        parents = grid.coords.div(scale, rounding_mode="floor") * scale
        grid = grid.coarser
        assert grid.stride == stride
        assert torch.equal(grid.coords, parents.unique(dim=0))


# ------------------------------------------------------------------ autograd, precision, determinism


def test_a_second_derivative_is_refused_not_wrong():
    kernel_map = VoxelGrid(cloud(10, 2)).neighbors(3)
    feats = torch.randn(kernel_map.num_in, 2, requires_grad=True)
    kernel = torch.randn(27, 2, 3, requires_grad=True)
    out = sparse_conv(feats, kernel, kernel_map).square().sum()
    grad, = torch.autograd.grad(out, feats, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_backward_pass_keeps_only_features_and_kernel():
    kernel_map, saved = VoxelGrid(cloud(200, 4)).neighbors(3), []
    feats = torch.randn(kernel_map.num_in, 16, requires_grad=True)
    kernel = torch.randn(27, 16, 8, requires_grad=True)

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_conv(feats, kernel, kernel_map)
    assert sorted(saved) == sorted((feats.numel(), kernel.numel()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype_and_sums_over_offsets_in_float32(dtype, algorithm):
    cells = torch.arange(3)
    full = torch.cartesian_prod(cells[:1], cells, cells, cells)
    kernel_map = VoxelGrid(full).neighbors(3)
    large = 2.0 ** (1 - math.log2(torch.finfo(dtype).eps))  # large + 1 is large, in this dtype
    kernel = torch.ones(27, 1, 1)
    kernel[0] = large
    with torch.autocast("cpu", dtype=dtype):
        out = sparse_conv(torch.ones(27, 1), kernel, kernel_map)
    center = out[13].item()
    assert out.dtype == dtype
    assert center == torch.tensor(large + 26).to(dtype).item() != large


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32_in_both_passes(dtype, algorithm):
    kernel_map = VoxelGrid(cloud(300, 4)).neighbors(3)
    feats = torch.randn(kernel_map.num_in, 16, requires_grad=True)
    kernel = torch.randn(27, 16, 8, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = sparse_conv(feats, kernel, kernel_map).float()
        grads = torch.autograd.grad(out.square().mean(), (feats, kernel))
        assert {grad.dtype for grad in grads} == {torch.float32}
        results.append((out, *grads))
    for exact, low in zip(*results):
        assert error(low, exact) < 4 * torch.finfo(dtype).eps


def test_the_gradient_of_a_voxel_is_summed_over_its_points_in_float32_under_autocast():
    """In bfloat16 a sum of ones stops at 256; a CPU adds wider by itself, a GPU only if what it adds is float32."""
    seen = []

    def listen(module, inputs, output):
        output.register_hook(seen.append)

    encoder = PointEncoder(0.1, out_channels=8, **TINY)
    encoder.backbone.register_forward_hook(listen)
    x = torch.tensor([0.05, 0.15]).repeat(1000)[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encode(encoder, torch.cat((x, 0 * x, 0 * x), 1))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    assert (seen[0] == 1000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_step_twice_is_bit_exact(dtype):
    batch = surfaces(1000)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        encoder = PointEncoder(0.05, **SMALL)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = encoder(batch)
        out.float().square().mean().backward()
        runs.append([out, *(p.grad for p in encoder.parameters())])
    assert all(map(torch.equal, *runs))


# ---------------------------------------------------------------------------- symmetries of the network


@pytest.fixture(scope="module")
def network():
    """A narrow network in float64 with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = Res16UNet34C(**TINY).double()
    coords = cloud(500, 12)
    for _ in range(3):
        net(coords, features_of(coords))
    return net.eval()


def test_translation_by_the_total_stride_commutes(network):
    coords = cloud(400, 12, seed=1)
    feats = features_of(coords)
    expected = network(coords, feats)
    by_strides, by_half = torch.tensor([[0, 16, -48, 160], [0, 8, 0, 0]])
    assert error(network(coords + by_strides, feats), expected) < 1e-12
    assert error(network(coords + by_half, feats), expected) > 1e-3


@pytest.mark.parametrize("train", [False, True])
def test_permuted_voxels_permute_the_output_and_samples_do_not_meet(network, train):
    coords = cloud(400, 12, seed=2)
    feats = features_of(coords)
    order = torch.randperm(len(coords))
    first = coords[:, 0] == 0
    network.train(train)
    out = network(coords, feats)
    permuted = network(coords[order], feats[order])
    network.eval()
    assert error(permuted, out[order]) < 1e-9
    if not train:
        assert error(network(coords[first], feats[first]), out[first]) < 1e-12


# --------------------------------------------------------------------------------- voxels and encoder


def test_voxelize_floors_and_gives_each_point_its_cell():
    points = torch.rand(500, 3, dtype=torch.float64) * 3 - 1.5
    batch = torch.arange(500) // 200
    coords, inverse = voxelize(points, batch, 0.2)
    xyz = torch.floor(points / 0.2).long()
    cells = torch.cat((batch[:, None], xyz), 1)
    assert torch.equal(coords[inverse], cells)
    assert torch.equal(coords, cells.unique(dim=0))
    feats = torch.rand(500, 4, dtype=torch.float64)
    mean = voxel_mean(feats, inverse, len(coords))
    for row in range(len(coords)):
        torch.testing.assert_close(mean[row], feats[inverse == row].mean(0))


def test_a_box_of_two_to_the_twenty_cells_a_side_is_resolved():
    side = 2 ** 20
    ends = torch.tensor([-side // 2, side // 2 - 1])
    corners = torch.cartesian_prod(ends, ends, ends).repeat(4, 1)
    batch = torch.arange(4).repeat_interleave(8)
    coords, inverse = voxelize((corners.double() + 0.5) * 0.25, batch, 0.25)
    assert len(coords) == 32
    assert torch.equal(coords[inverse][:, 1:], corners)
    table = VoxelGrid(coords).neighbors(3).table
    assert (table < 32).sum() == 32  # every cell meets itself alone


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("points", [0, 1, 2])
def test_an_encoder_takes_no_point_one_point_and_two(points, train):
    encoder = PointEncoder(0.1, **TINY).train(train)
    out = encode(encoder, torch.rand(points, 3))
    assert out.shape == (points, 96) and out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_one_voxel_is_normalized_with_running_statistics_and_leaves_them():
    norm = BatchNorm(3)
    norm(torch.randn(50, 3) * 2 + 1)
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    row = torch.randn(1, 3)
    in_training = norm(row)
    torch.testing.assert_close(in_training, norm.eval()(row))
    after = norm.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("channels", [3, 7])
def test_points_of_one_voxel_share_its_output_and_features_enter_as_minus_one_to_one(channels):
    batch = surfaces()
    batch["features"] = torch.rand(len(batch["coords"]), channels)
    encoder = PointEncoder(0.2, channels, **TINY).eval()
    out = encoder(batch)
    voxels, point_to_voxel = voxelize(batch["coords"], batch["batch"], 0.2)
    assert len(voxels) < len(out)
    feats = voxel_mean(2 * batch["features"] - 1, point_to_voxel, len(voxels))
    expected = encoder.project(encoder.backbone(voxels, feats))
    torch.testing.assert_close(out, expected[point_to_voxel])


def test_an_encoder_adds_a_layer_only_where_widths_differ_and_every_parameter_learns():
    alone = PointEncoder(0.1, out_channels=8, **TINY)
    assert all(key.startswith("backbone.") for key, _ in alone.named_parameters())
    encoder = PointEncoder(0.05, **SMALL)
    out = encoder(surfaces(1000))
    assert out.shape == (1000, 96)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())


# ------------------------------------------------------------------------------------------ refusals

POINTS = torch.zeros(2, 3)
BATCH = torch.zeros(2).long()


def test_points_that_are_no_points_are_named():
    for points in (POINTS[:, :2], POINTS.long()):
        with refused(r"points must be \(N, 3\) float"):
            voxelize(points, BATCH, 0.1)
    for batch in (BATCH[:1], BATCH.float()):
        with refused(r"batch_idx must be \(2,\) int64"):
            voxelize(POINTS, batch, 0.1)
    for size in (0.0, math.nan):
        with refused("voxel_size must be positive"):
            voxelize(POINTS, BATCH, size)
    for offset in (math.nan, math.inf, 1e9):
        with refused("point 1 is .*not finite, or beyond"):
            voxelize(POINTS + torch.tensor([[0], [offset]]), BATCH, 0.1)
    with refused("coords span"):
        voxelize(POINTS + torch.tensor([[0], [1e8]]), BATCH, 0.1)


@pytest.mark.parametrize("cell, message", [
    ([0, 0, 0, 0], "duplicates: voxelize first"),
    ([-1, 0, 0, 0], "batch must be >= 0"),
    ([0, 2 ** 31, 0, 0], "within"),
    ([0, 2 ** 22, 2 ** 22, 2 ** 22], "span")])
def test_coords_that_are_no_voxels_are_named(cell, message):
    coords = torch.tensor([[0, 0, 0, 0], cell])
    with refused(message):
        VoxelGrid(coords)
    for other in (coords[:, 1:], coords.float()):
        with refused(r"coords must be \(M, 4\) int64"):
            VoxelGrid(other)


def test_features_and_kernels_of_another_shape_are_named():
    kernel_map = VoxelGrid(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])).neighbors(3)
    feats, kernel = torch.ones(2, 2), torch.ones(27, 2, 2)
    for other in (kernel[:, :1], kernel[:8], kernel.double()):
        with refused("kernel must be"):
            sparse_conv(feats, other, kernel_map)
    for other in (feats[:1], feats[0]):
        with refused(r"feats must be \(2, Cin\)"):
            sparse_conv(other, kernel, kernel_map)
    with refused(r"feats must be \(2, 3\), got \(2, 2\)"):
        Res16UNet34C(**TINY)(torch.zeros(2, 4).long(), feats)
