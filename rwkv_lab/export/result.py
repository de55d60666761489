"""What came of an export: one object, and the JSON file that says the same."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import write_text
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.export.attempt import Attempt
from rwkv_lab.export.monitoring_logger import Monitoring

RESULT = "result.json"  # in the folder of an export
FAILED = ".failed.json"  # what the name of a failed export's result ends in, beside where its folder would be


@dataclass
class ExportResult:
    """An export, whether it succeeded or not. Sizes are in MB of 10^6 bytes."""

    export_id: str
    timestamp: str  # UTC, ISO 8601, of the start
    success: bool = False
    pytorch_model_path: str | None = None
    onnx_model_path: str | None = None
    tensorrt_model_path: str | None = None
    original_size_mb: float | None = None  # the whole model in its own dtype, adapters merged
    optimized_size_mb: float | None = None  # the ONNX folder; where there is none, the PyTorch model
    size_reduction_percentage: float | None = None  # negative where it grew: bfloat16 to float32
    left_out: list[str] = field(default_factory=list)  # by optimise_structure: names of tensors that no layer reads
    # Way of storing -> names of tensors, bytes before and after: those of the ONNX graphs, else of the PyTorch model.
    storage: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Of what a sensitivity scan read: where it is from, how many texts, and `TokenStatistics`.
    calibration: dict[str, Any] = field(default_factory=dict)
    sensitivity: Any = None  # a `Sensitivity`, with the proposal that was written, where a scan was asked for
    inference_speed_ms: float | None = None  # of one token through onnxruntime, the median
    memory_usage_mb: float | None = None  # the largest that this process has held so far, files in memory included
    validation_passed: bool | None = None  # None where nothing was compared
    validation_report_path: str | None = None
    error_message: str | None = None
    warnings: list[str] = field(default_factory=list)
    checks: list[Check | NotApplicable] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    configuration: dict[str, Any] = field(default_factory=dict)  # option -> value and where it came from
    monitoring: Monitoring = field(default_factory=Monitoring)  # stages, memory and disk over time
    attempts: list[Attempt] = field(default_factory=list)  # to write the ONNX graphs
    degraded: list[str] = field(default_factory=list)  # what the graphs lack of what was asked for

    @property
    def verdict(self) -> str:
        """One word, and why: what failed first and what was lost, or all that should be known."""
        if not self.success:
            return f"FAIL: {self.error_message or 'the export did not end'}"
        lost = "; ".join(self.degraded)
        wrong = [str(check.name) for check in self.checks if isinstance(check, Check) and not check.passed]
        if wrong:
            return f"FAIL: {wrong[0]}" + (f"; degraded: {lost}" if lost else "")
        why = ["exported, and not compared with the model."] if self.validation_passed is None else []
        if lost:
            return f"DEGRADED: {'; '.join([lost, *why]).removesuffix('.')}"
        why += self.warnings  # all: one of them may be that an adapter does not say what base it is of
        return f"WARN: {' '.join(why).removesuffix('.')}" if why else "PASS"

    def as_json(self) -> str:
        """All of it, with the verdict."""
        checks = [{"kind": type(c).__name__, **asdict(c)} for c in self.checks]
        return json.dumps({**asdict(self), "checks": checks, "verdict": self.verdict}, indent=1, default=str) + "\n"

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all, in the place of an older one.

        Raises:
            OutputError: it cannot be written.
        """
        write_text(path, self.as_json(), overwrite=True)
