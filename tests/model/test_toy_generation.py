"""A generation is added by one file for checkpoints and one for models, and is nowhere else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_lab
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import registry

HERE = Path(__file__).parent / "toy_generation"


def test_a_toy_generation_without_a_compiled_form(tmp_path):
    """A copy of the package with the two files: files of it are recognised, models run through PyTorch, and save."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(rwkv_lab.__file__).parent, copy / "rwkv_lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "checkpoint.py", copy / "rwkv_lab/checkpoint/generations/rwkv01.py")
    shutil.copy(HERE / "model.py", copy / "rwkv_lab/model/rwkv01.py")
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "use.py", tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "all is well\n", done.stderr


def test_a_version_is_registered_once():
    (generation,) = (g for g in registry.generations() if "7.0" in g.versions)
    with pytest.raises(ParameterError, match="RWKV-7.0 is known already"):
        registry.register(generation)
