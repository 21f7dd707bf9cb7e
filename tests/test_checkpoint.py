# SPDX-License-Identifier: MIT
"""checkpoint.py: a run has its folder for itself, and a file that does not fit is named."""
import errno
import multiprocessing
import os
import pickle
import random
import time
import warnings

import pytest
import torch
from torch import nn

from helpers import refused, try_lock
from support import checkpoint

FORK = multiprocessing.get_context("fork")


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))


def state_of(model, /, **changes):
    return {"model": model.state_dict(), "optimizer": {}, "scaler": {}, "epoch": 3, "next_step": 1, "step": 12,
            "global_batch": 4, "next_lr": 0.1, "skipped_steps": 0, "bad_steps": 0, "best": 0.5,
            "config": {"lr": 0.1, "clip_warmup": (10, 20)}, "class_names": ["wall", "chair"],
            "clip_fingerprint": None, "warnings": [], **changes}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return network()


@pytest.fixture
def path(tmp_path, model):
    checkpoint.write_atomically(state_of(model), tmp_path / "last.pt")
    return tmp_path / "last.pt"


def equal(a, b):
    """Whether two state dicts are."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------- folders


def make_folders(path):
    return [checkpoint.new_folder(path) for _ in range(20)]


def lock_and_die(folder):
    checkpoint.lock_folder(folder)
    (folder / "last.pt.0123.tmp").write_bytes(b"half")
    os._exit(9)


def test_no_two_runs_get_one_folder(tmp_path):
    with FORK.Pool(4) as pool:
        made = pool.map(make_folders, [tmp_path / "runs/x"] * 4)
    assert len({*made[0], *made[1], *made[2], *made[3]}) == 80 == len(os.listdir(tmp_path / "runs"))


def test_a_folder_has_one_process_at_a_time(tmp_path):
    file = checkpoint.lock_folder(tmp_path)
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    assert try_lock(tmp_path) == f"{tmp_path} is in use by {owner}"
    with checkpoint.lock_folder(tmp_path):  # this process may go on with its own run
        pass
    file.close()
    assert try_lock(tmp_path) == "locked"


def test_the_lock_of_a_killed_process_is_free_and_what_it_left_is_removed(tmp_path):
    process = FORK.Process(target=lock_and_die, args=(tmp_path,))
    process.start()
    process.join()
    (tmp_path / "notes.tmp").write_bytes(b"of somebody else")
    assert process.exitcode == 9 and (tmp_path / "last.pt.0123.tmp").exists()
    with checkpoint.lock_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ["lock", "notes.tmp"]


def test_a_child_does_not_keep_the_lock(tmp_path):
    """Data-loading workers outlive a killed training by seconds."""
    file = checkpoint.lock_folder(tmp_path)
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    file.close()
    assert try_lock(tmp_path) == "locked"
    child.kill()
    child.join()


@pytest.mark.parametrize("target", ["precious", "nowhere", "."])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path, target):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "lock").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match="lock"):
        checkpoint.lock_folder(tmp_path)
    assert (tmp_path / "precious").read_text() == "text" and not (tmp_path / "nowhere").exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.warns(UserWarning, match="cannot be locked.*No locks available"):
        lock = checkpoint.lock_folder(tmp_path)
    assert not lock.closed  # the run goes on, and closes it at its end
    lock.close()


# --------------------------------------------------------------------------------- writing and reading


def test_what_is_read_is_what_was_written(path, model):
    expected = state_of(model)
    for name in (path, str(path)):
        state = checkpoint.read_checkpoint(name)
        assert equal(state.pop("model"), model.state_dict())
        assert state == {key: value for key, value in expected.items() if key != "model"}
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"model": {}}), b"\x80\x02."])
def test_a_foreign_file_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with refused("x.pt: not a checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), 7, {"state_dict": {}}])
def test_a_file_without_the_fields_of_a_run_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with refused("x.pt: not a checkpoint of train.py, field 'class_names' is missing"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


def test_every_field_is_missed(tmp_path, model):
    for field in checkpoint.FIELDS:
        state = state_of(model)
        del state[field]
        checkpoint.write_atomically(state, tmp_path / "x.pt")
        with refused(f"x.pt: .*field '{field}' is missing"):
            checkpoint.read_checkpoint(tmp_path / "x.pt")


def test_objects_are_not_loaded_and_nobody_is_told_to_load_them(tmp_path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state_of(model, extra=random.Random(0)), tmp_path / "x.pt")
    with refused("x.pt: not a checkpoint") as error:
        checkpoint.read_checkpoint(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, model, bad):
    """Also those of the optimizer; a saved step may hold them, because its replay looks for their cause."""
    weights = {**model.state_dict(), "0.bias": torch.tensor([1.0, bad])}
    moments = {"state": {0: {"exp_avg": torch.tensor([bad])}}, "param_groups": [{}]}
    for field, changes in (("model.0.bias", {"model": weights}), ("optimizer.state.0.exp_avg", {"optimizer": moments})):
        checkpoint.write_atomically(state_of(model, **changes), tmp_path / "x.pt")
        with refused(f"x.pt: field {field} holds NaN or inf"):
            checkpoint.read_checkpoint(tmp_path / "x.pt")
    step = state_of(model, model=weights, batch={"points": [bad]}, weights={}, scale=1.0, findings=[])
    checkpoint.write_atomically(step, tmp_path / "x.pt")
    state = checkpoint.read_checkpoint(tmp_path / "x.pt", checkpoint.STEP_FIELDS)
    assert not state["model"]["0.bias"].isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_training_writes_are_named(tmp_path, model):
    tensors = [torch.zeros(1).expand(10 ** 12), torch.eye(3).to_sparse()]
    if hasattr(torch, "quantize_per_tensor"):  # which torch will lose
        tensors.append(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))
    for tensor in tensors:
        checkpoint.write_atomically(state_of(model, model={"w": tensor}), tmp_path / "x.pt")
        with refused("x.pt: field model.w is not a dense tensor"):
            checkpoint.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("changes, told", [
    ({}, []), ({"data": "b"}, ["data differ"]), ({"val_split": "v", "class_ids": [7]}, ["val_split, class_ids differ"]),
    ({"rooms": 3}, ["rooms differ"]), ({"lr": 0.1}, [])])
def test_other_data_are_said_in_one_warning_on_resuming(changes, told):
    config, said = {**dict.fromkeys(checkpoint.DATA_OPTIONS), "lr": 1}, []
    checkpoint.warn_of_changes({"config": config, "next_lr": 0.1}, {**config, **changes}, 0.1, said.append)
    assert len(said) == len(told) and all(text.endswith(words) for text, words in zip(said, told))


@pytest.mark.parametrize("changes, message", [
    ({"class_names": ["chair", "wall"]}, "class_names"),
    ({"clip_fingerprint": "ab"}, "clip_fingerprint differs"),
    ({"0.weight": (32, 63)}, r"'0.weight' has shape \(32, 63\), the model's has \(32, 64\)"),
    ({"0.bias": None}, r"'0.bias' has shape none .it is missing., the model's has \(32,\)"),
    ({"2.bias": (5,)}, r"'2.bias' has shape \(5,\), the model's has none")])
def test_what_does_not_fit_is_named_and_nothing_is_loaded(path, model, changes, message):
    state = checkpoint.read_checkpoint(path)
    for key, value in changes.items():
        if key in state:
            state[key] = value
        elif value is None:
            del state["model"][key]
        else:
            state["model"][key] = torch.ones(value)
    other = network()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with refused(f"last.pt: .*{message}"):
        checkpoint.restore(other, state, path, ["wall", "chair"], None)
    assert equal(other.state_dict(), before)
