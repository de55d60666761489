"""Method "ties": of each model's delta only the largest values, and of those the ones whose sign prevails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import Takes
from rwkv_lab.merge.mixing.task_arithmetic import EQUAL, Scale, Weights
from rwkv_lab.merge.mixing_method import Blocks, Look, Tensors, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, elected
from rwkv_lab.merge.weight_sum import NOTHING, check_sum

FIFTH: Any = 0.2  # of every delta
_HIGH, _LOW = 16, 15  # bits of |float32| that each of the two passes counts


def smallest_kept(blocks: Blocks, density: Sequence[float]) -> list[float]:
    """For each tuned model the magnitude of the k-th largest delta, k = density · numel rounded down, and at least 1.

    Two passes: the bits of a positive float32 are ordered as its values are, so counting the upper ones finds the bin
    that the k-th value is in, and counting the lower ones of that bin's members finds the value.
    """
    high = [torch.zeros(1 << _HIGH, dtype=torch.int64, device="cpu") for _ in density]
    for base, tuned in blocks():
        for counts, t in zip(high, tuned, strict=True):
            counts += torch.bincount(_bits(t - base) >> _LOW, minlength=1 << _HIGH)
    places = [_place(counts, share) for counts, share in zip(high, density, strict=True)]
    low = [torch.zeros(1 << _LOW, dtype=torch.int64, device="cpu") for _ in density]
    if any(place is not None for place in places):
        for base, tuned in blocks():
            for counts, t, place in zip(low, tuned, places, strict=True):
                if place is not None:
                    bits = _bits(t - base)
                    inside = bits[bits >> _LOW == place[0]] & ((1 << _LOW) - 1)
                    counts += torch.bincount(inside, minlength=1 << _LOW)
    found = []
    for counts, place, share in zip(low, places, density, strict=True):
        if place is None:
            found.append(math.inf if share == 0 else 0.0)
            continue
        last = _from_above(counts, place[1])[0]
        bits = torch.tensor(place[0] << _LOW | last, dtype=torch.int32, device="cpu")
        found.append(float(bits.view(torch.float32)))
    return found


def proof(
    t: WholeTensor,
    *,
    alpha: float,
    weights: list[float] | float,
    density: list[float] | float,
    normalize: bool,
) -> Exact:
    kept = [_largest(t, tuned, share) for tuned, share in zip(t.tuned, t.each(density), strict=True)]
    return elected(t, t.each(weights), alpha, normalize, kept)


def _largest(t: WholeTensor, tuned: torch.Tensor, density: float) -> torch.Tensor:
    """Mask of the values of a delta that are at least as large as its k-th largest; magnitudes are of float32."""
    size = (tuned.to(t.precision) - t.base.to(t.precision)).abs().float()
    if density == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    k = max(int(density * len(size)), 1)
    return size >= torch.kthvalue(size, len(size) - k + 1).values


@mixing_method("TIES", proof)
def ties(
    base: torch.Tensor,
    tuned: Tensors,
    *,
    thresholds: Annotated[list[float], Look(smallest_kept)],
    alpha: Scale = 1.0,
    weights: Weights = EQUAL,
    density: Annotated[
        Sequence[float], Takes("share of each delta that is kept, largest first", 0, 1, "tuned")
    ] = FIFTH,
    normalize: Annotated[bool, Takes("mean of the values that agree, instead of their sum")] = True,
) -> torch.Tensor:
    """Values as large as the smallest that is kept are kept too: the order in a file decides nothing."""
    # Products with the mask, no choice by it: a NaN of a model must come out as one.
    deltas = [d * (d.abs().float() >= smallest) for d, smallest in zip(_deltas(base, tuned), thresholds, strict=True)]
    return elect(deltas, base, alpha, weights, normalize)


def elect(
    deltas: Sequence[torch.Tensor], base: torch.Tensor, alpha: float, weights: Sequence[float], normalize: bool
) -> torch.Tensor:
    """base + alpha · (mean or sum of those weighted deltas whose sign is that of the sum of all; + where it is 0).

    The mean divides by the sum of the weights that agree, but where they cancel (|sum| at most 1e-6 of the sum of their
    magnitudes, such as 1.1 + 2.2 - 3.3): there it is 0 but for rounding, and the sum of the deltas is taken as it is.
    """
    if normalize:
        check_sum(weights)
    opposed = min(weights) < 0 < max(weights)  # else no sum of them cancels, and float32 does
    weighted = [d * w for d, w in zip(deltas, weights, strict=True)]
    # 1 or -1; numbers, since torch is slow on booleans.
    elected = (sum(weighted[1:], weighted[0]).sign() + 0.5).sign()
    total = torch.zeros_like(base)
    counted = torch.zeros_like(base, dtype=torch.float64 if opposed else None)
    size = torch.zeros_like(counted)
    for d, w in zip(weighted, weights, strict=True):
        agrees = (d.sign() * elected).clamp_(min=0)  # 1 or 0
        total.addcmul_(d, agrees)
        counted.add_(agrees, alpha=w)
        if opposed:
            size.add_(agrees, alpha=abs(w))
    if normalize:
        total /= torch.where(counted.abs() <= NOTHING * size, 1, counted)
    return torch.add(base, total, alpha=alpha)


def _deltas(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t - base for t in tuned]


def _bits(delta: torch.Tensor) -> torch.Tensor:
    return delta.abs().float().view(torch.int32)


def _place(counts: torch.Tensor, density: float) -> tuple[int, int] | None:
    """(bin of the k-th largest, how many of that bin are needed); None where all or none are kept."""
    numel = int(counts.sum())
    if numel == 0 or density in (0, 1):
        return None
    return _from_above(counts, max(int(density * numel), 1))


def _from_above(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """(bin that holds the k-th value counted from the last bin down, its number within that bin, from 1)."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before
