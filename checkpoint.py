# SPDX-License-Identifier: MIT
"""Checkpoints that are whole or absent, that say what does not fit, and that resume to the bit.

Imports torch and numpy.
"""
import os
import random
from pathlib import Path

import numpy as np
import torch


def write_atomically(state, path):
    """torch.save that leaves either the old file or the whole new one, whenever it is interrupted."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read_checkpoint(path):
    """A checkpoint that this file wrote, on the CPU; a clear error for anything else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of train.py: {error}") from error
    missing = {"model", "config", "class_names", "clip_fingerprint"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path}: not a checkpoint of train.py, field {sorted(missing)[0]!r} is missing")
    return state


def restore(model, state, path, class_names, fingerprint):
    """Loads the weights of a checkpoint after checking that it belongs to this model, tower and class list."""
    if state["class_names"] != class_names:
        raise ValueError(f"{path}: class_names {state['class_names']} are not the data's {class_names}")
    if state["clip_fingerprint"] != fingerprint:
        raise ValueError(f"{path}: clip_fingerprint differs: it was trained with another CLIP tower, weights or image "
                         "size than this run's")
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in state["model"].items()}
    for key in sorted(own.keys() | theirs.keys()):
        if own.get(key) != theirs.get(key):
            raise ValueError(f"{path}: field {key!r} has shape {theirs.get(key)}, the model's has {own.get(key)}")
    model.load_state_dict(state["model"])


def rng_state(device):
    """Every random generator that a step may draw from, in types that torch.load reads with weights_only."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state, device):
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
