"""Commands whose flags are the options of specs, with a JSON file of options beside them; flags have the last word."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import missing_file
from rwkv_lab.suggestions import unknown_name


def add_flags(parser: argparse.ArgumentParser, fields: Mapping[str, FieldInfo]) -> None:
    """`--json`, and a flag for every option; what is not given is None."""
    parser.add_argument("--json", help="a file with an object of options")
    for name, field in fields.items():
        flag, kind, words = f"--{name.replace('_', '-')}", type_of(field.annotation), field.description
        read = any(isinstance(mark, BeforeValidator) for mark in field.metadata)  # text, which the spec understands
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif kind is list:
            parser.add_argument(flag, nargs="+", help=words)
        else:
            parser.add_argument(flag, type=kind if kind in (int, float) and not read else str, help=words)


def settings_of(given: dict[str, Any], needed: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """The options of a parsed command and of the file that its `--json` names.

    Args:
        needed: options that must be given.
        names: those that the file may have.
    Raises:
        ParameterError: one that is needed is missing; the file is no object of options.
    """
    path = given.pop("json")
    settings = _from_json(path, list(names)) | {name: value for name, value in given.items() if value is not None}
    missing = [name for name in needed if not settings.get(name)]
    if missing:
        raise ParameterError(f"{' and '.join(missing)} must be given.")
    return settings


def type_of(annotation: Any) -> Any:
    """The plain type of an option: `int` for `Annotated[int, …] | None`, `list` for `list[str]`."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return type_of(next(a for a in inside if a is not NoneType))
    return type_of(inside[0]) if origin is Annotated else origin or annotation


def _from_json(path: str | None, names: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise missing_file(Path(path))
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ParameterError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(settings, dict):
        raise ParameterError(f"{path} must hold one object of options.")
    for name in settings:
        if name not in names:
            raise unknown_name(path, name, names)
    return settings
