"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm_python import warm_python

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPE = re.compile(r"^### (An? [^\n]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
RECIPES = dict(RECIPE.findall(PAGE.partition("## Adding things")[2]))
# The last words before a block: `path`: or "Try it:".
BLOCK = re.compile(r"(?:`([\w./]+)`|(Try it)):\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(recipe: str) -> tuple[dict[str, str], str]:
    """(files by path, what tries them) of a recipe."""
    found = BLOCK.findall(RECIPES[recipe])
    (trial,) = [text for _, is_trial, text in found if is_trial]
    return {path: text for path, _, text in found if path}, trial


@pytest.fixture(scope="module")
def project(tmp_path_factory, demo_folder) -> Path:
    """A copy of the project, with a base model and a text beside it."""
    tree = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns(".ipynb_checkpoints")  # what is compiled stays so
    for folder in ("rwkv_lab", "notebooks", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    shutil.copy(demo_folder / "demo-base.pth", tree / "B.pth")
    (tree / "mine.jsonl").write_text("".join(f'{{"text": "{i} is less than {i + 1}."}}\n' for i in range(500)))
    return tree


@pytest.fixture(scope="module")
def tried(project) -> Iterator[Callable[[str], subprocess.CompletedProcess]]:
    """Runs a trial in a process that has imported torch and nothing of the project."""
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}

    def run(trial: str) -> subprocess.CompletedProcess:
        words = [warm.python, "-c", trial]
        return subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=300)

    with tempfile.TemporaryDirectory() as folder:  # a short path
        with warm_python(Path(folder), environment, torch_alone=True) as warm:
            yield run


def remove_new(tree: Path, before: set[Path]) -> None:
    """Remove what a trial or a recipe has made."""
    for path in sorted(set(tree.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


WITHOUT = """
import json, sys, traceback
for name, trial in json.load(open("trials.json")).items():
    try:
        exec(compile(trial, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
    else:
        print("works:", name)
print("tried")
"""


@pytest.fixture(scope="module")
def without_files(project, tried) -> list[str]:
    """What was printed when all trials were run without the files of the recipes, in one process."""
    before = set(project.rglob("*"))
    (project / "trials.json").write_text(json.dumps({recipe: blocks(recipe)[1] for recipe in RECIPES}))
    done = tried(WITHOUT)
    remove_new(project, before)
    assert done.stderr.count("Traceback") >= len(RECIPES), done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_works_and_is_needed(recipe, project, tried, without_files):
    files, trial = blocks(recipe)
    assert files, "no block of this recipe has a path above it"
    assert f"works: {recipe}" not in without_files and without_files[-1] == "tried"
    before = set(project.rglob("*"))
    try:
        for path, text in files.items():
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).write_text(text)
        done = tried(trial)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    finally:
        remove_new(project, before)


def test_there_is_a_recipe_for_everything():
    kinds = ("merge method", "kind of adapter", "generation", "kernel", "notebook", "foreign format")
    assert set(RECIPES) == {f"A {kind}" for kind in kinds}


def test_what_recipes_show_is_formatted_and_typed(tmp_path):
    for recipe in RECIPES:
        files, trial = blocks(recipe)
        for path, text in [*files.items(), ("trial.py", trial)]:
            if path.endswith(".py"):
                target = tmp_path / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ours = 'lint.isort.known-first-party=["rwkv_lab"]'
    for words in (["check", "--config", ours], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
