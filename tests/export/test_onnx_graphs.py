"""Graphs of every generation against the model they were made from, at lengths and batches that were not traced."""

import numpy as np
import onnx
import pytest
import torch
from random_models import VERSIONS, make_tokens

from rwkv_lab.export import OnnxModel
from rwkv_lab.model import RWKVState

pytestmark = pytest.mark.parametrize("version", VERSIONS)


def error(found, expected) -> float:
    """Largest error, relative to the scale of what is expected."""
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def state_error(found: dict, expected: RWKVState) -> float:
    return max(error(found[name], part) for name, part in expected.tensors().items())


@pytest.mark.parametrize(("B", "T"), [(1, 2), (3, 17), (1, 257), (1, 1)])
def test_a_sequence(exported, version, B, T):
    model, folder = exported(version)
    graph, tokens = OnnxModel(folder), make_tokens(B, T, 257, seed=T)
    logits, state = model(tokens)
    found, found_state = graph.run(tokens.numpy())
    assert error(found, logits[:, -1] if T == 1 else logits) < 1e-5
    assert state_error(found_state, state) < 1e-5


def test_steps_equal_the_sequence_and_the_rnn_mode(exported, version):
    model, folder = exported(version)
    graph, tokens = OnnxModel(folder), make_tokens(3, 7, 257)
    at_once, last = graph.run(tokens.numpy())
    state, given = None, model.create_state(3)
    model.set_mode("rnn")
    try:
        for t in range(7):
            logits, state = graph.run(tokens[:, t : t + 1].numpy(), state)
            expected, given = model(tokens[:, t : t + 1], state=given)
            assert error(logits, expected[:, 0]) < 1e-5
            assert error(logits, torch.from_numpy(at_once[:, t])) < 1e-5
    finally:
        model.set_mode("transformer")
    assert state_error(state, given) < 1e-5
    assert all(error(state[name], torch.from_numpy(part)) < 1e-5 for name, part in last.items())


def test_a_split_changes_nothing(exported, version):
    _, folder = exported(version)
    graph, tokens = OnnxModel(folder), make_tokens(2, 23, 257).numpy()
    whole, last = graph.run(tokens)
    for cut in (1, 2, 11, 22):
        first, state = graph.run(tokens[:, :cut])
        second, state = graph.run(tokens[:, cut:], state)
        parts = [x if x.ndim == 3 else x[:, None] for x in (first, second)]
        assert error(np.concatenate(parts, axis=1), torch.from_numpy(whole)) < 1e-5
        assert all(error(state[name], torch.from_numpy(part)) < 1e-5 for name, part in last.items())


def test_what_is_written(exported, version):
    _, folder = exported(version)
    sequence, step = (onnx.load(str(folder / name)) for name in ("model.onnx", "step.onnx"))
    for graph in (sequence, step):
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
        assert all(dims[0] == "batch" for dims in axes(graph).values())
        assert b"rwkv_lab/model" not in graph.SerializeToString()  # no paths of this machine
    assert axes(sequence)["tokens"] == axes(sequence)["logits"][:2] == ["batch", "length"]
    assert axes(step)["tokens"] == ["batch", 1]
    kinds = [[node.op_type for node in graph.graph.node] for graph in (sequence, step)]
    assert kinds[0].count("Scan") == 3 and not {"Scan", "Loop", "If"} & set(kinds[1])
    assert {weight.name for weight in sequence.graph.initializer} >= {"emb.weight", "blocks.2.att.key.weight"}


def axes(model: onnx.ModelProto) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
