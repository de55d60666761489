"""Where every byte of an output file will lie, known before the first is written: .pth and .safetensors.

A `.pth` is a zip of stored records: the pickle that describes the tensors, one record per tensor aligned to 64 bytes,
and short ones for the version and the byte order. What is written here is what `torch.save` writes, with its checksums.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isal.isal_zlib import crc32

from rwkv_lab.checkpoint.safetensors_header import DTYPE_NAMES
from rwkv_lab.checkpoint.source import is_name
from rwkv_lab.checkpoint.torch_pickle import STORAGE_DTYPES
from rwkv_lab.dtypes import long_name
from rwkv_lab.errors import OutputError
from rwkv_lab.lazy_torch import torch


class Described(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class FileLayout:
    offsets: tuple[int, ...]  # of each tensor's data, in the order given
    size: int  # of the whole file
    rest: Callable[[Sequence[int]], list[tuple[int, bytes]]]  # CRC-32 of each tensor -> (offset, bytes) around the data


def file_layout(kind: str, tensors: Sequence[Described], notes: dict[str, str]) -> FileLayout:
    """Layout of a file of `kind` "pth" or "safetensors".

    Args:
        notes: short texts that travel in the file: metadata of a .safetensors, records of a .pth.
    Raises:
        OutputError: a dtype that the format does not have, or a name that no reader would accept.
    """
    unfit = next((t.name for t in tensors if not is_name(t.name) or t.name == "__metadata__"), None)
    if unfit is not None:
        raise OutputError(f"a tensor cannot be called {unfit!r}; name it in printable text")
    known = STORAGE_DTYPES.values() if kind == "pth" else DTYPE_NAMES
    odd = next((t for t in tensors if long_name(t.dtype) not in known), None)
    if odd is not None:
        raise OutputError(
            f"{odd.name} is {odd.dtype}, which a .{kind} file cannot hold; choose another dtype or format"
        )
    return _pth_layout(tensors, notes) if kind == "pth" else _safetensors_layout(tensors, notes)


def _safetensors_layout(tensors: Sequence[Described], notes: dict[str, str]) -> FileLayout:
    # Largest element first: then every tensor is aligned to its own element, which torch needs to view it in place.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    starts, end = [0] * len(tensors), 0
    for i in order:
        t = tensors[i]
        starts[i] = end
        end += t.nbytes
        header[t.name] = {
            "dtype": DTYPE_NAMES[long_name(t.dtype)],
            "shape": list(t.shape),
            "data_offsets": [starts[i], end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    return FileLayout(tuple(len(head) + s for s in starts), len(head) + end, lambda crcs: [(0, head)])


_ALIGNMENT = 64  # bytes; torch's own
_FOLDER = "archive"  # torch's own name where a file has none; one name for all outputs keeps them equal byte for byte
_UTF8 = 0x0800
_JANUARY_1980 = 33  # the zip format's first day: outputs must not depend on the clock
_BIG = 0xFFFFFFFF  # from here on a number moves into the zip64 fields …
_MOVED = 0xFFFFFFFF  # … and this stands in its place
_MANY = 0xFFFF  # the same two for the number of records


@dataclass(frozen=True)
class _Record:
    name: bytes
    nbytes: int
    header_offset: int
    data_offset: int
    payload: bytes | None  # None for a tensor, whose bytes come later

    def local_header(self, crc: int) -> bytes:
        big = self.nbytes >= _BIG
        extra = struct.pack("<HHQQ", 1, 16, self.nbytes, self.nbytes) if big else b""
        padding = self.data_offset - self.header_offset - 30 - len(self.name) - len(extra)
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
        size = _MOVED if big else self.nbytes
        fixed = (b"PK\3\4", 45 if big else 20, _UTF8, 0, 0, _JANUARY_1980, crc, size, size, len(self.name), len(extra))
        return struct.pack("<4s5HIIIHH", *fixed) + self.name + extra

    def directory_entry(self, crc: int) -> bytes:
        big_size, big_offset = self.nbytes >= _BIG, self.header_offset >= _BIG
        numbers = [self.nbytes] * 2 * big_size + [self.header_offset] * big_offset
        extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        size, offset = (_MOVED if big_size else self.nbytes), (_MOVED if big_offset else self.header_offset)
        version = 45 if numbers else 20
        fixed = (b"PK\1\2", version, version, _UTF8, 0, 0, _JANUARY_1980, crc, size, size, len(self.name), len(extra))
        return struct.pack("<4s6HIIIHH3H2I", *fixed, 0, 0, 0, 0, offset) + self.name + extra


def _pth_layout(tensors: Sequence[Described], notes: dict[str, str]) -> FileLayout:
    parts: list[tuple[str, int, bytes | None]] = []
    for name, payload in [("data.pkl", _pickle(tensors)), ("byteorder", b"little")]:
        parts.append((name, len(payload), payload))
    parts += [(f"data/{i}", t.nbytes, None) for i, t in enumerate(tensors)]
    for name, payload in [("version", b"3\n"), *((n, text.encode()) for n, text in notes.items())]:
        parts.append((name, len(payload), payload))

    records, end = [], 0
    for part, nbytes, payload in parts:
        name = f"{_FOLDER}/{part}".encode()
        data = end + 30 + len(name) + (20 if nbytes >= _BIG else 0) + 4
        data += -data % _ALIGNMENT
        records.append(_Record(name, nbytes, end, data, payload))
        end = data + nbytes
    directory = sum(len(r.directory_entry(0)) for r in records)
    tail = _directory_end(len(records), directory, end)

    def rest(crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        left = iter(crcs)
        checksums = [next(left) if r.payload is None else crc32(r.payload) for r in records]
        pairs = list(zip(records, checksums, strict=True))
        chunks = [(r.header_offset, r.local_header(crc)) for r, crc in pairs]
        chunks += [(r.data_offset, r.payload) for r in records if r.payload is not None]
        return [*chunks, (end, b"".join(r.directory_entry(crc) for r, crc in pairs) + tail)]

    return FileLayout(tuple(r.data_offset for r in records if r.payload is None), end + directory + len(tail), rest)


def _directory_end(count: int, size: int, offset: int) -> bytes:
    big = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    big += struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    needed = offset >= _BIG or size >= _BIG or count >= _MANY
    if needed:
        count, size, offset = _MANY, _MOVED, _MOVED
    return (big if needed else b"") + struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


class _Storage:
    def __init__(self, dtype: torch.dtype, key: int, numel: int):
        name = next(n for n, d in STORAGE_DTYPES.items() if d == long_name(dtype))
        self.persistent_id = ("storage", getattr(torch, name), str(key), "cpu", numel)


class _Tensor:
    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        stride, step = [], 1
        for d in reversed(shape):
            stride.insert(0, step)
            step *= max(d, 1)
        self.args = (storage, 0, tuple(shape), tuple(stride), False, OrderedDict())

    def __reduce__(self):
        from rwkv_lab.torch_private import rebuild_tensor  # brings torch, which headers do not need

        return rebuild_tensor, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _pickle(tensors: Sequence[Described]) -> bytes:
    """The pickle that `torch.save` would write for these tensors, each in a storage of its own.

    Raises:
        OutputError: this torch lacks the function that every .pth refers to.
    """
    from rwkv_lab.torch_private import rebuild_tensor

    if rebuild_tensor is None:
        raise OutputError(
            "This torch has no torch._utils._rebuild_tensor_v2, to which a .pth refers.\nWrite a .safetensors."
        )
    out = io.BytesIO()
    entries = OrderedDict()
    for i, t in enumerate(tensors):
        numel = t.nbytes // t.dtype.itemsize
        entries[t.name] = _Tensor(_Storage(t.dtype, i, numel), t.shape)
    _Pickler(out, protocol=2).dump(entries)
    return out.getvalue()
