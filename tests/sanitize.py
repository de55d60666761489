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
TESTS = (
    "tests/wkv/test_cpu.py",
    "tests/model/test_weight_only.py",
    "tests/convert/test_gguf.py",
    "tests/merge/test_compiled.py",
    "tests/model/cpu",
)


def sanitizer() -> str | None:
    """The libraries that are loaded before all others: AddressSanitizer, which g++ links to, and that of C++, without
    which it ends the process at torch's first exception. None where there is no AddressSanitizer."""
    if not shutil.which("g++"):
        return None
    names = ("libasan.so", "libstdc++.so.6")
    commands = [["g++", f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(one, capture_output=True, text=True).stdout.strip() for one in commands]
    return " ".join(found) if all(os.path.isabs(x) and os.path.exists(x) for x in found) else None


def environment(changes: int) -> dict[str, str]:
    """For a Python whose kernels are built so."""
    return os.environ | {
        "CXX": f"g++ {FLAGS}",
        "LD_PRELOAD": str(sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
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
    # What the sanitizers print goes to the terminal, and is not lost with the process.
    command = [sys.executable, "-m", "pytest", "-v", "--capture=sys", *TESTS]
    code = subprocess.run(command, env=env, cwd=ROOT).returncode
    if code < 0 or code > 5:  # pytest's own are 0 to 5
        print(f"The tests ended in the middle, with code {code}; what was found stands above.")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
