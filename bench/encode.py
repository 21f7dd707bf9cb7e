# SPDX-License-Identifier: MIT
"""`python -m bench encode`: `Enhanced2DEncoder.encode`, which gives spatial and global features, and
`encode_with_dense`, which gives dense ones too, against open_clip's `encode_image`, which gives the global one alone; and
the rate against a matrix product's.

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

    panels = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32,):
        side = 8192 if device == "cuda" else 1024
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        candidates = {"encode_image": lambda: encoder.clip.encode_image(normalized),
                      "both features": lambda: encoder.encode(images),
                      "with dense ones": lambda: encoder.encode_with_dense(images),
                      "matrix product": lambda: matrix @ matrix}
        with torch.no_grad(), full_float32(images.device), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            seconds = turns(candidates, args.repeats, device)
        spent = median(seconds)
        rate = flops / spent["both features"]
        peak = 2 * side ** 3 / spent["matrix product"]
        name = f"{model_name}, {str(dtype).removeprefix('torch.')}"
        print(f"{name}, batch {batch}, {machine(device)}: {spent['both features'] / batch * 1e3:.2f} ms per image, "
              f"{ratio(seconds, 'both features', 'encode_image')} of encode_image, with dense features "
              f"{ratio(seconds, 'with dense ones', 'encode_image')}; {rate / 1e12:.3f} TFLOP/s, "
              f"{rate / peak:.2f} of a product of {side} x {side} matrices")
        panels[f"{name}, ms per image"] = {
            name: spent[name] / batch * 1e3 for name in ("encode_image", "both features", "with dense ones")}
    return panels
