"""A notebook more is one folder in rwkv_lab/workbench and one file in notebooks/; no other file has to change."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
PARAMETERS = '''"""What toy.ipynb takes."""

from typing import Annotated, ClassVar

from pydantic import Field

from rwkv_lab.workbench.parameters import InputPath, Parameters, PathOrEmpty


class ToyParameters(Parameters):
    title: ClassVar[str] = "toy"
    basic: ClassVar[tuple[str, ...]] = ("checkpoint",)

    checkpoint: InputPath = Field("demo:base", description="any checkpoint")
    most: Annotated[int, Field(ge=1)] = Field(1000, description="tensors that it may have")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/toy")


PARAMETERS = ToyParameters
'''
CELLS = '''"""What the cells of toy.ipynb call, in their order."""

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step


def count(run: Run) -> int:
    """Count the tensors."""
    run.begin_again()
    with open_checkpoint(input_path(run.config.checkpoint)) as ck:
        run.record.inputs, tensors = [file_facts(ck)], len(ck)
    run.page.headline = f"{tensors} tensors."
    return tensors


def show_verdict(run: Run, tensors: int) -> None:
    """Print PASS or FAIL."""
    run.record.checks = [Check("tensors", tensors, run.config.most, tensors <= run.config.most)]
    print(*run.record.checks, sep="\\n")


STEPS = (Step(count, "tensors"), Step(show_verdict))
MUST_PASS = True
'''
SOURCES = [
    "# Parameters, which `parameters_cell` writes",
    'from rwkv_lab.workbench import start\n\nrun = start("toy", globals())\nrun',
    "from rwkv_lab.workbench import show_panel\nfrom rwkv_lab.workbench.toy import cells\n\npanel = show_panel(run)",
    "tensors = cells.count(run)",
    "# NBVAL_CHECK_OUTPUT\ncells.show_verdict(run, tensors)",
    "run.finish(must_pass=True)",
]
RUN_ALL = """
from rwkv_lab.workbench import start
from rwkv_lab.workbench.registry import notebook_names
from rwkv_lab.workbench.steps import run_all
run_all(start("toy", {"report": "all"}))
print(*notebook_names())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with a notebook more."""
    tree = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("rwkv_lab", "notebooks", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    folder = tree / "rwkv_lab" / "workbench" / "toy"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""toy.ipynb: its parameters and cells."""\n')
    (folder / "parameters.py").write_text(PARAMETERS)
    (folder / "cells.py").write_text(CELLS)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [nbformat.v4.new_markdown_cell("# Toy"), *map(nbformat.v4.new_code_cell, SOURCES)]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tree / "notebooks" / "toy.ipynb")
    return tree


@pytest.fixture
def run(tree, environment):
    """run("papermill", …) -> stdout of `python -m papermill …` in the copy."""

    def run(*arguments: str) -> str:
        here = environment | {"PYTHONPATH": os.pathsep.join([str(tree), environment["PYTHONPATH"]])}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tree, env=here, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_it_runs_by_the_panels_button(tree, run):
    """In batch it runs in test_contributing.py."""
    assert "toy" in run("-c", RUN_ALL).splitlines()[-1].split()
    result = json.loads((tree / "all" / "result.json").read_text())
    assert result["status"] == "ok" and result["parameters"]["most"] == 1000
    assert result["checks"][0]["value"] > 0 and len(result["inputs"]) == 1
    assert "tensors." in (tree / "all" / "report.html").read_text()


def test_the_wheel_has_it(tree, run):
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", str(tree))
    (wheel,) = (tree / "dist").glob("*.whl")
    assert {"rwkv_lab/notebooks/toy.ipynb", "rwkv_lab/workbench/toy/cells.py"} <= {*zipfile.ZipFile(wheel).namelist()}


def test_without_its_folder_it_is_gone(tree, run):
    shutil.rmtree(tree / "rwkv_lab" / "workbench" / "toy")
    (tree / "notebooks" / "toy.ipynb").unlink()
    names = "from rwkv_lab.workbench.registry import notebook_names; print(*notebook_names())"
    assert run("-c", names).split() == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb") if p.stem != "index")
