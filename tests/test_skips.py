"""SKIPS.md and the skips that there are."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from skips import TABLE, declared, undeclared

TESTS = Path(__file__).parent
NAMES = declared(TABLE.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_line_names_a_test_that_exists(name):
    file, _, wanted = name.partition("::")
    path = TESTS.parent / file
    assert path.is_file(), f"{TABLE.name} names {file}, which does not exist"
    tests = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert not wanted or any(fnmatchcase(t, wanted) for t in tests), f"{file} has no test {wanted}"


def test_names_are_read_from_the_first_column_only():
    rows = ["| test | reason |", "| `tests/a.py::test_x`, `test_y_*` | `tests/b.py` |", "| `tests/c.py` (all) | |"]
    table = "\n".join(rows)
    assert declared(table) == ["tests/a.py::test_x", "tests/a.py::test_y_*", "tests/c.py"]
    skipped = ["tests/a.py::test_x[1-2]", "tests/a.py::test_y_z", "tests/a.py::test_yz", "tests/c.py", "tests/b.py::t"]
    assert undeclared(skipped, declared(table)) == ["tests/a.py::test_yz", "tests/b.py::t"]
    assert undeclared(["tests/a.py"], declared(table)) == []  # a file that skips itself runs none of its tests


@pytest.mark.parametrize("workers", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "workers"])
def test_a_skip_without_a_line_fails_the_run_and_is_named(workers, tmp_path):
    tests = "import pytest\n\ndef test_a(): pytest.skip('because')\n\ndef test_b(): pass\n"
    (tmp_path / "test_it.py").write_text(tests)
    (tmp_path / "test_file.py").write_text("import pytest\npytest.skip('all of it', allow_module_level=True)\n")
    options = ["-p", "skips", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, *workers, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=with_tests_on_the_path(), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED without a line")]
    assert lines == [f"SKIPPED without a line in SKIPS.md: {x}" for x in ("test_file.py", "test_it.py::test_a")]
    (tmp_path / "test_file.py").unlink()
    done = subprocess.run([*command, "-k", "test_b"], cwd=tmp_path, env=with_tests_on_the_path(), capture_output=True)
    assert done.returncode == 0


def with_tests_on_the_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
