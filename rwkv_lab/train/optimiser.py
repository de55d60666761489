"""AdamW as RWKV is trained with it: which parameter gets which learning rate and decay, and the rate over time."""

import math
from collections.abc import Mapping

import torch

from rwkv_lab.train.recipe import Recipe

# Factors on the learning rate, as RWKV-LM (its README and model.py) trains whole models: twice for the decays, `w0` of
# RWKV-7 and `time_decay` before it; three times for `time_first`, the bonus of RWKV-4 and 5.0.
_FASTER = {".att.w0": 2.0, ".att.time_decay": 2.0, ".att.time_first": 3.0}


def make_optimiser(trained: Mapping[str, torch.Tensor], recipe: Recipe, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over named parameters.

    Only matrices whose name ends in `.weight` decay, as RWKV-LM does it: no vectors, LayerNorms, low-rank pairs, states
    or adapters. Vectors that set how fast a state decays learn faster (`_FASTER`).

    Args:
        fused: torch's one-pass update; False where it does not know the kind of tensor.
    """
    groups: dict[tuple[float, float], list] = {}  # (weight decay, factor on lr)
    for name, parameter in trained.items():
        large = name.endswith(".weight") and parameter.ndim == 2
        factor = next((f for end, f in _FASTER.items() if name.endswith(end)), 1.0)
        groups.setdefault((recipe.weight_decay if large else 0.0, factor), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": recipe.lr * factor, "factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        betas=(0.9, 0.99),
        eps=1e-18,  # start values and gradients are tiny: a usual 1e-8 would slow them down
        fused=fused,
    )


def set_lr(optimiser: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Set and return the learning rate of `step` (from 0): linear warm-up, then a cosine down to the final share."""
    warmup = recipe.warmup_steps
    if step < warmup:
        share = (step + 1) / warmup
    else:
        wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (recipe.steps - warmup)))
        share = recipe.final_lr + (1 - recipe.final_lr) * wave
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * share * group["factor"]
    return recipe.lr * share
