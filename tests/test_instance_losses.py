# SPDX-License-Identifier: MIT
"""Instance targets, matcher and criterion of losses.py against brute force, closed formulas and finite differences."""
import contextlib
import math

import pytest
import torch

import losses
from decoder import InstanceDecoder, pool, scene_instances, superpoint_index
from helpers import two_processes
from losses import INSTANCE_WEIGHTS, InstanceCriterion, dice_loss, instance_loss, instance_targets, match_instances
from metrics import evaluate_instances

K = 3


def random_scene(num_superpoints=9, num_instances=3, num_queries=6, seed=0, dtype=torch.float64):
    """Prediction of one layer, target, and the superpoint of each query, for one scene."""
    g = torch.Generator().manual_seed(seed)
    S, Q, G = num_superpoints, num_queries, num_instances
    owner = torch.randint(-1, G, (S,), generator=g)
    target = {"masks": owner == torch.arange(G)[:, None], "labels": torch.randint(0, K, (G,), generator=g)}
    layer = {"class_logits": torch.randn(Q, K + 1, generator=g, dtype=dtype),
             "mask_logits": 3 * torch.randn(Q, S, generator=g, dtype=dtype),
             "quality": torch.rand(Q, generator=g, dtype=dtype)}
    return layer, target, torch.randperm(S, generator=g)[:Q]


def batched(scenes):
    layers = {name: tuple(layer[name] for layer, _, _ in scenes) for name in ("class_logits", "mask_logits", "quality")}
    return layers, [target for _, target, _ in scenes], tuple(query for _, _, query in scenes)


def weighted(terms):
    return sum(weight * terms[name] for name, weight in INSTANCE_WEIGHTS.items())


def loss_of(scenes):
    layer, targets, query = batched(scenes)
    return weighted(InstanceCriterion()({"layers": [layer], "query": query}, targets))


def with_gradients(scene):
    layer, target, query = scene
    return {name: x.clone().requires_grad_() for name, x in layer.items()}, target, query


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def brute_force_match(layer, target, query, costs=(0.5, 1, 1)):
    """{instance: query} in plain Python."""
    found = {}
    Q, S = layer["mask_logits"].shape
    for g, mask in enumerate(target["masks"].tolist()):
        best = math.inf
        for q in range(Q):
            if not mask[query[q]]:
                continue
            p = [sigmoid(x) for x in layer["mask_logits"][q].tolist()]
            bce = -sum(math.log(a if m else 1 - a) for a, m in zip(p, mask)) / S
            dice = 1 - (2 * sum(a for a, m in zip(p, mask) if m) + 1) / (sum(p) + sum(mask) + 1)
            exps = [math.exp(x) for x in layer["class_logits"][q].tolist()]
            cost = -costs[0] * exps[target["labels"][g]] / sum(exps) + costs[1] * bce + costs[2] * dice
            if cost < best:
                best, found[g] = cost, q
    return found


# ---------------------------------------------------------------------------------------------- targets


def test_targets_equal_a_count_in_plain_python():
    g = torch.Generator().manual_seed(0)
    batch = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 2, 250]))
    segments = torch.randint(0, 40, (552,), generator=g)
    # Most points of a superpoint share an instance; ids have gaps, and return in other scenes.
    instances = torch.where(torch.rand(552, generator=g) < .7, segments // 4 * 5 - 5,
                            torch.randint(-1, 9, (552,), generator=g))
    labels = torch.where(torch.rand(552, generator=g) < .8, (instances + 5) % K, torch.randint(-1, K, (552,),
                                                                                          generator=g))
    index, superpoint_batch = superpoint_index(segments, batch)
    targets = instance_targets(labels, instances, index, superpoint_batch)
    assert len(targets) == 3
    for b, target in enumerate(targets):
        superpoints = (superpoint_batch == b).nonzero().squeeze(1).tolist()
        valid = (batch == b) & (labels >= 0) & (instances >= 0)
        ids = sorted(set(instances[valid].tolist()))
        assert target["masks"].shape == (len(ids), len(superpoints))
        for row, i in enumerate(ids):
            votes = labels[valid & (instances == i)].bincount()
            assert votes[target["labels"][row]] == votes.max()
            inside = [bool(2 * (valid & (instances == i) & (index == s)).sum() > (index == s).sum())
                      for s in superpoints]
            assert target["masks"][row].tolist() == inside
        assert target["masks"].sum(0).max() <= 1


