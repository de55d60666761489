"""What of a merge's change is in a piece of its output, as sums over values: by kernels/cpu/merge.cpp, or in torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_lab.checkpoint.numerics import round_to
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.compiled import effect_sums as compiled_sums

_TINY = 1e-30  # mean square of Δ: far above 1.2e-38, below which float32 loses digits
_PIECE = 1 << 16  # elements that torch measures at a time: a few of them in float32 stay in a core's cache


class Sums(NamedTuple):
    """Δ is what was computed minus the base; what arrived is the output minus the base in the output's dtype."""

    moved: int  # values of the output that are not the base's
    wanted: float  # ‖Δ‖²
    along: float  # ⟨what arrived, Δ⟩
    size: float  # Σ |base|, which may be NaN or infinite; 0 where there is none

    def plus(self, other: Sums) -> Sums:
        """Those of two pieces together."""
        moved, wanted, along = self.moved + other.moved, self.wanted + other.wanted, self.along + other.along
        return Sums(moved, wanted, along, self.size + other.size)

    def are_exact(self, count: int) -> bool:
        """Whether float32 could hold the squares of so many values: none overflowed, and not most became 0."""
        nothing = self.moved == self.wanted == 0
        return math.isfinite(self.wanted + self.along) and (nothing or self.wanted >= _TINY * count)


NONE = Sums(0, 0.0, 0.0, 0.0)


def sums_from(found: Sequence[float]) -> Sums:
    """Those that a compiled function wrote."""
    return Sums(int(found[0]), *found[1:])


def sums_of(
    before: torch.Tensor | None, values: torch.Tensor, rounded: torch.Tensor, same_dtype: bool, compiled: bool
) -> Sums:
    """Sums over a piece of a tensor. NaN and Inf count as moved unless the base has the same there, and add nothing to
    `wanted` and `along`.

    Args:
        before: flat, the base's values, in any float dtype; None where it has no such tensor.
        values: flat, as they were computed.
        rounded: flat, as they are written.
        same_dtype: whether the base is stored in the dtype of `rounded`.
        compiled: use the kernel where it can be had and takes these dtypes.
    """
    if compiled and same_dtype and before is not None and values.dtype == torch.float32:
        found = compiled_sums(before, values, rounded)
        if found is not None and sums_from(found).are_exact(len(values)):
            return sums_from(found)
    total = NONE
    for i in range(0, len(values), _PIECE):
        part = slice(i, i + _PIECE)
        total = total.plus(
            _sums_in_torch(None if before is None else before[part], values[part], rounded[part], same_dtype)
        )
    return total


def _sums_in_torch(before: torch.Tensor | None, values: torch.Tensor, rounded: torch.Tensor, same_dtype: bool) -> Sums:
    wide = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32
    delta, change, base, differs = (buffer[: len(values)] for buffer in _scratch(wide))
    change.copy_(rounded)
    size = 0.0
    if before is None:
        delta.copy_(values)
    else:
        base.copy_(before)
        torch.sub(values.to(wide), base, out=delta)
        size = float(torch.linalg.vector_norm(base, 1))
        change.sub_(base if same_dtype else round_to(before, rounded.dtype).to(wide))
    np.not_equal(change.numpy(), 0, out=differs.numpy())
    sums = Sums(count(differs), float(delta.dot(delta)), float(delta.dot(change)), size)
    if sums.are_exact(len(values)):
        return sums
    moved, wanted, along = _of_odd_values(before, delta.double(), change.double(), rounded)
    return Sums(moved, wanted, along, size)


_local = threading.local()


def _scratch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three buffers of floats and one of truth values, of this thread: fresh ones cost as much as the arithmetic."""
    buffers = vars(_local).setdefault("buffers", {})
    if dtype not in buffers:
        floats = torch.empty(3, _PIECE, dtype=dtype, device="cpu")
        buffers[dtype] = (*floats, torch.empty(_PIECE, dtype=torch.bool, device="cpu"))
    return buffers[dtype]


def _of_odd_values(
    before: torch.Tensor | None, delta: torch.Tensor, change: torch.Tensor, rounded: torch.Tensor
) -> tuple[int, float, float]:
    """(moved, wanted, along) in float64, the latter two of finite values."""
    finite = delta.isfinite() & change.isfinite()
    odd = ~finite
    if before is not None:
        stored = before.to(rounded.dtype)
        odd &= ~((stored == rounded) | (stored.isnan() & rounded.isnan()))
    delta, change = delta[finite], change[finite]
    moved = count(change != 0) + count(odd)
    return moved, float(delta.dot(delta)), float(delta.dot(change))


def count(true: torch.Tensor) -> int:
    return int(np.count_nonzero(true.numpy()))  # of torch's own, ten times as slow


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two flat tensors of equal length have the same dtype and bytes."""
    return a.dtype == b.dtype and np.array_equal(a.view(torch.uint8).numpy(), b.view(torch.uint8).numpy())
