"""Memory does not grow with the tensors, nothing heavy is imported for shapes; logits before and after."""

import subprocess
import sys

import pytest
import torch
from models import LAYOUTS, random_model

from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.convert import compare_logits, convert


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Peak of a process that converts a model of 200 MB and compares it, after a small one warmed it."""
    if sys.platform != "linux":
        pytest.skip("the system does not tell a process its peak of memory (/proc/self/status)")
    ranks = {"w": 4, "a": 4, "v": 4, "g": 4}
    large = Layout("7.0", 2, 128, 128, 128, 200_000, 2, 64, ranks)
    write_checkpoint(tmp_path / "large.pth", random_model(large, torch.float32))
    write_checkpoint(tmp_path / "small.pth", random_model(LAYOUTS["7.0"], torch.float32))
    code = (
        "import os, sys; from rwkv_lab.convert import convert; os.chdir(sys.argv[1])\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "convert('small.pth', 'fla', 'warm', dtype='bf16'); before = peak()\n"
        "plan = convert('large.pth', 'fla', 'out', dtype='bf16').plan; print(peak() - before, plan.memory_needed)\n"
        "assert 'sympy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    grown, planned = map(int, done.stdout.split()[-2:])
    assert grown * 1024 < planned < 110_000_000


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_logits_of_source_and_output(version, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model(LAYOUTS[version], torch.float32))
    target = {"4.0": "transformers", "7.0": "fla"}[version]
    exact = compare_logits(convert(tmp_path / "m.pth", target, tmp_path / "out"))
    assert exact.passed and exact.value == 0
    rounded = compare_logits(convert(tmp_path / "m.pth", target, tmp_path / "bf16", dtype="bf16"))
    assert 0 < rounded.value and rounded.passed
    other = convert(tmp_path / "m.pth", target, tmp_path / "other")
    write_checkpoint(tmp_path / "m.pth", random_model(LAYOUTS[version], torch.float32, seed=5), overwrite=True)
    assert not compare_logits(other).passed, "of another model"
