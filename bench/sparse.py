# SPDX-License-Identifier: MIT
"""`python -m bench sparse`: sparse convolution against spconv, if it is installed; Res16UNet34C's step,
kernel maps, memory and growth. Imports sparse_unet, bench.timing and torch.
"""
import importlib.util
import math
from functools import partial

import torch

from bench.timing import exponent, in_fresh_process, machine, median, turns
from sparse_unet import SMALL, KernelMap, Res16UNet34C, VoxelGrid, plan_unet, sparse_conv, voxelize

# -------------------------------------------------------------------------------- clouds


def room_cloud(voxels, points_per_voxel, seed=0):
    """(voxels, 4) coords of the floor and two walls of a room, as a noisy scan of that density fills them."""
    g = torch.Generator().manual_seed(seed)
    side = math.sqrt(2 * voxels)
    size = torch.tensor([side, side, 0.6 * side])
    areas = torch.tensor([1, 0.6, 0.6])  # of the floor and the two walls
    normals = torch.tensor([2, 0, 1])
    count = int(2.2 * side ** 2 * points_per_voxel)
    points = torch.rand(count, 3, generator=g) * size
    plane = torch.multinomial(areas, count, True, generator=g)
    points[torch.arange(count), normals[plane]] = 0
    points += 0.4 * torch.randn(count, 3, generator=g)
    coords, _ = voxelize(points, torch.zeros(count, dtype=torch.int64), 1.0)
    from_corner = coords[:, 1:3].sum(1)  # where the three planes meet
    nearest = from_corner.argsort(stable=True)[:voxels]
    return coords[nearest.sort().values]


# -------------------------------------------------------------------------------- one convolution


def one_product(feats, kernel, kernel_map):
    """The same convolution as one gather (M, K^3 Cin) and one matrix product."""
    padded = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])  # the last row: an empty voxel
    columns = padded[kernel_map.table].flatten(1)  # (M, K^3 Cin)
    return columns @ kernel.flatten(0, 1)


def spconv_convolution(coords, kernel):
    """The same convolution in spconv as a function of features, and its weight; None without spconv."""
    if importlib.util.find_spec("spconv") is None:
        return None
    import spconv.pytorch as spconv
    from spconv.pytorch import ops
    ops.get_current_stream = lambda: 0  # its CPU backward asks CUDA for a stream
    c_in, c_out = kernel.shape[1:]
    layer = spconv.SubMConv3d(c_in, c_out, 3, bias=False, indice_key="room",
                              algo=spconv.ConvAlgo.Native)
    cube = kernel.view(3, 3, 3, c_in, c_out)
    with torch.no_grad():
        layer.weight.copy_(cube.permute(4, 2, 1, 0, 3))
    cells = coords - coords.amin(0)
    shape = (cells[:, 1:].amax(0) + 1).tolist()
    empty = kernel.new_zeros(len(coords), c_in)
    tensor = spconv.SparseConvTensor(empty, cells.int(), shape, 1)
    return (lambda feats: layer(tensor.replace_feature(feats)).features), layer.weight


CLOUDS = (("sparse", 18_000, 0.35), ("dense", 24_000, 3.5))  # name, voxels, points per voxel


def bench_convolution(repeats, clouds=CLOUDS, channels=96):
    """96 -> 96 channels, k3, kernel map given; one thread: spconv's rows are wrong with more on a CPU."""
    torch.set_num_threads(1)
    panels = {}
    for cloud, voxels, density in clouds:
        coords = room_cloud(voxels, density)
        kernel_map = VoxelGrid(coords).neighbors(3)
        pairs = sum(len(part.source) for part in kernel_map.pairs)
        print(f"\nconvolution {channels} -> {channels}, k3, 1 thread, CPU time, float32, {cloud} cloud: "
              f"{voxels} voxels, {pairs / voxels:.1f} neighbors each, "
              f"{pairs * channels ** 2 * 2 / 1e9:.2f} GFLOP")
        torch.manual_seed(0)
        feats = torch.randn(voxels, channels, requires_grad=True)
        kernel = (torch.randn(27, channels, channels) / 30).requires_grad_()
        cotangent = torch.randn(voxels, channels)
        candidates = {"sparse_conv": (lambda x: sparse_conv(x, kernel, kernel_map), kernel),
                      "one product": (lambda x: one_product(x, kernel, kernel_map), kernel)}
        spconv = spconv_convolution(coords, kernel.detach())
        if spconv is None:
            print("spconv is not installed: no row of it")
        else:
            candidates["spconv"] = spconv
            ours = sparse_conv(feats, kernel, kernel_map)
            gap = (ours - spconv[0](feats)).abs().max() / ours.abs().max()
            print(f"largest difference from spconv, relative: {gap:.1e}")

        def forward(function):
            with torch.no_grad():
                function(feats)

        def both_passes(function, weight):
            torch.autograd.grad(function(feats), (feats, weight), cotangent)

        one_pass, two_passes = {}, {}
        for name, (function, weight) in candidates.items():
            one_pass[name] = partial(forward, function)
            two_passes[name] = partial(both_passes, function, weight)
        forwards = median(turns(one_pass, repeats))
        both = median(turns(two_passes, repeats))
        for name, spent in both.items():
            print(f"{name:12s} forward {forwards[name] * 1e3:8.1f} ms    forward and backward "
                  f"{spent * 1e3:8.1f} ms, {spent / both['sparse_conv']:.2f} x")
        title = f"convolution {channels} -> {channels}, both passes, {cloud} cloud, ms"
        panels[title] = {name: spent * 1e3 for name, spent in both.items()}
    return panels