def test_a_superpoint_of_two_halves_lies_in_no_instance():
    target, = instance_targets(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long),
                               torch.zeros(1, dtype=torch.long))
    assert target["masks"].tolist() == [[False], [False]] and target["labels"].tolist() == [0, 1]


def test_scenes_without_instances_have_no_targets():
    minus = torch.full((4,), -1)
    for labels, instances in ((minus, torch.arange(4)), (torch.arange(4), minus)):
        targets = instance_targets(labels, instances, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 2]))
        assert [tuple(t["masks"].shape) for t in targets] == [(0, 1), (0, 0), (0, 2)]
        assert [len(t["labels"]) for t in targets] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- matcher


@pytest.mark.parametrize("seed", range(20))
def test_matcher_equals_brute_force(seed, monkeypatch):
    layer, target, query = random_scene(8, 4, 1 + seed % 8, seed)
    costs = (0.5, 1., 1.) if seed % 2 else (2., .3, .7)
    monkeypatch.setattr(losses, "MATCHING_COSTS", dict(zip(("class", "bce", "dice"), costs)))
    best, matched = match_instances(layer["class_logits"], layer["mask_logits"], target["labels"], target["masks"],
                                    query)
    found = brute_force_match(layer, target, query, costs)
    assert {g: int(best[g]) for g in range(4) if matched[g]} == found
    assert len(set(found.values())) == len(found)


# ---------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("seed", range(6))
def test_every_term_equals_its_formula(seed):
    layer, target, query = random_scene(seed=seed)
    terms = instance_loss(*batched([(layer, target, query)]))
    found = brute_force_match(layer, target, query)
    assert found
    instance_of = {q: g for g, q in found.items()}

    total = mass = 0
    for q, logits in enumerate(layer["class_logits"].tolist()):
        c = int(target["labels"][instance_of[q]]) if q in instance_of else K
        weight = 1 if q in instance_of else 0.1
        total += weight * (math.log(sum(map(math.exp, logits))) - logits[c])
        mass += weight
    assert terms["class"].item() == pytest.approx(total / mass, abs=1e-9)

    bce, dice, quality = [], [], []
    for g, q in found.items():
        logits, mask = layer["mask_logits"][q].tolist(), target["masks"][g].tolist()
        p = [sigmoid(x) for x in logits]
        bce.append(-sum(math.log(a if m else 1 - a) for a, m in zip(p, mask)) / len(p))
        dice.append(1 - (2 * sum(a * m for a, m in zip(p, mask)) + 1) / (sum(p) + sum(mask) + 1))
        iou = sum(x >= 0 and m for x, m in zip(logits, mask)) / sum(x >= 0 or m for x, m in zip(logits, mask))
        if iou > .5:
            quality.append((layer["quality"][q].item() - iou) ** 2)
    assert terms["bce"].item() == pytest.approx(sum(bce) / len(bce), abs=1e-9)
    assert terms["dice"].item() == pytest.approx(sum(dice) / len(dice), abs=1e-9)
    assert terms["quality"].item() == pytest.approx(sum(quality) / max(len(quality), 1), abs=1e-9)


def test_quality_learns_from_good_masks_alone():
    layer, target, query = random_scene()
    best, matched = match_instances(layer["class_logits"], layer["mask_logits"], target["labels"], target["masks"],
                                    query)
    g = int(matched.nonzero()[0])
    layer["mask_logits"][best[g]] = torch.where(target["masks"][g], 8., -8.).double()
    layer["quality"] = torch.full_like(layer["quality"], .25)
    terms = instance_loss(*batched([(layer, target, query)]))
    good = [g]
    for other in matched.nonzero().squeeze(1).tolist():
        x, t = layer["mask_logits"][best[other]] >= 0, target["masks"][other]
        if other != g and (x & t).sum() / (x | t).sum() > .5:
            good.append(other)
    assert good == [g] and terms["quality"].item() == pytest.approx(.75 ** 2, abs=1e-9)


def test_the_criterion_gives_raw_terms_summed_over_layers():
    layer, targets, query = batched([random_scene(seed=1), random_scene(seed=2)])
    terms = instance_loss(layer, targets, query)
    total = InstanceCriterion()({"layers": [layer, layer], "query": query}, targets)
    assert list(total) == list(INSTANCE_WEIGHTS)
    assert all(torch.equal(total[name], 2 * terms[name]) for name in total)


