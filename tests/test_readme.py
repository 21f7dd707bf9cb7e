# SPDX-License-Identifier: MIT
"""The README and docs: snippets run as printed, commands parse, and what they name exists."""
import re
import shlex
import shutil

import pytest

import predict
import train
from bench.__main__ import parse_args as parse_bench
from helpers import ROOT, last_checkpoint, run_in_folder, small, write_rooms_as_scannet

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SNIPPETS = [(name, code) for name, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]
ALONE = []  # (the module of ours that a snippet imports, snippet)
for _, code in SNIPPETS:
    own = [name for name in re.findall(r"^from ([\w.]+)", code, re.M)
           if (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    if len(own) == 1:
        ALONE.append((own[0], code))


def test_the_readme_can_be_finished():
    assert len(PAGES["README.md"].splitlines()) <= 190


@pytest.mark.parametrize("module, snippet", ALONE, ids=[module for module, _ in ALONE])
def test_a_snippet_runs_beside_the_one_file_that_it_imports(module, snippet, tmp_path):
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    status, _, errors = run_in_folder(snippet, tmp_path)
    assert status == 0, errors


def test_the_notebook_lines_run_on_a_trained_network(tmp_path):
    train.main(small(tmp_path, write_rooms_as_scannet(tmp_path / "DATA", 2, 1, (60, 80)), "--epochs 1"))
    snippet, = re.findall(r"```python\n(from model.*?)```", PAGES["README.md"], re.S)
    snippet = snippet.replace("runs/NAME/best.pt", str(last_checkpoint(tmp_path))).replace('"DATA"', f'"{tmp_path}/DATA"')
    status, printed, errors = run_in_folder(snippet, ROOT)
    assert status == 0 and printed.count("(60, 80)") == 2, errors


PARSERS = {"train.py": train.parse_args, "python predict.py": predict.parse_args, "-m bench": parse_bench}


def commands():
    """Every command line of train.py, predict.py and bench in the pages."""
    for name, text in PAGES.items():
        text = re.sub(r"\\\n\s*", "", text)
        for program, line in re.findall(r"(train\.py(?= -)|python predict\.py|-m bench)( [^`\n]*)", text):
            command = re.split(r"\s{3,}|&&|#", line.strip())[0].split(" ...")[0]
            if "--help" not in command:
                yield pytest.param(program, command, id=f"{name} {program} {command}")


@pytest.mark.parametrize("program, command", list(commands()))
def test_every_command_line_parses(program, command):
    words = shlex.split(command)
    data = ["--train-split", "t", "--val-split", "v"] if program == "train.py" and "--data" in words else []
    values = {"S": "0", "K": "10", "N": "4", "CHECKPOINT": __file__}
    assert PARSERS[program]([*data, *(values.get(word, word) for word in words)])


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_link_that_a_page_names_exists(name):
    text = PAGES[name]
    for path in set(re.findall(r"`((?:labels|tests|docs|bench|sources|support)/[\w./-]+|\w+\.py)`", text)):
        assert (ROOT / path).exists(), path
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
