"""Memory for what every token needs anew, without asking the system for it every time.

A state of some megabytes that is allocated for each token costs a page fault for every 4 KB, which took as long as an
eighth of the token itself. Here a block is used again as soon as the last tensor that looks at it is gone.
"""

import ctypes
import weakref

import torch

_FROM = 1 << 16  # bytes: smaller ones cost the system's allocator nothing
_KEPT = 4  # blocks of one size that lie ready at most: a token's state is made while the one before is still there

_free: dict[int, list[torch.Tensor]] = {}  # bytes -> blocks


def recycled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor as `torch.empty` gives it, on the CPU; its memory comes back here when nothing refers to it any more."""
    count = 1
    for size in shape:
        count *= size
    nbytes = count * dtype.itemsize
    if nbytes < _FROM:
        return torch.empty(shape, dtype=dtype)
    try:
        block = _free[nbytes].pop()
    except (KeyError, IndexError):
        block = torch.empty(nbytes, dtype=torch.uint8)
    # The tensor's storage holds `lease`, whatever views and copies of the tensor there are; its end is the block's.
    lease = (ctypes.c_byte * nbytes).from_address(block.data_ptr())
    weakref.finalize(lease, _give_back, nbytes, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


def _give_back(nbytes: int, block: torch.Tensor) -> None:
    blocks = _free.setdefault(nbytes, [])
    if len(blocks) < _KEPT:
        blocks.append(block)
