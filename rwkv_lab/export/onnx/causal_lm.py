"""A causal language model of Hugging Face as one ONNX graph, which reads a prompt and continues it.

Keys and values of what was read go in, and come out with those of the new tokens. There may be none yet.

The names are those that other exporters write: input_ids, attention_mask, past_key_values.N.key; logits, present.N.key.
Positions are counted from the mask, so that rows padded on the left begin at 0.
"""

import inspect
from importlib.metadata import version
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from rwkv_lab.errors import LayoutError, ONNXExportError
from rwkv_lab.export.causal_lm.loading import quiet, refuse_attention
from rwkv_lab.export.onnx import kept_graphs
from rwkv_lab.export.onnx.graphs import name_axes, plain_torch, without_notes
from rwkv_lab.export.onnx.optimise import optimise_graph
from rwkv_lab.export.onnx.torchscript import export_by_torchscript
from rwkv_lab.export.onnx_fixed_sizes import FixedSizes
from rwkv_lab.export.onnx_folder import Exporter, past_names

# What to trace at, where sizes are free: not 1, which torch.export takes for constant.
TRACED = FixedSizes(batch=2, length=3, past=5)


class CausalLmGraph(nn.Module):
    """What is traced: tokens `[B,T]`, mask `[B,P+T]`, and of each layer keys and values `[B,H,P,D]` ->
    logits `[B,T,V]`, and keys and values `[B,H,P+T,D]`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # newer and older transformers

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See the class; the mask has 0 where a row is padded, in front, and 1 elsewhere."""
        before = past[0].shape[2]
        total = attention_mask.shape[1]
        counted = attention_mask.float().cumsum(1)  # exact up to 2^24 tokens; TensorRT sums and clips no integers
        positions = (counted - 1).clamp_min(0).long()[:, before:]
        column = torch.arange(total)[None, :]
        row = torch.arange(input_ids.shape[1])[:, None] + before
        seen = (column <= row)[None, None] & (attention_mask[:, None, None, :] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        cache = past_cache(past)
        given = {"attention_mask": mask, "position_ids": positions, self.cache_name: cache}
        logits = self.model(input_ids=input_ids, use_cache=True, **given).logits
        return logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def past_cache(past: tuple[torch.Tensor, ...]) -> Any:
    """A cache of transformers that holds keys and values of each layer, `[B,H,P,D]` in turn."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PastLayer(DynamicLayer):
        def __init__(self, keys: torch.Tensor, values: torch.Tensor):
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

        def get_seq_length(self) -> int:  # theirs asks whether it is empty, which would be fixed by tracing
            return 0 if self.keys is None else self.keys.shape[-2]

    return Cache(layers=[PastLayer(*past[i : i + 2]) for i in range(0, len(past), 2)])


def cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, size of a head) of the keys and values of each layer, in turn.

    Raises:
        LayoutError: the model remembers a text by something else, or by a part of it.
    """
    refuse_attention(model.config)
    with torch.no_grad(), quiet():
        out = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    cache = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
    parts: list[Any] = [
        getattr(layer, part, None) for layer in getattr(cache, "layers", ()) for part in ("keys", "values")
    ]
    if not parts or any(part is None or part.dim() != 4 for part in parts):
        raise LayoutError(f"A {model.config.model_type} is not exported: its cache is not keys and values alone.")
    return [(part.shape[1], part.shape[3]) for part in parts]


def axes_of(layers: int, sizes: FixedSizes | None = None) -> dict[str, tuple[str | int | None, ...]]:
    """The first axes of inputs and outputs, as they must be: a name for one of any size, None for a fixed one; with
    `sizes`, theirs."""
    batch, length, past, total = ("batch", "length", "past", "past + length")
    if sizes is not None:
        batch, length, past, total = sizes.batch, sizes.length, sizes.past, sizes.past + sizes.length
    axes: dict[str, tuple[str | int | None, ...]] = {
        "input_ids": (batch, length),
        "attention_mask": (batch, total),
        "logits": (batch, length),
    }
    for name in past_names(layers):
        axes[name] = (batch, None, past)
        axes[name.replace("past_key_values", "present")] = (batch, None, total)
    return axes


def trace(
    model: Any,
    opset: int,
    optimise: bool,
    own_head: bool,
    exporter: Exporter = "dynamo",
    sizes: FixedSizes | None = None,
) -> ir.Model:
    """The graph of a float32 model on the CPU, whose weights it shares.

    Args:
        own_head: a head that is tied to the embedding becomes a matrix of its own, which can be quantised.
        exporter: of torch.
        sizes: the only ones that it takes; None for any.

    Raises:
        ONNXExportError: torch.export or torch.onnx refuses it.
    """
    shapes = cache_shapes(model)
    axes = axes_of(len(shapes) // 2, sizes)
    try:
        with plain_torch(), quiet():
            graph = _captured(model, _example(shapes, sizes or TRACED), opset, axes, exporter)
            _transpose_weights(graph)
            if own_head:
                _split_head(graph, model)
            if optimise:
                optimise_graph(graph)
    except Exception as e:  # torch.export and torch.onnx raise errors of many kinds
        raise ONNXExportError(f"A {model.config.model_type} cannot be written as ONNX: {_said(e)[:300]}") from e
    if sizes is None:
        name_axes(graph, {name: [str(a or "") for a in dims] for name, dims in axes.items()})
        _name_sums(graph, axes)
    without_notes(graph)
    return graph


def _captured(model: Any, inputs: tuple[torch.Tensor, ...], opset: int, axes: "Axes", exporter: Exporter) -> ir.Model:
    """What torch makes of a model; kept without its weights, since a model in several levels has the same."""
    weights = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    shapes = [(name, *w.shape) for name, w in weights.items()]
    config = model.config.to_json_string(), model.config._attn_implementation, version("transformers")
    key = repr((type(model).__qualname__, config, shapes, [x.shape for x in inputs], opset, axes, exporter))
    if (graph := kept_graphs.find(key)) is None:
        write = _by_dynamo if exporter == "dynamo" else _by_torchscript
        graph = write(CausalLmGraph(model).eval(), inputs, opset, axes)
        _name_weights(graph)
        for name, value in graph.graph.initializers.items():
            if name in weights:
                value.const_value = None
        graph = kept_graphs.keep(key, graph)
    for name, value in graph.graph.initializers.items():
        if name in weights:
            value.const_value = TorchTensor(weights[name].detach(), name=name)
    return graph


def _said(error: Exception) -> str:
    """What an error says last, or what the one that it came from says first, where it refers to that."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = error.__cause__
    return str(cause).splitlines()[0] if lines[-1].startswith("(Refer") and str(cause) else lines[-1]


def _name_sums(graph: ir.Model, axes: "Axes") -> None:
    """Call axes of outputs "past + length" that are "length + past"."""
    for value in graph.graph.outputs:
        dims: list[Any] = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape or ()]
        for i, name in enumerate(axes[str(value.name)]):
            if isinstance(name, str) and sorted(str(dims[i]).split(" + ")) == sorted(name.split(" + ")):
                dims[i] = name
        value.shape = ir.Shape(dims)


def _example(shapes: list[tuple[int, int]], sizes: FixedSizes) -> tuple[torch.Tensor, ...]:
    B, T, P = sizes.batch, sizes.length, sizes.past
    past = [torch.zeros(B, heads, P, size) for heads, size in shapes]
    return torch.zeros(B, T, dtype=torch.int64), torch.ones(B, P + T, dtype=torch.int64), *past


Axes = dict[str, tuple[str | int | None, ...]]


def _by_dynamo(module: nn.Module, inputs: tuple[torch.Tensor, ...], opset: int, axes: Axes) -> ir.Model:
    names = _names(axes)
    # An axis that tracing would fix is an error.
    free = [{i: torch.export.Dim.DYNAMIC for i, a in enumerate(axes[n]) if isinstance(a, str)} for n in names[0]]
    dynamic = (*free[:2], tuple(free[2:]))
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    onnx_program: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,  # it would copy every matrix, and with opset 23 fuse a rotation that fails for two texts
        opset_version=opset,
        input_names=names[0],
        output_names=names[1],
    )
    return onnx_program.model


def _by_torchscript(module: nn.Module, inputs: tuple[torch.Tensor, ...], opset: int, axes: Axes) -> ir.Model:
    return export_by_torchscript(module, inputs, opset, *_names(axes), axes)


def _names(axes: Axes) -> tuple[list[str], list[str]]:
    """Of inputs and of outputs, in their order."""
    given = [name for name in axes if name == "logits" or name.startswith("present")]
    return [name for name in axes if name not in given], given


def _name_weights(model: ir.Model) -> None:
    """Call weights by the tensor names of the checkpoint."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")


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


def _split_head(graph: ir.Model, model: Any) -> None:
    """Give the head that is the embedding, transposed, a matrix of its own, made when it is written."""
    modules = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding, head_name = modules[id(model.get_input_embeddings())], modules[id(model.get_output_embeddings())]
    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) < 2:
            continue
        stored: Any = weight.const_value
        weight.name, shape = embedding, ir.Shape(reversed(stored.shape.numpy()))  # it had one of both names
        tensor = ir.LazyTensor(
            lambda stored=stored: ir.tensor(stored.numpy().T), dtype=stored.dtype, shape=shape, name=head_name
        )
        head = ir.Value(name=head_name, shape=shape, type=ir.TensorType(stored.dtype), const_value=tensor)
        graph.graph.register_initializer(head)
        node.outputs[0].replace_all_uses_with(head)
        graph.graph.remove(node, safe=True)
