"""Method "linear": the weighted mean of base and tuned models, Σ wᵢ Wᵢ / Σ wᵢ."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from rwkv_lab.merge.mixing.signature import Takes, Tensors
from rwkv_lab.merge.mixing.weight_sum import divisor


def linear(
    base: Tensor,
    tuned: Tensors,
    *,
    weights: Annotated[Sequence[float], Takes("[w_base, w_tuned, …], one per model", each="model")],
    normalize: Annotated[bool, Takes("divide by the sum of the weights")] = True,
) -> Tensor:
    """A model of weight 0 is not looked at, so that weights [1, 0] give the base bit for bit."""
    total = divisor(weights) if normalize else 1.0
    share = [w / total for w in weights]
    out = base * share[0] if share[0] else base.new_zeros(len(base))
    for t, w in zip(tuned, share[1:], strict=True):
        if w:
            out = out.add(t, alpha=w)
    return out
