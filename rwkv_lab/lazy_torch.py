"""`torch`, imported when something of it is first used: a checkpoint is described from its header without it, and
values of parameters are refused before it is there.

Modules that use it have `from __future__ import annotations`, so that annotations alone do not import it.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rwkv_lab.lazy_names import imported_on_use

if TYPE_CHECKING:
    import torch
else:
    torch = imported_on_use("torch")

__all__ = ["no_grad", "torch"]

F = TypeVar("F", bound=Callable)


def no_grad(function: F) -> F:
    """`torch.no_grad` as a decorator that does not import torch; for functions, not for generators."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, run)
