"""A file that tensors are read from: its bytes by position, never mapped, and what is known of each tensor in it.

Files are read by `pread`: a mapped file that shrinks, or a network disk that fails, kills the process without a
message.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from isal.isal_zlib import crc32

from rwkv_lab.arguments import checked
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch

ITEM_BYTES = {  # of an element, by torch's name of its dtype
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
_READ_MAX = 1 << 30  # bytes of one call; macOS refuses 2 GiB
BLOCK = 1 << 20  # bytes; smaller ones cost more calls than they save, larger ones leave the caches
# Bytes of one write. For larger ones Linux takes large pieces of free memory; in a virtual machine that has given such
# memory back, writing 3 GB took 7 s instead of 1 s.
WRITE_BLOCK = 1 << 18


class SourceFile:
    """An open file, read by position; safe to share between threads.

    Raises:
        CorruptFileError: the path cannot be opened, or ends before the bytes that were asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        self.fd = self._open()
        self.size = os.fstat(self.fd).st_size

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as e:
            raise CorruptFileError(f"cannot open {self.path}: {e.strerror}") from e

    def read(self, offset: int, nbytes: int) -> bytes:
        self._refuse_closed()
        data = os.pread(self.fd, min(nbytes, _READ_MAX), offset)
        if len(data) < nbytes:  # a signal or a network disk may cut one read short; the end of the file cuts all
            buffer = bytearray(nbytes)
            buffer[: len(data)] = data
            self.read_into(memoryview(buffer)[len(data) :], offset + len(data))
            return bytes(buffer)
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._refuse_closed()
        done = 0
        while done < len(buffer):
            n = self._read_some(buffer[done : done + _READ_MAX], offset + done)
            if n == 0:
                raise CorruptFileError(
                    f"{self.path} ends at byte {offset + done}, {len(buffer) - done} bytes early; it looks truncated"
                )
            done += n

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ParameterError(f"{self.path} was closed: read it inside the `with` block, or open it again")

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.fd, [buffer], offset)
        data = os.pread(self.fd, len(buffer), offset)  # older macOS
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # the system gives the number to the next file that is opened: never read from that
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def reopen(self) -> None:
        """Open the path again after `close`.

        Raises:
            CorruptFileError: it cannot be opened any more.
        """
        if self.closed:
            self.fd = self._open()


