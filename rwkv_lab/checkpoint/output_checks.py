"""Where an output may go, and whether it fits: checked before a byte of tensor data is read."""

import os
from collections.abc import Sequence
from pathlib import Path

from rwkv_lab.checkpoint.atomic import check_target, refuse_inputs
from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.machine import disk_free, memory_free
from rwkv_lab.progress import human_bytes

NAME_MAX = 255  # bytes of a file name, on every common file system
PATH_MAX = 4095  # bytes of a path, on Linux


def check_output(out: Path, inputs: Sequence[Checkpoint], allowed_dir: Path | None, overwrite: bool) -> None:
    """Refuse an output outside `allowed_dir`, onto an input by any alias, or onto what exists.

    Args:
        inputs: open.
    Raises:
        OutputError: states which rule.
        ParameterError: `allowed_dir` is not a folder, or the name has characters that cannot be printed.
    """
    check_name(out)
    if allowed_dir is not None:
        if not os.path.isdir(allowed_dir):
            raise ParameterError(f"allowed_dir={str(allowed_dir)!r} is not a folder")
        if not out.resolve().is_relative_to(allowed_dir.resolve()):
            raise OutputError(f"{out} is outside {allowed_dir}, the only folder that allowed_dir lets outputs go to")
    refuse_inputs(out, [(file.path, os.fstat(file.fd)) for ck in inputs for file in ck.files])
    check_target(out, overwrite)


def check_name(out: Path) -> None:
    """Refuse a path that no file can have.

    Raises:
        OutputError: it is too long, or leads through links in a circle.
        ParameterError: the name has characters that cannot be printed.
    """
    if not out.name.isprintable():
        raise ParameterError(f"out={str(out)!r}: a name of printable characters is needed")
    for name in reversed(out.parts):
        if len(os.fsencode(name)) > NAME_MAX:
            raise OutputError(f"the name {name[:60]}… has {len(os.fsencode(name))} bytes; {NAME_MAX} are the limit")
    if len(os.fsencode(out)) > PATH_MAX:
        raise OutputError(f"the path {str(out)[:60]}… has {len(os.fsencode(out))} bytes; {PATH_MAX} are the limit")
    try:
        out.resolve()
    except (OSError, RuntimeError) as e:
        raise OutputError(f"{out} leads through links in a circle. Name another output.") from e


def check_free_space(out: Path, output_bytes: int, memory_needed: int, job: str) -> tuple[int, int]:
    """Refuse what will not fit.

    Args:
        job: who needs it, for the message: "the merge".
    Returns:
        Bytes that are free: on the disk of `out`, and of memory.
    Raises:
        OutputError: states how much is needed and there.
    """
    disk, memory = disk_free(out.parent), memory_free()
    if output_bytes > disk:
        raise OutputError(f"{out} needs {human_bytes(output_bytes)}, {human_bytes(disk)} are free on that disk")
    if memory_needed > memory:
        raise OutputError(f"{job} needs {human_bytes(memory_needed)} of memory, {human_bytes(memory)} are free")
    return disk, memory
