"""Where the output of a merge may go: a file, and its provenance beside it."""

import os
from collections.abc import Sequence
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.output_checks import check_output
from rwkv_lab.checkpoint.provenance import provenance_path
from rwkv_lab.errors import OutputError


def check_merge_output(out: Path, inputs: Sequence[Checkpoint], allowed_dir: Path | None, overwrite: bool) -> None:
    """Refuse an output, or the provenance beside it, that `check_output` refuses; and a folder.

    Raises:
        OutputError, ParameterError: as `check_output`.
    """
    for path in (out, provenance_path(out)):
        if os.path.isdir(path):  # False of a name that the system refuses, which `check_output` says
            raise OutputError(f"{path} is a folder; name a file in it, such as {path / 'merged.pth'}")
        check_output(path, inputs, allowed_dir, overwrite)