@dataclass(frozen=True)
class Derived:
    """How the values of a tensor follow from what lies in the file, where no stride describes that.

    Attributes:
        of: what lies in the file.
        compute: from its values to those of the tensor, of any shape: elements are taken in order. With a `unit`, from
            a flat run of whole units.
        unit: (elements of `of`, elements of the tensor that follow from them alone); None where all are needed.
        quantised: the type in the file where it has fewer bits per value than `dtype`, such as "Q8_0".
        others: what else in the file `compute` reads.
    """

    of: TensorInfo
    compute: Callable[[torch.Tensor], torch.Tensor]
    unit: tuple[int, int] | None = None
    quantised: str = ""
    others: tuple[TensorInfo, ...] = ()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it; its data is not read."""

    name: str
    shape: tuple[int, ...]
    dtype_name: str  # torch's, "bfloat16"
    file: SourceFile
    offset: int  # where the bytes of its first element lie in the file
    stride: tuple[int, ...] | None = None  # in elements; None where row-major and dense, as nearly always
    crc32: int | None = None  # of the bytes it spans, where the file records it and they are the whole record
    storage: tuple[int, int] | None = None  # (offset, bytes) of the storage it is a view of; equal for tied tensors
    derived: Derived | None = None  # where its values are computed from those at `offset`

    @property
    def dtype(self) -> torch.dtype:
        """That of its elements; this imports torch."""
        return getattr(torch, self.dtype_name)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype_name]

    @property
    def plain(self) -> bool:
        """Whether its elements lie in the file one after the other, as they are."""
        return self.stride is None and self.derived is None

    @property
    def gathered(self) -> int:
        """Bytes of memory that reading it in blocks takes beyond a few blocks; 0 unless it has to be read whole."""
        if self.plain or (self.derived is not None and self.derived.unit is not None):
            return 0
        return self.span + self.nbytes

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of its elements written one after the other."""
        return self.numel * self.itemsize

    @property
    def span(self) -> int:
        """Bytes from its first element to the end of its last, in the file."""
        if self.derived is not None:
            return self.derived.of.span
        if self.stride is None or self.numel == 0:
            return self.nbytes
        last = sum((d - 1) * s for d, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.itemsize

    @checked
    def check(self, crc: int) -> None:
        """Refuse bytes whose checksum is not the recorded one. Nothing happens where none is recorded.

        Raises:
            CorruptFileError: with both checksums.
        """
        if self.crc32 is not None and crc != self.crc32:
            raise CorruptFileError(
                f"{self.file.path}: the bytes of {self.name} do not have the checksum that was saved with them "
                f"({crc:08x}, recorded {self.crc32:08x}).\n"
                "It was damaged after it was saved; download or copy it again."
            )

    def read(self) -> torch.Tensor:
        """The tensor, dense and row-major, in memory of its own."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.derived is not None:
            values, at = torch.empty(self.numel, dtype=self.dtype, device="cpu"), 0
            for block in self.blocks():
                values[at : at + len(block)] = block
                at += len(block)
            return values.view(self.shape)
        buffer = bytearray(self.span)
        self.file.read_into(memoryview(buffer), self.offset)
        if self.crc32 is not None:
            self.check(crc32(buffer))
        flat = torch.frombuffer(buffer, dtype=self.dtype)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    @checked
    def blocks(self, multiple: Annotated[int, Ge(1), Le(2**31)] = 1) -> Iterator[torch.Tensor]:
        """Its values in order, as flat tensors of about `BLOCK` bytes, each a whole number of `multiple` elements."""
        whole = math.lcm(multiple, self._whole)
        return self.pieces(max(BLOCK // self.itemsize // whole, 1) * whole)

    @property
    def _whole(self) -> int:
        """Number of elements that are only computed together."""
        if self.derived is None or self.derived.unit is None:
            return 1
        raw, made = self.derived.unit
        return math.lcm(self.derived.of._whole, raw) // raw * made

    @checked
    def pieces(self, size: int) -> Iterator[torch.Tensor]:
        """Its values in order, as flat tensors of `size` elements; the last may have fewer.

        Raises:
            ParameterError: its elements are computed together in larger numbers.
            CorruptFileError: they do not have the checksum that was saved with them.
        """
        if size < 1 or size % self._whole:
            raise ParameterError(f"size is {size}; of {self.name} it must be a multiple of {self._whole}.")
        return self._pieces(size)

    def _pieces(self, size: int) -> Iterator[torch.Tensor]:
        if self.derived is not None:
            yield from _computed(self.derived, size)
            return
        if self.stride is not None:  # a strided view has to be gathered first, in memory as large as what it spans
            yield from self.read().flatten().split(size)
            return
        step, crc = size * self.itemsize, 0
        for start in range(0, self.nbytes, step):
            data = np.empty(min(step, self.nbytes - start), np.uint8)  # a bytearray would be filled with zeros first
            self.file.read_into(data.data, self.offset + start)
            if self.crc32 is not None:
                crc = crc32(data.data, crc)
                if start + step >= self.nbytes:  # before the last block is handed out: the caller may stop there
                    self.check(crc)
            yield torch.from_numpy(data).view(self.dtype)


def _computed(derived: Derived, size: int) -> Iterator[torch.Tensor]:
    """As `TensorInfo.pieces`."""
    if derived.unit is None:
        yield from derived.compute(derived.of.read()).flatten().split(size)
        return
    raw, made = derived.unit
    for piece in derived.of.pieces(size // made * raw):
        yield derived.compute(piece).flatten()


def is_name(name: object) -> bool:
    """Whether a file may call a tensor that: text that can be shown and written, without control characters."""
    return isinstance(name, str) and name.isprintable()


def dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True where the strides are those of a dense row-major tensor; dimensions of size 1 may have any."""
    expected = 1
    for d, s in zip(reversed(shape), reversed(stride), strict=True):
        if d == 0:
            return True
        if d != 1 and s != expected:
            return False
        expected *= d
    return True
