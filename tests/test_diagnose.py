# SPDX-License-Identifier: MIT
"""diagnose.py: figures against closed forms and plain formulas, pictures that hold what they were asked to show."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import diagnose


# --------------------------------------------------------------------------------------------------- effective rank


@pytest.mark.parametrize("n, c", [(2, 3), (5, 8), (64, 64), (40, 7)])
def test_effective_rank_of_equal_singular_values_is_their_number(n, c):
    """Rows +-e_i have mean 0 and c equal singular values; n orthonormal rows, centred, have n - 1 of them."""
    both = torch.cat([torch.eye(c), -torch.eye(c)])
    assert diagnose.effective_rank(both).item() == pytest.approx(c, rel=1e-5)
    if n <= c:
        rows = torch.linalg.qr(torch.randn(c, n, dtype=torch.float64))[0].T
        assert diagnose.effective_rank(rows).item() == pytest.approx(n - 1, rel=1e-5)


def test_effective_rank_of_two_unequal_directions_is_exp_of_their_entropy():
    for big in (1.0, 3.0, 1e3):
        rows = torch.tensor([[big, 0.0, 0.0], [-big, 0, 0], [0, 1, 0], [0, -1, 0]])
        p = big / (big + 1)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert diagnose.effective_rank(rows).item() == pytest.approx(math.exp(entropy), rel=1e-5)


def test_effective_rank_of_one_direction_is_one():
    torch.manual_seed(0)
    line = torch.randn(50, 1) * torch.randn(1, 20) + torch.randn(20)
    assert diagnose.effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    for rows in (torch.full((30, 20), 0.3), torch.randn(1, 20), torch.zeros(7, 20), torch.zeros(0, 20)):
        assert diagnose.effective_rank(rows).item() == pytest.approx(1, abs=1e-3)


def test_effective_rank_agrees_with_numpys_singular_values():
    torch.manual_seed(0)
    feats = torch.randn(200, 32) @ torch.randn(32, 32) + 5
    values = np.linalg.svd(feats.double().numpy() - feats.double().numpy().mean(0), compute_uv=False)
    share = values / values.sum()
    assert diagnose.effective_rank(feats).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_effective_rank_is_blind_to_scale_shift_rotation_and_order_but_not_to_a_lost_direction():
    torch.manual_seed(0)
    feats = torch.randn(300, 24)
    own = diagnose.effective_rank(feats).item()
    turn = torch.linalg.qr(torch.randn(24, 24))[0]
    for other in (feats * 1e-4, feats * 1e15, feats + 3, feats @ turn, feats[torch.randperm(300)], feats.half()):
        assert diagnose.effective_rank(other).item() == pytest.approx(own, rel=1e-3)
    flat = feats.clone()
    flat[:, 12:] = 0
    assert diagnose.effective_rank(flat).item() < 12 < own


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_reported_not_fatal(bad):
    feats = torch.randn(9, 4)
    feats[3, 1] = bad
    assert diagnose.effective_rank(feats).isnan()
    assert (diagnose.pca_colors(feats) == 0).all()
    out = {"feat_fusion": feats, "valid": torch.ones(9, dtype=torch.bool), "clip_global": None}
    assert diagnose.fusion_statistics(out, {})["effective_rank"].isnan()


# --------------------------------------------------------------------------------------------------- statistics


def output(n=500, dtype=torch.float32, share=0.6):
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(n, generator=generator) < share
    return {"feat_fusion": torch.randn(n, 16, generator=generator).to(dtype).requires_grad_(),
            "clip_global": torch.randn(3, 16, generator=generator).to(dtype), "valid": valid,
            "alpha": (torch.rand(n, 1, generator=generator) * valid[:, None]).to(dtype)}, {
                "batch": torch.arange(n) * 3 // n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_plain_formulas_over_the_seen_points(dtype):
    out, batch = output(dtype=dtype)
    stats = diagnose.fusion_statistics(out, batch)
    valid = out["valid"].numpy()
    feats, clip, alpha = (out[key].detach().double().numpy() for key in ("feat_fusion", "clip_global", "alpha"))
    gates, target = alpha[valid, 0], clip[batch["batch"].numpy()]
    cosine = (feats * target).sum(1) / np.linalg.norm(feats, axis=1) / np.linalg.norm(target, axis=1)
    expected = {"valid_share": valid.mean(), "gate_mean": gates.mean(), "gate_std": gates.std(),
                "clip_cosine": cosine[valid].mean()}
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-4), name
    assert stats.keys() == {*expected, "effective_rank"}
    assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


def test_statistics_without_a_seen_point_are_zero_and_finite():
    out, batch = output(share=-1)
    stats = diagnose.fusion_statistics(out, batch)
    assert all(stats[name] == 0 for name in ("valid_share", "gate_mean", "gate_std", "clip_cosine"))
    assert stats["effective_rank"].isfinite()


def test_an_unseen_point_has_no_influence_whatever_it_holds():
    out, batch = output()
    changed = {**out, "feat_fusion": out["feat_fusion"].detach().clone()}
    changed["feat_fusion"][~out["valid"]] = math.nan
    own, other = (diagnose.fusion_statistics(o, batch) for o in (out, changed))
    assert all(own[name] == other[name] for name in ("valid_share", "gate_mean", "gate_std", "clip_cosine"))


def test_the_baseline_has_a_rank_alone():
    out, batch = output()
    assert diagnose.fusion_statistics({**out, "clip_global": None}, batch).keys() == {"effective_rank"}


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 129])
def test_no_more_rows_than_allowed_enter_the_rank(n):
    assert min(n, 32) <= len(diagnose.thinned(torch.zeros(n, 3), 64)) <= 64


# --------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_pairwise_cosine_is_the_mean_over_all_pairs(n):
    torch.manual_seed(0)
    feats = torch.randn(n, 8) + 0.5
    matrix = F.cosine_similarity(feats[:, None], feats[None], dim=-1)
    pairs = matrix[~torch.eye(n, dtype=torch.bool)]
    assert diagnose.pairwise_cosine(feats).item() == pytest.approx(pairs.mean().item() if n > 1 else 0, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0 ** 16])
def test_term_statistics_equal_the_gradients_of_known_terms(scale):
    """Linear terms <a, f> and <b, f> have the gradients a and b; a constant one has none."""
    out, _ = output()
    out["feat_fusion"] = feats = out["feat_fusion"].detach().requires_grad_()
    out["feat_3d"] = feats.detach().clone()
    a, b = torch.randn(2, *feats.shape)
    terms = {"a": (a * feats).sum(), "b": (b * feats).sum(), "none": feats.new_zeros((), requires_grad=True) * 1}
    stats = {name: value.item() for name, value in diagnose.term_statistics(terms, out, scale).items()}
    total = (a + b).flatten()
    expected = {"grad_norm_a": a.norm(), "grad_norm_b": b.norm(), "grad_norm_none": 0, "share_none": 0,
                "cosine_a_b": F.cosine_similarity(a.flatten(), b.flatten(), 0), "cosine_a_none": 0, "drift": 0,
                "share_a": a.flatten() @ total / (total @ total), "share_b": b.flatten() @ total / (total @ total)}
    for name, value in expected.items():
        assert stats[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert stats["share_a"] + stats["share_b"] == pytest.approx(1)
    assert feats.grad is None
    sum(terms.values()).backward()  # the graph is still there
    moved = {**out, "feat_3d": feats.detach() / 3}
    assert diagnose.term_statistics({"a": (a * feats).sum()}, moved)["drift"].item() == pytest.approx(2, rel=1e-5)


# --------------------------------------------------------------------------------------------------- where it broke


class Tiny(torch.nn.Module):
    """Two layers and a function between them that may break forward (log) or backward (sqrt at 0)."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.middle = torch.nn.Identity()

    def forward(self, batch):
        return self.second(self.norm(self.middle(self.first(batch["points"]))))


