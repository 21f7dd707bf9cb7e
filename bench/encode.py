# SPDX-License-Identifier: MIT
"""`python -m bench encode`: spatial and global CLIP features, and dense ones too, in one pass each, against
open_clip's `encode_image`, which gives the global one alone; and the rate against a matrix product's.

Imports encoder, bench.timing and torch.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import machine, median, ratio, turns
from encoder import Enhanced2DEncoder, full_float32


def run(args, model_name="ViT-B-16"):
    device = args.device
    encoder = Enhanced2DEncoder(model_name, None).to(device)
    batch = args.batch or (256 if device == "cuda" else 4)
    images = torch.rand(batch, 3, *encoder.image_size, device=device)
    normalized = (images - encoder.mean) / encoder.std
    with FlopCounterMode(display=False) as counter:
        encoder.encode(images[:1])
    flops = counter.get_total_flops() * batch

    dtypes = [torch.float32]
    if device == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    side = 8192 if device == "cuda" else 1024
    panels = {}
    for dtype in dtypes:
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        candidates = {"encode_image": lambda: encoder.clip.encode_image(normalized),
                      "both features": lambda: encoder.encode(images),
                      "with dense ones": lambda: encoder.encode_with_dense(images),
                      "matrix product": lambda: matrix @ matrix}
        half = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), full_float32(), half:
            seconds = turns(candidates, args.repeats, device)
        spent = median(seconds)
        rate = flops / spent["both features"]
        peak = 2 * side ** 3 / spent["matrix product"]
        name = f"{model_name}, {str(dtype).removeprefix('torch.')}"
        del spent["matrix product"]
        milliseconds = {key: value / batch * 1e3 for key, value in spent.items()}
        print(f"{name}, batch {batch}, {machine(device)}: {milliseconds['both features']:.2f} ms per image, "
              f"{ratio(seconds, 'both features', 'encode_image')} of encode_image, with dense features "
              f"{ratio(seconds, 'with dense ones', 'encode_image')}; {rate / 1e12:.3f} TFLOP/s, "
              f"{rate / peak:.2f} of a product of {side} x {side} matrices")
        panels[f"{name}, ms per image"] = milliseconds
    return panels
