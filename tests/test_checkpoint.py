# SPDX-License-Identifier: MIT
"""checkpoint.py: a file is either whole or absent, and what does not fit is named."""
import builtins
import errno
import multiprocessing
import os
import pickle
import random
import time
import warnings
import zipfile

import pytest
import torch
from torch import nn

from support import checkpoint
from helpers import try_lock


def state_of(model, /, **changes):
    return {"model": model.state_dict(), "optimizer": {}, "scaler": {}, "epoch": 3, "next_step": 1, "step": 12,
            "global_batch": 4, "next_lr": 0.1, "skipped_steps": 0, "bad_steps": 0, "best": 0.5,
            "config": {"lr": 0.1, "clip_warmup": (10, 20)}, "class_names": ["wall", "chair"], "clip_fingerprint": None,
            "warnings": [], **changes}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))


@pytest.fixture
def path(tmp_path, model):
    checkpoint.write_atomically(state_of(model), tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_what_is_read_is_what_was_written(path, model):
    state = checkpoint.read_checkpoint(path)
    assert {k: v for k, v in state.items() if k != "model"} == {
        k: v for k, v in state_of(model).items() if k != "model"}
    assert all(torch.equal(state["model"][key], value) for key, value in model.state_dict().items())
    assert checkpoint.read_checkpoint(str(path)).keys() == state.keys()


@pytest.mark.parametrize("broken", ["save", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(path, model, monkeypatch, broken):
    old = path.read_bytes()

    def partial(state, file):
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"save": (torch, "save", partial), "fsync": (os, "fsync", stop),
                          "replace": (os, "replace", stop)}[broken])
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(state_of(model, epoch=4), path)
    assert path.read_bytes() == old and os.listdir(path.parent) == ["last.pt"]
    monkeypatch.undo()
    checkpoint.write_atomically(state_of(model, epoch=4), path)
    assert checkpoint.read_checkpoint(path)["epoch"] == 4 and os.listdir(path.parent) == ["last.pt"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(path, model, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", os.fstat(file).st_size)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", os.path.getsize(a))), replace(a, b)))
    checkpoint.write_atomically(state_of(model), path)
    assert calls == [("fsync", path.stat().st_size), ("replace", path.stat().st_size)]


def test_no_two_writes_share_a_temporary_file(tmp_path, model, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(str(a)), replace(a, b)))
    for name in ("last.pt", "last.pt", "best.pt"):
        checkpoint.write_atomically(state_of(model), tmp_path / name)
    assert len(set(seen)) == 3


def fill_disk(monkeypatch, times):
    """The next `times` files that are opened for writing lie on a full disk, and pauses are counted, not slept."""
    opened, pauses = [], []

    def open_full(path, mode):
        opened.append(path)
        return builtins.open("/dev/full" if len(opened) <= times else path, mode)

    monkeypatch.setattr(checkpoint, "open", open_full, raising=False)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_disk_that_is_full_for_a_while_delays_a_checkpoint(path, model, monkeypatch):
    pauses = fill_disk(monkeypatch, 2)
    checkpoint.write_atomically(state_of(model, epoch=4), path)
    assert pauses == [1, 2] and os.listdir(path.parent) == ["last.pt"]
    assert checkpoint.read_checkpoint(path)["epoch"] == 4


def test_a_full_disk_is_one_line_with_path_and_free_space(path, model, monkeypatch):
    old = path.read_bytes()
    pauses = fill_disk(monkeypatch, 9)
    with pytest.raises(OSError, match=r"No space left on device, [0-9.]+ GiB free: '.*last.pt'") as error:
        checkpoint.write_atomically(state_of(model, epoch=4), path)
    assert "\n" not in str(error.value) and error.value.errno == errno.ENOSPC and len(pauses) == 3
    assert path.read_bytes() == old and os.listdir(path.parent) == ["last.pt"]


def test_other_faults_of_a_file_system_are_not_waited_for(tmp_path, model, monkeypatch):
    monkeypatch.setattr(time, "sleep", None)
    with pytest.raises(FileNotFoundError, match="No such file.*gone/x.pt'"):
        checkpoint.write_atomically(state_of(model), tmp_path / "gone/x.pt")
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(RuntimeError("of torch")))
    with pytest.raises(RuntimeError, match="of torch"):
        checkpoint.write_atomically(state_of(model), tmp_path / "x.pt")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------ folders

FORK = multiprocessing.get_context("fork")


def make_folders(path):
    return [checkpoint.new_folder(path) for _ in range(50)]


def lock_and_die(folder):
    checkpoint.lock_folder(folder)
    (folder / "last.pt.0123.tmp").write_bytes(b"half")
    os._exit(9)


def test_no_two_runs_get_one_folder(tmp_path):
    with FORK.Pool(4) as pool:
        made = pool.map(make_folders, [tmp_path / "runs/x"] * 4)
    assert len({folder for folders in made for folder in folders}) == 200 == len(os.listdir(tmp_path / "runs"))


def test_a_folder_has_one_process_at_a_time(tmp_path):
    file = checkpoint.lock_folder(tmp_path)
    assert try_lock(tmp_path) == f"{tmp_path} is in use by process {os.getpid()} on {os.uname().nodename}"
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


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="cannot be locked.*No locks available"):
        lock = checkpoint.lock_folder(tmp_path)
    assert not lock.closed  # the run goes on, and closes it at its end
    lock.close()


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_missing_file_is_named(tmp_path):
    for name, reason in (("none.pt", "does not exist"), (".", "is not a file")):
        with pytest.raises(FileNotFoundError, match=f"checkpoint {tmp_path / name} {reason}"):
            checkpoint.read_checkpoint(tmp_path / name)


