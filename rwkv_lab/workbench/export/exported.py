"""What an export left, as the notebook shows it: its result, and what the comparison with the model measured."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import FileFacts, file_facts
from rwkv_lab.export.monitoring_logger import Monitoring
from rwkv_lab.export.onnx_folder import MANIFEST
from rwkv_lab.export.result import ExportResult


@dataclass(frozen=True)
class Exported:
    """An export that succeeded.

    report: of the comparison with the model, as `validation.json` has it; empty where nothing was compared.
    """

    result: ExportResult
    level: str
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, Any]:
        """A `Comparison` as a dict; empty where nothing was compared."""
        return self.report.get("measured", {})

    @property
    def gate(self) -> dict[str, Any]:
        """The limits of what was measured."""
        return self.report.get("gate", {})

    @property
    def label(self) -> str:
        """The level, as people call it."""
        return "float32" if self.level == "none" else self.level

    @property
    def onnx(self) -> Path | None:
        """The folder with the graphs."""
        return None if self.result.onnx_model_path is None else Path(self.result.onnx_model_path)

    @property
    def pytorch(self) -> Path | None:
        """The model for PyTorch."""
        return None if self.result.pytorch_model_path is None else Path(self.result.pytorch_model_path)

    @property
    def has_text(self) -> bool:
        """Whether the ONNX folder has a tokenizer."""
        manifest = {} if self.onnx is None else _json(self.onnx / MANIFEST)
        return manifest.get("tokenizer") is not None


def read_exported(result: ExportResult) -> Exported:
    """A result, with the numbers of its validation report."""
    report = {} if result.validation_report_path is None else _json(Path(result.validation_report_path))
    return Exported(result, str(result.configuration["quantization_level"]["value"]), report)


def facts_of(one: Exported) -> list[FileFacts]:
    """Size and fingerprint of each output: of a folder of graphs that of its manifest, which has every file's hash."""
    found = [] if one.pytorch is None else [file_facts(one.pytorch)]
    if one.onnx is not None:
        manifest = one.onnx / MANIFEST
        digest = f"sha256:{hashlib.sha256(manifest.read_bytes()).hexdigest()}" if manifest.is_file() else ""
        found.append(FileFacts(one.onnx, size_of(one.onnx), digest))
    return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def one_after_the_other(results: Iterable[Exported]) -> Monitoring:
    """What was seen of several exports, as of one that did all of them."""
    whole, begin = Monitoring(), 0.0
    for one in results:
        seen = one.result.monitoring
        for stage in seen.stages:
            end = None if stage.end is None else stage.end + begin
            whole.stages.append(replace(stage, name=f"{one.label}: {stage.name}", start=stage.start + begin, end=end))
        whole.samples += [replace(sample, seconds=sample.seconds + begin) for sample in seen.samples]
        begin = max((s.seconds for s in whole.samples), default=begin)
    return whole


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
