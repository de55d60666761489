"""Graphs of torch.export in operators that torch.onnx translates as they are.

torch.onnx traces every graph once more, to write its operators in terms of those that it translates. In graphs of our
models that changes a few operators and takes a third of an export's time. They are changed here, and the graph is not
traced again. Where a graph has an operator that is not known to stay as it is, torch.onnx traces it as ever.
"""

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten

# What stays as it is when a graph is traced again.
_PLAIN = {
    *(operator.getitem, operator.mul, _aten._assert_tensor_metadata.default),
    *(_aten.add.Tensor, _aten.addcmul.default, _aten.cat.default, _aten.clamp_min.default, _aten.div.Tensor),
    *(_aten.embedding.default, _aten.exp.default, _aten.expand.default, _aten.layer_norm.default),
    *(_aten.linalg_vector_norm.default, _aten.linear.default, _aten.matmul.default, _aten.mul.Tensor),
    *(_aten.neg.default, _aten.pow.Tensor_Scalar, _aten.relu.default, _aten.select.int, _aten.sigmoid.default),
    *(_aten.silu.default, _aten.slice.Tensor, _aten.sub.Tensor, _aten.sum.dim_IntList, _aten.sym_size.int),
    *(_aten.tanh.default, _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default, _aten.view.default),
}


def in_plain_operators(program: torch.export.ExportedProgram) -> None:
    """Change what torch.onnx would change; where nothing else is left to it, have it use the graph as it is."""
    graph = program.graph
    sizes = {str(node.meta["val"]): node for node in graph.nodes if node.target == _aten.sym_size.int}
    for node in list(graph.nodes):
        change = _CHANGES.get(node.target)
        if change is None or any(user.op == "output" for user in node.users):  # the program knows outputs by name
            continue
        with graph.inserting_before(node):
            new = change(graph, node, sizes)
        if new is not None:
            if not new.meta:
                new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    if all(_is_plain(node) for node in graph.nodes):
        vars(program)["run_decompositions"] = lambda *_, **__: program


def _is_plain(node: Node) -> bool:
    is_ours = getattr(node.target, "namespace", None) == "rwkv_lab"
    return node.op != "call_function" or is_ours or node.target in _PLAIN


def _to_dtype(graph: Graph, node: Node, sizes: dict[str, Node]) -> Node | None:
    (x, *_), found = node.args, node.meta["val"]
    return x if isinstance(x, Node) and x.meta["val"].dtype == found.dtype else None


def _square(graph: Graph, node: Node, sizes: dict[str, Node]) -> Node:
    return graph.call_function(_aten.pow.Tensor_Scalar, (node.args[0], 2))


def _with_sizes(operator: Callable) -> Callable[[Graph, Node, dict[str, Node]], Node | None]:
    """An operator of a tensor and the sizes that come out."""

    def change(graph: Graph, node: Node, sizes: dict[str, Node]) -> Node | None:
        shape = [size if isinstance(size, int) else sizes.get(str(size)) for size in node.meta["val"].shape]
        return None if None in shape else graph.call_function(operator, (node.args[0], shape))

    return change


_CHANGES = {
    _aten.to.dtype: _to_dtype,
    _aten.square.default: _square,
    _aten.flatten.using_ints: _with_sizes(_aten.view.default),
    _aten.expand_as.default: _with_sizes(_aten.expand.default),
}
