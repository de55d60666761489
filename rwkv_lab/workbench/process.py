"""Which process writes a run, so that one that is at work can be told from one that was killed."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> dict[str, object]:
    """Host, number and start of this process, JSON-ready.

    Numbers are given again after a time, so the start belongs to them: on Linux in clock ticks since the boot named
    beside it, which no change of the clock moves; elsewhere in seconds since 1970.
    """
    return {"host": platform.node(), "pid": os.getpid(), "process_started": start_of(os.getpid()), "boot": _boot()}


def is_running(process: Mapping[str, object]) -> bool | None:
    """Whether the process that `this_process` described is there; None where that cannot be told from here."""
    pid = process.get("pid")
    if not isinstance(pid, int) or process.get("host") != platform.node():
        return None
    started = start_of(pid)
    return started is not None and (process.get("boot"), process.get("process_started")) == (_boot(), started)


def _boot() -> str:
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def start_of(pid: int) -> float | None:
    """When a process started, as in `this_process`; None where there is none, or it has ended and its parent did not
    ask how."""
    try:
        if _BOOT.exists():
            # After the name, which may hold blanks and brackets: the state, then 18 numbers, then the start.
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else int(numbers[18])
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (OSError, psutil.Error):
        return None
