# SPDX-License-Identifier: MIT
"""Puts the flat files of the repository root on the import path, and says where shared test data would lie."""
import copy
import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tensors as small as these only wait for a thread pool, and for long where other work shares the cores.
torch.set_num_threads(1)


@pytest.fixture
def shared():
    """Folder with real frames and reference figures beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real frames and reference figures in {folder.name}/ beside the repository")
    return folder


WHOLE_RUNS = ("test_train", "test_diagnose", "test_model", "test_predict", "test_readme", "test_stability")


@pytest.fixture(autouse=True, scope="module")
def made_once(request):
    """For tests of whole runs: the rooms that most of them share are rendered once, their random tower is made once."""
    if request.module.__name__ not in WHOLE_RUNS:
        yield
        return
    import encoder
    import rooms
    load = functools.lru_cache(encoder.load_clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "frames", functools.lru_cache(rooms.frames))
        patch.setattr(encoder, "load_clip", lambda name, pretrained: copy.deepcopy(load(name, pretrained)))
        yield
