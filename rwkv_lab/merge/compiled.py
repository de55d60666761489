"""The compiled functions of a merge, kernels/cpu/merge.cpp."""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import cache

from rwkv_lab.errors import KernelError
from rwkv_lab.lazy_torch import torch

log = logging.getLogger(__name__)

_LEAST = 1 << 18  # values of a tensor: a merge of small ones does not wait for a compiler


def worth_compiling(values: int) -> bool:
    """Whether a tensor of so many values is."""
    return values >= _LEAST


def functions() -> ctypes.CDLL | None:
    """`merge_effect` and `merge_low_rank`; None, and said once, where they cannot be compiled."""
    with _one_thread:  # the first of those that write an output; the others wait
        return _functions()


_one_thread = threading.Lock()


@cache
def _functions() -> ctypes.CDLL | None:
    from rwkv_lab.wkv.loader import cpu_library  # imports torch, which a refusal does not wait for
    from rwkv_lab.wkv.pointers import Span

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


def effect_sums(before: torch.Tensor, values: torch.Tensor, rounded: torch.Tensor) -> list[float] | None:
    """Four sums over flat tensors of equal length, as kernels/cpu/merge.cpp describes them; None where there is no
    compiled function for their dtypes.

    Args:
        before: the base's values, which are numbers of the dtype of `rounded`.
        values: float32.
    """
    from rwkv_lab.wkv.pointers import DTYPES, check, new, span, span_of_new

    library = functions()
    if library is None or before.dtype not in DTYPES or rounded.dtype not in DTYPES:
        return None
    shape, sums = (len(values),), new((4,), torch.float64)
    of_base, of_output = (span(before, shape), DTYPES[before.dtype]), (span(rounded, shape), DTYPES[rounded.dtype])
    where = span_of_new(sums)
    code = library.merge_effect(span(values, shape, torch.float32), *of_base, *of_output, len(values), where)
    check(code, "merge_effect")
    return sums.tolist()


def low_rank_added(
    rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, library: ctypes.CDLL
) -> tuple[torch.Tensor, list[float]]:
    """(rows + left · right, rounded to their dtype once, four sums as of `effect_sums`). Where a sum is not finite, the
    values mean nothing.

    Args:
        rows: `[n, columns]`, float32 or bfloat16.
        left, right: `[n, k]`, `[k, columns]`, float32.
        library: of `functions`.
    """
    from rwkv_lab.wkv.pointers import DTYPES, check, new, span, span_of_new

    (n, columns), k = rows.shape, left.shape[1]
    out, sums = torch.empty_like(rows), new((4,), torch.float64)
    factors = span(left, (n, k), torch.float32), span(right, (k, columns), torch.float32)
    of_rows, of_output = span(rows, (n, columns)), span(out, (n, columns))
    code = library.merge_low_rank(of_rows, *factors, of_output, DTYPES[rows.dtype], n, columns, k, span_of_new(sums))
    check(code, "merge_low_rank")
    return out, sums.tolist()
