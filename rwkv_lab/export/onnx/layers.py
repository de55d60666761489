"""From a graph of the first layers to one of all: the last traced layer is copied for each that follows.

A traced graph takes the state of each layer as `wkv.0`, `att_shift.0`, …, and gives `wkv_out.0`, … and `x.0`, which is
what goes from a layer to the next. Weights are initialisers with the tensor names of the checkpoint.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from rwkv_lab.export.onnx_folder import STATES

X = "x"  # what a layer hands to the next
TRANSPOSED = "transposed"  # in `meta` of a weight that the graph has as [in,out]


def repeat_last_layer(model: ir.Model, traced: int, layers: int) -> None:
    """Copy the nodes of layer `traced` - 1 for layers `traced` to `layers` - 1, with their own weights and states."""
    if layers == traced:
        _take_off(model.graph, traced)
        return
    graph, last = model.graph, traced - 1
    named = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    given = [named[f"{name}.{last}"] for name in STATES]
    found = [named[f"{name}_out.{last}"] for name in STATES]
    before, after = named[f"{X}.{last - 1}"], named[f"{X}.{last}"]
    _count_by_tokens(graph)
    weights = [w for name, w in graph.initializers.items() if name.startswith(f"blocks.{last}.")]
    nodes = _between([before, *given, *weights], [after, *found])
    readers = [(node, at) for node, at in after.uses() if node not in nodes]
    inside = set(nodes)
    order = [node for node in graph if node in inside]  # as they are computed
    x = after
    for layer in range(traced, layers):
        values: dict[ir.Value, ir.Value] = {before: x}
        for value in weights:
            values[value] = _other_weight(graph, value, layer)
        for value in given:
            values[value] = _renamed(value, layer)
            graph.inputs.append(values[value])
        copies = [_copy(node, values, layer) for node in order]
        graph.insert_before(readers[0][0], copies)
        graph.outputs.extend(values[value] for value in found)
        x = values[after]
    for node, at in readers:
        node.replace_input_with(at, x)
    _take_off(graph, traced)
    graph.sort()


def join_states(model: ir.Model, layers: int) -> None:
    """Take and give the states of all layers in one tensor each, `[B,L,…]`: `wkv` -> `wkv_out`, …"""
    graph = model.graph
    named = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    axis = _constant(graph, "layer_axis", np.array([1]))
    numbers = [_constant(graph, f"layer.{layer}", np.array(layer)) for layer in range(layers)]
    rest = [value for value in graph.inputs if "." not in str(value.name)]
    given, first = [], graph[0]
    for name in STATES:
        parts = [named[f"{name}.{layer}"] for layer in range(layers)]
        whole = _with_layers(parts[0], name, layers)
        given.append(whole)
        for part, number in zip(parts, numbers, strict=True):
            taken = ir.node("Gather", [whole, number], {"axis": 1})
            _like(taken.outputs[0], part, f"{part.name}_in")
            graph.insert_before(first, taken)
            part.replace_all_uses_with(taken.outputs[0])
    joined = []
    for name in STATES:
        parts = [named[f"{name}_out.{layer}"] for layer in range(layers)]
        wide = [ir.node("Unsqueeze", [part, axis]) for part in parts]
        for node, part in zip(wide, parts, strict=True):
            value = _with_layers(part, f"{part.name}_wide", 1)
            _like(node.outputs[0], value, str(value.name))
        concat = ir.node("Concat", [node.outputs[0] for node in wide], {"axis": 1})
        whole = _with_layers(parts[0], f"{name}_out", layers)
        _like(concat.outputs[0], whole, str(whole.name))
        graph.extend([*wide, concat])
        joined.append(concat.outputs[0])
    logits = [value for value in graph.outputs if "." not in str(value.name)]
    graph.inputs.clear()
    graph.inputs.extend([*rest, *given])
    graph.outputs.clear()
    graph.outputs.extend([*logits, *joined])


def _count_by_tokens(graph: ir.Graph) -> None:
    """Take the size of a batch from the tokens. torch.onnx takes it from any input, which would tie layers together."""
    tokens = next(value for value in graph.inputs if value.name == "tokens")
    for value in graph.inputs:
        for node, at in list(value.uses()):
            first = [node.attributes.get_int(name, None) for name in ("start", "end")] == [0, 1]
            if node.op_type == "Shape" and first:
                node.replace_input_with(at, tokens)


def _between(sources: Iterable[ir.Value], ends: Iterable[ir.Value]) -> set[ir.Node]:
    """Nodes that depend on a source and that an end depends on."""
    below: set[ir.Node] = set()
    waiting = [node for value in sources for node, _ in value.uses()]
    while waiting:
        node = waiting.pop()
        if node not in below:
            below.add(node)
            waiting += [reader for output in node.outputs for reader, _ in output.uses()]
    above: set[ir.Node] = set()
    waiting = [node for value in ends if (node := value.producer())]
    while waiting:
        node = waiting.pop()
        if node in below and node not in above:
            above.add(node)
            waiting += [maker for value in node.inputs if value is not None and (maker := value.producer())]
    return above


def _take_off(graph: ir.Graph, traced: int) -> None:
    """No x is given out: it was, to find where layers end."""
    kept = [value for value in graph.outputs if not str(value.name).startswith(f"{X}.")]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value], layer: int) -> ir.Node:
    """A node for another layer; its outputs are added to `values`."""
    inputs = [None if value is None else values.get(value, value) for value in node.inputs]
    attributes = [
        ir.Attr(name, attribute.type, attribute.as_graph().clone())
        if attribute.type == ir.AttributeType.GRAPH
        else attribute
        for name, attribute in node.attributes.items()
    ]
    copied = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes,
        overload=node.overload,
        num_outputs=len(node.outputs),
        name=f"{node.name}.{layer}" if node.name else None,
    )
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        _like(new, old, _name_in(old, layer))
        values[old] = new
    return copied


def _name_in(value: ir.Value, layer: int) -> str:
    name = str(value.name)
    start, dot, number = name.rpartition(".")
    return f"{start}.{layer}" if dot and number.isdigit() and start in _NUMBERED else f"{name}.layer{layer}"


_NUMBERED = {*STATES, *(f"{name}_out" for name in STATES), X}


def _renamed(value: ir.Value, layer: int) -> ir.Value:
    new = ir.Value(name=_name_in(value, layer))
    _like(new, value, str(new.name))
    return new


def _other_weight(graph: ir.Graph, value: ir.Value, layer: int) -> ir.Value:
    new = ir.Value(name=re.sub(r"^blocks\.\d+\.", f"blocks.{layer}.", str(value.name)))
    _like(new, value, str(new.name))
    new.meta.update(value.meta)
    graph.initializers[str(new.name)] = new
    return new


def _like(value: ir.Value, pattern: ir.Value, name: str) -> None:
    value.name, value.type, value.shape = name, pattern.type, None if pattern.shape is None else pattern.shape.copy()


def _with_layers(part: ir.Value, name: str, layers: int) -> ir.Value:
    """What `[B,…]` of each layer are together, `[B,L,…]`."""
    assert part.shape is not None
    return ir.Value(name=name, type=part.type, shape=ir.Shape([part.shape[0], layers, *part.shape[1:]]))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor: Any = ir.tensor(array.astype(np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