def tiny_batch():
    return {"name": ["a", "b"], "points": torch.randn(6, 3), "batch": torch.tensor([0, 0, 0, 0, 1, 1])}


def tiny_losses(model):
    return lambda batch: {"mean": model(batch).mean(), "square": model(batch).square().mean()}


def test_a_finite_step_has_no_finding_and_leaves_gradients_and_hooks_as_they_were():
    torch.manual_seed(0)
    model, batch = Tiny(), tiny_batch()
    assert diagnose.locate_nonfinite(model, batch, tiny_losses(model)) == []
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_input_is_named_with_its_sample(bad):
    model, batch = Tiny(), tiny_batch()
    batch["points"][4, 1] = bad
    findings = diagnose.locate_nonfinite(model, batch, tiny_losses(model))
    assert "field 'points' of sample b holds 1 values" in findings[0] and "[4, 1] of (6, 3)" in findings[0]
    assert "module: first (Linear)" in findings[1] and "its input is not either" in findings[1]
    assert "loss: mean is nan" in findings[2]


def test_a_bad_weight_and_a_bad_buffer_are_named():
    model, batch = Tiny(), tiny_batch()
    with torch.no_grad():
        model.second.weight[0, 2] = math.nan
        model.norm.running_mean[1] = math.inf
    findings = diagnose.locate_nonfinite(model, batch, tiny_losses(model))
    assert "weight: second.weight (1, 4) holds 1 values" in findings[0] and "norm.running_mean" in findings[1]
    assert "module: second (Linear)" in findings[2] and "its input is finite" in findings[2]


