# SPDX-License-Identifier: MIT
"""`python -m bench ap`: ScanNet's AP of 100 scenes of 100,000 points with 100 predictions each.

Imports torch, bench.timing and metrics.
"""
import time

import torch

from bench.timing import machine
from metrics import evaluate_instances


def random_scenes(count, points, predictions, seed=0):
    """Ground truth [(points,)] and predictions for `evaluate_instances`: 40 instances of 18 classes."""
    g = torch.Generator().manual_seed(seed)
    truth, predicted = [], []
    for _ in range(count):
        instance = torch.randint(0, 40, (points // 50,), generator=g).repeat_interleave(50)  # (points,), 50 in a row
        truth.append((instance % 18 + 1) * 1000 + instance)
        predicted.append({"masks": torch.rand(predictions, points, generator=g) < 0.03,
                          "labels": torch.randint(1, 19, (predictions,), generator=g),
                          "scores": torch.rand(predictions, generator=g)})
    return truth, predicted


def run(args, count=100, points=100_000):
    truth, predicted = random_scenes(count, points, 100)
    start = time.perf_counter()
    evaluate_instances(predicted, truth, range(1, 19))
    spent = time.perf_counter() - start
    print(f"AP of {count} scenes of {points} points: {spent:.1f} s, {machine('cpu')}")
    return {f"AP of {count} scenes, s": {"evaluate_instances": spent}}
