"""Dtypes as people name them: one definition for every option, command and file that takes one.

bfloat16 is also bf16, torch.bfloat16 or torch's own object; upper and lower case are the same.
"""

from collections.abc import Iterable
from typing import Any

import torch

from rwkv_lab.errors import ParameterError

# Short name, dtype, and what else it is called. torch's own name is the long one.
_NAMES = {
    "fp64": (torch.float64, ("f64", "double")),
    "fp32": (torch.float32, ("f32", "float", "single")),
    "bf16": (torch.bfloat16, ("bfloat",)),
    "fp16": (torch.float16, ("f16", "half")),
}
_BY_NAME = {
    name: dtype
    for short, (dtype, others) in _NAMES.items()
    for name in (short, str(dtype).removeprefix("torch."), *others)
}
FLOATS = tuple(dtype for dtype, _ in _NAMES.values())


def to_dtype(value: object, what: str = "dtype", among: Iterable[torch.dtype] = FLOATS) -> torch.dtype:
    """The dtype that a value names, or is.

    Args:
        what: whose dtype it is, for messages.
        among: those that it may be.
    Raises:
        ParameterError: no dtype, or none of `among`.
    """
    found, among = _found(value), tuple(among)
    if found not in among:
        raise ParameterError(f"{what}={value!r}: it should be one of {', '.join(map(long_name, among))}")
    return found


def long_name(dtype: torch.dtype) -> str:
    """torch's name without the package: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """The name of four characters, "bf16"; of what is no float, torch's."""
    return next((short for short, (known, _) in _NAMES.items() if known == dtype), long_name(dtype))


def in_long(value: Any) -> Any:
    """The long name of a dtype in any spelling, for options that list long names; anything else as it is."""
    found = _found(value)
    return value if found is None else long_name(found)


def in_short(value: Any) -> Any:
    """The short name of a dtype in any spelling, for options that list short names; anything else as it is."""
    found = _found(value)
    return value if found is None else short_name(found)


def _found(value: object) -> torch.dtype | None:
    if isinstance(value, torch.dtype):
        return value
    return _BY_NAME.get(value.strip().lower().removeprefix("torch.")) if isinstance(value, str) else None
