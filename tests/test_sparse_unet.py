# SPDX-License-Identifier: MIT
"""Sparse convolution against MinkowskiEngine's own figures, dense conv3d, finite differences and its symmetries.

tests/data holds every eighth row of what MinkowskiEngine 0.5.4 computed on a synthetic room; if the full figures lie
beside the repository, they are used instead. `value` makes the weights from their state-dict keys.
"""
import functools
import gc
import itertools
import json
import math
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparse_unet
from sparse_unet import (SMALL, BatchNorm, PointEncoder, Res16UNet34C, VoxelGrid,
                         build_kernel_map, sparse_conv, voxel_mean, voxelize)

DATA = Path(__file__).parent / "data"
CONVOLUTIONS = ("conv_k1s1", "conv_k2s2", "conv_k3s1", "conv_k3s1d2", "conv_k5s1", "convtr_k2s2")
TINY = dict(planes=(8, 8, 8, 8, 8, 8, 8, 8), layers=(1,) * 8)


def value(key, shape, kind):
    """The tensor that belongs to a state-dict key, as the figures were made."""
    r = np.random.RandomState(zlib.crc32(key.encode()) & 0x7fffffff).randn(*shape)
    if kind == "kernel":
        r *= (1.6 / (shape[-2] * max(1.0, 0.35 * (shape[0] if len(shape) == 3 else 1)))) ** 0.5
    elif kind == "weight":
        r = 1 + 0.2 * r
    elif kind in ("bias", "running_mean"):
        r = 0.1 * r
    elif kind == "running_var":
        r = 1 + 0.3 * abs(r)
    return torch.from_numpy(r.astype(np.float32))


def copied_figures():
    """The figures in tests/data as one dict; `step` says that out and gradient rows are every step-th."""
    copy = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(DATA / "minkowski.npz").items()}
    return copy | {k: copy[k].long() for k in ("coords", "conv_k2s2.out_coords")}  # int16 in the file


def full_figures():
    """The figures beside the repository in the same form, or None if they are not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "oracle"
    if not folder.is_dir():
        return None
    full = {"step": torch.tensor(1)}
    for name in (*CONVOLUTIONS, "res16unet34c"):
        full |= {f"{name}.{k}": torch.from_numpy(v) for k, v in np.load(folder / f"{name}.npz").items()}
    full["coords"], full["feats3"] = full["res16unet34c.coords"], full["res16unet34c.feats"]
    full["feats8"] = full["conv_k3s1.in_feats"]
    for name in CONVOLUTIONS:
        assert torch.equal(full[f"{name}.in_coords"], full["coords"])
        assert torch.equal(full[f"{name}.in_feats"], full["feats8"])
    return full


@pytest.fixture(scope="module")
def figures():
    return full_figures() or copied_figures()


def test_the_copied_figures_are_rows_of_the_full_ones():
    copy, full = copied_figures(), full_figures()
    if full is None:
        pytest.skip("needs shared/oracle beside the repository")
    for key, tensor in copy.items():
        if key != "step":
            every = 1 if len(full[key]) == len(tensor) else copy["step"]
            assert torch.equal(full[key][::every].to(tensor.dtype), tensor), key


def error(actual, expected):
    """Largest difference relative to the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def lexsort(coords):
    return torch.from_numpy(np.lexsort(coords.numpy().T[::-1]))


def cloud(cells, span, samples=2, seed=0):
    """Distinct random cells of any sign, unsorted."""
    g = torch.Generator().manual_seed(seed)
    coords = torch.cat((torch.randint(0, samples, (cells, 1), generator=g),
                        torch.randint(-span, span, (cells, 3), generator=g)), 1).unique(dim=0)
    return coords[torch.randperm(len(coords), generator=g)]


