# SPDX-License-Identifier: MIT
"""decoder.py: pooling, ragged attention against torch's own, selection, matrix NMS against a plain loop, inference."""
import math

import pytest
import torch
from torch import nn

from decoder import (PADDED, Attention, DecoderLayer, InstanceDecoder, attend_by_scene, attend_padded, attention_mask,
                     instances_from_logits, matrix_nms, pad_scenes, pool, scene_instances, superpoint_index,
                     unpad_scenes)

SIZES = [7, 1, 0, 12]  # superpoints per scene; one has a single one, one has none


def batch_of(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def small_decoder(**kwargs):
    torch.manual_seed(0)
    return InstanceDecoder(**{**dict(in_channels=6, num_classes=4, embed_dim=16, num_layers=2, num_heads=2, ffn=32),
                              **kwargs}).double()


def tensors(output):
    """All predictions of an output, scene by scene."""
    return [layer[name][b] for layer in output["layers"] for name in sorted(layer) for b in range(len(output["query"]))]


def test_superpoints_are_equal_where_scene_and_segment_are():
    generator = torch.Generator().manual_seed(0)
    batch = batch_of([30, 1, 20])
    for segments in (torch.randint(-5, 10 ** 12, (51,), generator=generator)[torch.randint(0, 9, (51,))],
                     torch.randint(-2, 2, (51, 3), generator=generator)):
        index, superpoint_batch = superpoint_index(segments, batch)
        keys = torch.cat([batch[:, None], segments.view(51, -1)], 1)
        same = (keys[:, None] == keys[None]).all(2)
        assert ((index[:, None] == index[None]) == same).all()
        assert (superpoint_batch[index] == batch).all()
        assert (superpoint_batch.diff() >= 0).all() and index.unique().tolist() == list(range(len(superpoint_batch)))


def test_pool_is_the_mean_and_its_gradient_the_share():
    feats = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 4, (20,)) * 2  # odd rows stay empty
    pooled = pool(feats, index, 8)
    for s in range(8):
        expected = feats[index == s].mean(0) if (index == s).any() else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(pooled[s], expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: pool(x, index, 8), feats)


def test_pool_does_not_lose_points_in_half_precision():
    assert pool(torch.ones(10000, 1, dtype=torch.float16), torch.zeros(10000, dtype=torch.long), 1).item() == 1


def test_pool_commutes_with_permutations_of_points():
    feats, index, order = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 9, (50,)), torch.randperm(50)
    torch.testing.assert_close(pool(feats[order], index[order], 9), pool(feats, index, 9), rtol=0, atol=1e-12)


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
    x, source = (torch.randn(sum(s), 16, dtype=torch.float64) for s in (x_sizes, SIZES))
    allowed = [torch.rand(q, s) < .5 for q, s in zip(x_sizes, SIZES)] if masked else None
    for mask in allowed or ():
        mask[:, :1] = True
    out = ours(x, source, x_sizes, SIZES, allowed).split(x_sizes)
    for b, (q, s) in enumerate(zip(x.split(x_sizes), source.split(SIZES))):
        if len(q):
            expected = reference(q, s, s, attn_mask=~allowed[b] if masked else None, need_weights=False)[0]
            torch.testing.assert_close(out[b], expected, rtol=0, atol=1e-12)


def test_a_layer_is_cross_attention_then_torch_encoder_layer_all_post_norm():
    torch.manual_seed(0)
    ours = DecoderLayer(16, 4, 32).double()
    cross = nn.MultiheadAttention(16, 4, batch_first=True).double()
    rest = nn.TransformerEncoderLayer(16, 4, 32, dropout=0, activation="gelu", batch_first=True).double()
    load_attention(cross, ours.cross_attention)
    load_attention(rest.self_attn, ours.self_attention)
    for norm in (ours.cross_norm, ours.self_norm, ours.ffn_norm):
        nn.init.normal_(norm.weight)
    for theirs, own in ((rest.norm1, ours.self_norm), (rest.norm2, ours.ffn_norm), (rest.linear1, ours.ffn[0]),
                        (rest.linear2, ours.ffn[2])):
        theirs.load_state_dict(own.state_dict())
    x, source = torch.randn(5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    allowed = torch.rand(5, 7) < .5
    allowed[:, 0] = True
    crossed = ours.cross_norm(x + cross(x, source, source, attn_mask=~allowed, need_weights=False)[0])
    torch.testing.assert_close(ours(x, source, [5], [7], [allowed]), rest(crossed[None])[0], rtol=0, atol=1e-12)


def test_each_layer_attends_to_the_masks_predicted_before_it():
    decoder, given = small_decoder(num_layers=3).eval(), []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[-1]))
    layers = decoder(torch.randn(20, 6, dtype=torch.float64), batch_of(SIZES))["layers"]
    assert len(layers) == 4 and len(given) == 3
    for prediction, allowed in zip(layers, given):
        for logits, mask in zip(prediction["mask_logits"], allowed):
            own = logits.sigmoid() >= .5
            assert torch.equal(mask, own | (own.sum(1, keepdim=True) == 0))


