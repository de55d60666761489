"""Any checkpoint on disk: opened lazily, described from its headers, written whole or not at all.

Opening one imports no torch; reading a tensor does, and writing.
"""

from typing import TYPE_CHECKING, Any

from rwkv_lab.checkpoint.fingerprint import FileFacts, file_facts
from rwkv_lab.checkpoint.layout import Layout, detect_layout
from rwkv_lab.checkpoint.open import Checkpoint, open_checkpoint
from rwkv_lab.checkpoint.source import TensorInfo
from rwkv_lab.checkpoint.tensors import compare, expected_tensors, tensors_of

if TYPE_CHECKING:
    from rwkv_lab.checkpoint.write import write_checkpoint, write_text

__all__ = [
    "Checkpoint",
    "FileFacts",
    "Layout",
    "TensorInfo",
    "compare",
    "detect_layout",
    "expected_tensors",
    "file_facts",
    "open_checkpoint",
    "tensors_of",
    "write_checkpoint",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name not in ("write_checkpoint", "write_text"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rwkv_lab.checkpoint import write

    return getattr(write, name)
