"""The compiled functions of a merge, kernels/cpu/merge.cpp."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

from rwkv_lab.errors import KernelError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.wkv.loader import cpu_library
from rwkv_lab.wkv.pointers import DTYPES, Span, span

log = logging.getLogger(__name__)

_LEAST = 1 << 18  # values of a tensor: a merge of small ones does not wait for a compiler


def worth_compiling(values: int) -> bool:
    """Whether a tensor of so many values is."""
    return values >= _LEAST


@cache
def functions() -> ctypes.CDLL | None:
    """`merge_effect` and `merge_low_rank`; None, and said once, where they cannot be compiled."""
    try:
        library = cpu_library("merge")
    except KernelError as e:
        log.info("merging in torch, which is slower: %s", e)
        return None
    size = ctypes.c_int64
    library.merge_effect.argtypes = Span, Span, size, Span, size, size, Span
    library.merge_low_rank.argtypes = *(Span,) * 4, *(size,) * 4, Span
    for function in (library.merge_effect, library.merge_low_rank):
        function.restype = size
    return library


def span_and_dtype(x: torch.Tensor) -> tuple[Span, int]:
    """Of a contiguous tensor, as the functions take it."""
    return span(x, x.shape), DTYPES[x.dtype]


def new_sums() -> tuple[ctypes.Array[ctypes.c_double], Span]:
    """Four numbers for the functions to write, and their place."""
    sums = (ctypes.c_double * 4)()
    return sums, Span(ctypes.addressof(sums), ctypes.sizeof(sums))
