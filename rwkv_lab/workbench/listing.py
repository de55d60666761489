"""What is in a folder, for a person who chooses a file: what each file is by its header, and what is wrong with it."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.format import FORMATS, format_of
from rwkv_lab.checkpoint.open import ADAPTERS, INDEXES, SINGLES, Checkpoint
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted

_NO_JOB_TAKES = ("unknown", "unsupported", "unusable", "converted")  # kinds of checkpoints
_PATIENCE = 1.5  # seconds that headers of one folder may take; a local disk needs milliseconds for each
_IN_WORDS = {
    "state": "a tuned state",
    "lora": "a LoRA",
    "pissa": "a PiSSA adapter",
    "pissa-init": "what a PiSSA adapter started from",
    "miss": "a MiSS adapter",
    "model": "a whole model",
    "partial": "a part of a model",
    "unmerged": "a model with an adapter beside its weights",
}


@dataclass(frozen=True)
class Listed:
    """One row: a file, or a folder.

    path: of the file or folder.
    opens: it is a folder that can be looked into.
    chosen: it can be chosen: a file, or a folder that holds a checkpoint.
    bytes: of its tensors' files; None where they were not looked at.
    kind, model: of a checkpoint; model is its generation and size, such as "RWKV-7 191 M".
    fault: what is wrong with it, a sentence; "" where nothing is.
    more: what else its header states, in words.
    layout: of a whole model, in words.
    """

    path: Path
    name: str
    opens: bool = False
    chosen: bool = True
    bytes: int | None = None
    kind: str = ""
    model: str = ""
    fault: str = ""
    more: str = ""
    layout: str = ""


def listing(folder: Path, checkpoints: bool = True) -> list[Listed]:
    """What can be chosen or entered in a folder, folders first; only what this user may read.

    Empty where the folder cannot be read. Headers are read for a second or two; `described` reads that of one file.

    Args:
        checkpoints: list files that hold tensors or are named like such; False: all files.
    """
    rows = [Listed(folder.parent, "..", opens=True, chosen=False)]
    try:
        inside = sorted(folder.iterdir(), key=lambda p: (not p.is_dir(), p.name.lower()))
    except OSError:
        inside = []
    if checkpoints and _holds_one(folder):
        rows.append(Listed(folder, "this folder"))
    for path in inside:
        if path.name.startswith(".") or not os.access(path, os.R_OK):
            continue
        if path.is_dir() and os.access(path, os.X_OK):
            rows.append(Listed(path, f"{path.name}/", opens=True, chosen=checkpoints and _holds_one(path)))
        elif path.is_file() and (not checkpoints or _may_hold_tensors(path)):
            rows.append(Listed(path, path.name))
    if not checkpoints:
        return [row if row.opens else replace(row, bytes=_size(row.path)) for row in rows]
    end = time.monotonic() + _PATIENCE
    return [described(row) if row.chosen and time.monotonic() < end else row for row in rows]


def described(row: Listed) -> Listed:
    """The row with what the header of its checkpoint states, or with what is wrong with it."""
    try:
        stat = row.path.stat()
    except OSError as e:
        return replace(row, fault=f"it cannot be read: {e.strerror}")
    if row.path.is_dir():  # changes inside do not show in its time
        found = _read(row.path)
    else:
        found = _remembered(row.path, stat.st_size, stat.st_mtime_ns)
    return replace(found, path=row.path, name=row.name, opens=row.opens)


def not_taken(row: Listed, name: str, kinds: tuple[str, ...]) -> str:
    """What is wrong with a file for the parameter `name`, which takes these kinds of checkpoint; "" where nothing is.

    Args:
        kinds: none for any kind.
    """
    if row.fault or not row.kind or not kinds or row.kind in kinds:
        return row.fault
    takes = " or ".join(_IN_WORDS.get(kind, kind) for kind in kinds)
    return f"it is {_IN_WORDS.get(row.kind, row.kind)}, and {name} takes {takes}"


def unlike(row: Listed, others: Iterable[str]) -> str:
    """What tells a model apart from those beside which it is meant to be used; "" where they are alike.

    Args:
        others: paths of other checkpoints; those that are no models, or cannot be read, do not count.
    """
    for path in others if row.layout else ():
        other = described(Listed(Path(path).expanduser(), Path(path).name))
        if other.layout and other.layout != row.layout:
            return f"it is {row.layout}, and {other.name} is {other.layout}"
    return ""


@lru_cache(1000)
def _remembered(path: Path, size: int, changed: int) -> Listed:
    """`_read` of a file of this size that was changed at this time."""
    return _read(path)


def _read(path: Path) -> Listed:
    size = path.stat().st_size if path.is_file() else None
    try:
        with _unlogged(), open_checkpoint(path) as ck:
            fault = ck.reason if ck.kind in _NO_JOB_TAKES else ""
            layout = str(ck.layout or "")
            return Listed(path, path.name, False, True, ck.bytes, ck.kind, _model(ck), fault, _more(ck, fault), layout)
    except RwkvLabError as e:
        return Listed(path, path.name, bytes=size, fault=_sentence(e, path))


def _model(ck: Checkpoint) -> str:
    values = sum(t.numel for t in ck.info.values())
    generation = f"RWKV-{ck.layout.version.removesuffix('.0')} " if ck.layout else ""
    return f"{generation}{_count(values)}"


def _more(ck: Checkpoint, fault: str) -> str:
    dtypes = ", ".join(sorted({t.dtype_name for t in ck.info.values()}))
    reason = "" if fault else ck.reason
    return "; ".join(filter(None, (str(ck.layout or ""), counted(len(ck), "tensor"), dtypes, reason, *ck.notes)))


def _count(values: int) -> str:
    """A number of values in three digits: 191 M."""
    for unit, of in (("", 1), ("k", 1e3), ("M", 1e6)):
        if values < 999.5 * of:
            return f"{values / of:.3g} {unit}".strip()
    return f"{values / 1e9:.3g} G"


def _sentence(error: RwkvLabError, path: Path) -> str:
    """The first line of a refusal, without the path, which a person sees beside it."""
    first = str(error).splitlines()[0]
    first = first.removeprefix(f"{path}:").removeprefix(f"{path} ").strip()
    first = first.replace(f"{path}", path.name)
    return f"it {first}" if first.startswith(("is ", "has ", "holds ", "looks ", "starts ")) else first


def _may_hold_tensors(path: Path) -> bool:
    """By its name, or by its first bytes."""
    if any(path.suffix.lower() in known.suffixes for known in FORMATS.values()):
        return True
    try:
        with open(path, "rb") as file:
            return format_of(file.read(512), path.stat().st_size) is not None
    except OSError:
        return False


def _holds_one(folder: Path) -> bool:
    names = (*INDEXES, *SINGLES, *ADAPTERS, "adapter_config.json")
    try:
        return any((folder / name).is_file() for name in names)
    except OSError:
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def _unlogged() -> Iterator[None]:
    """A file that is only looked at has its notes in its row, not in the log."""
    log = logging.getLogger("rwkv_lab.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def size_in_words(row: Listed) -> str:
    """Its bytes; "" where they are not known."""
    return "" if row.bytes is None else human_bytes(row.bytes)
