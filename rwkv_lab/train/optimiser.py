"""AdamW as RWKV is trained with it: which parameter gets which learning rate and decay, and the rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_lab.lazy_torch import torch
from rwkv_lab.train.spec import KINDS, TrainSpec

# Factors on the learning rate, as RWKV-LM (its README and model.py) trains whole models: twice for the decays, `w0` of
# RWKV-7 and `time_decay` before it; three times for `time_first`, the bonus of RWKV-4 and 5.0.
_FASTER = {".att.w0": 2.0, ".att.time_decay": 2.0, ".att.time_first": 3.0}


@dataclass(frozen=True)
class Schedule:
    """The learning rate rises to `lr` over `warmup` of the steps, and falls on a cosine to `final_lr` times itself.

    weight_decay: of large matrices.
    begin: the first step; of a training that continues a finished one not 0. From there the rate rises over `warmup`
        steps to where it is on the cosine.
    """

    steps: int
    warmup: int
    lr: float
    final_lr: float
    weight_decay: float
    begin: int = 0


def schedule(spec: TrainSpec, begin: int = 0) -> Schedule:
    """That of a training."""
    kind = KINDS[spec.kind].defaults
    return Schedule(
        spec.effective("steps"), spec.warmup_steps, spec.effective("lr"), kind.final_lr, kind.weight_decay, begin
    )


def make_optimiser(trained: Mapping[str, torch.Tensor], over: Schedule, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over named parameters.

    Only matrices whose name ends in `.weight` decay, as RWKV-LM does it: no vectors, LayerNorms, low-rank pairs, states
    or adapters. Vectors that set how fast a state decays learn faster (`_FASTER`).

    Args:
        fused: torch's one-pass update; False where it does not take the kind of tensor.
    """
    groups: dict[tuple[float, float], list] = {}  # (weight decay, factor on lr)
    for name, parameter in trained.items():
        large = name.endswith(".weight") and parameter.ndim == 2
        factor = next((f for end, f in _FASTER.items() if name.endswith(end)), 1.0)
        groups.setdefault((over.weight_decay if large else 0.0, factor), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": over.lr * factor, "factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        betas=(0.9, 0.99),
        eps=1e-18,  # start values and gradients are tiny: a usual 1e-8 would slow them down
        fused=fused,
    )


def set_lr(optimiser: torch.optim.Optimizer, over: Schedule, step: int) -> float:
    """Set and return the learning rate of `step` (from 0)."""
    if step < over.warmup:
        share = (step + 1) / over.warmup
    else:
        wave = 0.5 * (1 + math.cos(math.pi * (step - over.warmup) / (over.steps - over.warmup)))
        share = over.final_lr + (1 - over.final_lr) * wave
    if over.begin and step - over.begin < over.warmup:
        share *= (step - over.begin + 1) / over.warmup
    for group in optimiser.param_groups:
        group["lr"] = over.lr * share * group["factor"]
    return over.lr * share
