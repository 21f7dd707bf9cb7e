# SPDX-License-Identifier: MIT
"""Puts the flat files of the repository root on the import path, and says where shared test data would lie."""
import copy
import functools
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from side_by_side import pytest_runtestloop  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tensors as small as these only wait for a thread pool, for long where other work shares the cores, and for ever in a
# fork of this process, which has no pool of its own. What tests call, as `bench` does, cannot start one either.
torch.set_num_threads(1)
torch.set_num_threads = lambda number: None
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_disks():
    """fsync guards against power cuts alone, which no test has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def tmp_path(tmp_path, request):
    """pytest's, which goes after a test that passed: all together would fill 6 GB."""
    failed = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path, ignore_errors=True)  # a thread of TensorBoard may still write there


@pytest.fixture
def shared():
    """Folder with real frames and reference figures beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real frames and reference figures in {folder.name}/ beside the repository")
    return folder


# Functions of each module's mathematics. Where there is a GPU, the tests of these modules run a second time, with these
# functions computing there: their arguments go there, and their results, which keep their graph, come back.
ON_A_GPU = {
    "fusion": ("transform_packed", "project_packed", "project_to_image", "visible_mask", "occluded_mask",
               "sample_cells", "view_cells", "weighted_rows"),
    "losses": ("clip_consistency", "clip_infonce", "semantic_loss", "instance_loss", "instance_losses",
               "instance_targets", "match_instances", "dice_loss"),
    "decoder": ("superpoint_index", "pool", "attend_by_scene", "attend_padded", "attention_mask", "matrix_nms",
                "instances_from_logits"),
    "sparse_unet": ("voxelize", "voxel_mean", "build_kernel_map", "sparse_conv")}
MODULES = {"test_instance_losses": "losses", **{f"test_{name}": name for name in ON_A_GPU}}
CPU_ONLY = ("autocast", "compile", "waits", "vmap", "ddp", "processes", "bit_exact", "keeps_only", "dies_with",
            "refused", "malformed")  # in names of tests; on a GPU, what is out of range ends the process


def pytest_generate_tests(metafunc):
    name = metafunc.function.__name__
    twice = metafunc.module.__name__ in MODULES and not any(part in name for part in CPU_ONLY)
    if torch.cuda.is_available() and twice:
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """Where the functions of ON_A_GPU compute."""
    device = getattr(request, "param", "cpu")
    if device == "cuda":
        name = MODULES[request.module.__name__]
        for function in ON_A_GPU[name]:
            wrapped = on_device(getattr(importlib.import_module(name), function), device)
            monkeypatch.setattr(f"{name}.{function}", wrapped)
            monkeypatch.setattr(request.module, function, wrapped, raising=False)
    return device


running = []  # the function of ON_A_GPU that runs now


def on_device(function, device):
    """The function with its tensors on a device; with grids and kernel maps of sparse_unet among its arguments."""
    from model import to_device
    from sparse_unet import KernelMap, VoxelGrid

    def move(value):
        if isinstance(value, KernelMap):
            return KernelMap(value.table.to(device), value.num_in)
        if isinstance(value, VoxelGrid):
            value.on_device = getattr(value, "on_device", None) or VoxelGrid(value.coords.to(device), value.stride)
            return value.on_device
        return to_device(value, device)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if running:  # called by another of these functions, which has moved its arguments
            return function(*args, **kwargs)
        running.append(function)
        try:
            result = function(*map(move, args), **{name: move(value) for name, value in kwargs.items()})
        finally:
            running.pop()
        if isinstance(result, KernelMap):
            return KernelMap(result.table.cpu(), result.num_in)
        return to_device(result, "cpu")
    return wrapped


CLIP_ON = ["--clip-warmup", "0,1", "--clip-weights", "0,0.001,0.01"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two epochs with everything on: its folder and final metrics."""
    import predict
    import train
    from helpers import small
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "visualize", predict.visualize)
        return folder, train.main(small(folder, *CLIP_ON))


WHOLE_RUNS = ("test_train", "test_diagnose", "test_model", "test_predict", "test_readme", "test_stability")


@pytest.fixture(autouse=True, scope="module")
def made_once(request):
    """For tests of whole runs: the rooms that most of them share are rendered once, their random tower is made once, and
    images for TensorBoard are drawn only in tests that look at them, which put `predict.visualize` back.
    """
    if request.module.__name__ not in WHOLE_RUNS:
        yield
        return
    import encoder
    from sources import rooms
    import train
    load = functools.lru_cache(encoder.load_clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "frames", functools.lru_cache(rooms.frames))
        patch.setattr(encoder, "load_clip", lambda name, pretrained: copy.deepcopy(load(name, pretrained)))
        patch.setattr(train, "visualize", lambda *args: None)
        yield
