"""Export: models in formats that run without this package's models, and what runs them.

Names are imported on first use: `OnnxModel` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_lab.export.onnx.export import OnnxExport, export_onnx
    from rwkv_lab.export.onnx_model import OnnxModel

_HOME = {
    "OnnxExport": "rwkv_lab.export.onnx.export",
    "OnnxModel": "rwkv_lab.export.onnx_model",
    "export_onnx": "rwkv_lab.export.onnx.export",
}

__all__ = ["OnnxExport", "OnnxModel", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_lab.export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
