"""The runs of a sweep: their folders, what they need by their plans, and which are finished already."""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rwkv_lab.checkpoint import file_facts, open_checkpoint
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.paths import missing_file
from rwkv_lab.resources import notebooks_folder
from rwkv_lab.suggestions import unknown_name
from rwkv_lab.workbench.parameters import DEMO, Files, Parameters, input_path
from rwkv_lab.workbench.registry import cells_of, parameters_of
from rwkv_lab.workbench.sweep.jobs import RESULT, Job, read_json, record_of, size_of
from rwkv_lab.workbench.sweep.spec import SweepSpec, expand, shown

_PROCESS = 700_000_000  # bytes that papermill, a kernel and torch take before they have done anything
_OWN = ("report", "out", "dry_run")  # each run has its own folder, and does what it is for


@dataclass
class SweepRun:
    """One run, and what is known of it.

    swept: the parameters in which it may differ from others.
    state: "waiting", "running", "ok", "failed", "stopped" or "skipped".
    memory: bytes: expected by the plan, later measured.
    """

    job: Job
    swept: dict[str, Any]
    state: str = "waiting"
    error: str = ""
    attempts: int = 0
    memory: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    host: str = ""
    seen_before: bool = False  # finished by an earlier call
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.job.folder)


def runs_of(notebook: str, spec: SweepSpec, folder: Path, cwd: Path) -> list[SweepRun]:
    """The runs that a sweep has, validated and planned from headers alone; nothing is run or written.

    Raises:
        ParameterError: an unknown name, or values that the notebook does not take; names the run.
        RwkvLabError: what the plan of a run refuses, unless the spec leaves such runs out.
    """
    model = parameters_of(notebook)
    for name in {**spec.fixed, **{name: 0 for one in expand(spec) for name in one}}:
        if name in _OWN:
            raise ParameterError(
                f"{name} cannot be set in a sweep: every run has a folder of its own, and is carried out."
            )
        if name not in model.model_fields:
            raise unknown_name(notebook, name, model.model_fields)
    found, planned = [], _Plans(notebook)
    for swept in expand(spec):
        own = folder / "runs" / _name(swept)
        run = SweepRun(Job(own.name, notebook, str(own), str(cwd), {}), swept)
        try:
            _plan(run, model, spec.fixed | swept, planned)
        except RwkvLabError as e:
            if not spec.skip_refused:
                raise type(e)(f"the run with {shown(swept)} is refused: {e}") from e
            run.state, run.error = "skipped", f"{type(e).__name__}: {e}"
        found.append(run)
    return found


def finished_before(run: SweepRun, seen: dict[str, str]) -> bool:
    """Whether an earlier call finished this run: the same parameters, and inputs that have not changed since.

    Args:
        seen: fingerprints by path; filled in here, so that an input is opened once.
    """
    result, told = read_json(run.folder / RESULT), record_of(run.folder)
    if result.get("status") != "ok" or told.get("parameters") != run.job.parameters:
        return False
    if told.get("texts") != texts_of(run.job.parameters):
        return False
    for one in result.get("inputs", []):
        path = one["path"]
        seen.setdefault(path, _fingerprint(path))
        if seen[path] != one["fingerprint"] and not (seen[path] == "" and size_of(path) == one["bytes"]):
            return False
    run.result = result
    return True


def texts_of(parameters: Mapping[str, Any]) -> dict[str, list[int]]:
    """Size and time of change of the files among parameters, by path: of texts, which have no fingerprint."""
    words = [v for value in parameters.values() for v in (value if isinstance(value, list) else [value])]
    paths = {word: Path(word) for word in words if isinstance(word, str) and 0 < len(word) < 4096 and "\0" not in word}
    found = {word: path.stat() for word, path in paths.items() if path.is_file()}
    return {word: [stat.st_size, stat.st_mtime_ns] for word, stat in found.items()}


