# SPDX-License-Identifier: MIT
"""Checkpoints that are whole or absent, that resume bit-exactly, and that name what does not fit.

Nothing of a random generator is stored: what a step draws depends on the seeds of its samples alone.
`new_folder` and `lock_folder` keep two runs from writing into one folder.

Imports torch and support.files.
"""
import contextlib
import errno
import fcntl
import itertools
import math
import os
import socket
import time
import warnings
from pathlib import Path

import torch

from support.files import check_torch_file, write_whole

FIELDS = ("class_names", "config", "model", "clip_fingerprint", "optimizer", "scaler", "epoch", "next_step",
          "step", "global_batch", "next_lr", "best", "skipped_steps", "bad_steps", "warnings")
# a step that was not finite, saved to be run again
STEP_FIELDS = ("class_names", "config", "model", "clip_fingerprint", "batch", "weights", "scale", "epoch",
               "step", "findings")

DATA_OPTIONS = ("data", "classes", "scans", "label_map", "train_split", "val_split", "rooms",
                "val_rooms", "class_ids")

# --------------------------------------------------------------------------------------------- folders


def new_folder(path):
    """Makes the folder path__TIME, or if there is one path__TIME-2, path__TIME-3, ... -> its Path."""
    path = f"{path}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(path)
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = Path(f"{path}-{number}")


def lock_in_place(path):
    """The lock on the folder of a checkpoint if a run goes on in it, else None; also for no path.

    A run goes on in place from its last.pt alone, so that nothing else is written over.
    """
    path = Path(path or "")
    is_last = path.name == "last.pt" and (path.parent / "lock").exists()
    return lock_folder(path.parent) if is_last else None


def lock_folder(folder):
    """Locks a run's folder for this process, and removes unfinished files in it -> the lock's open file.

    The lock ends when the file is closed, and with the process, however that ends; child processes do
    not inherit it. ValueError if another process holds it, OSError if the file is a symbolic link. On a
    file system without locks there is a warning instead.
    """
    path = Path(folder) / "lock"
    file = open(path, "a+b", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
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


# --------------------------------------------------------------------------------- writing and reading


def write_atomically(state, path):
    """torch.save that leaves the old file or the whole new one; OSError if the disk is full."""
    write_whole(path, lambda file: torch.save(state, file))


def write_or_warn(state, path, warn):
    """`write_atomically`; if that fails, as on a full disk, an old file stays, and warn(text) says so."""
    try:
        write_atomically(state, path)
    except OSError as error:
        warn(f"{error}: this file is not written, an old one stays; the next one is tried again")


def read_checkpoint(path, fields=FIELDS):
    """A checkpoint (with STEP_FIELDS: a saved step) that train.py wrote, on the CPU.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, is not
    train.py's, or holds NaN or inf, which only a saved step may do.
    """
    check_torch_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, and advises weights_only=False
        kind = type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of train.py, torch.load raises {kind}") from error
    missing = [field for field in fields if not isinstance(state, dict) or field not in state]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of train.py, field {missing[0]!r} is missing")
    for name, tensor in named_tensors(state):
        is_plain = tensor.layout == torch.strided and not getattr(tensor, "is_quantized", False)
        if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: field {name} is not a dense tensor")
        if fields is FIELDS and not tensor.isfinite().all():
            raise ValueError(f"{path}: field {name} holds NaN or inf")
    return state


def named_tensors(state, name=""):
    """Iterates over ("field.key", tensor) of nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def restore(model, state, path, class_names, fingerprint):
    """Loads the weights of a checkpoint, if it belongs to this model, tower and class list."""
    if state["class_names"] != class_names:
        raise ValueError(f"{path}: class_names {state['class_names']} are not the data's {class_names}")
    if state["clip_fingerprint"] != fingerprint:
        raise ValueError(f"{path}: clip_fingerprint differs: it was trained with another CLIP tower, weights or "
                         "image size than this run's")
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state["model"].items()}
    for key in sorted(own.keys() | theirs.keys()):
        if own.get(key) != theirs.get(key):
            raise ValueError(f"{path}: field {key!r} has shape {theirs.get(key, 'none (it is missing)')}, the "
                             f"model's has {own.get(key, 'none')}")
    model.load_state_dict(state["model"])


# ------------------------------------------------------------------------------------------- resuming


def load_optimizer(optimizer, scaler, state):
    """Loads their states from a checkpoint, but keeps the multipliers of this run."""
    own = [group["lr_mult"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, lr_mult in zip(optimizer.param_groups, own):
        group["lr_mult"] = lr_mult
    if state["scaler"]:  # empty if the checkpoint was written without fp16
        scaler.load_state_dict(state["scaler"])


def resume_position(state, steps_per_epoch, global_batch):
    """(epoch, step within it) at which a checkpoint goes on, by the samples that its epoch has seen."""
    samples = state["next_step"] * state["global_batch"]
    return state["epoch"], min(samples // global_batch, steps_per_epoch)


def warn_of_changes(state, config, lr, warn):
    """Calls warn(text) for what makes a resumed run another one than that of its checkpoint."""
    changed = [key for key in DATA_OPTIONS if state["config"].get(key) != config[key]]
    if changed:
        warn(f"the checkpoint was trained on other data: {', '.join(changed)} differ")
    if not math.isclose(lr, state["next_lr"], rel_tol=1e-6):
        warn(f"the learning rate goes on from {state['next_lr']:.3g} to {lr:.3g}: the options, the global "
             "batch or the number of processes have changed")
