"""Graphs on disk: written with their weights in one file that they share, opened again, and checked."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.onnx.tracing import AXES, INPUTS, OUTPUTS

DATA = "model.onnx.data"
INLINE = 16 * 2**20  # bytes of weights up to which a graph holds them itself
_SMALL = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 4096


def write_graphs(graphs: Mapping[str, ir.Model], folder: Path, external_data: bool | None) -> list[str]:
    """Write graphs by file name; weights that are equal in several of them are written once.

    Args:
        external_data: weights in `model.onnx.data`; None: where there are more than 16 MiB of them.

    Returns:
        The names of the files.
    """
    size = sum(value.const_value.nbytes for value in _largest(graphs).graph.initializers.values() if value.const_value)
    if external_data or external_data is None and size > INLINE:
        with open(folder / DATA, "wb") as file:
            places: dict[str, tuple[int, int]] = {}
            for model in graphs.values():
                _move_weights(model, file, folder, places)
            file.flush()
            os.fsync(file.fileno())
    for name, model in graphs.items():
        model.producer_name, model.doc_string = "rwkv_lab", None
        ir.save(model, folder / name)
    return [*graphs, *([DATA] if (folder / DATA).exists() else [])]


def _largest(graphs: Mapping[str, ir.Model]) -> ir.Model:
    return max(graphs.values(), key=lambda model: len(model.graph.initializers))


def _move_weights(model: ir.Model, file: BinaryIO, folder: Path, places: dict[str, tuple[int, int]]) -> None:
    """Write the initialisers of a graph to the file, one at a time, and have the graph refer to it."""
    for value in model.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor is None or tensor.nbytes < _SMALL:
            continue
        data = np.ascontiguousarray(tensor.numpy())
        digest = hashlib.sha256(data.data).hexdigest() if data.size else ""
        if digest not in places:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            places[digest] = file.tell(), data.nbytes
            data.tofile(file)
        offset, length = places[digest]
        value.const_value = ir.ExternalTensor(
            DATA, offset, length, tensor.dtype, shape=tensor.shape, name=str(value.name), base_dir=folder
        )


def check_graph(path: Path, opset: int, one_token: bool) -> None:
    """Whether a file is the graph that was asked for, and onnxruntime opens it.

    Raises:
        ONNXExportError: it is of another opset, fixes the length or the batch, or is no valid graph.
    """
    model = onnx.load(str(path), load_external_data=False)
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("") != opset:
        raise ONNXExportError(f"{path.name} is of opset {written.get('')}, not {opset} as asked for.")
    _check_axes(path, model, one_token)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:  # onnx raises errors of several kinds
        raise ONNXExportError(f"{path.name} is no valid ONNX file: {_first_line(e)}") from e
    _open(path)


def _check_axes(path: Path, model: onnx.ModelProto, one_token: bool) -> None:
    found = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    if missing := {*INPUTS, *OUTPUTS} - found.keys():
        raise ONNXExportError(f"{path.name} has no {sorted(missing)[0]}; it has {', '.join(found)}.")
    for name, dims in found.items():
        axes = ("batch",) if one_token else AXES.get(name.removesuffix("_out"), ("batch",))
        for axis, dim in zip(axes, dims, strict=False):
            if dim != axis:
                raise ONNXExportError(f"{path.name}: the {axis} of {name} is fixed at {dim}; it must be any.")


def _open(path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it only has to open
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has no class of its own for them
        raise ONNXExportError(f"onnxruntime does not open {path.name}: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
