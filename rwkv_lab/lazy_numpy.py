"""`np`, which is numpy, imported when something of it is first used, as `lazy_torch` does with torch.

Modules that use it have `from __future__ import annotations`, so that annotations alone do not import it.
"""

from typing import TYPE_CHECKING

from rwkv_lab.lazy_names import imported_on_use

if TYPE_CHECKING:
    import numpy as np
else:
    np = imported_on_use("numpy")

__all__ = ["np"]
