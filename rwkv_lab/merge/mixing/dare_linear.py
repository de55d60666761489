"""Method "dare_linear": task arithmetic on deltas of which most values are dropped at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import Takes
from rwkv_lab.merge.mixing.task_arithmetic import EQUAL, Scale, Weights, add
from rwkv_lab.merge.mixing_method import Draws, Tensors, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, added

Density = Annotated[Sequence[float], Takes("share of each delta that is kept, at random", 0, 1, "tuned")]
HALF: Any = 0.5  # of every delta
Rescale = Annotated[bool, Takes("divide what is kept by density, so that its mean stays")]
Seed = Annotated[int, Takes("the same seed gives the same file", 0, 2**63 - 1)]


def proof(
    t: WholeTensor,
    *,
    alpha: float,
    weights: list[float] | float,
    density: list[float] | float,
    rescale: bool,
    normalize: bool,
    seed: int,
) -> Exact:
    w = t.each(weights)
    kept, scale = kept_at_random(t, t.each(density), rescale, seed)
    return added(t, w, alpha, math.fsum(w) if normalize else 1.0, kept, scale)


def kept_at_random(
    t: WholeTensor, density: list[float], rescale: bool, seed: int
) -> tuple[list[torch.Tensor], list[float]]:
    """For the proof: masks of what a random choice keeps, from the beginning of its stream of 32-bit words, and what
    each delta is multiplied with."""
    masks = []
    for m, share in enumerate(density):
        key = np.frombuffer(sha256(f"{seed}/{m}/{t.name}".encode()).digest()[:16], "<u8")
        words = np.random.Philox(key=key).random_raw(-(-len(t.base) // 2)).astype("<u8").view("<u4")[: len(t.base)]
        masks.append(torch.from_numpy(words < share * 2.0**32))
    return masks, [1 / share if rescale and share else 1.0 for share in density]


@mixing_method("DARE with task arithmetic", proof)
def dare_linear(
    base: torch.Tensor,
    tuned: Tensors,
    *,
    draws: Draws,
    alpha: Scale = 1.0,
    weights: Weights = EQUAL,
    density: Density = HALF,
    rescale: Rescale = True,
    normalize: Annotated[bool, Takes("divide by the sum of the weights")] = False,
    seed: Seed = 0,
) -> torch.Tensor:
    return add(drop(base, tuned, draws, density, rescale, seed), base, alpha, weights, normalize)


def drop(
    base: torch.Tensor, tuned: Sequence[torch.Tensor], draws: Draws, density: Sequence[float], rescale: bool, seed: int
) -> list[torch.Tensor]:
    """The deltas with values dropped: value i of model m is kept where draws(seed, m)[i] < density."""
    out = []
    for m, (t, share) in enumerate(zip(tuned, density, strict=True)):
        delta = t - base
        if share < 1:
            delta = delta * (draws(seed, m) < share)  # a product, so that a NaN stays one
        out.append(delta / share if rescale and share not in (0, 1) else delta)
    return out
