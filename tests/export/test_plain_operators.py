"""Graphs that torch.onnx does not trace once more, beside those that it does."""

import onnx_ir as ir
import pytest
import torch
from random_models import load_model

from rwkv_lab.export.onnx.graphs import plain_torch
from rwkv_lab.export.onnx.operators import translations
from rwkv_lab.export.onnx.plain_operators import in_plain_operators
from rwkv_lab.export.onnx.tracing import Graph, _exported, _translated


def computed(model: ir.Model) -> list[tuple]:
    """What the outputs are computed by, down to inputs and weights; names in between do not count."""
    known: dict[ir.Value, tuple] = {}

    def of(value: ir.Value | None) -> tuple:
        if value is None or value in known:
            return known[value] if value else ()
        node = value.producer()
        if node is None:
            constant = value.const_value
            is_weight = constant is None or "." in value.name  # others are numbered
            known[value] = (value.name,) if is_weight else (constant.dtype, constant.numpy().tobytes())
        else:
            attributes = {k: a.value for k, a in node.attributes.items()}
            bodies = [computed(ir.Model(a, ir_version=10)) for a in attributes.values() if isinstance(a, ir.Graph)]
            given = {k: str(a) for k, a in attributes.items() if not isinstance(a, ir.Graph)}
            what = (node.op_type, tuple(map(of, node.inputs)), tuple(sorted(given.items())), str(bodies))
            known[value] = (hash(what), value.index())
        return known[value]

    return [of(output) for output in model.graph.outputs]


@pytest.mark.parametrize(("version", "one_token"), [("7.0", False), ("6.0", True)])
def test_a_graph_is_the_one_that_would_be_traced_again(tmp_path, version, one_token):
    model = load_model(tmp_path, version, n_layer=2, vocab_size=64)
    operators = translations(one_token, "scan")
    with plain_torch():
        program = _exported(Graph(model, 2, one_token, "all").eval(), model.layout)
        assert "run_decompositions" in vars(program)
        found = _translated(program, 2, 20, operators)
        del vars(program)["run_decompositions"]
        expected = _translated(program, 2, 20, operators)
    assert found.graph.num_nodes() == expected.graph.num_nodes() > 100
    assert computed(found) == computed(expected)
    node = next(node for node in found.graph if node.op_type == "Sigmoid")
    node.op_type = "Tanh"
    assert computed(found) != computed(expected)


def test_another_operator_is_left_to_torch():
    class Module(torch.nn.Module):
        def forward(self, x):
            return torch.special.expm1(x.square()).flatten(1)

    program = torch.export.export(Module(), (torch.ones(2, 3, 4),))
    in_plain_operators(program)
    assert "run_decompositions" not in vars(program)
    assert [node.target for node in program.graph.nodes if "square" in str(node.target)] == []
    assert torch.equal(program.module()(torch.ones(2, 3, 4)), torch.full((2, 12), 1.0).expm1())
