"""Reads JSON objects of checkpoints, and refuses those that two programs may read differently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_lab.errors import CorruptFileError

_MAX_BYTES = 100_000_000


def unique_keys(path: Path, what: str = "it") -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """`object_pairs_hook` of json that refuses a key that appears twice: json keeps the last one, and a program that
    keeps the first would read another model.

    Args:
        path, what: where it stands, for the message.
    """

    def found(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen = set[str]()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CorruptFileError(f"{path}: {twice!r} appears twice in {what}")
        return made

    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        CorruptFileError: too large, no JSON, no object, or a key that is there twice.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise CorruptFileError(f"{path} has {path.stat().st_size} bytes; {_MAX_BYTES} are the limit")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys(path))
    except (ValueError, RecursionError) as e:
        raise CorruptFileError(f"{path} is not JSON ({e})") from e
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not an object")
    return value
