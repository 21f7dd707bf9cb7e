# SPDX-License-Identifier: MIT
"""Public reports of NaN, tabled in docs/stability.md: the cause in plain lines, then the shipped code on that input."""
import copy
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoder import InstanceDecoder, draw_queries
from losses import InstanceCriterion, SemanticCriterion, clip_consistency
from sparse_unet import SMALL, PointEncoder
from support.diagnose import Finding, NonFiniteGuard, locate_nonfinite
from train import train_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def batch_of(points, **fields):
    return {"name": ["one"], "batch": torch.zeros(len(points), dtype=torch.int64), "points": points, **fields}


def overflow(dtype, module):
    """The finding of a run in `dtype` whose values exceed 65504, the largest number of fp16."""
    text = f"{module} (Linear) is the first with an output that is not finite; its input is finite"
    return [Finding("module", text)] if dtype == torch.float16 else []


def batch_of_frames(owners, dtype=torch.float32):
    """Frames of 4 superpoints, of which 0 to 2 are queries, with one instance each, the superpoint `owner`."""
    B = len(owners)
    output = {"class_logits": torch.randn(1, B, 3, 6).to(dtype).requires_grad_(),
              "mask_logits": torch.randn(1, B, 3, 4).to(dtype).requires_grad_(),
              "quality": torch.rand(1, B, 3).to(dtype), "query": torch.arange(3).expand(B, 3)}
    masks = torch.arange(4) == torch.tensor(owners)[:, None, None]  # (B, 1, 4)
    return output, {"masks": masks, "labels": torch.full((B, 1), 2), "sizes": torch.full((B,), 4)}