def test_truncation_anywhere_is_named(path):
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 200, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="last.pt: "):
            checkpoint.read_checkpoint(path)


def test_a_flipped_bit_in_any_entry_is_named(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: (info.header_offset, info.file_size) for info in archive.infolist() if info.file_size}
    assert any(name.endswith("data/0") for name in entries)
    for name, (offset, size) in entries.items():
        extra = int.from_bytes(content[offset + 26:offset + 28], "little") + int.from_bytes(
            content[offset + 28:offset + 30], "little")
        damaged = bytearray(content)
        damaged[offset + 30 + extra + size // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"last.pt: damaged, .*{name}"):
            checkpoint.read_checkpoint(path)


ON_TWO_DISKS = b"PK\6\7" + bytes(12) + b"\2\0\0\0" + b"PK\5\6" + bytes(18)  # a zip file that zipfile does not read


@pytest.mark.parametrize("content", [b"hello", pickle.dumps({"model": {}}), b"\x80\x02.", bytes(99) + ON_TWO_DISKS])
def test_a_foreign_file_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt: not a checkpoint of train.py"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


def test_objects_are_not_loaded_and_nobody_is_told_to_load_them(tmp_path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**state_of(model), "extra": random.Random(0)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not a checkpoint") as error:
        checkpoint.read_checkpoint(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "not of torch")
    with pytest.raises(ValueError, match="zip.pt: not a checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "zip.pt")


@pytest.mark.parametrize("field", [*checkpoint.FIELDS])
def test_a_missing_or_strange_field_is_named(tmp_path, model, field):
    state = state_of(model)
    checkpoint.write_atomically({k: v for k, v in state.items() if k != field}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: .*field '{field}' is missing"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")
    checkpoint.write_atomically({**state, field: (1, 2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: .*field '{field}' holds a tuple"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), 7])
def test_a_file_without_fields_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not a checkpoint of train.py"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, model, bad):
    """Also those of the optimizer; a saved step may hold them, because its replay looks for their cause."""
    weights = {**model.state_dict(), "0.bias": torch.tensor([1.0, bad])}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([bad])}}, "param_groups": [{}]}
    for field, changes in (("model.0.bias", {"model": weights}), ("optimizer.state.0.exp_avg", {"optimizer": moments})):
        checkpoint.write_atomically(state_of(model, **changes), tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: field {field} holds NaN or inf"):
            checkpoint.read_checkpoint(tmp_path / "x.pt")
    step = {**state_of(model, model=weights), "batch": {"points": torch.tensor([bad])}, "weights": {}, "scale": 1.0,
            "findings": []}
    checkpoint.write_atomically(step, tmp_path / "x.pt")
    assert not checkpoint.read_checkpoint(tmp_path / "x.pt", checkpoint.STEP_FIELDS)["batch"]["points"].isfinite().all()


RECURSIVE = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize("changes, message", [
    ({"model": {"w": torch.zeros(1).expand(10 ** 12)}}, "model.w is not a dense tensor"),
    ({"model": {"w": torch.eye(3).to_sparse()}}, "model.w is not a dense tensor"),
    ({"model": {"w": "text"}}, "weights 'w' hold a str"), ({"model": {3: torch.zeros(1)}}, "weights 3 hold"),
    ({"step": -1}, "field 'step' is -1"),
    ({"config": {"x": RECURSIVE}, "optimizer": {"w": torch.tensor(torch.inf)}}, "optimizer.w holds")])
def test_contents_that_no_training_writes_are_named(tmp_path, model, changes, message):
    checkpoint.write_atomically(state_of(model, **changes), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: .*{message}"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("change", [{"compress_type": zipfile.ZIP_DEFLATED}, {"external_attr": checkpoint.FOLDER}])
def test_an_entry_that_torch_does_not_write_is_refused(path, tmp_path, change):
    """Compressed, it could unpack to any size; a folder would be read from memory that nobody has written."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            for name, value in change.items():
                setattr(entry, name, value)
            archive.writestr(entry, content)
    with pytest.raises(ValueError, match="x.pt: not a checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")


def test_restored_weights_are_those_of_the_file(path, model):
    state = checkpoint.read_checkpoint(path)
    other = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))
    assert not torch.equal(other[0].weight, model[0].weight)
    checkpoint.restore(other, state, path, ["wall", "chair"], None)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("changes, message", [
    ({"class_names": ["chair", "wall"]}, "class_names"), ({"clip_fingerprint": "ab"}, "clip_fingerprint differs"),
    ({"0.weight": (32, 63)}, r"'0.weight' has shape \(32, 63\), the model's has \(32, 64\)"),
    ({"0.bias": None}, r"'0.bias' has shape none .it is missing., the model's has \(32,\)"),
    ({"2.bias": (5,)}, r"'2.bias' has shape \(5,\), the model's has none")])
def test_what_does_not_fit_is_named_and_nothing_is_loaded(path, model, changes, message):
    state = checkpoint.read_checkpoint(path)
    for key, value in changes.items():
        if key in checkpoint.FIELDS:
            state[key] = value
        elif value is None:
            del state["model"][key]
        else:
            state["model"][key] = torch.ones(value)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match=f"last.pt: .*{message}"):
        checkpoint.restore(model, state, path, ["wall", "chair"], None)
    assert torch.equal(model[0].weight, own["0.weight"] + 1)
