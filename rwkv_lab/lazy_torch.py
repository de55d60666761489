"""`torch`, imported when something of it is first used: a checkpoint is described from its header without it, and
values of parameters are refused before it is there.

Modules that use it have `from __future__ import annotations`, so that annotations alone do not import it.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
else:

    @functools.cache
    def _module() -> Any:
        return import_module("torch")

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(_module(), name)

    torch = _Torch()

__all__ = ["no_grad", "torch"]

F = TypeVar("F", bound=Callable)


def no_grad(function: F) -> F:
    """`torch.no_grad` as a decorator that does not import torch; for functions, not for generators."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, run)
