"""Weights of a graph in 16, 8 or 4 bits; which ones is for `rwkv_lab.export.weight_storage` to say. The WKV state stays
float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from rwkv_lab.checkpoint.rounding import BLOCK, int4, int8
from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.weight_storage import Choice, fault_of, stored_as

_MADE = "made"  # in `meta` of a tensor: parts of what was made from it that are not written yet


def quantise(model: ir.Model, weights: Weights, choice: Choice | None = None) -> None:
    """Store the weights of a graph in fewer bits, in place.

    fp16: matrices as float16, and computed in float32: what is stored is half as large, and no product can overflow.
    int8: matrices by output channel; activations are quantised as they come (DynamicQuantizeLinear, MatMulInteger).
    int4: blocks of 32 with a scale and a zero point each (onnxruntime's MatMulNBits), the head as in int8.

    Args:
        choice: how single matrices are stored, by name, whatever `weights` says.

    Raises:
        ONNXExportError: a matrix whose input is no multiple of 32, for int4; a value that float16 cannot hold.
    """
    makers = {"int8": _int8_nodes, "int4": _int4_nodes}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer():
            continue
        stored = stored_as(str(weight.name), _shape(weight)[::-1], weights, choice)
        if stored in makers:
            _replace(model, node, makers[stored])
    for name, value in list(model.graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT and value.shape:
            if stored_as(name, _shape(value), weights, choice) == "fp16":
                _to_float16(model, name, value)
    if any(node.op_type == "MatMulNBits" for node in model.graph):
        model.graph.opset_imports["com.microsoft"] = 1


def _to_float16(model: ir.Model, name: str, value: ir.Value) -> None:
    uses = list(value.uses())
    half = _stored(model, value, f"{name}.fp16", ir.DataType.FLOAT16, value.shape, lambda w: [_half(w, name)], 0)
    for node, place in uses:
        if node.op_type == "Gather" and place == 0:  # what is looked up is cast, not the whole table
            node.replace_input_with(0, half)
            output = node.outputs[0]
            readers = list(output.uses())
            cast = _cast(output, f"{output.name}.fp32")
            output.type = ir.TensorType(ir.DataType.FLOAT16)  # a type may be shared with another graph
            for reader, at in readers:
                reader.replace_input_with(at, cast.outputs[0])
            model.graph.insert_after(node, cast)
        else:
            cast = _cast(half, f"{name}.{node.name or node.outputs[0].name}")
            node.replace_input_with(place, cast.outputs[0])
            model.graph.insert_before(node, cast)
    del model.graph.initializers[name]


def _half(weight: np.ndarray, name: str) -> np.ndarray:
    largest = float(np.maximum(weight.max(), -weight.min()))
    if largest > np.finfo(np.float16).max:
        raise ONNXExportError(f"{name} holds {largest:.4g}; float16 ends at 65504. Export it as fp32 or int8.")
    return weight.astype(np.float16)


def _cast(value: ir.Value, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, value.shape
    return node


def _replace(model: ir.Model, node: ir.Node, make: Callable[[ir.Model, ir.Node], list[ir.Node]]) -> None:
    """Put nodes in the place of a MatMul; the last one's output takes its name."""
    output, weight = node.outputs[0], node.inputs[1]
    nodes = make(model, node)
    new = nodes[-1].outputs[0]
    new.shape, new.type = output.shape, output.type
    model.graph.insert_before(node, nodes)
    for place, given in enumerate(model.graph.outputs):
        if given is output:
            model.graph.outputs[place] = new
    output.replace_all_uses_with(new)
    name = output.name
    model.graph.remove(node, safe=True)
    new.name = name
    if weight is not None and not weight.uses():
        del model.graph.initializers[str(weight.name)]


def _int8_nodes(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    x, weight = (value for value in node.inputs if value is not None)
    name, columns = str(weight.name), (_shape(weight)[1],)
    values = _stored(model, weight, f"{name}.int8", ir.DataType.INT8, weight.shape, int8, 0)
    scale = _stored(model, weight, f"{name}.scale", ir.DataType.FLOAT, ir.Shape(columns), int8, 1)
    rounded = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    product = ir.node("MatMulInteger", [rounded.outputs[0], values, rounded.outputs[2]])
    as_float = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    scales = ir.node("Mul", [rounded.outputs[1], scale])
    nodes = [rounded, product, as_float, scales, ir.node("Mul", [as_float.outputs[0], scales.outputs[0]])]
    return _named(nodes, f"{name}.{node.outputs[0].name}")


def _int4_nodes(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    x, weight = (value for value in node.inputs if value is not None)
    name, (K, N) = str(weight.name), _shape(weight)
    if fault := fault_of(name, (N, K), "int4"):
        raise ONNXExportError(fault)
    blocks = K // BLOCK
    shapes = {
        "int4": (ir.DataType.UINT8, (N, blocks, BLOCK // 2)),
        "scales": (ir.DataType.FLOAT, (N, blocks)),
        "zero_points": (ir.DataType.UINT8, (N, -(-blocks // 2))),
    }
    parts = [
        _stored(model, weight, f"{name}.{part}", dtype, ir.Shape(shape), int4, i)
        for i, (part, (dtype, shape)) in enumerate(shapes.items())
    ]
    attributes = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    return _named([ir.node("MatMulNBits", [x, *parts], attributes, domain="com.microsoft")], name)


def _named(nodes: list[ir.Node], prefix: str) -> list[ir.Node]:
    for i, node in enumerate(nodes):
        for j, output in enumerate(node.outputs):
            output.name = f"{prefix}.{i}.{j}"
    return nodes


def _stored(
    model: ir.Model, source: ir.Value, name: str, dtype: Any, shape: Any, make: Callable[[np.ndarray], Any], part: int
) -> ir.Value:
    """An initialiser that is a part of what is made from another one's values, when it is written. Graphs that have the
    same weight get the same tensor, and what is made of it at once is taken part by part."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    stored: Any = source.const_value
    left: dict[tuple[Callable, int], np.ndarray] = stored.meta.setdefault(_MADE, {})

    def take() -> Any:
        if (make, part) not in left:
            left.update({(make, i): array for i, array in enumerate(make(stored.numpy()))})
        return ir.tensor(left.pop((make, part)), name=name)

    tensor = stored.meta.setdefault(name, ir.LazyTensor(take, dtype=dtype, shape=shape, name=name))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())
