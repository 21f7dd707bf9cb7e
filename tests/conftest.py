# SPDX-License-Identifier: MIT
"""Puts the repository root on the import path; fixtures of several test files."""
import functools
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tensors as small as these only wait for a thread pool, and forever in a fork of this process, which has no pool of
# its own. Code under test, such as bench, must not start one either.
torch.set_num_threads(1)
torch.set_num_threads = lambda number: None
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start


@pytest.fixture(autouse=True, scope="session")
def no_fsync():
    """fsync guards against power cuts, which no test has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def tmp_path(tmp_path, request):
    """pytest's own, deleted after a test that passed: all together would fill 6 GB."""
    failed = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path, ignore_errors=True)  # a thread of TensorBoard may still write there


@pytest.fixture
def shared():
    """The folder with real frames and reference figures beside the repository; without it the test is skipped."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real frames and reference figures in {folder.name}/ beside the repository")
    return folder


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """For tests that also run on a GPU, if there is one."""
    return request.param


@pytest.fixture(scope="session")
def render_once():
    """`rooms.frames` that renders the rooms of most runs once."""
    from sources import rooms
    return functools.lru_cache(rooms.frames)


@pytest.fixture
def quick_runs(monkeypatch, render_once):
    """For tests of whole runs: no room is rendered twice, and no images are drawn for TensorBoard."""
    monkeypatch.setattr("sources.rooms.frames", render_once)
    monkeypatch.setattr("train.visualize", lambda *args: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two epochs with everything on: its folder and final metrics."""
    import train
    from helpers import CLIP_ON, small
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.main(small(folder, *CLIP_ON))
