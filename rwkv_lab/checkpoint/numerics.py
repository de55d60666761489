"""NaN, Inf, and rounding to a smaller dtype once."""

from __future__ import annotations

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch

# For each float format: unsigned and signed view, and the bits of +Inf. As integers, every NaN and Inf lies at or above
# +Inf when the sign is clear (a signed comparison) and at or above -Inf when it is set (an unsigned one), so that two
# running maxima find them; that goes at memory speed, and without a temporary.
_VIEWS = {
    "bfloat16": ("u2", "i2", 0x7F80),
    "float16": ("u2", "i2", 0x7C00),
    "float32": ("u4", "i4", 0x7F800000),
    "float64": ("u8", "i8", 0x7FF0000000000000),
    "complex64": ("u4", "i4", 0x7F800000),
    "complex128": ("u8", "i8", 0x7FF0000000000000),
    "float8_e5m2": ("u1", "i1", 0x7C),
    "float8_e4m3fn": ("u1", "i1", 0x7F),  # has no Inf, and one NaN
}


def all_finite(data: memoryview | np.ndarray, dtype: torch.dtype) -> bool:
    """True where no element of `data` (raw bytes of a dense tensor) is NaN or Inf; always for integers."""
    view = _VIEWS.get(str(dtype).removeprefix("torch."))
    if view is None or len(data) == 0:
        return True
    unsigned, signed, infinity = view
    bits = np.frombuffer(data, unsigned)
    return int(bits.max()) < infinity | (1 << (8 * bits.itemsize - 1)) and int(bits.view(signed).max()) < infinity


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` rounded to the nearest `dtype`, ties to even, once.

    torch goes from float64 to a 16-bit format by way of float32, which rounds twice. Rounding to odd on the way
    (truncate, and set the last bit if anything was lost) keeps the information that the second rounding needs.
    """
    if values.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        nearest = values.float()
        inexact = torch.isfinite(nearest) & (nearest.double() != values)
        bits = nearest.view(torch.int32)
        bits = torch.where(inexact & (nearest.double().abs() > values.abs()), bits - 1, bits)  # towards zero
        return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)
    return values.to(dtype)
