"""`np`, which is numpy, imported when something of it is first used, as `lazy_torch` does with torch.

Modules that use it have `from __future__ import annotations`, so that annotations alone do not import it.
"""

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
else:

    @functools.cache
    def _module() -> Any:
        return import_module("numpy")

    class _Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(_module(), name)

    np = _Numpy()

__all__ = ["np"]
