# SPDX-License-Identifier: MIT
"""Training steps on a GPU: the CPU's losses and gradients. If there is none, on a pretended one (pretend_gpu.py), which
also counts waits and kernels, and catches mistakes that a CPU forgives. In a process of its own, and skipped if the
pretence cannot be set up.
"""
import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch

from helpers import Forked

NETWORKS = {"small": ["--batch-size", "4"], "res16unet34c": ["--batch-size", "8", "--backbone", "res16unet34c"]}
MOST = {  # waits and kernels of a step
    ("small", "off"): (12, 2500), ("small", "bf16"): (12, 3000),
    ("res16unet34c", "off"): (16, 5000), ("res16unet34c", "bf16"): (16, 5000)}
SETTING_UP = "setting up a GPU"
MISTAKES = {  # in what the error says
    "left on the CPU": "one device", "numpy": "numpy", "generator": "generator", "half by float": "dtype"}


def prepare(network):
    """The options of a small run, its network, and a batch as the loader makes it."""
    import train
    from support.cache import FeatureCache
    from helpers import small
    from model import build_encoder_2d, build_model
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args(small(Path(folder), "--rooms", "8", "--frames-per-room", "1", "--num-points", "300",
                                      *NETWORKS[network]))
        dataset, _, classes, instances = train.build_datasets(args)
        tower = build_encoder_2d(vars(args))
        dataset.feature_cache = FeatureCache(folder, tower.fingerprint(), tower.encode)
        dataset.feature_cache.build(dataset.images_only)
        model = build_model(vars(args), len(classes), instances, tower).train()
        samples = [dataset[i] for i in range(args.batch_size)]
    return args, model, train.collate_prepared(samples, model.cell, model.decoder.min_query_share)


def step(args, model, batch, amp, device, mistake=None):
    """One training step -> losses, gradients, and on a pretended GPU {"waits", "kernels", "marks"}: how many kernels
    are queued when the first layer begins, and when the backward pass has ended.
    """
    import train
    from model import to_device
    from pretend_gpu import LOG
    from support.runlog import RunLog
    marks, losses, gradient = [], {}, {}

    class Spy(RunLog):
        def add_losses(self, terms, weighted):
            marks.append(len(LOG.kernels))
            losses.update({name: term.detach() for name, term in terms.items()})
            gradient.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    batch = to_device(batch, device)
    criteria = train.build_criteria(args)
    semantic = criteria["semantic"]
    criteria["semantic"] = lambda logits, labels: semantic(spoil(logits, mistake), labels)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=False)
    weights = {**train.loss_weights(args, 0), "clip": 0.1}
    first_layer = model.fusion.encoder_3d.backbone.conv0p1s1
    handle = first_layer.register_forward_pre_hook(lambda *_: marks.append(len(LOG.kernels)))
    for _ in range(2 if device == "cuda" else 1):  # the first step makes the optimizer's state; none changes a weight
        LOG.__init__()
        marks.clear()
        train.train_step(model, [batch], criteria, weights, optimizer, scaler, Spy(), 1e9, train.AMP_DTYPES[amp])
    handle.remove()
    log = {"waits": list(LOG.waits), "kernels": len(LOG.kernels), "marks": marks}
    losses = {name: loss.item() for name, loss in losses.items()}
    return losses, {name: grad.cpu().clone() for name, grad in gradient.items()}, log


def spoil(logits, mistake):
    """Logits on their way to the loss, with a mistake that a CPU forgives, or raises only for half precision."""
    if mistake == "left on the CPU":
        return logits + torch.zeros(logits.shape)
    if mistake == "numpy":
        logits.detach().numpy()
    if mistake == "generator":
        return logits + torch.rand(logits.shape, device=logits.device, generator=torch.Generator())
    if mistake == "half by float":
        return logits @ torch.eye(logits.shape[1], device=logits.device, dtype=torch.float16)
    return logits


def compare(network):
    """What steps on both devices show, as a dict."""
    from pretend_gpu import pretend_gpu
    args, model, batch = prepare(network)
    on_cpu = {amp: step(args, model, batch, amp, "cpu") for amp in ("off", "bf16")}
    result = {}
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            print(SETTING_UP, flush=True)
            stack.enter_context(pretend_gpu())
            (torch.ones(2, device="cuda", requires_grad=True) * 2).sum().backward()
            print("set up", flush=True)
        model.to("cuda").zero_grad()
        for amp, (losses, gradient, _) in on_cpu.items():
            found, gradient_found, log = step(args, model, batch, amp, "cuda")
            norm = torch.stack([g.norm() for g in gradient.values()]).norm()
            gap = torch.stack([(gradient[name] - gradient_found[name]).norm() for name in gradient]).norm()
            result[amp] = {"losses": losses, "found": found, "gap": (gap / norm).item(), **log}
        result["pretended"] = torch.zeros(0, device="cuda").__class__ is not torch.Tensor
        for mistake in MISTAKES if result["pretended"] and network == "small" else ():
            try:
                step(args, model, batch, "off", "cuda", mistake)
            except (RuntimeError, TypeError) as error:
                result[mistake] = str(error)
    return result


@pytest.fixture(scope="module")
def comparisons():
    """What `compare` gives for every network; a pretended GPU needs processes of its own."""
    if torch.cuda.is_available():
        return {network: compare(network) for network in NETWORKS}
    forks = {network: Forked(lambda network=network: print(json.dumps(compare(network)))) for network in NETWORKS}
    return {network: result_of(*fork.wait()) for network, fork in forks.items()}


def result_of(status, printed, errors):
    """The result of a process, or why no GPU can be pretended, as text."""
    *_, last = printed.splitlines() or [""]
    if last == SETTING_UP:  # and then an exception, or the end of the process
        return f"status {status}, {(errors.splitlines() or [''])[-1]}"
    assert status == 0, errors
    return json.loads(last)


@pytest.fixture(scope="module", params=NETWORKS)
def comparison(request, comparisons):
    """The name of a network and the result of `compare`."""
    result = comparisons[request.param]
    if isinstance(result, str):
        pytest.skip(f"no GPU can be pretended here: {result}")
    return request.param, result


@pytest.mark.parametrize("amp, tolerance", [("off", 1e-4), ("bf16", 0.15)])
def test_a_step_on_a_gpu_is_that_of_the_cpu(comparison, amp, tolerance):
    result = comparison[1][amp]
    assert result["found"] == pytest.approx(result["losses"], rel=tolerance / 10, abs=tolerance / 10)
    assert result["gap"] < tolerance


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_host_rarely_waits_and_queues_few_kernels(comparison, amp):
    network, result = comparison
    if not result["pretended"]:
        pytest.skip("a real GPU does not tell")
    result = result[amp]
    most_waits, most_kernels = MOST[network, amp]
    assert len(result["waits"]) <= most_waits, result["waits"]
    assert result["kernels"] <= most_kernels
    begin, end = result["marks"]
    assert [wait for wait in result["waits"] if begin <= wait[2] < end] == []


@pytest.mark.parametrize("comparison", ["small"], indirect=True)
def test_mistakes_that_a_cpu_forgives_are_caught(comparison):
    if not comparison[1]["pretended"]:
        pytest.skip("a real GPU catches them in other ways")
    for mistake, message in MISTAKES.items():
        assert message in comparison[1].get(mistake, "nothing"), mistake
