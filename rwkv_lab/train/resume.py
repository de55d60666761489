"""The checkpoint of an unfinished training, from which it goes on as if it had never stopped, bit for bit.

One `.safetensors` beside the output: what is trained, the optimiser's moments, the best values so far, the position in
the data, and the rest as JSON in its header. Frozen weights are not in it; they come from the base again. It appears
whole or not at all, and goes when the output is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.text import counted
from rwkv_lab.train.processes import Processes, put

_NOTE = "rwkv_lab.train.resume"
_MOMENTS = {"trained": ("",), "best": ("",), "optimiser": ("step", "exp_avg", "exp_avg_sq")}


@dataclass
class Course:
    """How far a training has come, in numbers that JSON holds exactly."""

    step: int = 0  # steps done
    before: int = 0  # of these, steps of a finished training that this one continues
    losses: list[float] = field(default_factory=list)  # bits per token of each step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, bits per byte)
    best: float | None = None  # of the bits per byte
    worse_since: int = 0  # measurements since the best
    log: list[dict] = field(default_factory=list)  # rows of the log
    scaler: dict = field(default_factory=dict)  # of float16 gradients
    bits_before: float | None = None  # of held-out text, before the first step
    samples_before: list[tuple[str, str]] = field(default_factory=list)  # (prompt, continuation)


@checked
def resume_path(out: Path) -> Path:
    """Where the checkpoint of an unfinished training towards `out` is kept."""
    return out.with_name(f"{out.name}.resume.safetensors")


def save_course(
    path: Path,
    course: Course,
    settings: Mapping[str, object],
    trained: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
    best: Mapping[str, torch.Tensor],
    position: Mapping[str, torch.Tensor],
    processes: Processes,
) -> None:
    """Write the checkpoint, in place of an older one. Every process has to call it; the first one writes.

    Raises:
        OutputError: it cannot be written; the older one is as it was then.
    """
    tensors = processes.whole((f"trained/{name}", p) for name, p in trained.items())
    for name, p in trained.items():
        moments = processes.whole((f"{key}/{name}", value) for key, value in optimiser.state.get(p, {}).items())
        tensors |= {f"optimiser/{key}": value for key, value in moments.items()}
    tensors |= processes.whole((f"best/{name}", value) for name, value in best.items())
    tensors |= {f"data/{name}": value for name, value in position.items()}
    if processes.first:
        # The names tell later whether any got lost: AdamW has no moments yet where float16's scaler left steps out.
        note = json.dumps({"settings": settings, "course": vars(course), "tensors": sorted(tensors)})
        write_checkpoint(path, tensors, metadata={_NOTE: note}, overwrite=True)


def settings_of_course(path: Path) -> dict[str, object]:
    """The settings in a checkpoint of an unfinished training.

    Raises:
        CorruptFileError, UnsafeFileError: no such checkpoint, or a broken one.
    """
    with open_checkpoint(path) as ck:
        return _note(ck)[0]


def _note(ck: Checkpoint) -> tuple[dict[str, object], dict[str, object], object]:
    """(settings, course, names of tensors) as they were written."""
    try:
        note = json.loads(ck.metadata[_NOTE])
        return dict(note["settings"]), dict(note["course"]), note["tensors"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise CorruptFileError(f"{ck.path} is no checkpoint of an unfinished training; remove it.") from None


def load_course(
    path: Path,
    settings: Mapping[str, object],
    trained: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[Course, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Put back what `save_course` wrote: into parameters and optimiser; the course, best values and data's position are
    returned.

    Raises:
        ParameterError: it is of a training with other settings; names them.
        CorruptFileError: no such checkpoint, or a broken one.
    """
    with open_checkpoint(path) as ck:
        then, written, names = _note(ck)
        try:
            course = Course(**written)  # pyright: ignore[reportArgumentType]  # checked below
        except TypeError:
            raise CorruptFileError(f"{path} is no checkpoint of an unfinished training; remove it.") from None
        _refuse_other(path, then, json.loads(json.dumps(settings)))
        fault = _fault_of_course(course, written, then) or _fault_of_tensors(ck, names, trained)
        if fault:
            raise CorruptFileError(f"{path} is damaged: {fault}. Remove it to begin anew.")
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name in ck:
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = ck[name]
    found = parts["trained"]
    for name, p in trained.items():
        put(p, found[name])
    for entry, values in parts.get("optimiser", {}).items():
        key, _, name = entry.partition("/")
        if key == "step":
            optimiser.state[trained[name]][key] = values.to(_step_device(optimiser, trained[name]))
        else:
            moment = torch.zeros_like(trained[name])
            put(moment, values)
            optimiser.state[trained[name]][key] = moment
    course.held_out = [(step, bits) for step, bits in course.held_out]
    return course, parts.get("best", {}), parts.get("data", {})


