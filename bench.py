# SPDX-License-Identifier: MIT
"""Side-by-side timings, each against a figure that somebody else's code gives on the same input.

    python bench.py sparse                       # sparse convolution and Res16UNet34C on a CPU
    python bench.py sparse --device cuda         # the network alone, float32 against bfloat16
    python bench.py encode                       # spatial and global features against open_clip's encode_image
    python bench.py sample                       # points into feature maps against a loop of grid_sample
    python bench.py ap                           # ScanNet AP of many large scenes

`sparse` compares with spconv where it is installed (pip install spconv); without it that row is left out, aloud.
Candidates take turns in one process, and the figures are medians. What runs in one thread is given in CPU time, which
other work on the machine disturbs least; read ratios rather than milliseconds all the same.
"""
import argparse
import importlib.util
import math
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch

import sparse_unet
from encoder import Enhanced2DEncoder
from fusion import sample_features
from metrics import evaluate_instances
from sparse_unet import SMALL, Res16UNet34C, VoxelGrid, sparse_conv, voxelize


def timed(candidates, repeats, device="cpu", clock=time.perf_counter):
    """Median seconds of each of {name: function}, after one warm-up, the candidates taking turns."""
    seconds = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, function in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ------------------------------------------------------------------------------------------------------- sparse U-Net

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
    """96 -> 96, k3, one thread (spconv's CPU rows are wrong with more), maps cached."""
    torch.set_num_threads(1)
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

        forwards = timed({name: (lambda run=run: forward(run)) for name, (run, _) in
                          {**rows, "one product": (one_product, kernel)}.items()}, repeats, clock=time.process_time)
        both = timed({name: (lambda run=run, weight=weight: torch.autograd.grad(run(feats), (feats, weight), cotangent))
                      for name, (run, weight) in rows.items()}, repeats, clock=time.process_time)
        for name, seconds in forwards.items():
            total = f"{both[name] * 1e3:8.1f} ms, {both[name] / both['per offset']:.2f} x" if name in both else "-"
            print(f"{name:12s} forward {seconds * 1e3:8.1f} ms    forward and backward {total}")


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
    seconds = timed(candidates, repeats, device)
    step = seconds["float32"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    print(f"\nRes16UNet34C training step with AdamW, {len(coords)} voxels, {where}")
    print(f"float32 {step:.3f} s, of which maps {seconds['maps']:.3f} s: {seconds['maps'] / step:.1%}")
    print(f"bfloat16 autocast {seconds['bfloat16']:.3f} s: float32 takes {step / seconds['bfloat16']:.2f} x")


def resident_peak():
    """GiB that this process has held at most; unlike ru_maxrss it knows nothing of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2 ** 20


def peak_of_a_step(pipe):
    """Sends the peak before the network is built and after two steps: the optimizer's state is there from the first."""
    coords = room_cloud(20_000, 3.0)
    before = resident_peak()
    net = Res16UNet34C()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for _ in range(2):
        training_step(net, coords, torch.randn(len(coords), 3), optimizer)
    pipe.send((before, resident_peak()))


def bench_memory():
    """Peak of a training step in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a fork would start with the memory of this process
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=peak_of_a_step, args=(send,))
    process.start()
    before, after = receive.recv()
    process.join()
    print(f"\npeak memory of two training steps with AdamW, 20000 voxels, float32: {after:.2f} GiB resident, "
          f"{before:.2f} GiB of it before the network was built")


def bench_growth():
    """Forward and backward of the small network, maps included, over a 32-fold range of sizes."""
    torch.set_num_threads(1)
    net = Res16UNet34C(**SMALL)
    points = []
    print("\nsmall network, forward and backward with maps, 1 thread, CPU time")
    for size in (10_000 * 2 ** i for i in range(6)):
        coords, feats = room_cloud(size, 3.0), torch.randn(size, 3)
        step = {"step": lambda: net(coords, feats).square().mean().backward()}
        seconds = timed(step, 3, clock=time.process_time)["step"]
        points.append((math.log(size), math.log(seconds)))
        print(f"{size:7d} voxels {seconds:7.3f} s")
    slope = statistics.linear_regression(*zip(*points)).slope
    print(f"exponent of a log-log fit {slope:.3f}")


def sparse(args):
    """Everything about sparse_unet.py."""
    if args.device == "cpu":
        bench_convolution(args.repeats)
        bench_growth()
        bench_memory()
    bench_network(args.device, max(3, args.repeats // 4), args.threads)


# -------------------------------------------------------------------------------------- encoder, sampler, metrics

def encode(args):
    """`Enhanced2DEncoder.encode` against `encode_image`, which gives the global feature alone."""
    encoder = Enhanced2DEncoder("ViT-B-16", None).to(args.device)
    images = torch.rand(args.batch, 3, 224, 224, device=args.device)
    normalised = (images - 0.45) / 0.27
    with torch.no_grad():
        seconds = timed({"encode_image": lambda: encoder.clip.encode_image(normalised),
                         "both features": lambda: encoder.encode(images)}, args.repeats, args.device)
    print(f"ViT-B-16, float32, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads: "
          f"{seconds['both features'] / args.batch * 1000:.0f} ms an image, "
          f"{seconds['both features'] / seconds['encode_image']:.3f} of encode_image")


def sample(args):
    """`sample_features` against one `grid_sample` a scene, both passes: 8 scenes of 20,000 points, 256 channels."""
    scenes, points, size = 8, 20_000, (240, 320)
    feature_map = torch.randn(scenes, 256, 15, 20, device=args.device, requires_grad=True)
    uv = torch.rand(scenes * points, 2, device=args.device) * torch.tensor([320.0, 240.0], device=args.device) - 0.5
    batch = torch.arange(scenes, device=args.device).repeat_interleave(points)

    def loop():
        out = []
        for scene in range(scenes):
            grid = (uv[batch == scene] + 0.5) / torch.tensor([320.0, 240.0], device=args.device) * 2 - 1
            out.append(torch.nn.functional.grid_sample(feature_map[scene:scene + 1], grid[None, :, None],
                                                       align_corners=False, padding_mode="border")[0, :, :, 0].T)
        return torch.cat(out)

    def one_call():
        return sample_features(feature_map, uv, size, batch)

    gap = (loop() - one_call()).abs().max().item()
    seconds = timed({name: lambda f=f: torch.autograd.grad(f().sum(), feature_map)
                     for name, f in (("loop", loop), ("one call", one_call))}, args.repeats, args.device)
    print(f"forward and backward, {args.device}, {torch.get_num_threads()} threads: "
          f"{seconds['one call'] * 1000:.0f} ms, {seconds['one call'] / seconds['loop']:.2f} of the loop (largest difference {gap:.0e})")


def ap(args):
    """AP of 100 scenes of 100,000 points with 100 predictions each, of 3,000 points as a rule."""
    g = torch.Generator().manual_seed(0)
    spent = time.perf_counter()
    truth, predictions = [], []
    for _ in range(100):
        blocks = torch.randint(0, 40, (100_000 // 50,), generator=g).repeat_interleave(50)
        truth.append((blocks % 18 + 1) * 1000 + blocks)
        predictions.append({"masks": torch.rand(100, 100_000, generator=g) < 0.03,
                            "labels": torch.randint(1, 19, (100,), generator=g),
                            "scores": torch.rand(100, generator=g)})
    made, spent = time.perf_counter() - spent, time.perf_counter()
    evaluate_instances(predictions, truth, range(1, 19))
    print(f"AP of 100 scenes: {time.perf_counter() - spent:.1f} s, {torch.get_num_threads()} threads "
          f"({made:.0f} s to make them up)")


def parse_args(argv=None):
    """The command, its options and their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sparse", help="sparse convolution, the U-Net's step, its maps, memory and growth")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the network")
    command.add_argument("--repeats", type=int, default=15, help="timings of a convolution; its median is shown")
    command.set_defaults(run=sparse)
    for run, repeats in ((encode, 9), (sample, 9), (ap, 1)):
        command = commands.add_parser(run.__name__, help=run.__doc__.strip().split("\n")[0])
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--batch", type=int, default=4, help="images")
        command.add_argument("--repeats", type=int, default=repeats)
        command.set_defaults(run=run)
    return parser.parse_args(argv)


def main(argv=None):
    """Runs one comparison and prints it."""
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
