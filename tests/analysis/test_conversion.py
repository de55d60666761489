"""Source and output of a conversion side by side: logits, greedy tokens, ranges and rounding of values."""

import math

import pytest
import torch
from random_models import make_layout, random_tensors, relative_rms, write_model

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis.conversion import changes_of_values, compare_conversion, value_ranges
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checks import NotApplicable
from rwkv_lab.convert import compare_logits, convert
from rwkv_lab.errors import ParameterError

TARGETS = {"4.0": "transformers", "5.0": "transformers", "5.2": "world", "6.0": "fla", "7.0": "fla"}


@pytest.mark.parametrize("version", TARGETS)
def test_the_same_weights_say_the_same(version, tmp_path):
    write_model(tmp_path / "m.pth", make_layout(version, head_size=64, n_head=1, vocab_size=256))
    found = compare_conversion(convert(tmp_path / "m.pth", TARGETS[version], tmp_path / "out"), "The cat", tokens=8)
    assert found.relative < 2e-5 and bool(found.same_likeliest.all()) and len(found.by_position) == 32
    assert found.continued.source == found.continued.output and found.continued.same == 8
    assert [check.passed for check in found.checks] == [True, True]


def test_the_numbers_are_those_of_the_two_models(tmp_path):
    write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=256))
    result = convert(tmp_path / "m.pth", "pth", tmp_path / "out.pth", dtype="bf16")
    found = compare_conversion(result, "The cat", tokens=8)
    tokens = torch.arange(32)[None] * 8
    with torch.no_grad():
        expected, output = (
            RWKV_Dual.from_pretrained(p)(tokens)[0][0].double() for p in (tmp_path / "m.pth", result.out)
        )
    assert found.relative == pytest.approx(relative_rms(output, expected))
    assert found.relative == compare_logits(result).value == found.checks[0].value > 1e-4
    assert found.largest == float((output - expected).abs().max())
    p, q = (torch.softmax(x, -1) for x in (expected, output))
    torch.testing.assert_close(found.divergence, (p * (p / q).log2()).sum(-1), rtol=1e-6, atol=1e-12)
    assert float(found.by_position.square().mean().sqrt()) == pytest.approx(found.relative)
    assert found.checks[0].passed and isinstance(found.checks[1], NotApplicable)
    assert found.checks[1].reason.startswith(f"{found.continued.same}; values were rounded")


def test_greedy_tokens_are_what_each_model_writes(tmp_path):
    """Two models, so that they part: of another seed, written in the place of the output."""
    layout = make_layout("7.0", vocab_size=256)
    write_model(tmp_path / "m.pth", layout)
    result = convert(tmp_path / "m.pth", "pth", tmp_path / "out.pth")
    write_model(tmp_path / "out.pth", layout, seed=3)
    found = compare_conversion(result, "The cat", tokens=12)
    for path, ids, text in (
        (tmp_path / "m.pth", found.continued.source, found.continued.source_text),
        (tmp_path / "out.pth", found.continued.output, found.continued.output_text),
    ):
        model = RWKV_Dual.from_pretrained(path)
        assert text == model.tokenizer.decode(ids)
        assert text == model.generate_with_streaming("The cat", 12, 0.0)
    assert found.continued.same < 12 and not found.checks[0].passed and not found.checks[1].passed


def test_ranges_and_rounding_are_those_of_the_values(tmp_path):
    tensors = random_tensors(make_layout("7.0", n_layer=3))
    tensors["blocks.1.att.key.weight"].view(-1)[:5] = torch.tensor([1e5, -2e6, 1e-9, -3e-10, 0.0])
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = convert(tmp_path / "m.pth", "fla", tmp_path / "out", dtype="fp16", allow_nonfinite=True)
    found = {row.name: row for row in value_ranges(result)}
    key, values = found["blocks.{i}.att.key.weight"], found["blocks.{i}.att.value.weight"]
    assert (key.tensors, key.overflow, key.flushed, key.dtype) == (3, 2, 2, torch.float16)
    assert key.largest == 2e6 and key.smallest == pytest.approx(3e-10)
    whole = torch.cat([tensors[f"blocks.{i}.att.value.weight"].flatten() for i in range(3)])
    assert (values.smallest, values.largest) == (float(whole.abs().min()), float(whole.abs().max()))
    assert values.values == whole.numel() and values.rounded == int((whole.half().float() != whole).sum())
    moved = {delta.name: delta.relative for delta in changes_of_values(result)}
    one = tensors["blocks.0.att.value.weight"]
    assert moved["blocks.0.att.value.weight"] == pytest.approx(float((one.half().float() - one).norm() / one.norm()))
    assert moved["blocks.1.att.key.weight"] == math.inf


def test_values_that_are_zero_have_no_range(tmp_path):
    tensors = random_tensors(make_layout("7.0"))
    tensors["ln_out.bias"].zero_()
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = convert(tmp_path / "m.pth", "pth", tmp_path / "out.pth", dtype="bf16")
    (row,) = [row for row in value_ranges(result) if row.name == "ln_out.bias"]
    assert math.isnan(row.smallest) and math.isnan(row.largest) and row.rounded == 0


def test_too_little_memory_is_said_and_nothing_is_loaded(tmp_path, monkeypatch):
    write_model(tmp_path / "m.pth", make_layout("7.0"))
    result = convert(tmp_path / "m.pth", "pth", tmp_path / "out.pth")
    monkeypatch.setattr("rwkv_lab.analysis.conversion.memory_free", lambda: 10)
    monkeypatch.setattr(RWKV_Dual, "from_pretrained", None)
    found = compare_conversion(result, "The")
    assert found.unread.startswith("Not run: in float32 it needs ") and found.continued is None
    assert all(isinstance(check, NotApplicable) for check in found.checks)


def test_a_state_is_no_model(tmp_path):
    write_checkpoint(tmp_path / "s.pth", {"blocks.0.att.time_state": torch.ones(2, 4, 4)})
    with pytest.raises(ParameterError, match="no model that was written"):
        compare_conversion(convert(tmp_path / "s.pth", "safetensors", tmp_path / "s.safetensors"), "The")


def test_quantised_tensors_of_several_blocks(tmp_path):
    """They are read in blocks of other sizes than their source, none of which divides the tensor."""
    pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    tensors = random_tensors(make_layout("7.0", head_size=64, n_head=1, vocab_size=20_001))
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = convert(tmp_path / "m.pth", "gguf", tmp_path / "m.gguf", dtype="Q8_0")
    moved = {delta.name: delta for delta in changes_of_values(result)}
    head = tensors["head.weight"]
    with open_checkpoint(result.out) as ck:
        difference = ck["head.weight"] - head
    assert moved["head.weight"].numel == head.numel() == 1_280_064
    assert moved["head.weight"].relative == pytest.approx(float(difference.norm() / head.norm()), rel=1e-5)
