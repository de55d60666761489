"""The project as a package: one list of dependencies, floors that close known holes, nothing heavy at import."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from random_models import make_layout, write_model

from rwkv_lab.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirement(line: str) -> tuple[str, tuple[int, ...] | None]:
    """(name, lowest version) of `name>=1.2`."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(?:>=([0-9.]+))?", line)
    assert match, f"{line!r} is not name>=version"
    return match[1], tuple(map(int, match[2].split("."))) if match[2] else None


def floors() -> dict[str, tuple[int, ...]]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return {name: floor for name, floor in map(requirement, lines) if name != "rwkv_lab"}


def test_environment_only_points_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert (pip, packages) == ("pip", {"pip": ["-e .[all]"]})
    assert set(requirement_extras(EXTRAS["all"][0])) == set(EXTRAS) - {"all"}


def requirement_extras(line: str) -> list[str]:
    return re.fullmatch(r"rwkv_lab\[(.*)\]", line)[1].split(",")


@pytest.mark.parametrize(
    ("name", "floor"), [("torch", (2, 10)), ("onnx", (1, 21)), ("jupyter-server", (2, 18)), ("papermill", (2, 6))]
)
def test_floors_that_close_known_holes(name, floor):
    assert floors()[name] >= floor


def test_every_dependency_has_a_floor():
    assert [name for name, floor in floors().items() if floor is None] == []


def test_constraints_keep_within_the_ranges():
    pinned = dict(re.findall(r"^([a-z0-9_-]+)==([0-9.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert tuple(map(int, pinned["torch"].split("."))) >= floors()["torch"]


def test_imports_of_the_notebooks_are_declared():
    declared = {name.replace("-", "_") for name in floors()} | {"rwkv_lab"} | set(sys.stdlib_module_names)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                used = re.findall(r"^(?:import|from) ([A-Za-z0-9_]+)", "".join(cell["source"]), re.M)
                assert set(used) <= declared, f"{notebook.name} imports {set(used) - declared}"


def test_import_is_light_and_does_nothing_on_the_side():
    heavy = ["torch", "transformers", "onnxruntime", "matplotlib", "pandas", "ipywidgets", "IPython", "rwkv_lab.model"]
    code = f"import sys, rwkv_lab; print([m for m in {heavy} if m in sys.modules], callable(rwkv_lab.merge))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["[]", "True"]


def test_the_process_that_starts_a_kernel_is_light():
    """The kernel imports torch; its parent, which waits for it, need not."""
    code = "import sys, rwkv_lab.workbench.batch; print([m for m in ['torch', 'lark'] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["[]"]


def test_inspecting_imports_neither_torch_nor_numpy(tmp_path):
    """Not even to name the dtypes; what is no checkpoint is refused without them, too."""
    path = str(write_model(tmp_path / "m.pth", make_layout("7.0")))
    code = "import sys; from rwkv_lab.cli.inspecting import show_files; show_files(sys.argv[1:], True);"
    code += "print({'torch', 'numpy', 'pydantic'} & {*sys.modules})"
    run = [sys.executable, "-c", code, "README.md", path]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "RWKV-7.0" in done.stdout and "float32" in done.stdout and done.stdout.endswith("set()\n")
    assert "CorruptFileError" in done.stderr


def test_merge_is_the_function_whatever_of_its_package_was_imported():
    code = (
        "import rwkv_lab.merge, rwkv_lab.merge.plan, importlib; importlib.import_module('rwkv_lab.merge.recipe');"
        "from rwkv_lab import merge; print(merge is rwkv_lab.merge, merge.__name__, rwkv_lab.merge.__module__)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "merge", "rwkv_lab.merge.merge"], done.stderr


def test_tokenizers_need_no_torch():
    code = (
        "import sys; from rwkv_lab.tokenizer import load_tokenizer; from rwkv_lab.tokenizer.stopping import StopText;"
        "print(load_tokenizer('bytes').encode('a'), load_tokenizer('world').encode('a'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["[97]", "[98]", "False"]


def test_wheel_brings_kernels_and_notebooks(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"rwkv_lab-{__version__}-")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, capture_output=True
    )
    code = (
        "import rwkv_lab, rwkv_lab.resources as r; print(rwkv_lab.__file__);"
        "print((r.kernels_folder() / 'README.md').is_file(), (r.notebooks_folder() / 'merge.ipynb').is_file())"
    )
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    where, found = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert found == "True True"


def test_no_unsafe_loading_anywhere():
    sources = [*(ROOT / "rwkv_lab").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    for path in sources:
        text = path.read_text()
        assert not re.search(r"weights_only\s*=\s*False", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_dependency_of_makefile_and_ci():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets >= {"demo", "test", "lab", "lint", "bench", "clean"}


def test_the_changelog_ends_at_this_version():
    headings = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [version for version, date in headings if date]
    assert headings[0] == ("Unreleased", "")
    assert versions[0] == __version__ and versions == sorted(versions, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
