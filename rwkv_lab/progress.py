"""Progress of long work: a widget in JupyterLab, a bar in a terminal, one log line per few per cent elsewhere.

Who started the work may watch it instead, and have it end: `watching`.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LOG_EVERY = 0.05  # of the total: at most 21 lines for one job, however long
LOG_AFTER = 1.0  # seconds between two lines: a short job logs nothing
LOG_LONG = 5.0  # seconds: a job that will take longer says so after its first step


def frontend_present() -> bool:
    """True when a person's front end (JupyterLab, VS Code) sent the running cell.

    Such clients put metadata (cell id, trust) into their execute requests; papermill, nbclient and nbval send none. A
    click on a button comes as a message to its widget, which only a front end sends.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return False
    request = shell.get_parent()
    return bool(request.get("metadata")) or request.get("header", {}).get("msg_type") == "comm_msg"


def human_bytes(n: float) -> str:
    """Bytes in decimal units, three digits: 3.03 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """A duration in seconds, minutes or hours, two digits: 45 s, 11 min, 2.5 h."""
    for unit, of in (("s", 1), ("min", 60)):
        if seconds < 99.5 * of:
            return f"{seconds / of:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 99.5 else f"{rate:.3g}"


class Watcher:
    """What is seen of work in progress by whoever started it, from another thread.

    shown: what is counted now, the innermost where several are; None where nothing is.
    stopped: set it, and the work ends with KeyboardInterrupt the next time that it counts.
    """

    def __init__(self):
        self.shown: Progress | None = None
        self.stopped = False


_watcher: Watcher | None = None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Until the end of the block, work in this process is shown to a watcher, by neither bars nor lines."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


class Progress:
    """Counts work done against `total` and shows throughput and time left. Use as a context manager.

    Args:
        label: what is being done, two or three words.
        total: amount of work in `unit`.
        unit: "B" is shown as kB, MB, GB; anything else as it is.
    """

    def __init__(self, label: str, total: int, unit: str = "B"):
        self.label, self.total, self.unit = label, total, unit
        self.done, self._logged = 0, 0.0
        self._start = self._last_line = time.perf_counter()
        self._bar = None
        self._watcher = _watcher
        if _watcher is not None:
            self._outer, _watcher.shown = _watcher.shown, self
        elif frontend_present() or sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def advance(self, amount: int) -> None:
        """Count so much more as done.

        Raises:
            KeyboardInterrupt: whoever watches has the work end.
        """
        if self._watcher is not None and self._watcher.stopped:
            raise KeyboardInterrupt
        if amount <= 0:
            return
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._watcher is None:
            self._log(time.perf_counter())

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    def in_words(self) -> str:
        """How much is done, how fast, and the time left: "34 % (160 MB/s, 3 s left)"."""
        rate = self._rate(time.perf_counter())
        percent = f"{100 * self.share:.0f} %"
        if not rate:
            return percent
        shown = human_bytes(rate) if self.unit == "B" else f"{_digits(rate)} {self.unit}"
        return f"{percent} ({shown}/s, {human_seconds(max(self.total - self.done, 0) / rate)} left)"

    def _rate(self, now: float) -> float:
        return self.done / max(now - self._start, 1e-9)

    def _log(self, now: float) -> None:
        left = (self.total - self.done) / self._rate(now)
        early = self._logged == 0 and left >= LOG_LONG
        if now >= self._last_line + LOG_AFTER and (early or self.done >= self.total * (self._logged + LOG_EVERY)):
            self._logged, self._last_line = self.done / self.total, now
            log.info("%s: %s", self.label, self.in_words())

    def __exit__(self, *exc: object) -> None:
        if self._watcher is not None:
            self._watcher.shown = self._outer
        if self._bar is not None:
            self._bar.close()
