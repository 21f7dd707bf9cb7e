# SPDX-License-Identifier: MIT
"""N processes that train as one process with an N times larger batch would; imports torch only.

Plain functions instead of a model wrapper. In a single process, with or without torchrun, they change
nothing and need no process group. Three things depend on how a batch is split over processes; each is
made independent of the split:

    gradients     average_gradients, once per step
    losses        loss = local sum / world_mean(local normalizer), whose mean over processes is the loss
                  of the whole batch; a normalizer is what the sum is divided by: labeled points, say
    batch norms   synchronize_batch_norm: statistics over the rows of all processes, on a GPU by torch's
                  SyncBatchNorm, on a CPU, which that refuses, by SyncedBatchNorm, combined without
                  cancellation (Chan et al., "Algorithms for Computing the Sample Variance", 1983):

    n = sum n_p,   mean = sum n_p mean_p / n,   var = sum (n_p var_p + n_p (mean_p - mean)^2) / n

Every process must send the same messages in the same order, or the others wait for it. So nothing here
skips a message when a process has no rows. The caller's part: the output of every norm must reach the
loss, with a zero gradient if a process has nothing to learn from, so that the backward pass of every
norm runs on every process.
"""
import itertools
import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DistributedSampler


def setup(device=None, timeout=1800.0):
    """Joins the processes that torchrun started, if any -> (rank, world_size, device).

    device: None is cuda if available, else cpu. With several processes each takes the GPU of its
        LOCAL_RANK, or the only one that CUDA_VISIBLE_DEVICES shows it, as SLURM's --gpus-per-task does.
    timeout: seconds that the other processes wait for one that hangs. If one dies, they end at once.
    Raises ValueError if torchrun's environment variables are incomplete or do not fit the device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"device {device!r} must be cpu, cuda or cuda:N")
    device = torch.device(device)
    rank, local_rank, world_size = 0, device.index or 0, 1
    found = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    if found["RANK"] is not None or found["WORLD_SIZE"] is not None:
        try:
            rank, local_rank, world_size, _ = map(int, found.values())
        except (TypeError, ValueError):
            raise ValueError(f"torchrun sets these variables to integers, but the environment has {found}: start with "
                             "torchrun, or unset RANK and WORLD_SIZE for a single process") from None
        if not 0 <= local_rank <= rank < world_size:
            raise ValueError(f"0 <= LOCAL_RANK <= RANK < WORLD_SIZE does not hold for {found}")
        if world_size > 1 and device.index is not None:
            raise ValueError(f"{world_size} processes cannot share device {device}: give {device.type}")
    if device.type == "cuda":
        if world_size > 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
            local_rank = 0
        device = torch.device("cuda", device.index or local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there is no {device} for local process {local_rank}: this machine has "
                             f"{torch.cuda.device_count()} GPUs, and each process needs one")
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout),
                                device_id=device if cuda else None)
    return rank, world_size, device


def leave_processes():
    """Takes this process out of the group that `setup` joined; without a group it does nothing."""
    if _world_size() > 1:
        dist.destroy_process_group()


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters, world_size, extra=()):
    """Averages gradients over processes, in place, in one message of float32 or wider.

    A gradient that is missing on some processes counts as zero there; one that is missing on all stays
    None, as in a single process, so the optimizer skips the parameter. extra: 0-d tensors to average in
    the same message, such as the loss. Returns the means of extra, (len(extra),): not finite on any
    process means not finite on all.
    """
    parameters = list(parameters)
    device = parameters[0].device
    extra = torch.stack([x.detach() for x in extra]) if len(extra) else torch.empty(0, device=device)
    if world_size == 1:
        return extra
    missing = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    present = present.to(device, non_blocking=True)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    flat = torch.cat([present, extra, *(grad.flatten() for grad in grads)])  # cat promotes to the widest dtype
    dist.all_reduce(flat)
    flat /= world_size
    present, extra, *means = flat.split([len(parameters), len(extra), *(grad.numel() for grad in grads)])

    torch._foreach_copy_(grads, [mean.view_as(grad) for grad, mean in zip(grads, means)])
    if missing:  # only then, because tolist waits for the device
        present = present.tolist()
        for i in missing:
            parameters[i].grad = grads[i] if present[i] else None
    return extra


def average_buffers(model, world_size):
    """Averages running statistics over processes, in place: all evaluate and save the same model."""
    if world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if "running_" in name:  # other buffers are equal on all ranks, and (x + x + x) / 3 need not be x
            dist.all_reduce(buffer)
            buffer /= world_size


def world_mean(x):
    """Mean of a tensor over processes, without a gradient: for the normalizers of losses."""
    if _world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / _world_size()


def gather_objects(value, world_size):
    """The picklable values of all processes, as a list in order of rank."""
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that can leave out the first samples of an epoch."""

    skip = 0

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.skip, None)


