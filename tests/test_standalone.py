# SPDX-License-Identifier: MIT
"""Files can be copied out: alone in an empty folder each imports, and the main ones run. No import runs in a circle."""
import ast
import graphlib
import shutil
from pathlib import Path

import pytest

from helpers import ROOT, run_in_folder

FILES = {str(path.relative_to(ROOT)): path for folder in (".", "sources", "support", "bench")
         for path in sorted((ROOT / folder).glob("*.py"))}
JOINING = ("train.py", "model.py", "predict.py", "check.py", "evaluate.py", "sources/open.py")  # import siblings
GUARD = "support/files.py"  # goes along with what reads or writes files
ALONE = [name for name in FILES if name not in JOINING and not name.startswith("bench/")]
EXAMPLES = {
    "encoder.py": """
import torch
from encoder import Enhanced2DEncoder
encoder = Enhanced2DEncoder("ViT-S-32-alt", None, image_size=(32, 96))
spatial, global_ = encoder(torch.rand(1, 3, 32, 96))
assert spatial.shape == (1, 256, 1, 3) and global_.shape == (1, 256)
""",
    "sparse_unet.py": """
import torch
from sparse_unet import Res16UNet34C
coords = torch.unique(torch.cat([torch.zeros(60, 1), torch.randint(0, 9, (60, 3))], 1).int(), dim=0)
with torch.no_grad():
    assert Res16UNet34C(in_channels=3).eval()(coords, torch.rand(len(coords), 3)).shape == (len(coords), 96)
""",
    "fusion.py": """
import torch
from fusion import apply_transform, project_to_image, sample_features, FusionGate
points = torch.rand(5, 3) + torch.tensor([0, 0, 1.0])
intrinsics = torch.tensor([[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]])
uv, depth = project_to_image(apply_transform(points, torch.eye(4)), intrinsics)
feat_2d = sample_features(torch.rand(1, 8, 3, 4), uv, (48, 64), torch.zeros(5, dtype=torch.long))
fused, alpha = FusionGate(8)(torch.rand(5, 8), feat_2d, depth > 0)
assert fused.shape == (5, 8) and alpha.shape == (5, 1)
""",
    "losses.py": """
import torch
from losses import ClipConsCriterion
feat = torch.randn(6, 8, requires_grad=True)
loss, counts = ClipConsCriterion()(feat, torch.randn(2, 8), batch=torch.arange(6) % 2)
loss.backward()
assert feat.grad.any()
"""}


def imports(name, everywhere=False):
    """The files of ours that a file imports when it is loaded, or everywhere in it."""
    tree = ast.parse(FILES[name].read_text())
    modules = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{module.replace('.', '/')}.py" for module in modules} & FILES.keys()


def test_imports_form_no_circle_and_no_arrow_points_back_up():
    graph = {name: imports(name, everywhere=True) for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for name, imported in graph.items():
        folders = {Path(other).parent.name for other in imported}
        allowed = {"sources": {"sources", "support"}, "support": {"support"}, "bench": {"", "sources", "support", "bench"}}
        assert folders <= allowed.get(Path(name).parent.name, {"", "sources", "support"}), f"{name} imports {imported}"


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_into_an_empty_folder_imports_and_runs(name, tmp_path):
    copied = {name, *imports(name)}
    assert copied <= {name, GUARD}
    for other in copied:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        shutil.copy(FILES[other], tmp_path / other)
    module = name.removesuffix(".py").replace("/", ".")
    code = f"import {module}\nassert {module}.__file__.startswith({str(tmp_path)!r})\n"
    status, _, errors = run_in_folder(code + EXAMPLES.get(name, ""), tmp_path)
    assert status == 0, errors


def test_in_an_empty_folder_no_sibling_is_found(tmp_path):
    status, _, errors = run_in_folder("import losses", tmp_path)
    assert status == 1 and "No module named 'losses'" in errors
