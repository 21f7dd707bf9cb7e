# SPDX-License-Identifier: MIT
"""runtime.py and what runs meet: signals, empty options, missing resources, full disks, logs without a terminal."""
import errno
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

import predict
import train
from data import MAX_CELLS, elastic, grid_cells
from encoder import Enhanced2DEncoder
from helpers import ROOT, TOWER
from support import checkpoint, runlog, runtime
from support.distributed import setup
from support.runtime import Console, StopRequest, loader_options, run_command


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
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
    "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)": "ulimit -n",
    "received 0 items of ancdata": "ulimit -n"}


@pytest.mark.parametrize("text", KNOWN)
def test_an_error_whose_cause_is_known_is_one_line_with_what_helps(text, capsys):
    def fail():
        raise RuntimeError(f"{text}\nsecond line")
    with pytest.raises(SystemExit) as end:
        run_command(fail)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and KNOWN[text] in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error, status, advice", [
    (MemoryError(), 2, "--batch-size"), (OSError(errno.EMFILE, "Too many open files"), 2, "ulimit -n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "/dev/shm"),
    (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 2, "device: 'x.pt'\n"),
    (ValueError("x"), 2, ""), (FloatingPointError("x"), 1, "")])
def test_what_a_user_can_fix_is_one_line(error, status, advice, capsys):
    def fail():
        raise error
    with pytest.raises(SystemExit) as end:
        run_command(fail)
    printed = capsys.readouterr().err
    assert end.value.code == status and printed.count("\n") == 1 and advice in printed


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
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        for call in re.findall(r"DataLoader\((?!\))((?:[^()]|\([^()]*\))*)\)", path.read_text()):
            assert "loader_options" in call, f"{path.name}: {call}"


class Unsendable(list):
    """Data whose items a worker cannot send."""

    def __getitem__(self, index):
        return self

    def __reduce__(self):
        raise list.__getitem__(self, 0)


@pytest.mark.parametrize("error, advice", [
    (RuntimeError("unable to write to file </torch_7>: No space left on device (28)"), "/dev/shm"),
    (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),
    (OSError(errno.EMFILE, "Too many open files"), "--workers 0 shows why")])
def test_a_worker_that_cannot_send_a_batch_ends_the_run_at_once(error, advice, capfd):
    options = {**loader_options(1), "timeout": 60}
    with pytest.raises(RuntimeError) as end:
        list(torch.utils.data.DataLoader(Unsendable([error]), batch_size=None, collate_fn=lambda item: item, **options))
    assert advice in runtime.advice_for(end.value)
    assert "Traceback" not in capfd.readouterr().err


def test_on_a_terminal_an_error_begins_on_a_line_of_its_own(monkeypatch, capsys):
    for is_terminal, start in ((True, "\n"), (False, "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        with pytest.raises(SystemExit):
            run_command(lambda: int("x"))
        assert re.fullmatch(start + r"\S+: error: .*\n", capsys.readouterr().err)


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


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "GiB free"), (errno.EDQUOT, "GiB free"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_nothing_keeps_the_old_checkpoint_and_warns(tmp_path, monkeypatch, number, words):
    path, said = tmp_path / "last.pt", []
    checkpoint.write_or_warn({"step": 1}, path, said.append)

    def full(*args, **options):
        raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        checkpoint.write_or_warn({"step": 2}, path, said.append)
    assert len(said) == 1 and words in said[0] and torch.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    checkpoint.write_or_warn({"step": 3}, path, said.append)
    assert torch.load(path)["step"] == 3 and len(said) == 1


@pytest.mark.parametrize("out", ["data", ".", "data/../data"])
def test_nothing_is_written_over_or_around_the_data(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        predict.parse_args(["x.pt", "--data", "data", "--out", out])
    assert "is or holds data: nothing is written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("initial, values, line", [
    (100, {"loss": 1.23456}, "300 of 1000 samples, loss 1.235, 1.00 samples per second, 12 minutes left"),
    (0, {}, "200 of 1000 samples, 1.00 samples per second, 13 minutes left"),
    (640, {"loss": float("nan"), "mIoU": 0.5}, "840 of 1000 samples, loss nan, mIoU 0.500, 1.00 samples per second, "
     "3 minutes left")])
def test_without_a_terminal_the_progress_is_a_line_now_and_then(capsys, monkeypatch, initial, values, line):
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    bar = runlog.ProgressBar(1000, initial)
    bar.show(**values)
    for _ in range(9):
        now[0] += 40
        bar.update(40)
    bar.close()
    assert capsys.readouterr().out.splitlines() == [line]


def test_warnings_are_said_again_at_the_end(capsys):
    console = Console(True, ["an older one"])
    console.warn("a new one")
    assert console.notes() == ["note: an older one", "note: a new one"] and "a new one" in capsys.readouterr().out
    Console(False).warn("of another process")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("extent", [(60, 60, 6), (5000, 5, 5), (400, 1, 300)])
def test_the_noise_of_a_building_is_bounded(extent):
    rng = np.random.default_rng(0)
    cloud = (rng.random((500, 3)) * extent).astype(np.float32)
    assert grid_cells(torch.tensor(extent), 0.12).prod() > MAX_CELLS
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
    for prompt in ("word " * 76, "word " * 2000, "7" * 76):
        with pytest.raises(ValueError, match="reads 77 tokens") as error:
            tower.encode_prompts(["a chair", prompt])
        assert len(str(error.value)) < 200
