"""Where an output may go, and whether there is room for it: checked before a byte of tensor data is read."""

import os
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.atomic import check_target, refuse_inputs
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.paths import to_path
from rwkv_lab.progress import human_bytes

NAME_MAX = 255  # bytes of a file name, on every common file system


def check_output(out: Path, inputs: list[Checkpoint], allowed_dir: str | Path | None, overwrite: bool) -> None:
    """Refuse an output outside `allowed_dir`, onto an input by any alias, or onto an existing file.

    Raises:
        OutputError: says which rule.
        ParameterError: `allowed_dir` is not a folder, or the name has characters that cannot be printed.
    """
    if allowed_dir is not None:
        allowed = to_path(allowed_dir, "allowed_dir")
        if not allowed.is_dir():
            raise ParameterError(f"allowed_dir={str(allowed_dir)!r} is not a folder")
        if not out.resolve().is_relative_to(allowed.resolve()):
            raise OutputError(f"{out} is outside {allowed}, the only folder that allowed_dir lets outputs go to")
    if not out.name.isprintable():
        raise ParameterError(f"out={str(out)!r}: a name of printable characters is needed")
    if len(os.fsencode(out.name)) > NAME_MAX:
        raise OutputError(f"the name {out.name[:60]}… has {len(os.fsencode(out.name))} bytes; {NAME_MAX} are the limit")
    if out.is_dir():
        raise OutputError(f"{out} is a folder; name a file in it, such as {out / 'merged.pth'}")
    refuse_inputs(out, [(file.path, os.fstat(file.fd)) for ck in inputs for file in ck.files])
    check_target(out, overwrite)


def check_room(out: Path, output_bytes: int, free: int, memory_needed: int, memory: int) -> None:
    """Refuse what will not fit.

    Raises:
        OutputError: says how much is needed and there.
    """
    if output_bytes > free:
        raise OutputError(f"{out} needs {human_bytes(output_bytes)}, {human_bytes(free)} are free on that disk")
    if memory_needed > memory:
        raise OutputError(f"the merge needs {human_bytes(memory_needed)} of memory, {human_bytes(memory)} are free")
