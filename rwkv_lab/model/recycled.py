"""Memory for what every token needs anew, without asking the system for it every time.

A state of some megabytes that is allocated for each token costs a page fault for every 4 KB, which took as long as an
eighth of the token itself. Here a block is used again as soon as the last tensor that looks at it is gone.
"""

import ctypes
import math
import weakref

import torch

_LINE = 64  # bytes: where tensors begin
_FROM = 1 << 16  # bytes: smaller ones cost the system's allocator nothing
_KEPT = 4  # blocks of one size that lie ready at most: a token's state is made while the one before is still there

_free: dict[int, list[torch.Tensor]] = {}  # bytes -> blocks


def recycled(*wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Tensors of these shapes and dtypes as `torch.empty` gives them, on the CPU, side by side in one block, which
    comes back here when nothing refers to any of them any more."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // _LINE) * _LINE for shape, dtype in wanted]
    nbytes = sum(sizes)
    if nbytes < _FROM:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in wanted]
    try:
        block = _free[nbytes].pop()
    except (KeyError, IndexError):
        block = torch.empty(nbytes, dtype=torch.uint8)
    # The tensors' storages hold `lease`, whatever views and copies there are of them; its end is the block's.
    lease = (ctypes.c_byte * nbytes).from_address(block.data_ptr())
    weakref.finalize(lease, _give_back, nbytes, block).atexit = False
    tensors, at = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        flat = torch.frombuffer(lease, dtype=dtype, count=math.prod(shape), offset=at)
        tensors.append(flat.view(shape))
        at += size
    return tensors


def _give_back(nbytes: int, block: torch.Tensor) -> None:
    blocks = _free.setdefault(nbytes, [])
    if len(blocks) < _KEPT:
        blocks.append(block)
