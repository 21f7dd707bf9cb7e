# SPDX-License-Identifier: MIT
"""Checkpoints that are whole or absent, that say what does not fit, and that resume to the bit.

Imports torch and numpy.
"""
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import torch

FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "optimizer": dict,
          "scaler": dict, "rng": dict, "epoch": int, "step": int, "skipped_steps": int, "bad_steps": int, "best": float,
          "warnings": list}
# a step that was not finite, saved to be run again
STEP_FIELDS = {"class_names": list, "config": dict, "model": dict, "clip_fingerprint": (str, type(None)), "batch": dict,
               "rng": dict, "clip_weight": float, "scale": float, "epoch": int, "step": int, "findings": list}


def write_atomically(state, path):
    """torch.save that leaves either the old file or the whole new one, whenever it is interrupted."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
    os.replace(temporary, path)


def read_checkpoint(path, fields=FIELDS):
    """A checkpoint (or, by STEP_FIELDS, a step) that train.py wrote, whole and on the CPU; else a ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint of train.py, or truncated")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has one for each damage, and a text that advises weights_only=False
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
    own, theirs = ({k: tuple(v.shape) for k, v in weights.items()} for weights in (model.state_dict(), state["model"]))
    for key in sorted(own.keys() | theirs.keys()):
        if own.get(key) != theirs.get(key):
            raise ValueError(f"{path}: field {key!r} has shape {theirs.get(key, 'none (it is missing)')}, the model's "
                             f"has {own.get(key, 'none')}")
    model.load_state_dict(state["model"])


def rng_state(device):
    """Every random generator that a step may draw from, in types that torch.load reads with weights_only."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state, device):
    """The inverse of `rng_state`; a GPU's generator stays as it is where the state was written without one."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
