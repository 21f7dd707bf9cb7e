# SPDX-License-Identifier: MIT
"""One thread for all, and fixtures of several test files."""
import os

import pytest
import torch

import helpers

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
def shared():
    """The folder with real frames and reference figures beside the repository; without it the test is skipped."""
    folder = helpers.ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real frames and reference figures in {folder.name}/ beside the repository")
    return folder


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """For tests that also run on a GPU, if there is one."""
    return request.param


@pytest.fixture
def quick_runs(monkeypatch):
    """For tests of whole runs: no room is rendered twice, and no images are drawn for TensorBoard."""
    for split, rooms in (("train", 2), ("val", 1)):
        helpers.rendered(split, rooms, 2, 0, (240, 320))  # now, and not in every fork
    monkeypatch.setattr("sources.rooms.frames", helpers.rendered)
    monkeypatch.setattr("train.visualize", lambda *args: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two epochs with everything on: its folder and final metrics."""
    import train
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.main(helpers.small(folder, helpers.CLIP_ON))
