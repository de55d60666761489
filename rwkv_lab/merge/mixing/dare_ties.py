"""Method "dare_ties": deltas of which most values are dropped at random, then of the rest those whose signs agree."""

from typing import Annotated

from torch import Tensor

from rwkv_lab.merge.mixing.dare_linear import Density, Rescale, Seed, drop
from rwkv_lab.merge.mixing.signature import Draws, Takes, Tensors
from rwkv_lab.merge.mixing.task_arithmetic import Scale, Weights
from rwkv_lab.merge.mixing.ties import elect


def dare_ties(
    base: Tensor,
    tuned: Tensors,
    *,
    draws: Draws,
    alpha: Scale = 1.0,
    weights: Weights = 1.0,
    density: Density = 0.5,
    rescale: Rescale = True,
    normalize: Annotated[bool, Takes("mean of the values that agree, instead of their sum")] = True,
    seed: Seed = 0,
) -> Tensor:
    return elect(drop(base, tuned, draws, density, rescale, seed), base, alpha, weights, normalize)
