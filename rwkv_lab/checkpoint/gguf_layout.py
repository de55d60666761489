"""Where every byte of a GGUF file will lie, known before the first is written."""

import struct
from collections.abc import Sequence

from rwkv_lab.checkpoint.file_layout import FileLayout
from rwkv_lab.checkpoint.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    BY_DTYPE,
    BY_NAME,
    FLOAT32,
    INT32,
    MAGIC,
    SCALARS,
    STRING,
    UINT32,
    VERSIONS,
    TensorType,
)
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.dtypes import long_name
from rwkv_lab.errors import OutputError

Value = bool | int | float | str | Sequence[int] | Sequence[bytes]


def gguf_layout(tensors: Sequence[OutTensor], values: Sequence[tuple[str, Value]]) -> FileLayout:
    """Layout of a GGUF file.

    Args:
        values: of the header: whole numbers become uint32, in lists int32; other numbers float32.
    Raises:
        OutputError: a dtype that GGUF does not have.
    """
    starts, end = [], 0
    for t in tensors:
        starts.append(end)
        end += t.nbytes + -t.nbytes % ALIGNMENT
    head = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(values))]
    head += [_text(key.encode()) + _value(value) for key, value in values]
    for t, start in zip(tensors, starts, strict=True):
        dims = tuple(reversed(t.shape))  # innermost first
        numbers = (len(dims), *dims, tensor_type(t).number, start)
        head.append(_text(t.name.encode()) + struct.pack(f"<I{len(dims)}QIQ", *numbers))
    header = b"".join(head)
    header += b"\0" * (-len(header) % ALIGNMENT)
    padding = b"\0" * (-tensors[-1].nbytes % ALIGNMENT) if tensors else b""
    size = len(header) + end
    rest = [(0, header), (size - len(padding), padding)]
    return FileLayout(tuple(len(header) + s for s in starts), size, lambda crcs: rest)


def tensor_type(t: OutTensor) -> TensorType:
    """How its elements lie in the file.

    Raises:
        OutputError: GGUF has no such type.
    """
    if t.quantised:
        return BY_NAME[t.quantised]
    if long_name(t.dtype) not in BY_DTYPE:
        raise OutputError(f"{t.name} is {t.dtype}, which a GGUF file cannot hold; choose another dtype or format")
    return BY_DTYPE[long_name(t.dtype)]


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value.encode())
    if isinstance(value, bool | int | float):
        kind = BOOL if isinstance(value, bool) else UINT32 if isinstance(value, int) else FLOAT32
        return struct.pack("<I", kind) + SCALARS[kind].pack(value)
    texts = [_text(v) for v in value if isinstance(v, bytes)]
    if texts:
        return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(texts)
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
