# SPDX-License-Identifier: MIT
"""checkpoint.py: a file is either whole or absent, and what does not fit is named."""
import os
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from torch import nn

import checkpoint


def state_of(model, **changes):
    return {"model": model.state_dict(), "optimizer": {}, "scaler": {}, "epoch": 3, "next_step": 1, "step": 12, "global_batch": 4, "next_lr": 0.1, "skipped_steps": 0,
            "bad_steps": 0, "best": 0.5, "config": {"lr": 0.1, "clip_warmup": (10, 20)},
            "class_names": ["wall", "chair"], "clip_fingerprint": None, "warnings": [], **changes}


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
    assert path.read_bytes() == old and checkpoint.read_checkpoint(path)["epoch"] == 3
    monkeypatch.undo()
    checkpoint.write_atomically(state_of(model, epoch=4), path)  # what the interrupted write left is in nobody's way
    assert checkpoint.read_checkpoint(path)["epoch"] == 4 and os.listdir(path.parent) == ["last.pt"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(path, model, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", os.fstat(file).st_size)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", os.path.getsize(a))), replace(a, b)))
    checkpoint.write_atomically(state_of(model), path)
    assert calls == [("fsync", path.stat().st_size), ("replace", path.stat().st_size)]


def test_two_checkpoints_of_one_folder_share_no_temporary_file(tmp_path, model, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(str(a)), replace(a, b)))
    for name in ("last.pt", "best.pt", "last.best"):
        checkpoint.write_atomically(state_of(model), tmp_path / name)
    assert len(set(seen)) == 3


def test_a_missing_file_is_named(tmp_path):
    for name in ("none.pt", "."):
        with pytest.raises(FileNotFoundError, match=f"checkpoint {tmp_path / name} does not exist"):
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


@pytest.mark.parametrize("content", [b"hello", pickle.dumps({"model": {}}), b"\x80\x02."])
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
