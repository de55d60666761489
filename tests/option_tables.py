"""The tables of options in docs/, made from the specs.

    python tests/option_tables.py    writes them again

A table stands between `<!-- options of package.module.Class -->`, `<!-- mixing methods -->` or
`<!-- their parameters -->` and `<!-- end -->`.
"""

import re
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from rwkv_lab.merge.family import MERGE_METHODS, Method
from rwkv_lab.merge.method_parameters import NEEDED, Parameter
from rwkv_lab.merge.mixing_method import MIXING
from rwkv_lab.spec import OneOf

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- (options of ([\w.]+)|mixing methods|their parameters) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "True, False",
    Path: "path",
    Any: "number, text, list",
}


def type_in_words(kind: Any) -> str:
    """`Literal["a", "b"] | None` as "a, b"; None is a matter of the default."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        among = [mark for mark in inside[1:] if isinstance(mark, OneOf) and mark.everywhere]
        return type_in_words(Literal[tuple(among[0].names())] if among else inside[0])
    if origin in (Union, UnionType):
        words = [type_in_words(one) for one in inside if one is not NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return ", ".join(f"`{one}`" if one != "" else "empty" for one in inside)
    if origin in (list, tuple):
        return f"list of {type_in_words(inside[0])}"
    if origin is dict or kind is dict:
        return "mapping"
    return WORDS.get(kind, "function")


def table(spec: type) -> str:
    """One row per option of a `Spec`."""
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for name, field in spec.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        meaning = field.description.replace("|", r"\|")
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        rows.append(f"| `{name}` | {type_in_words(kind)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def mixing_methods() -> list[Method]:
    """The methods that mix models, in the order in which they are offered."""
    return [method for method in MERGE_METHODS.values() if method.name in (*MIXING, "passthrough")]


def methods_table() -> str:
    rows = ["| method | result | takes, and the defaults |", "|---|---|---|"]
    for method in mixing_methods():
        takes = ", ".join(f"`{p.name}` {shown(p)}" for p in method.parameters)
        rows.append(f"| `{method.name}` | {method.help} | {takes or '–'} |")
    return "\n".join(rows) + "\n"


def parameters_table() -> str:
    """Parameters of mixing methods, those that mean the same in several methods once."""
    methods = {}
    for method in mixing_methods():
        for p in method.parameters:
            methods.setdefault((p.name, p.takes.help), []).append(f"`{method.name}`")
    rows = ["| parameter | meaning | methods |", "|---|---|---|"]
    rows += [f"| `{name}` | {help} | {', '.join(found)} |" for (name, help), found in methods.items()]
    return "\n".join(rows) + "\n"


def shown(parameter: Parameter) -> str:
    return "required" if parameter.default is NEEDED else str(parameter.default).lower()


def with_tables(text: str) -> str:
    """The text of a page with its tables made anew."""

    def made(match: re.Match) -> str:
        if match[3]:
            module, _, name = match[3].rpartition(".")
            content = table(getattr(import_module(module), name))
        else:
            content = methods_table() if match[2] == "mixing methods" else parameters_table()
        return match[1] + content + match[4]

    return TABLE.sub(made, text)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").glob("*.md"))


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text()))
