"""Method "dare_linear": task arithmetic on deltas of which most values are dropped at random."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from rwkv_lab.merge.mixing.signature import Draws, Takes, Tensors
from rwkv_lab.merge.mixing.task_arithmetic import Scale, Weights, add

Density = Annotated[Sequence[float], Takes("share of each delta that is kept, at random", 0, 1, "tuned")]
Rescale = Annotated[bool, Takes("divide what is kept by density, so that its mean stays")]
Seed = Annotated[int, Takes("the same seed gives the same file", 0, 2**63 - 1)]


def dare_linear(
    base: Tensor,
    tuned: Tensors,
    *,
    draws: Draws,
    alpha: Scale = 1.0,
    weights: Weights = 1.0,
    density: Density = 0.5,
    rescale: Rescale = True,
    normalize: Annotated[bool, Takes("divide by the sum of the weights")] = False,
    seed: Seed = 0,
) -> Tensor:
    return add(drop(base, tuned, draws, density, rescale, seed), base, alpha, weights, normalize)


def drop(
    base: Tensor, tuned: Sequence[Tensor], draws: Draws, density: Sequence[float], rescale: bool, seed: int
) -> list[Tensor]:
    """The deltas with values dropped: value i of model m is kept where draws(seed, m)[i] < density."""
    out = []
    for m, (t, share) in enumerate(zip(tuned, density, strict=True)):
        delta = t - base
        if share < 1:
            delta = delta * (draws(seed, m) < share)  # a product, so that a NaN stays one
        out.append(delta / share if rescale and share not in (0, 1) else delta)
    return out
