"""Whether an ONNX file is what was asked for: opset, axes, operators, weights, and that onnxruntime opens it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from rwkv_lab.checks import Check
from rwkv_lab.errors import CorruptFileError, ONNXExportError, TracerWarningError, UnsafeFileError
from rwkv_lab.export.external_data import check_external_data

# Of inputs and outputs, their first axes: a name for one of any size, None for one that may be fixed.
Axes = Mapping[str, Sequence[str | int | None]]


def check_graph(
    path: Path, opset: int | None = None, axes: Axes | None = None, domains: Collection[str] | None = ()
) -> list[Check]:
    """Check an ONNX file, and say what was checked; all of it holds, else an error is raised.

    Args:
        opset: that was asked for; None for any.
        axes: by input or output, the names of its first axes, each of which must be of any size, a number where it
            must be that. None: nothing is asked of them.
        domains: of operators that may be there beside ONNX's own; None for any.

    Raises:
        TracerWarningError: an axis is fixed that must be of any size.
        ONNXExportError: another opset or shape, an operator of another domain, a graph that onnx or onnxruntime
            refuses, weights that are missing, or that lie outside its folder.
    """
    name, (model, weights) = path.name, open_graph(path)
    checks = [_check_opset(name, model, opset), _check_domains(name, model, domains)]
    if axes is not None:
        checks.append(_check_axes(name, model, axes))
    checks.append(weights)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:  # onnx raises errors of several kinds
        raise ONNXExportError(f"{name} is no valid ONNX file: {first_line(e)}") from e
    open_session(path)
    return [*checks, Check(f"{name}: onnx.checker, and onnxruntime from its path", "open it", "open it", True)]


def open_graph(path: Path) -> tuple[onnx.ModelProto, Check]:
    """A graph without the weights that are in other files, and what was checked of these.

    Raises:
        ONNXExportError: it is no ONNX file; such weights are missing, or lie outside its folder.
    """
    try:
        elsewhere = check_external_data(path)
        model = onnx.load(str(path), load_external_data=False)
    except (UnsafeFileError, CorruptFileError) as e:
        raise ONNXExportError(str(e)) from e
    except OSError as e:
        raise ONNXExportError(f"{path} cannot be read: {e.strerror or e}.") from e
    except Exception as e:  # protobuf's own
        raise ONNXExportError(f"{path.name} is no ONNX file: {first_line(e)}") from e
    files = {tensor.location for tensor in elsewhere}
    held = f"{len(elsewhere)} tensors in {', '.join(sorted(files))}" if elsewhere else "none"
    return model, Check(f"{path.name}: weights in other files", held, "whole, in its folder", True)


def _check_opset(name: str, model: onnx.ModelProto, opset: int | None) -> Check:
    written = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if written is None or opset not in (None, written):
        raise ONNXExportError(f"{name} is of opset {written}, not {opset or 'any'} as asked for.")
    return Check(f"{name}: opset written", written, written if opset is None else opset, True)


def _check_domains(name: str, model: onnx.ModelProto, domains: Collection[str] | None) -> Check:
    local = {function.domain for function in model.functions}
    found = {n.domain: n.op_type for n in nodes_of(model) if n.domain not in ("", "ai.onnx", *local)}
    for domain, operator in found.items():
        if domains is not None and domain not in domains:
            raise ONNXExportError(
                f"{name} has the operator {operator} of {domain}, which runtimes other than the one it is from lack.\n"
                "Nothing that was asked for needs it."
            )
    allowed = "any" if domains is None else ", ".join(domains) or "none"
    return Check(f"{name}: domains beside ONNX's own", ", ".join(sorted(found)) or "none", allowed, True)


def _check_axes(name: str, model: onnx.ModelProto, axes: Axes) -> Check:
    found = shapes_of(model)
    if missing := [one for one in axes if one not in found]:
        raise ONNXExportError(f"{name} has no {missing[0]}; it has {', '.join(found)}.")
    for one, wanted in axes.items():
        if len(found[one]) < len(wanted):
            raise ONNXExportError(f"{name}: {one} has {len(found[one])} axes, not {len(wanted)} or more.")
        for axis, dim in zip(wanted, found[one], strict=False):
            if isinstance(axis, int) and dim != axis:
                raise ONNXExportError(f"{name}: an axis of {one} is {dim}; it must be {axis}.")
            if isinstance(axis, str) and not isinstance(dim, str):
                raise TracerWarningError(f"{name}: the {axis} of {one} is fixed at {dim}; it must be any.")
            if isinstance(axis, str) and dim != axis:
                raise ONNXExportError(f"{name}: the {axis} of {one} is called {dim or 'nothing'}.")
    shown = sorted({axis for wanted in axes.values() for axis in wanted if isinstance(axis, str)})
    return Check(f"{name}: axes of any size", ", ".join(shown) or "none", "as asked for", True)


def open_session(path: Path) -> None:
    """Have onnxruntime open a file, and nothing more.

    Raises:
        ONNXExportError: it does not.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is in the error
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it only has to open
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has no class of its own for them
        raise ONNXExportError(f"onnxruntime does not open {path.name}: {first_line(e)}") from e


def shapes_of(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    """Shapes of inputs and outputs by name: numbers, and names of axes of any size, "" where they have none.

    Initialisers that are listed as inputs are none.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*model.graph.input, *model.graph.output)
        if value.name not in stored
    }


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a model, those of sub-graphs and functions too."""
    for holder in (model.graph, *model.functions):
        yield from _nodes(holder)


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(inner)


def first_line(error: Exception) -> str:
    """What an error says first, in 300 characters at most."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
