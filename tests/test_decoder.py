# SPDX-License-Identifier: MIT
"""decoder.py: pooling, ragged attention against torch's own, matrix NMS against a plain loop, inference."""
import math

import pytest
import torch
from torch import nn

from data import to_device
from decoder import (PADDED, Attention, DecoderLayer, InstanceDecoder, attend_by_scene, attend_padded,
                     attention_mask, draw_queries, instances_from_logits, matrix_nms, pad_scenes,
                     pool, scene_instances, unpad_scenes)

SIZES = [7, 1, 0, 12]  # superpoints per scene; one has a single one, one has none
PREDICTIONS = ("class_logits", "mask_logits", "quality")


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def batch_of(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def small_decoder(num_layers=2):
    torch.manual_seed(0)
    return InstanceDecoder(6, 4, embed_dim=16, num_layers=num_layers, num_heads=2, ffn=32).double()


def random_mask(q_sizes, s_sizes):
    """A padded mask (B, Q, S) of which every row sees a source row, if its scene has one."""
    allowed = torch.zeros(len(q_sizes), max(q_sizes), max(s_sizes), dtype=torch.bool)
    for own, q, s in zip(allowed, q_sizes, s_sizes):
        own[:q, :s] = torch.rand(q, s) < .5
        own[:q, :min(s, 1)] = True
    return allowed


def test_pool_is_the_mean_and_its_gradient_the_share(device):
    feats = double(20, 3).to(device).requires_grad_()
    index = (torch.randint(0, 4, (20,)) * 2).to(device)  # odd rows stay empty
    pooled = pool(feats, index, 8)
    for s in range(8):
        own = feats[index == s]
        torch.testing.assert_close(pooled[s], own.sum(0) / max(1, len(own)))
    assert torch.autograd.gradcheck(lambda x: pool(x, index, 8), feats, nondet_tol=1e-9)
    ones, zeros = torch.ones(10000, 1, dtype=torch.float16), torch.zeros(10000, dtype=torch.long)
    assert pool(ones.to(device), zeros.to(device), 1).item() == 1  # fp16 cannot count so far


def load_attention(reference, ours):
    """Our attention's weights into nn.MultiheadAttention."""
    linears = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        for linear in (*linears, ours.out):
            nn.init.normal_(linear.bias)
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
        reference.out_proj.load_state_dict(ours.out.state_dict())


@pytest.mark.parametrize("masked", [True, False])
def test_ragged_attention_equals_torch_multihead_attention_scene_by_scene(masked):
    torch.manual_seed(0)
    ours, reference = Attention(16, 4).double(), nn.MultiheadAttention(16, 4, batch_first=True).double()
    load_attention(reference, ours)
    x_sizes = [3, 1, 0, 5]
    x, source = (double(sum(sizes), 16) for sizes in (x_sizes, SIZES))
    allowed = random_mask(x_sizes, SIZES) if masked else None
    out = ours(x, source, x_sizes, SIZES, allowed).split(x_sizes)
    for b, (q, s) in enumerate(zip(x.split(x_sizes), source.split(SIZES))):
        if len(q):
            mask = ~allowed[b, :len(q), :len(s)] if masked else None
            expected = reference(q, s, s, attn_mask=mask, need_weights=False)[0]
            torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_one_padded_call_equals_attention_scene_by_scene(masked, device):
    torch.manual_seed(0)
    x_sizes = [3, 1, 0, 5]
    rows = [sum(sizes) for sizes in (x_sizes, SIZES, SIZES)]
    q, k, v = (double(n, 2, 4).to(device).requires_grad_() for n in rows)
    allowed = random_mask(x_sizes, SIZES).to(device) if masked else None
    results = []
    for attend in (attend_by_scene, attend_padded):
        y = attend(q, k, v, x_sizes, SIZES, allowed)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


def test_a_layer_is_cross_attention_then_torch_encoder_layer_all_post_norm():
    torch.manual_seed(0)
    ours = DecoderLayer(16, 4, 32).double()
    cross = nn.MultiheadAttention(16, 4, batch_first=True).double()
    rest = nn.TransformerEncoderLayer(16, 4, 32, dropout=0, activation="gelu", batch_first=True).double()
    load_attention(cross, ours.cross_attention)
    load_attention(rest.self_attn, ours.self_attention)
    for norm in (ours.cross_norm, ours.self_norm, ours.ffn_norm):
        nn.init.normal_(norm.weight)
    for theirs, own in ((rest.norm1, ours.self_norm), (rest.norm2, ours.ffn_norm),
                        (rest.linear1, ours.ffn[0]), (rest.linear2, ours.ffn[2])):
        theirs.load_state_dict(own.state_dict())
    x, source, allowed = double(5, 16), double(7, 16), random_mask([5], [7])
    y, _ = cross(x, source, source, attn_mask=~allowed[0], need_weights=False)
    expected = rest(ours.cross_norm(x + y)[None])[0]
    torch.testing.assert_close(ours(x, source, [5], [7], allowed), expected)


def test_each_layer_attends_to_the_masks_predicted_before_it():
    net, given = small_decoder(3), []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[-1]))
    masks = net(double(20, 6), draw_queries(batch_of(SIZES)))["mask_logits"]
    assert len(masks) == 4 and len(given) == 3
    padding = torch.arange(12) >= torch.tensor(SIZES)[:, None, None]
    for logits, mask in zip(masks, given):
        own = logits.sigmoid() >= .5
        assert torch.equal(mask, (own | ~own.any(2, keepdim=True)) & ~padding)
    logits, padding = torch.tensor([[[-1., 0., 2.], [-1., -2., -3.]]]), torch.tensor([[False, False, True]])
    expected = [[[False, True, True], [True, True, False]]]  # a row without any is opened, but for padding
    assert attention_mask(logits, padding).tolist() == expected


