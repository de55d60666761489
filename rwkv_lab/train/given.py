"""Values that people give, held against the types that a function names for its parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from rwkv_lab.errors import ParameterError

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}


def check_types(function: Callable, given: Mapping[str, object]) -> None:
    """Refuse values of other types than the function's annotations: numbers in quotes, broken numbers, and so on.

    Known are int, float (a whole number will do), bool, str, Path, sequences of texts, and functions.

    Raises:
        ParameterError: the first, and what is needed.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        value, named = given[name], parameter.annotation
        kinds = get_args(named) if isinstance(named, UnionType) else (named,)
        if not any(_is(value, kind) for kind in kinds):
            words = " or ".join(_in_words(kind) for kind in kinds if kind is not type(None))
            raise ParameterError(f"{name}={value!r}: it must be {words}.")


def _is(value: object, kind) -> bool:
    origin = get_origin(kind) or kind
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if origin is Callable:
        return callable(value)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, origin) and not (origin is int and isinstance(value, bool))


def _in_words(kind) -> str:
    origin = get_origin(kind) or kind
    return _WORDS.get(origin, "a list of names or patterns" if origin is Sequence else "a function")
