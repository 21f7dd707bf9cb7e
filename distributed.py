# SPDX-License-Identifier: MIT
"""N processes that train as one process with the N-fold batch would; imports torch alone.

Plain functions instead of a wrapper around the model. With one process, with or without torchrun, all of them do
nothing and need no process group. What depends on the split of a batch, and what makes it independent:

    gradients     average_gradients, once a step
    losses        local sum / world_mean(local mass): the mean of that over processes is the undivided batch's loss
    batch norms   synchronize_batch_norm: statistics of the rows of all processes, joined after Chan, Golub and LeVeque,
                  "Algorithms for Computing the Sample Variance" (1983): no cancellation, one message a layer

    n = sum n_p,   mean = sum n_p mean_p / n,   var = sum (n_p var_p + n_p (mean_p - mean)^2) / n

Nothing here asks how many rows a process has before it sends: every process sends the same messages in the same order,
or the others would wait for it. The caller's part: every norm's output must reach the loss, with a gradient of zero
where a process has nothing to learn from, so that its backward pass runs, too.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable


def setup(device=None, timeout=1800.0):
    """Joins the processes that torchrun started -> (rank, world_size, device); without torchrun (0, 1, device).

    device: None is cuda where there is one, else cpu; of several processes each takes the GPU of its LOCAL_RANK.
    timeout: seconds that a process waits for one that is alive and does not answer. One that dies ends the others
    sooner: on a CPU its connections break, and torchrun stops the rest in any case.
    Raises ValueError where the environment is not torchrun's or does not fit the device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    rank, local_rank, world_size = 0, device.index or 0, 1
    if found["RANK"] is not None or found["WORLD_SIZE"] is not None:
        try:
            rank, local_rank, world_size, _ = map(int, found.values())
        except (TypeError, ValueError):
            raise ValueError(f"torchrun sets these to integers, the environment has {found}: start with torchrun, or "
                             "unset RANK and WORLD_SIZE for a single process") from None
        if not 0 <= local_rank <= rank < world_size:
            raise ValueError(f"0 <= LOCAL_RANK <= RANK < WORLD_SIZE does not hold for {found}")
        if world_size > 1 and device.index is not None:
            raise ValueError(f"device {device} is one for {world_size} processes: give {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there is no {device} for local process {local_rank}: {torch.cuda.device_count()} GPUs "
                             "here, one a process")
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout),
                                device_id=device if cuda else None)
    return rank, world_size, device


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters, world_size, extra=()):
    """Averages gradients over processes, in place: what DistributedDataParallel does, without a wrapper to see through.

    One flat all-reduce in float32 or wider. A parameter without a gradient on this process counts as zero; without one
    on any, it stays without, as it would in one process, and the optimiser passes over it.
    extra: 0-d tensors that travel along, such as the loss. Returns their means over processes, (len(extra),): one that
    is not finite on one process is not finite on all.
    """
    parameters = list(parameters)
    extra = torch.stack([x.detach() for x in extra]) if len(extra) else torch.empty(0, device=parameters[0].device)
    if world_size == 1:
        return extra
    missing = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
    present = torch.ones(len(parameters), device=parameters[0].device)
    for i in missing:
        present[i] = 0
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present, extra, *(grad.flatten() for grad in grads)])  # cat takes the widest type
    dist.all_reduce(flat)
    flat /= world_size
    present, extra, *means = flat.split([len(parameters), len(extra), *(grad.numel() for grad in grads)])
    for grad, mean in zip(grads, means):
        grad.copy_(mean.view_as(grad))
    if missing:  # only then is it worth waiting for the device
        present = present.tolist()
        for i in missing:
            parameters[i].grad = grads[i] if present[i] else None
    return extra


def average_buffers(model, world_size):
    """Running statistics averaged over processes, in place, so that every rank evaluates and saves the same model."""
    if world_size > 1:
        for name, buffer in model.named_buffers():
            if "running_" in name:  # fixed matrices stay to the bit: (x + x + x) / 3 need not be x
                dist.all_reduce(buffer)
                buffer /= world_size


