"""Graphs of which two layers were traced, beside graphs of which all were; and how much of a checkpoint is read."""

import weakref
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from random_models import SIZES, load_model, make_tokens

from rwkv_lab.export import OnnxModel, export_onnx
from rwkv_lab.export.onnx import export
from rwkv_lab.export.onnx.tracing import trace
from rwkv_lab.export.onnx.weights import WeightTensors


@pytest.mark.parametrize(("one_token", "optimise"), [(False, False), (True, True)])
def test_repeated_layers_are_those_that_would_be_traced(exported, tmp_path, one_token, optimise):
    model = exported("7.0").model  # three layers
    weights = WeightTensors(dict(model.named_parameters()).__getitem__)
    found, expected = (trace(model, weights, 20, one_token, "all", optimise, whole=whole) for whole in (False, True))
    kinds = [Counter(node.op_type for node in graph.graph) for graph in (found, expected)]
    more = kinds[1].total() - kinds[0].total()  # what depends on sizes alone is not copied
    assert -2 <= more <= 2 if optimise else more >= 0
    for kind in ("MatMul", "Scan", "Tanh", "Sigmoid", "Mul", "Add"):
        assert kinds[0][kind] == kinds[1][kind], kind
    names = [{name for name in graph.graph.initializers if name.startswith("blocks.")} for graph in (found, expected)]
    assert names[0] == names[1] and "blocks.2.att.v0" in names[0]
    inputs = {name: np.random.default_rng(0).normal(size=part.shape).astype(np.float32)
              for name, part in model.create_state(2).tensors().items()}  # fmt: skip
    inputs["tokens"] = make_tokens(2, 1 if one_token else 9, 257).numpy()
    for one, other in zip(run(found, tmp_path, inputs), run(expected, tmp_path, inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def run(model: ir.Model, folder, inputs) -> list:
    ir.save(model, folder / "graph.onnx")
    return onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"]).run(None, inputs)


def test_layers_that_differ_are_all_traced(tmp_path):
    """No released file has such layers; the second must not stand for another."""
    model = load_model(tmp_path, "4.0", n_layer=3)  # the one that is traced most quickly
    model.blocks[2].ffn.key.weight = torch.nn.Parameter(torch.randn(40, 32))
    model.blocks[2].ffn.value.weight = torch.nn.Parameter(torch.randn(32, 40))
    export_onnx(model.requires_grad_(False), tmp_path / "out")
    tokens = make_tokens(1, 6)
    found, _ = OnnxModel(tmp_path / "out").run(tokens.numpy())
    expected = model(tokens)[0].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_checkpoint_is_never_in_memory(exported, tmp_path, monkeypatch):
    """One tensor at a time, whatever the number of layers."""
    exported("6.0")
    load_model(tmp_path, "6.0", **SIZES)
    read, there, most = export.read_tensor, set(), []

    def counted(info, shape):
        tensor = read(info, shape)
        there.add(id(tensor))
        most.append(len(there))
        weakref.finalize(tensor, there.discard, id(tensor))
        return tensor

    monkeypatch.setattr(export, "read_tensor", counted)
    export_onnx(tmp_path / "m.safetensors", tmp_path / "out", "int8", external_data=True)
    assert len(most) > 60 and max(most) <= 2
    OnnxModel(tmp_path / "out")