def test_queries_are_all_superpoints_or_a_random_half_or_more_of_them_drawn_by_the_seed_of_the_scene():
    sizes, rows = (20, 1, 41), torch.arange(62)
    every = draw_queries(batch_of(sizes))
    assert torch.equal(every["rows"], rows) and every["sizes"] == every["query_sizes"] == list(sizes)
    assert torch.equal(every["padding"], rows[:41] >= torch.tensor(sizes)[:, None])
    counts = set()
    for seed in range(20):
        drawn = draw_queries(batch_of(sizes), [seed, 2 ** 61, seed + 1], 0.5)
        parts = drawn["rows"].split(drawn["query_sizes"])
        for b, (index, n, first) in enumerate(zip(parts, sizes, (0, 20, 21))):
            assert n / 2 <= len(index) <= n and len(index.unique()) == len(index)
            query = drawn["query"][b]
            assert torch.equal(query[:len(index)], index - first) and (index - first < n).all()
            assert (query[len(index):] == -1).all()
        alone = draw_queries(batch_of([41]), [seed + 1], 0.5)
        assert torch.equal(alone["rows"], parts[2] - 21)
        counts.add(len(parts[2]))
    assert len(counts) > 5


def test_a_ragged_batch_equals_its_scenes_one_by_one_and_the_rest_is_padding(device):
    net, feats = small_decoder().to(device), double(20, 6).to(device)
    output = net(feats, draw_queries(batch_of(SIZES)))
    assert output["semantic_logits"].shape == (20, 4) and output["query"].shape == (4, 12)
    assert [tuple(output[name].shape) for name in PREDICTIONS] == [(3, 4, 12, 5), (3, 4, 12, 12), (3, 4, 12)]
    for b, part in enumerate(feats.split(SIZES)):
        n = len(part)
        own = {name: output[name][:, b, :n] for name in PREDICTIONS}
        assert (output["mask_logits"][:, b, :, n:] == PADDED).all()
        assert (output["query"][b, n:] == -1).all()
        own["mask_logits"] = own["mask_logits"][..., :n]
        if n:
            alone = net(part, draw_queries(batch_of([n])))
            torch.testing.assert_close(own, {name: alone[name][:, 0] for name in PREDICTIONS})
    assert output["quality"].min() > 0 and output["quality"].max() < 1


