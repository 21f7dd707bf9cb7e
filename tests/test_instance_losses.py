# SPDX-License-Identifier: MIT
"""Instance targets, matcher and criterion of losses.py against brute force, formulas and finite differences.

A scene is (predictions, masks (G, S) bool, labels (G,), query (Q,)); `batched` pads scenes to a batch.
"""
import contextlib
import math

import pytest
import torch

import decoder
import losses
from data import superpoint_index, to_device
from decoder import InstanceDecoder, draw_queries, pool, scene_instances
from losses import INSTANCE_WEIGHTS, PADDED, InstanceCriterion, instance_losses, instance_targets, match_instances
from metrics import evaluate_instances
from test_losses import two_processes

K = 3
NAMES = ("class_logits", "mask_logits", "quality")


def random_scene(num_superpoints=9, num_instances=3, num_queries=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    S, Q, G = num_superpoints, num_queries, num_instances
    owner = torch.randint(-1, G, (S,), generator=g)
    masks, query = owner == torch.arange(G)[:, None], torch.randperm(S, generator=g)[:Q]
    own = owner == owner[query][:, None]  # (Q, S), what a good query would say
    predictions = (torch.randn(Q, K + 1, generator=g, dtype=dtype),
                   2 * torch.randn(Q, S, generator=g, dtype=dtype) + 2 * own - 1,
                   torch.rand(Q, generator=g, dtype=dtype))
    return predictions, masks, torch.randint(0, K, (G,), generator=g), query


def no_instance():
    predictions, masks, labels, query = random_scene()
    return predictions, masks[:0], labels[:0], query


def no_query_inside():
    predictions, masks, labels, query = random_scene()
    return predictions, masks & False, labels, query


def no_point():
    (classes, masks, quality), targets, labels, query = random_scene()
    return (classes[:0], masks[:0, :0], quality[:0]), targets[:0, :0], labels[:0], query[:0]


def fill(tensors, value):
    """Tensors of one number of dimensions, padded with value to the largest and stacked."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors))]
    out = tensors[0].new_full((len(tensors), *shape), value)
    for row, x in zip(out, tensors):
        row[tuple(slice(size) for size in x.shape)] = x
    return out


def batched(scenes, rubbish=0):
    """Scenes -> output of one layer, targets. rubbish: what padding holds if its value does not matter."""
    predictions, masks, labels, query = zip(*scenes)
    classes, logits, quality = zip(*predictions)
    output = {"class_logits": fill(classes, rubbish)[None], "mask_logits": fill(logits, PADDED)[None],
              "quality": fill(quality, rubbish)[None], "query": fill(query, -1)}
    sizes = torch.tensor([x.shape[1] for x in logits])
    return output, {"masks": fill(masks, False), "labels": fill(labels, -1), "sizes": sizes}


def weighted(terms):
    return sum(weight * term for weight, term in zip(INSTANCE_WEIGHTS.values(), terms))


def terms_of(*scenes):
    """The terms of one layer, by name."""
    return dict(zip(INSTANCE_WEIGHTS, instance_losses(*batched(scenes))[0]))


def loss_of(*scenes):
    return weighted(terms_of(*scenes).values())


def leaves(output):
    """The same output with predictions that require a gradient."""
    return {name: x.clone().requires_grad_() if name in NAMES else x for name, x in output.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mask_losses(logits, mask):
    """BCE and dice of one mask in plain Python."""
    p = [sigmoid(x) for x in logits]
    bce = -sum(math.log(a if m else 1 - a) for a, m in zip(p, mask)) / len(p)
    return bce, 1 - (2 * sum(a for a, m in zip(p, mask) if m) + 1) / (sum(p) + sum(mask) + 1)


def brute_force_match(scene, costs=(0.5, 1, 1)):
    """{instance: query} in plain Python."""
    (classes, logits, _), masks, labels, query = scene
    found = {}
    for g, mask in enumerate(masks.tolist()):
        best = math.inf
        for q, superpoint in enumerate(query.tolist()):
            bce, dice = mask_losses(logits[q].tolist(), mask)
            exps = [math.exp(x) for x in classes[q].tolist()]
            cost = -costs[0] * exps[labels[g]] / sum(exps) + costs[1] * bce + costs[2] * dice
            if mask[superpoint] and cost < best:
                best, found[g] = cost, q
    return found


def test_targets_equal_a_count_in_plain_python(device):
    g = torch.Generator().manual_seed(0)
    batch = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 2, 250, 3]))
    segments = torch.randint(0, 40, (555,), generator=g)
    # Most points of a superpoint share an instance; ids have gaps, and return in other scenes.
    instances = torch.where(torch.rand(555, generator=g) < .7, segments // 4 * 5 - 5,
                            torch.randint(-1, 9, (555,), generator=g))
    labels = torch.where(torch.rand(555, generator=g) < .8, (instances + 5) % K,
                         torch.randint(-1, K, (555,), generator=g))
    labels[-3:] = -1  # no instance in the last scene
    index, superpoint_batch = superpoint_index(segments, batch)
    targets = instance_targets(*(x.to(device) for x in (labels, instances, index, superpoint_batch)))
    targets = to_device(targets, "cpu")
    for b, (masks, classes) in enumerate(zip(targets["masks"], targets["labels"])):
        superpoints = (superpoint_batch == b).nonzero().squeeze(1).tolist()
        assert targets["sizes"][b] == len(superpoints) and not masks[:, len(superpoints):].any()
        valid = (batch == b) & (labels >= 0) & (instances >= 0)
        ids = sorted(set(instances[valid].tolist()))
        assert (classes[len(ids):] == -1).all() and not masks[len(ids):].any()
        for row, i in enumerate(ids):
            votes = labels[valid & (instances == i)].bincount()
            assert votes[classes[row]] == votes.max()
            inside = [bool(2 * (valid & (instances == i) & (index == s)).sum() > (index == s).sum())
                      for s in superpoints]
            assert masks[row, :len(superpoints)].tolist() == inside
        assert masks.sum(0).max() <= 1


def test_a_superpoint_of_two_halves_lies_in_no_instance():
    halves = torch.tensor([0, 0, 1, 1])
    targets = instance_targets(halves, halves, halves * 0, torch.zeros(1, dtype=torch.long))
    assert targets["masks"].tolist() == [[[False], [False]]] and targets["labels"].tolist() == [[0, 1]]


def test_batches_without_instances_have_no_targets_and_train_the_class_head_alone():
    torch.manual_seed(0)
    net = InstanceDecoder(8, K, embed_dim=16, num_layers=1, num_heads=2, ffn=16)
    index, minus = torch.arange(6).repeat(3), torch.full((18,), -1)
    superpoint_batch = torch.tensor([0, 0, 0, 0, 2, 2])
    for labels, instances in ((minus, index), (index, minus)):
        targets = instance_targets(labels, instances, index, superpoint_batch)
        assert targets["masks"].shape == (3, 0, 4) and targets["sizes"].tolist() == [4, 0, 2]
        net.zero_grad()
        output = net(torch.randn(6, 8), draw_queries(superpoint_batch))
        weighted(InstanceCriterion()(output, targets).values()).backward()
        terms = InstanceCriterion()(output, targets)
        assert terms.pop("class") > 0 and not any(terms.values())
        grads = {name: p.grad for name, p in net.named_parameters() if "semantic" not in name}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        assert grads["class_head.2.weight"].any() and not grads["quality_head.2.weight"].any()


def test_matcher_equals_brute_force(monkeypatch):
    for seed in range(20):
        scene = (classes, logits, _), masks, labels, query = random_scene(8, 4, 1 + seed % 8, seed)
        costs = (0.5, 1., 1.) if seed % 2 else (2., .3, .7)
        monkeypatch.setattr(losses, "MATCHING_COSTS", dict(zip(("class", "bce", "dice"), costs)))
        best, matched = match_instances(classes, logits, labels, masks, query)
        found = brute_force_match(scene, costs)
        assert {g: int(best[g]) for g in range(4) if matched[g]} == found
        assert len(set(found.values())) == len(found)


def test_every_term_equals_its_formula_and_arguments_are_left_alone(device):
    num_good = 0
    for seed in range(6):
        scene = (classes, logits, quality), masks, labels, query = random_scene(seed=seed)
        found = brute_force_match(scene)
        expected = {name: [] for name in INSTANCE_WEIGHTS}
        instance_of = {q: g for g, q in found.items()}
        normalizer = 0
        for q, row in enumerate(classes.tolist()):
            c, weight = (int(labels[instance_of[q]]), 1) if q in instance_of else (K, 0.1)
            expected["class"].append(weight * (math.log(sum(map(math.exp, row))) - row[c]))
            normalizer += weight
        for g, q in found.items():
            row, mask = logits[q].tolist(), masks[g].tolist()
            bce, dice = mask_losses(row, mask)
            expected["bce"].append(bce)
            expected["dice"].append(dice)
            pairs = [(x >= 0, m) for x, m in zip(row, mask)]
            iou = sum(a and b for a, b in pairs) / sum(a or b for a, b in pairs)
            if iou > .5:
                expected["quality"].append((quality[q].item() - iou) ** 2)
        num_good += len(expected["quality"])

        output, targets = (to_device(part, device) for part in batched([scene]))
        before = [x.clone() for x in (*output.values(), *targets.values())]
        terms = dict(zip(INSTANCE_WEIGHTS, instance_losses(output, targets)[0].tolist()))
        assert all(map(torch.equal, before, (*output.values(), *targets.values())))
        assert terms["class"] == pytest.approx(sum(expected.pop("class")) / normalizer, abs=1e-9)
        for name, values in expected.items():
            assert terms[name] == pytest.approx(sum(values) / max(len(values), 1), abs=1e-6)  # an IoU is float32
    assert 0 < num_good < 18  # both good masks and others


def test_the_criterion_sums_raw_terms_over_layers_which_are_matched_anew():
    scenes = [random_scene(seed=1), random_scene(seed=2)]
    (one, targets), (other, _) = batched(scenes), batched(scenes)
    other |= {name: one[name].flip(2) for name in NAMES}
    both = {name: torch.cat([one[name], other[name]]) if name in NAMES else one[name] for name in one}
    terms = InstanceCriterion()(both, targets)
    assert list(terms) == list(INSTANCE_WEIGHTS)
    single = instance_losses(one, targets) + instance_losses(other, targets)
    torch.testing.assert_close(torch.stack(list(terms.values())), single[0])


def test_the_weights_are_those_of_the_published_recipe():
    assert INSTANCE_WEIGHTS == {"class": 0.5, "bce": 1.0, "dice": 1.0, "quality": 0.5}
    assert losses.MATCHING_COSTS == {"class": 0.5, "bce": 1.0, "dice": 1.0} and losses.NO_OBJECT_WEIGHT == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    output, targets = batched([random_scene(7, 3, 4, seed=1), random_scene(5, 2, 5, seed=2)])
    output = leaves(output)
    assert torch.autograd.gradcheck(
        lambda x: weighted(instance_losses({**output, name: x}, targets)[0]), output[name])


@pytest.mark.parametrize("scene, matches", [
    (no_instance(), False), (no_query_inside(), False), (random_scene(1, 1, 1, seed=1), None),
    (random_scene(9, 3, 1), None), (random_scene(9, 1, 6), True)],
    ids=["no instance", "no query inside", "one superpoint", "one query", "one instance"])
def test_degenerate_scenes_have_a_finite_loss_with_a_graph(scene, matches):
    output, targets = batched([scene])
    output = leaves(output)
    terms = instance_losses(output, targets)[0]
    assert terms.isfinite().all()
    assert matches is not False or not terms[1:].any()
    assert matches is not True or terms[:3].all()
    weighted(terms).backward()
    assert all(output[name].grad.isfinite().all() for name in NAMES)


def test_scenes_of_a_batch_weigh_the_same_and_those_without_points_or_match_do_not_dilute_it():
    scenes = [random_scene(num_superpoints=5 + n, num_queries=3 + n, seed=n) for n in (1, 2, 5)]
    singles, together = [terms_of(scene) for scene in scenes], terms_of(*scenes, no_point())
    for name in ("class", "bce", "dice"):
        assert all(single[name] > 0 for single in singles)
        torch.testing.assert_close(together[name], sum(single[name] for single in singles) / 3)
    torch.testing.assert_close(terms_of(scenes[0], no_instance())["bce"], singles[0]["bce"])


@pytest.mark.parametrize("first, second", [
    ([1], [2, 3]), ([1], ["no instance"]), (["no instance"], [1, 2, "no query inside"]), (["no point"], [1]),
    (["no point", "no instance"], [2, "no point"]), (["no point"], ["no instance"])], ids=str)
def test_a_batch_may_be_split_over_processes(first, second):
    degenerate = {"no instance": no_instance, "no query inside": no_query_inside, "no point": no_point}
    scenes = [degenerate[x]() if x in degenerate else random_scene(seed=x) for x in (*first, *second)]
    output, targets = batched(scenes)
    output = leaves(output)

    def run(rows, world_mean):
        part = {name: x[:, rows] if name in NAMES else x[rows] for name, x in output.items()}
        calls = []
        criterion = InstanceCriterion(world_mean and (lambda x: calls.append(x.shape) or world_mean(x)))
        terms = list(criterion(part, {name: x[rows] for name, x in targets.items()}).values())
        assert world_mean is None or calls == [(4,)]
        gradients = torch.autograd.grad(weighted(terms), [output[name] for name in NAMES])
        return [torch.stack(terms).detach(), *gradients]

    halves = torch.arange(len(scenes)).split([len(first), len(second)])
    torch.testing.assert_close(two_processes(run, halves), run(slice(None), None))


@pytest.mark.parametrize("size", [1., 60., 6e4])
def test_half_precision_logits_give_the_value_and_gradient_of_fp32(size):
    output, targets = batched([random_scene(30, 3, 20, dtype=torch.float32)])
    output["quality"] = output["quality"].half()
    for name in NAMES[:2]:
        output[name] = (output[name] * size).clamp(-6e4, 6e4).half()
    results = []
    for dtype in (torch.float16, torch.float32):
        inputs = leaves({name: x.to(dtype) if name in NAMES else x for name, x in output.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = weighted(instance_losses(inputs, targets)[0])
        assert loss.dtype == torch.float32 and loss.isfinite()
        results.append([loss, *torch.autograd.grad(loss, [inputs[name] for name in NAMES])])
    assert results[0][0] == results[1][0]
    for half, single in zip(results[0][1:], results[1][1:]):
        assert half.isfinite().all() and torch.equal(half, single.half())


@pytest.mark.parametrize("seed", range(3))
def test_order_of_queries_superpoints_and_instances_does_not_matter(seed):
    torch.manual_seed(seed)
    scene = (classes, logits, quality), masks, labels, query = random_scene(seed=seed)
    q, s, g = torch.randperm(6), torch.randperm(9), torch.randperm(3)
    moved = (classes[q], logits[q][:, s], quality[q]), masks[g][:, s], labels[g], s.argsort()[query[q]]
    torch.testing.assert_close(loss_of(moved), loss_of(scene))


def test_no_step_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    parts = batched([random_scene(), no_instance(), no_point()])
    output, targets = (to_device(part, "meta") for part in parts)  # without numbers: reading one raises
    output = leaves(output)
    weighted(InstanceCriterion()(output, targets).values()).backward()
    assert output["mask_logits"].grad is not None


@pytest.mark.parametrize("call, message", [
    (lambda: instance_losses({"query": torch.zeros(1, 2)}, {"labels": torch.zeros(2, 1)}), "1 scenes, targets of 2"),
    (lambda: instance_targets(torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(1)), r"\(3,\).*\(4,\)"),
    (lambda: instance_targets(*3 * [torch.zeros(3, 1)], torch.zeros(1)), r"\(3, 1\)"),
    (lambda: instance_targets(*3 * [torch.zeros(3)], torch.zeros(1, 1)), r"superpoint_batch \(1, 1\)")])
def test_misshapen_input_is_refused_with_its_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_padded_changes_nothing_whatever_it_holds():
    scenes = [random_scene(9, 3, 6, 1), random_scene(5, 4, 2, 2), no_point(), no_instance()]
    output, targets = batched(scenes, rubbish=7)
    output = leaves(output)
    loss = weighted(instance_losses(output, targets)[0])
    torch.testing.assert_close(loss, loss_of(*scenes))
    loss.backward()
    for name in NAMES:
        assert not any(output[name].grad[:, b, len(query):].any() for b, (*_, query) in enumerate(scenes))
    assert decoder.PADDED == PADDED


def test_the_decoder_learns_instances_that_it_can_tell_apart():
    """Superpoint features that name their instance, with noise: AP must reach 1 on the scenes trained on."""
    torch.manual_seed(0)
    batch = torch.repeat_interleave(torch.arange(2), torch.tensor([600, 480]))
    segments = torch.arange(1080) // 12  # superpoints of 12 points, 9 superpoints per instance
    instances = torch.where(segments % 10 < 9, segments // 10, -1)
    labels = torch.where(instances >= 0, segments // 10 % K, -1)
    index, superpoint_batch = superpoint_index(segments, batch)
    kind = torch.where(instances >= 0, instances, 9)  # every tenth superpoint is of no instance
    feats = pool(torch.randn(10, 16)[kind] + .1 * torch.randn(1080, 16), index, len(superpoint_batch))
    targets = instance_targets(labels, instances, index, superpoint_batch)

    net = InstanceDecoder(16, K, embed_dim=32, num_heads=4, ffn=64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(50):
        queries = draw_queries(superpoint_batch, [2 * step, 2 * step + 1], net.min_query_share)
        loss = weighted(InstanceCriterion()(net(feats, queries), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scenes = scene_instances(net(feats, draw_queries(superpoint_batch)), index, batch)
    truth = torch.where(instances >= 0, (labels + 1) * 1000 + instances + 1, 0)
    result = evaluate_instances([{**scene, "labels": scene["labels"] + 1} for scene in scenes],
                                [truth[batch == b] for b in range(2)], range(1, K + 1))
    assert result["ap"] > 0.99
