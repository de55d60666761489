"""Paths as people give them."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from rwkv_lab.errors import ParameterError


def to_path(value: str | os.PathLike, what: str) -> Path:
    """`value` as a path, `~` expanded.

    Args:
        what: whose path it is, for messages: "base", "out", ….
    Raises:
        ParameterError: not a path at all, or one that `path_fault` finds fault with.
    """
    if not isinstance(value, str | os.PathLike):
        raise ParameterError(f"{what}={value!r}: it should be a path")
    text = os.fsdecode(value)
    fault = path_fault(text)
    if fault:
        raise ParameterError(f"{what}={text!r}: {fault}")
    return Path(text).expanduser()


def path_fault(text: str) -> str:
    """What keeps `text` from being a path: it is empty, holds a zero byte, or is an address of the net; "" if nothing
    does."""
    if not text.strip():
        return "it should be a path, and is empty"
    if "\0" in text:
        return "it should be a path, and holds a zero byte"
    if re.match(r"(https?|hf|s3|gs)://", text):
        return "it is an address; download it first, then give the file"
    return ""


def missing_file(path: Path) -> ParameterError:
    """The error for a path at which there is nothing: with the nearest names in its folder, or the folder that there
    is."""
    folder = next(parent for parent in (*path.absolute().parents, Path()) if parent.is_dir())
    if folder != path.absolute().parent:
        return ParameterError(f"there is no file {path}: of its folders there is only {folder}")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    if path.name in names:
        return ParameterError(f"there is no file {path}: it is a link to nothing")
    near = get_close_matches(path.name, names, n=3)
    return ParameterError(f"there is no file {path}" + (f"; did you mean {', '.join(near)}?" if near else ""))
