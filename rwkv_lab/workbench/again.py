"""The command that repeats a run, from its parameters."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.resources import notebooks_folder
from rwkv_lab.workbench.registry import notebook_names, parameters_of
from rwkv_lab.workbench.result import KEPT, RESULT, read_result

BATCH = ("-m", "rwkv_lab.workbench.batch")


def command(notebook: str, parameters: Mapping[str, Any], folder: Path, cwd: Path, replaces: bool) -> str:
    """The shell command that repeats a run from any folder; its arguments are papermill's.

    Args:
        folder: of the report.
        cwd: the folder that relative paths are seen from.
        replaces: whether the run wrote the output that the parameters name, so that repeating it replaces the file.
    """
    return shlex.join([sys.executable, *BATCH, *_arguments(notebook, parameters, folder, cwd, replaces)])


def recorded_arguments(folder: Path) -> list[str]:
    """papermill's arguments that repeat the run whose report lies in a folder.

    Raises:
        ParameterError: there is no such run, or its parameters had been refused.
    """
    result = read_result(folder / KEPT) or read_result(folder / RESULT)
    if result is None:
        raise ParameterError(f"{folder.absolute()} holds no {RESULT}: name the folder that a report lies in.")
    notebook, given = result.get("notebook"), result.get("parameters")
    if notebook not in notebook_names() or not isinstance(given, dict):
        raise ParameterError(f"{folder / RESULT} is of no notebook that is here: {notebook!r}.")
    parameters = {name: value for name, value in given.items() if name in parameters_of(notebook).model_fields}
    written = {f["path"]: f["bytes"] for f in result.get("outputs", [])}
    out = Path(parameters.get("out") or "")
    replaces = str(out) in written and _size(out) == written[str(out)]
    return _arguments(notebook, parameters, folder.absolute(), Path(result.get("cwd") or Path.cwd()), replaces)


def _size(out: Path) -> int | None:
    """Bytes of the checkpoint there, as results record them; None where there is none."""
    try:
        if out.is_file():
            return out.stat().st_size
        with open_checkpoint(out) as ck:
            return ck.bytes
    except (OSError, RwkvLabError):
        return None


def _arguments(notebook: str, parameters: Mapping[str, Any], folder: Path, cwd: Path, replaces: bool) -> list[str]:
    words = [str(notebooks_folder() / f"{notebook}.ipynb"), str(folder / "run.ipynb"), "--cwd", str(cwd)]
    given = dict(parameters) | {"report": str(folder)} | ({"overwrite": True} if replaces else {})
    fields = parameters_of(notebook).model_fields
    for name, value in given.items():
        if value == fields[name].default:
            continue
        if isinstance(value, str):
            words += ["-r", name, value]  # -p would turn a name like 12e4 into a number
        elif isinstance(value, (list, dict)):
            words += ["-y", json.dumps({name: value}, ensure_ascii=False)]
        else:
            words += ["-p", name, str(value)]
    return words
