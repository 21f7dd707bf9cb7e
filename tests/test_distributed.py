# SPDX-License-Identifier: MIT
"""Two processes on gloo do what one does with both their rows. Functions named `*_in_each` run in both at once."""
import copy
import multiprocessing
import os
import signal
import socket
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from support.distributed import (SyncedBatchNorm, average_buffers, average_gradients, gather_objects, setup,
                         synchronize_batch_norm, world_mean)
from sparse_unet import BatchNorm, PointEncoder

TINY = dict(out_channels=8, planes=(8,) * 8, layers=(1,) * 8)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")


# ---------------------------------------------------------------------------------------------- two processes


def join(rank, port, timeout):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    assert setup("cpu", timeout=timeout) == (rank, 2, torch.device("cpu"))


def serve(rank, port, pipe):
    join(rank, port, timeout=20)
    while True:
        function, args = pipe.recv()
        try:
            function(rank, *args)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())


def start(target, *args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        process = context.Process(target=target, args=(rank, port, theirs, *args), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen when it dies
        pipes.append(mine)
        processes.append(process)
    return processes, pipes


class Pair:
    """Two processes that run what they are told, for the whole file."""

    def __init__(self):
        self.processes = None

    def __call__(self, function, *args):
        if self.processes is None:
            self.processes, self.pipes = start(serve)
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(60) else "no answer")
            except EOFError:
                answers.append("died")
        if any(answers):
            self.stop()
            pytest.fail("\n".join(f"process {rank}: {answer}" for rank, answer in enumerate(answers)))

    def stop(self):
        for process in self.processes or ():
            process.kill()
            process.join()
        self.processes = None


@pytest.fixture(scope="module")
def pair():
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def total(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def close(actual, expected, tolerance):
    """Differences relative to the largest entry."""
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


# ---------------------------------------------------------------------------------------------- batch normalization


def random_norm(channels, dtype=torch.float32, momentum=0.1):
    norm = nn.BatchNorm1d(channels, momentum=momentum, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def same_step(norm, reference, rows, mine, dtype, tolerance):
    """A step of a norm with the rows `mine`, one slice per process, is that of the reference with all."""
    weights = torch.randn(len(rows), norm.num_features)
    x = rows[mine].to(dtype, copy=True).requires_grad_()
    whole = rows.to(reference.weight.dtype, copy=True).requires_grad_()
    out, expected = norm(x), reference(whole)
    assert out.dtype == dtype
    (out.tanh() * weights[mine]).sum().backward()
    (expected.tanh() * weights).sum().backward()
    close(out, expected[mine], tolerance)
    close(x.grad, whole.grad[mine], tolerance)
    for own, other in zip(norm.parameters(), reference.parameters()):
        close(total(own.grad), other.grad, tolerance)
        own.grad = other.grad = None


def norm_in_each(rank, dtype, tolerance, splits):
    torch.manual_seed(0)
    reference = random_norm(6, torch.float64)
    norm = copy.deepcopy(reference).to(dtype)
    synchronize_batch_norm(norm)
    assert type(norm) is SyncedBatchNorm
    for first, second in splits:
        rows = torch.randn(first + second, 6) * torch.rand(6).exp() + torch.randn(6)
        same_step(norm, reference, rows, slice(0, first) if rank == 0 else slice(first, None), dtype, tolerance)
        for own, other in zip(norm.buffers(), reference.buffers()):
            close(own, other, tolerance)
            assert torch.equal(total(own), own * 2)  # bit-exact on both processes


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_norm_of_two_processes_is_batch_norm_of_their_rows_over_several_steps(pair, dtype, tolerance):
    pair(norm_in_each, dtype, tolerance, [(32, 32), (7, 90), (0, 40), (40, 0), (1, 1), (33, 1)])


def few_rows_in_each(rank):
    torch.manual_seed(0)
    norm = random_norm(4)
    norm(torch.randn(50, 4) * 2 + 1)
    before, reference = copy.deepcopy(norm.state_dict()), copy.deepcopy(norm).eval()
    synchronize_batch_norm(norm)
    for rows in (1, 0):  # the row is process 0's
        same_step(norm, reference, torch.randn(rows, 4), slice(0, rows * (1 - rank)), torch.float32, 1e-6)
        assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_fewer_than_two_rows_in_all_are_normalized_with_running_statistics_and_leave_them(pair):
    pair(few_rows_in_each)


def low_precision_in_each(rank, dtype, scale):
    torch.manual_seed(0)
    reference = nn.BatchNorm1d(8, dtype=torch.float64)
    norm = nn.BatchNorm1d(8)
    synchronize_batch_norm(norm)
    rows = (torch.randn(300, 8) * scale).to(dtype)
    mine = slice(0, 100) if rank == 0 else slice(100, None)
    x = rows[mine].clone().requires_grad_()
    whole = rows.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype
    expected = reference(whole)
    weights = torch.randn(300, 8).to(dtype)
    out.backward(weights[mine])
    expected.backward(weights.double())
    close(norm.running_mean, reference.running_mean, 1e-6)
    close(norm.running_var, reference.running_var, 1e-6)
    unit = torch.finfo(dtype).eps / 2  # one rounding, of the result
    torch.testing.assert_close(out.double(), expected[mine], rtol=1.01 * unit, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), whole.grad[mine], rtol=1.01 * unit,
                               atol=max(1e-6 / scale, 2 ** -25 if dtype is torch.float16 else 0))
    close(total(norm.weight.grad), reference.weight.grad, 1e-6)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e4)])
