"""Tensors where they lie in a file: its pages come into memory as they are read, and go again where memory is short."""

import mmap

import torch

from rwkv_lab.checkpoint.source import TensorInfo


def mapped(info: TensorInfo) -> torch.Tensor:
    """A tensor of a file without a copy of it, for as long as it is used; writing into it changes memory alone.

    One with a checksum, or whose place does not suit its dtype, is read. A file that is shortened meanwhile takes the
    process with it; one that is replaced stays as it was.
    """
    if not info.plain or info.crc32 is not None or info.offset % info.itemsize or not info.nbytes:
        return info.read()
    start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(info.file.fd, info.offset - start + info.nbytes, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(pages, dtype=info.dtype, count=info.numel, offset=info.offset - start).view(info.shape)
