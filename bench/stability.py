# SPDX-License-Identifier: MIT
"""The stability study: CLIP consistency losses on hostile features, alone and in short trainings.

    python -m bench stability --quick            a smoke test of all of it
    python -m bench stability                    everything; goes on from the last finished training
    python -m bench stability --plot FILE.png    also draws the losses alone

It compares the loss as one would write it, -log sigmoid(cos / 0.07) with F.normalize; the same with two
patches, a temperature of at least 0.1 and logits clamped to +-10; and each variant of ClipConsCriterion.
All are measured against the bound of ClipConsCriterion's defaults on the gradient of one row of the
fused features:

    loss_weight / (rows * 0.1 * 0.1)

A row is dead if its gradient is exactly zero although its target is not. Trainings are on the built-in
rooms. Imports train, losses and support/files.
"""
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import train
from losses import CLIP_LOSSES, ClipConsCriterion
from support.files import write_whole

TEMPERATURE = ClipConsCriterion().temperature
NORM_FLOOR = ClipConsCriterion().norm_floor


def plain_loss(feat, clip, valid, temperature=0.07, clamp=math.inf):
    """feat, clip (N, C), valid (N,) bool -> scalar, in the dtype of the features."""
    logits = (F.normalize(feat) * F.normalize(clip)).sum(1) / temperature
    return -torch.log(torch.sigmoid(logits.clamp(-clamp, clamp)))[valid].mean()


PLAIN = {"naive": plain_loss,
         "clamp and floor": functools.partial(plain_loss, temperature=0.1, clamp=10.0)}
LOSSES = (*PLAIN, *(f"ours, {variant}" for variant in CLIP_LOSSES))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("ordinary", "constant rows", "zero rows", "tiny rows", "huge rows", "inf in rows", "zero targets",
         "inf in targets", "no valid point", "one point")


# -------------------------------------------------------------------------------- losses alone


def corrupt(kind, feat, clip, valid, every, tiny=1e-7, huge=1e30):
    """Copies of feat (N, C), clip (N, C) and valid (N,) in which every `every`-th row is of that kind.

    The gradient passes straight through to feat: a layer can put out a row of zeros without having a
    slope of zero. tiny: norm of a tiny row; huge: largest entry of a huge row.
    """
    rows = torch.arange(len(feat), device=feat.device)[:, None] % every == 0  # (N, 1)
    first_channel = torch.arange(feat.shape[1], device=feat.device) == 0  # (C,)
    value = feat.detach()
    bad = {"constant rows": torch.ones_like(value),
           "zero rows": torch.zeros_like(value),
           "tiny rows": F.normalize(value.float()) * tiny,
           "huge rows": value / value.abs().amax(1, True) * huge,
           "inf in rows": value.masked_fill(first_channel, torch.inf)}
    feat = bad.get(kind, value).where(rows, value) + (feat - value)
    if kind == "zero targets":
        clip = clip.masked_fill(rows, 0)
    elif kind == "inf in targets":
        clip = clip.masked_fill(rows & first_channel, torch.inf)
    elif kind == "no valid point":
        valid = torch.zeros_like(valid)
    elif kind == "one point":
        return feat[:1], clip[:1], torch.ones_like(valid[:1])
    return feat, clip, valid


def gradient_norms(value, feat):
    """Norms (N,) of the gradient of `value` at the rows of feat in float64; not finite if it overflows.

    In fp16 with a loss scale that backs off like a GradScaler's: without one, the gradients of healthy
    rows underflow.
    """
    scales = (2.0 ** 15, 2.0 ** 10, 2.0 ** 5, 1.0) if feat.dtype == torch.float16 else (1.0,)
    for scale in scales:
        grad, = torch.autograd.grad(value, feat, torch.full_like(value, scale), retain_graph=True)
        if grad.isfinite().all():
            break
    return torch.linalg.vector_norm(grad.double() / scale, dim=1)


