"""The recurrence of RWKV-5 and 6 as onnxruntime's LinearAttention, against the Scan and the model."""

import json

import numpy as np
import onnx
import pytest
from random_models import load_model, make_tokens

from rwkv_lab.errors import ONNXExportError, ParameterError
from rwkv_lab.export import ConfigurationManager, FormatExporter, OnnxModel, export_onnx
from rwkv_lab.export.onnx.run import run_file


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_it_equals_the_scan_and_the_model(exported, tmp_path, version):
    model, scan = exported(version)
    folder = export_onnx(model, tmp_path / "out", recurrence="linear_attention").folder
    kinds = [node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node]
    assert kinds.count("LinearAttention") == model.layout.n_layer and "Scan" not in kinds
    graph, other = OnnxModel(folder), OnnxModel(scan)
    state = other.run(make_tokens(2, 9, 257, seed=1).numpy())[1]  # one that is not zero
    for B, T in ((2, 2), (2, 67)):
        tokens = make_tokens(B, T, 257, seed=T).numpy()
        (logits, after), (expected, expected_after) = graph.run(tokens, state), other.run(tokens, state)
        assert error(logits, expected) < 1e-5
        assert max(error(after[name], part) for name, part in expected_after.items()) < 1e-5
    found = run_file(folder / "model.onnx", {"tokens": tokens[:, :1], **state})  # the sequence graph, for one token
    assert error(found["logits"][:, 0], other.run(tokens[:, :1], state)[0]) < 1e-5
    tokens = make_tokens(3, 17, 257)
    assert error(graph.run(tokens.numpy())[0], model(tokens)[0].detach().numpy()) < 1e-5
    assert json.loads((folder / "export.json").read_text())["recurrence"] == "linear_attention"
    assert any(
        "com.microsoft (limit com.microsoft)" in str(check) for check in FormatExporter.validate_onnx_export(folder)
    )


def test_generations_that_it_cannot_say(tmp_path):
    for version in ("4.0", "7.0"):
        model = load_model(tmp_path, version, n_layer=1, vocab_size=256)
        with pytest.raises(ONNXExportError, match=f"RWKV-{version} cannot be said in.*\n.*recurrence='scan'"):
            export_onnx(model, tmp_path / "out", recurrence="linear_attention")
    assert not (tmp_path / "out").exists()
    values = dict(checkpoint_path="A.pth", onnx_recurrence="linear_attention", export_tensorrt=True)
    with pytest.raises(ParameterError, match="TensorRT has no LinearAttention"):
        ConfigurationManager(environment={}).resolve(**values)
