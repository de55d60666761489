"""What TensorRT's parser takes of an ONNX graph, by onnx-tensorrt's table for TensorRT 10.15, and what it does not.

https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md; operators that no language model has are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from rwkv_lab.checks import Check
from rwkv_lab.errors import FormatExportError
from rwkv_lab.export.onnx.check import first_line, open_graph, shapes_of

OPSETS = (9, 25)  # of TensorRT 11; 10.15 ends at 24, 10.0 at 20
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})
_BOOL = frozenset({TensorProto.BOOL})
_QUANTISED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1})
_OUTSIDE = _FLOATS | _INTEGERS | _BOOL | {TensorProto.UINT8}  # of inputs and outputs of a graph

# Operators by the types that their first input may have.
_TAKEN: tuple[tuple[frozenset[int], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh Attention Ceil Celu Clip Cos Cosh CumSum Dropout Einsum Elu Erf Exp "
        "Floor Gemm GroupNormalization GRU Hardmax HardSigmoid HardSwish InstanceNormalization IsInf "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LSTM MatMul MeanVarianceNormalization "
        "Mish PRelu QuantizeLinear Reciprocal RMSNormalization RNN RotaryEmbedding Round Scan Selu Sigmoid "
        "Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu",
    ),
    (
        _FLOATS | _INTEGERS,
        "Abs Add ArgMax ArgMin Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod "
        "Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign Sub Sum "
        "TensorScatter TopK",
    ),
    (
        _FLOATS | _INTEGERS | _BOOL,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape "
        "ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (
        _FLOATS | _INTEGERS | _BOOL | {TensorProto.UINT8},
        "Cast CastLike",
    ),
    (
        _FLOATS | _INTEGERS | _BOOL | _QUANTISED,
        "Constant ConstantOfShape",
    ),
    (
        _BOOL,
        "And Not Or Xor",
    ),
    (
        _QUANTISED,
        "DequantizeLinear",
    ),
)
_TYPES = {operator: types for types, operators in _TAKEN for operator in operators.split()}
# Which of their inputs must be known when an engine is built.
_CONSTANT = {"CumSum": 1, "OneHot": 1, "Squeeze": 1, "Unsqueeze": 1}
_CONSTANT |= {operator: 1 for operator in _TYPES if operator.startswith("Reduce")}
_ONE_OUTPUT = ("LayerNormalization", "Attention")
_ATTENTION_INPUTS = 4  # Q, K, V and a mask; no past

Shapes = Mapping[str, list[list[int]]]  # by input: least, optimal and largest


@dataclass(frozen=True)
class _Scope:
    """What a graph knows of values by name, those of the graphs around it too."""

    types: dict[str, int]
    constants: set[str]


def check_for_tensorrt(path: Path, shapes: Shapes) -> list[Check]:
    """Check everything of a graph that can be checked without TensorRT; all of it holds, else an error is raised.

    Args:
        path: an ONNX file that onnx's checker accepts.
        shapes: the optimisation profile.

    Raises:
        FormatExportError: an operator, type, opset or axis that TensorRT does not take, by name.
    """
    name, (model, weights) = path.name, open_graph(path)
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise FormatExportError(f"{name} is of opset {opset}; TensorRT takes {OPSETS[0]} to {OPSETS[1]}.")
    if model.functions:
        raise FormatExportError(f"{name} has functions of its own, such as {model.functions[0].name}: write them out.")
    try:
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as e:  # onnx raises errors of several kinds
        raise FormatExportError(f"{name}: its types cannot be told: {first_line(e)}") from e
    faults = list(_faults(model.graph, _Scope({}, set()), path.parent))
    if faults:
        more = f"\n{len(faults) - 1} more nodes are refused too." if len(faults) > 1 else ""
        raise FormatExportError(f"TensorRT does not take {name}: {faults[0]}.{more}")
    _check_outside(name, model)
    _check_shapes(name, model, shapes)
    kinds = sorted({node.op_type for node in _all_nodes(model.graph)})
    return [
        weights,
        Check(f"{name}: opset for TensorRT", opset, f"{OPSETS[0]} to {OPSETS[1]}", True),
        Check(f"{name}: operators, in sub-graphs too, and their types", ", ".join(kinds), "TensorRT's table", True),
        Check(f"{name}: inputs with least, optimal and largest shape", len(shapes), len(shapes), True),
    ]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _all_nodes(inner)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _faults(graph: onnx.GraphProto, around: _Scope, folder: Path) -> Iterator[str]:
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    made = {output for node in graph.node if node.op_type == "Constant" for output in node.output}
    constants = {tensor.name for tensor in graph.initializer} | made
    scope = _Scope(around.types | types, around.constants | constants)
    zeros = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if fault := _fault(node, scope) or _fault_of_zero_point(node, zeros, folder):
            yield f"{node.op_type} {node.name or node.output[0]}, {fault}"
        for inner in _graphs(node):
            yield from _faults(inner, scope, folder)


def _fault(node: onnx.NodeProto, scope: _Scope) -> str:
    """Why TensorRT refuses a node; "" where nothing is known against it."""
    if node.domain not in ("", "ai.onnx"):
        return f"is of {node.domain}, whose operators only onnxruntime has"
    if node.op_type not in _TYPES:
        return "is no operator that it has"
    types = _TYPES[node.op_type]
    first = scope.types.get(node.input[0], 0) if node.input else 0
    if first and first not in types:
        return f"has an input of type {TensorProto.DataType.Name(first)}, which it does not take"
    at = _CONSTANT.get(node.op_type)
    if at is not None and len(node.input) > at and node.input[at] and node.input[at] not in scope.constants:
        return f"has {node.input[at]} as its axes or depth, which must be constant"
    if node.op_type in _ONE_OUTPUT and any(node.output[1:]):
        return "has a second output, which it does not give"
    if node.op_type == "Attention" and (any(node.input[_ATTENTION_INPUTS:]) or _has(node, "softcap", "q_num_heads")):
        return "has a past, a soft cap, or heads in its last axis"
    return ""


def _has(node: onnx.NodeProto, *names: str) -> bool:
    return any(attribute.name in names and (attribute.f or attribute.i) for attribute in node.attribute)


def _fault_of_zero_point(node: onnx.NodeProto, stored: dict[str, TensorProto], folder: Path) -> str:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3 or not node.input[2]:
        return ""
    if node.input[2] not in stored:
        return "has a zero point that is not constant"
    zero = onnx.numpy_helper.to_array(stored[node.input[2]], str(folder))
    return "has a zero point other than 0" if np.any(zero) else ""


def _check_outside(name: str, model: onnx.ModelProto) -> None:
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        dtype = value.type.tensor_type.elem_type
        if value.name not in stored and dtype not in _OUTSIDE:
            raise FormatExportError(
                f"{name}: {value.name} is of type {TensorProto.DataType.Name(dtype)}; TensorRT has it neither as an "
                "input nor as an output."
            )


def _check_shapes(name: str, model: onnx.ModelProto, profile: Shapes) -> None:
    outputs = {value.name for value in model.graph.output}
    inputs = {one: dims for one, dims in shapes_of(model).items() if one not in outputs}
    if inputs.keys() != profile.keys():
        wrong = sorted(inputs.keys() ^ profile.keys())[0]
        raise FormatExportError(f"{name}: {wrong} is an input, or has shapes stated, and not both.")
    for one, dims in inputs.items():
        if len(profile[one]) != 3 or any(len(shape) != len(dims) for shape in profile[one]):
            raise FormatExportError(f"{name}: the shapes of {one} must be three, of {len(dims)} axes each.")
        for axis, (dim, *sizes) in enumerate(zip(dims, *profile[one], strict=True)):
            least, optimal, largest = sizes
            if not (0 <= least <= optimal <= largest and largest >= 1):
                raise FormatExportError(
                    f"{name}: axis {axis} of {one} has the sizes {least}, {optimal}, {largest}; "
                    "they must be least, optimal and largest."
                )
            if isinstance(dim, int) and {least, largest} != {dim}:
                raise FormatExportError(f"{name}: axis {axis} of {one} is {dim}; shapes say {least} to {largest}.")
