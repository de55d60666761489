"""One run of a sweep: a process of its own, which executes the notebook as papermill does, in a folder of its own.

A job is carried out by a thread here, or by a worker of a cluster. It needs the folder and the inputs under
the same paths everywhere, which is looked at first.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rwkv_lab.version import __version__

RUN = "run.json"  # what a run is to do, in its folder
LOG = "log.txt"
RESULT = "result.json"
_LOOK_EVERY = 0.2  # seconds
_GRACE = 15  # seconds for a run that is stopped to end by itself
# Said on the strength of the inputs: a further attempt would end the same way.
_REFUSALS = ("ParameterError", "LayoutError", "CorruptFileError", "UnsafeFileError", "NumericsError", "OutputError")


@dataclass(frozen=True)
class Job:
    """What a run needs.

    parameters: for papermill, with `report`.
    sizes: bytes of the inputs, by path.
    threads: of the run; 0: those of the machine shared out among a worker's tasks.
    memory: bytes that it is expected to take.
    """

    name: str
    notebook: str  # path of the .ipynb; of the package where it is a name alone
    folder: str
    cwd: str
    parameters: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    memory: int = 0
    keep_outputs: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    status: "ok", "failed" or "stopped".
    retry: whether a further attempt may end otherwise.
    memory: bytes that its processes took at most; 0 where that was not measured.
    """

    status: str
    error: str = ""
    retry: bool = False
    memory: int = 0
    host: str = ""


def write_job(job: Job) -> None:
    """Write `run.json` into the job's folder, which is made."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"notebook": job.notebook, "parameters": job.parameters, "version": __version__, "cwd": job.cwd}
    (folder / RUN).write_text(json.dumps(content, indent=1, ensure_ascii=False))


def carry_out(job: Job, stop: threading.Event | None = None) -> Outcome:
    """Run a job to its end.

    Args:
        stop: the run is stopped by SIGTERM when this is set.
    """
    fault = _not_here(job)
    if fault:
        return Outcome("failed", fault, host=platform.node())
    folder = Path(job.folder)
    (folder / RESULT).unlink(missing_ok=True)  # of an earlier attempt
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_lab.workbench.sweep.process", job.folder],
            stdin=subprocess.PIPE,  # the run ends when this process does: nothing holds the other end any more
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=job.cwd,
            env=_environment(job),
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone
        )
        try:
            peak = _watch(process, stop)
        finally:
            _end(process)
    if not job.keep_outputs:
        _remove_outputs(folder)
    stopped = stop is not None and stop.is_set()
    return _outcome(folder, process.returncode, peak, stopped)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_here(job: Job) -> str:
    """Why this machine cannot carry the job out; "" where it can."""
    here = platform.node()
    told = read_json(Path(job.folder) / RUN)
    if told.get("parameters") != job.parameters:
        return f"OutputError: {here} does not see {job.folder}: workers need the sweep's folder under the same path."
    if told.get("version") != __version__:
        return f"ParameterError: {here} has rwkv_lab {__version__}, the sweep {told.get('version')}: install the same."
    for path, size in job.sizes.items():
        there = size_of(path)
        if there != size:
            found = "does not see" if there is None else f"has {there:,} bytes, not {size:,}, of"
            return f"ParameterError: {here} {found} {path}: workers need the inputs under the same paths."
    return ""


def size_of(path: str) -> int | None:
    """Bytes of a file, or of the files in a folder; None where there is neither."""
    at = Path(path)
    if at.is_file():
        return at.stat().st_size
    return sum(one.stat().st_size for one in at.iterdir() if one.is_file()) if at.is_dir() else None


def _environment(job: Job) -> dict[str, str]:
    threads = job.threads or max(1, (os.cpu_count() or 1) // _tasks_at_once())
    package = str(Path(__file__).parents[3])
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([package, before] if before else [package])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def _tasks_at_once() -> int:
    """How many tasks this worker of a cluster carries out at the same time; 1 where it is none."""
    try:
        from distributed import get_worker

        return max(1, get_worker().state.nthreads)
    except (ImportError, ValueError):
        return 1


def _watch(process: subprocess.Popen, stop: threading.Event | None) -> int:
    """Wait for the end; the bytes of memory that the processes of the run took at most."""
    peak, asked = 0, 0.0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        if stop is not None and stop.is_set():
            asked = asked or _ask_to_end(process)
            if time.monotonic() - asked > _GRACE:
                break
        time.sleep(_LOOK_EVERY)
    return peak


def _memory(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        together = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for one in together:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def _ask_to_end(process: subprocess.Popen) -> float:
    process.terminate()  # no SIGINT: what a shell starts in the background ignores it, and so do its children
    return time.monotonic()


def _end(process: subprocess.Popen) -> None:
    """See to it that nothing of the run is left."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    if process.poll() is None:
        process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _remove_outputs(folder: Path) -> None:
    """Delete the checkpoints that the run wrote into its folder; `result.json` keeps their fingerprints."""
    for one in read_json(folder / RESULT).get("outputs", []):
        path = Path(one["path"])
        if path.parent == folder and path.is_file():
            path.unlink()


def _outcome(folder: Path, code: int, peak: int, stopped: bool) -> Outcome:
    result, here = read_json(folder / RESULT), platform.node()
    status, error = result.get("status"), result.get("error") or {}
    if code == 0 and status == "ok":
        return Outcome("ok", memory=peak, host=here)
    if stopped:
        return Outcome("stopped", memory=peak, host=here)
    if status == "failed":
        said = f"{error.get('class')}: {error.get('message')}"
        return Outcome("failed", said, error.get("class") not in _REFUSALS, peak, here)
    cause = f"signal {-code}" if code < 0 else f"code {code}"
    return Outcome("failed", f"its process ended with {cause}: {_last_line(folder / LOG)}", True, peak, here)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def record_of(folder: Path) -> Mapping[str, Any]:
    """What `run.json` says; empty where there is none."""
    return read_json(folder / RUN)
