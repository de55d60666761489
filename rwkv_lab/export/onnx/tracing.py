"""A model as an ONNX graph: traced by torch.export, translated by torch.onnx, named so that a person can read it."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.onnx import kept_graphs
from rwkv_lab.export.onnx.graphs import name_axes, plain_torch, without_notes
from rwkv_lab.export.onnx.layers import TRANSPOSED, X, join_states, repeat_last_layer
from rwkv_lab.export.onnx.plain_operators import in_plain_operators
from rwkv_lab.export.onnx.weights import WeightTensors
from rwkv_lab.export.onnx_folder import AXES, STATES, Logits, Recurrence
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.model.registry import generation_of
from rwkv_lab.wkv import trace_operators

_FOUND = [f"{name}_out" for name in STATES]
_TRACED = {"batch": 2, "length": 5}  # sizes to trace at: not 1, which torch.export takes for constant
_WEIGHTS = ("emb.", "blocks.", "ln_out.", "head.")  # what names of a model's parameters begin with

_MOST_KEPT = 4  # graphs of a few hundred nodes, without weights
_KEPT: dict[str, ir.Model] = {}

Parts = list[torch.Tensor]  # one for each layer


class Graph(nn.Module):
    """What is traced: the first layers of a model, with its embedding and head; `one_token`: T = 1.

    Logits are `[B,T,V]`, or `[B,V]` of the last token.
    """

    def __init__(self, model: RWKV_Dual, layers: int, one_token: bool, logits: Logits):
        super().__init__()
        self.emb, self.ln_out, self.head = model.emb, model.ln_out, model.head
        self.blocks = nn.ModuleList(list(model.blocks)[:layers])
        self.one_token, self.last = one_token, one_token or logits == "last"

    def forward(
        self, tokens: torch.Tensor, wkv: Parts, att_shift: Parts, ffn_shift: Parts
    ) -> tuple[torch.Tensor, Parts, Parts, Parts, Parts]:
        """All that `RWKV_Dual.forward` does in TRANSFORMER mode, without its checks of values.

        Args:
            tokens: `[B,T]`.
            wkv, att_shift, ffn_shift: the state of each layer, `[B,…]`.

        Returns:
            logits, the new state of each layer, and x `[B,T,C]` behind each layer.
        """
        blocks: Any = self.blocks
        x, v_first = blocks[0].ln0(self.emb(tokens)), None
        found = []
        for block, *state in zip(blocks, att_shift, ffn_shift, wkv, strict=True):
            x, att, ffn, S, v_first = block(x, *state, v_first)
            found.append((S, att, ffn, x))
        logits = self.head(self.ln_out(x[:, -1] if self.last else x))
        return logits, *(list(parts) for parts in zip(*found, strict=True))  # pyright: ignore[reportReturnType]


def trace(
    model: RWKV_Dual,
    weights: WeightTensors,
    opset: int,
    one_token: bool,
    logits: Logits,
    optimise: bool,
    whole: bool = False,
    recurrence: Recurrence = "scan",
) -> ir.Model:
    """The graph of a float32 model. Its weights are read when they are written.

    Two layers are traced, and the second stands for all that follow, where they are alike.

    Args:
        model: on the CPU or on the device "meta"; its values are not used.
        weights: its values.
        whole: trace all layers.

    Raises:
        ONNXExportError: torch.export or torch.onnx refuses it.
    """
    layers = _traced_layers(model, whole)
    try:
        with plain_torch():
            module = Graph(model, layers, one_token, logits).eval()
            graph = _first_layers(module, model.layout, opset, optimise, recurrence)
            repeat_last_layer(graph, layers, model.layout.n_layer)
            join_states(graph, model.layout.n_layer)
            _set_values(graph, weights)
    except Exception as e:  # torch.export and torch.onnx raise errors of many kinds
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise ONNXExportError(f"RWKV-{model.layout.version} cannot be written as ONNX: {lines[-1][:300]}") from e
    name_axes(graph, AXES)
    return graph


def is_kept(model: RWKV_Dual, opset: int, optimise: bool, recurrence: Recurrence) -> bool:
    """Whether both graphs of a model, such as `outline` makes, were traced before, so that they will not be again."""
    with plain_torch():
        modules = [Graph(model, _traced_layers(model), one_token, "all").eval() for one_token in (False, True)]
        return all(kept_graphs.has(_key(one, model.layout, opset, optimise, recurrence)) for one in modules)


def _traced_layers(model: RWKV_Dual, whole: bool = False) -> int:
    return model.layout.n_layer if whole or not _alike(model) else min(2, model.layout.n_layer)


def _key(module: Graph, layout: Layout, opset: int, optimise: bool, recurrence: Recurrence) -> str:
    """All that a graph of these layers depends on but packages and our own sources."""
    recurrence = "scan" if module.one_token else recurrence
    shapes = [(name, *w.shape) for name, w in module.named_parameters()]
    return repr((module, layout, shapes, module.last, module.one_token, opset, optimise, recurrence))


def _first_layers(module: Graph, layout: Layout, opset: int, optimise: bool, recurrence: Recurrence) -> ir.Model:
    """What was traced, of all layers of `module`. The last few are kept, and in files those of models that come from
    one: the same model in other bits has the same, and of one token so has either form of the recurrence."""
    key = _key(module, layout, opset, optimise, recurrence)
    if key not in _KEPT:
        is_outline = module.emb.weight.is_meta  # others may have been changed in ways that the key does not tell
        graph = kept_graphs.find(key) if is_outline else None
        if graph is None:
            graph = _traced(module, layout, opset, optimise, "scan" if module.one_token else recurrence)
            if is_outline:
                kept_graphs.keep(key, graph)
        if len(_KEPT) >= _MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = graph
    return _KEPT[key].clone()


def _traced(module: Graph, layout: Layout, opset: int, optimise: bool, recurrence: Recurrence) -> ir.Model:
    from rwkv_lab.export.onnx.operators import translations  # what a graph that is kept does without
    from rwkv_lab.export.onnx.optimise import optimise_graph

    operators = translations(module.one_token, recurrence)
    graph = _translated(_exported(module, layout), len(module.blocks), opset, operators)
    _forget_values(graph)
    _transpose_weights(graph)
    if optimise:
        optimise_graph(graph)
    without_notes(graph)
    return graph


def _alike(model: RWKV_Dual) -> bool:
    """Whether the layers behind the first have the same weights, by name and shape."""
    kinds = [{name: tuple(w.shape) for name, w in block.named_parameters()} for block in model.blocks]
    return all(kind == kinds[1] for kind in kinds[2:])


def _exported(module: Graph, layout: Layout) -> torch.export.ExportedProgram:
    if module.emb.weight.is_meta:  # memory that is never touched takes none
        module = deepcopy(module).to_empty(device="cpu")
    layers, one_token = len(module.blocks), module.one_token
    batch, length = (torch.export.Dim.DYNAMIC,) * 2
    dynamic = ({0: batch} if one_token else {0: batch, 1: length}, *([{0: batch}] * layers for _ in STATES))
    with trace_operators():
        inputs = _example(layout, layers, one_token)
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    _without_empty_parts(program.graph)
    in_plain_operators(program)
    return program


def _translated(program: torch.export.ExportedProgram, layers: int, opset: int, operators: dict) -> ir.Model:
    def names(of: Iterable[str]) -> list[str]:
        return [f"{name}.{layer}" for name in of for layer in range(layers)]

    onnx_program: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,  # it would copy every matrix: see _transpose_weights
        opset_version=opset,
        input_names=["tokens", *names(STATES)],
        output_names=["logits", *names((*_FOUND, X))],
        custom_translation_table=operators,
    )
    return onnx_program.model


def _example(layout: Layout, layers: int, one_token: bool) -> tuple:
    B, T = _TRACED["batch"], 1 if one_token else _TRACED["length"]
    shift = (B, layout.n_embd)
    shapes = ((B, *generation_of(layout).wkv_shape(layout)), shift, shift)
    return torch.zeros(B, T, dtype=torch.int64), *([torch.zeros(shape) for _ in range(layers)] for shape in shapes)


def _without_empty_parts(graph: torch.fx.Graph) -> None:
    """Take away concatenations with nothing: the token shift of a single token reads none of the present ones."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.cat.default:
            filled = [part for part in node.args[0] if 0 not in part.meta["val"].shape]
            if len(filled) == 1:
                node.replace_all_uses_with(filled[0])
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _forget_values(model: ir.Model) -> None:
    """Have weights without values: nothing is to be computed from them in advance."""
    for name, value in model.graph.initializers.items():
        if name.startswith(_WEIGHTS):
            value.const_value = None


def _transpose_weights(model: ir.Model) -> None:
    """Have matrices as they are multiplied, `[in,out]`, in place of nodes that transpose them."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1 or weight.shape is None:
            continue
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        weight.shape = ir.Shape(reversed(weight.shape.numpy()))
        weight.meta[TRANSPOSED] = True


def _set_values(model: ir.Model, weights: WeightTensors) -> None:
    """Give weights their values, which are read when they are written; those that no node reads are taken out."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
        elif value.const_value is None:
            value.const_value = weights.tensor(name, value.shape or (), TRANSPOSED in value.meta)
