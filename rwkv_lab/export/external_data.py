"""Weights that an ONNX file keeps in other files: where, and whether they lie in its folder. Read without onnx.

An ONNX file is a protobuf message; what is needed of it here is a list of fields with lengths, which can be skipped.
"""

import math
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab.errors import CorruptFileError, UnsafeFileError

# Bits of a value, by number of the type in TensorProto.DataType.
_OF_SIZE = {
    2: (25, 26),
    4: (21, 22, 23),
    8: (2, 3, 9, 17, 18, 19, 20, 24),
    16: (4, 5, 10, 16),
    32: (1, 6, 12),
    64: (7, 11, 13, 14),
    128: (15,),
}
_BITS = {dtype: bits for bits, dtypes in _OF_SIZE.items() for dtype in dtypes}
# Which fields of a message are messages that tensors can be in: number -> kind.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DEEPEST = 50  # graphs in graphs


@dataclass
class StoredTensor:
    """A tensor whose values are in another file.

    location: that file, as the ONNX file states it; offset, length: bytes of it; None where it is not stated.
    """

    name: str = ""
    dims: list[int] = field(default_factory=list)
    dtype: int = 0  # TensorProto.DataType
    location: str = ""
    offset: int = 0
    length: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its values take."""
        return -(-math.prod(self.dims) * _BITS.get(self.dtype, 0) // 8)


def external_data(path: Path) -> list[StoredTensor]:
    """The tensors of an ONNX file that are in other files, those of its sub-graphs and functions too.

    Raises:
        CorruptFileError: it is no ONNX file, or states no numbers where they must be.
    """
    if path.stat().st_size == 0:
        raise CorruptFileError(f"{path} is empty.")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return [found for where in _tensors(data, "model", 0, len(data), 0) if (found := _stored(data, *where))]
        except (IndexError, ValueError, UnicodeDecodeError) as e:
            raise CorruptFileError(f"{path} is no ONNX file: {e}") from e


def check_external_data(path: Path) -> list[StoredTensor]:
    """See to it that all weights an ONNX file keeps elsewhere are in its folder, whole; they are returned.

    Raises:
        UnsafeFileError: a location is absolute, has "..", or goes through a link.
        CorruptFileError: a file is missing or too short, or lengths do not fit; the ONNX file is none.
    """
    tensors = external_data(path)
    sizes = {location: _size(path, location) for location in {tensor.location for tensor in tensors}}
    for tensor in tensors:
        what = f"{path.name}: {tensor.name}, {tensor.nbytes} bytes of {tensor.location},"
        if tensor.length not in (None, tensor.nbytes):
            raise CorruptFileError(f"{what} is said to have {tensor.length} bytes there.")
        if tensor.offset < 0 or tensor.offset + tensor.nbytes > sizes[tensor.location]:
            raise CorruptFileError(
                f"{what} begins at byte {tensor.offset}; that file has {sizes[tensor.location]}.\nExport it again."
            )
    return tensors


def _size(path: Path, location: str) -> int:
    """The size of a file that an ONNX file names, which must lie below its folder."""
    parts = re.split(r"[/\\]", location)
    if not location or "\0" in location:
        raise CorruptFileError(f"{path.name} names no file for its weights: the location is {location!r}.")
    if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", location):
        raise UnsafeFileError(
            f"{path.name} wants its weights from {location!r}, outside its own folder.\n"
            "Put that file beside it, and have the location be its name."
        )
    where = path.parent
    for part in location.split("/"):
        where /= part
        if where.is_symlink():
            raise UnsafeFileError(
                f"{path.name} wants its weights from {location!r}, and {where} is a link.\nPut the file itself there."
            )
    if not where.is_file():
        raise CorruptFileError(f"{path.name} wants its weights from {location!r}, and {where} is no file.")
    return os.stat(where).st_size


# ------------------------------------------------------------------ protobuf


def _tensors(data: mmap.mmap, kind: str, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """Where TensorProto messages begin and end."""
    if kind == "tensor":
        yield start, end
        return
    if depth > _DEEPEST * len(_INSIDE):
        raise ValueError("its graphs lie too deep in one another")
    for number, value in _fields(data, start, end):
        if number in _INSIDE[kind] and isinstance(value, tuple):
            yield from _tensors(data, _INSIDE[kind][number], *value, depth + 1)


def _stored(data: mmap.mmap, start: int, end: int) -> StoredTensor | None:
    """A tensor that is in another file; None where its values are here."""
    tensor, entries, elsewhere = StoredTensor(), {}, False
    for number, value in _fields(data, start, end):
        if number == 1:  # one by one or packed
            tensor.dims += [value] if isinstance(value, int) else list(_packed(data, *value))
        elif number == 2 and isinstance(value, int):
            tensor.dtype = value
        elif number == 8 and isinstance(value, tuple):
            tensor.name = _text(data, value)
        elif number == 14:
            elsewhere = value == 1
        elif number == 13 and isinstance(value, tuple):
            pair = {n: _text(data, v) for n, v in _fields(data, *value) if isinstance(v, tuple)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if not elsewhere and not entries:
        return None
    tensor.location, tensor.offset = entries.get("location", ""), int(entries.get("offset", 0))
    tensor.length = int(entries["length"]) if "length" in entries else None
    if tensor.dtype not in _BITS or any(dim < 0 for dim in tensor.dims):
        raise ValueError(f"{tensor.name} has type {tensor.dtype} and shape {tensor.dims}")
    return tensor


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Number and value of every field of a message: a whole number, or where its bytes begin and end."""
    while start < end:
        key, start = _varint(data, start)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, start = _varint(data, start)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"byte {start} begins no field")
        size, start = _varint(data, start) if wire == 2 else ({1: 8, 5: 4}[wire], start)
        if start + size > end:
            raise ValueError(f"{size} bytes at byte {start} go past the end")
        if wire == 2:
            yield number, (start, start + size)
        start += size


def _packed(data: mmap.mmap, start: int, end: int) -> Iterator[int]:
    while start < end:
        value, start = _varint(data, start)
        yield value


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A whole number of seven bits per byte, the lowest first, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return (value - 2**64 if value >= 2**63 else value), at
    raise ValueError(f"a number at byte {at} does not end")


def _text(data: mmap.mmap, where: tuple[int, int]) -> str:
    return data[where[0] : where[1]].decode()
