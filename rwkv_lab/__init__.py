"""rwkv_lab: a workbench for people who own RWKV language models.

`open_checkpoint` and `merge` are imported at once, the model on first use: opening and merging need no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_lab.threads import settle
from rwkv_lab.version import __version__

settle()  # before the imports below load torch

# Bound here, after its module was imported, so that `rwkv_lab.merge` is the function and not the folder of that name.
from rwkv_lab.checkpoint import open_checkpoint  # noqa: E402
from rwkv_lab.merge import merge  # noqa: E402

if TYPE_CHECKING:
    from rwkv_lab.model import RWKV_Dual, RWKVMode, init_state_with_past

_HOME = {
    "RWKV_Dual": "rwkv_lab.model",
    "RWKVMode": "rwkv_lab.model",
    "init_state_with_past": "rwkv_lab.model",
}

__all__ = ["RWKVMode", "RWKV_Dual", "__version__", "init_state_with_past", "merge", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_lab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
