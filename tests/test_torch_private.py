"""Private parts of torch stand in `rwkv_lab/torch_private.py` alone, and are there."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_models import load_model, make_layout, make_tokens, relative_rms, write_model

from rwkv_lab import torch_private
from rwkv_lab.model import RWKVMode
from rwkv_lab.model.cpu.eligibility import fallback_reason

ROOT = Path(__file__).parent.parent


def test_all_parts_are_there():
    assert not torch_private.missing(), f"torch {torch.__version__} has no {', '.join(torch_private.missing())}"


def test_the_mark_of_constants_is_torchs_own():
    """`rwkv_lab.wkv.choice` opens compiled libraries, which torch.compile cannot trace."""

    def ours(): ...

    def theirs(): ...

    torch_private.constant_while_tracing(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_models_are_imported_and_run_without_torchs_compiler(tmp_path):
    """It takes as long to import as the rest of torch."""
    code = (
        "import sys, torch, rwkv_lab.train, rwkv_lab.merge; from rwkv_lab.model import RWKV_Dual\n"
        "model = RWKV_Dual.from_pretrained(sys.argv[1]).requires_grad_(False)\n"
        "model(torch.zeros(1, 5, dtype=torch.long)); print('torch._dynamo' in sys.modules)"
    )
    path = write_model(tmp_path / "m.pth", make_layout("7.0"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "change",
    {
        "shape": lambda p: p.data.view(3, 8),
        "strides": lambda p: p.data.t().contiguous().t(),
        "dtype": lambda p: p.data.view(torch.int32),
        "negative": lambda p: torch._neg_view(p.data),
        "device": lambda p: p.data.to("meta"),
    }.items(),
    ids=lambda x: x[0],
)
def test_changes_of_tensors_are_noticed_in_one_call(change):
    others, p = [torch.zeros(5, dtype=torch.bfloat16)], torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    kept = torch_private.kept_as_now([*others, p])
    assert kept is not None and kept(*others, p)
    assert not kept(*others, torch.nn.Parameter(change[1](p), requires_grad=False))
    p.__class__ = type("Own", (torch.nn.Parameter,), {})
    assert not kept(*others, p)


@pytest.mark.parametrize("kept", [lambda tensors: None, lambda tensors: lambda *xs: False])
def test_without_that_call_each_tensor_is_compared(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_private, "kept_as_now", kept)
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    for mode in RWKVMode:
        model.set_mode(mode)
        logits = [model(tokens)[0] for _ in range(3)]
        assert torch.equal(logits[0], logits[2]) and not fallback_reason(model, "step")
    weight = model.blocks[0].ffn.key.weight
    weight.data = weight.data.view(*weight.shape[::-1])
    assert "ffn.key.weight" in fallback_reason(model, "step")


@pytest.mark.parametrize("gone", ["torch._C:_no_such_function", "torch.no_such_module:name"])
def test_without_one_of_them_pytorch_computes(gone, tmp_path, monkeypatch):
    model, tokens = load_model(tmp_path, "7.0"), make_tokens(1, 5)
    expected = model(tokens)[0]
    monkeypatch.setitem(torch_private.PARTS, gone, "nothing")
    torch_private.missing.cache_clear()
    try:
        assert gone in torch_private.missing()
        for mode, path in ((RWKVMode.TRANSFORMER, "prefill"), (RWKVMode.RNN, "step")):
            model.set_mode(mode)
            assert gone in fallback_reason(model, path)
            assert relative_rms(model(tokens)[0], expected) < 2e-5
    finally:
        torch_private.missing.cache_clear()


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names of torch that a file imports or reaches through attributes."""

    def is_private(name: str) -> bool:
        return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))

    modules = {"torch": "torch"}  # what names of the file stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(a.asname or a.name): a.name for a in node.names if a.name.split(".")[0] == "torch"}
            yield from (a.name for a in node.names if a.name.startswith("torch.") and is_private(a.name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            modules |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
            yield from (full for a in node.names if is_private(full := f"{node.module}.{a.name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in torch_private.MODULE_PARTS:
                yield node.attr
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.insert(0, inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in modules and is_private(".".join(parts)):
                yield f"{modules[inner.id]}.{'.'.join(parts)}"


def test_no_other_file_uses_private_parts_of_torch():
    found = [
        f"{path.relative_to(ROOT)}: {use}"
        for path in sorted((ROOT / "rwkv_lab").rglob("*.py"))
        if path.name != "torch_private.py"
        for use in private_uses(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch._dynamo", True),
        ("from torch.utils._python_dispatch import TorchDispatchMode", True),
        ("from torch.nn.modules import module as m\nm._global_forward_hooks", True),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", True),
        ("import torch\ntorch._C._functorch", True),
        ("x._parameters", True),
        ("import torch\ntorch.__version__, torch.nn.Linear", False),
        ("self._own", False),
    ],
)
def test_private_uses_are_found(line, found):
    assert bool([*private_uses(ast.parse(line))]) is found