def test_attention_is_blocked_below_one_half_and_an_empty_row_is_opened():
    logits = torch.tensor([[-1., 0., 2.], [-1., -2., -3.]])
    assert attention_mask(logits).tolist() == [[False, True, True], [True, True, True]]
    assert attention_mask(torch.zeros(0, 3)).shape == (0, 3)


def test_evaluation_takes_every_superpoint_and_training_a_random_half_to_all():
    decoder, batch = small_decoder(num_layers=0), batch_of([20, 1, 41])
    feats = torch.randn(62, 6, dtype=torch.float64)
    assert [q.tolist() for q in decoder.eval()(feats, batch)["query"]] == [list(range(n)) for n in (20, 1, 41)]
    counts = set()
    for _ in range(20):
        query = decoder.train()(feats, batch)["query"]
        for index, n in zip(query, (20, 1, 41)):
            assert n / 2 <= len(index) <= n and len(index.unique()) == len(index) and index.max() < n
        counts.add(len(query[2]))
    assert len(counts) > 5


def test_shapes_of_a_ragged_batch_with_an_empty_scene():
    output = small_decoder().eval()(torch.randn(20, 6, dtype=torch.float64), batch_of(SIZES))
    assert len(output["layers"]) == 3 and output["semantic_logits"].shape == (20, 4)
    for layer in output["layers"]:
        assert [tuple(x.shape) for x in layer["class_logits"]] == [(n, 5) for n in SIZES]
        assert [tuple(x.shape) for x in layer["mask_logits"]] == [(n, n) for n in SIZES]
        assert [tuple(x.shape) for x in layer["quality"]] == [(n,) for n in SIZES]
    assert all(x.isfinite().all() for x in tensors(output))
    assert all(0 < q.min() and q.max() < 1 for q in output["layers"][-1]["quality"] if len(q))


def test_a_batch_equals_its_scenes_one_by_one():
    decoder, feats = small_decoder().eval(), torch.randn(20, 6, dtype=torch.float64)
    together = decoder(feats, batch_of(SIZES))
    for b, part in enumerate(feats.split(SIZES)):
        if len(part):
            alone = decoder(part, batch_of([len(part)]))
            for joint, single in zip(together["layers"], alone["layers"]):
                for name in joint:
                    torch.testing.assert_close(joint[name][b], single[name][0], rtol=0, atol=1e-10)


def test_permuting_superpoints_permutes_queries_and_masks():
    decoder, feats, order = small_decoder().eval(), torch.randn(12, 6, dtype=torch.float64), torch.randperm(12)
    batch = batch_of([12])
    before, after = decoder(feats, batch)["layers"], decoder(feats[order], batch)["layers"]
    for x, y in zip(before, after):
        torch.testing.assert_close(y["class_logits"][0], x["class_logits"][0][order], rtol=0, atol=1e-10)
        torch.testing.assert_close(y["mask_logits"][0], x["mask_logits"][0][order][:, order], rtol=0, atol=1e-10)


def test_a_query_sees_nothing_of_superpoints_outside_its_mask():
    """One layer, cross-attention only: a superpoint that no mask holds may change without any query noticing."""
    torch.manual_seed(0)
    attention, x, source = Attention(8, 2), torch.randn(4, 8), torch.randn(5, 8)
    allowed = torch.ones(4, 5, dtype=torch.bool)
    allowed[:, 2] = False
    other = source.clone()
    other[2] = 100.
    assert torch.equal(attention(x, source, [4], [5], [allowed]), attention(x, other, [4], [5], [allowed]))


def test_every_parameter_gets_a_gradient():
    decoder = small_decoder()
    output = decoder(torch.randn(20, 6, dtype=torch.float64), batch_of(SIZES))
    (sum((x ** 2).sum() for x in tensors(output)) + output["semantic_logits"].sum()).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_under_autocast_are_finite(dtype):
    decoder = small_decoder().float()
    with torch.autocast("cpu", dtype=dtype):
        output = decoder(torch.randn(20, 6) * 100, batch_of(SIZES))
    assert all(x.isfinite().all() for x in tensors(output))


