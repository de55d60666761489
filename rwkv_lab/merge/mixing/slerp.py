"""Method "slerp": along the great circle from base to tuned, each tensor as one vector."""

from __future__ import annotations

import math
from typing import Annotated

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.method_parameters import Takes
from rwkv_lab.merge.mixing_method import Blocks, Look, Two, mixing_method
from rwkv_lab.merge.proof import Exact, WholeTensor, combined

NEARLY_PARALLEL = 0.9995  # |cos| from which a straight line serves: the arc's coefficients divide by sin, near 0


def cosine(blocks: Blocks) -> float | None:
    """cos of the angle between base and tuned, in float64; None where one of them is 0 and there is no angle."""
    dot = square_base = square_tuned = 0.0
    for base, (tuned,) in blocks():
        b, t = base.double(), tuned.double()
        dot += float(b @ t)
        square_base += float(b @ b)
        square_tuned += float(t @ t)
    size = math.sqrt(square_base) * math.sqrt(square_tuned)
    return None if size == 0 else dot / size


def proof(t: WholeTensor, *, alpha: float) -> Exact:
    # The angle is between the values that the merge's precision sees.
    a, b = (model.to(t.precision).double() for model in t.models)
    if not float(a.norm()) or not float(b.norm()):
        return combined(t, [1 - alpha, alpha])
    a, b = a / a.norm(), b / b.norm()
    angle = 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))  # by the sides of their rhombus
    if abs(math.cos(angle)) > 0.9995:
        return combined(t, [1 - alpha, alpha])
    return combined(t, [math.sin(x * angle) / math.sin(angle) for x in (1 - alpha, alpha)])


@mixing_method("spherical interpolation", proof)
def slerp(
    base: torch.Tensor,
    tuned: Two,
    *,
    cos: Annotated[float | None, Look(cosine)],
    alpha: Annotated[float, Takes("0 to 1, how far to go along the arc; 0 is the base", 0, 1)] = 0.5,
) -> torch.Tensor:
    """sin((1-t)ω)/sin ω · base + sin(tω)/sin ω · tuned, with t = alpha and ω the angle between them.

    A straight line, (1-t) base + t tuned, where the arc is not defined: one of the two is 0 throughout, or they are
    parallel or opposite (|cos| above 0.9995).
    """
    if cos is None or abs(cos) > NEARLY_PARALLEL:
        return torch.lerp(base, tuned[0], alpha)
    angle = math.acos(cos)  # NaN where a model has one: it goes on into the output, and is found there
    of_base, of_tuned = (math.sin(x * angle) / math.sin(angle) for x in (1 - alpha, alpha))
    return base * of_base + tuned[0] * of_tuned
