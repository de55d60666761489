"""Public functions state the types of what they take and return."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Public functions that are not fully annotated, by package. These numbers only fall.
ALLOWED: dict[str, int] = {}


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods without a leading underscore, and those with two at both ends, of public classes."""
    bodies = [tree.body]
    for body in bodies:
        for node in body:
            special = getattr(node, "name", "").startswith("__")
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_") and not special:
                    continue
                if isinstance(node, ast.ClassDef):
                    bodies.append(node.body)
                else:
                    yield node


def missing(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters without a type, and "return"; `self` and `cls` need none, nor does what a `__init__` returns."""
    a = function.args
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    names = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
    return names + ["return"] * (function.returns is None and function.name != "__init__")


def test_public_signatures_are_annotated():
    found = []
    for path in sorted((ROOT / "rwkv_lab").rglob("*.py")):
        for function in public_functions(ast.parse(path.read_text())):
            if names := missing(function):
                where = path.relative_to(ROOT).as_posix()
                found.append((where.split("/")[1], f"{where}:{function.lineno}: {function.name}: {', '.join(names)}"))
    counts = Counter(package for package, _ in found)
    more = counts - Counter(ALLOWED)
    assert not more, "\n".join([*(line for package, line in found if package in more), f"Counted: {dict(counts)}"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x): pass", ["x", "return"]),
        ("def f(x: int) -> int: pass", []),
        ("class A:\n    def __init__(self, *a): pass", ["a"]),
        ("class A:\n    def f(self) -> None: pass", []),
        ("class A:\n    def __call__(self, **k: int): pass", ["return"]),
    ],
)
def test_what_is_missing_is_found(source, expected):
    assert [name for f in public_functions(ast.parse(source)) for name in missing(f)] == expected


def test_private_functions_are_free():
    assert not list(public_functions(ast.parse("def _f(x): pass\nclass _A:\n    def f(self, x): pass")))