def test_matrix_nms_equals_a_plain_loop_over_pairs():
    torch.manual_seed(0)
    masks, labels, scores = torch.rand(12, 30) < .5, torch.randint(0, 2, (12,)), torch.rand(12, dtype=torch.float64)
    weights = torch.randint(1, 50, (30,)).float()

    def iou(i, j):
        both, either = weights[masks[i] & masks[j]].sum().item(), weights[masks[i] | masks[j]].sum().item()
        return both / either if labels[i] == labels[j] else 0.

    expected = scores.clone()
    for j in range(12):
        above = [i for i in range(12) if scores[i] > scores[j]]
        for i in above:
            own = max((iou(k, i) for k in range(12) if scores[k] > scores[i]), default=0.)
            expected[j] = min(expected[j], scores[j] * (1 - iou(i, j)) / (1 - own))
    torch.testing.assert_close(matrix_nms(masks, labels, scores, weights), expected, rtol=1e-5, atol=1e-6)


def test_matrix_nms_silences_copies_and_spares_other_labels():
    masks = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    scores = matrix_nms(masks, torch.tensor([0, 0, 0, 1, 0]), torch.tensor([.9, .8, .7, .6, .5]), torch.ones(3))
    assert scores.tolist() == pytest.approx([.9, 0, 0, .6, .5])
    assert matrix_nms(masks[:0], torch.zeros(0), torch.zeros(0), torch.ones(3)).shape == (0,)


@pytest.fixture
def scene():
    """Two instances over four superpoints of 10, 20, 30, 40 points; three queries, the third a poor copy of the first.
    """
    index = torch.repeat_interleave(torch.arange(4), torch.tensor([10, 20, 30, 40]))
    masks = torch.tensor([[2., 3., -4., -4.], [-4., -4., 1., 4.], [1., 1., -4., -4.]])
    classes = torch.tensor([[5., 0., 0.], [0., 6., 0.], [2., 0., 2.]])
    return classes, masks, torch.ones(3), index


def test_score_is_class_probability_times_quality_times_mean_mask_probability(scene):
    classes, masks, _, index = scene
    classes[2] = torch.tensor([0., 2., 2.])  # another label than the first, whose mask it shares: no decay
    result = instances_from_logits(classes, masks, torch.tensor([.5, .25, 1.]), index, top_k=2, min_points=1)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, 2, 3)]
    first = .5 * math.exp(5) / (math.exp(5) + 2) * (sigmoid[1] + sigmoid[2]) / 2
    third = math.exp(2) / (2 * math.exp(2) + 1) * sigmoid[0]
    assert result["scores"].tolist() == pytest.approx([first, third], abs=1e-6)
    assert result["labels"].tolist() == [0, 1]
    assert result["masks"].shape == (2, 100) and result["masks"][0].nonzero().squeeze().tolist() == list(range(30))


@pytest.mark.parametrize("thresholds, expected", [
    (dict(min_points=1), [(0, range(30)), (1, range(30, 100))]),  # the copy has decayed to 0
    (dict(min_points=31), [(1, range(30, 100))]),
    (dict(min_points=70), [(1, range(30, 100))]),
    (dict(min_points=71), []),
    (dict(min_points=1, top_k=1), [(1, range(30, 100))]),
    (dict(min_points=1, score_threshold=.9), [(0, range(30))]),
    (dict(min_points=1, mask_threshold=.9), [(1, range(60, 100)), (0, range(10, 30))])])
def test_thresholds_of_count_size_score_and_mask_act(scene, thresholds, expected):
    result = instances_from_logits(*scene, **{"top_k": 3, **thresholds})
    assert result["labels"].tolist() == [label for label, _ in expected]
    assert [mask.nonzero().squeeze(1).tolist() for mask in result["masks"]] == [list(points) for _, points in expected]


def test_inference_follows_a_permutation_of_points_and_of_queries():
    torch.manual_seed(0)
    classes, masks, quality, index = torch.randn(9, 5), torch.randn(9, 15), torch.rand(9), torch.randint(0, 15, (400,))
    queries, points = torch.randperm(9), torch.randperm(400)
    a = instances_from_logits(classes, masks, quality, index, min_points=10)
    b = instances_from_logits(classes[queries], masks[queries], quality[queries], index[points], min_points=10)
    assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["masks"][:, points], b["masks"])
    torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-6)


def test_inference_of_a_batch_equals_that_of_its_scenes():
    decoder = small_decoder().eval()
    batch = batch_of([300, 5, 200])
    index, superpoint_batch = superpoint_index(torch.randint(0, 20, (505,)), batch)
    feats = torch.randn(len(superpoint_batch), 6, dtype=torch.float64)
    scenes = scene_instances(decoder(feats, superpoint_batch), index, batch, min_points=20)
    assert [s["masks"].shape[1] for s in scenes] == [300, 5, 200]
    for b, expected in enumerate(scenes):
        local, alone = superpoint_index(index[batch == b], torch.zeros_like(batch[batch == b]))
        single = scene_instances(decoder(feats[superpoint_batch == b], alone), local, torch.zeros_like(local),
                                 min_points=20)[0]
        assert torch.equal(single["masks"], expected["masks"]) and torch.equal(single["labels"], expected["labels"])
        torch.testing.assert_close(single["scores"], expected["scores"], rtol=0, atol=1e-6)
    assert len(scenes[1]["scores"]) == 0  # five points are fewer than min_points


