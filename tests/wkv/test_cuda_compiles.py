"""The CUDA sources pass nvcc for every architecture that is promised."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
ARCHITECTURES = ("80", "90", "120")
# Whether it compiles, not how well: with less optimisation it takes a third of the time.
QUICKLY = ("-Xptxas", "-O1", "-Xcicc", "-O1")


@pytest.mark.parametrize("name", ["wkv4", "wkv6", "wkv7"])
def test_nvcc_accepts_the_sources(name, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    # The sources ask nowhere what they are compiled for: one translation to PTX, an assembly for each architecture.
    targets = [f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{','.join(f'sm_{x}' for x in ARCHITECTURES)}]"]
    library = ("-shared", "-Xcompiler", "-fPIC", "-o", tmp_path / "library.so")
    assert "__CUDA_ARCH__" not in (SOURCES / f"{name}.cuh").read_text() + (SOURCES / f"{name}.cu").read_text()
    command = [nvcc, "-std=c++17", "-t2", *QUICKLY, *targets, *library, SOURCES / f"{name}.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