# ------------------------------------------------------------------------------------------------------
# Batch normalization

@torch.no_grad()
def _world_statistics(x):
    """x (M, C), rows of this process -> mean (C,), biased variance (C,), rows (0-d) of all processes.

    float32 or wider. All processes combine the same numbers in the same order, so that their running
    statistics are bit-identical.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    C = x.shape[1]
    mean = x.sum(0) / max(len(x), 1)
    squares = (x - mean).square_().sum(0)
    local = torch.cat((mean, squares, mean.new_full((1,), len(x))))  # (2 C + 1,)
    gathered = [local]
    if _world_size() > 1:
        gathered = [torch.empty_like(local) for _ in range(_world_size())]
        dist.all_gather(gathered, local)
    means, squares, counts = torch.stack(gathered).split((C, C, 1), 1)  # (N, C), (N, C), (N, 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    squares = (squares + counts * (means - mean).square()).sum(0)
    return mean, squares / count.clamp(min=1), count


class _Normalize(torch.autograd.Function):
    """y = weight * z + bias with z = (x - mean) / std, mean and std of the rows of all processes.

        dx = weight / std * (dy - share * (sum dy + z * sum dy z)),   sums over the rows of all processes

    share is 1 / rows, or 0 if mean and std do not depend on x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, std, share):
        ctx.save_for_backward(x, weight, mean, std, share)
        return (x - mean).mul_(weight / std).add_(bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, std, share = ctx.saved_tensors
        centered = x - mean  # reused in place: on a CPU, new memory costs more than the arithmetic
        grad = grad.to(centered.dtype)
        grad_weight = (grad * centered).sum(0) / std
        local = torch.stack((grad.sum(0), grad_weight))  # (2, C)
        total = local.clone()
        if _world_size() > 1:
            dist.all_reduce(total)
        total *= share
        grad_x = centered.mul_(-total[1] / std).sub_(total[0]).add_(grad).mul_(weight / std)
        grad_bias, grad_weight = local.to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


class SyncedBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the concatenated rows (M, C) of all processes; M may differ, and be 0.

    With fewer than two rows in total, which have no variance, training normalizes with the running
    statistics and leaves them unchanged. float16 and bfloat16 rows are summed in float32. Weight and
    bias get the gradients of the local rows; `average_gradients` joins them.
    """

    def forward(self, x):
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"rows must be (M, {self.num_features}), got {tuple(x.shape)}")
        if not self.training:
            return super().forward(x)
        mean, var, count = _world_statistics(x)
        enough = count > 1  # a tensor, because reading its value would wait for the device
        mean = torch.where(enough, mean, self.running_mean)
        unbiased_var = torch.where(enough, var * (count / (count - 1)), self.running_var)
        std = (torch.where(enough, var, self.running_var) + self.eps).sqrt()
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (unbiased_var - self.running_var)
        self.num_batches_tracked += enough
        return _Normalize.apply(x, self.weight, self.bias, mean, std, enough / count.clamp(min=1))


def synchronize_batch_norm(model):
    """Makes every nn.BatchNorm1d in a model count the rows of all processes; call it after `setup`.

    Parameters, buffers and state-dict keys stay the same. In a single process nothing changes. Raises
    ValueError for a norm without scale and shift, running statistics or a constant momentum.
    """
    if _world_size() == 1:
        return
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm1d:
            if not (module.affine and module.track_running_stats and module.momentum is not None):
                raise ValueError(f"{name}: {module} needs affine, track_running_stats and a momentum")
            if not on_gpu:
                module.__class__ = SyncedBatchNorm
    if on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