def test_inference_without_query_or_above_every_mask_is_empty():
    index = torch.tensor([0, 1, 2])
    nothing = instances_from_logits(torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), index)
    assert nothing["masks"].shape == (0, 3) and nothing["labels"].dtype == torch.int64
    blank = instances_from_logits(torch.zeros(2, 4), torch.full((2, 3), -9.), torch.ones(2), index)
    assert blank["masks"].shape == (0, 3) and blank["scores"].shape == (0,)


def test_functions_leave_their_arguments_alone(scene):
    feats, batch = torch.randn(20, 6, dtype=torch.float64), batch_of(SIZES)
    arguments = (*scene, feats, batch)
    before = [x.clone() for x in arguments]
    instances_from_logits(*scene)
    small_decoder()(feats, batch)
    pool(feats, batch, 4)
    superpoint_index(scene[-1], scene[-1])
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


@pytest.mark.parametrize("call, message", [
    (lambda: small_decoder()(torch.zeros(3, 5).double(), batch_of([3])), r"\(S, 6\).*\(3, 5\)"),
    (lambda: small_decoder()(torch.zeros(0, 6).double(), batch_of([0])), "no superpoint"),
    (lambda: InstanceDecoder(embed_dim=10, num_heads=4), "divisible"),
    (lambda: InstanceDecoder(min_query_share=0), "min_query_share"),
    (lambda: superpoint_index(torch.zeros(4), batch_of([4])), r"\(N,\) or \(N, 3\)"),
    (lambda: pool(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), 1), r"index \(N,\)"),
    (lambda: instances_from_logits(torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(3), torch.tensor([0])),
     "3 mask queries"),
    (lambda: instances_from_logits(torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(2), torch.tensor([0])),
     r"quality \(2,\)")])
def test_malformed_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_training_queries_are_drawn_by_the_scene_seed_alone():
    torch.manual_seed(0)
    decoder = InstanceDecoder(16, 3, embed_dim=16, ffn=16).train()
    feats = torch.randn(30, 16)
    both = decoder(feats, torch.tensor([0] * 12 + [1] * 18), [7, 2 ** 61])["query"]
    torch.manual_seed(1)
    for scene, seed, rows in ((0, 7, feats[:12]), (1, 2 ** 61, feats[12:])):
        alone, = decoder(rows, torch.zeros(len(rows), dtype=torch.int64), [seed])["query"]
        assert torch.equal(alone, both[scene])
    first = torch.zeros(12, dtype=torch.int64)
    assert any(len(decoder(feats[:12], first, [seed])["query"][0]) < 12 for seed in range(5))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_one_padded_call_equals_attention_scene_by_scene(masked):
    torch.manual_seed(0)
    x_sizes, source_sizes = [3, 1, 0, 5], [7, 1, 0, 12]
    q, k, v = (torch.randn(sum(sizes), 2, 4, dtype=torch.float64, requires_grad=True)
               for sizes in (x_sizes, source_sizes, source_sizes))
    allowed = [torch.rand(q, s) < .5 for q, s in zip(x_sizes, source_sizes)] if masked else None
    for mask in allowed or ():
        mask[:, :1] = True
    results = []
    for attend in (attend_by_scene, attend_padded):
        y = attend(q, k, v, x_sizes, source_sizes, allowed)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_padding_scenes_is_undone_and_holds_zeros():
    rows = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    padded = pad_scenes(rows, SIZES)
    assert padded.shape == (4, 12, 3) and padded.count_nonzero() == 60
    assert torch.equal(unpad_scenes(padded, SIZES), rows)
    assert torch.autograd.gradcheck(lambda x: pad_scenes(x, SIZES), rows)
    assert torch.autograd.gradcheck(lambda x: unpad_scenes(x, SIZES), torch.randn(4, 12, 2).double().requires_grad_())


def test_what_losses_take_is_what_the_layers_hold_and_nothing_else():
    output = small_decoder()(torch.randn(20, 6, dtype=torch.float64), batch_of(SIZES))
    padded = output["padded"]
    for i, layer in enumerate(output["layers"]):
        for b, query in enumerate(output["query"]):
            n = len(query)
            assert torch.equal(padded["query"][b, :n], query) and (padded["query"][b, n:] == -1).all()
            assert torch.equal(padded["class_logits"][i, b, :n], layer["class_logits"][b])
            assert torch.equal(padded["mask_logits"][i, b, :n, :SIZES[b]], layer["mask_logits"][b])
            assert (padded["mask_logits"][i, b, :, SIZES[b]:] == PADDED).all()
            assert torch.equal(padded["quality"][i, b, :n], layer["quality"][b])