@dataclass
class _Plans:
    """Plans of one notebook's runs. Runs that differ in fractions and patterns alone, as most of a sweep do, take the
    same memory and disk: one plan serves them all."""

    notebook: str
    values: dict[str, int] = field(default_factory=dict)  # bytes of a model in float32, by path; 0: no checkpoint
    made: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: Parameters, folder: Path) -> Any:
        """What the notebook's plan says, from headers; None where it has none."""
        weighty = {n: v for n, v in config.model_dump().items() if isinstance(v, str | int)} | {"": _paths_of(config)}
        key = json.dumps(weighty, sort_keys=True)
        if key not in self.made:
            self.made[key] = self._plan(config, folder)
        return self.made[key]

    def _plan(self, config: Parameters, folder: Path) -> Any:
        preview = getattr(cells_of(self.notebook), "preview", None)
        if preview is None:
            return None
        there = next(parent for parent in folder.parents if parent.is_dir())  # plans want a folder that is there
        path = lambda name: there / f"{folder.name}-{name}"  # noqa: E731
        run = SimpleNamespace(config=config, folder=folder, output_path=path, may_overwrite=lambda: True)
        with redirect_stdout(io.StringIO()):  # what it would show in the notebook
            return preview(run)

    def in_float32(self, path: str) -> int:
        """Bytes of a checkpoint as a model in float32, as notebooks run it; 0 where there is no checkpoint."""
        if path not in self.values:
            try:
                with open_checkpoint(path) as ck:
                    self.values[path] = 4 * sum(t.numel for t in ck.info.values())
            except (RwkvLabError, OSError):
                self.values[path] = 0
        return self.values[path]


def _plan(run: SweepRun, model: type[Parameters], values: dict[str, Any], plans: _Plans) -> None:
    """Give the run its parameters, its inputs, and what it needs."""
    config = model.read(values)
    config.check_files()
    for name, mark_of in model.model_fields.items():  # inputs of notebooks that look at them no sooner than in a run
        value = getattr(config, name)
        if any(isinstance(mark, Files) for mark in mark_of.metadata):
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and Path(path).is_absolute() and not Path(path).exists():  # else a name
                    raise missing_file(Path(path))
    planned = plans.plan(config, run.folder)
    inputs = [path for path in _paths_of(config) if plans.in_float32(path)]
    memory = getattr(planned, "memory_needed", None) or getattr(planned, "memory_bytes", 0)
    largest = max(map(plans.in_float32, inputs), default=0)
    run.memory = _PROCESS + max(memory, 2 * largest)  # a model, and what it computes with
    run.output_bytes = getattr(planned, "output_bytes", 0)
    given = {name: value for name, value in config.given().items() if name not in _OWN}
    # Demo files by their paths, so that no run trains one.
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    given |= {name: str(input_path(v)) for name, v in fields.items() if isinstance(v, str) and v in DEMO}
    sizes = {path: size for path in inputs if (size := size_of(path)) is not None}
    notebook = str(notebooks_folder() / f"{run.job.notebook}.ipynb")
    parameters = given | {"report": run.job.folder}
    run.job = replace(run.job, notebook=notebook, parameters=parameters, sizes=sizes, memory=run.memory)


def _paths_of(config: Parameters) -> list[str]:
    """The absolute paths among the parameters; demo files are made now."""
    found = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and (word in DEMO or Path(word).is_absolute()):
                found.append(str(input_path(word)))
    return found


def _fingerprint(path: str) -> str:
    """Of a checkpoint; "" for what is none."""
    try:
        with open_checkpoint(path) as ck:
            return file_facts(ck).fingerprint
    except (RwkvLabError, OSError):
        return ""


def _name(swept: Mapping[str, Any]) -> str:
    """A folder's name that is the same for the same parameters, and tells a person which they are."""
    code = hashlib.sha256(json.dumps(swept, sort_keys=True, default=str).encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.=-]+", "_", shown(swept).replace(", ", " "))[:60].strip("_.")
    return f"{readable}-{code}"
