"""What an export is doing, and what it takes: its stages, time, memory and disk over time, and its log file."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO

from rwkv_lab.arguments import checked
from rwkv_lab.machine import anonymous_memory, disk_free
from rwkv_lab.progress import Progress, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

log = logging.getLogger(__name__)

_EVERY = 0.1  # seconds between two samples, at first
_MOST = 600  # samples; beyond that every second one is dropped, and they are taken half as often
_NAMED = 0.06  # of the whole: shorter stages have no space for their names
_PACKAGE = logging.getLogger("rwkv_lab")


@dataclass(frozen=True)
class Sample:
    """One look at an export; bytes."""

    seconds: float  # since its start
    memory: int | None  # anonymous memory of this process and those it has started; None where it is not reported
    disk: int  # of what has been written so far, work files included
    disk_free: int | None  # on the disk that is written to; None: nothing is written yet


@dataclass
class Stage:
    """A part of an export, in seconds since its start."""

    name: str
    start: float
    end: float | None = None  # None: it has not ended, or an error ended it


@dataclass
class Monitoring:
    """What was seen of an export."""

    stages: list[Stage] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def peak_memory(self) -> int | None:
        """Bytes of anonymous memory at most; None where no sample has them."""
        return max((s.memory for s in self.samples if s.memory is not None), default=None)

    @property
    def peak_disk(self) -> int:
        """Bytes that were on the disk at most."""
        return max((s.disk for s in self.samples), default=0)


class MonitoringLogger:
    """Watches one export, as a context manager: times its stages, samples memory and disk, and keeps its log.

    Messages of rwkv_lab go into the log file where they come from this export; of several exports in the threads of
    one process each has its own.

    Args:
        stages: what the export will do, in order.
        log_level: from which level on messages go into the log file.
        enabled: False: no samples and no progress, and warnings alone in the log file.
    """

    @checked
    def __init__(self, stages: Sequence[str] = (), log_level: LogLevel = "INFO", enabled: bool = True):
        self.found = Monitoring()
        self._expected, self._enabled = list(stages), enabled
        self._records = _Records(self, log_level if enabled else "WARNING")
        self._start, self._every = time.perf_counter(), _EVERY
        self._folder: Path | None = None
        self._progress: Progress | None = None
        self._thread: threading.Thread | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._before = _export.set(self)
        _open_log(self._records)
        if self._enabled:
            if self._expected:
                self._progress = Progress("export", len(self._expected), "stages")
            self._thread = threading.Thread(target=self._watch, name="monitoring of an export", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_watching()
        if self._progress is not None:
            self._progress.__exit__()
        _close_log(self._records)
        _export.reset(self._before)

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage that has ended took, by name."""
        return {stage.name: stage.end - stage.start for stage in self.found.stages if stage.end is not None}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the export: what it takes is recorded and logged when it has ended well."""
        stage = Stage(name, self._now())
        self.found.stages.append(stage)
        yield
        stage.end = self._now()
        if not self._enabled:
            return
        sample = self._sample()
        if self._progress is not None:
            self._progress.advance(1)
        memory = "" if sample.memory is None else f", {human_bytes(sample.memory)} of memory"
        log.info("%s: %.1f s%s, %s on disk", name, stage.end - stage.start, memory, human_bytes(sample.disk))

    @contextmanager
    def writing(self, folder: Path, log_file: str) -> Iterator[None]:
        """While the export writes into a folder: its bytes are counted, and the log is a file in it, whole."""
        self._folder = folder
        try:
            with open(folder / log_file, "w", encoding="utf-8") as file:
                self._records.write_to(file)
                yield
                if self._enabled:
                    self._sample()
                os.fsync(file.fileno())
        finally:
            self._end_watching()
            self._records.write_to(None)
            self._folder = None

    def plot(self, subtitle: str = "") -> "Figure":
        """Memory and disk over time, with the stages."""
        return timeline(self.found, subtitle)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _watch(self) -> None:
        self._sample()
        while not self._stop.wait(self._every):
            self._sample()

    def _end_watching(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> Sample:
        """Look now, and note it. Called by the thread that watches and by that of the export."""
        with self._lock:
            written, free = (0, None) if self._folder is None else (_bytes_in(self._folder), _free(self._folder))
            sample = Sample(self._now(), anonymous_memory(), written, free)
            samples = self.found.samples
            samples.append(sample)
            if len(samples) > _MOST:
                del samples[1::2]
                self._every *= 2
        return sample


# ------------------------------------------------------------------ the log

# The export that this thread works for. Threads that it starts have none: while one export is at work they are its.
_export: ContextVar[MonitoringLogger | None] = ContextVar("_export", default=None)
_open: list["_Records"] = []
_level_before = logging.NOTSET
_changing = threading.Lock()


class _Records(logging.Handler):
    """The records of one export, kept until there is a file for them."""

    def __init__(self, monitor: MonitoringLogger, level: str):
        super().__init__(level)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._monitor = monitor
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        export = _export.get()
        return export is self._monitor or (export is None and len(_open) == 1)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record) + "\n")
        self._write()

    def write_to(self, file: TextIO | None) -> None:
        """Write what has come so far, and what comes, to a file; None: keep it again."""
        self.acquire()
        try:
            self._file = file
            self._write()
        finally:
            self.release()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write("".join(self._lines))
            self._file.flush()
            self._lines.clear()


def _open_log(records: _Records) -> None:
    """Have the package log what one more export wants to know."""
    global _level_before
    with _changing:
        if not _open:
            _level_before = _PACKAGE.level
        _open.append(records)
        _PACKAGE.setLevel(min([_PACKAGE.getEffectiveLevel(), *(one.level for one in _open)]))
        _PACKAGE.addHandler(records)


def _close_log(records: _Records) -> None:
    """The last export that ends leaves the package's level as the first has found it."""
    with _changing:
        _PACKAGE.removeHandler(records)
        _open.remove(records)
        if not _open:
            _PACKAGE.setLevel(_level_before)