def test_half_precision_rows_are_rounded_once_and_their_statistics_not_at_all(pair, dtype, scale):
    pair(low_precision_in_each, dtype, scale)


def far_from_zero_in_each(rank):
    torch.manual_seed(0)
    norm, plain = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    synchronize_batch_norm(norm)
    rows = torch.randn(1000, 8) + 1000
    rows[700:] -= 2000  # the processes have different means, too
    exact = F.batch_norm(rows.double(), None, None, training=True)
    mine = slice(0, 700) if rank == 0 else slice(700, None)
    error = (norm(rows[mine]) - exact[mine]).abs().max()
    assert error <= 2 * (plain(rows) - exact).abs().max() + 1e-6, error
    close(norm.running_var, 0.9 + 0.1 * rows.double().var(0), 1e-6)


def test_rows_far_from_zero_lose_no_more_than_in_one_process(pair):
    pair(far_from_zero_in_each)


def evaluation_in_each(rank):
    norm = random_norm(4)
    reference = copy.deepcopy(norm).eval()
    synchronize_batch_norm(norm.eval())
    if rank == 0:  # alone: no message is sent
        x = torch.randn(5, 4)
        assert torch.equal(norm(x), reference(x))


def test_in_evaluation_it_is_batch_norm_and_sends_nothing(pair):
    pair(evaluation_in_each)


def swap_in_each(rank):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.5, momentum=0.02), nn.LayerNorm(4),
                          BatchNorm(4, 0.3))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    synchronize_batch_norm(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(before) == list(after) and all(before[key] is after[key] for key in before)
    assert [type(m) for m in model] == [nn.Linear, SyncedBatchNorm, nn.LayerNorm, BatchNorm]
    assert type(model[3].bn) is SyncedBatchNorm and model[3].bn.momentum == 0.3
    assert model[1].eps == 0.5 and model[1].momentum == 0.02
    for options in (dict(affine=False), dict(track_running_stats=False), dict(momentum=None)):
        with pytest.raises(ValueError, match=r"^1: BatchNorm1d\(2"):
            synchronize_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, **options)))


def test_the_swap_keeps_parameters_buffers_keys_and_settings(pair):
    pair(swap_in_each)


def test_norm_in_one_process_is_batch_norm_and_its_gradient_is_right():
    torch.manual_seed(0)
    norm = random_norm(3, torch.float64)
    reference = copy.deepcopy(norm)
    norm.__class__ = SyncedBatchNorm
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    close(norm(x), reference(x), 1e-12)

    def run(x, weight, bias):  # on a copy: running statistics move, and serve where there are few rows
        return torch.func.functional_call(copy.deepcopy(norm), dict(weight=weight, bias=bias), (x,))
    for rows in (6, 2, 1, 0):
        assert torch.autograd.gradcheck(run, (x[:rows], norm.weight, norm.bias))
    for bad in (torch.randn(2, 4), torch.randn(2, 3, 5)):
        with pytest.raises(ValueError, match=r"rows must be \(M, 3\), got \(2, "):
            norm(bad)


# ---------------------------------------------------------------------------------------------- training