def world_mean(x):
    """Mean of a tensor over processes, float and without a gradient: for the denominators of losses."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if _world_size() > 1:
        dist.all_reduce(total)
    return total / _world_size()


# ----------------------------------------------------------------------------------------------------------------
# Batch normalisation


@torch.no_grad()
def _world_statistics(x):
    """x (M, C), M of this process -> mean (C,), biased variance (C,), rows (0-d) of all of them, float32 or wider.

    Each process joins the same gathered numbers, so that the running statistics of all agree to the bit.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    C, rows = x.shape[1], max(len(x), 1)
    mean = x.sum(0) / rows
    local = torch.cat((mean, (x - mean).square_().sum(0), mean.new_full((1,), len(x))))
    parts = [local]
    if _world_size() > 1:
        parts = [torch.empty_like(local) for _ in range(_world_size())]
        dist.all_gather(parts, local)
    means, squares, counts = torch.stack(parts).split((C, C, 1), 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    squares = (squares + counts * (means - mean).square()).sum(0)
    return mean, squares / count.clamp(min=1), count


class _Normalize(torch.autograd.Function):
    """y = weight * z + bias, z = (x - mean) / std, where mean and std are those of the rows of all processes.

        dx = weight / std * (dy - share * (sum dy + z * sum dy z)),   sums over the rows of all processes

    share is 1 / rows, and 0 where mean and std do not depend on x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, std, share):
        ctx.save_for_backward(x, weight, mean, std, share)
        return (x - mean).mul_(weight / std).add_(bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, std, share = ctx.saved_tensors
        centred = x - mean  # changed in place below: on a CPU new memory costs more than the arithmetic
        grad = grad.to(centred.dtype)
        local = torch.stack((grad.sum(0), (grad * centred).sum(0) / std))
        total = local.clone()
        if _world_size() > 1:
            dist.all_reduce(total)
        total *= share
        grad_x = centred.mul_(-total[1] / std).sub_(total[0]).add_(grad).mul_(weight / std)
        return grad_x.to(x.dtype), local[1].to(weight.dtype), local[0].to(weight.dtype), None, None, None


class SyncedBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d on the concatenated rows (M, C) of all processes; M may differ between them, and be 0.

    One small message forward and one backward. Fewer than two rows in all have no variance: there the running
    statistics serve and stay as they are. In evaluation it is nn.BatchNorm1d. float16 and bfloat16 rows are summed in
    float32. Weight and bias get the gradients of the local rows, for `average_gradients`.

    torch's own SyncBatchNorm refuses a CPU; this one is the same code, and so tested, everywhere, and on a GPU it never
    waits for the device. Its price is a handful of elementwise passes where theirs is fused.
    """

    def forward(self, x):
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"rows must be (M, {self.num_features}), got {tuple(x.shape)}")
        if not self.training:
            return super().forward(x)
        mean, var, count = _world_statistics(x)
        enough = count > 1  # a tensor: asking for its value would wait for the device
        mean = torch.where(enough, mean, self.running_mean)
        unbiased = torch.where(enough, var * (count / (count - 1)), self.running_var)
        std = (torch.where(enough, var, self.running_var) + self.eps).sqrt()
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (unbiased - self.running_var)
        self.num_batches_tracked += enough
        return _Normalize.apply(x, self.weight, self.bias, mean, std, enough / count.clamp(min=1))


def synchronize_batch_norm(model):
    """Makes every nn.BatchNorm1d of a model a SyncedBatchNorm, in place; call it after `setup`.

    Parameters, buffers, keys, hooks and references stay the very same objects. Nothing changes in a single process.
    Raises ValueError for a norm without scale and shift, running statistics or a constant momentum.
    """
    if _world_size() == 1:
        return
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm1d:
            if not (module.affine and module.track_running_stats and module.momentum is not None):
                raise ValueError(f"{name}: {module} needs affine, track_running_stats and a momentum")
            module.__class__ = SyncedBatchNorm
