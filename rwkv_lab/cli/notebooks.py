"""What a notebook says of itself: its title, what it is for, and its parameters.

Read from the notebook's file, because the specs bring torch along, which takes seconds to import. The `parameters` cell
is made from the specs (`rwkv_lab.workbench.parameters_cell`), and a test compares them.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.paths import missing_file
from rwkv_lab.resources import notebooks_folder
from rwkv_lab.suggestions import did_you_mean


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell."""

    name: str
    kinds: frozenset[str]  # of values: "str", "int", "float", "bool", "list", "dict", "None"
    default: Any
    help: str


@dataclass(frozen=True)
class Notebook:
    """A notebook with a `parameters` cell."""

    path: Path
    cells: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        """The heading of its first cell."""
        return self._introduction[0].lstrip("# ")

    @property
    def purpose(self) -> str:
        """The first paragraph below the heading."""
        return next((line for line in self._introduction[1:] if line.strip()), "")

    @property
    def _introduction(self) -> list[str]:
        text = next((_source(cell) for cell in self.cells if cell.get("cell_type") == "markdown"), "")
        return text.splitlines() or [self.name]

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """By name, in their order.

        Raises:
            ParameterError: the notebook has no `parameters` cell.
            CorruptFileError: the cell is not Python.
        """
        source = next((_source(cell) for cell in self.cells if _is_parameters(cell)), None)
        if source is None:
            raise ParameterError(
                f"{self.path} has no cell with the tag parameters, so it takes none and cannot be run."
            )
        try:
            tree = ast.parse(source)
        except SyntaxError as e:
            raise CorruptFileError(f"{self.path}: the parameters cell is not Python: {e}") from e
        lines = source.splitlines()
        found = [_parameter(node, lines[node.end_lineno - 1]) for node in tree.body if node.end_lineno is not None]
        return {one.name: one for one in found if one is not None}


def names() -> list[str]:
    """The notebooks of the package that take parameters, in alphabetical order."""
    found = sorted(notebooks_folder().glob("*.ipynb"))
    return [path.stem for path in found if _takes_parameters(_read(path))]


def notebook(given: str) -> Notebook:
    """A notebook of the package by its name, or any notebook by its path.

    Raises:
        ParameterError: there is none.
        CorruptFileError: the file is no notebook.
    """
    for path in notebooks_folder().glob("*.ipynb"):
        if path.stem == given and _takes_parameters(cells := _read(path)):
            return Notebook(path, cells)
    if given.endswith(".ipynb"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise missing_file(path)
        return Notebook(path, _read(path))
    known = names()
    raise ParameterError(
        f"{given!r} is no notebook{did_you_mean(given, known) or '.'} There are: {', '.join(known)}.\n"
        "Give one of these names, or the path of an .ipynb file."
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        cells = json.loads(path.read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptFileError(f"{path} cannot be read as a notebook: {type(e).__name__}: {e}") from e
    return [cell for cell in cells if isinstance(cell, dict)]


def _takes_parameters(cells: list[dict[str, Any]]) -> bool:
    return any(map(_is_parameters, cells))


def _is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell.get("metadata", {}).get("tags", [])


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell.get("source", []))


def _parameter(node: ast.stmt, line: str) -> Parameter | None:
    """The parameter that a statement sets; None for others, such as imports."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        target, annotation, value = node.target.id, ast.unparse(node.annotation), node.value
    elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        target, annotation, value = node.targets[0].id, "", node.value
    else:
        return None
    try:
        default = ast.literal_eval(value)
    except ValueError:
        return None
    kinds = set(re.findall(r"\b(?:str|int|float|bool|list|dict)\b", re.sub(r"\blist\[[^\]]*\]", "list", annotation)))
    kinds |= {"None"} if "Optional" in annotation or "None" in annotation else set()
    return Parameter(target, frozenset(kinds or {type(default).__name__}), default, line.partition("  # ")[2])
