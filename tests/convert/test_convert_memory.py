"""Memory does not grow with the tensors, nothing heavy is imported for shapes; logits before and after."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import LAYOUTS, random_model

from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.convert import compare_logits, convert

RANKS = {"w": 4, "a": 4, "v": 4, "g": 4}
LARGE = {
    "a vocabulary": (Layout("7.0", 2, 128, 128, 128, 100_000, 2, 64, RANKS), False),
    "a vocabulary, stored transposed": (Layout("7.0", 2, 128, 128, 128, 100_000, 2, 64, RANKS), True),
    "low-rank pairs": (Layout("7.0", 2, 128, 128, 128, 65536, 2, 64, RANKS | {"g": 100_000}), False),
}
TARGETS = {
    "fla": ("fla", "out", "bf16"),
    "transformers": ("transformers", "out", None),
    "gguf": ("gguf", "out.gguf", None),
    "gguf of blocks": ("gguf", "out.gguf", "Q8_0"),
    "web-rwkv": ("web-rwkv", "out.st", None),
    "safetensors": ("safetensors", "out.safetensors", "bf16"),
    "pth": ("pth", "out.pth", None),
}
CODE = """
import os, sys
from rwkv_lab.convert import convert
os.chdir(sys.argv[1])
to, out, dtype = sys.argv[2], sys.argv[3], sys.argv[4] or None
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
convert("small.pth", to, "small-" + out, dtype=dtype)
before = peak()
result = convert("large.pth", to, out, dtype=dtype)
assert all(check.passed for check in result.checks), result.checks
print(peak() - before, result.plan.memory_needed)
"""


CASES = [("a vocabulary", target) for target in TARGETS]
CASES += [("a vocabulary, stored transposed", "fla"), ("a vocabulary, stored transposed", "gguf of blocks")]
CASES += [("low-rank pairs", "fla")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(large) -> (its path, bytes of its largest tensor); one at a time is kept, they have 150 MB."""
    folder = tmp_path_factory.mktemp("large")
    path, made = folder / "large.pth", {}
    small = Layout("7.0", 2, 64, 64, 64, 65536, 1, 64, RANKS)  # with the vocabulary that is written beside it
    write_checkpoint(folder / "small.pth", random_model(small, torch.float32))

    def make(large: str) -> tuple[Path, int]:
        if large not in made:
            made.clear()
            layout, transposed = LARGE[large]
            model = random_model(layout, torch.float32)
            if transposed:
                model = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in model.items()}
                torch.save(model, path)
            else:
                write_checkpoint(path, model, overwrite=True)
            made[large] = max(t.nbytes for t in model.values())
        return path, made[large]

    yield make
    shutil.rmtree(folder)


@pytest.mark.parametrize(("large", "target"), CASES)
def test_memory_does_not_grow_with_the_tensors(large, target, models, warm, tmp_path):
    """Peak of a process that converts a model of 150 MB and compares it, after a small one warmed it."""
    if sys.platform != "linux":
        pytest.skip("the system does not tell a process its peak of memory (/proc/self/status)")
    path, largest = models(large)
    for name in ("large.pth", "small.pth"):
        (tmp_path / name).hardlink_to(path.with_name(name))
    words = [warm.python, "-c", CODE, tmp_path, *(word or "" for word in TARGETS[target])]
    done = subprocess.run(words, env=warm.environment, capture_output=True, text=True, check=True)
    grown, planned = map(int, done.stdout.split()[-2:])
    assert grown * 1024 < planned < 100_000_000 + 2 * largest
    if large == "a vocabulary":
        assert planned < 100_000_000


def test_nothing_heavy_is_imported_for_shapes(environment, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model())
    code = "import json, sys\nfrom rwkv_lab.convert import convert\n"
    code += "for target, out, dtype in json.loads(sys.argv[1]):\n"
    code += '    convert("m.pth", target, out, dtype=dtype)\nprint("torch" in sys.modules, "sympy" in sys.modules)'
    targets = [(target, f"{i}-{out}", None) for i, (target, out, _) in enumerate(TARGETS.values())]
    words = [sys.executable, "-c", code, json.dumps(targets)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "False"]


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