def test_every_parameter_gets_a_gradient_and_arguments_are_left_alone():
    net, feats, queries = small_decoder(), double(20, 6), draw_queries(batch_of(SIZES))
    arguments = [feats, queries["rows"], queries["query"], queries["padding"]]
    before = [x.clone() for x in arguments]
    output = net(feats, queries)
    sum((output[name] ** 2).mean() for name in (*PREDICTIONS, "semantic_logits")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(map(torch.equal, before, arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_under_autocast_are_finite(dtype):
    with torch.autocast("cpu", dtype=dtype):
        output = small_decoder().float()(torch.randn(20, 6) * 100, draw_queries(batch_of(SIZES)))
    assert all(output[name].isfinite().all() for name in (*PREDICTIONS, "semantic_logits"))


def test_matrix_nms_equals_a_plain_loop_over_pairs():
    torch.manual_seed(0)
    masks, labels, scores = torch.rand(12, 30) < .5, torch.randint(0, 2, (12,)), double(12).sigmoid()
    weights = torch.randint(1, 50, (30,)).float()

    def iou(i, j):
        both, either = (weights[pair].sum().item() for pair in (masks[i] & masks[j], masks[i] | masks[j]))
        return both / either if labels[i] == labels[j] else 0.

    expected = scores.clone()
    for j in range(12):
        above = [i for i in range(12) if scores[i] > scores[j]]
        for i in above:
            own = max((iou(k, i) for k in range(12) if scores[k] > scores[i]), default=0.)
            expected[j] = min(expected[j], scores[j] * (1 - iou(i, j)) / (1 - own))
    decayed = matrix_nms(masks, labels, scores, weights)
    torch.testing.assert_close(decayed, expected, rtol=1e-5, atol=1e-6)


def test_matrix_nms_silences_copies_and_spares_other_labels():
    masks = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    labels, scores = torch.tensor([0, 0, 0, 1, 0]), torch.tensor([.9, .8, .7, .6, .5])
    scores = matrix_nms(masks, labels, scores, torch.ones(3))
    assert scores.tolist() == pytest.approx([.9, 0, 0, .6, .5])
    assert matrix_nms(masks[:0], torch.zeros(0), torch.zeros(0), torch.ones(3)).shape == (0,)


@pytest.fixture
def scene():
    """Two instances over superpoints of 10, 20, 30, 40 points; the third query is a poor copy of the first."""
    index = torch.repeat_interleave(torch.arange(4), torch.tensor([10, 20, 30, 40]))
    masks = torch.tensor([[2., 3., -4., -4.], [-4., -4., 1., 4.], [1., 1., -4., -4.]])
    classes = torch.tensor([[5., 0., 0.], [0., 6., 0.], [2., 0., 2.]])
    return classes, masks, torch.ones(3), index


def test_score_is_class_probability_times_quality_times_mean_mask_probability(scene):
    classes, masks, _, index = scene
    classes[2] = torch.tensor([0., 2., 2.])  # another label than the first, so no decay
    quality = torch.tensor([.5, .25, 1.])
    result = instances_from_logits(classes, masks, quality, index, top_k=2, min_points=1)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, 2, 3)]
    first = .5 * math.exp(5) / (math.exp(5) + 2) * (sigmoid[1] + sigmoid[2]) / 2
    third = math.exp(2) / (2 * math.exp(2) + 1) * sigmoid[0]
    assert result["scores"].tolist() == pytest.approx([first, third], abs=1e-6)
    assert result["labels"].tolist() == [0, 1]
    assert torch.equal(result["masks"][0], index < 2) and result["masks"].shape == (2, 100)


@pytest.mark.parametrize("thresholds, expected", [
    (dict(min_points=1), [(0, range(30)), (1, range(30, 100))]),  # the copy has decayed to 0
    (dict(min_points=31), [(1, range(30, 100))]),
    (dict(min_points=70), [(1, range(30, 100))]),
    (dict(min_points=71), []),
    (dict(min_points=1, top_k=1), [(1, range(30, 100))]),
    (dict(min_points=1, score_threshold=.9), [(0, range(30))]),
    (dict(min_points=1, mask_threshold=.9), [(1, range(60, 100)), (0, range(10, 30))])])
def test_thresholds_of_count_size_score_and_mask_act(scene, thresholds, expected):
    before = [x.clone() for x in scene]
    result = instances_from_logits(*scene, **{"top_k": 3, **thresholds})
    assert all(map(torch.equal, before, scene))
    assert result["labels"].tolist() == [label for label, _ in expected]
    points = [mask.nonzero().squeeze(1).tolist() for mask in result["masks"]]
    assert points == [list(own) for _, own in expected]


def test_inference_of_a_batch_is_that_of_its_scenes(device):
    torch.manual_seed(0)
    output = {"class_logits": torch.randn(2, 3, 30, 5), "mask_logits": 4 * torch.randn(2, 3, 30, 30),
              "quality": torch.rand(2, 3, 30), "sizes": [30, 1, 20], "query_sizes": [25, 1, 20]}
    batch = batch_of([300, 5, 200])
    local = torch.cat([torch.arange(n) % size for n, size in zip((300, 5, 200), output["sizes"])])
    index = local + torch.tensor([0, 30, 31])[batch]
    scenes = scene_instances(to_device(output, device), index.to(device), batch.to(device), min_points=20)
    for b, (scene, S, Q) in enumerate(zip(scenes, output["sizes"], output["query_sizes"])):
        classes, masks, quality = (output[name][-1, b, :Q] for name in PREDICTIONS)
        alone = instances_from_logits(classes, masks[:, :S], quality, local[batch == b], min_points=20)
        torch.testing.assert_close(to_device(scene, "cpu"), alone)
    assert [len(scene["scores"]) > 0 for scene in scenes] == [True, False, True]  # one has 5 points


def test_inference_without_query_or_above_every_mask_is_empty():
    index = torch.tensor([0, 1, 2])
    nothing = instances_from_logits(torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), index)
    assert nothing["masks"].shape == (0, 3) and nothing["labels"].dtype == torch.int64
    blank = instances_from_logits(torch.zeros(2, 4), torch.full((2, 3), -9.), torch.ones(2), index)
    assert blank["masks"].shape == (0, 3) and blank["scores"].shape == (0,)


def test_padding_scenes_is_undone_and_holds_zeros():
    rows = double(20, 3).requires_grad_()
    padded = pad_scenes(rows, SIZES)
    assert padded.shape == (4, 12, 3) and padded.count_nonzero() == 60
    assert torch.equal(unpad_scenes(padded, SIZES), rows)
    assert torch.autograd.gradcheck(lambda x: pad_scenes(x, SIZES), rows)
    assert torch.autograd.gradcheck(lambda x: unpad_scenes(x, SIZES), double(4, 12, 2).requires_grad_())


@pytest.mark.parametrize("call, message", [
    (lambda: small_decoder()(double(3, 5), draw_queries(batch_of([3]))), r"\(3, 6\), got \(3, 5\)"),
    (lambda: draw_queries(batch_of([0])), "no superpoint"),
    (lambda: pool(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), 1), r"index \(3,\) \(N,\)"),
    (lambda: instances_from_logits(torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(3), torch.tensor([0])),
     r"\(2, 3, 3\) queries")])
def test_malformed_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
