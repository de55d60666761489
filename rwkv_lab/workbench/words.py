"""Values in words, of papermill or of `rwkv-lab`: one word or number also where a list or a mapping is meant."""

import ast
import json
import os
import re
import shlex
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rwkv_lab.spec import OneOf

_ADVICE = re.compile(r"\b[Pp]ass .*")  # to the end of its line
_COMMA = re.compile(r",(?![^\[]*\])")  # but not in a pattern such as blocks.[0,1].*


def from_words(field: FieldInfo, value: object) -> object:
    """The value of a parameter that may be given in words; what is neither list nor mapping stays as it is.

    A list is one word, words separated by commas, or JSON; a mapping is JSON. Where one number serves too, one word
    stays one number, and "None" in a list is nothing. The path of a file that is there is one word, whatever is in it.
    None is "nothing given" for parameters whose default is empty.
    """
    if value is None and field.default in ("", [], {}):
        return field.default
    kinds = [_plain(kind) for kind in _alternatives(field.annotation)]
    if dict in kinds and isinstance(value, str):
        value = _parsed(value, dict, value) if value.strip() else field.default
    if list not in kinds or isinstance(value, (list, tuple, dict, bool)) or value is None:
        return list(value) if isinstance(value, tuple) and list in kinds else value
    one_serves = str in kinds or float in kinds
    if not isinstance(value, str):
        return value if one_serves or type(value) in kinds else [value]
    if one_serves and not _COMMA.search(value):
        return _parsed(value, list, value)  # a list may be given, and need not be
    inside = next(_inside(kind) for kind in _alternatives(field.annotation) if _plain(kind) is list)
    if inside is str and os.path.exists(os.path.expanduser(value)):
        return value if str in kinds else [value]
    words = [word.strip() for word in _COMMA.split(value) if word.strip()]
    return _parsed(value, list, [_number(word) if inside in (int, float) else word for word in words])


def takes_mapping(field: FieldInfo) -> bool:
    """Whether the parameter may be a mapping."""
    return dict in [_plain(kind) for kind in _alternatives(field.annotation)]


def example(name: str, field: FieldInfo) -> object:
    """A value that the parameter may have, for messages: the stated example, the default, or a choice."""
    if field.examples:
        return field.examples[0]
    if field.default not in (None, "", [], {}):
        return field.default
    for kind in _alternatives(field.annotation):
        marks = get_args(get_args(kind)[0])[1:] if _plain(kind) is list else ()
        among = next((mark for mark in marks if isinstance(mark, OneOf)), None)
        if among:
            return list(among.names())[:1]
    return name


def in_words(value: object) -> str:
    """The value as -p takes it: lists with commas, the rest as JSON."""
    return ",".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def in_command() -> bool:
    """Whether this kernel was started by the command rwkv-lab, whose parameters are words `name=value`."""
    return bool(os.environ.get("RWKV_LAB_COMMAND"))


def as_option(name: str, value: object) -> str:
    """A parameter with its value as papermill takes it, or rwkv-lab where that runs the notebook."""
    if in_command():
        text = value if isinstance(value, str) else in_words(value)
        return shlex.quote(f"{name}={text}")
    if isinstance(value, dict):
        return f"-y {shlex.quote(json.dumps({name: value}))}"
    return f"-p {name} {shlex.quote(value if isinstance(value, str) else in_words(value))}"


def advice_in_words(message: str, names: Iterable[str]) -> str:
    """A message in which values to pass stand as `as_option` has them: `Pass ignore=["id"]` as `Pass -p ignore id`.

    Args:
        names: of the parameters that there are.
    """
    value = r"""\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|\w[\w.+-]*(?<!\.)"""
    given = re.compile(rf"(?<![\w.-])({'|'.join(names)})=({value})")

    def option(found: re.Match) -> str:
        name, value = found[1], _parsed(found[2], object, found[2])
        return as_option(name, value if isinstance(value, dict | list) else found[2].strip("\"'"))

    return _ADVICE.sub(lambda sentence: given.sub(option, sentence[0]), message)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for one in get_args(annotation) for kind in _alternatives(one))
    return (annotation,)


def _plain(kind: Any) -> Any:
    """`list` for `list[str]`, `str` for a Literal."""
    origin = get_origin(kind)
    return str if origin is Literal else origin or kind


def _inside(kind: Any) -> Any:
    return _plain(_alternatives(get_args(kind)[0])[0])


def _parsed(text: str, kind: type, otherwise: object) -> object:
    """A list or a mapping in JSON or Python's spelling; `otherwise` where the text is no such thing."""
    if text.lstrip()[:1] not in "[{":
        return otherwise
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, kind):
            return value
    return otherwise


def _number(word: str) -> object:
    """A number where the word is one, None for that word; others are refused by the parameter's type."""
    if word == "None":
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