def masked_loss(out, target, labelled):
    """Squared error over the labelled points of all processes."""
    normalizer = world_mean(labelled.sum())
    error = (out - target).square().mean(1)
    return torch.where(labelled, error, 0).sum() / torch.where(normalizer > 0, normalizer, 1)


def train_in_each(rank, sizes):
    torch.manual_seed(0)
    reference = PointEncoder(0.3, **TINY).double()
    model = copy.deepcopy(reference)
    synchronize_batch_norm(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, reference)]
    for step in range(4):
        points, colors = torch.rand(2, sum(sizes), 3, dtype=torch.float64)
        batch_idx = torch.arange(2).repeat_interleave(torch.tensor(sizes))
        target = torch.randn(len(points), 8, dtype=torch.float64)
        labelled = (batch_idx == 0) & (torch.arange(len(points)) % 3 > 0) & (step != 1)  # process 1 never has any
        mine = batch_idx == rank
        batch = {"coords": points, "features": colors, "batch": batch_idx}
        loss = masked_loss(model({key: x[mine] for key, x in batch.items()}), target[mine], labelled[mine])
        error = (reference(batch) - target).square().mean(1)
        expected = torch.where(labelled, error, 0).sum() / labelled.sum().clamp(min=1)
        loss.backward()
        expected.backward()
        mean, = average_gradients(model.parameters(), 2, [loss])
        close(mean, expected, 1e-9)
        for own, other in zip(model.parameters(), reference.parameters()):
            close(own.grad, other.grad, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for key, value in reference.state_dict().items():
        close(model.state_dict()[key], value, 1e-9)


@pytest.mark.parametrize("sizes", [(60, 40), (40, 1), (1, 40), (50, 0)])
def test_two_processes_train_a_point_encoder_as_one_does_with_both_scenes(pair, sizes):
    pair(train_in_each, sizes)


def average_in_each(rank):
    wide, half, double, mine, nobodys = parameters = [
        nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for dtype in
        (torch.float32, torch.float16, torch.float64, torch.float32, torch.float32)]
    wide.grad = torch.tensor([[1.0, 2, 3], [4, 5, 6]]) * (rank + 1)
    half.grad = torch.full((2, 3), 60000.0, dtype=torch.float16)  # their sum is beyond its range
    double.grad = torch.full((2, 3), 1 + rank * 2.0 ** -40, dtype=torch.float64)
    if rank == 1:
        mine.grad = torch.ones(2, 3)
    means = average_gradients(iter(parameters), 2, [torch.tensor(rank + 1.0), torch.tensor(rank / 0.5)])
    assert torch.equal(wide.grad, torch.tensor([[1.0, 2, 3], [4, 5, 6]]) * 1.5)
    assert half.grad.dtype == torch.float16 and torch.equal(half.grad, torch.full_like(half, 60000))
    assert torch.equal(double.grad, torch.full_like(double, 1 + 2.0 ** -41))
    assert torch.equal(mine.grad, torch.full((2, 3), 0.5)) and nobodys.grad is None
    assert means.tolist() == [1.5, 1.0]


def test_gradients_of_any_type_are_averaged_and_missing_ones_count_as_zero_unless_all_miss_them(pair):
    pair(average_in_each)


def not_finite_in_each(rank, sick):
    parameter, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    parameter.grad, other.grad = torch.ones(3), torch.ones(2)
    if rank == sick:
        parameter.grad[1] = float("inf")
    loss = torch.tensor(float("nan") if rank == sick else 1.0, requires_grad=True)
    loss_mean, healthy = average_gradients([parameter, other], 2, [loss, torch.tensor(2.0)])
    assert loss_mean.isnan() and not loss_mean.requires_grad and healthy == 2
    assert parameter.grad.isfinite().tolist() == [True, False, True] and other.grad.isfinite().all()


@pytest.mark.parametrize("sick", [0, 1])
def test_what_is_not_finite_on_one_process_is_not_finite_on_both(pair, sick):
    pair(not_finite_in_each, sick)


def means_in_each(rank):
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    strided = x.t() * (rank + 1)
    mean = world_mean(strided.contiguous() if rank else strided)  # whatever its layout
    assert torch.equal(mean, x.detach().t() * 1.5) and not mean.requires_grad
    assert torch.equal(x, torch.arange(6.0).view(2, 3))
    count = torch.tensor(rank)
    assert world_mean(count) == 0.5 and count == rank
    assert world_mean(torch.tensor([1.0, float("nan")])[1 - rank]).isnan()
    model = nn.BatchNorm1d(2)
    model.running_mean += rank
    model.register_buffer("fixed", torch.tensor([float(rank)]))
    average_buffers(model, 2)
    assert model.running_mean.tolist() == [0.5, 0.5] and model.fixed == rank


def test_world_mean_and_averaged_buffers(pair):
    pair(means_in_each)


def test_one_process_needs_no_group_and_nothing_changes(monkeypatch):
    assert setup("cpu") == (0, 1, torch.device("cpu"))
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert setup("cpu") == (0, 1, torch.device("cpu")) and not dist.is_initialized()
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.tensor([[1.0, 2], [3, 4]])
    loss = torch.tensor(7.0, requires_grad=True)
    means = average_gradients(model.parameters(), 1, [loss, loss * 2])
    assert means.tolist() == [7, 14] and not means.requires_grad
    assert model[0].weight.grad.tolist() == [[1, 2], [3, 4]] and model[0].bias.grad is None
    assert average_gradients(model.parameters(), 1).shape == (0,)
    assert torch.equal(world_mean(loss), torch.tensor(7.0)) and not world_mean(loss).requires_grad
    synchronize_batch_norm(model)
    average_buffers(model, 1)
    assert type(model[1]) is nn.BatchNorm1d
    assert gather_objects(loss, 1) == [loss]


def gather_in_each(rank):
    assert gather_objects({"rank": rank, "rows": list(range(rank))}, 2) == [{"rank": 0, "rows": []},
                                                                           {"rank": 1, "rows": [0]}]


def test_gathered_objects_stand_in_order_of_rank(pair):
    pair(gather_in_each)


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("environment, message", [
    (dict(RANK="0"), "start with torchrun"),
    (dict(WORLD_SIZE="2"), "start with torchrun"),
    (dict(RANK="0", WORLD_SIZE="2", MASTER_PORT="1"), "'LOCAL_RANK': None"),
    (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="two", MASTER_PORT="1"), "'WORLD_SIZE': 'two'"),
    (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT=""), "'MASTER_PORT': ''"),
    (dict(RANK="2", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT="1"), "RANK < WORLD_SIZE does not hold"),
    (dict(RANK="-1", LOCAL_RANK="-1", WORLD_SIZE="2", MASTER_PORT="1"), "does not hold"),
    (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="0", MASTER_PORT="1"), "does not hold"),
])
def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        setup("cpu")
    assert not dist.is_initialized()


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    bound = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: bound.append((args, options["device_id"])))
    assert setup("cuda:1") == (0, 1, torch.device("cuda:1")) and setup("cuda") == (0, 1, torch.device("cuda:0"))
    for name, value in dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert setup("cuda") == (3, 4, torch.device("cuda:1"))
    assert bound[2:] == [torch.device("cuda:1"), (("nccl",), torch.device("cuda:1"))]
    with pytest.raises(ValueError, match="4 processes cannot share device cuda:1"):
        setup("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="no cuda:2 for local process 2: this machine has 2 GPUs"):
        setup("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # each process sees one GPU of its own
    assert setup("cuda")[2] == torch.device("cuda:0")


def reduce_forever(rank, port, pipe, timeout):
    join(rank, port, timeout)
    x = torch.ones(1000)
    for step in range(10 ** 9):
        if step == 100:
            pipe.send("running")
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            pipe.send(str(error))
            raise
        x /= 2


@pytest.mark.parametrize("blow, timeout", [(signal.SIGKILL, 600), (signal.SIGSTOP, 3)])
def test_a_process_that_is_killed_or_hangs_ends_the_other_with_an_error(blow, timeout):
    processes, pipes = start(reduce_forever, timeout)
    try:
        assert all(pipe.poll(60) and pipe.recv() == "running" for pipe in pipes)
        os.kill(processes[1].pid, blow)
        begin = time.monotonic()
        processes[0].join(60)
        code, seconds = processes[0].exitcode, time.monotonic() - begin
        assert code not in (None, 0), f"exit code {code} after {seconds:.1f} s"
        assert pipes[0].poll(0) and len(pipes[0].recv()) > 10  # what it died of
    finally:
        for process in processes:
            process.kill()
            process.join()