def surfaces(points=600, seed=0):
    """A batch of points on three walls of a room, two scenes."""
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(points, 3, generator=g)
    xyz[torch.arange(points), torch.arange(points) % 3] = 0
    return {"coords": xyz - 0.3, "features": torch.rand(points, 3, generator=g),
            "batch": torch.arange(points) * 2 // points}


@pytest.fixture(params=["per offset", "one product"])
def algorithm(request, monkeypatch):
    """Both ways to compute a convolution, whatever the shape would choose, in blocks that several rows fill."""
    monkeypatch.setattr(sparse_unet, "_use_im2col", lambda *shape: request.param == "one product")
    monkeypatch.setattr(sparse_unet, "BLOCK", 64 if request.param == "per offset" else 2000)


# What MinkowskiEngine computes

@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_are_those_of_minkowski_engine(figures, name, algorithm):
    grid, step = VoxelGrid(figures["coords"]), figures["step"]
    volume = {"conv_k1s1": (), "conv_k3s1": (27,), "conv_k3s1d2": (27,), "conv_k5s1": (125,)}.get(name, (8,))
    feats = figures["feats8"].clone().requires_grad_()
    kernel = value(f"{name}.kernel", (*volume, 8, 6), "kernel").requires_grad_()
    if name == "convtr_k2s2":
        middle = sparse_conv(feats, value(f"{name}.down.kernel", (8, 8, 8), "kernel"), grid.down())
        out = sparse_conv(middle, kernel, grid.down(), transposed=True)
    elif name == "conv_k2s2":
        out = sparse_conv(feats, kernel, grid.down())
    elif name == "conv_k1s1":
        out = sparse_conv(feats, kernel[None], grid.neighbors(1))
    else:
        out = sparse_conv(feats, kernel, grid.neighbors(int(name[6]), dilation=2 if name.endswith("d2") else 1))
    ours = (grid.coarser if name == "conv_k2s2" else grid).coords
    theirs = figures.get(f"{name}.out_coords", figures["coords"]).long()
    rows = torch.empty(len(ours), dtype=torch.int64)  # our row of each of their coordinates
    rows[lexsort(theirs)] = lexsort(ours)
    assert torch.equal(ours[rows], theirs)
    (out[rows] * 10 * value(f"{name}.cotangent", out.shape, "bias")).sum().backward()
    assert error(out[rows][::step], figures[f"{name}.out_feats"]) < 1e-5
    assert error(feats.grad[::step], figures[f"{name}.grad_in"]) < 1e-5
    assert error(kernel.grad, figures[f"{name}.grad_kernel"]) < 1e-5


@pytest.fixture(scope="module")
def weights():
    return {key: value(key, tensor.shape, key.split(".")[-1]) if tensor.ndim else tensor
            for key, tensor in Res16UNet34C().state_dict().items()}


def test_state_dict_has_the_keys_and_shapes_of_minkowski_engine(weights):
    expected = json.loads((DATA / "res16unet34c.json").read_text())["parameters"]
    assert {key: list(tensor.shape) for key, tensor in weights.items()} == expected
    assert len(expected) == 372
    assert sum(p.numel() for p in Res16UNet34C().parameters()) == 37_854_112


def test_eval_output_and_gradients_of_the_network_are_those_of_minkowski_engine(figures, weights):
    net, step = Res16UNet34C().eval(), figures["step"]
    net.load_state_dict(weights)
    with torch.no_grad():
        single = net(figures["coords"], figures["feats3"])
    assert error(single[::step], figures["res16unet34c.out_eval"]) < 1e-5
    feats = figures["feats3"].double().requires_grad_()
    out = net.double()(figures["coords"], feats)
    (out * 10 * value("res16unet34c.cotangent", out.shape, "bias").double()).sum().backward()
    assert error(out[::step], figures["res16unet34c.out_eval"]) < 1e-6
    assert error(feats.grad[::step], figures["res16unet34c.grad_in_eval"]) < 1e-6
    norms = json.loads((DATA / "res16unet34c.json").read_text())["grad_norm_eval"]
    for key, parameter in net.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[key], rel=1e-6), key