def test_a_module_that_makes_it_is_named():
    model, batch = Tiny(), tiny_batch()
    model.middle.forward = lambda x: (x - x).log() * 0
    findings = diagnose.locate_nonfinite(model, batch, tiny_losses(model))
    assert findings[0].startswith("module: middle (Identity) is the first") and "its input is finite" in findings[0]


def test_a_gradient_alone_that_breaks_is_named_with_its_term_and_place():
    model, batch = Tiny(), tiny_batch()
    model.middle.forward = lambda x: x + (x - x).sqrt()  # value 0, slope inf
    findings = diagnose.locate_nonfinite(model, batch, lambda batch: {
        "whole": model(batch).square().mean(), "bias": model.second.bias.sum()})
    finding, = findings
    assert finding.startswith("gradient: of whole, first not finite at the output of module first")
    assert "at 2 of 6 weights" in finding


def test_a_loss_scale_that_overflows_is_named():
    model, batch = Tiny(), tiny_batch()
    losses = lambda batch: {"mean": model(batch).half().mean()}
    assert diagnose.locate_nonfinite(model, batch, losses) == []
    findings = diagnose.locate_nonfinite(model, batch, losses, scale=2.0 ** 17)
    assert findings[0].startswith("gradient: of mean, first not finite at the output of module second")
    assert "loss scale of 131072" in findings[0]


# --------------------------------------------------------------------------------------------------- pictures


def test_palette_colors_are_distinct_and_in_range():
    colors = diagnose.palette(40)
    assert colors.shape == (40, 3) and colors.min() >= 0 and colors.max() <= 1
    assert torch.pdist(colors).min() > 0.03 and diagnose.palette(0).shape == (0, 3)
    assert torch.equal(diagnose.palette(40)[:7], diagnose.palette(7))


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_splat_paints_squares_and_darkens_the_rest(radius):
    image, uv = torch.rand(3, 20, 30), torch.tensor([[10.4, 5.6], [22.0, 14.0]])
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    before = image.clone(), uv.clone(), colors.clone()
    expected = image * 0.4
    for (x, y), color in zip(((10, 6), (22, 14)), colors):
        expected[:, y - radius:y + radius + 1, x - radius:x + radius + 1] = color[:, None, None]
    assert torch.equal(diagnose.splat(image, uv, colors, radius), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (image, uv, colors)))


def test_splat_cuts_squares_at_the_border_and_leaves_out_what_is_outside():
    image = torch.ones(3, 8, 10)
    inside = diagnose.splat(image, torch.tensor([[0.0, 0.0], [9.4, 7.4]]), torch.zeros(2, 3), 1)
    assert (inside == 0).sum() == 3 * 2 * 4  # two corners of 2 x 2 pixels
    outside = torch.tensor([[-5.0, 3], [4, 100], [1e9, -1e9], [-2, -2], [math.nan, 2]])
    assert torch.equal(diagnose.splat(image, outside, torch.zeros(5, 3), 1), image * 0.4)
    assert torch.equal(diagnose.splat(image, torch.zeros(0, 2), torch.zeros(0, 3)), image * 0.4)


