"""Checkpoints whose matrices rwkv_lab has stored in 8 or 4 bits: they are read as float32, matrix by matrix.

In place of a matrix `NAME` `[out,in]` such a file has the parts of one kind:

* int8: `NAME.int8` int8 `[out,in]`, `NAME.scale` float32 `[out]`
* int4: `NAME.int4` uint8 `[out,in/32,16]`, `NAME.scales` float32 `[out,in/32]`, `NAME.zero_points` uint8
* nf4: `NAME.nf4` uint8 `[out,in/2]`, the first value of a byte in its high half, `NAME.absmax` float32 `[out·in/64]`

and a note `rwkv_lab.packed`. The first two hold the numbers of the ONNX graphs, the third those of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from rwkv_lab.checkpoint.rounding import BLOCK, NF4_BLOCK, from_int4, from_int8, from_nf4
from rwkv_lab.checkpoint.source import Derived, TensorInfo
from rwkv_lab.errors import CorruptFileError, LayoutError
from rwkv_lab.lazy_torch import torch

NOTE, VERSION = "rwkv_lab.packed", "1"
PARTS: dict[str, tuple[str, ...]] = {  # kind -> what is appended to the name, codes first
    "int8": ("int8", "scale"),
    "int4": ("int4", "scales", "zero_points"),
    "nf4": ("nf4", "absmax"),
}
Shape = tuple[int, ...]


def part_shapes(kind: str, shape: Shape) -> dict[str, tuple[Shape, str]]:
    """Shape and dtype of every part of a matrix `[out,in]`, by what its name ends in."""
    rows, columns = shape
    if kind == "int8":
        return {"int8": (shape, "int8"), "scale": ((rows,), "float32")}
    if kind == "nf4":
        scales = -(-rows * columns // NF4_BLOCK)
        return {"nf4": ((rows, columns // 2), "uint8"), "absmax": ((scales,), "float32")}
    blocks = columns // BLOCK
    return {
        "int4": ((rows, blocks, BLOCK // 2), "uint8"),
        "scales": ((rows, blocks), "float32"),
        "zero_points": ((rows, (blocks + 1) // 2), "uint8"),
    }


def unpacked(tensors: Mapping[str, TensorInfo], notes: Mapping[str, str]) -> Mapping[str, TensorInfo]:
    """The tensors of a file with its packed matrices under their own names; as they are in any other file.

    Raises:
        LayoutError: packed by a newer rwkv_lab.
        CorruptFileError: a part that is missing, or of another shape or dtype.
    """
    if NOTE not in notes or not tensors:
        return tensors
    path = next(iter(tensors.values())).file.path
    if notes[NOTE] != VERSION:
        raise LayoutError(f"{path} is packed in form {notes[NOTE]!r:.40}, and {VERSION!r} is read. Update rwkv_lab.")
    ends = {f".{parts[0]}": kind for kind, parts in PARTS.items()}
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name in tensors:
        stem, dot, end = name.rpartition(".")
        if kind := ends.get(dot + end):
            parts = [f"{stem}.{part}" for part in PARTS[kind]]
            found[stem] = _matrix(stem, kind, tensors, parts, str(path))
            used |= {*parts}
    rest = {name: info for name, info in tensors.items() if name not in used}
    if twice := rest.keys() & found.keys():
        raise CorruptFileError(f"{path} has {sorted(twice)[0]} packed and as it is.")
    return rest | found


def _matrix(name: str, kind: str, tensors: Mapping[str, TensorInfo], parts: list[str], path: str) -> TensorInfo:
    if missing := [part for part in parts if part not in tensors]:
        raise CorruptFileError(f"{path} has {parts[0]} and no {missing[0]}.")
    codes, *others = (tensors[part] for part in parts)
    per_code = 1 if kind == "int8" else 2
    shape = (codes.shape[0], per_code * math.prod(codes.shape[1:])) if len(codes.shape) > 1 else (0, 0)
    expected = part_shapes(kind, shape)
    for info, (needed, dtype) in zip((codes, *others), expected.values(), strict=True):
        if info.shape != needed or info.dtype_name != dtype:
            raise CorruptFileError(
                f"{path}: {info.name} is {info.dtype_name} {list(info.shape)}; as a part of {name} {list(shape)} "
                f"it would be {dtype} {list(needed)}."
            )
    back: Callable[..., np.ndarray] = {"int8": _from_int8, "int4": _from_int4, "nf4": from_nf4}[kind]
    derived = Derived(codes, partial(_values, back, others), quantised=kind)
    return replace(codes, name=name, shape=shape, dtype_name="float32", crc32=None, storage=None, derived=derived)


def _values(back: Callable[..., np.ndarray], others: list[TensorInfo], codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(back(codes.numpy(), *(info.read().numpy() for info in others))))


def _from_int8(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return from_int8(codes.T, scale).T


def _from_int4(*parts: np.ndarray) -> np.ndarray:
    return from_int4(*parts).T
