"""The sum of weights that a mean is divided by: when it counts as 0, and when it is too large."""

from collections.abc import Sequence

from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.method_parameters import LARGEST

# Of the sum of the weights' magnitudes: what is left of weights such as 1.1 + 2.2 - 3.3 that were meant to cancel,
# also where they were float32 once, is rounding and no divisor.
NOTHING = 1e-6


def check_sum(weights: Sequence[float]) -> None:
    """Refuse weights whose sum may not be a number of float32.

    Raises:
        ParameterError: with the weights.
    """
    if sum(map(abs, weights)) > LARGEST:
        raise ParameterError(f"the weights {weights} add up to more than float32 holds, {LARGEST:.4g}; scale them down")


def divisor(weights: Sequence[float]) -> float:
    """Σ wᵢ, of which no mean can be taken where it is too large, or 0 but for rounding.

    Raises:
        ParameterError: with the weights and their sum.
    """
    check_sum(weights)
    total = sum(weights)
    if abs(total) <= NOTHING * sum(map(abs, weights)):
        raise ParameterError(f"the weights {weights} add up to {total:g}, and normalize divides by that sum")
    return total
