"""A model as an ONNX graph: traced by torch.export, translated by torch.onnx, named so that a person can read it."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.onnx.operators import translations
from rwkv_lab.export.onnx.optimise import optimise_graph
from rwkv_lab.export.onnx_folder import AXES, STATES, Logits
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.wkv import trace_operators

INPUTS = ("tokens", *STATES)
OUTPUTS = ("logits", *(f"{name}_out" for name in STATES))
_TRACED = {"batch": 2, "length": 5}  # sizes to trace at: not 1, which torch.export takes for constant
_NOISY = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class Graph(nn.Module):
    """What is traced: tokens `[B,T]` and the state `[B,L,…]` -> logits and the new state; `one_token`: T = 1.

    Logits are `[B,T,V]`, or `[B,V]` of the last token.
    """

    def __init__(self, model: RWKV_Dual, one_token: bool, logits: Logits):
        super().__init__()
        self.model, self.last = model, one_token or logits == "last"

    def forward(
        self, tokens: torch.Tensor, wkv: torch.Tensor, att_shift: torch.Tensor, ffn_shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All that `RWKV_Dual.forward` does in TRANSFORMER mode, without its checks of values."""
        model: Any = self.model
        x, v_first = model.blocks[0].ln0(model.emb(tokens)), None
        wkv_out, att_out, ffn_out = [], [], []
        for layer, block in enumerate(model.blocks):
            x, att, ffn, S, v_first = block(x, att_shift[:, layer], ffn_shift[:, layer], wkv[:, layer], v_first)
            wkv_out.append(S)
            att_out.append(att)
            ffn_out.append(ffn)
        logits = model.head(model.ln_out(x[:, -1] if self.last else x))
        return logits, torch.stack(wkv_out, 1), torch.stack(att_out, 1), torch.stack(ffn_out, 1)


def trace(model: RWKV_Dual, opset: int, one_token: bool, logits: Logits, optimise: bool) -> ir.Model:
    """The graph of a float32 model on the CPU, whose weights it shares.

    Raises:
        ONNXExportError: torch.export or torch.onnx refuses it.
    """
    try:
        with _plain_torch():
            graph = _translated(_exported(model, one_token, logits), opset, one_token)
            _name_weights(graph)
            _transpose_weights(graph)
            if optimise:
                optimise_graph(graph)
    except Exception as e:  # torch.export and torch.onnx raise errors of many kinds
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise ONNXExportError(f"RWKV-{model.layout.version} cannot be written as ONNX: {lines[-1][:300]}") from e
    _name_axes(graph)
    _without_notes(graph)
    return graph


def _exported(model: RWKV_Dual, one_token: bool, logits: Logits) -> torch.export.ExportedProgram:
    dynamic = [{axis: torch.export.Dim.DYNAMIC for axis in range(len(AXES[name]))} for name in INPUTS]
    if one_token:
        del dynamic[0][1]
    with trace_operators():
        inputs = _example(model, one_token)
        program = torch.export.export(
            Graph(model, one_token, logits).eval(), inputs, dynamic_shapes=tuple(dynamic), strict=False
        )
    _without_empty_parts(program.graph)
    return program


def _translated(program: torch.export.ExportedProgram, opset: int, one_token: bool) -> ir.Model:
    onnx_program: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,  # it would copy every matrix: see _transpose_weights
        opset_version=opset,
        input_names=INPUTS,
        output_names=OUTPUTS,
        custom_translation_table=translations(one_token),
    )
    return onnx_program.model


def _example(model: RWKV_Dual, one_token: bool) -> tuple[torch.Tensor, ...]:
    B, T = _TRACED["batch"], 1 if one_token else _TRACED["length"]
    parts = model.create_state(B).tensors()
    return torch.zeros(B, T, dtype=torch.int64), *(part.detach().contiguous() for part in parts.values())


@contextmanager
def _plain_torch() -> Iterator[None]:
    """torch as it is by default, and silent, whatever a program has set: tracing follows the defaults."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    dtype = torch.get_default_dtype()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        torch.set_default_dtype(torch.float32)
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of torch and onnxscript, about themselves
            with torch.autocast("cpu", enabled=False):
                yield
    finally:
        torch.set_default_dtype(dtype)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _without_empty_parts(graph: torch.fx.Graph) -> None:
    """Take away concatenations with nothing: the token shift of a single token reads none of the present ones."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.cat.default:
            filled = [part for part in node.args[0] if 0 not in part.meta["val"].shape]
            if len(filled) == 1:
                node.replace_all_uses_with(filled[0])
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _name_axes(model: ir.Model) -> None:
    """Call axes `batch` and `length`, which torch.export calls s23 and s27."""
    names = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape or (), AXES[str(value.name)], strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names[dim.value] = name
    if not names:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    for value in _values(model.graph):
        if value.shape is not None:
            dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape([pattern.sub(lambda m: names[m[0]], d) if isinstance(d, str) else d for d in dims])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _transpose_weights(model: ir.Model) -> None:
    """Store matrices as they are multiplied, `[in,out]`, in place of nodes that transpose them. A transposed copy is
    made when it is written, one matrix at a time."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            continue
        stored: Any = weight.const_value
        transposed = ir.LazyTensor(
            lambda stored=stored: ir.tensor(stored.numpy().T),
            dtype=stored.dtype,
            shape=ir.Shape(reversed(stored.shape.numpy())),
            name=weight.name,
        )
        output = node.outputs[0]
        output.replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        weight.const_value, weight.shape = transposed, transposed.shape


def _without_notes(model: ir.Model) -> None:
    """Take out what torch.onnx notes of every node: its place in our sources, by the paths of this machine."""
    for value in _values(model.graph):
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.doc_string = None


def _name_weights(model: ir.Model) -> None:
    """Call weights by the tensor names of the checkpoint."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
