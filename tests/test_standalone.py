# SPDX-License-Identifier: MIT
"""Files can be copied out: each imports alone in an empty folder; snippets of the docs run there, see test_readme.py.

No import runs in a circle.
"""
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
def test_a_file_copied_alone_into_an_empty_folder_imports(name, tmp_path):
    copied = {name, *imports(name)}
    assert copied <= {name, GUARD}
    for other in copied:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        shutil.copy(FILES[other], tmp_path / other)
    module = name.removesuffix(".py").replace("/", ".")
    code = f"import {module}\nassert {module}.__file__.startswith({str(tmp_path)!r})\n"
    status, _, errors = run_in_folder(code, tmp_path)
    assert status == 0, errors


def test_in_an_empty_folder_no_sibling_is_found(tmp_path):
    status, _, errors = run_in_folder("import losses", tmp_path)
    assert status == 1 and "No module named 'losses'" in errors
