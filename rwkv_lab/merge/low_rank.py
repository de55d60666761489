"""Changes of low rank, which a compiled function adds, rounds and measures in one pass: kernels/cpu/merge.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.changed_tensors import Computed
from rwkv_lab.merge.compiled import functions, low_rank_added, worth_compiling
from rwkv_lab.merge.effect_sums import sums_from
from rwkv_lab.peft.adapter import Target


@dataclass(frozen=True)
class LowRankChange:
    """left · right, of a matrix `[out, in]`."""

    left: torch.Tensor  # [out, k], float32
    right: torch.Tensor  # [k, in], float32
    library: ctypes.CDLL

    def added_to(self, rows: torch.Tensor, first_row: int) -> Computed:
        """The changed rows, flat: in the dtype of `rows`, with what was measured. Where float32 cannot hold the sums,
        or a value is not finite, in float32 and with the rows, to be measured as any other values are.

        Args:
            rows: `[n, in]` of the matrix, contiguous.
        """
        left = self.left[first_row : first_row + len(rows)]
        out, found = low_rank_added(rows, left, self.right, self.library)
        sums = sums_from(found)
        if sums.are_exact(out.numel()):
            return out.flatten(), sums
        before = rows.float()
        return torch.addmm(before, left, self.right).flatten(), before.flatten()


def can_be_fused(info: TensorInfo, precision: torch.dtype) -> bool:
    """Whether there is a compiled function for a matrix, and it is worth it."""
    return precision == torch.float32 and info.dtype in (torch.float32, torch.bfloat16) and worth_compiling(info.numel)


def low_rank_change(steps: Sequence[tuple[Target, float]]) -> LowRankChange | None:
    """What adapters with their weights add to a matrix; None where one has no factors, or nothing can be compiled."""
    factors = [target.prepared(weight, torch.float32).factors() for target, weight in steps]
    pairs = [pair for pair in factors if pair is not None]
    library = functions()
    if library is None or len(pairs) < len(factors):
        return None
    left = torch.cat([left for left, _ in pairs], 1).float()
    return LowRankChange(left, torch.cat([right for _, right in pairs]).float(), library)