def naive_mask_loss(output, targets, b):
    """Each instance takes the first query that stands in it: a mean over the pairs, also if there are none."""
    masks = targets["masks"][b]  # (G, S)
    inside = masks[:, output["query"][b]]  # (G, Q)
    matched = inside.any(1)
    logits = output["mask_logits"][0, b][inside.int().argmax(1)[matched]]
    return F.binary_cross_entropy_with_logits(logits, masks[matched].to(logits.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_esam_17_and_46_an_instance_in_which_no_query_stands_has_no_mask_loss(dtype):
    output, targets = batch_of_frames([3], dtype)
    naive = naive_mask_loss(output, targets, 0)
    assert naive.isnan() and not gradient(naive, output["mask_logits"]).any()  # only the number is NaN
    terms = InstanceCriterion()(output, targets)
    assert [terms[name].item() for name in ("bce", "dice", "quality")] == [0, 0, 0]
    total = sum(terms.values())
    assert total.isfinite() and not gradient(total, output["mask_logits"]).any()
    assert gradient(total, output["class_logits"]).any(), "the classes learn from the frame all the same"


def test_esam_45_one_frame_without_a_match_leaves_the_number_of_its_batch_as_it_is():
    output, targets = batch_of_frames([i % 3 for i in range(15)] + [3])
    naive = torch.stack([naive_mask_loss(output, targets, b) for b in range(16)])
    assert naive.mean().isnan()
    torch.testing.assert_close(InstanceCriterion()(output, targets)["bce"], naive[:15].mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_autoseg3d_3_and_pointcept_283_a_frame_without_labels_neither_breaks_nor_dilutes_the_mean(dtype):
    logits = torch.randn(2, 10, 6).to(dtype).requires_grad_()
    labels = torch.stack([torch.randint(6, (10,)), torch.full((10,), -1)])
    naive = torch.stack([F.cross_entropy(*one, ignore_index=-1) for one in zip(logits, labels)])
    assert naive.isnan().tolist() == [False, True]
    patched = naive.nan_to_num(0).mean()  # a zero in the place of the NaN halves the loss of the frame with labels
    ours = SemanticCriterion()(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours, F.cross_entropy(logits[0].float(), labels[0]))
    assert patched.float() < 0.6 * ours
    alone = SemanticCriterion()(logits[1], labels[1])
    assert alone.item() == 0 and gradient(alone, logits).eq(0).all()


class Deep(nn.Sequential):
    """Layers without norms: the gradient of one is the product of all others."""
    decoder = None
    fusion = SimpleNamespace(encoder_2d=None)

    def forward(self, batch, with_dense=False):
        return {"logits": super().forward(batch["points"])}


def test_pointcept_283_a_gradient_that_explodes_is_clipped_and_inf_changes_no_weight():
    naive = Deep(*(nn.Linear(8, 8) for _ in range(4)))
    model = copy.deepcopy(naive)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = batch_of(300 * torch.randn(16, 8), labels=torch.arange(16) % 8, seed=[0])

    our_step = partial(train_step, model, [batch], {"semantic": SemanticCriterion()}, {"semantic": 1.0}, optimizer,
                       torch.amp.GradScaler("cpu", enabled=False), Mock())
    for _ in range(10):
        loss = F.cross_entropy(naive(batch)["logits"], batch["labels"])
        for p, grad in zip(naive.parameters(), torch.autograd.grad(loss, list(naive.parameters()))):
            p.data -= 0.1 * grad
        assert our_step()[1]
    assert loss.isnan()
    weights = [p.detach().clone() for p in model.parameters()]
    batch["points"][0] = torch.inf
    assert not our_step()[1]
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters()))
    weights[0].grad = torch.full_like(weights[0], torch.inf)
    nn.utils.clip_grad_norm_(weights[:1], 1.0)
    assert weights[0].grad.isnan().all(), "clipping alone makes NaN of inf"


@pytest.mark.parametrize("dtype, factor", [*((dtype, 0) for dtype in DTYPES), (DTYPES[1], 1e6), (DTYPES[1], 1e-6)])
def test_pointcept_257_a_classifier_on_unit_vectors_survives_zero_overflowed_and_tiny_rows(dtype, factor):
    texts = F.normalize(torch.randn(5, 16), dim=1)
    labels = torch.arange(10) % 5
    feats = torch.randn(10, 16)
    feats[3] *= factor
    feats = feats.to(dtype).requires_grad_()  # times 1e6 is inf in fp16
    unit = feats / feats.norm(dim=1, keepdim=True)
    naive = F.cross_entropy(100 * unit @ texts.to(dtype).T, labels)
    assert not gradient(naive * 2.0 ** 12, feats).isfinite().all()  # a loss scale
    ours, counts = clip_consistency(feats, texts, labels, variant="infonce")
    used = 9 if factor == 1e6 else 10
    assert ours.isfinite() and counts[:2].tolist() == [used, 10 - used]
    assert gradient(ours, feats).norm(dim=1).max() <= 1.01 / (used * 0.1 * 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointcept_181_attention_runs_in_the_dtype_of_the_run_and_its_overflow_is_named(dtype):
    feats = torch.randn(12, 16)
    feats[0] *= 1e7  # beyond fp16
    heads = feats[None, None].to(dtype).half()  # a cast inside the attention, whatever the dtype of the run
    assert F.scaled_dot_product_attention(heads, heads, heads).isnan().any()
    decoder = InstanceDecoder(16, 5, 16, num_layers=2, num_heads=2, ffn=16)

    def losses(batch):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = decoder(batch["points"], draw_queries(batch["batch"]))
        return {name: output[name][-1].float().mean() for name in ("mask_logits", "class_logits")}

    assert locate_nonfinite(decoder, batch_of(feats), losses)[:1] == overflow(dtype, "source_proj.0")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_pointcept_436_a_linear_layer_that_overflows_is_named_and_our_encoder_is_finite_there(dtype):
    naive = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    nn.init.constant_(naive[0].weight, 0.5)
    batch = batch_of(torch.full((30, 64), 3e3), coords=torch.rand(30, 3), features=3e3 * torch.rand(30, 3))

    def losses(batch):
        with torch.autocast("cpu", dtype):
            return {"semantic": naive(batch["points"]).float().mean()}

    assert locate_nonfinite(naive, batch, losses)[:1] == overflow(dtype, "0")
    encoder = PointEncoder(0.2, 3, 32, **SMALL)
    with torch.autocast("cpu", dtype):
        feats = encoder(batch)  # a batch norm follows every convolution, so values do not grow with depth
    assert feats.isfinite().all() and gradient(feats.float().sum(), encoder.backbone.conv0p1s1.kernel).isfinite().all()


@pytest.mark.parametrize("guarded", [False, True])
def test_pointcept_439_a_skipped_step_leaves_no_nan_in_the_running_statistics(tmp_path, guarded):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    guard = NonFiniteGuard(model, tmp_path, report=Mock())

    def losses(batch):
        with torch.autocast("cpu", torch.float16):
            return {"semantic": model(batch["points"]).float().square().mean()}

    good, bad = torch.randn(2, 20, 8)
    bad[0] = 1e5  # beyond fp16
    for step, batch in enumerate(map(batch_of, (good, bad, good))):
        guard.begin_step()
        loss = losses(batch)["semantic"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # skips the step itself, as every training with a GradScaler does
        scaler.update()
        optimizer.zero_grad()
        if guarded and not loss.isfinite():
            guard.end_step(False, False, [batch], losses, {"epoch": 0, "step": step, "scale": 1.0})
    assert all(p.isfinite().all() for p in model.parameters())
    logits = model.eval()(good)  # in fp32
    assert logits.isfinite().all() if guarded else logits.isnan().all()
    assert not guarded or overflow(torch.float16, "0")[0].text in guard.report.call_args.args[0]
