# SPDX-License-Identifier: MIT
"""A pretended GPU: tensors that claim to lie on cuda:0 while a CPU tensor does the work. For a process of its own.

    with pretend_gpu() as log: ...      log.waits: where the host waited for the device; log.kernels: what was queued

It refuses what a GPU refuses: tensors of two devices in one operation, NumPy views of a device tensor, a generator of
the other device. It knows nothing of the kernels themselves: their limits, precision and speed. Uses private interfaces
of torch and overwrites two functions of its library in memory (x86-64 Linux), so it may fail with another torch.
"""
import contextlib
import ctypes
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "_local_scalar_dense", "bincount",
         "equal", "histc", "linalg_eigh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # wait for masks, may take indices from the host
TRANSFERS = {"_to_copy", "copy_", "_foreach_copy_", "lift_fresh"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}
ROOT = Path(__file__).resolve().parent.parent


class Log:
    """What happened on the device, in order."""

    def __init__(self):
        self.waits = []    # (name of the operation, the line of the project that called it, kernels queued before)
        self.kernels = []  # names of operations


class GpuTensor(torch.Tensor):
    """Claims to lie on cuda:0; `inner` does the work."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("cuda", 0))
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


LOG = Log()


def execute(func, args, kwargs):
    """Checks and records one operation, and lets the CPU do it."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    hosts = [x for x in tensors if not isinstance(x, GpuTensor)]
    device = kwargs.get("device")
    up = device is not None and torch.device(device).type == "cuda"
    down = bool(ours) and device is not None and not up
    if not ours and not up:
        return func(*args, **kwargs)
    check(func, name, args, kwargs, ours, hosts)
    same = (up or device is None) and kwargs.get("dtype") in (None, tensors[0].dtype if tensors else None)
    if name == "_to_copy" and ours and same and not kwargs.get("memory_format"):
        return ours[0]  # a GPU would not copy either
    record(func, name, args, kwargs, ours, hosts, down)

    args, real_kwargs = tree_map(lambda x: x.inner if isinstance(x, GpuTensor) else x, (args, kwargs))
    if up:
        real_kwargs = {**real_kwargs, "device": "cpu"}
    if name == "_to_copy" and (up or down):
        real_kwargs.pop("pin_memory", None)
    out = func(*args, **real_kwargs)
    if down:
        return out.clone()
    if up and hosts:
        out = out.clone()  # another memory than the host's
    ours = {id(x.inner): x for x in ours}  # what an operation writes into stays the same object

    def wrap(x):
        return (ours[id(x)] if id(x) in ours else GpuTensor(x)) if isinstance(x, torch.Tensor) else x
    return tree_map(wrap, out)


def check(func, name, args, kwargs, ours, hosts):
    """Raises what CUDA would."""
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{name}: expected a cuda generator, got one of the CPU")
    if name in TRANSFERS or name in INDEXING and isinstance(args[0], GpuTensor):
        return
    pointwise = torch.Tag.pointwise in func.tags or name in ("where", "masked_fill", "masked_fill_", "fill_")
    if ours and any(x.dim() > 0 or not pointwise for x in hosts):  # a number of the host may join a pointwise operation
        raise RuntimeError(f"{name}: expected all tensors on one device, got cuda:0 {[tuple(x.shape) for x in ours]} "
                           f"and cpu {[tuple(x.shape) for x in hosts]}")


def record(func, name, args, kwargs, ours, hosts, down):
    blocking = not (kwargs.get("non_blocking") or len(args) > 2 and args[2] is True)
    wait = name in WAITS and ours or down or name == "copy_" and not isinstance(args[0], GpuTensor)
    wait = wait or name in ("_to_copy", "copy_") and any(x.dim() for x in hosts) and blocking
    wait = wait or name in INDEXING and any(
        isinstance(x, torch.Tensor) and (x.dtype == torch.bool or not isinstance(x, GpuTensor)) for x in args[1])
    if wait:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()
                  if Path(frame.filename).parent == ROOT]
        LOG.waits.append((name, frames[-1] if frames else "?", len(LOG.kernels)))
    view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
    if name not in NO_KERNEL and (not view or name == "_to_copy"):
        LOG.kernels.append(name)


def attention(query, key, value, attn_mask=None, *more, real=F.scaled_dot_product_attention, **options):
    """The plain kernel, because the choice of another asks the driver."""
    if not isinstance(query, GpuTensor):
        return real(query, key, value, attn_mask, *more, **options)
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    return torch._scaled_dot_product_attention_math(query, key, value, attn_mask)[0]


def without_streams():
    """The autograd engine asks the accelerator for its streams: make at::accelerator::getAccelerator return nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("_ZN2at11accelerator14getAcceleratorEb", "_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address // 4096 * 4096), ctypes.c_size_t(8192), 7):
            raise OSError("mprotect")
        ctypes.memmove(address, b"\x31\xc0\xc3", 3)  # xor eax, eax; ret


@contextlib.contextmanager
def pretend_gpu():
    """Makes cuda:0 exist, and yields the Log of what happens there."""
    LOG.__init__()
    without_streams()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters, of our class
    stubs = dict(is_available=lambda: True, is_current_stream_capturing=lambda: False, _lazy_init=lambda: None,
                 manual_seed_all=lambda seed: None, is_bf16_supported=lambda *_, **__: True)
    foreach = [*_foreach_utils._foreach_supported_types, GpuTensor]
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", foreach))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Mode())
        yield LOG
