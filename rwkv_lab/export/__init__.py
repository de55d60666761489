"""Export: models in formats that run without this package's models, and what runs them.

Names are imported on first use: `OnnxModel` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_lab.export.checkpoint_detector import CheckpointDetector, CheckpointInfo
    from rwkv_lab.export.configuration import ExportConfiguration
    from rwkv_lab.export.configuration_manager import ConfigurationManager
    from rwkv_lab.export.format_exporter import FormatExporter
    from rwkv_lab.export.model_merger import ModelMerger
    from rwkv_lab.export.monitoring_logger import MonitoringLogger
    from rwkv_lab.export.onnx.export import OnnxExport, export_onnx
    from rwkv_lab.export.onnx_model import OnnxModel
    from rwkv_lab.export.optimization_processor import OptimizationProcessor
    from rwkv_lab.export.pipeline import run, run_levels
    from rwkv_lab.export.planning import ExportPlan, plan_export
    from rwkv_lab.export.result import ExportResult
    from rwkv_lab.export.validation_tester import ValidationTester

_HOME = {
    "CheckpointDetector": "rwkv_lab.export.checkpoint_detector",
    "CheckpointInfo": "rwkv_lab.export.checkpoint_detector",
    "ConfigurationManager": "rwkv_lab.export.configuration_manager",
    "ExportConfiguration": "rwkv_lab.export.configuration",
    "ExportPlan": "rwkv_lab.export.planning",
    "ExportResult": "rwkv_lab.export.result",
    "FormatExporter": "rwkv_lab.export.format_exporter",
    "MonitoringLogger": "rwkv_lab.export.monitoring_logger",
    "ModelMerger": "rwkv_lab.export.model_merger",
    "OnnxExport": "rwkv_lab.export.onnx.export",
    "OnnxModel": "rwkv_lab.export.onnx_model",
    "OptimizationProcessor": "rwkv_lab.export.optimization_processor",
    "ValidationTester": "rwkv_lab.export.validation_tester",
    "export_onnx": "rwkv_lab.export.onnx.export",
    "plan_export": "rwkv_lab.export.planning",
    "run": "rwkv_lab.export.pipeline",
    "run_levels": "rwkv_lab.export.pipeline",
}

__all__ = [
    "CheckpointDetector",
    "CheckpointInfo",
    "ConfigurationManager",
    "ExportConfiguration",
    "ExportPlan",
    "ExportResult",
    "FormatExporter",
    "MonitoringLogger",
    "ModelMerger",
    "OnnxExport",
    "OnnxModel",
    "OptimizationProcessor",
    "ValidationTester",
    "export_onnx",
    "plan_export",
    "run",
    "run_levels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_lab.export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
