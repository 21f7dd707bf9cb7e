# SPDX-License-Identifier: MIT
"""Training steps on a GPU: the CPU's losses and gradients in float64, where rounding decides nothing.

Without a GPU they run on a pretended one, see pretend_gpu.py, and are skipped if it cannot be set up.
"""
import contextlib
import copy
import json
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

import helpers
import train
from data import to_device
from model import BACKBONES, batches_for, build_model, build_tower
from pretend_gpu import kernels, pretend_gpu, waits
from support.cache import FeatureCache
from support.runlog import RunLog
from volt import Volt

SETTING_UP = "setting up a GPU"
MOST = {"small": 2400, "small bf16": 2800, "volt": 1900}  # kernels of a step
MISTAKES = {  # that a CPU forgives, and what the error says
    "all tensors on one device": lambda x: x + torch.zeros(x.shape),
    "to numpy": lambda x: x.numpy(),
    "a cuda generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "same dtype": lambda x: x @ torch.eye(3, device=x.device, dtype=torch.float16)}


def prepare(backbone):
    """The options of a small run, its network, and a batch as the loader makes it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        options = "--rooms 2 --num-points 300 --batch-size 4 --backbone".split()
        args = train.parse_args(helpers.small(Path(folder), *options, backbone))
        dataset, _, classes, instances = train.build_datasets(args)
        tower = build_tower(vars(args))
        dataset.feature_cache = FeatureCache(folder, tower.fingerprint(), tower.encode)
        dataset.feature_cache.build(dataset.images_only)
        model = build_model(vars(args), len(classes), instances, tower).train()
        return args, model, batches_for(model, training=True)([dataset[i] for i in range(4)])


def step(args, model, batch, amp="off"):
    """One training step that changes no weight -> {term: loss}, the gradient, and what was recorded: waits,
    those between the first layer and the end of the backward pass, and the number of kernels.
    """
    marks, losses, gradients = [], {}, []

    class Spy(RunLog):
        def add_losses(self, terms, weighted):
            marks.append(len(waits))
            losses.update({name: term.detach() for name, term in terms.items()})
            gradients.extend(p.grad.double() for p in model.parameters() if p.grad is not None)

    optimizer = torch.optim.AdamW(train.parameter_groups(model, args), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(batch["points"].device.type, enabled=False)
    weights = {**train.loss_weights(args, 0), "clip": 0.1}
    first_layer = next(model.fusion.encoder_3d.backbone.children())
    handle = first_layer.register_forward_pre_hook(lambda *_: marks.append(len(waits)))
    waits.clear()
    kernels.clear()
    train.train_step(model, [batch], train.build_criteria(args), weights, optimizer, scaler, Spy(), 1e9,
                     train.AMP_DTYPES[amp])
    handle.remove()
    begin, end = marks
    log = {"waits": list(waits), "waits in network": waits[begin:end], "kernels": len(kernels)}
    gradient = torch.cat([g.flatten() for g in gradients]).cpu()
    return {name: loss.item() for name, loss in losses.items()}, gradient, log


def compare():
    """What steps on both devices show: {network: {...}} and {mistake: error}, for JSON."""
    BACKBONES["volt"] = partial(Volt, embed_dim=128, depth=2, num_heads=2, out_channels=32)
    cases, result = {}, {}
    for backbone in ("small", "volt"):
        args, model, batch = prepare(backbone)
        is_float = {name: torch.is_tensor(x) and x.is_floating_point() for name, x in batch.items()}
        wide = {name: x.double() if is_float[name] else x for name, x in batch.items()}
        double = copy.deepcopy(model).double()
        cases[backbone] = args, double, wide, "off", *step(args, double, wide)[:2]
        if backbone == "small":
            cases["small bf16"] = args, model, batch, "bf16", *cases["small"][4:]
    with contextlib.ExitStack() as stack:
        pretended = not torch.cuda.is_available()
        if pretended:
            print(SETTING_UP, flush=True)
            stack.enter_context(pretend_gpu())
            (torch.ones(2, device="cuda", requires_grad=True) * 2).sum().backward()
            print("set up", flush=True)
        for name, (args, model, batch, amp, losses, gradient) in cases.items():
            model.to("cuda").zero_grad()
            found, gradient_found, log = step(args, model, to_device(batch, "cuda"), amp)
            gap = (gradient - gradient_found).norm() / gradient.norm()
            result[name] = {"losses": losses, "found": found, "gap": gap.item(), **log}
        for message, mistake in MISTAKES.items() if pretended else ():
            try:
                mistake(torch.ones(3, 3, device="cuda"))
            except (RuntimeError, TypeError) as error:
                result[message] = str(error)
    return {**result, "pretended": pretended}


@pytest.fixture(scope="module")
def result():
    """What `compare` gives; a pretended GPU needs a process of its own."""
    if torch.cuda.is_available():
        return compare()
    status, printed, errors = helpers.Forked(lambda: print(json.dumps(compare()))).wait()
    *_, last = printed.splitlines() or [""]
    if last == SETTING_UP:  # and then an exception, or the end of the process
        pytest.skip(f"no GPU can be pretended here: status {status}, {(errors.splitlines() or [''])[-1]}")
    assert status == 0, errors
    return json.loads(last)


@pytest.mark.parametrize("network", ["small", "volt"])
def test_a_step_on_a_gpu_is_that_of_the_cpu(result, network):
    assert result[network]["found"] == pytest.approx(result[network]["losses"], rel=1e-6, abs=1e-9)
    assert result[network]["gap"] < 1e-6


def test_a_step_in_half_precision_is_near_that_of_the_cpu_in_what_rounding_does_not_decide(result):
    """Matches, and masks above one half, may be others; what depends on them is finite."""
    case = result["small bf16"]
    assert case["gap"] < torch.inf and all(abs(loss) < torch.inf for loss in case["found"].values())
    for name in ("semantic", "clip"):
        assert case["found"][name] == pytest.approx(case["losses"][name], rel=0.05)


@pytest.mark.parametrize("case", MOST)
def test_the_host_rarely_waits_and_queues_few_kernels(result, case):
    if not result["pretended"]:
        pytest.skip("a real GPU does not tell")
    assert len(result[case]["waits"]) <= 2, result[case]["waits"]
    assert result[case]["kernels"] <= MOST[case]
    assert result[case]["waits in network"] == []


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_that_a_cpu_forgives_are_caught(result, message):
    if not result["pretended"]:
        pytest.skip("a real GPU catches them in other ways")
    assert message in result.get(message, "nothing")


@pytest.mark.parametrize("has_bf16, amp", [(True, "bf16"), (False, "off")])
def test_defaults_follow_the_device_and_a_resumed_run_keeps_its_own(monkeypatch, has_bf16, amp):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(train, "num_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args = train.parse_args([])
    assert (args.amp, args.workers) == (amp, 4)
    for own in (train.parse_args(["--device", "cpu"]), train.parse_args([], {"amp": "off", "workers": 2})):
        assert (own.amp, own.workers) == ("off", 2)
    monkeypatch.setattr(train, "num_cores", lambda: 2)
    assert train.parse_args(["--device", "cpu"]).workers == 0