def criterion_case(loss, dtype, kind, seed, rows=256, channels=128):
    """One draw, half of its rows of that kind -> finite, largest gradient / bound, share of dead rows."""
    generator = torch.Generator().manual_seed(seed)
    feat = torch.randn(rows, channels, generator=generator)
    clip = torch.randn(rows, channels, generator=generator)
    valid = torch.rand(rows, generator=generator) < 0.9
    a, b = torch.rand(2, generator=generator).tolist()
    tiny = 10 ** (-8 + 5 * a)
    largest = math.log10(torch.finfo(dtype).max) - 0.01
    huge = 10 ** (4 + (largest - 4) * b)
    feat, clip, valid = corrupt(kind, feat, clip, valid, 2, tiny, huge)
    feat = feat.to(dtype).requires_grad_()
    clip = clip.to(dtype)

    if loss in PLAIN:
        value = PLAIN[loss](feat, clip, valid)
    else:
        _, variant = loss.split(", ")
        value, _ = ClipConsCriterion(1.0, variant=variant)(feat, clip, valid=valid)
    norms = gradient_norms(value, feat)
    finite_norms = norms[norms.isfinite()]
    used = valid & feat.isfinite().all(1) & clip.isfinite().all(1)
    bound = 1 / (max(1, int(used.sum())) * TEMPERATURE * NORM_FLOOR)
    over_bound = finite_norms.max().item() / bound if len(finite_norms) else 0.0
    pulled = norms[used & clip.any(1)]
    dead = (pulled == 0).double().mean().item() if len(pulled) else 0.0
    return bool(value.isfinite()) and len(finite_norms) == len(norms), over_bound, dead


def criterion_study(draws):
    """Prints and returns {kind: {loss: {dtype: (share finite, largest gradient / bound, share dead)}}}."""
    print("\nLosses alone, half of the rows of the kind named. finite: share of draws with finite loss and\n"
          "gradient; grad: largest finite gradient of a row / bound; dead: share of rows without gradient\n")
    columns = [f"{name:>6s} finite{'grad':>9s}{'dead':>6s}" for name in DTYPES]
    print(f"{'rows':16s}{'loss':18s}" + "".join(columns))
    table = {kind: {loss: {} for loss in LOSSES} for kind in KINDS}
    for kind, loss in itertools.product(KINDS, LOSSES):
        line = f"{kind:16s}{loss:18s}"
        for name, dtype in DTYPES.items():
            cases = [criterion_case(loss, dtype, kind, seed) for seed in range(draws)]
            finite, over_bound, dead = zip(*cases)
            finite, over_bound, dead = statistics.mean(finite), max(over_bound), statistics.mean(dead)
            table[kind][loss][name] = finite, over_bound, dead
            line += f"{finite:13.0%}{over_bound:9.1e}{dead:6.0%}"
        print(line)
    return table


# -------------------------------------------------------------------------------- short trainings

# the warm-up is 0 for a quarter of the run, 0.001 for the next, then 0.01
RECIPE = ("--rooms 32 --num-points 1024 --voxel-size 0.15 --no-instances "
          "--image-size 96,128 --clip-model ViT-S-16-alt --clip-pretrained none --workers 0 --epochs 16 "
          "--batch-size 4 --lr 4e-3 --clip-warmup 4,8 --frames-per-room 1 --log-every 4 --eval-every 1000").split()
LR_WARMUP = 10
QUICK = ("--rooms 2 --num-points 256 --voxel-size 0.3 --clip-model ViT-S-32-alt --epochs 2 "
         "--clip-warmup 0,1").split()
WEIGHT_1 = "--clip-weights 0,0.1,1"


class Setting(NamedTuple):
    """A training to make: options beside those of RECIPE, the loss, the kind of every tenth row."""
    options: str = ""
    loss: str = "ours"
    kind: str | None = None
    gradient_flow_ratio: float = 0.0


