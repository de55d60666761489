"""What the values of a tensor look like, without holding more than a block of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.checkpoint.source import TensorInfo
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import Progress


@dataclass(frozen=True)
class Statistics:
    """Of the finite values of one tensor, in float64; NaN where there are none. Complex values count as two each."""

    min: float
    max: float
    mean: float
    std: float  # of the whole population
    nan: int
    inf: int
    zeros: int

    @property
    def absmax(self) -> float:
        return max(abs(self.min), abs(self.max))


def statistics(ck: Checkpoint) -> dict[str, Statistics]:
    """Statistics of every tensor of an open checkpoint, by name, read once from start to end.

    Raises:
        CorruptFileError: the file ends early.
    """
    with Progress("reading values", sum(t.nbytes for t in ck.info.values())) as progress:
        return {name: _of_tensor(info, progress) for name, info in ck.info.items()}


def _of_tensor(info: TensorInfo, progress: Progress) -> Statistics:
    low, high = math.inf, -math.inf
    count, mean, squares = 0, 0.0, 0.0  # squares: sum of squared distances from the mean
    nan = inf = zeros = 0
    for block in info.blocks():
        values = (torch.view_as_real(block).flatten() if block.is_complex() else block).double()
        finite = torch.isfinite(values)
        if not finite.all():
            nan += int(values.isnan().sum())
            inf += int(values.isinf().sum())
            values = values[finite]
        zeros += int((values == 0).sum())
        progress.advance(block.nbytes)
        n = len(values)
        if n == 0:
            continue
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        # Joining two means and sums of squares (Chan et al.) loses nothing where the mean is far from zero.
        there, gap = float(values.mean()), float(values.mean()) - mean
        squares += float((values - there).square().sum()) + gap * gap * count * n / (count + n)
        mean += gap * n / (count + n)
        count += n
    if count == 0:
        return Statistics(math.nan, math.nan, math.nan, math.nan, nan, inf, zeros)
    return Statistics(low, high, mean, math.sqrt(squares / count), nan, inf, zeros)
