"""What figures are taken on: the machine's description, its floors, and the load of other processes meanwhile."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rwkv_lab.errors import KernelError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.machine import cores, cpu_features, cpu_name, proc
from rwkv_lab.threads import policy_in_force, set_wait_policy, wait_policy
from rwkv_lab.version import __version__

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of the system's clocks, per second
_READ_BYTES = 1 << 28  # far more than a cache holds


def describe_machine() -> dict:
    """Processor, cores, threads, how they wait, and versions."""
    found = {
        "cpu": cpu_name(),
        "features": " ".join(cpu_features()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "wait policy": policy_in_force() or "OpenMP's default",
        "wait policy of peers": wait_policy(child_environment()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rwkv_lab": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def child_environment() -> dict[str, str]:
    """For processes that measure: this package on their path, as many threads as here, and how those wait."""
    root = str(Path(__file__).parents[2])  # a checkout that is run without being installed
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    threads = str(torch.get_num_threads())
    found = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    set_wait_policy(found)
    return found


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------------- floors


def read_rate() -> float:
    """GB/s at which all threads together read memory, measured now."""
    library = _floors()
    if library is None:
        return _read_rate_of_torch()
    return library.read_gbps(torch.get_num_threads(), _READ_BYTES, 5)


def multiply_add_rate() -> float:
    """GFLOP/s of float32 multiply-adds (each counted as two) on all threads, measured now."""
    library = _floors()
    if library is None:
        return matmul_rate(torch.float32)
    return library.fma_gflops(torch.get_num_threads(), 0.1)


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's matrix product in that dtype, measured now: in bfloat16 what the machine can do at most."""
    n = 1536
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start) * 1e-9)
    return best


def floors_are_compiled() -> bool:
    """Whether floors come from kernels/cpu/floors.cpp; without a compiler torch measures them, lower than they are."""
    return _floors() is not None


@cache
def _floors() -> ctypes.CDLL | None:
    try:
        from rwkv_lab.wkv.loader import cpu_library

        library = cpu_library("floors")
    except KernelError:
        return None
    library.fma_gflops.argtypes, library.fma_gflops.restype = (ctypes.c_int, ctypes.c_double), ctypes.c_double
    library.read_gbps.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    library.read_gbps.restype = ctypes.c_double
    return library


def _read_rate_of_torch() -> float:
    x = torch.ones(_READ_BYTES // 4)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / (time.perf_counter() - start) * 1e-9)
    return best


# ---------------------------------------------------------------------- load of other processes


@dataclass
class Load:
    """What happened while something was measured."""

    seconds: float = 0.0
    other_load: float = 0.0  # CPUs that other processes used on average; 0 where the system does not report it


@contextmanager
def watched() -> Iterator[Load]:
    """Measure what the block takes, and how many CPUs others (not this process or its children) used meanwhile."""
    load = Load()
    before, start = _busy_ticks(), time.perf_counter()
    yield load
    load.seconds = time.perf_counter() - start
    after = _busy_ticks()
    if before and after:
        (all_before, ours_before), (all_after, ours_after) = before, after
        # The two clocks are read one after the other and count whole ticks: two ticks mean nothing.
        ticks = (all_after - all_before) - (ours_after - ours_before) - 2
        load.other_load = max(ticks, 0) / _TICK / max(load.seconds, 1e-9)


def _busy_ticks() -> tuple[int, int] | None:
    """Ticks that all CPUs together have worked so far, and those of this process and its children, dead ones too."""
    try:
        with open(proc("stat")) as f:
            numbers = [int(x) for x in f.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = numbers
        parents, ticks = {}, {}
        for name in os.listdir(proc()):
            if name.isdigit():
                try:
                    with open(proc(name, "stat")) as f:
                        fields = f.read().rpartition(")")[2].split()
                except OSError:  # it ended meanwhile
                    continue
                parents[int(name)], ticks[int(name)] = int(fields[1]), sum(int(x) for x in fields[11:15])
    except (OSError, ValueError):
        return None
    ours = [pid for pid in ticks if _descends(pid, os.getpid(), parents)]
    return user + nice + system + irq + softirq + steal, sum(ticks[pid] for pid in ours)


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


# ---------------------------------------------------------------------- memory


def forget_peak() -> None:
    """Let VmHWM begin anew from what is in use now, where the system can."""
    try:
        with open(proc("self", "clear_refs"), "w") as f:
            f.write("5")
    except OSError:
        pass
