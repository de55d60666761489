"""Runs the device code of `kernels/cuda` on the CPU, unchanged, through `kernels/cuda/emulation.h`.

Every tensor that a kernel is given lies between guard bands, and what it shall write is NaN before.
"""

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rwkv_lab.wkv import cuda

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
FLAGS = ("-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-fno-strict-aliasing")
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Werror")
GUARD = 64  # elements on either side
SENTINEL = 0x5A  # the byte that fills them


def build(name: str, folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / f"{name}.so"
    source = SOURCES / f"{name}.cu"
    done = subprocess.run([compiler, *FLAGS, *WARNINGS, "-o", library, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class Gpu:
    """Takes the place of the device under `rwkv_lab.wkv.cuda`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._libraries = {}
        self._buffers = []

    def library(self, name):
        if name not in self._libraries:
            self._libraries[name] = build(name, self._folder)
        return self._libraries[name]

    @contextmanager
    def current(self, device):
        yield self.library, None

    def guarded(self, shape, dtype) -> torch.Tensor:
        """NaN between guard bands."""
        shape = (shape,) if isinstance(shape, int) else shape
        count = torch.Size(shape).numel()
        buffer = torch.full(((count + 2 * GUARD) * dtype.itemsize,), SENTINEL, dtype=torch.uint8).view(dtype)
        inside = buffer[GUARD : GUARD + count]
        if dtype.is_floating_point:
            inside.fill_(float("nan"))
        self._buffers.append((buffer, inside))
        return inside.view(shape)

    def put(self, x):
        """x on the device."""
        return self.guarded(x.shape, x.dtype).copy_(x)

    def check_guards(self):
        for buffer, inside in self._buffers:
            start = GUARD * buffer.itemsize
            for band in (buffer.view(torch.uint8)[:start], buffer.view(torch.uint8)[-start:]):
                assert (band == SENTINEL).all(), f"written beside a tensor of {inside.numel()} {inside.dtype}"
        self._buffers.clear()

    def take_over(self, monkeypatch):
        monkeypatch.setattr(cuda, "_current", self.current)
        monkeypatch.setattr(cuda, "_empty", lambda shape, like, dtype=torch.float32: self.guarded(shape, dtype))
