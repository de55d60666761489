"""What this machine has: processor, cores, free memory and disk. Where a system does not say, what can be known of it.

Linux tells most of this in files under `PROC` and, for containers, under `CONTROL_GROUPS`; macOS has neither.
"""

import ctypes
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# What the kernels here, or torch's matrix products, run faster with.
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")
_FEATURES += ("asimd", "asimdhp", "bf16", "i8mm", "sve")  # of 64-bit Arm


def proc(*names: str) -> Path:
    """A file in which Linux says something of itself; elsewhere it does not exist."""
    return PROC.joinpath(*names)


def disk_free(folder: Path) -> int:
    """Bytes this user may still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def memory_free() -> int:
    """Bytes of memory this process can get without swapping; where the system does not say, all that there is.

    The limit of a container counts too; pages that only cache files are free.
    """
    values = _table(proc("meminfo"))
    if "MemAvailable" in values:
        free = values["MemAvailable"] * 1024
    else:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min([free, *_memory_left_in_groups()]), 0)


def memory_of(what: str, process: int | str = "self") -> int | None:
    """Bytes of a process: "VmRSS" now, "VmHWM" at the peak, "RssAnon"; None where the system does not report it."""
    values = _table(proc(str(process), "status"))
    return values[what] * 1024 if what in values else None


def anonymous_memory() -> int | None:
    """Bytes that this process and those it has started hold, files in memory excepted; None where none are reported."""
    own = memory_of("RssAnon")
    return None if own is None else own + sum(memory_of("RssAnon", child) or 0 for child in _descendants("self"))


def give_memory_back() -> None:
    """Have the C library give the system what was freed, which it may keep for later; where it has no such call,
    nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _descendants(process: int | str) -> Iterator[int]:
    """The processes that a process has started, and those that they have, with memory of their own."""
    try:
        threads = list(proc(str(process), "task").glob("*/children"))
    except OSError:  # the process has ended
        return
    for thread in threads:
        try:
            children = [int(word) for word in thread.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in children:
            if not _is_in_memory_of(child, process):
                yield child
                yield from _descendants(child)


def _is_in_memory_of(child: int, parent: int | str) -> bool:
    """Whether a process has been started and not begun its own program yet: it runs in its parent's memory until then
    (vfork), and what the system reports of the two is the same, to the page."""
    try:
        pages, of_parent, then = (proc(str(process), "statm").read_bytes() for process in (child, parent, child))
    except OSError:  # one has ended, or the system does not report it
        return False
    return of_parent in (pages, then)  # the parent's other threads go on meanwhile


def cores() -> int:
    """Cores this process may use: those of the machine, less what its affinity or a container's quota keeps from it."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS has none
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(min([count, *_cores_of_groups()]), 1)


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9R14"; "" where the system does not say."""
    return _cpu_values().get("model name") or platform.processor()


def cpu_features() -> tuple[str, ...]:
    """Instruction sets that the processor has and that matter here, by Linux's names; empty where it is not said."""
    values = _cpu_values()
    there = set((values.get("flags") or values.get("Features") or "").split())
    return tuple(name for name in _FEATURES if name in there)


def cpu_identity() -> str:
    """Everything that `-march=native` looks at, as text: model and all features of the processor."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    lines = [line for line in _cpu_lines() if line.split("\t")[0].rstrip(" :") in wanted]
    return "\n".join(lines) if _cpu_lines() else f"{platform.machine()} {platform.processor()}"


def _cpu_lines() -> list[str]:
    """What the system says of the first core; empty where it says nothing."""
    try:
        return proc("cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return []


def _cpu_values() -> dict[str, str]:
    pairs = (line.partition(":") for line in _cpu_lines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_left_in_groups() -> Iterator[int]:
    """Bytes under each memory limit that holds for this process, less what is in use."""
    for folder in _group_folders("memory"):
        new = (folder / "memory.max").exists()
        limit = _number(folder / ("memory.max" if new else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if new else "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            stat, prefix = _table(folder / "memory.stat"), "" if new else "total_"
            yield limit - used + sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _cores_of_groups() -> Iterator[int]:
    """Cores under each quota that holds for this process; a part of one counts as one."""
    for folder in _group_folders("cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota, period = (_number(folder / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0 and int(period) > 0:
            yield math.ceil(int(quota) / int(period))


def _group_folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups that hold for this process, the innermost first; version 2 and version 1."""
    try:
        lines = proc("self", "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = CONTROL_GROUPS if number == "0" else CONTROL_GROUPS / controller
        folder = root / path.lstrip("/")
        yield from (at for at in (folder, *folder.parents) if at.is_relative_to(root))


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number; empty where the file is not there."""
    try:
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or the word "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
