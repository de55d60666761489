"""Method "task_arithmetic": base + alpha · Σ wᵢ (tunedᵢ - base)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import LARGEST, Takes
from rwkv_lab.merge.mixing_method import Tensors, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, added
from rwkv_lab.merge.weight_sum import divisor

Scale = Annotated[float, Takes("factor on what is added to the base; 0 is the base")]
Weights = Annotated[Sequence[float], Takes("one per tuned model", each="tuned")]
EQUAL: Any = 1.0  # a default that is given alone holds for every model


def proof(t: WholeTensor, *, alpha: float, weights: list[float] | float, normalize: bool) -> Exact:
    w = t.each(weights)
    return added(t, w, alpha, math.fsum(w) if normalize else 1.0)


@mixing_method("task arithmetic", proof)
def task_arithmetic(
    base: torch.Tensor,
    tuned: Tensors,
    *,
    alpha: Scale = 1.0,
    weights: Weights = EQUAL,
    normalize: Annotated[bool, Takes("divide by the sum of the weights")] = False,
) -> torch.Tensor:
    return add([t - base for t in tuned], base, alpha, weights, normalize)


def add(
    deltas: Sequence[torch.Tensor], base: torch.Tensor, alpha: float, weights: Sequence[float], normalize: bool
) -> torch.Tensor:
    """base + alpha · Σ wᵢ deltaᵢ, or with `normalize` the weighted mean of the deltas."""
    total, out = divisor(weights) if normalize else 1.0, base
    for delta, w in zip(deltas, weights, strict=True):
        factor = alpha * w / total
        if abs(factor) > LARGEST:
            raise ParameterError(f"alpha {alpha:g} times weight {w:g} is {factor:g}; float32 holds {LARGEST:.4g}")
        out = out.add(delta, alpha=factor)
    return out
