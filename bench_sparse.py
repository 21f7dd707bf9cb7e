# SPDX-License-Identifier: MIT
"""`bench.py sparse`: sparse convolution against spconv's, and the step, maps, memory and growth of Res16UNet34C.

The row of spconv is there where it is installed (pip install spconv); without it it is left out, aloud.
Imports sparse_unet.py, timing.py and torch.
"""
import importlib.util
import math

import torch

import sparse_unet
from sparse_unet import SMALL, Res16UNet34C, VoxelGrid, sparse_conv, voxelize
from timing import alone, exponent, median, turns, where


def room_cloud(voxels, points_per_cell, seed=0):
    """(voxels, 4) cells of the floor and two walls of a room, as a noisy scan of that density fills them."""
    g = torch.Generator().manual_seed(seed)
    side = math.sqrt(2 * voxels)
    count = int(2.2 * side ** 2 * points_per_cell)
    points = torch.rand(count, 3, generator=g) * torch.tensor([side, side, 0.6 * side])
    normal = torch.tensor([2, 0, 1])[torch.multinomial(torch.tensor([1, 0.6, 0.6]), count, True, generator=g)]
    points[torch.arange(count), normal] = 0
    points += 0.4 * torch.randn(count, 3, generator=g)
    coords, _ = voxelize(points, torch.zeros(count, dtype=torch.int64), 1.0)
    nearest = coords[:, 1:3].sum(1).argsort(stable=True)[:voxels]  # to the corner where the three planes meet
    return coords[nearest.sort().values]


def spconv_convolution(coords, kernel):
    """The same convolution in spconv, as a function of features, and its weight; None where it is not installed."""
    if importlib.util.find_spec("spconv") is None:
        return None
    import spconv.pytorch as spconv
    from spconv.pytorch import ops
    ops.get_current_stream = lambda: 0  # its CPU backward asks CUDA for a stream
    c_in, c_out = kernel.shape[1:]
    layer = spconv.SubMConv3d(c_in, c_out, 3, bias=False, indice_key="room", algo=spconv.ConvAlgo.Native)
    with torch.no_grad():
        layer.weight.copy_(kernel.view(3, 3, 3, c_in, c_out).permute(4, 2, 1, 0, 3))
    cells = coords - torch.cat((coords[:, :1].amin(0), coords[:, 1:].amin(0)))
    shape = (cells[:, 1:].amax(0) + 1).tolist()
    tensor = spconv.SparseConvTensor(kernel.new_zeros(len(coords), c_in), cells.int(), shape, 1)
    return (lambda feats: layer(tensor.replace_feature(feats)).features), layer.weight


def bench_convolution(repeats):
    """96 -> 96, k3, one thread (spconv's CPU rows are wrong with more), maps cached. Milliseconds by cloud and name."""
    torch.set_num_threads(1)
    panels = {}
    for cloud, voxels, density in (("sparse", 18_000, 0.35), ("dense", 24_000, 3.5)):
        coords = room_cloud(voxels, density)
        kernel_map = VoxelGrid(coords).neighbours(3)
        pairs = len(kernel_map.pairs[0])
        print(f"\nconvolution 96 -> 96, k3, 1 thread, CPU time, float32, {cloud} cloud: {voxels} voxels, "
              f"{pairs / voxels:.1f} neighbours, {pairs * 96 * 96 * 2 / 1e9:.2f} GFLOP")
        torch.manual_seed(0)
        feats = torch.randn(voxels, 96, requires_grad=True)
        kernel = (torch.randn(27, 96, 96) / 30).requires_grad_()
        cotangent = torch.randn(voxels, 96)

        def one_product(x):
            own, sparse_unet._use_im2col = sparse_unet._use_im2col, lambda *shape: True
            out = sparse_conv(x, kernel, kernel_map)
            sparse_unet._use_im2col = own
            return out

        rows = {"per offset": (lambda x: sparse_conv(x, kernel, kernel_map), kernel)}
        other = spconv_convolution(coords, kernel.detach())
        if other is None:
            print("spconv is not installed: no row of it")
        else:
            rows["spconv"] = other
            ours, theirs = rows["per offset"][0](feats), other[0](feats)
            print(f"largest difference from spconv, relative: {((ours - theirs).abs().max() / ours.abs().max()):.1e}")

        def forward(run):
            with torch.no_grad():
                run(feats)

        forwards = median(turns({name: (lambda run=run: forward(run)) for name, (run, _) in
                                 {**rows, "one product": (one_product, kernel)}.items()}, repeats))
        both = median(turns({name: (lambda r=run, w=weight: torch.autograd.grad(r(feats), (feats, w), cotangent))
                             for name, (run, weight) in rows.items()}, repeats))
        panels[f"convolution 96 -> 96, forward and backward, {cloud} cloud, ms"] = {n: s * 1e3 for n, s in both.items()}
        for name, seconds in forwards.items():
            total = f"{both[name] * 1e3:8.1f} ms, {both[name] / both['per offset']:.2f} x" if name in both else "-"
            print(f"{name:12s} forward {seconds * 1e3:8.1f} ms    forward and backward {total}")
    return panels


