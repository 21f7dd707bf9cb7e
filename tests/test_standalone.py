# SPDX-License-Identifier: MIT
"""Each module file can be copied out: alone in an empty folder it imports, and the four main ones run."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "encoder": """
import torch
from encoder import Enhanced2DEncoder
encoder = Enhanced2DEncoder("ViT-S-16-alt", None, image_size=(32, 48))
spatial, global_ = encoder(torch.rand(1, 3, 32, 48))
assert spatial.shape == (1, 256, 2, 3) and global_.shape == (1, 256)
""",
    "sparse_unet": """
import torch
from sparse_unet import Res16UNet34C
coords = torch.unique(torch.cat([torch.zeros(60, 1), torch.randint(0, 9, (60, 3))], 1).int(), dim=0)
with torch.no_grad():
    assert Res16UNet34C(in_channels=3).eval()(coords, torch.rand(len(coords), 3)).shape == (len(coords), 96)
""",
    "fusion": """
import torch
from fusion import apply_transform, project_to_image, sample_features, FusionGate
points = torch.rand(5, 3) + torch.tensor([0, 0, 1.0])
intrinsics = torch.tensor([[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]])
uv, depth = project_to_image(apply_transform(points, torch.eye(4)), intrinsics)
feat_2d = sample_features(torch.rand(1, 8, 3, 4), uv, (48, 64), torch.zeros(5, dtype=torch.long))
fused, alpha = FusionGate(8)(torch.rand(5, 8), feat_2d, depth > 0)
assert fused.shape == (5, 8) and alpha.shape == (5, 1)
""",
    "losses": """
import torch
from losses import ClipConsCriterion
feat = torch.randn(6, 8, requires_grad=True)
loss, counts = ClipConsCriterion()(feat, torch.randn(2, 8), batch=torch.arange(6) % 2)
loss.backward()
assert feat.grad.any()
""",
    **dict.fromkeys(["decoder", "metrics", "superpoints", "data"], ""),
    **dict.fromkeys(["sources/rooms", "sources/scannet"], ""),
    **dict.fromkeys([f"support/{name}" for name in ("cache", "checkpoint", "clouds", "diagnose", "distributed", "runlog",
                                                    "visualize")], ""),
}
# One interpreter for all, because most of the time goes into importing torch. A file meets no sibling: its folder holds
# nothing else, and what was imported before it is forgotten.
DRIVER = """
import importlib, json, sys, traceback
results = {}
for name, (folder, example) in json.load(sys.stdin).items():
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
        assert module.__file__.startswith(folder), module.__file__
        exec(example, {})
        results[name] = "ran"
    except Exception:
        results[name] = traceback.format_exc()
    sys.path.remove(folder)
    sys.modules.pop(name, None)
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    jobs = {}
    for name, example in EXAMPLES.items():
        folder = tmp_path_factory.mktemp(Path(name).name)
        shutil.copy(ROOT / f"{name}.py", folder)
        jobs[Path(name).name] = str(folder), example
    empty = tmp_path_factory.mktemp("empty")
    run = subprocess.run([sys.executable, "-E", "-c", DRIVER], input=json.dumps(jobs), text=True, capture_output=True,
                         cwd=empty)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.rpartition("RESULTS")[2])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_copied_alone_into_an_empty_folder_imports_and_runs(results, name):
    assert results[Path(name).name] == "ran", results[Path(name).name]


def test_the_harness_does_not_find_siblings(tmp_path):
    (tmp_path / "alone.py").write_text("import losses")
    run = subprocess.run([sys.executable, "-E", "-c", DRIVER], input=json.dumps({"alone": (str(tmp_path), "")}),
                         text=True, capture_output=True, cwd=tmp_path)
    assert "No module named 'losses'" in json.loads(run.stdout.rpartition("RESULTS")[2])["alone"]