# -------------------------------------------------------------------------------- the whole network


def training_step(net, coords, feats, optimizer, dtype=torch.float32):
    """One step on the mean square of the output; with autocast for a dtype below float32."""
    with torch.autocast(feats.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = net(coords, feats).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def all_maps(coords):
    """Builds every kernel map that a training step of the U-Net asks for."""
    _, *maps = plan_unet(coords)  # the stem, of few channels, needs no pairs
    for table, num_in in maps:
        KernelMap(table, num_in).pairs


def bench_network(device, repeats, voxels=20_000):
    """A training step of Res16UNet34C in float32 and bfloat16, and the share of its kernel maps."""
    scenes = 8 if device == "cuda" else 1
    clouds = [room_cloud(voxels, 3.0, seed) for seed in range(scenes)]
    for scene, cloud in enumerate(clouds):
        cloud[:, 0] = scene
    coords = torch.cat(clouds).to(device)
    torch.manual_seed(0)
    net = Res16UNet34C().to(device)
    feats = torch.randn(len(coords), 3, device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    seconds = median(turns({
        "maps": lambda: all_maps(coords),
        "float32": lambda: training_step(net, coords, feats, optimizer),
        "bfloat16": lambda: training_step(net, coords, feats, optimizer, torch.bfloat16)}, repeats, device))
    step = seconds["float32"]
    print(f"\nRes16UNet34C training step with AdamW, {len(coords)} voxels, {machine(device)}")
    maps = seconds["maps"]
    half = seconds["bfloat16"]
    print(f"float32 {step:.3f} s, of which kernel maps {maps:.3f} s: {maps / step:.1%}")
    print(f"bfloat16 autocast {half:.3f} s: float32 takes {step / half:.2f} x")


def two_steps(voxels):
    """Two training steps, because the optimizer has its state after the first."""
    coords = room_cloud(voxels, 3.0)
    net = Res16UNet34C()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for _ in range(2):
        training_step(net, coords, torch.randn(len(coords), 3), optimizer)


def bench_memory(voxels=20_000):
    """Peak of a training step in a fresh process."""
    _, before, after = in_fresh_process(two_steps, voxels)
    print(f"\npeak memory of two training steps with AdamW, {voxels} voxels, float32: "
          f"{after:.2f} GiB resident, {before:.2f} GiB of it before the network was built")


def bench_growth(smallest=10_000, doublings=5):
    """Both passes of the small network, kernel maps included, for sizes that double -> sizes, seconds."""
    torch.set_num_threads(1)
    net = Res16UNet34C(**SMALL)
    sizes = [smallest * 2 ** i for i in range(doublings + 1)]
    spent = []
    print("\nsmall network, forward and backward with kernel maps, 1 thread, CPU time")
    for size in sizes:
        coords = room_cloud(size, 3.0)
        feats = torch.randn(size, 3)

        def step():
            net(coords, feats).square().mean().backward()

        spent.append(median(turns({"step": step}, 3))["step"])
        print(f"{size:7d} voxels {spent[-1]:7.3f} s")
    print(f"exponent of a log-log fit {exponent(sizes, spent):.3f}")
    return sizes, spent


def run(args):
    panels = {}
    if args.device == "cpu":
        panels = bench_convolution(args.repeats)
        panels["small network, forward and backward, seconds by voxels"] = {"one step": bench_growth()}
        bench_memory()
        torch.set_num_threads(args.threads)
    bench_network(args.device, max(3, args.repeats // 4))
    return panels
