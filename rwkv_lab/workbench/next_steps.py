"""What a person may do with the output of a run: the notebooks that take it, with the parameters to give them."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.workbench.parameters import FINE_TUNE
from rwkv_lab.workbench.registry import notebook_names, parameters_of
from rwkv_lab.workbench.result import Record


@dataclass(frozen=True)
class Use:
    """A notebook that takes what a run wrote.

    parameters: name -> path, absolute, or the word of a demo file.
    """

    notebook: str
    purpose: str
    parameters: dict[str, str]


def uses(record: Record) -> list[Use]:
    """Every notebook that takes what a run wrote; none after a run that failed."""
    if record.status != "ok":
        return []
    return [use for facts in record.outputs[:1] for use in _of_output(facts.path, record)]


def next_steps(record: Record) -> list[tuple[str, str]]:
    """(what for, command) of every notebook that takes what a run wrote; none after a run that failed.

    The commands are for the folder of the report; what they write goes beside it, so that one list has all runs.
    """
    steps = []
    for use in uses(record):
        given = {n: v if v.startswith("demo:") else _seen_from(Path(v), record) for n, v in use.parameters.items()}
        if record.folder.name != use.notebook:
            given["report"] = f"../{use.notebook}"
        words = shlex.join(f"{name}={value}" for name, value in given.items())
        steps.append((use.purpose, f"rwkv-lab run {use.notebook} {words}"))
    return steps


def _of_output(out: Path, record: Record) -> Iterator[Use]:
    try:
        with open_checkpoint(out) as ck:
            kinds = [ck.kind]
    except (OSError, RwkvLabError):
        return  # a folder for another program
    if record.notebook == "train" and record.parameters.get("kind") == "full":
        kinds.insert(0, FINE_TUNE)
    for notebook in notebook_names():
        model = parameters_of(notebook)
        kind = next((kind for kind in kinds if kind in model.takes_kinds), None)
        if notebook == record.notebook or kind is None:
            continue
        given = {model.parameter_for(kind): str(record.cwd / out)}
        base = record.parameters.get("base")
        if kind != "model" and model.takes_base in model.model_fields and isinstance(base, str) and base:
            given[model.takes_base] = base if base.startswith("demo:") else str(record.cwd / base)
        yield Use(notebook, model.purpose, given)


def _seen_from(path: Path, record: Record) -> str:
    """A path from the folder of the report, which may be passed on: it names no folder above that of the run. A file
    from elsewhere has to be looked for; only its name is told."""
    path = path.absolute()
    both_below = all(one.is_relative_to(record.cwd) for one in (path, record.folder))
    if both_below or path.is_relative_to(record.folder):
        return Path(os.path.relpath(path, record.folder)).as_posix()
    return f"PATH/{path.name}"
