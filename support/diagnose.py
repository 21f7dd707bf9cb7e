# SPDX-License-Identifier: MIT
"""Why a training goes wrong: non-finite steps, their replay, and loss terms that conflict.

`NonFiniteGuard` skips such a step, names its cause and saves it; `replay_step` runs it again, under
anomaly detection. `term_statistics` tells how the loss terms pull at the fused features,
`fusion_statistics` what fusion does to them. docs/diagnostics.md explains how to read all of it.

Imports torch.
"""
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------- the features


def effective_rank(feats: Tensor) -> Tensor:
    """How many directions centered rows use: exp of the entropy of their normalized singular values.

    feats (N, C) -> scalar in [1, C]; 1 for fewer than two distinct rows, NaN if an entry is not finite.
    Roy and Vetterli, "The effective rank", 2007.
    """
    if not feats.isfinite().all():
        return feats.new_full((), torch.nan, dtype=torch.float32)  # LAPACK would raise and end the run
    feats = feats.double() - feats.double().mean(0)
    values = torch.linalg.eigvalsh(feats.T @ feats).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.exp(-torch.xlogy(share, share).sum()).float()


def every_kth_row(feats, max_rows=2048):
    """Every k-th row, at most max_rows of them: enough for a spectrum."""
    return feats[::max(1, -(-len(feats) // max_rows))]


@torch.no_grad()
def fusion_statistics(out, batch_idx):
    """Scalars about one output of BiFusionEncoder, {tag: 0-d tensor}; see docs/tensorboard.md.

    batch_idx (N,) int64: the scene of each point. Gate and cosine are means over the points that a view
    sees.
    """
    feats = out["feat_fusion"].float()
    valid = out["valid"]
    stats = {"fusion/effective_rank": effective_rank(every_kth_row(feats))}
    if out["clip_global"] is None:
        return stats
    seen = valid.sum().clamp(min=1)
    alpha = out["alpha"].float().mean(1)  # 0 if not valid; a gate may have one value per channel
    mean = alpha.sum() / seen
    cosine = F.cosine_similarity(feats, out["clip_global"].float()[batch_idx])
    return {**stats, "fusion/valid_share": valid.float().mean(), "fusion/gate_mean": mean,
            "fusion/gate_std": ((alpha - mean).square() * valid).sum().div(seen).sqrt(),
            "fusion/clip_cosine": cosine.where(valid, 0).sum() / seen}


@torch.no_grad()
def pairwise_cosine(feats: Tensor) -> Tensor:
    """Mean cosine of two different rows of feats (n, C), without an (n, n) matrix; 0 if n < 2.

    1 means that all rows point the same way.
    """
    n = len(feats)
    unit = F.normalize(feats.double(), dim=1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / max(1, n * (n - 1))).float()


# ------------------------------------------------------------------------------- do the terms conflict?


def grouped(terms):
    """Loss terms, with instance_class, instance_bce and so on summed to one, instance."""
    groups = defaultdict(list)
    for name, term in terms.items():
        groups["instance" if name.startswith("instance_") else name].append(term)
    return {name: sum(group) for name, group in groups.items()}


def term_statistics(terms: dict, out: dict, scale=1.0) -> dict:
    """How the loss terms pull at the fused features, {name: 0-d tensor}; see docs/diagnostics.md.

    terms: {name: weighted scalar} with a graph, which is kept; out: the model's output that they were
    computed from. With g_i the gradient of term i at feat_fusion and g their sum: the norm |g_i|, the
    cosine of every pair, and the share <g_i, g> / <g, g> of the step that a term explains. scale: of
    the loss, so that half precision does not lose small gradients.
    """
    fused = out["feat_fusion"]
    grads = {}
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        grad, = torch.autograd.grad(term * scale, fused, retain_graph=True, materialize_grads=True)
        grads[name] = grad.flatten().float() / scale
    total = sum(grads.values())
    tiny = torch.finfo(total.dtype).tiny
    stats = {f"grad_norm_{name}": grad.norm() for name, grad in grads.items()}
    for name, grad in grads.items():
        stats[f"share_{name}"] = grad @ total / (total @ total).clamp(min=tiny)
    for a, b in combinations(grads, 2):
        stats[f"cosine_{a}_{b}"] = F.cosine_similarity(grads[a], grads[b], 0, tiny)
    with torch.no_grad():
        feats = every_kth_row(fused)
        baseline = every_kth_row(out["feat_3d"]).float()
        valid = every_kth_row(out["valid"])
        drift = (feats.float() - baseline).norm(dim=1) / baseline.norm(dim=1).clamp(min=1e-6)
        return {**stats, "pairwise_cosine": pairwise_cosine(feats), "effective_rank": effective_rank(feats),
                "drift": drift.where(valid, 0).sum() / valid.sum().clamp(min=1)}


# ----------------------------------------------------------------------------------- where a step broke

KINDS = ("input", "weight", "module", "loss", "gradient")  # of findings, the likeliest cause first


class Finding(NamedTuple):
    """Something in a step that is not finite: one of KINDS, and a text about it."""

    kind: str
    text: str

    def __str__(self):
        return f"{self.kind}: {self.text}"


def float_tensors(value):
    """Every floating-point tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    return [tensor for part in parts for tensor in float_tensors(part)]


def is_finite(value):
    """Whether every tensor in nested tuples, lists and dicts is free of NaN and inf."""
    return all(bool(tensor.isfinite().all()) for tensor in float_tensors(value))


def nonfinite_inputs(batch):
    """A finding for every field of a batch that holds NaN or inf."""
    findings = []
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.isfinite().all():
            continue
        bad = ~value.isfinite()
        first = bad.nonzero()[0].tolist()
        per_point = len(value) == len(batch["batch"])
        sample = int(batch["batch"][first[0]]) if per_point else first[0]
        text = (f"field {name!r} of sample {batch['name'][sample]} holds {int(bad.sum())} values that are not "
                f"finite, the first at {first} of {tuple(value.shape)}")
        findings.append(Finding("input", text))
    return findings


def nonfinite_weights(model):
    """A finding for every parameter and buffer of a model that holds NaN or inf."""
    findings = []
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        bad = int((~value.isfinite()).sum())
        if bad:
            findings.append(Finding("weight", f"{name} {tuple(value.shape)} holds {bad} values that are not finite"))
    return findings


def locate_nonfinite(model, batch, losses, scale=1.0):
    """Where a step first stops being finite: a list of Finding, the likeliest cause first.

    losses: `batch -> {name: scalar}`, runs the model. scale: of the loss in the backward pass. It makes
    one forward pass, and one backward pass per term, with hooks on every module, whatever the data, so
    that several processes may run it together. It leaves gradients as they are, but not buffers.
    """
    findings = nonfinite_inputs(batch) + nonfinite_weights(model)
    outputs = []  # (name, class, whether its input was finite) in the order in which they were found
    gradients = defaultdict(list)  # {term: names of modules} in the order in which they were found
    term = None

    def watch(name):
        def hook(module, inputs, output):
            if not is_finite(output):
                outputs.append((name, type(module).__name__, is_finite(inputs)))
            for tensor in float_tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: None if grad.isfinite().all() else gradients[term].append(name))
        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    terms = losses(batch)
    for handle in handles:
        handle.remove()
    if outputs:
        name, kind, input_finite = outputs[0]
        findings.append(Finding("module", f"{name} ({kind}) is the first with an output that is not finite; its input is "
                                          f"{'finite' if input_finite else 'not either'}"))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for term, value in terms.items():
        grads = []
        if value.requires_grad:
            grads = torch.autograd.grad(value * scale, list(parameters.values()), retain_graph=True, allow_unused=True)
        bad = [name for name, grad in zip(parameters, grads) if not is_finite(grad)]
        if not value.isfinite():
            findings.append(Finding("loss", f"{term} is {value.item()}"))
        elif bad:  # the gradient of a loss that is not finite tells nothing more
            place = f"at the output of module {gradients[term][0]}" if gradients[term] else f"at weight {bad[-1]}"
            text = (f"of {term}, first not finite {place} and so at {len(bad)} of {len(grads)} weights, with a "
                    f"loss scale of {scale:g}")
            findings.append(Finding("gradient", text))
    return findings


# -------------------------------------------------------------------------------------------- the guard

MAX_BAD_STEPS = 10


class NonFiniteGuard:
    """Skips steps with a loss or gradient that is not finite, names their cause, and saves them.

    folder: of the run. report: takes the text about a bad step. save: `(dict, path)`, writes a file.
    gather: `value -> list of the values of all processes`; rank: of this one. bad_steps: before a
    resumed run. After MAX_BAD_STEPS in a row the run ends with a FloatingPointError; each process saves
    that many at most.
    """

    def __init__(self, model, folder, report=print, save=torch.save, gather=lambda value: [value], rank=0,
                 bad_steps=0):
        self.model, self.folder, self.rank = model, Path(folder), rank
        self.report, self.save, self.gather = report, save, gather
        self.bad_steps = bad_steps
        self.bad_in_a_row = 0
        buffers = dict(model.named_buffers())
        self.statistics = [[buffer for name, buffer in buffers.items() if key in name]
                           for key in ("running_", "num_batches")]  # by dtype, so that a GPU copies each list at once
        self.statistics_before = [[buffer.clone() for buffer in group] for group in self.statistics]

    def begin_step(self):
        """Remembers the running statistics, so that a skipped step leaves no trace."""
        for before, now in zip(self.statistics_before, self.statistics):
            if now:
                torch._foreach_copy_(before, now)

    def skip_step(self):
        """Puts the running statistics back."""
        for before, now in zip(self.statistics_before, self.statistics):
            if now:
                torch._foreach_copy_(now, before)

    def end_step(self, finite, searches, micro_batches, losses, facts):
        """What follows a step -> whether it was skipped because fp16 searches for its loss scale.

        finite: its loss and gradient; searches: not finite, but that is expected. Otherwise its cause is
        named and saved. losses: `batch -> {name: weighted scalar}`. facts: what else the file holds, at
        least epoch, step and scale.
        """
        if finite:
            self.bad_in_a_row = 0
            return False
        self.skip_step()
        if searches:
            return True
        self.bad_steps += 1
        self.bad_in_a_row += 1
        cause = self.find_cause(micro_batches, losses, facts)
        text = (f"epoch {facts['epoch']}, step {facts['step']} is not finite and is skipped, "
                f"{self.bad_in_a_row} in a row; {cause}")
        self.report(text)
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise FloatingPointError(f"{self.bad_in_a_row} steps in a row were not finite, the last: {text}")
        return False

    def find_cause(self, micro_batches, losses, facts):
        """Runs every micro-batch again, saves the one that holds the cause -> a text about it.

        All of them are run, whatever is found in the first, because with several processes a pass has
        collectives. Of the processes the one that holds the cause saves it, not those that meet it in a
        shared batch norm.
        """
        # compiled modules ignore forward hooks, so use the eager forward
        compiled = {m: m.__dict__.pop("forward") for m in self.model.modules() if "forward" in m.__dict__}
        found = []
        for i, batch in enumerate(micro_batches):
            findings = locate_nonfinite(self.model, batch, losses, facts["scale"])
            depth = KINDS.index(findings[0].kind) if findings else len(KINDS)
            found.append((depth, i, findings))
        self.skip_step()  # the passes have moved the running statistics
        for module, forward in compiled.items():
            module.forward = forward

        depth, i, findings = min(found)
        batch = micro_batches[i]
        reasons = [str(finding) for finding in findings] or [
            "finite when run a second time: a sum or norm of large gradients overflowed, or the device varies"]
        text = "\n  ".join([f"{', '.join(batch['name'])}:", *reasons])
        likeliest = min(self.gather(depth))
        if depth == likeliest and self.bad_steps <= MAX_BAD_STEPS:
            suffix = f"_rank{self.rank}" if self.rank else ""
            path = self.folder / f"bad_step_{facts['step']}{suffix}.pt"
            self.save({"model": self.model.state_dict(), "batch": batch, "findings": reasons, **facts}, path)
            if path.exists():  # not on a full disk
                text += f"\nrun it again with: python train.py --replay {path}"
        return "\n".join(self.gather(text))


# ---------------------------------------------------------------------------------------------- replay


def replay_step(model, batch, losses, scale):
    """Runs a saved step again and returns its findings.

    If the step is not finite, the backward pass under anomaly detection stops at the operation that
    broke and shows the line of the forward pass that it belongs to.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    findings = locate_nonfinite(model, batch, losses, scale)
    print(*(findings or ["every value of this step is finite here"]), sep="\n  ")
    model.load_state_dict(weights)  # the pass has moved the running statistics
    with torch.autograd.set_detect_anomaly(True):
        (sum(losses(batch).values()) * scale).backward()
    return findings
