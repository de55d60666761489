"""docs/environment.md lists every environment variable that the sources read or set."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "environment.md"
NO_VARIABLES = {"PASSIVE", "SC_CLK_TCK"}  # a value, a name of os.sysconf
NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")


def listed() -> set[str]:
    """The names in the first columns of the page's tables."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def read_in_python(source: str) -> Iterator[str]:
    """Texts in capitals in every function that touches the environment, and outside of functions in its module."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    outside = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    if not touches_environment(tree):
        return
    for part in [*(f for f in functions if touches_environment(f)), *outside]:
        for n in ast.walk(part):
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and NAME.fullmatch(n.value):
                yield n.value


def touches_environment(tree: ast.AST) -> bool:
    return any(
        (isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv", "putenv"))
        or (isinstance(n, ast.Name) and n.id in ("environ", "getenv", "environment"))
        or (isinstance(n, ast.keyword) and n.arg == "env")
        for n in ast.walk(tree)
    )


def read_in_c(source: str) -> Iterator[str]:
    yield from re.findall(r'getenv\("(\w+)"\)', source)


def read_in_make(source: str) -> Iterator[str]:
    """Variables with `?=`, and those exported or set in front of a command."""
    yield from re.findall(r"^([A-Z_]+) \?=", source, re.MULTILINE)
    yield from re.findall(r"(?:^export |^\t@?)([A-Z_]{3,})[ :?]*=", source, re.MULTILINE)


@cache
def used() -> dict[str, str]:
    """Variable -> a file that uses it. Tests of our own are read for variables of our own only."""
    found = {}
    for path in (ROOT / "rwkv_lab").rglob("*.py"):
        found |= dict.fromkeys(read_in_python(path.read_text()), str(path.relative_to(ROOT)))
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            found |= dict.fromkeys(read_in_c(path.read_text()), str(path.relative_to(ROOT)))
    found |= dict.fromkeys(read_in_make((ROOT / "Makefile").read_text()), "Makefile")
    ours = [path for name in ("rwkv_lab", "tests", "notebooks") for path in (ROOT / name).rglob("*.*")]
    for path in [path for path in ours if path.suffix in (".py", ".ipynb")]:
        own = re.findall(r"\bRWKV_LAB_[A-Z_]+\b", path.read_text())
        found |= dict.fromkeys(own, str(path.relative_to(ROOT)))
    return {name: where for name, where in found.items() if name not in NO_VARIABLES}


def test_the_page_lists_every_variable():
    assert {name: where for name, where in used().items() if name not in listed()} == {}


def test_our_own_variables_on_the_page_are_used():
    assert {name for name in listed() if name.startswith("RWKV_LAB_")} <= set(used())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os\ndef f():\n    return os.environ.get('A_B')", ["A_B"]),
        ("import os\nx = os.environ['AB']", ["AB"]),
        ("from os import environ\ndef f():\n    return [environ.get(n) for n in ('ONE', 'TWO')]", ["ONE", "TWO"]),
        ("def f():\n    run(['x'], env={'SET': '1'})", ["SET"]),
        ("import os\nNAMES = ('ONE', 'TWO')\ndef f():\n    return [os.environ[n] for n in NAMES]", ["ONE", "TWO"]),
        ("def f():\n    return 'BF16'", []),
    ],
)
def test_python_is_read(source, names):
    assert list(dict.fromkeys(read_in_python(source))) == names


def test_make_and_c_are_read():
    assert list(read_in_make("PYTHON ?= python3\nexport OMP_X = 1\nrun:\n\t@OMP_Y=2 python\n")) == [
        "PYTHON",
        "OMP_X",
        "OMP_Y",
    ]
    assert list(read_in_c('auto x = std::getenv("ABC");')) == ["ABC"]
