"""Whether files are still those that a plan was made from."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint.open import Checkpoint, open_checkpoint
from rwkv_lab.errors import ParameterError


@dataclass(frozen=True)
class FileState:
    """What the file system records of a file: any write changes it."""

    path: Path
    bytes: int
    modified: int  # nanoseconds since 1970


def file_states(ck: Checkpoint) -> tuple[FileState, ...]:
    """Of the open files of a checkpoint, as they are now."""
    stats = [(file.path, os.fstat(file.fd)) for file in ck.files]
    return tuple(FileState(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def refuse_changed(states: Iterable[FileState]) -> None:
    """Refuse to go by a plan whose input has changed since.

    Raises:
        ParameterError: names the file.
    """
    for then in states:
        try:
            stat = os.stat(then.path)
        except OSError as e:
            raise ParameterError(f"{then.path} was there when the plan was made; now: {e.strerror or e}.") from e
        if (stat.st_size, stat.st_mtime_ns) != (then.bytes, then.modified):
            raise ParameterError(
                f"{then.path} has changed since the plan was made ({then.bytes:,} bytes then, {stat.st_size:,} now).\n"
                "Make the plan again."
            )


def refuse_changed_header(ck: Checkpoint) -> None:
    """Refuse a checkpoint whose files now have another header than when `ck` was opened. Reads it again.

    Raises:
        ParameterError: names the file.
        CorruptFileError, UnsafeFileError, LayoutError: as `open_checkpoint`.
    """
    with open_checkpoint(ck.path) as now:
        if _header(now) != _header(ck):
            raise ParameterError(
                f"{ck.path} has another header than when the plan was made, with the same size and time of change.\n"
                "Make the plan again."
            )


def _header(ck: Checkpoint) -> tuple[object, ...]:
    tensors = [(t.name, t.shape, t.dtype, t.file.path, t.offset, t.stride, t.crc32) for t in ck.stored.values()]
    return tensors, ck.metadata, ck.adapter_config