# ------------------------------------------------------------------ disk, plot


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder and below; what vanishes meanwhile has none."""
    total, todo = 0, [os.fspath(folder)]
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total


def _free(folder: Path) -> int | None:
    try:
        return disk_free(folder)
    except OSError:
        return None


def timeline(found: Monitoring, subtitle: str = "") -> "Figure":
    """Memory and disk of an export over time; lines are where stages begin, the long ones are named above."""
    from rwkv_lab.plotting import BLUE, GREY, ORANGE, quiet, titled

    figure = titled(3.6, "Memory and disk over time", subtitle)
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = [sample.seconds for sample in found.samples]
    memory = [float("nan") if s.memory is None else s.memory / 1e6 for s in found.samples]
    for axes, values, colour, label in (
        (above, memory, BLUE, "anonymous memory, MB"),
        (below, [s.disk / 1e6 for s in found.samples], ORANGE, "written, MB"),
    ):
        axes.plot(seconds, values, "-o", color=colour, markersize=2, linewidth=1.5)
        axes.fill_between(seconds, values, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(bottom=0)
        for stage in found.stages:
            axes.axvline(stage.start, color=GREY, linewidth=0.8, linestyle="--")
        quiet(axes)
    _name_stages(above, found.stages, seconds[-1] if seconds else 0.0)
    below.set_xlabel("seconds since the start")
    return figure


def _name_stages(axes: "Axes", stages: Sequence[Stage], whole: float) -> None:
    """The names of stages above their part of the axis, in two rows, where there is space for them."""
    shown = [stage for stage in stages if (stage.end or whole) - stage.start >= _NAMED * whole]
    for place, stage in enumerate(shown):
        end = whole if stage.end is None else stage.end
        words = f"{stage.name} {end - stage.start:.1f} s"
        at = ((stage.start + end) / 2, 1.04 + 0.13 * (place % 2))
        axes.annotate(words, at, xycoords=("data", "axes fraction"), fontsize=8, ha="center")