SETTINGS = {
    "3D baseline": Setting("--no-clip"),
    "CLIP loss isolated": Setting("--isolate-clip"),
    "ours": Setting(),
    "no warm-up": Setting("--clip-warmup=-1 --clip-weights 0,0.01"),
    "weight x 100": Setting(WEIGHT_1),
    "weight x 10,000, no warm-up": Setting("--clip-warmup=-1 --clip-weights 0,100"),
    "last CLIP block freed, gradient flow 0.5": Setting("--clip-blocks 1", gradient_flow_ratio=0.5),
    "point targets, weight x 100": Setting(f"--clip-target point {WEIGHT_1}"),
    "cosine, weight x 100": Setting(f"--clip-loss cosine {WEIGHT_1}"),
    "infonce, weight x 100": Setting(f"--clip-loss infonce {WEIGHT_1}"),
    "bf16": Setting("--amp bf16"),
    **{loss: Setting(loss=loss) for loss in PLAIN}}
for pair in itertools.product(("zero rows", "inf in targets", "no valid point"), (*PLAIN, "ours")):
    SETTINGS[": ".join(pair)] = Setting(kind=pair[0], loss=pair[1])


class WatchedCriterion(ClipConsCriterion):
    """A ClipConsCriterion that can compute a plain loss instead, on rows of which every tenth is hostile.

    over_bound: a list with one entry per call, the largest gradient of a row over the bound; NaN if the
    loss or the gradient is not finite. options: of ClipConsCriterion.
    """

    def __init__(self, loss="ours", kind=None, **options):
        super().__init__(1.0, **options)
        self.loss = loss
        self.kind = kind
        self.over_bound = []

    def forward(self, feat_fusion, clip_feat, batch=None, valid=None, seed=None):
        if batch is not None and (self.loss in PLAIN or self.kind):
            clip_feat = clip_feat[batch]  # (N, C)
            batch = None
        # about one step in four has no valid point; its data decide, so that repeated passes agree
        is_hit = self.kind != "no valid point" or int(clip_feat.detach().sum()) % 4 == 0
        if self.kind and is_hit:
            feat_fusion, clip_feat, valid = corrupt(self.kind, feat_fusion, clip_feat, valid, 10)
        feat = feat_fusion.view_as(feat_fusion)  # gradients of other losses do not pass through this view
        if self.loss in PLAIN:
            value = PLAIN[self.loss](feat, clip_feat, valid)
            used = valid.sum()
            counts = torch.stack([used, used * 0, used * 0])
        else:
            value, counts = super().forward(feat, clip_feat, batch, valid, seed)
        grad, = torch.autograd.grad(value, feat, retain_graph=True)
        norms = torch.linalg.vector_norm(grad.double(), dim=1)
        bound = 1 / (max(1, int(counts[0])) * TEMPERATURE * NORM_FLOOR)
        self.over_bound.append(norms.max().item() / bound if value.isfinite() else math.nan)
        return value, counts