def training_step(net, coords, feats, optimizer, dtype=torch.float32):
    """One step on the mean square of the output; autocast for a dtype below float32."""
    with torch.autocast(feats.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = net(coords, feats).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def all_maps(coords):
    """Every map that a training step of the U-Net asks for."""
    grid = VoxelGrid(coords)
    maps = [grid.neighbours(5)]
    for _ in range(4):
        maps += [grid.neighbours(3), grid.down()]
        grid = grid.coarser
    for kernel_map in (*maps[1:], grid.neighbours(3)):
        kernel_map.pairs


def bench_network(device, repeats, threads):
    """A training step of Res16UNet34C in float32 and bfloat16, and the share of its maps."""
    torch.set_num_threads(threads)
    if device == "cuda":  # 8 scenes of 20,000
        scenes = [room_cloud(20_000, 3.0, seed=s) + torch.tensor([s, 0, 0, 0]) for s in range(8)]
        coords = torch.cat(scenes).to(device)
    else:
        coords = room_cloud(20_000, 3.0)
    torch.manual_seed(0)
    net, feats = Res16UNet34C().to(device), torch.randn(len(coords), 3, device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    candidates = {"maps": lambda: all_maps(coords)}
    for dtype in (torch.float32, torch.bfloat16):
        candidates[str(dtype)[6:]] = lambda dtype=dtype: training_step(net, coords, feats, optimizer, dtype)
    seconds = median(turns(candidates, repeats, device))
    step = seconds["float32"]
    print(f"\nRes16UNet34C training step with AdamW, {len(coords)} voxels, {where(device)}")
    print(f"float32 {step:.3f} s, of which maps {seconds['maps']:.3f} s: {seconds['maps'] / step:.1%}")
    print(f"bfloat16 autocast {seconds['bfloat16']:.3f} s: float32 takes {step / seconds['bfloat16']:.2f} x")


def two_steps():
    """Two training steps: the optimizer's state is there from the first."""
    coords, net = room_cloud(20_000, 3.0), Res16UNet34C()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for _ in range(2):
        training_step(net, coords, torch.randn(len(coords), 3), optimizer)


def bench_memory():
    """Peak of a training step in a process of its own."""
    _, before, after = alone(two_steps)
    print(f"\npeak memory of two training steps with AdamW, 20000 voxels, float32: {after:.2f} GiB resident, "
          f"{before:.2f} GiB of it before the network was built")


def bench_growth():
    """Forward and backward of the small network, maps included, over a 32-fold range of sizes."""
    torch.set_num_threads(1)
    net = Res16UNet34C(**SMALL)
    sizes, spent = [10_000 * 2 ** i for i in range(6)], []
    print("\nsmall network, forward and backward with maps, 1 thread, CPU time")
    for size in sizes:
        coords, feats = room_cloud(size, 3.0), torch.randn(size, 3)
        step = {"step": lambda: net(coords, feats).square().mean().backward()}
        spent.append(median(turns(step, 3))["step"])
        print(f"{size:7d} voxels {spent[-1]:7.3f} s")
    print(f"exponent of a log-log fit {exponent(sizes, spent):.3f}")
    return sizes, spent


def sparse(args):
    """Sparse convolution and Res16UNet34C: step, maps, memory, growth."""
    panels = {}
    if args.device == "cpu":
        panels = bench_convolution(args.repeats)
        panels["small network, forward and backward, seconds by voxels"] = {"one step": bench_growth()}
        bench_memory()
    bench_network(args.device, max(3, args.repeats // 4), args.threads)
    return panels