def test_the_weights_are_those_of_the_published_recipe():
    assert INSTANCE_WEIGHTS == {"class": 0.5, "bce": 1.0, "dice": 1.0, "quality": 0.5}
    assert losses.MATCHING_COSTS == {"class": 0.5, "bce": 1.0, "dice": 1.0} and losses.NO_OBJECT_WEIGHT == 0.1


def test_each_layer_is_matched_anew():
    a, b = random_scene(seed=1), random_scene(seed=1)
    target, query = a[1], a[2]
    other = {name: torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9)).sigmoid()
             for name, x in b[0].items()}
    layers = [batched([(layer, target, query)])[0] for layer in (a[0], other)]
    both = weighted(InstanceCriterion()({"layers": layers, "query": (query,)}, [target]))
    single = loss_of([a]) + loss_of([(other, target, query)])
    assert both.item() == pytest.approx(single.item(), abs=1e-9)


def test_dice_is_zero_for_the_mask_itself_and_smoothed_for_an_empty_one():
    t = torch.tensor([1., 0., 1.])
    assert dice_loss(t, t).item() == pytest.approx(0, abs=1e-7)
    assert dice_loss(torch.zeros(3), torch.zeros(3)).item() == 0
    assert dice_loss(torch.zeros(3), t).item() == pytest.approx(1 - 1 / 3, abs=1e-7)


# ---------------------------------------------------------------------------------------------- gradients, degeneracy


@pytest.mark.parametrize("name", ["class_logits", "mask_logits", "quality"])
def test_gradients_equal_finite_differences(name):
    scenes = [random_scene(seed=1), random_scene(seed=2)]
    layer, targets, query = batched(scenes)

    def loss(*inputs):
        return weighted(InstanceCriterion()({"layers": [{**layer, name: inputs}], "query": query}, targets))

    assert torch.autograd.gradcheck(loss, tuple(x.clone().requires_grad_() for x in layer[name]))


def no_instance():
    layer, target, query = random_scene()
    return layer, {"masks": target["masks"][:0], "labels": target["labels"][:0]}, query


def no_query_inside():
    layer, target, query = random_scene()
    return layer, {**target, "masks": torch.zeros_like(target["masks"])}, query


@pytest.mark.parametrize("scene, matches", [
    (no_instance(), False), (no_query_inside(), False), (random_scene(1, 1, 1, seed=1), None),
    (random_scene(9, 3, 1, seed=0), None), (random_scene(9, 1, 6, seed=0), True)],
    ids=["no instance", "no query inside", "one superpoint", "one query", "one instance"])
def test_degenerate_scenes_have_a_finite_loss_with_a_graph(scene, matches):
    scene = with_gradients(scene)
    layer, targets, query = batched([scene])
    terms = instance_loss(layer, targets, query)
    for name in ("bce", "dice", "quality"):
        assert terms[name].requires_grad and terms[name].isfinite()
        assert matches is not False or terms[name].item() == 0
        assert matches is not True or name == "quality" or terms[name].item() > 0
    loss_of([scene]).backward()
    for x in scene[0].values():
        assert x.grad is not None and x.grad.isfinite().all()


def no_point():
    layer, target, query = random_scene()
    return ({name: x[:0, :0] if name == "mask_logits" else x[:0] for name, x in layer.items()},
            {"masks": target["masks"][:0, :0], "labels": target["labels"][:0]}, query[:0])


def test_a_scene_without_points_changes_nothing():
    scene = random_scene()
    assert loss_of([scene, no_point(), scene]).item() == pytest.approx(loss_of([scene]).item(), abs=1e-12)


def test_scenes_without_points_alone_have_a_zero_loss_with_a_graph():
    scene = with_gradients(no_point())
    loss = loss_of([scene, scene])
    loss.backward()
    assert loss.item() == 0 and scene[0]["class_logits"].grad is not None


@pytest.mark.parametrize("first, second", [
    ([1], [2, 3]), ([1], ["no instance"]), (["no instance"], [1, 2, "no query inside"]), (["no point"], [1]),
    (["no point", "no instance"], [2, "no point"]), (["no point"], ["no instance"])], ids=str)
