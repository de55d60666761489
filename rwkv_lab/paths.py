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
    return Path(os.path.expanduser(text))  # Path's own fails where there is no such user


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
    """The error for a path at which there is nothing, with `what_is_there`."""
    return ParameterError(f"there is no file {path}{what_is_there(path)}")


def what_is_there(path: Path) -> str:
    """What there is in the place of a file that is missing, to go behind its name: the nearest names in its folder, or
    the folder that there is; "" where nothing is near."""
    if os.path.isdir(path):  # Path.is_dir fails on names that are too long
        return ": it is a folder"
    folder = next(parent for parent in (*path.absolute().parents, Path()) if os.path.isdir(parent))
    if folder != path.absolute().parent:
        return f": of its folders there is only {folder}"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    if path.name in names:
        return ": it is a link to nothing" if path.is_symlink() else ": it is neither a file nor a folder"
    # Without suffixes, which many files share whose names have nothing to do with each other.
    stems = {name: Path(name).stem.lower() for name in names}
    near = get_close_matches(path.stem.lower(), dict.fromkeys(stems.values()), n=3)
    found = sorted((name for name in names if stems[name] in near), key=lambda name: near.index(stems[name]))[:3]
    return f"; did you mean {', '.join(found)}?" if found else ""
