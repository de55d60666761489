"""Folders of other ecosystems are merged as they are: the same bytes as from BlinkDL's file, proved as well."""

import pytest
import torch
from models import random_lora, random_model, random_state
from random_models import make_layout, write_model

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.origin import same_weights, weights_of
from rwkv_lab.convert import convert
from rwkv_lab.merge import merge, verify_merge


@pytest.fixture
def files(tmp_path):
    tensors = {"base": random_model(), "model": random_model(seed=9), "state": random_state(), "lora": random_lora()}
    for name, content in tensors.items():
        write_checkpoint(tmp_path / f"{name}.pth", content)
    for name in ("base", "model"):
        convert(tmp_path / f"{name}.pth", "fla", tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("tuned", "options"), [("state.pth", {}), ("lora.pth", {"alpha": 8}), ("model", {"alpha": 0.5})]
)
def test_a_folder_is_merged(tuned, options, files):
    of_folder = merge(files / "base", files / tuned, files / "a.pth", **options)
    tuned = "model.pth" if tuned == "model" else tuned
    of_file = merge(files / "base.pth", files / tuned, files / "b.pth", **options)
    a, b = (torch.load(result.out, weights_only=True) for result in (of_folder, of_file))
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in b)
    checks = verify_merge(of_folder)
    assert all(check.passed for check in checks), checks


# What is read of them is computed: dequantised, or doubled again.
COMPUTED = {
    **{
        dtype: (make_layout("7.0", head_size=64, n_embd=128, dim_ffn=96), "gguf", "g.gguf", {"dtype": dtype})
        for dtype in ("Q8_0", "F16", "BF16", "F32")
    },
    "rescaled": (make_layout("4.0", n_layer=3), "transformers", "folder", {"rescale": 1}),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_base_whose_values_are_computed_is_compared_by_these(case, tmp_path):
    layout, target, out, options = COMPUTED[case]
    pytest.importorskip("gguf", reason="gguf is not installed")
    base = convert(write_model(tmp_path / "m.pth", layout), target, tmp_path / out, **options).out
    same = convert(base, "pth", tmp_path / "same.pth").out
    with open_checkpoint(base) as a, open_checkpoint(same) as b:
        assert same_weights(weights_of(a), weights_of(b))
        tensors = {name: b[name] for name in b}
    result = merge(base, same, tmp_path / "o.pth")
    assert (
        not any(t.changed for t in result.effect.tensors)
        and not [c for c in result.checks if "effect" in c.name][0].passed
    )
    tensors["blocks.1.att.output.weight"][-1, -1] += 1
    write_checkpoint(tmp_path / "other.pth", tensors)
    result = merge(base, tmp_path / "other.pth", tmp_path / "p.pth")
    assert [t.name for t in result.effect.tensors if t.changed] == ["blocks.1.att.output.weight"]
    checks = [*result.checks, *verify_merge(result)]
    assert all(check.passed for check in checks), [str(c) for c in checks]
