# SPDX-License-Identifier: MIT
"""What several test files share: tiny data sets on disk, small runs, processes."""
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from sources import rooms
from sources.scannet import write_frames
from support.checkpoint import lock_folder

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {0: None, 1: "wall", 2: "chair", 40: "lamp"}
POSE = np.array([[0.36, 0.48, -0.8, 1.5], [-0.8, 0.6, 0, -2], [0.48, 0.64, 0.6, 0.7], [0, 0, 0, 1.0]])
POSE[:3, :3] = np.linalg.qr(POSE[:3, :3])[0]


def intrinsics_of(size, focal=1.1):
    """A pinhole camera with an off-center principal point for an image of size (H, W)."""
    height, width = size
    fx, fy = focal * width, focal * width * 1.02
    return np.array([[fx, 0, 0.52 * width], [0, fy, 0.47 * height], [0, 0, 1.0]])


def write_scannet(root, scenes=2, frames=3, color_size=(48, 64), depth_size=(24, 32), labels=True,
                  suffix="png"):
    """A tiny ScanNet export. Color holds its pixel's position: red = column, green = row, blue = frame."""
    rng = np.random.default_rng(0)
    height, width = color_size
    row, column = np.mgrid[:height, :width]
    for scene, frame in itertools.product(range(scenes), range(frames)):
        color = np.stack([column * 255 // width, row * 255 // height, np.full_like(row, 10 * frame)], 2)
        depth = rng.integers(1000, 3000, depth_size).astype(np.uint16)
        depth[::5] = 0
        images = {f"color/{frame}.{suffix}": color.astype(np.uint8), f"depth/{frame}.png": depth}
        if labels:
            label = np.choose((column * 4 // width) % 4, [0, 1, 2, 40])
            images |= {f"label-filt/{frame}.png": label.astype(np.uint16),
                       f"instance-filt/{frame}.png": (row * 3 // height).astype(np.uint8)}
        matrices = {f"pose/{frame}.txt": POSE, "intrinsic/intrinsic_color.txt": intrinsics_of(color_size),
                    "intrinsic/intrinsic_depth.txt": intrinsics_of(depth_size)}
        for name, content in (images | matrices).items():
            path = root / f"scene{scene:04d}_00" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in images:
                Image.fromarray(content).save(path)
            else:
                np.savetxt(path, content)
    return root


def write_rooms_as_scannet(folder, num_rooms=2, frames_per_room=2, size=(240, 320)):
    """Built-in rooms in ScanNet's layout, with class list and splits -> the options of train.py that name them.

    The last frame is the validation split; all rooms but its own are the training split.
    """
    frames = rooms.RoomFrames("train", num_rooms, frames_per_room, size=size)
    camera = {key: frames[0][key] for key in ("intrinsics", "depth_intrinsics")}  # for all: a scene needs one
    write_frames([{**frame, **camera} for frame in frames], folder)
    classes = [f"{i} {name}" for i, name in enumerate(["unlabeled", *frames.class_names])]
    scenes = sorted({name.split("/")[0] for name in frames.names})
    for name, lines in (("classes", classes), ("train", scenes[:-1]), ("val", frames.names[-1:])):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return f"--data {folder} --train-split {folder}/train.txt --val-split {folder}/val.txt"


def refused(message, error=ValueError):
    return pytest.raises(error, match=message)


# ---------------------------------------------------------------------------------------------- whole runs

open_clip.add_model_config(Path(__file__).parent / "data" / "ViT-Tiny-32.json")
TOWER = "ViT-Tiny-32"  # two blocks of width 128
SHARED_CACHE = tempfile.TemporaryDirectory(prefix="bifusion-tests-")  # superpoints and features of the rooms
train.CONSTANTS["min_instance_points"] = 20
CLIP_ON = "--clip-warmup 0,1 --clip-weights 0,0.001,0.01"
rendered = functools.lru_cache(rooms.frames)


def small(folder, *more):
    """Arguments of a run of a few seconds in `folder`. more: others, several in a text if they hold no spaces."""
    options = (f"--rooms 2 --num-points 1000 --voxel-size 0.15 --batch-size 2 --workers 0 --image-size 96,128 "
               f"--clip-model {TOWER} --clip-pretrained none --epochs 2 --eval-every 2 --superpoints 24 "
               f"--frames-per-room 2 --log-every 1 --device cpu --cache {SHARED_CACHE.name} --runs {folder}/runs")
    return " ".join([options, *more]).split()


def last_checkpoint(folder, name="last.pt"):
    """The path of a checkpoint of the only run in `folder`."""
    path, = (folder / "runs").glob(f"*/{name}")
    return path


def checkpoint(folder, name="last.pt"):
    """What that checkpoint holds."""
    return torch.load(last_checkpoint(folder, name), weights_only=True)


def scalars(folder):
    """What the only run in `folder` wrote to TensorBoard."""
    run, = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


class StopAt:
    """In the place of a StopRequest: a signal that comes in the given step."""

    def __init__(self, step):
        self.steps_left = step

    @property
    def signum(self):
        self.steps_left -= 1  # a step looks once
        return 0 if self.steps_left > 0 else signal.SIGTERM


# ---------------------------------------------------------------------------------------------- processes


class Forked:
    """Runs function() in a fork, which need not import anything again; what it prints goes to files."""

    def __init__(self, function, **environment):
        self.printed = [tempfile.TemporaryFile("w+") for _ in range(2)]  # stdout, stderr
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.run, args=(function, environment))
        self.process.start()

    def run(self, function, environment):
        os.environ.update(environment)
        for number, file in enumerate(self.printed, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        function()

    def wait(self, seconds=120):
        """-> exit status, what went to stdout, and to stderr; a process that does not end in time is killed."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        for file in self.printed:
            file.seek(0)
        return self.process.exitcode, *(file.read() for file in self.printed)


def run_in_folder(code, folder):
    """Runs lines of Python as in a new interpreter in a folder -> exit status, stdout, stderr."""
    def run():
        own = {"sources", "support", "bench", *(path.stem for path in ROOT.glob("*.py"))}
        for name in list(sys.modules):
            if name.split(".")[0] in own:
                del sys.modules[name]
        os.chdir(folder)
        sys.path[:] = ["", *(path for path in sys.path if path and not Path(path).is_relative_to(ROOT))]
        exec(code, {})

    return Forked(run).wait()


def try_lock(folder):
    """What `lock_folder` says to another process: an error, or "locked"."""
    def attempt():
        try:
            lock_folder(folder)
            print("locked")
        except ValueError as error:
            print(error)

    return Forked(attempt).wait()[1].strip()


def in_two_processes(function):
    """What `Forked.wait` gives for two processes that train as one, both running function()."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [Forked(function, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    return [process.wait() for process in pair]