def _fault_of_course(course: Course, written: Mapping, settings: Mapping) -> str:
    """What is wrong with the numbers; "" if nothing is."""
    lost = sorted(set(vars(course)) - {"before"} - set(written))
    if lost:
        return f"it lacks {lost[0]}"
    steps = settings.get("steps")
    if not _is_count(course.step) or not _is_count(steps) or not 1 <= course.step <= steps:
        return f"it counts {course.step!r} of {steps!r} steps as done"
    lists = {"losses": _is_number, "held_out": _is_measured, "log": lambda row: isinstance(row, dict)}
    lists["samples_before"] = lambda pair: _is_pair(pair) and all(isinstance(text, str) for text in pair)
    for name, right in lists.items():
        entries = getattr(course, name)
        if not isinstance(entries, list) or not all(map(right, entries)):
            return f"its {name} cannot be understood"
    if not _is_count(course.before) or course.before != settings.get("continued", 0):
        return f"it continues {course.before!r} steps"
    if not len(course.losses) == len(course.log) == course.step - course.before:
        rows = f"{len(course.losses)} losses and {counted(len(course.log), 'row')} of the log"
        return f"it has {rows} for {counted(course.step - course.before, 'step')}"
    best_fits = _is_number(course.best) if course.held_out else course.best is None
    if not (best_fits and _is_number(course.bits_before) and _is_count(course.worse_since)):
        return "its measurements cannot be understood"
    return "" if isinstance(course.scaler, dict) else "its scaler cannot be understood"


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: object) -> TypeGuard[list]:
    return isinstance(value, list) and len(value) == 2


def _is_measured(value: object) -> bool:
    return _is_pair(value) and _is_count(value[0]) and _is_number(value[1])


def _fault_of_tensors(ck: Checkpoint, names: object, trained: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with the tensors, by their names and shapes; "" if nothing is."""
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(ck.info):
        odd = sorted(set(map(str, names if isinstance(names, list) else ())) ^ set(ck.info))
        return f"{odd[0] if odd else 'something'} was added or lost"
    for name, info in ck.info.items():
        part, _, rest = name.partition("/")
        key, rest = rest.partition("/")[::2] if part == "optimiser" else ("", rest)
        if part == "data":
            continue  # checked by what resumes from it
        if part not in ("trained", "best", "optimiser") or rest not in trained or key not in _MOMENTS[part]:
            return f"{name} is not known"
        wanted = () if key == "step" else tuple(trained[rest].shape)
        if tuple(info.shape) != wanted:
            return f"{name} is {list(info.shape)}, not {list(wanted)}"
    lost = next((name for name in trained if f"trained/{name}" not in ck.info), None)
    return f"{lost} is not in it" if lost else ""


def _step_device(optimiser: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    """Where AdamW keeps its count of steps: beside the parameter if it is fused."""
    return parameter.device if optimiser.defaults["fused"] else torch.device("cpu")


def other_settings(then: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What differs between the settings of two trainings, three of them at most; "" if nothing does."""
    other = [name for name in now if then.get(name) != now[name]]
    return ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in other[:3])


def _refuse_other(path: Path, then: dict, now: dict) -> None:
    if other := other_settings(then, now):
        raise ParameterError(
            f"{path.name} is of a training with other settings: {other}.\n"
            "Pass the same as then, or remove that file to begin anew."
        )
