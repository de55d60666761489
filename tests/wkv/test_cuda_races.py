"""A missing barrier in the device code is a data race of the emulated threads: the thread sanitizer looks for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_gpu import FLAGS, SOURCES

# Run in a process of its own, without torch, which is full of false alarms: calls functions with their numbers and
# buffers that are full of one byte, 0, or one that makes every log-decay -24.
CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for function, *sizes, buffers, byte in eval(sys.argv[2]):
    print(function, *sizes, byte, file=sys.stderr)
    memory = [ctypes.create_string_buffer(bytes([byte]) * (4 << 20)) for _ in range(buffers)]
    pointers = [ctypes.c_void_p(-(-ctypes.addressof(x) // 64) * 64) for x in memory]
    if error := getattr(library, function)(*sizes, *pointers, None):
        sys.exit(error)
"""

STRONG = 0xC1

# Functions with their numbers, how many buffers they take and the byte: two tiles and one token; rows of one and two
# threads; on tensor cores chunks of both kinds. One head: each is a block of its own, and blocks run in turn.
CASES = {
    "wkv4": [("wkv4_forward", 1, 2, 33, 40, 8, 0), ("wkv4_backward", 1, 2, 33, 40, 12, 0)],
    "wkv6": [("wkv6_forward", 1, 0, 1, 33, 1, N, 9, 0) for N in (64, 128)]
    + [("wkv6_backward", 1, 0, 1, 33, 1, N, 14, 0) for N in (64, 128)]
    + [("wkv5_forward", 0, 0, 1, 33, 1, 64, 9, 0), ("wkv5_backward", 0, 0, 1, 33, 1, 64, 14, 0)],
    "wkv7": [("wkv7_forward", 1, 1, 1, 33, 1, N, 10, 0) for N in (64, 128)]
    + [("wkv7_backward", 1, 1, 1, 33, 1, N, 16, 0) for N in (64, 128)]
    + [("wkv7_forward_chunked", 1, 1, 1, 65, 1, 64, 10, byte) for byte in (0, STRONG)]
    + [("wkv7_backward_chunked", 1, 1, 1, 65, 1, 64, 17, byte) for byte in (0, STRONG)],
}


def sanitizer() -> str:
    """Path of the runtime that must be loaded before everything else."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    answer = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    if not Path(answer.stdout.strip()).is_absolute():
        pytest.skip("g++ has no thread sanitizer")
    return answer.stdout.strip()


@pytest.mark.parametrize("name", CASES)
def test_no_barrier_is_missing(name, tmp_path):
    runtime, library = sanitizer(), tmp_path / f"{name}.so"
    # Optimised: in a build with -O0 it does not see copies of 16 bytes.
    command = ["g++", *FLAGS, "-fsanitize=thread", "-o", library, SOURCES / f"{name}.cu"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    command = [sys.executable, "-c", CALL, library, str(CASES[name])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
