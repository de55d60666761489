"""Progress of long work: a widget in JupyterLab, a bar in a terminal, one log line per few per cent elsewhere."""

import logging
import sys
import time

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
        if frontend_present() or sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def advance(self, amount: int) -> None:
        if amount <= 0:
            return
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.perf_counter()
        rate = self.done / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate
        early = self._logged == 0 and left >= LOG_LONG
        if now >= self._last_line + LOG_AFTER and (early or self.done >= self.total * (self._logged + LOG_EVERY)):
            self._logged, self._last_line = self.done / self.total, now
            shown = human_bytes(rate) if self.unit == "B" else f"{_digits(rate)} {self.unit}"
            log.info("%s: %.0f %% (%s/s, %s left)", self.label, 100 * self._logged, shown, human_seconds(left))

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