def test_pca_colors_follow_the_largest_directions():
    torch.manual_seed(0)
    scores = torch.rand(400, 3) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(12, 3))[0].T
    feats = scores @ basis + torch.randn(12)
    before = feats.clone()
    colors = diagnose.pca_colors(feats)
    assert torch.equal(feats, before) and colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    correlation = torch.corrcoef(torch.cat([colors, scores], 1).T)[:3, 3:].abs()
    assert (correlation.diagonal() > 0.95).all()
    assert torch.equal(diagnose.pca_colors(feats), colors)  # draws nothing


def test_pca_colors_of_few_or_equal_rows_are_in_range():
    for feats in (torch.randn(1, 8), torch.randn(2, 8), torch.full((5, 8), 2.0), torch.zeros(0, 8),
                  torch.randn(6, 8).half() * 100):
        colors = diagnose.pca_colors(feats)
        assert colors.shape == (len(feats), 3) and colors.dtype == torch.float32
        assert ((colors >= 0) & (colors <= 1)).all()


def scene(n, height=24, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uv = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) - 0.5
    return {"image": torch.rand(3, height, width, generator=generator), "uv": uv,
            "depth": torch.rand(n, generator=generator) * 3 + 0.5,
            "labels": {"truth": torch.randint(-1, 300, (n,), generator=generator),
                       "prediction": torch.full((n,), -1)},
            "fused": torch.randn(n, 16, generator=generator),
            "clip_map": torch.randn(20, 3, 4, generator=generator).half()}


@pytest.mark.parametrize("n", [0, 1, 2, 300])
@pytest.mark.parametrize("with_clip", [True, False])
def test_pictures_have_the_images_shape_and_range_for_any_number_of_points(n, with_clip):
    arguments = scene(n)
    if not with_clip:
        arguments["clip_map"] = None
    before = scene(n)
    named = diagnose.pictures(**arguments)
    assert named.keys() == {"input_points", "fused_pca", "truth", "prediction"} | ({"clip_pca"} if with_clip else set())
    for name, picture in named.items():
        assert picture.shape == (3, 24, 32) and picture.isfinite().all(), name
        assert picture.min() >= 0 and picture.max() <= 1, name
    for key in ("image", "uv", "depth", "fused"):
        assert torch.equal(arguments[key], before[key])
    assert all(torch.equal(arguments["labels"][name], before["labels"][name]) for name in before["labels"])


def test_points_without_a_label_are_grey_and_others_have_the_color_of_their_label():
    image, uv = torch.zeros(3, 9, 30), torch.tensor([[2.0, 4], [10, 4], [18, 4], [26, 4]])
    labels = torch.tensor([-1, 0, 7, 255])
    picture = diagnose.pictures(image, uv, torch.ones(4), {"truth": labels}, torch.randn(4, 8), None)["truth"]
    shown = picture[:, 4, uv[:, 0].long()].T
    assert torch.equal(shown, torch.cat([torch.full((1, 3), 0.4), diagnose.palette(256)[[0, 7, 255]]]))
    unlabelled = diagnose.pictures(image, uv, torch.ones(4), {"truth": torch.full((4,), -1)}, torch.randn(4, 8), None)
    assert unlabelled["truth"].unique().tolist() == pytest.approx([0, 0.4])


def test_near_points_are_red_and_far_ones_blue_whatever_the_farthest():
    uv, depth = torch.tensor([[1.0, 1], [3, 1], [5, 1]]), torch.tensor([2.0, 1.0, 1e6])
    picture = diagnose.pictures(torch.zeros(3, 4, 8), uv, depth, {}, torch.randn(3, 8), None)["input_points"]
    assert picture[:, 1, 3].tolist() == [1, 0, 0] and picture[2, 1, 5] == 1 and picture[0, 1, 5] == 0
    assert picture[0, 1, 1] == pytest.approx(0.5) == picture[2, 1, 1]


def test_clip_cells_lie_where_their_patch_lies():
    arguments = scene(5)
    picture = diagnose.pictures(**arguments)["clip_pca"]
    cells = F.avg_pool2d(picture[None], 8)[0]
    assert torch.allclose(cells.repeat_interleave(8, 1).repeat_interleave(8, 2), picture, atol=1e-6)
    expected = diagnose.pca_colors(arguments["clip_map"].flatten(1).T).T.view(3, 3, 4)
    assert torch.allclose(cells, expected, atol=1e-6)
