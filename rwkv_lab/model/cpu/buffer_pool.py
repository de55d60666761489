"""Memory for what every token needs anew, without asking the system for it every time.

A state of some megabytes that is allocated for each token costs a page fault for every 4 KB, which took as long as an
eighth of the token itself. Here a block is used again as soon as the last tensor on it is gone.
"""

import ctypes
import math

import torch

from rwkv_lab.wkv.pointers import new, span

_LINE = 64  # bytes: where parts begin
_KEPT = 4  # blocks of one size that lie ready at most: a token's state is made while the one before is still there
_SIZES = 4  # sizes of which blocks lie ready, the last ones used: states and logits of two models

_free: dict[int, list[tuple[torch.Tensor, int]]] = {}  # bytes -> blocks and their addresses; last used last


class Memory:
    """A block of memory on the CPU for a few tensors side by side. It is there for others again when nothing refers to
    it or to one of its tensors any more.

    address: where it begins.
    offsets: where its parts begin, in bytes behind that.
    sizes: of its parts, in bytes.
    """

    __slots__ = ("_block", "_nbytes", "_parts", "address", "offsets", "sizes")

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]):
        self._parts, self.offsets, self.sizes, self._nbytes = parts, [], [], 0
        for shape, dtype in parts:
            self.offsets.append(self._nbytes)
            self.sizes.append(math.prod(shape) * dtype.itemsize)
            self._nbytes += -(-self.sizes[-1] // _LINE) * _LINE
        try:
            self._block, self.address = _free[self._nbytes].pop()
        except (KeyError, IndexError):
            self._block = new((self._nbytes,), torch.uint8)
            self.address = span(self._block, (self._nbytes,), torch.uint8).data

    def tensors(self) -> list[torch.Tensor]:
        """Its parts, with the shapes and dtypes asked for."""
        # Each tensor's storage holds `lease`, whatever views and copies of it there are, and `lease` holds this object.
        lease = (ctypes.c_byte * self._nbytes).from_address(self.address)
        lease.memory = self  # pyright: ignore[reportAttributeAccessIssue]
        return [
            torch.frombuffer(lease, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
            for (shape, dtype), offset in zip(self._parts, self.offsets, strict=True)
        ]

    def __del__(self, free: dict = _free) -> None:  # the name `_free` may be gone by then
        blocks = free.pop(self._nbytes, [])
        if len(blocks) < _KEPT:
            blocks.append((self._block, self.address))
        free[self._nbytes] = blocks
        for size in [*free][:-_SIZES]:
            free.pop(size, None)
