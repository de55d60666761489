"""`torch`, imported when something of it is first used: a checkpoint is described from its header without it.

Modules that use it have `from __future__ import annotations`, so that annotations alone do not import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()

__all__ = ["torch"]
