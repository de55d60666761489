"""Reads the header of a GGUF file, and refuses one that does not add up to the last byte.

Format, little-endian: "GGUF", the version, the numbers of tensors and of values; values (key, type, value); tensors
(name, dimensions with the innermost first, type, offset); padding; then the data, each tensor padded to the alignment.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from rwkv_lab.checkpoint.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    MAGIC,
    SCALARS,
    STRING,
    TYPES,
    UINT32,
    VERSIONS,
    TensorType,
)
from rwkv_lab.checkpoint.source import SourceFile, is_name
from rwkv_lab.errors import CorruptFileError, LayoutError
from rwkv_lab.text import counted

MAX_HEADER = 100_000_000  # bytes; that of a model with 256,000 tokens takes 10 MB
_WINDOW = 1 << 20  # bytes read at a time
_NAME_MAX = 65_535  # bytes of a key or the name of a tensor
_SMALL = 64  # values of an array that are kept; longer ones are vocabularies
_LEAST_VALUE, _LEAST_TENSOR = 14, 25  # bytes that one takes at least


class Cursor:
    """Reads a header from front to back, and nothing beyond the end of the file or `MAX_HEADER`."""

    def __init__(self, file: SourceFile):
        self.file = file
        self.at = 0  # next byte
        self.limit = min(file.size, MAX_HEADER)
        self._start, self._data = 0, b""

    def bad(self, why: str) -> NoReturn:
        raise CorruptFileError(f"{self.file.path}: {why}.")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            CorruptFileError: there are not so many.
        """
        if nbytes > self.limit - self.at:
            left = self.limit - self.at
            self.bad(f"its header claims {nbytes} bytes for {what}; {left} are left: truncated, or damaged")
        if self.at + nbytes > self._start + len(self._data):
            self._start, self._data = self.at, self.file.read(self.at, max(nbytes, min(_WINDOW, self.limit - self.at)))
        begin = self.at - self._start
        self.at += nbytes
        return self._data[begin : begin + nbytes]

    def number(self, kind: int, what: str) -> int | float:
        """A number of a type of `SCALARS`."""
        layout = SCALARS[kind]
        return layout.unpack(self.take(layout.size, what))[0]

    def length(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, most: int | None = None) -> str:
        """A string.

        Raises:
            CorruptFileError: it is longer than `most` bytes, or not UTF-8.
        """
        nbytes = self.length(f"the length of {what}")
        if most is not None and nbytes > most:
            self.bad(f"{what} has {nbytes} bytes; {most} are the limit")
        try:
            return self.take(nbytes, what).decode()
        except UnicodeDecodeError:
            self.bad(f"{what} is not UTF-8")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]  # outermost dimension first, as in torch
    type: TensorType
    offset: int  # of its bytes, in the file

    @property
    def nbytes(self) -> int:
        return self.type.bytes_of(math.prod(self.shape))


def read_gguf_header(file: SourceFile, architectures: Collection[str]) -> tuple[list[GgufTensor], dict[str, str]]:
    """(tensors in file order, values of the header as text).

    Args:
        architectures: those that are read.
    Raises:
        CorruptFileError: lengths, offsets or types that do not add up.
        LayoutError: another architecture, or one part of several.
    """
    cursor = Cursor(file)
    n_tensors, n_values = _start(cursor)
    values = _values(cursor, n_values)
    _refuse_others(cursor, values, architectures)
    alignment = _alignment(cursor, values)
    found = [_tensor(cursor, f"tensor {i + 1} of {n_tensors}") for i in range(n_tensors)]
    twice = next((name for name, n in Counter(t.name for t in found).items() if n > 1), None)
    if twice:
        cursor.bad(f"the tensor {twice} appears twice in its header")
    start = cursor.at + -cursor.at % alignment
    tensors = [replace(t, offset=start + t.offset) for t in found]
    _check_cover(cursor, tensors, start, alignment)
    return tensors, values


def _start(cursor: Cursor) -> tuple[int, int]:
    """(number of tensors, number of values)"""
    cursor.take(len(MAGIC), "its magic number")
    version = cursor.number(UINT32, "its version")
    if version not in VERSIONS:
        if int.from_bytes(int(version).to_bytes(4, "little"), "big") in VERSIONS:
            cursor.bad("a GGUF file in big-endian order; rwkv_lab reads little-endian ones")
        cursor.bad(f"a GGUF file of version {version}; rwkv_lab reads {' and '.join(map(str, VERSIONS))}")
    n_tensors, n_values = cursor.length("the number of tensors"), cursor.length("the number of values")
    left = cursor.limit - cursor.at
    for count, least, what in ((n_values, _LEAST_VALUE, "values"), (n_tensors, _LEAST_TENSOR, "tensors")):
        if count * least > left:
            cursor.bad(f"its header claims {count} {what}; {left} bytes are left: truncated, or damaged")
    return n_tensors, n_values


