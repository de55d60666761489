"""Graphs on disk: written with their weights in one file that they share."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from rwkv_lab.checkpoint.source import WRITE_BLOCK

DATA = "model.onnx.data"
INLINE = 16 * 2**20  # bytes of weights up to which a graph holds them itself
_SMALL = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 4096


def write_graphs(
    graphs: Mapping[str, ir.Model], folder: Path, external_data: bool | None, data: str = DATA
) -> list[str]:
    """Write graphs by file name; weights that are equal in several of them are written once.

    Args:
        external_data: weights in a file of their own; None: where there are more than 16 MiB of them.
        data: the name of that file.

    Returns:
        The names of the files.
    """
    size = sum(value.const_value.nbytes for value in _largest(graphs).graph.initializers.values() if value.const_value)
    if external_data or external_data is None and size > INLINE:
        with open(folder / data, "wb") as file:
            places: dict[Any, tuple[int, int]] = {}
            for model in graphs.values():
                _move_weights(model, file, folder / data, places)
            file.flush()
            os.fsync(file.fileno())
    for name, model in graphs.items():
        model.producer_name, model.doc_string = "rwkv_lab", None
        ir.save(model, folder / name)
    return [*graphs, *([data] if (folder / data).exists() else [])]


def _largest(graphs: Mapping[str, ir.Model]) -> ir.Model:
    return max(graphs.values(), key=lambda model: len(model.graph.initializers))


def _move_weights(model: ir.Model, file: BinaryIO, path: Path, places: dict[Any, tuple[int, int]]) -> None:
    """Write the initialisers of a graph to the file, one at a time, and have the graph refer to it. What another graph
    has, the same tensor or one with the same bytes, is there already."""
    for value in model.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor is None or tensor.nbytes < _SMALL or not tensor.shape:
            continue
        if tensor not in places:  # tensors are equal to themselves alone
            places[tensor] = _place(tensor, file, places)
        offset, length = places[tensor]
        value.const_value = ir.ExternalTensor(
            path.name, offset, length, tensor.dtype, shape=tensor.shape, name=str(value.name), base_dir=path.parent
        )


def _place(tensor: Any, file: BinaryIO, places: dict[Any, tuple[int, int]]) -> tuple[int, int]:
    """Where the bytes of a tensor are in the file, to which they are added where they were not there yet."""
    array, before = tensor.numpy(), file.tell()
    file.seek(-before % _ALIGNMENT, os.SEEK_CUR)
    start, digest = file.tell(), hashlib.sha256()
    rows = max(1, WRITE_BLOCK // array[:1].nbytes)
    for at in range(0, len(array), rows):  # a matrix may be a view whose rows are not together
        data = np.ascontiguousarray(array[at : at + rows]).reshape(-1).view(np.uint8).data
        digest.update(data)
        file.write(data)  # not data.tofile: its errors do not say why
    key = digest.digest()
    if key in places:
        file.seek(before)
        file.truncate()
    else:
        places[key] = start, array.nbytes
    return places[key]