def test_train_output_and_running_statistics_are_those_of_minkowski_engine(figures, weights):
    net = Res16UNet34C().train()
    net.load_state_dict(weights)
    with torch.no_grad():
        out = net(figures["coords"], figures["feats3"])
    assert error(out[::figures["step"]], figures["res16unet34c.out_train"]) < 1e-4
    assert error(net.bn0.bn.running_mean, figures["res16unet34c.running_mean_bn0"]) < 1e-4
    assert error(net.block8[1].norm2.bn.running_var, figures["res16unet34c.running_var_block8"]) < 1e-4


def test_momentum_is_small_outside_the_norms_of_the_blocks():
    norms = {name: m.bn for name, m in Res16UNet34C().named_modules() if isinstance(m, BatchNorm)}
    slow = {name for name, bn in norms.items() if bn.momentum == 0.02}
    assert len(slow) == 16
    assert {name for name in norms if "norm" not in name} == slow
    assert all(bn.momentum == 0.1 for name, bn in norms.items() if name not in slow)
    assert all(bn.eps == 1e-5 for bn in norms.values())


# Dense convolution

def dense(coords, feats, low, size):
    volume = feats.new_zeros(2, *size, feats.shape[1])
    b, x, y, z = (coords - low).unbind(1)
    return volume.index_put((b, x, y, z), feats).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("kernel_size, stride, dilation", [
    (k, s, d) for k, s, d in itertools.product((1, 2, 3, 5), (1, 2), (1, 2, 3)) if k > 1 or d == 1])
