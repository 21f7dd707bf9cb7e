# SPDX-License-Identifier: MIT
"""Checkpoints that are either whole or absent, that resume bit-exactly, and that name what does not fit.

Nothing of a random generator is stored: what a step draws depends on the seeds of its samples alone. `new_folder` and
`lock_folder` keep two runs from writing into one folder.

Imports torch.
"""
import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import socket
import time
import uuid
import warnings
import zipfile
from pathlib import Path

import torch

FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "optimizer": dict,
          "scaler": dict, "epoch": int, "next_step": int, "step": int, "global_batch": int, "next_lr": float,
          "best": float, "skipped_steps": int, "bad_steps": int, "warnings": list}
# a step that was not finite, saved to be run again
STEP_FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "batch": dict,
               "weights": dict, "scale": float, "epoch": int, "step": int, "findings": list}
PAUSES = (1, 2, 4)  # seconds until a full disk is tried again
FOLDER = 0x10  # attribute of an entry of a zip file


# ------------------------------------------------------------------------------------------------------------ folders


def new_folder(path):
    """Makes a folder that no other run has: `path`, or else path-2, path-3, ... -> its Path."""
    folder = Path(path)
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = Path(f"{path}-{number}")


def lock_folder(folder):
    """Locks a run's folder for this process, and removes unfinished files in it -> the open file that holds the lock.

    The lock ends when the file is closed, and with the process, however that ends; child processes do not inherit it.
    ValueError if another process holds it. On a file system without locks there is a warning instead.
    """
    path = Path(folder) / "lock"
    file = open(path, "a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            owner = path.read_text(errors="replace")
            file.close()
            raise ValueError(f"{folder} is in use by {owner or 'another process'}") from None
        warnings.warn(f"{folder} cannot be locked, so a second process in it is not refused: {error}")
        return file
    with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not tell its owner
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    for temporary in Path(folder).glob("*.pt*.tmp"):  # of killed processes: nobody else writes here
        temporary.unlink(missing_ok=True)
    return file


# ------------------------------------------------------------------------------------------------------------ writing


def write_atomically(state, path):
    """torch.save that leaves either the old file or the whole new one, whenever it is interrupted.

    A full disk is tried again after each of PAUSES. OSError if the file cannot be written; nothing is left of it then.
    """
    path = Path(path)
    for pause in (*PAUSES, None):
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # otherwise a power cut may leave the new name on an empty file
            os.replace(temporary, path)
            return
        except (OSError, RuntimeError) as error:
            fault = error if isinstance(error, OSError) else error.__context__  # torch hides what the file raised
            if not isinstance(fault, OSError):
                raise
            is_full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
            if not is_full or pause is None:
                left = f", {shutil.disk_usage(path.parent).free / 2**30:.3f} GiB free" if is_full else ""
                raise OSError(fault.errno, f"{fault.strerror}{left}", str(path)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        time.sleep(pause)


# ------------------------------------------------------------------------------------------------------------ reading


def read_checkpoint(path, fields=FIELDS):
    """A checkpoint (with STEP_FIELDS: a saved step) that train.py wrote, on the CPU.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, is not train.py's, or holds NaN
    or inf, which only a saved step may do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} {'is not a file' if Path(path).exists() else 'does not exist'}")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch takes an entry that is marked as a folder for empty, and hands out whatever its memory holds
            is_torch = all(entry.compress_type == zipfile.ZIP_STORED and not entry.external_attr & FOLDER
                           for entry in archive.infolist())
            damaged = archive.testzip() if is_torch else None  # torch.load does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if is_torch and not damaged else None
    except Exception as error:  # torch raises many kinds, and advises weights_only=False
        kind = type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of train.py, truncated, or damaged ({kind})") from error
    if damaged:
        raise ValueError(f"{path}: damaged, the checksum of its entry {damaged} is wrong")
    for field, kind in fields.items():
        if not isinstance(state, dict) or field not in state:
            raise ValueError(f"{path}: not a checkpoint of train.py, field {field!r} is missing")
        if not isinstance(state[field], kind):
            raise ValueError(f"{path}: not a checkpoint of train.py, field {field!r} holds a "
                             f"{type(state[field]).__name__}")
        if kind is int and state[field] < 0:
            raise ValueError(f"{path}: not a checkpoint of train.py, field {field!r} is {state[field]}")
    for name, value in state["model"].items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: not a checkpoint of train.py, weights {name!r} hold a {type(value).__name__}")
    check_tensors(state, path, finite=fields is FIELDS)
    return state


def check_tensors(state, path, finite):
    """ValueError if a tensor in nested dicts, lists and tuples is sparse, claims more values than its storage has, or
    holds NaN or inf although `finite`.
    """
    remaining = [("", state)]
    seen = set()  # a list may hold itself
    while remaining:
        name, value = remaining.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            remaining += [(f"{name}.{key}", part) for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            remaining += [(f"{name}.{i}", part) for i, part in enumerate(value)]
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"{path}: field {name[1:]} is not a dense tensor")
            if finite and not value.isfinite().all():
                raise ValueError(f"{path}: field {name[1:]} holds NaN or inf")


def restore(model, state, path, class_names, fingerprint):
    """Loads the weights of a checkpoint after checking that it belongs to this model, tower and class list."""
    if state["class_names"] != class_names:
        raise ValueError(f"{path}: class_names {state['class_names']} are not the data's {class_names}")
    if state["clip_fingerprint"] != fingerprint:
        raise ValueError(f"{path}: clip_fingerprint differs: it was trained with another CLIP tower, weights or image "
                         "size than this run's")
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state["model"].items()}
    for key in sorted(own.keys() | theirs.keys()):
        if own.get(key) != theirs.get(key):
            raise ValueError(f"{path}: field {key!r} has shape {theirs.get(key, 'none (it is missing)')}, the model's "
                             f"has {own.get(key, 'none')}")
    model.load_state_dict(state["model"])
