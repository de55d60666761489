"""How graphs of Hugging Face models are made: exporter, attention and fixed sizes, asked for and as last resorts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_lm import write_model
from random_models import make_layout
from random_models import write_model as write_rwkv
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from rwkv_lab.errors import FormatExportError, ONNXExportError, ParameterError
from rwkv_lab.export import ConfigurationManager, OnnxModel, plan_export, run
from rwkv_lab.export.causal_lm.loading import load_causal_lm
from rwkv_lab.export.causal_lm.onnx_folder import export_causal_lm
from rwkv_lab.export.diagnosis import LOSSES, last_resorts
from rwkv_lab.export.families.huggingface import HuggingFace
from rwkv_lab.export.onnx import causal_lm
from rwkv_lab.export.onnx_fixed_sizes import FixedSizes

TOKENS = np.random.default_rng(1).integers(0, 256, (3, 37))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    return write_model(folder / "base", num_hidden_layers=1, intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def expected(base) -> np.ndarray:
    with torch.no_grad():
        return load_causal_lm(base)(torch.from_numpy(TOKENS)).logits.numpy()


def configure(base: Path, tmp_path: Path, **values):
    given = {"checkpoint_path": base, "output_directory": tmp_path / "e", "naming_pattern": "x"}
    given |= {"export_pytorch": False, "test_input_samples": ["The river remembers its stones, and the sea. " * 2]}
    return ConfigurationManager(environment={}).resolve(**{**given, **values})


def error(graph: OnnxModel, expected: np.ndarray) -> float:
    """Of logits at a batch and a length that were not traced, read at once and in parts."""
    whole, _ = graph.run(TOKENS)
    first, state = graph.run(TOKENS[:, :11])
    rest, _ = graph.run(TOKENS[:, 11:], state)
    found = [whole, np.concatenate([first, rest], axis=1)]
    return max(float(np.abs(one - expected).max()) for one in found) / float(np.abs(expected).max())


LEGACY = {
    "float32": ("fp32", 20, {}, 1e-5),
    "sdpa, int8": ("int8", 23, {"attention": "sdpa"}, 0.05),
    "int4, of one size": ("int4", 18, {"sizes": FixedSizes(2, 8, 63)}, 0.3),
}


@pytest.mark.parametrize("which", LEGACY)
def test_torchs_old_exporter(which, base, expected, tmp_path):
    weights, opset, options, limit = LEGACY[which]
    checks = export_causal_lm(base, tmp_path / "out", weights, opset, None, "", True, exporter="legacy", **options)
    axes = next(check for check in checks if "axes of any size" in check.name)
    assert axes.value == ("none" if "sizes" in options else "batch, length, past, past + length")
    graph = OnnxModel(tmp_path / "out", threads=1)
    assert error(graph, expected) < limit
    import onnx

    used = [node.op_type for node in onnx.load(tmp_path / "out/model.onnx").graph.node]
    assert "Identity" not in used and used.count("MatMulInteger") == {"fp32": 0, "int8": 8, "int4": 1}[weights]
    if "sizes" in options:
        assert graph.context == 64 and "after 63 others" in (tmp_path / "out/README.md").read_text()
        with pytest.raises(ParameterError, match="context ends at 64"):
            graph.run(np.zeros((1, 65), np.int64))
        mask = np.ones((2, 19), np.int64)
        mask[1, :6] = 0
        padded, _ = graph.run(TOKENS[:2, :19], attention_mask=mask)
        alone, _ = graph.run(TOKENS[1:2, 6:19])
        np.testing.assert_allclose(padded[1, 6:], alone[0], atol=0.05)  # int8 rounds the inputs of a call together


def test_a_product_that_recovers(tmp_path, monkeypatch, warm_children):
    """The old exporter has no translation of an operator of this model; the other fails as if it were of one size."""
    monkeypatch.setattr("rwkv_lab.export.validation_tester.SHAPES", ((1, 1), (3, 17)))
    base = write_model(tmp_path / "base", "DiffLlamaConfig", num_hidden_layers=1)
    monkeypatch.setattr("rwkv_lab.export.onnx_attempts.WRITER", "failing_exports:write_of_one_size")
    result = run(configure(base, tmp_path, onnx_exporter="legacy", onnx_fixed_sizes=[2, 8, 64]))
    first, second, third = result.attempts
    assert "aten::rms_norm" in first.error
    assert first.diagnosis == "torch's old exporter has no translation of an operator"
    assert second.settings == first.settings | {"onnx_exporter": "dynamo"} and "static shape" in second.error
    assert third.settings == second.settings | {"onnx_dynamic_axes": False} and third.error is None
    assert result.degraded == [LOSSES["onnx_dynamic_axes", False]] and result.validation_passed
    assert result.verdict == f"DEGRADED: {result.degraded[0]}"
    assert OnnxModel(result.onnx_model_path, threads=1).context == 64


def test_the_last_resorts_of_products(base, tmp_path):
    asked = configure(base, tmp_path)
    settings = {name: getattr(asked, name) for name in HuggingFace.varies}
    found = [{n: v for n, v in one.items() if settings[n] != v} for one in last_resorts("torch.export: x", settings)]
    ladder = [{"attention_implementation": "sdpa"}, {"onnx_exporter": "legacy"}, {"onnx_dynamic_axes": False}]
    assert found == ladder
    for one in last_resorts("what was never seen", settings):
        assert asked.changed(**one)  # none is refused


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("RWKV", {"onnx_dynamic_axes": False}, "onnx_dynamic_axes=False is for models of Hugging Face, not for RWKV"),
        ("RWKV", {"onnx_exporter": "legacy"}, "onnx_exporter='legacy' is for models of Hugging Face"),
        ("RWKV", {"attention_implementation": "sdpa"}, "attention_implementation='sdpa' is for models of Hugging Face"),
        (
            "Hugging Face",
            {"onnx_recurrence": "linear_attention"},
            "onnx_recurrence='linear_attention' is for",
        ),
        (
            "Hugging Face",
            {"export_pytorch": True, "pytorch_format": "gguf"},
            "pytorch_format='gguf' is for models",
        ),
    ],
)
def test_options_of_another_family(family, options, says, base, tmp_path):
    """Refused by the plan and by the export, before any work."""
    rwkv = write_rwkv(tmp_path / "B.pth", make_layout("7.0", n_layer=1))
    configuration = configure(rwkv if family == "RWKV" else base, tmp_path, **options)
    with pytest.raises(FormatExportError, match=says):
        plan_export([configuration])
    with pytest.raises(FormatExportError, match=says):
        run(configuration)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_levels_are_traced_once_in_all_processes(exporter, base, tmp_path, monkeypatch):
    """A graph is kept without weights: those of another model of its shapes go into it as well."""
    monkeypatch.setenv("RWKV_LAB_CACHE", str(tmp_path / "cache"))
    how = {"exporter": exporter, "optimise_graph": True, "opset": 20, "external_data": None, "tokenizer": ""}
    for name, weights in (("traced", "int8"), ("kept", "int8"), ("fp32", "fp32")):
        export_causal_lm(base, tmp_path / name, weights, **how)
        for write in ("_by_dynamo", "_by_torchscript"):
            monkeypatch.setattr(causal_lm, write, None)
    traced, kept = ((tmp_path / name / "model.onnx").read_bytes() for name in ("traced", "kept"))
    assert traced == kept and len(list((tmp_path / "cache/graphs").iterdir())) == 1
    other = write_model(tmp_path / "other", num_hidden_layers=1, intermediate_size=128, tie_word_embeddings=True)
    tensors = {name: 1.1 * tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    export_causal_lm(other, tmp_path / "out", "fp32", **how)
    with torch.no_grad():
        logits = load_causal_lm(other)(torch.from_numpy(TOKENS)).logits.numpy()
    assert error(OnnxModel(tmp_path / "out", threads=1), logits) < 1e-5
    with pytest.raises(ONNXExportError):  # another opset is traced anew
        export_causal_lm(base, tmp_path / "21", "fp32", **how | {"opset": 21})
