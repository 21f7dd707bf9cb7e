# SPDX-License-Identifier: MIT
"""The README's snippets run as printed, beside nothing but the one file that they import."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_readme_has_three_snippets():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"^from (\w+)", text, re.M)[0])
def test_snippet_runs_beside_the_one_file_that_it_imports(snippet, tmp_path):
    module, = re.findall(r"^from (\w+)", snippet, re.M)
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_relative_path_and_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"`((?:labels|tests)/[\w./-]+|\w+\.py)`", text)):
        assert (ROOT / name).exists(), name
