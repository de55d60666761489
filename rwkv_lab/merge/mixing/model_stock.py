"""Method "model_stock": between base and the mean of several fine-tunes, the closer to the mean the more they agree."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Annotated

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.mixing_method import Blocks, Look, Several, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, combined


def ratio(blocks: Blocks) -> float:
    """t = N c / (1 + (N-1) c), with c the mean cosine between the deltas of N models, in float64; 0 to 1.

    0, the base, where c is below 0: the formula looks for a point between base and mean, and deltas that turn from
    each other say nothing for leaving the base; t would be below 0 there, and grow without bounds as they cancel. A
    delta of 0 has cosine 0.
    """
    products = None  # [N, N]
    for base, tuned in blocks():
        deltas = torch.stack(list(tuned)).double() - base.double()  # [N, n]
        products = deltas @ deltas.T if products is None else products + deltas @ deltas.T
    if products is None:
        return 0.0
    count, cosines = len(products), []
    for i, j in combinations(range(count), 2):
        size = math.sqrt(products[i, i]) * math.sqrt(products[j, j])
        cosines.append(float(products[i, j]) / size if size != 0 else 0.0)
    c = sum(cosines) / len(cosines)
    if c <= 0:
        return 0.0
    return min(count * c / (1 + (count - 1) * c), 1.0)  # in this order: a NaN stays one


def proof(t: WholeTensor) -> Exact:
    # Angles are between the values that the merge's precision sees: those of small deltas depend on it.
    base, *tuned = (model.to(t.precision).double() for model in t.models)
    deltas = [one - base for one in tuned]
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i):
            size = float(deltas[i].norm()) * float(deltas[j].norm())
            cosines.append(float(deltas[i].dot(deltas[j])) / size if size else 0.0)
    c = math.fsum(cosines) / len(cosines)
    # Between base and mean; as the deltas cancel the formula goes to minus infinity, whose nearest is the base.
    share = min(max(n * c / max(1 + (n - 1) * c, 1e-12), 0.0), 1.0)
    return combined(t, [1 - share] + [share / n] * n)


@mixing_method("Model Stock", proof)
def model_stock(base: torch.Tensor, tuned: Several, *, t: Annotated[float, Look(ratio)]) -> torch.Tensor:
    return torch.lerp(base, sum(tuned, torch.zeros((), device="cpu")) / len(tuned), t)
