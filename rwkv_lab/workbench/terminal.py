"""What a batch run says at its end, in the terminal that papermill was started in."""

import io
import os
import sys
from pathlib import Path

import psutil


def say(text: str) -> None:
    """Print under the cell, and under papermill, which keeps what cells print for the notebook, in its terminal too."""
    print(text)
    if _is_kernel_of_papermill():
        try:
            os.write(_terminal(), f"{text}\n".encode())
        except OSError:  # closed
            pass


def _terminal() -> int:
    """The stdout that the kernel was started with, which is papermill's."""
    try:
        return sys.stdout.fileno()  # of a kernel's stdout: that which it took the place of
    except io.UnsupportedOperation:
        return 1


def _is_kernel_of_papermill() -> bool:
    """Whether papermill's own command runs this kernel, and its stdout is not where the executed notebook goes."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return False
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    return "-" not in words and any(Path(word).name in ("papermill", "papermill.exe") for word in words[:3])
