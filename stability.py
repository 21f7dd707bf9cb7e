# SPDX-License-Identifier: MIT
"""The stability study: CLIP consistency losses on hostile features, alone and in short trainings on the built-in rooms.

    python bench.py stability --quick          a smoke of all of it
    python bench.py stability                  everything; stopped, it goes on where it was
    python bench.py stability --plot docs      also docs/stability_losses.png and docs/stability_training.png

Compared are the loss as one would write it, -log sigmoid(cos / 0.07) with F.normalize; the same with the two patches
tried first, temperature at least 0.1 and logits within +-10; and every variant of ClipConsCriterion. One yardstick for
all, the bound of ClipConsCriterion's defaults on the gradient of a row of the fused features:

    loss_weight / (rows * 0.1 * 0.1)

A row is dead where its gradient is exactly zero although its target is not. Imports train, losses, timing.
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
from unittest.mock import patch

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import train
from losses import CLIP_LOSSES, ClipConsCriterion
from timing import require_matplotlib

TEMPERATURE, NORM_FLOOR = ClipConsCriterion().temperature, ClipConsCriterion().norm_floor


def plain_loss(feat, clip, valid, temperature=0.07, clamp=math.inf):
    """feat, clip (N, C), valid (N,) bool -> scalar, in the dtype of the features."""
    logits = (F.normalize(feat) * F.normalize(clip)).sum(1) / temperature
    return -torch.log(torch.sigmoid(logits.clamp(-clamp, clamp)))[valid].mean()


PLAIN = {"naive": plain_loss, "clamp and floor": functools.partial(plain_loss, temperature=0.1, clamp=10.0)}
LOSSES = (*PLAIN, *(f"ours, {variant}" for variant in CLIP_LOSSES))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("ordinary", "constant rows", "zero rows", "tiny rows", "huge rows", "inf in rows", "zero targets",
         "inf in targets", "no valid point", "one point")


def corrupt(kind, feat, clip, valid, every, tiny=1e-7, huge=1e30):
    """Copies of feat (N, C), clip (N, C), valid (N,) in which every so-manieth row is of that kind.

    The gradient of feat passes straight through: a layer can put out a row of zeros without having a slope of zero.
    tiny: norm of such a row; huge: its largest entry.
    """
    rows = torch.arange(len(feat), device=feat.device)[:, None] % every == 0
    first = torch.arange(feat.shape[1], device=feat.device) == 0
    value = feat.detach()
    bad = {"constant rows": torch.ones_like(value), "zero rows": torch.zeros_like(value),
           "tiny rows": F.normalize(value.float()) * tiny, "huge rows": value / value.abs().amax(1, True) * huge,
           "inf in rows": value.masked_fill(first, torch.inf)}.get(kind, value)
    feat = bad.where(rows, value) + (feat - value)
    clip = {"zero targets": clip.masked_fill(rows, 0),
            "inf in targets": clip.masked_fill(rows & first, torch.inf)}.get(kind, clip)
    if kind == "one point":
        return feat[:1], clip[:1], torch.ones_like(valid[:1])
    return feat, clip, torch.zeros_like(valid) if kind == "no valid point" else valid


def criterion_case(loss, dtype, kind, seed, rows=256, channels=128):
    """One draw, half of its rows of that kind -> finite (bool), largest gradient over the bound, share of dead rows."""
    generator = torch.Generator().manual_seed(seed)
    feat, clip = (torch.randn(rows, channels, generator=generator) for _ in range(2))
    valid = torch.rand(rows, generator=generator) < 0.9
    a, b = torch.rand(2, generator=generator).tolist()
    most = math.log10(torch.finfo(dtype).max) - 0.01
    feat, clip, valid = corrupt(kind, feat, clip, valid, 2, tiny=10 ** (-8 + 5 * a), huge=10 ** (4 + (most - 4) * b))
    feat, clip = feat.to(dtype).requires_grad_(), clip.to(dtype)
    used = valid & feat.isfinite().all(1) & clip.isfinite().all(1)
    if loss in PLAIN:
        value = PLAIN[loss](feat, clip, valid)
    else:
        value = ClipConsCriterion(1.0, variant=loss.split(", ")[1])(feat, clip, valid=valid)
    # a loss scale that backs off as a GradScaler's: without it, gradients of healthy rows underflow in fp16
    for scale in (2.0 ** 15, 2.0 ** 10, 2.0 ** 5, 1.0) if dtype == torch.float16 else (1.0,):
        grad, = torch.autograd.grad(value, feat, torch.full_like(value, scale), retain_graph=True)
        if grad.isfinite().all():
            break
    norms = torch.linalg.vector_norm(grad.double() / scale, dim=1)
    finite, pulled = norms[norms.isfinite()], norms[used & clip.any(1)]
    bound = 1 / (max(1, int(used.sum())) * TEMPERATURE * NORM_FLOOR)
    return (bool(value.isfinite() and len(finite) == len(norms)), finite.max().item() / bound if len(finite) else 0.0,
            (pulled == 0).double().mean().item() if len(pulled) else 0.0)


def criterion_study(draws):
    """Prints and returns {kind: {loss: {dtype: (share finite, largest gradient over the bound, mean share dead)}}}."""
    print("\nLosses alone, half of the rows of the kind named. finite: share of draws with finite loss and gradient;\n"
          "grad: largest finite gradient of a row / bound; dead: share of rows without any gradient\n")
    print(f"{'rows':16s}{'loss':18s}" + "".join(f"{name:>6s} finite{'grad':>9s}{'dead':>6s}" for name in DTYPES))
    table = {kind: {loss: {} for loss in LOSSES} for kind in KINDS}
    for kind, loss in itertools.product(KINDS, LOSSES):
        for name, dtype in DTYPES.items():
            finite, over_bound, dead = zip(*(criterion_case(loss, dtype, kind, seed) for seed in range(draws)))
            table[kind][loss][name] = statistics.mean(finite), max(over_bound), statistics.mean(dead)
        print(f"{kind:16s}{loss:18s}" + "".join(f"{finite:13.0%}{over_bound:9.1e}{dead:6.0%}"
                                                for finite, over_bound, dead in table[kind][loss].values()))
    return table


# ---------------------------------------------------------------------------------------------- short trainings

# the warm-up is 0 for a quarter of the run, 0.001 for the next, then 0.01
RECIPE = ("--rooms 32 --frames-per-room 1 --points 1024 --voxel-size 0.15 --no-instances --image-size 96,128 "
          "--clip-model ViT-S-16-alt --clip-pretrained none --workers 0 --epochs 16 --batch-size 4 --lr 4e-3 "
          "--lr-warmup 10 --clip-warmup 4,8 --log-every 4 --eval-every 1000").split()
QUICK = "--rooms 2 --points 256 --voxel-size 0.3 --clip-model ViT-S-32-alt --epochs 2 --clip-warmup 0,1".split()
WEIGHT_1 = "--clip-weights 0,0.1,1"
OURS = {  # options beside those of RECIPE
    "3D baseline": "--no-clip",
    "ours": "",
    "CLIP loss isolated": "--isolate-clip",
    "no warm-up": "--clip-warmup=-1 --clip-weights 0,0.01",
    "weight x 10": "--clip-weights 0,0.01,0.1",
    "weight x 100": WEIGHT_1,
    "weight x 100, no warm-up": "--clip-warmup=-1 --clip-weights 0,1",
    "weight x 10,000, no warm-up": "--clip-warmup=-1 --clip-weights 0,100",
    "last CLIP block freed": "--clip-blocks 1",
    "freed, gradient flow 0.5": "--clip-blocks 1 --gradient-flow-ratio 0.5",
    "freed, flow 0.5, weight x 100": f"--clip-blocks 1 --gradient-flow-ratio 0.5 {WEIGHT_1}",
    "point targets": "--clip-target point",
    "point targets, weight x 100": f"--clip-target point {WEIGHT_1}",
    **{f"{name}, weight x 100": f"--clip-loss {name} {WEIGHT_1}" for name in CLIP_LOSSES if name != "sigmoid"},
    "infonce, points, weight x 100": f"--clip-loss infonce --clip-target point {WEIGHT_1}",
    **{amp: f"--amp {amp}" for amp in ("bf16", "fp16")}}
SETTINGS = {  # name: options, loss, kind of every tenth row
    **{name: (options, "ours", None) for name, options in OURS.items()},
    **{loss: ("", loss, None) for loss in PLAIN},
    **{f"naive, {amp}": (f"--amp {amp}", "naive", None) for amp in ("bf16", "fp16")},
    **{f"{kind}: {loss}": ("", loss, kind) for kind in ("zero rows", "huge rows", "inf in targets", "no valid point")
       for loss in (*PLAIN, "ours")}}


def watched(loss, kind, seen):
    """A ClipConsCriterion that computes `loss`, with every tenth row of a hostile kind, and appends to the list `seen`
    its largest gradient of a row over the bound, not finite where anything is not.
    """
    class Watched(ClipConsCriterion):
        def forward(self, feat_fusion, clip_feat, batch=None, valid=None):
            if loss in PLAIN or kind:
                clip_feat, batch = clip_feat if batch is None else clip_feat[batch], None
            # about one step in four is without a valid point: told from its data, so that a repeated pass is one too
            if kind and (kind != "no valid point" or int(clip_feat.detach().sum()) % 4 == 0):
                feat_fusion, clip_feat, valid = corrupt(kind, feat_fusion, clip_feat, valid, 10)
            feat = feat_fusion.view_as(feat_fusion)  # the head's gradient does not pass through this one
            if loss in PLAIN:
                value = self.loss_weight * PLAIN[loss](feat, clip_feat, valid)
                self.counts = torch.stack([valid.sum(), valid.sum() * 0])
            else:
                value = super().forward(feat, clip_feat, batch, valid)
            grad, = torch.autograd.grad(value, feat, retain_graph=True)
            bound = self.loss_weight / (max(1, int(self.counts[0])) * TEMPERATURE * NORM_FLOOR)
            largest = torch.linalg.vector_norm(grad.double(), dim=1).max().item() / bound
            seen.append(largest if value.isfinite() else math.nan)
            return value
    return Watched


def training_run(argv, loss, kind):
    """One training -> what the study keeps of it, for the JSON; error is None where it came to its end."""
    seen, metrics, error, start = [], {"miou": None}, None, time.process_time()
    with (tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere), patch.object(train, "ClipConsCriterion", watched(loss, kind, seen))):
        try:
            metrics = train.main([*argv, "--runs", runs])
        except FloatingPointError as lost:  # what the study is about
            error = str(lost)
        events = EventAccumulator(str(next(Path(runs).iterdir())), size_guidance={"scalars": 0})
        events.Reload()
        logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {"miou": metrics["miou"], "error": error, "bad_steps": logged.get("sentry/bad_steps", [0])[-1],
            "over_bound": max(filter(math.isfinite, seen), default=None),
            **{tag: statistics.mean(logged.get(f"fusion/{tag}", [math.nan])[-3:])
               for tag in ("effective_rank", "clip_cosine")},
            "cpu_seconds": round(time.process_time() - start, 1)}


def training_study(args, finished, save):
    """Adds to `finished`, {name: {seed: record}}, the runs that it does not hold with these options yet."""
    seeds, names = (1, ("ours", "inf in targets: naive")) if args.quick else (args.seeds, SETTINGS)
    for seed, name in itertools.product(range(seeds), names):
        options, loss, kind = SETTINGS[name]
        argv = [*RECIPE, *(QUICK if args.quick else []), *options.split(), "--seed", str(seed), "--device", args.device]
        done = finished.get(name, {}).get(str(seed), {}).get("argv") == argv
        if done or (seed and args.device == "cpu" and "fp16" in argv):  # six times slower there: once must do
            continue
        record = training_run([*argv, "--clip-cache", str(Path(args.out) / "clip")], loss, kind)
        finished.setdefault(name, {})[str(seed)] = {"argv": argv, **record}
        save()
        print(f"{name}, seed {seed}: {'lost' if record['error'] else format(record['miou'], '.3f')}", flush=True)


def print_training(finished):
    """One line a setting."""
    def spread(values, digits):
        deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}" if values else "-"

    print("\nTrainings, mean +- standard deviation over seeds. finished: came to their end; bad: steps skipped;\n"
          "grad: as above; mIoU: also less that of the same seed's 3D baseline, and of fusion with the CLIP loss\n"
          "isolated; rank: effective rank; cosine: with the scene's CLIP feature\n")
    print(f"{'setting':30s}{'finished':>9s}{'bad':>4s}{'grad':>9s}{'mIoU':>16s}{'- baseline':>17s}{'- isolated':>17s}"
          f"{'rank':>14s}{'cosine':>8s}")
    references = [{seed: record["miou"] for seed, record in finished.get(name, {}).items() if not record["error"]}
                  for name in ("3D baseline", "CLIP loss isolated")]
    for name, records in finished.items():
        done = {seed: record for seed, record in records.items() if record["error"] is None}
        mious, ranks, cosines = ([r[key] for r in done.values()] for key in ("miou", "effective_rank", "clip_cosine"))
        gains = [[record["miou"] - reference[seed] for seed, record in done.items() if seed in reference]
                 for reference in references]
        grads = [record["over_bound"] for record in records.values() if record["over_bound"] is not None]
        print(f"{name:30s}{len(done):>7d}/{len(records)}{sum(record['bad_steps'] for record in done.values()):4.0f}"
              f"{f'{max(grads):.1e}' if grads else '-':>9s}{spread(mious, 3):>16s}{spread(gains[0], 3):>17s}"
              f"{spread(gains[1], 3):>17s}{spread(ranks, 1):>14s}{statistics.mean(cosines or [math.nan]):8.2f}")


# ---------------------------------------------------------------------------------------------- plots and command


def plot(table, finished, folder):
    """stability_losses.png: the worst that happened in a cell gives its colour. stability_training.png: every run that
    came to its end is a dot.
    """
    from matplotlib import pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    lines = list(itertools.product(LOSSES, DTYPES))
    for (y, (loss, dtype)), (x, kind) in itertools.product(enumerate(lines), enumerate(table)):
        finite, over_bound, dead = table[kind][loss][dtype]
        color, text = (("#e58a80", f"{1 - finite:.0%} NaN") if finite < 1 else
                       ("#f0b878", f"{over_bound:.0e}") if over_bound > 1 else
                       ("#c3b8e3", f"{dead:.0%} dead") if dead > 0 else ("#dceedd", f"{over_bound:.2g}"))
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(x, y, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.5, len(table) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    axes.set_xticks(range(len(table)), [kind.replace(" ", "\n", 1) for kind in table], fontsize=8)
    axes.set_yticks(range(len(lines)), ["  ".join(line) for line in lines], fontsize=7)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("largest gradient of a row / bound;   red: share of draws with NaN or inf;   orange: beyond the "
                    "bound;   violet: rows without any gradient", fontsize=8)
    figure.savefig(folder / "stability_losses.png", dpi=100)

    figure, axes = plt.subplots(1, 3, figsize=(10, 0.8 + 0.2 * len(finished)), sharey=True, layout="constrained")
    lost = {name: sum(record["error"] is not None for record in records.values()) for name, records in finished.items()}
    labels = [f"{name} ({n} of {len(finished[name])} lost)" if n else name for name, n in lost.items()]
    titles = {"miou": "mIoU (grey: baseline; red: other losses)", "over_bound": "largest gradient of a row / bound",
              "effective_rank": "effective rank of fused features"}
    for ax, (key, title) in zip(axes, titles.items()):
        dots = [(record[key], y) for y, records in enumerate(finished.values()) for record in records.values()
                if record["error"] is None and record[key] is not None]
        plain = [any(loss in labels[y] for loss in PLAIN) for _, y in dots]
        ax.scatter(*zip(*dots), s=16, alpha=0.6, c=["#c0392b" if red else "#1f5fa8" for red in plain], zorder=2)
        for value in (value for value, y in dots if labels[y] == "3D baseline"):
            ax.axvline(value, color="#cccccc", lw=1, zorder=0)
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(color="#eeeeee")
    axes[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    axes[1].set_xscale("log")
    axes[1].axvline(1, color="black", lw=1)
    figure.savefig(folder / "stability_training.png", dpi=100)


def stability_options(parser):
    """Adds the study's options to a parser."""
    parser.add_argument("--quick", action="store_true", help="a smoke: two draws, two tiny runs")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the trainings")
    parser.add_argument("--out", default="runs/stability", help="folder of stability.json, whose runs are not repeated")
    parser.add_argument("--plot", metavar="FOLDER", help="where stability_losses.png and stability_training.png go")


def stability(args):
    """CLIP consistency losses on hostile features, alone and in short trainings."""
    if args.plot:
        require_matplotlib()
    torch.set_num_threads(1)
    file = Path(args.out) / ("quick.json" if args.quick else "stability.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else {"trainings": {}}

    def save():
        part = file.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1))
        os.replace(part, file)

    results["losses"] = criterion_study(2 if args.quick else 40)
    training_study(args, results["trainings"], save)
    save()
    finished = {name: results["trainings"][name] for name in SETTINGS if name in results["trainings"]}
    print_training(finished)
    if args.plot:
        plot(results["losses"], finished, Path(args.plot))
