# SPDX-License-Identifier: MIT
"""Checkpoints that are either whole or absent, that resume bit-exactly, and that name what does not fit.

Nothing of a random generator is stored: what a step draws depends on the seeds of its samples alone.

Imports torch.
"""
import os
import zipfile
from pathlib import Path

import torch

FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "optimizer": dict,
          "scaler": dict, "epoch": int, "next_step": int, "step": int, "global_batch": int, "next_lr": float, "best": float,
          "skipped_steps": int, "bad_steps": int, "warnings": list}
# a step that was not finite, saved to be run again
STEP_FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "batch": dict,
               "weights": dict, "scale": float, "epoch": int, "step": int, "findings": list}


def write_atomically(state, path):
    """torch.save that leaves either the old file or the whole new one, whenever it is interrupted."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power cut may leave the new name on an empty file
    os.replace(temporary, path)


def read_checkpoint(path, fields=FIELDS):
    """A checkpoint (with STEP_FIELDS: a saved step) that train.py wrote, on the CPU.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, or not train.py's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint of train.py, or truncated")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises another kind for every damage, with a text that advises weights_only=False
        raise ValueError(f"{path}: not a checkpoint of train.py, or damaged ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path}: damaged, the checksum of its entry {damaged} is wrong")
    for field, kind in fields.items():
        if not isinstance(state, dict) or field not in state:
            raise ValueError(f"{path}: not a checkpoint of train.py, field {field!r} is missing")
        if not isinstance(state[field], kind):
            raise ValueError(f"{path}: not a checkpoint of train.py, field {field!r} holds a "
                             f"{type(state[field]).__name__}")
    return state


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
