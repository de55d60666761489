"""Method "linear": the weighted mean of base and tuned models, Σ wᵢ Wᵢ / Σ wᵢ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import Takes
from rwkv_lab.merge.mixing_method import Tensors, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, combined
from rwkv_lab.merge.weight_sum import divisor


def proof(t: WholeTensor, *, weights: list[float] | float, normalize: bool) -> Exact:
    shares = weights if isinstance(weights, list) else [1 - weights, weights]
    whole = math.fsum(shares) if normalize else 1.0
    return combined(t, [w / whole for w in shares])


@mixing_method("weighted mean", proof)
def linear(
    base: torch.Tensor,
    tuned: Tensors,
    *,
    weights: Annotated[Sequence[float], Takes("[w_base, w_tuned, …], one per model", each="model")],
    normalize: Annotated[bool, Takes("divide by the sum of the weights")] = True,
) -> torch.Tensor:
    """A model of weight 0 is not looked at, so that weights [1, 0] give the base bit for bit."""
    total = divisor(weights) if normalize else 1.0
    share = [w / total for w in weights]
    out = base * share[0] if share[0] else base.new_zeros(len(base))
    for t, w in zip(tuned, share[1:], strict=True):
        if w:
            out = out.add(t, alpha=w)
    return out
