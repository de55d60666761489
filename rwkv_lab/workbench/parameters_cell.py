"""The `parameters` cell of a notebook, from the model of its parameters.

    python -m rwkv_lab.workbench.parameters_cell merge

writes the cell into notebooks/merge.ipynb; without a name, into all notebooks. papermill reads the lines of the cell by
pattern: one parameter each, with a type that papermill can parse, a literal, and help without an equals sign.
"""

import json
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rwkv_lab.resources import notebooks_folder
from rwkv_lab.workbench.parameters import Parameters
from rwkv_lab.workbench.registry import notebook_names, parameters_of


def parameters_cell(model: type[Parameters]) -> str:
    """The source of the cell."""
    lines = [
        f"{name}: {_type(field.annotation)} = {_literal(field.default)}  # {field.description}"
        for name, field in model.model_fields.items()
    ]
    types = " ".join(_type(field.annotation) for field in model.model_fields.values())
    imported = [name for name in ("Optional", "Union") if f"{name}[" in types]
    head = [f"from typing import {', '.join(imported)}", ""] if imported else []
    return "\n".join(head + lines)


def write_parameters_cell(notebook: str) -> None:
    """Replace the cell in the notebook's file."""
    path = notebooks_folder() / f"{notebook}.ipynb"
    content = json.loads(path.read_text())
    (cell,) = [c for c in content["cells"] if "parameters" in c["metadata"].get("tags", [])]
    cell["source"] = parameters_cell(parameters_of(notebook)).splitlines(keepends=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _type(annotation: Any) -> str:
    """The type as papermill's -p and -y can pass it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0])
    if origin in (Union, UnionType):
        kinds = [_type(kind) for kind in inside if kind is not NoneType]
        text = kinds[0] if len(kinds) == 1 else f"Union[{', '.join(kinds)}]"
        return f"Optional[{text}]" if NoneType in inside else text
    if origin is Literal:
        return "str"
    if origin is list:
        kind = _type(inside[0])
        return "list" if kind.startswith(("Union", "Optional")) else f"list[{kind}]"
    return (origin or annotation).__name__


def _literal(value: object) -> str:
    """In Python's words, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else repr(value)


if __name__ == "__main__":
    for name in sys.argv[1:] or notebook_names():
        write_parameters_cell(name)
