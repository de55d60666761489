"""rwkv_lab: a workbench for people who own RWKV language models.

Names are imported on first use: opening and merging need no model, and exported models run without torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rwkv_lab.threads import settle
from rwkv_lab.version import __version__

settle()  # before anything imports torch

if TYPE_CHECKING:
    from rwkv_lab.checkpoint import open_checkpoint
    from rwkv_lab.merge import merge
    from rwkv_lab.model import RWKV_Dual, RWKVMode, init_state_with_past

_HOME = {
    "RWKV_Dual": "rwkv_lab.model",
    "RWKVMode": "rwkv_lab.model",
    "init_state_with_past": "rwkv_lab.model",
    "merge": "rwkv_lab.merge",
    "open_checkpoint": "rwkv_lab.checkpoint",
}

__all__ = ["RWKVMode", "RWKV_Dual", "__version__", "init_state_with_past", "merge", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_lab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Python binds a package that is imported to its parent: it would put the folder `merge` in the place of the
    function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