def test_both_passes_equal_dense_conv3d_and_its_transpose(kernel_size, stride, dilation, algorithm):
    K = kernel_size
    grid = VoxelGrid(cloud(300, 5, seed=K))
    outputs = grid if stride == 1 else grid.coarser
    m = grid.neighbors(K, dilation) if stride == 1 else grid.down(K, dilation)
    first = -(K // 2) * dilation if K % 2 else 0
    reach = K // 2 * dilation  # of the kernel, beyond the cells
    low = torch.tensor([0] + [-6 - reach] * 3)
    for transposed, source, target in ((False, grid, outputs), (True, outputs, grid)):
        feats = torch.randn(len(source), 3, dtype=torch.float64, requires_grad=True)
        kernel = torch.randn(K ** 3, 3, 2, dtype=torch.float64, requires_grad=True)
        out = sparse_conv(feats, kernel, m, transposed)
        volume = dense(source.coords, feats, low, [12 + 2 * reach] * 3)
        cube = kernel.view(K, K, K, 3, 2).permute(2, 1, 0, 3, 4)  # z, y, x -> x, y, z
        if transposed:
            full = F.conv_transpose3d(volume, cube.permute(3, 4, 0, 1, 2), dilation=dilation)
            at = target.coords - low - torch.tensor([0] + [first] * 3)
        else:
            full = F.conv3d(volume, cube.permute(4, 3, 0, 1, 2), dilation=dilation)
            at = target.coords - low + torch.tensor([0] + [first] * 3)
        b, x, y, z = at.unbind(1)
        expected = full[b, :, x, y, z]
        assert out.shape == (len(target), 2) and error(out, expected) < 1e-12
        cotangent = torch.randn_like(out)
        ours = torch.autograd.grad(out, (feats, kernel), cotangent)
        theirs = torch.autograd.grad(expected, (feats, kernel), cotangent)
        assert error(ours[0], theirs[0]) < 1e-12 and error(ours[1], theirs[1]) < 1e-12


def test_coarser_cells_are_the_floored_parents_at_every_stride():
    grid = VoxelGrid(cloud(400, 20))
    for stride in (2, 4, 8, 16, 32, 64):
        parents = torch.cat((grid.coords[:, :1], grid.coords[:, 1:].div(stride, rounding_mode="floor") * stride), 1)
        grid = grid.coarser
        assert grid.stride == stride and torch.equal(grid.coords, parents.unique(dim=0))


def test_a_map_far_from_the_origin_is_the_map_at_the_origin():
    coords = cloud(300, 6)
    near = VoxelGrid(coords)
    far = VoxelGrid(coords + torch.tensor([3, 2 ** 30, -2 ** 30, 2 ** 30 + 2]))
    assert torch.equal(near.neighbors(3).table, far.neighbors(3).table)
    assert torch.equal(near.down().table, far.down().table)


def test_neighbours_never_run_over_the_edge_of_a_row_or_a_sample():
    full = torch.cartesian_prod(torch.arange(2), *[torch.arange(4)] * 3)  # two full cubes
    for K, dilation in ((3, 1), (5, 1), (3, 3), (5, 2), (2, 1)):
        table = VoxelGrid(full).neighbors(K, dilation).table
        start = -(K // 2) if K % 2 else 0
        for k in range(K ** 3):
            offset = torch.tensor([0] + [(start + k // K ** i % K) * dilation for i in range(3)])
            target = full + offset
            inside = ((target[:, 1:] >= 0) & (target[:, 1:] < 4)).all(1)
            expected = torch.where(inside, (target * torch.tensor([64, 16, 4, 1])).sum(1), len(full))
            assert torch.equal(table[:, k], expected)


# Autograd, precision, determinism

@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stride, transposed", [(1, False), (2, False), (2, True)])
def test_gradients_match_finite_differences(stride, transposed, needs, algorithm):
    grid = VoxelGrid(cloud(12, 2))
    m = grid.neighbors(3) if stride == 1 else grid.down()
    rows = m.num_out if transposed else m.num_in
    feats = torch.randn(rows, 2, dtype=torch.float64, requires_grad=needs[0])
    kernel = torch.randn(m.table.shape[1], 2, 3, dtype=torch.float64, requires_grad=needs[1])
    assert torch.autograd.gradcheck(lambda f, k: sparse_conv(f, k, m, transposed), (feats, kernel))


def test_a_second_derivative_is_refused_not_wrong():
    m = VoxelGrid(cloud(10, 2)).neighbors(3)
    feats = torch.randn(m.num_in, 2, requires_grad=True)
    out = sparse_conv(feats, torch.randn(27, 2, 3, requires_grad=True), m).square().sum()
    grad, = torch.autograd.grad(out, feats, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_backward_pass_keeps_only_features_and_kernel():
    m, saved = VoxelGrid(cloud(200, 4)).neighbors(3), []
    feats, kernel = torch.randn(m.num_in, 16, requires_grad=True), torch.randn(27, 16, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sparse_conv(feats, kernel, m)
    assert sorted(saved) == sorted((feats.numel(), kernel.numel()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype_and_sums_over_offsets_in_float32(dtype, algorithm):
    full = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *[torch.arange(3)] * 3)
    m, centre = VoxelGrid(full).neighbors(3), 13
    large = 2.0 ** (1 - math.log2(torch.finfo(dtype).eps))  # large + 1 is large, in this dtype
    kernel = torch.ones(27, 1, 1)
    kernel[0] = large
    with torch.autocast("cpu", dtype=dtype):
        out = sparse_conv(torch.ones(27, 1), kernel, m)
    assert out.dtype == dtype
    assert out[centre].item() == torch.tensor(large + 26).to(dtype).item() != large


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32_in_both_passes(dtype, algorithm):
    m = VoxelGrid(cloud(300, 4)).neighbors(3)
    feats, kernel = torch.randn(m.num_in, 16), torch.randn(27, 16, 8)
    results = []
    for enabled in (False, True):
        f, k = feats.clone().requires_grad_(), kernel.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = sparse_conv(f, k, m)
        out.float().square().mean().backward()
        assert f.grad.dtype == k.grad.dtype == torch.float32
        results.append((out.float(), f.grad, k.grad))
    for exact, low in zip(*results):
        assert error(low, exact) < 4 * torch.finfo(dtype).eps


def test_the_gradient_of_a_voxel_is_summed_over_its_points_in_float32_under_autocast():
    """In bfloat16 a sum of ones stops at 256; a CPU adds wider by itself, a GPU only if what it adds is float32."""
    encoder, seen = PointEncoder(0.1, out_channels=8, **TINY), []
    encoder.backbone.register_forward_hook(lambda _, __, output: output.register_hook(seen.append) and None)
    points = torch.tensor([[0.05, 0.05, 0.05], [0.15, 0.05, 0.05]]).repeat(1000, 1)
    batch = {"coords": points, "features": torch.rand(2000, 3), "batch": torch.zeros(2000, dtype=torch.int64)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(batch)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16 and (seen[0] == 1000).all()


def test_double_stays_double_under_autocast():
    m = VoxelGrid(cloud(20, 2)).neighbors(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse_conv(torch.ones(m.num_in, 2).double(), torch.ones(27, 2, 2).double(), m).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_step_twice_is_bit_exact(dtype):
    batch = surfaces(3000)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        encoder = PointEncoder(0.05, **SMALL)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = encoder(batch)
        out.float().square().mean().backward()
        runs.append([out, *(p.grad for p in encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# Symmetries of the network

@pytest.fixture(scope="module")
def network():
    """A narrow network in float64 with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = Res16UNet34C(**TINY).double()
    coords = cloud(500, 12)
    for _ in range(3):
        net(coords, torch.randn(len(coords), 3, dtype=torch.float64))
    return net.eval()


def test_translation_by_the_total_stride_commutes(network):
    coords = cloud(400, 12, seed=1)
    feats = torch.randn(len(coords), 3, dtype=torch.float64)
    moved = coords + torch.tensor([0, 16, -48, 160])
    torch.testing.assert_close(network(moved, feats), network(coords, feats), rtol=1e-12, atol=1e-12)
    assert error(network(coords + torch.tensor([0, 8, 0, 0]), feats), network(coords, feats)) > 1e-3


@pytest.mark.parametrize("train", [False, True])
def test_permuted_voxels_permute_the_output(network, train):
    coords = cloud(400, 12, seed=2)
    feats = torch.randn(len(coords), 3, dtype=torch.float64)
    permutation = torch.randperm(len(coords))
    network.train(train)
    expected = network(coords, feats)[permutation]
    actual = network(coords[permutation], feats[permutation])
    network.eval()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_two_samples_in_a_batch_are_two_runs(network):
    coords = cloud(400, 12, seed=3)
    feats = torch.randn(len(coords), 3, dtype=torch.float64)
    together = network(coords, feats)
    for sample in (0, 1):
        mine = coords[:, 0] == sample
        torch.testing.assert_close(network(coords[mine], feats[mine]), together[mine], rtol=1e-12, atol=1e-12)


def test_each_map_is_built_once_in_a_forward(monkeypatch):
    built = []
    monkeypatch.setattr(sparse_unet, "build_kernel_map", lambda *args: built.append(args[2]) or build_kernel_map(*args))
    coords = cloud(100, 8)
    Res16UNet34C(**TINY)(coords, torch.randn(len(coords), 3))
    assert sorted(built) == [2] * 4 + [3] * 5 + [5]


# Voxels

def test_voxelize_floors_and_gives_each_point_its_cell():
    points = (torch.rand(500, 3, dtype=torch.float64) - 0.5) * 3
    batch = torch.randint(0, 3, (500,)).sort().values
    coords, inverse = voxelize(points, batch, 0.2)
    cells = torch.cat((batch[:, None], torch.floor(points / 0.2).long()), 1)
    assert torch.equal(coords[inverse], cells)
    assert torch.equal(coords, cells.unique(dim=0))
    feats = torch.rand(500, 4, dtype=torch.float64)
    mean = voxel_mean(feats, inverse, len(coords))
    for row in range(len(coords)):
        torch.testing.assert_close(mean[row], feats[inverse == row].mean(0))


def test_a_box_of_two_to_the_twenty_cells_a_side_is_resolved():
    side = 2 ** 20
    corners = torch.cartesian_prod(*[torch.tensor([-side // 2, side // 2 - 1])] * 3)
    batch = torch.arange(4).repeat_interleave(8)
    coords, inverse = voxelize((corners.double().repeat(4, 1) + 0.5) * 0.25, batch, 0.25)
    assert torch.equal(coords[inverse], torch.cat((batch[:, None], corners.repeat(4, 1)), 1)) and len(coords) == 32
    table = VoxelGrid(coords).neighbors(3).table
    assert (table < 32).sum() == 32  # every cell meets itself alone


def test_no_argument_is_changed():
    coords = cloud(50, 4)
    feats, kernel = torch.randn(len(coords), 16), torch.randn(27, 16, 16)
    batch = surfaces(100)
    arguments = [coords, feats, kernel, *batch.values()]
    before = [a.clone() for a in arguments]
    sparse_conv(feats, kernel, VoxelGrid(coords).neighbors(3))
    PointEncoder(0.1, **TINY)(batch)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))


# Few cells

@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("points", [0, 1, 2])
def test_an_encoder_takes_no_point_one_point_and_two(points, train):
    encoder = PointEncoder(0.1, **TINY).train(train)
    xyz = torch.rand(points, 3)
    out = encoder({"coords": xyz, "features": xyz, "batch": torch.zeros(points, dtype=torch.int64)})
    assert out.shape == (points, 96) and torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_one_voxel_is_normalized_with_running_statistics_and_leaves_them():
    norm = BatchNorm(3, 0.1)
    norm(torch.randn(50, 3) * 2 + 1)
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    row = torch.randn(1, 3)
    in_training = norm(row)
    torch.testing.assert_close(in_training, norm.eval()(row))
    assert all(torch.equal(before[key], tensor) for key, tensor in norm.state_dict().items())


# Point encoder

@pytest.mark.parametrize("channels", [3, 7])
def test_points_of_one_voxel_share_its_output_and_features_enter_as_minus_one_to_one(channels):
    batch = surfaces()
    batch["features"] = torch.rand(len(batch["coords"]), channels)
    encoder = PointEncoder(0.2, channels, **TINY).eval()
    out = encoder(batch)
    voxels, point_to_voxel = voxelize(batch["coords"], batch["batch"], 0.2)
    assert len(voxels) < len(out)
    feats = encoder.backbone(voxels, voxel_mean(2 * batch["features"] - 1, point_to_voxel, len(voxels)))
    torch.testing.assert_close(out, encoder.project(feats)[point_to_voxel])


def test_an_encoder_adds_a_layer_only_where_widths_differ_and_every_parameter_learns():
    assert [k for k, _ in PointEncoder(0.1, out_channels=8, **TINY).named_parameters() if "backbone" not in k] == []
    encoder = PointEncoder(0.05, **SMALL)
    out = encoder(surfaces(3000))
    assert out.shape == (3000, 96)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


# Refusals

def points(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def cells(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def small_map():
    return VoxelGrid(cells([0, 0, 0, 0], [0, 0, 0, 1])).neighbors(3)


def encode(features):
    return PointEncoder(0.1, **TINY)({"coords": torch.rand(5, 3), "features": features, "batch": torch.zeros(5).long()})


ONE, TWO = torch.zeros(1).long(), torch.zeros(2).long()


@pytest.mark.parametrize("call, message", [
    (lambda: voxelize(torch.zeros(2, 2), TWO, 0.1), r"points must be \(N, 3\) float"),
    (lambda: voxelize(torch.zeros(2, 3).long(), TWO, 0.1), "float"),
    (lambda: voxelize(torch.zeros(2, 3), ONE, 0.1), r"batch_idx must be \(2,\)"),
    (lambda: voxelize(torch.zeros(2, 3), torch.zeros(2), 0.1), "int64"),
    (lambda: voxelize(torch.zeros(2, 3), torch.tensor([0, -1]), 0.1), "negative"),
    (lambda: voxelize(torch.zeros(2, 3), TWO, 0.0), "voxel_size"),
    (lambda: voxelize(torch.zeros(2, 3), TWO, math.nan), "voxel_size"),
    (lambda: voxelize(points([0, 0, 0], [0, math.nan, 0]), TWO, 0.1), "point 1"),
    (lambda: voxelize(points([0, 0, 0], [0, math.inf, 0]), TWO, 0.1), "point 1"),
    (lambda: voxelize(points([1e9, 0, 0]), ONE, 0.1), "beyond"),
    (lambda: voxelize(torch.eye(3) * 1e8 - 1, torch.zeros(3).long(), 0.1), "span"),
    (lambda: VoxelGrid(cells([0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3])), r"1 duplicates, the first is \[0, 1, 2, 3\]"),
    (lambda: VoxelGrid(torch.zeros(3, 3).long()), r"\(M, 4\)"),
    (lambda: VoxelGrid(torch.zeros(3, 4)), "int64"),
    (lambda: VoxelGrid(cells([-1, 0, 0, 0])), "batch must be >= 0"),
    (lambda: VoxelGrid(cells([0, 2 ** 31, 0, 0])), "within"),
    (lambda: VoxelGrid(cells([0, 0, 0, 0], [0, 2 ** 22, 2 ** 22, 2 ** 22])), "span"),
    (lambda: VoxelGrid(cells([0, 1, 2, 2]), stride=2), "multiples of 2"),
    (lambda: build_kernel_map(VoxelGrid(cloud(10, 2)).coarser, VoxelGrid(cloud(10, 2)), 3), "no map"),
    (lambda: sparse_conv(torch.ones(2, 2), torch.ones(27, 3, 2), small_map()), "kernel must be"),
    (lambda: sparse_conv(torch.ones(2, 2), torch.ones(8, 2, 2), small_map()), "kernel must be"),
    (lambda: sparse_conv(torch.ones(2, 2).double(), torch.ones(27, 2, 2), small_map()), "float64"),
    (lambda: sparse_conv(torch.ones(3, 2), torch.ones(27, 2, 2), small_map()), r"feats must be \(2, Cin\)"),
    (lambda: sparse_conv(torch.ones(2), torch.ones(27, 2, 2), small_map()), r"feats must be \(2, Cin\)"),
    (lambda: Res16UNet34C(**TINY)(cloud(10, 2), torch.ones(3, 3)), "feats must be"),
    (lambda: Res16UNet34C(planes=(8,) * 7), "8 entries"),
    (lambda: encode(torch.rand(5, 4)), r"features must be \(5, 3\), got \(5, 4\)"),
    (lambda: encode(torch.rand(4, 3)), r"features must be \(5, 3\), got \(4, 3\)"),
    (lambda: PointEncoder(0, **TINY), "voxel_size")])
def test_malformed_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_map_dies_with_its_grid():
    """No reference cycle: a step's maps must not wait for the garbage collector."""
    grid = VoxelGrid(cloud(50, 3))
    feats = torch.randn(len(grid), 4, requires_grad=True)
    out = sparse_conv(feats, torch.randn(8, 4, 4, requires_grad=True), grid.down())
    sparse_conv(out, torch.randn(8, 4, 4), grid.down(), transposed=True).sum().backward()
    dead = weakref.ref(grid.down())
    gc.disable()
    try:
        del grid, out
        assert dead() is None
    finally:
        gc.enable()
