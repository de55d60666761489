"""Dtypes as people name them: one definition for every option, command and file that takes one.

bfloat16 is also bf16, torch.bfloat16 or torch's own object; upper and lower case are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch

# Short name, torch's own, which is the long one, and what else it is called.
_NAMES = {
    "fp64": ("float64", ("f64", "double")),
    "fp32": ("float32", ("f32", "float", "single")),
    "bf16": ("bfloat16", ("bfloat",)),
    "fp16": ("float16", ("f16", "half")),
}
_SHORT = {long: short for short, (long, _) in _NAMES.items()}
FLOAT_NAMES = tuple(_SHORT)  # torch's names of the dtypes that have a short name
_LONG = {name: long for short, (long, others) in _NAMES.items() for name in (short, long, *others)}


def floats() -> tuple[torch.dtype, ...]:
    """The dtypes that have a short name."""
    return tuple(getattr(torch, long) for long in _SHORT)


def to_dtype(value: object, what: str = "dtype", among: Iterable[torch.dtype | str] = tuple(_SHORT)) -> torch.dtype:
    """The dtype that a value names, or is.

    Args:
        what: whose dtype it is, for messages.
        among: those that it may be, or their long names.
    Raises:
        ParameterError: no dtype, or none of `among`.
    """
    found, allowed = _found(value), [one if isinstance(one, str) else long_name(one) for one in among]
    if found is None or found not in allowed:
        raise ParameterError(f"{what}={value!r}: it should be one of {', '.join(allowed)}")
    return getattr(torch, found)


def long_name(dtype: torch.dtype) -> str:
    """torch's name without the package: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """The name of four characters, "bf16"; of what is no float, torch's."""
    return _SHORT.get(long_name(dtype), long_name(dtype))


def in_long(value: Any) -> Any:
    """The long name of a dtype in any spelling, for options that list long names; anything else as it is."""
    return _found(value) or value


def in_short(value: Any) -> Any:
    """The short name of a dtype in any spelling, for options that list short names; anything else as it is."""
    found = _found(value)
    return value if found is None else _SHORT.get(found, found)


def _found(value: object) -> str | None:
    """The long name of the dtype that a value names, or is; None of others."""
    if "torch" in sys.modules and isinstance(value, torch.dtype):  # before, there is none
        return long_name(value)
    return _LONG.get(value.strip().lower().removeprefix("torch.")) if isinstance(value, str) else None
