# SPDX-License-Identifier: MIT
"""Training steps on a GPU: the CPU's losses and gradients in float64, where rounding decides nothing.

Without a GPU they run on a pretended one: tensors that claim to lie on cuda:0 while a CPU tensor does the
work. It refuses what a GPU refuses, and records waits and kernels; it knows nothing of the limits,
precision and speed of real kernels. It uses private interfaces of torch and overwrites two functions of
its library in memory (x86-64 Linux), so it runs in a process of its own, and tests are skipped if it cannot
be set up.
"""
import contextlib
import copy
import ctypes
import json
import tempfile
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import helpers
import train
from data import to_device
from model import BACKBONES, batches_for, build_model, build_tower
from support.cache import FeatureCache
from support.runlog import RunLog
from volt import Volt

# ---------------------------------------------------------------------------------- a pretended GPU

WAITS = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "_local_scalar_dense",
         "bincount", "equal", "histc", "linalg_eigh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # waits for masks and host indices
COPIES = {"_to_copy", "copy_", "_foreach_copy_", "lift_fresh"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
             "_unsafe_view"}
TAKE_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill_"}  # of the host, like pointwise operations
waits = []    # operations that waited for the device, with the line of the project
kernels = []  # operations that were queued


class GpuTensor(torch.Tensor):
    """Claims to lie on cuda:0; `inner` does the work."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("cuda", 0))
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


class Mode(TorchDispatchMode):
    """Sees the operations that make a tensor, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


def on_host(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, GpuTensor)


def execute(func, args, kwargs):
    """Checks and records one operation, and lets the CPU do it."""
    name = func._schema.name.split("::")[1]
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, GpuTensor)]
    hosts = [x for x in leaves if on_host(x)]
    target = torch.device(kwargs.get("device") or ("cuda" if ours else "cpu"))
    if not ours and target.type == "cpu":
        return func(*args, **kwargs)
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in leaves):
        raise RuntimeError(f"{name}: expected a cuda generator, got one of the CPU")
    takes_numbers = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS
    takes_all = name in COPIES or name in INDEXING and not on_host(args[0])
    if ours and not takes_all and any(x.dim() > 0 or not takes_numbers for x in hosts):
        raise RuntimeError(f"{name}: expected all tensors on one device, got cuda:0 and cpu")
    record(func, name, args, kwargs, hosts, ours and (name in WAITS or target.type == "cpu"))

    args, inner = tree_map(lambda x: x.inner if isinstance(x, GpuTensor) else x, (args, kwargs))
    inner = {key: value for key, value in inner.items() if key != "pin_memory"}
    if "device" in inner:
        inner["device"] = torch.device("cpu")
    if name == "_conj":
        func = torch.ops.aten._conj_physical.default  # without the bit that other operations would miss
    out = func(*args, **inner)
    if target.type == "cpu":
        return out.clone()
    if name in COPIES and not ours:
        out = tree_map(torch.clone, out)  # another memory than the host's
    written = {id(x.inner): x for x in ours}  # what an operation writes into stays the same object
    return tree_map(lambda x: written.get(id(x), GpuTensor(x)) if on_host(x) else x, out)


def record(func, name, args, kwargs, hosts, wait):
    blocking = not (kwargs.get("non_blocking") or len(args) > 2 and args[2] is True)
    if name in ("_to_copy", "copy_"):
        wait = wait or blocking and any(x.dim() for x in hosts)
    elif name in INDEXING:
        wait = wait or any(on_host(x) or x is not None and x.dtype == torch.bool for x in args[1])
    if wait:
        frames = [frame for frame in traceback.extract_stack() if str(helpers.ROOT) in frame.filename]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        waits.append(" ".join([name, *[place for place in places if not place.startswith("test_")][-1:]]))
    view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
    if name not in NO_KERNEL and (not view or name == "_to_copy"):
        kernels.append(name)


def attention(query, key, value, attn_mask=None, *more, real=F.scaled_dot_product_attention, **options):
    """The plain kernel, because the choice of another asks the driver."""
    if on_host(query):
        return real(query, key, value, attn_mask, *more, **options)
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    return torch._scaled_dot_product_attention_math(query, key, value, attn_mask)[0]


def hide_accelerator():
    """The autograd engine asks at::accelerator::getAccelerator for streams: make it return nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("14getAcceleratorEb", "13isAcceleratorEN3c1010DeviceTypeE"):
        function = getattr(library, f"_ZN2at11accelerator{name}")
        address = ctypes.cast(function, ctypes.c_void_p).value
        page = ctypes.c_void_p(address // 4096 * 4096)
        if ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(8192), 7):
            raise OSError("mprotect")
        ctypes.memmove(address, b"\x31\xc0\xc3", 3)  # xor eax, eax; ret


@contextlib.contextmanager
def pretend_gpu():
    """Makes cuda:0 exist."""
    hide_accelerator()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
    stubs = dict(is_available=lambda: True, is_current_stream_capturing=lambda: False,
                 _lazy_init=lambda: None, manual_seed_all=lambda seed: None,
                 is_bf16_supported=lambda *_, **__: True)
    foreach = [*_foreach_utils._foreach_supported_types, GpuTensor]
    with (mock.patch.multiple(torch.cuda, **stubs),
          mock.patch.object(F, "scaled_dot_product_attention", attention),
          mock.patch.object(_foreach_utils, "_foreach_supported_types", foreach),
          torch.autograd.set_multithreading_enabled(False), Mode()):
        yield


# ---------------------------------------------------------------------------------- steps

SETTING_UP = "setting up a GPU"
MOST = {"small": (12, 3300), "small bf16": (12, 4000), "volt": (8, 2200)}  # waits and kernels of a step
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
    most_waits, most_kernels = MOST[case]
    assert len(result[case]["waits"]) <= most_waits, result[case]["waits"]
    assert result[case]["kernels"] <= most_kernels
    assert result[case]["waits in network"] == []


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_that_a_cpu_forgives_are_caught(result, message):
    if not result["pretended"]:
        pytest.skip("a real GPU catches them in other ways")
    assert message in result.get(message, "nothing")
