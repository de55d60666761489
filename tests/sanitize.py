"""Tests of the compiled code in a build with AddressSanitizer and UBSan, in which every access is compared.

    python tests/sanitize.py [changes]    2000 random changes of models unless stated; `make sanitize` does that

Buffers that torch gives to kernels come from malloc, so the sanitizer sees every byte beside them. Leaks are not looked
for: Python gives much back only when its process ends; `tests/model/cpu/test_lasting.py` looks at memory instead.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -DRWKV_LAB_CHECKED"
TESTS = ("tests/wkv/test_cpu.py", "tests/model/test_weight_only.py", "tests/model/cpu")


def sanitizer() -> str | None:
    """The library of AddressSanitizer that g++ links to; None where there is none."""
    if not shutil.which("g++"):
        return None
    command = ["g++", "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


def environment(changes: int) -> dict[str, str]:
    """For a Python whose kernels are built so."""
    return os.environ | {
        "CXX": f"g++ {FLAGS}",
        "LD_PRELOAD": str(sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RWKV_LAB_CHANGES": str(changes),
        "PYTHONPATH": str(ROOT),
    }


def main(changes: str = "2000") -> int:
    """The exit code of pytest."""
    if sanitizer() is None:
        print("g++ has no AddressSanitizer here: install libasan (apt-get install g++ has it on Debian).")
        return 1
    env = environment(int(changes))
    subprocess.run([sys.executable, "-m", "rwkv_lab.wkv"], env=env, cwd=ROOT, check=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], env=env, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
