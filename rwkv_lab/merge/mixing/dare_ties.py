"""Method "dare_ties": deltas of which most values are dropped at random, then of the rest those whose signs agree."""

from __future__ import annotations

from typing import Annotated

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import Takes
from rwkv_lab.merge.mixing.dare_linear import HALF, Density, Rescale, Seed, drop, kept_at_random
from rwkv_lab.merge.mixing.task_arithmetic import EQUAL, Scale, Weights
from rwkv_lab.merge.mixing.ties import elect
from rwkv_lab.merge.mixing_method import Draws, Tensors, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, elected


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
    kept, scale = kept_at_random(t, t.each(density), rescale, seed)
    return elected(t, t.each(weights), alpha, normalize, kept, scale)


@mixing_method("DARE with TIES", proof)
def dare_ties(
    base: torch.Tensor,
    tuned: Tensors,
    *,
    draws: Draws,
    alpha: Scale = 1.0,
    weights: Weights = EQUAL,
    density: Density = HALF,
    rescale: Rescale = True,
    normalize: Annotated[bool, Takes("mean of the values that agree, instead of their sum")] = True,
    seed: Seed = 0,
) -> torch.Tensor:
    return elect(drop(base, tuned, draws, density, rescale, seed), base, alpha, weights, normalize)
