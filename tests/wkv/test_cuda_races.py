"""A missing barrier in the device code is a data race of the emulated threads: the thread sanitizer looks for them."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_gpu import FLAGS, SOURCES

# Run in a process of its own, without torch, which is full of false alarms: calls a function with zeroed buffers.
CALL = """
import ctypes, sys
library, function, *numbers = sys.argv[1:]
*sizes, buffers = map(int, numbers)
memory = [ctypes.create_string_buffer(4 << 20) for _ in range(buffers)]
pointers = [ctypes.c_void_p(-(-ctypes.addressof(x) // 64) * 64) for x in memory]
sys.exit(getattr(ctypes.CDLL(library), function)(*sizes, *pointers, None))
"""

# Functions with their numbers, and how many buffers they take: two tiles and one token; rows of one and two threads.
CASES = {
    "wkv4": [("wkv4_forward", 1, 2, 33, 40, 8), ("wkv4_backward", 1, 2, 33, 40, 12)],
    "wkv6": [("wkv6_forward", 1, 0, 1, 33, 2, N, 9) for N in (64, 128)]
    + [("wkv6_backward", 1, 0, 1, 33, 2, N, 14) for N in (64, 128)]
    + [("wkv5_forward", 0, 0, 1, 33, 1, 64, 9), ("wkv5_backward", 0, 0, 1, 33, 1, 64, 14)],
    "wkv7": [("wkv7_forward", 1, 1, 1, 33, 2, N, 10) for N in (64, 128)]
    + [("wkv7_backward", 1, 1, 1, 33, 2, N, 16) for N in (64, 128)],
}


def sanitizer() -> str:
    """Path of the runtime that must be loaded before everything else."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    answer = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    if not Path(answer.stdout.strip()).is_absolute():
        pytest.skip("g++ has no thread sanitizer")
    return answer.stdout.strip()


def call(library, runtime, *arguments):
    command = [sys.executable, "-c", CALL, library, *map(str, arguments)]
    environment = os.environ | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_no_barrier_is_missing(name, tmp_path):
    runtime, library = sanitizer(), tmp_path / f"{name}.so"
    subprocess.run(["g++", *FLAGS, "-fsanitize=thread", "-o", library, SOURCES / f"{name}.cu"], check=True)
    assert ctypes.CDLL is not None
    for case in CASES[name]:
        done = call(library, runtime, *case)
        assert done.returncode == 0, (case, done.stderr[-3000:])
