# SPDX-License-Identifier: MIT
"""runtime.py and what runs meet: signals, empty options, missing resources, full disks, logs without a terminal."""
import errno
import os
import signal
import sys

import numpy as np
import pytest
import torch

import predict
import train
from data import MAX_CELLS, elastic, grid_cells
from encoder import Enhanced2DEncoder
from helpers import TOWER
from support import checkpoint, runlog, runtime
from support.distributed import setup
from support.runtime import Console, StopRequest, loader_options, run_command


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_that_is_ignored_stays_ignored(name):
    number = getattr(signal, name)
    before = {n: signal.getsignal(getattr(signal, n)) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")}
    try:
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        stop = StopRequest().install()
        os.kill(os.getpid(), number)
        assert stop.signum == 0 and signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) == stop.receive
    finally:
        for n, handler in before.items():
            signal.signal(getattr(signal, n), handler)


KNOWN = {
    "CUDA out of memory. Tried to allocate 2 GiB": "--batch-size",
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried": "--batch-size",
    "DataLoader worker (pid 7) is killed by signal: Killed. ": "--workers",
    "DataLoader worker (pid 7) is killed by signal: Bus error. ": "/dev/shm",
    "unable to write to file </torch_1>: No space left on device (28), shared memory": "/dev/shm",
    "DataLoader timed out after 600 seconds": "--workers 0",
    "received 0 items of ancdata": "ulimit -n"}


@pytest.mark.parametrize("text", KNOWN)
def test_an_error_whose_cause_is_known_is_one_line_with_what_helps(text, capsys):
    def fail():
        raise RuntimeError(f"{text}\nsecond line")
    with pytest.raises(SystemExit) as end:
        run_command(fail)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and KNOWN[text] in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error, status", [(MemoryError(), 2), (OSError(errno.EMFILE, "Too many open files"), 2),
                                           (ValueError("x"), 2), (FloatingPointError("x"), 1)])
def test_what_a_user_can_fix_is_one_line(error, status, capsys):
    def fail():
        raise error
    with pytest.raises(SystemExit) as end:
        run_command(fail)
    assert end.value.code == status and len(capsys.readouterr().err.splitlines()) == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="of our own making"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("of our own making")))


@pytest.mark.parametrize("parse", [lambda: train.parse_args(["--resume", ""]), lambda: train.parse_args(["--cache", ""]),
                                   lambda: predict.parse_args(["x.pt", "--data", "", "--out", "o"])])
def test_an_empty_text_is_refused(parse, capsys):
    with pytest.raises(SystemExit):
        parse()
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:x", "cuda:-1", "gpu", "cpu:0"])
def test_a_device_that_is_none_is_named(device):
    with pytest.raises(ValueError, match=device):
        setup(device)


def test_every_loader_has_a_timeout_and_ends_with_its_process():
    assert loader_options(2)["timeout"] > 0 and loader_options(2)["worker_init_fn"] is not None
    assert loader_options(0)["timeout"] == 0


# ---------------------------------------------------------------------------------------------- folders


def test_only_the_last_checkpoint_of_a_run_goes_on_in_its_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.pt", "best.pt"):
        (run / name).touch()
    assert checkpoint.lock_in_place(run / "last.pt") is None  # a copy: the folder is not a run's
    checkpoint.lock_folder(run).close()
    checkpoint.lock_in_place(run / "last.pt").close()
    assert checkpoint.lock_in_place(run / "best.pt") is None and checkpoint.lock_in_place(None) is None
    assert {path.name for path in run.iterdir()} == {"last.pt", "best.pt", "lock"}


def test_a_full_disk_keeps_the_old_checkpoint_and_warns(tmp_path, monkeypatch):
    path, said = tmp_path / "last.pt", []
    checkpoint.write_or_warn(path, said.append, {"step": 1})

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        checkpoint.write_or_warn(path, said.append, {"step": 2})
    assert len(said) == 1 and "GiB free" in said[0] and torch.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    checkpoint.write_or_warn(path, said.append, {"step": 3})
    assert torch.load(path)["step"] == 3 and len(said) == 1


@pytest.mark.parametrize("out", ["data", ".", "data/../data"])
def test_nothing_is_written_over_or_around_the_data(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        predict.parse_args(["x.pt", "--data", "data", "--out", out])
    assert "is or holds --data" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- progress


def test_without_a_terminal_the_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    bar = runlog.ProgressBar(1000, 100)
    bar.show(loss=1.23456)
    for _ in range(9):
        now[0] += 40
        bar.update(40)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["300 of 1000 samples, loss 1.235, 1.00 samples per second, 12 minutes left"]


def test_warnings_are_said_again_at_the_end(capsys):
    console = Console(True, ["an older one"])
    console.warn("a new one")
    assert console.notes() == ["note: an older one", "note: a new one"] and "a new one" in capsys.readouterr().out
    Console(False).warn("of another process")
    assert capsys.readouterr().out == ""


def test_the_noise_of_a_building_is_bounded():
    rng = np.random.default_rng(0)
    cloud = (rng.random((500, 3)) * [60, 60, 6]).astype(np.float32)
    assert grid_cells(torch.tensor([60.0, 60, 6]), 0.12).prod() > MAX_CELLS
    moved = elastic(cloud, rng, 0.12, 0.8)
    assert np.isfinite(moved).all() and 0 < np.abs(moved - cloud).max() < 3 * 0.8


@pytest.mark.parametrize("cores, busy, workers, before, expected", [
    (2, 0.2, 2, None, 2), (2, 1.1, 2, None, 1), (2, 2.0, 2, None, 1), (64, 3.2, 8, None, 53), (64, 64, 8, None, 1),
    (2, 1.9, 2, 2, 2)])
def test_torch_computes_on_the_cores_that_are_free(monkeypatch, cores, busy, workers, before, expected):
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(runtime, "busy_cores", lambda: busy)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert "OMP_NUM_THREADS overrules" in runtime.choose_threads(workers, before) and chosen == [expected]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "by OMP_NUM_THREADS" in runtime.choose_threads(workers, before) and len(chosen) == 1


def test_a_prompt_that_clip_would_cut_off_is_refused():
    tower = Enhanced2DEncoder(TOWER, None, image_size=(32, 32))
    assert tower.encode_prompts(["word " * 75]).shape[0] == 1  # with begin and end 77 tokens
    with pytest.raises(ValueError, match="reads 77 tokens"):
        tower.encode_prompts(["a chair", "word " * 76])