def _values(cursor: Cursor, count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for i in range(count):
        key = cursor.text(f"key {i + 1} of {count}", _NAME_MAX)
        if not key or not is_name(key):
            cursor.bad(f"key {i + 1} of its header, {key!r}, is no printable text")
        if key in found:
            cursor.bad(f"{key} appears twice in its header")
        found[key] = _value(cursor, int(cursor.number(UINT32, f"the type of {key}")), key)
    return found


def _value(cursor: Cursor, kind: int, key: str) -> str:
    if kind == STRING:
        return cursor.text(key)
    if kind == ARRAY:
        return _array(cursor, key)
    if kind not in SCALARS:
        cursor.bad(f"{key} has the unknown type {kind}")
    value = cursor.number(kind, key)
    if kind == BOOL:
        if value not in (0, 1):
            cursor.bad(f"{key} is a truth value of {value}")
        return str(bool(value))
    return str(value)


def _array(cursor: Cursor, key: str) -> str:
    """Short ones as text; of long ones how many values there are, which have been passed over."""
    kind, count = int(cursor.number(UINT32, f"the type of {key}")), cursor.length(f"the number of values of {key}")
    if kind != STRING and kind not in SCALARS:
        cursor.bad(f"{key} is an array of the unknown type {kind}")
    least = 8 if kind == STRING else SCALARS[kind].size
    if count * least > cursor.limit - cursor.at:
        cursor.bad(f"{key} claims {count} values; {cursor.limit - cursor.at} bytes are left: truncated, or damaged")
    if count <= _SMALL:
        return str([cursor.text(key) if kind == STRING else cursor.number(kind, key) for _ in range(count)])
    if kind != STRING:
        cursor.take(count * least, key)
    else:
        for _ in range(count):
            cursor.take(cursor.length(key), key)
    return f"{count} values"


def _refuse_others(cursor: Cursor, values: Mapping[str, str], architectures: Collection[str]) -> None:
    path, architecture = cursor.file.path, values.get("general.architecture", "")
    if values.get("general.type", "model") != "model":
        raise LayoutError(f"{path} is a GGUF file of type {values['general.type']!r}; rwkv_lab reads whole models.")
    if architecture not in architectures:
        stated = f"of architecture {architecture!r}" if architecture else "without general.architecture"
        raise LayoutError(f"{path} is a GGUF file {stated}; rwkv_lab reads {' and '.join(architectures)}.")
    if values.get("split.count", "1") not in ("0", "1"):
        raise LayoutError(
            f"{path} is one of {values['split.count']} parts of a model.\nJoin them: llama-gguf-split --merge"
        )


def _alignment(cursor: Cursor, values: Mapping[str, str]) -> int:
    stated = values.get("general.alignment", str(ALIGNMENT))
    number = int(stated) if stated.isdecimal() else 0
    if not 8 <= number <= 1 << 20 or number & (number - 1):
        cursor.bad(f"general.alignment is {stated}; a power of two from 8 on is expected")
    return number


def _tensor(cursor: Cursor, what: str) -> GgufTensor:
    """With its offset in the data."""
    name = cursor.text(f"the name of {what}", _NAME_MAX)
    if not name or not is_name(name):
        cursor.bad(f"{what} is called {name!r}, which is no printable text")
    n_dims = int(cursor.number(UINT32, name))
    if not 1 <= n_dims <= 4:
        cursor.bad(f"the tensor {name} has {counted(n_dims, 'dimension')}; 1 to 4 are expected")
    shape = tuple(cursor.length(name) for _ in range(n_dims))[::-1]
    number = int(cursor.number(UINT32, name))
    if number not in TYPES:
        cursor.bad(f"the tensor {name} is of type {number}, which is not known here")
    kind = TYPES[number]
    if not math.prod(shape) or shape[-1] % kind.elements:
        cursor.bad(f"the tensor {name} has shape {list(shape)}; rows of {kind.name} are multiples of {kind.elements}")
    return GgufTensor(name, shape, kind, cursor.length(name))


def _check_cover(cursor: Cursor, tensors: Sequence[GgufTensor], start: int, alignment: int) -> None:
    """Every tensor begins where the one before it ends, padded to the alignment, as ggml asks for."""
    end = start
    for t in tensors:
        if t.offset != end:
            cursor.bad(f"the tensor {t.name} should begin at byte {end}; its header claims byte {t.offset}")
        if t.offset + t.nbytes > cursor.file.size:
            cursor.bad(
                f"the tensor {t.name} ends at byte {t.offset + t.nbytes}, the file has {cursor.file.size}: truncated, "
                "or damaged"
            )
        end = t.offset + t.nbytes + -t.nbytes % alignment
    if cursor.file.size > end:
        cursor.bad(f"{cursor.file.size - end} bytes after the last tensor belong to nothing")
