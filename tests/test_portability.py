"""macOS lacks some calls and files of Linux: nothing here needs them, shown by taking them away."""

import ast
import os
from pathlib import Path

import pytest
import torch
from models import LAYOUTS

from rwkv_lab import machine, merge, open_checkpoint
from rwkv_lab.bench.machine import describe_machine, forget_peak, watched
from rwkv_lab.bench.models import random_model, random_state
from rwkv_lab.checkpoint import stream
from rwkv_lab.machine import memory_of
from rwkv_lab.wkv import cpu, wkv7
from rwkv_lab.wkv.loader import cpu_build

ROOT = Path(__file__).parent.parent
# Names of `os` that Python's documentation gives for Linux and not for all macOS.
LINUX_ONLY = """
    fdatasync posix_fadvise posix_fallocate sched_getaffinity sched_setaffinity sched_setscheduler preadv pwritev
    copy_file_range splice memfd_create eventfd timerfd_create pidfd_open getrandom pipe2 unshare setns getxattr
    setxattr listxattr process_cpu_count getresuid O_DIRECT O_TMPFILE O_NOATIME O_PATH O_LARGEFILE
""".split()


@pytest.fixture
def as_on_macos(monkeypatch, tmp_path):
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(machine, "PROC", tmp_path / "no-proc")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "no-groups")


def test_linux_is_asked_only_where_there_is_an_alternative():
    """`getattr` and `hasattr` look first; files of the system stand in two modules, which do without them."""
    for path in (ROOT / "rwkv_lab").rglob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = {
            ast.unparse(call.args[1])
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("hasattr", "getattr")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os" and node.attr in LINUX_ONLY:
                assert repr(node.attr) in guarded, f"{path.name}: os.{node.attr}"
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and path.name not in ("machine.py", "process.py")
            ):
                assert not node.value.startswith(("/proc", "/sys/")), f"{path.name}: {node.value}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merging(as_on_macos, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "FLUSH_FROM", 0)  # write to the disk while copying, as for large files
    monkeypatch.setattr("rwkv_lab.checkpoint.source._READ_MAX", 100)
    base, state, out = tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / f"out{suffix}"
    random_model(base, LAYOUTS["7.0"])
    random_state(state, LAYOUTS["7.0"])
    merge(base, state, out)
    with open_checkpoint(base) as before, open_checkpoint(state) as tuned, open_checkpoint(out) as after:
        assert torch.equal(after["emb.weight"], before["emb.weight"])
        name = "blocks.1.att.time_state"
        assert torch.equal(after[name].float(), tuned[name].to(after[name].dtype).float())


def test_kernels_run_on_threads_of_our_own(as_on_macos, monkeypatch):
    monkeypatch.setattr(cpu, "_functions", {})
    cpu._gomp_parallel.cache_clear()
    torch.manual_seed(0)
    r, w, k, v, a, b = (torch.randn(2, 130, 4, 32) for _ in range(6))
    try:
        assert cpu._gomp_parallel().value is None
        assert cpu_build("wkv7").library.name.startswith("cpu-wkv7-")
        inputs = (r, -w.abs().clamp(0.01, 1), k, v, a * 0.1, b * 0.1)
        torch.set_num_threads(2)
        found, expected = (wkv7(*inputs, backend=name)[0] for name in ("auto", "reference"))
        assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    finally:
        torch.set_num_threads(1)
        cpu._gomp_parallel.cache_clear()


def test_benchmarks_tell_less_and_run(as_on_macos):
    assert describe_machine()["cores"] >= 1 and memory_of("VmRSS") is None
    forget_peak()
    with watched() as load:
        pass
    assert load.other_load == 0