def training_run(argv, setting):
    """One training -> what the study keeps of it, for the JSON; error is None if it came to its end."""
    args = train.parse_args(argv)
    criterion = WatchedCriterion(setting.loss, setting.kind, temperature=args.temperature,
                                 variant=args.clip_loss, gradient_flow_ratio=setting.gradient_flow_ratio)
    miou = error = None
    start = time.process_time()
    with (tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere,
          mock.patch.dict(train.CONSTANTS, lr_warmup=LR_WARMUP), contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        try:
            miou = train.main([*argv, "--runs", runs], clip_criterion=criterion)["miou"]
        except FloatingPointError as lost:  # the subject of the study
            error = str(lost)
        run = next(Path(runs).iterdir())
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        logged = {}
        for tag in events.Tags()["scalars"]:
            logged[tag] = [event.value for event in events.Scalars(tag)]
    record = {"miou": miou,
              "error": error,
              "bad_steps": logged.get("guard/bad_steps", [0])[-1],
              "over_bound": max(filter(math.isfinite, criterion.over_bound), default=None),
              "cpu_seconds": round(time.process_time() - start, 1)}
    for name in ("effective_rank", "clip_cosine"):
        record[name] = statistics.mean(logged.get(f"fusion/{name}", [math.nan])[-3:])
    return record


def training_study(args, finished, save):
    """Adds to `finished`, {name: {seed: record}}, the runs that it does not hold with these options."""
    recipe = [*RECIPE, *QUICK] if args.quick else RECIPE
    names = ["ours", "inf in targets: naive"] if args.quick else SETTINGS
    for seed, name in itertools.product(range(1 if args.quick else args.seeds), names):
        setting = SETTINGS[name]
        argv = [*recipe, *setting.options.split(), "--seed", str(seed), "--device", args.device]
        done = finished.setdefault(name, {}).get(str(seed), {})
        if done.get("argv") == argv:
            continue
        record = training_run([*argv, "--cache", str(Path(args.out) / "cache")], setting)
        finished[name][str(seed)] = {"argv": argv, **record}
        save()
        score = "lost" if record["error"] else f"{record['miou']:.3f}"
        print(f"{name}, seed {seed}: {score}", flush=True)


def mean_and_std(values, digits):
    """"mean +- standard deviation", "-" without values."""
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def print_training(finished):
    """One line per setting."""
    print("\nTrainings, mean +- standard deviation over seeds. finished: came to their end; bad: steps\n"
          "skipped; grad: as above; mIoU: also less that of the 3D baseline of the same seed, and of fusion\n"
          "with the CLIP loss isolated; rank: effective rank; cosine: with the CLIP feature of the scene\n")
    print(f"{'setting':30s}{'finished':>9s}{'bad':>4s}{'grad':>9s}{'mIoU':>16s}{'- baseline':>17s}"
          f"{'- isolated':>17s}{'rank':>14s}{'cosine':>8s}")
    for name, records in finished.items():
        done = {seed: record for seed, record in records.items() if record["error"] is None}
        columns = {key: [record[key] for record in done.values()]
                   for key in ("bad_steps", "miou", "effective_rank", "clip_cosine")}
        grads = [record["over_bound"] for record in records.values() if record["over_bound"] is not None]
        line = f"{name:30s}{len(done):>7d}/{len(records)}{sum(columns['bad_steps']):4.0f}"
        line += f"{max(grads):9.1e}" if grads else f"{'-':>9s}"
        line += f"{mean_and_std(columns['miou'], 3):>16s}"
        for reference in ("3D baseline", "CLIP loss isolated"):
            base = {seed: record["miou"] for seed, record in finished.get(reference, {}).items()}
            both = [seed for seed in done if base.get(seed) is not None]
            gains = [done[seed]["miou"] - base[seed] for seed in both]
            line += f"{mean_and_std(gains, 3):>17s}"
        line += f"{mean_and_std(columns['effective_rank'], 1):>14s}"
        print(line + f"{statistics.mean(columns['clip_cosine'] or [math.nan]):8.2f}")


# -------------------------------------------------------------------------------- figure and command


def plot_losses(table, path):
    """A cell per loss, dtype and kind; the worst that happened gives its color."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    lines = list(itertools.product(LOSSES, DTYPES))
    kinds = list(table)
    for y, x in itertools.product(range(len(lines)), range(len(kinds))):
        loss, dtype = lines[y]
        finite, over_bound, dead = table[kinds[x]][loss][dtype]
        if finite < 1:
            color, text = "#e58a80", f"{1 - finite:.0%} NaN"
        elif over_bound > 1:
            color, text = "#f0b878", f"{over_bound:.0e}"
        elif dead > 0:
            color, text = "#c3b8e3", f"{dead:.0%} dead"
        else:
            color, text = "#dceedd", f"{over_bound:.2g}"
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(x, y, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.5, len(kinds) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds], fontsize=8)
    axes.set_yticks(range(len(lines)), ["  ".join(line) for line in lines], fontsize=7)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("largest gradient of a row / bound;   red: share of draws with NaN or inf;   "
                    "orange: beyond the bound;   violet: rows without any gradient", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(args):
    file = Path(args.out) / ("quick.json" if args.quick else "stability.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else {"trainings": {}}

    def save():
        write_whole(file, lambda part: part.write(json.dumps(results, indent=1).encode()))

    results["losses"] = criterion_study(2 if args.quick else 40)
    training_study(args, results["trainings"], save)
    save()
    print_training({name: results["trainings"][name] for name in SETTINGS if name in results["trainings"]})
    if args.plot:
        plot_losses(results["losses"], args.plot)