def test_a_batch_may_be_split_over_processes(first, second):
    degenerate = {"no instance": no_instance, "no query inside": no_query_inside, "no point": no_point}
    halves = [[with_gradients(degenerate[x]() if x in degenerate else random_scene(seed=x)) for x in half]
              for half in (first, second)]
    inputs = [x for half in halves for layer, _, _ in half for x in layer.values()]

    def run(scenes, world_mean):
        layer, targets, query = batched(scenes)
        criterion, calls = InstanceCriterion(world_mean=world_mean and (lambda x: calls.append(x) or world_mean(x))), []
        terms = criterion({"layers": [layer, layer], "query": query}, targets)
        assert world_mean is None or [x.shape for x in calls] == [(4,), (4,)]
        gradients = torch.autograd.grad(weighted(terms), inputs, allow_unused=True, materialize_grads=True)
        return [torch.stack(list(terms.values())).detach(), *gradients]

    torch.testing.assert_close(two_processes(run, halves), run(halves[0] + halves[1], None), rtol=1e-9, atol=1e-12)


def test_all_points_ignored_trains_the_class_head_towards_no_object_alone():
    torch.manual_seed(0)
    decoder = InstanceDecoder(8, K, embed_dim=16, num_layers=1, num_heads=2, ffn=16)
    index, superpoint_batch = torch.arange(6).repeat(3), torch.tensor([0, 0, 0, 0, 1, 1])
    targets = instance_targets(torch.full((18,), -1), torch.full((18,), -1), index, superpoint_batch)
    loss = weighted(InstanceCriterion()(decoder(torch.randn(6, 8), superpoint_batch), targets))
    loss.backward()
    assert loss.isfinite()
    grads = {name: p.grad for name, p in decoder.named_parameters() if not name.startswith("semantic_head")}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("quality_head"))


@pytest.mark.parametrize("size", [1., 60., 6e4])
def test_half_precision_logits_give_the_value_and_gradient_of_fp32(size):
    torch.manual_seed(0)
    layer, target, query = random_scene(30, 3, 20, dtype=torch.float32)
    half = {name: (x * (size if name != "quality" else 1)).clamp(-6e4, 6e4).half() for name, x in layer.items()}
    results = []
    for dtype in (torch.float16, torch.float32):
        inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in half.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of([(inputs, target, query)])
        assert loss.dtype == torch.float32 and loss.isfinite()
        loss.backward()
        results.append((loss.detach(), [x.grad for x in inputs.values()]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1]):
        assert a.isfinite().all()
        assert torch.equal(a, b.half())


# ---------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("seed", range(3))
def test_order_of_queries_superpoints_and_instances_does_not_matter(seed):
    layer, target, query = random_scene(seed=seed)
    q, s, g = torch.randperm(6), torch.randperm(9), torch.randperm(3)
    other = {"class_logits": layer["class_logits"][q], "mask_logits": layer["mask_logits"][q][:, s],
             "quality": layer["quality"][q]}
    moved = {"masks": target["masks"][g][:, s], "labels": target["labels"][g]}
    permuted = loss_of([(other, moved, s.argsort()[query[q]])])
    assert permuted.item() == pytest.approx(loss_of([(layer, target, query)]).item(), abs=1e-10)


def test_order_of_points_does_not_matter_to_the_targets():
    torch.manual_seed(0)
    labels, instances, index = (torch.randint(low, 4, (200,)) for low in (-1, -1, 0))
    superpoint_batch, order = torch.tensor([0, 0, 1, 1]), torch.randperm(200)
    before = instance_targets(labels, instances, index, superpoint_batch)
    after = instance_targets(labels[order], instances[order], index[order], superpoint_batch)
    for a, b in zip(before, after):
        assert torch.equal(a["masks"], b["masks"]) and torch.equal(a["labels"], b["labels"])


def test_a_batch_weighs_as_the_mean_of_its_scenes():
    scenes = [random_scene(num_superpoints=5 + n, num_queries=3 + n, seed=n) for n in (1, 2, 5)]
    singles = [instance_loss(*batched([scene])) for scene in scenes]
    together = instance_loss(*batched(scenes))
    for name in ("class", "bce", "dice"):
        assert all(s[name] > 0 for s in singles)
        assert together[name].item() == pytest.approx(sum(s[name].item() for s in singles) / 3, abs=1e-10)


def test_scenes_without_a_match_do_not_dilute_the_mask_terms():
    scene = random_scene()
    alone, beside = instance_loss(*batched([scene])), instance_loss(*batched([scene, no_instance()]))
    assert beside["bce"].item() == pytest.approx(alone["bce"].item(), abs=1e-12)


