# SPDX-License-Identifier: MIT
"""A pretended GPU: tensors that claim to lie on cuda:0 while a CPU tensor does the work.

It refuses what a GPU refuses, and records waits and kernels; it knows nothing of the limits, precision and
speed of real kernels. It uses private interfaces of torch and overwrites two functions of its library in
memory (x86-64 Linux), so it needs a process of its own, and raises if it cannot be set up.
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

ROOT = str(Path(__file__).resolve().parent.parent)
WAITS = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "_local_scalar_dense",
         "bincount", "equal", "histc", "linalg_eigh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # waits for masks and host indices
COPIES = {"_to_copy", "copy_", "_foreach_copy_", "lift_fresh"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}
TAKE_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill_"}  # of the host, like pointwise operations
waits = []    # operations that waited for the device, with the line of the project
kernels = []  # operations that were queued


def dispatch(self, func, types, args=(), kwargs=None):
    return execute(func, args, kwargs or {})


class GpuTensor(torch.Tensor):
    """Claims to lie on cuda:0; `inner` does the work."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(dispatch)

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("cuda", 0))
        out.inner = inner
        return out

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


class Mode(TorchDispatchMode):  # sees the operations that make a tensor, too
    __torch_dispatch__ = dispatch


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
    inner.pop("pin_memory", None)
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
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
        waits.append(" ".join([name, *[x for x in lines if x.startswith(ROOT) and "/tests/" not in x][-1:]]))
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
