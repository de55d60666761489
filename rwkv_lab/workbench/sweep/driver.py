"""A sweep from its spec to its summary."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_lab import machine
from rwkv_lab.arguments import checked
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.paths import to_path
from rwkv_lab.progress import human_bytes
from rwkv_lab.resources import reports_folder
from rwkv_lab.text import counted
from rwkv_lab.workbench.process import is_running, this_process
from rwkv_lab.workbench.result import write_json
from rwkv_lab.workbench.sweep.cluster import run_on_cluster
from rwkv_lab.workbench.sweep.jobs import RUN, read_json, write_job
from rwkv_lab.workbench.sweep.local import run_here
from rwkv_lab.workbench.sweep.progress import SweepProgress
from rwkv_lab.workbench.sweep.runs import SweepRun, finished_before, runs_of, texts_of
from rwkv_lab.workbench.sweep.spec import SweepOptions, SweepSpec, expand, read_sweep
from rwkv_lab.workbench.sweep.summary import write_summary

SWEEP = "sweep.json"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    summary: the page with table and figures; None of a dry run.
    best: the run that is best by the first metric of the spec; None where there is none.
    """

    folder: Path
    runs: list[SweepRun]
    summary: Path | None
    best: SweepRun | None

    @property
    def failed(self) -> list[SweepRun]:
        """Runs that were to be carried out and are not ok."""
        return [run for run in self.runs if run.state not in ("ok", "skipped")]


@checked
def sweep(notebook: str, grid: str | Path | Mapping[str, Any], **options: Any) -> SweepResult:
    """Run a notebook many times, and summarise what came out.

    Runs that an earlier call finished in the same folder, with the same parameters and inputs, are not run again.

    Args:
        notebook: its name, such as "merge".
        grid: what the runs differ in: a YAML file, or its content; see `SweepSpec`.
        options: see `SweepOptions`.
    Raises:
        ParameterError: an unknown name, or values that are refused; nothing has been run then.
        OutputError: the folder is of another sweep, another process is at work in it, or the outputs do not fit.
        DeviceError: there is no scheduler at the address, or it has no workers.
        KeyboardInterrupt, SystemExit: stopped; the same call continues from there.
    """
    spec, option = read_sweep(grid), SweepOptions.read(options)
    folder = _folder(notebook, grid, option)
    print(f"Planning {counted(len(expand(spec)), 'run')} of {notebook}", flush=True)
    runs = runs_of(notebook, spec, folder, Path.cwd())
    seen: dict[str, str] = {}
    for run in runs:
        if run.state == "waiting" and finished_before(run, seen):
            run.state, run.seen_before = "ok", True
            run.seconds, run.memory = 0.0, 0
    _print_plan(runs, folder, option)
    if option.dry_run:
        return SweepResult(folder, runs, None, None)
    _claim(folder, notebook, spec)
    try:
        _run(notebook, runs, folder, option)
    finally:
        summary, best = write_summary(notebook, spec, runs, folder)
        write_json(folder / SWEEP, {"notebook": notebook, "spec": spec.model_dump(), "status": "ended"})
    return SweepResult(folder, runs, summary, best)


def _run(notebook: str, runs: list[SweepRun], folder: Path, option: SweepOptions) -> None:
    """Carry out those that are waiting."""
    progress = SweepProgress(notebook, folder, runs)
    waiting = [run for run in runs if run.state == "waiting"]
    for run in waiting:
        _prepare(run, option)
    progress.write(ended=False)
    try:
        if waiting and option.scheduler:
            run_on_cluster(waiting, option.scheduler, option.retries, progress.changed)
        elif waiting:
            memory = option.memory or machine.memory_free()
            run_here(waiting, _processes(option), memory, option.retries, progress.changed)
    finally:
        progress.write(ended=True)


def _prepare(run: SweepRun, option: SweepOptions) -> None:
    """Make the run's folder anew: what an attempt that was killed left there is of no use."""
    threads = option.threads or (0 if option.scheduler else max(1, machine.cores() // _processes(option)))
    run.job = replace(run.job, threads=threads, keep_outputs=option.keep_outputs)
    if (run.folder / RUN).is_file():
        shutil.rmtree(run.folder)
    write_job(run.job)
    told = read_json(run.folder / RUN) | {"texts": texts_of(run.job.parameters)}
    write_json(run.folder / RUN, told)


def _processes(option: SweepOptions) -> int:
    return option.processes or max(1, machine.cores() // 2)


def _folder(notebook: str, grid: str | Path | Mapping[str, Any], option: SweepOptions) -> Path:
    if option.folder:
        return to_path(option.folder, "folder").absolute()
    name = notebook if isinstance(grid, Mapping) else f"{notebook}-{Path(grid).stem}"
    return (reports_folder() / "sweeps" / name).absolute()


def _claim(folder: Path, notebook: str, spec: SweepSpec) -> None:
    """Make the folder this sweep's.

    Raises:
        OutputError: it is of something else, or another process is at work in it.
    """
    earlier = read_json(folder / SWEEP)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not earlier):
        raise OutputError(f"{folder} is there and holds no sweep. Name another folder.")
    if earlier and earlier.get("notebook") != notebook:
        raise OutputError(f"{folder} is of a sweep of {earlier.get('notebook')}. Name another folder.")
    if earlier.get("status") == "running" and is_running(earlier) and this_process().items() - earlier.items():
        raise OutputError(f"process {earlier.get('pid')} is at work on the sweep in {folder}. Stop it, or wait.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the folder {folder} cannot be made: {e}") from e
    content = {"notebook": notebook, "spec": spec.model_dump(), "status": "running"}
    write_json(folder / SWEEP, content | this_process())


def _print_plan(runs: Sequence[SweepRun], folder: Path, option: SweepOptions) -> None:
    """Say what will be run and what it takes.

    Raises:
        OutputError: the outputs do not fit on the disk.
        ParameterError: nothing is left to run that is not refused.
    """
    count = Counter(run.state for run in runs)
    if count["skipped"] == len(runs):
        raise ParameterError(
            f"the notebook refuses every run, {counted(len(runs), 'run')} in all; the first: {runs[0].error}"
        )
    waiting = [run for run in runs if run.state == "waiting"]
    already = sum(run.seen_before for run in runs)
    also = [f"{already} are finished already"] if already else []
    also += [f"{count['skipped']} are refused and left out"] if count["skipped"] else []
    said = "; ".join([counted(len(runs), "run"), ", ".join(also)]) if also else counted(len(runs), "run")
    print(f"{said}. Folder: {folder}", flush=True)
    if not waiting:
        return
    most = max(run.memory for run in waiting)
    if not option.scheduler:
        free = option.memory or machine.memory_free()
        at_once = min(_processes(option), max(1, int(free // most)), len(waiting))
        print(f"{at_once} at the same time; a run takes up to {human_bytes(most)} of {human_bytes(free)} memory.")
    size = sum(run.output_bytes for run in waiting) if option.keep_outputs else max(r.output_bytes for r in waiting)
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = machine.disk_free(there)
    if size > free:
        advice = "" if not option.keep_outputs else " Pass keep_outputs=False to keep the reports alone."
        raise OutputError(f"the outputs take {human_bytes(size)}; {human_bytes(free)} are free in {there}.{advice}")
    if size:
        print(f"The outputs take {human_bytes(size)} of {human_bytes(free)} on that disk.", flush=True)