def test_labels_matter():
    layer, target, query = random_scene()
    relabelled = {**target, "labels": (target["labels"] + 1) % K}
    assert loss_of([(layer, relabelled, query)]) != loss_of([(layer, target, query)])


def test_no_step_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    layer, targets, query = batched([random_scene(), no_instance(), no_point()])
    layer = {name: tuple(x.to("meta").requires_grad_() for x in tensors) for name, tensors in layer.items()}
    targets = [{name: x.to("meta") for name, x in target.items()} for target in targets]
    loss = weighted(InstanceCriterion()({"layers": [layer], "query": tuple(x.to("meta") for x in query)}, targets))
    loss.backward()  # tensors without numbers: reading one would have raised
    assert loss.shape == () and layer["mask_logits"][0].grad is not None


def test_arguments_are_left_alone():
    layer, target, query = random_scene()
    arguments = [*layer.values(), *target.values(), query]
    before = [x.clone() for x in arguments]
    loss_of([(layer, target, query)])
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


@pytest.mark.parametrize("call, message", [
    (lambda: InstanceCriterion()({"layers": [], "query": (torch.zeros(2),)}, [{}, {}]), "1 scenes, but targets of 2"),
    (lambda: instance_targets(torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(1)), r"\(3,\).*\(4,\)"),
    (lambda: instance_targets(*3 * [torch.zeros(3, 1)], torch.zeros(1)), r"\(3, 1\)"),
    (lambda: instance_targets(*3 * [torch.zeros(3)], torch.zeros(1, 1)), r"superpoint_batch \(1, 1\)")])
def test_misshapen_input_is_refused_with_its_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- all together


def test_the_decoder_learns_instances_that_it_can_tell_apart():
    """Superpoint features that name their instance, with noise: AP must reach 1 on the scenes trained on."""
    torch.manual_seed(0)
    batch = torch.repeat_interleave(torch.arange(2), torch.tensor([600, 480]))
    segments = torch.arange(1080) // 12  # superpoints of 12 points, 9 superpoints an instance
    instances = torch.where(segments % 10 < 9, segments // 10, -1)
    labels = torch.where(instances >= 0, segments // 10 % K, -1)
    index, superpoint_batch = superpoint_index(segments, batch)
    kind = torch.where(instances >= 0, instances, 9)  # every tenth superpoint is of no instance
    feats = pool(torch.randn(10, 16)[kind] + .1 * torch.randn(1080, 16), index, len(superpoint_batch))
    targets = instance_targets(labels, instances, index, superpoint_batch)

    decoder = InstanceDecoder(16, K, embed_dim=32, num_heads=4, ffn=64)
    criterion = InstanceCriterion()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(50):
        loss = weighted(criterion(decoder(feats, superpoint_batch), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scenes = scene_instances(decoder.eval()(feats, superpoint_batch), index, batch)
    truth = torch.where(instances >= 0, (labels + 1) * 1000 + instances + 1, 0)
    result = evaluate_instances([{**scene, "labels": scene["labels"] + 1} for scene in scenes],
                                [truth[batch == b] for b in range(2)], range(1, K + 1))
    assert result["ap"] == pytest.approx(1, abs=1e-9)


def test_what_is_padded_changes_nothing_whatever_it_holds():
    """Predictions and targets given padded, with rubbish in the padding of all but masks and queries."""
    layer, targets, query = batched([random_scene(9, 3, 6, 1), random_scene(5, 4, 2, 2), no_point(), no_instance()])
    output = {"layers": [layer, layer], "query": query}
    predictions = losses.pad_predictions(output["layers"], query)
    for b, q in enumerate(query):
        for name in ("class_logits", "quality"):
            predictions[name][:, b, len(q):] = 7
        predictions["mask_logits"][:, b, len(q):] = 3
    predictions = {name: x.requires_grad_(x.is_floating_point()) for name, x in predictions.items()}
    expected = InstanceCriterion()(output, targets)
    terms = InstanceCriterion()({**output, "padded": predictions}, losses.pad_targets(targets))
    for name in expected:
        assert terms[name].item() == pytest.approx(expected[name].item(), abs=1e-12)
    weighted(terms).backward()
    for name in ("class_logits", "mask_logits", "quality"):
        assert not any(predictions[name].grad[:, b, len(q):].any() for b, q in enumerate(query))


def test_the_decoder_and_the_criterion_mean_the_same_padding():
    import decoder
    assert decoder.PADDED == losses.PADDED
