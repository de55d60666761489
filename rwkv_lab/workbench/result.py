"""`result.json`: what a script reads of a run. Written as "running" first, and replaced whole when the run ends."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import FileFacts, write_text
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.version import __version__
from rwkv_lab.workbench.process import is_running, this_process

RESULT = "result.json"
KEPT = "report.json"  # the result of the run that report.html shows, where result.json is of a later one
INTERRUPTED = "stopped before its end, by a person or a signal; what it had not finished writing is not there."


@dataclass
class Record:
    """The content of `result.json`. Change the fields, then `write`."""

    folder: Path
    notebook: str
    parameters: Mapping[str, object]
    status: str = "running"  # "running", "ok" or "failed"
    error: BaseException | None = None
    inputs: list[FileFacts] = field(default_factory=list)
    outputs: list[FileFacts] = field(default_factory=list)
    checks: list[Check | NotApplicable] = field(default_factory=list)
    metrics: dict[str, object] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: Path | None = None  # report.html of this run, once it has ended
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    process: Mapping[str, object] = field(default_factory=this_process)
    cwd: Path = field(default_factory=Path.cwd)  # from which relative paths among the parameters are seen

    @property
    def failed_checks(self) -> list[Check]:
        return [c for c in self.checks if isinstance(c, Check) and not c.passed]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: no NaN, paths absolute, `passed` null for a check that does not apply."""
        error = {"class": type(self.error).__name__, "message": str(self.error)} if self.error is not None else None
        content = {
            "notebook": self.notebook,
            "status": self.status,
            "error": error,
            "parameters": self.parameters,
            "inputs": _files(self.inputs),
            "outputs": _files(self.outputs),
            "checks": [_check(c) for c in self.checks],
            "metrics": self.metrics,
            "figures": self.figures,
            "versions": versions(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "notes": self.notes,
            "report": self.report,
            "started": self.started,
            **self.process,
            "cwd": self.cwd,
        }
        return {name: _plain(value) for name, value in content.items()}

    def write(self) -> Path:
        """Replace `result.json`, whole or not at all, and return its path.

        Raises:
            OutputError: the folder cannot be written to.
        """
        path = self.folder / RESULT
        write_json(path, self.as_dict())
        return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by this content, whole or not at all.

    Raises:
        OutputError: as `write_text`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # Text from a file may hold lone surrogates, which UTF-8 cannot carry.
    write_text(path, text.encode("utf-8", "replace").decode() + "\n", overwrite=True)


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of a `result.json`; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("status"), str) else None


def status_of(result: Mapping[str, Any]) -> str:
    """The status of a run: "running", "ok", "failed", or "interrupted" where it was stopped or its process is gone."""
    if result["status"] == "running" and is_running(result) is False:
        return "interrupted"
    error = result.get("error")
    stopped = isinstance(error, dict) and error.get("class") == KeyboardInterrupt.__name__
    return "interrupted" if result["status"] == "failed" and stopped else result["status"]


def versions() -> dict[str, str]:
    """What the result depends on."""
    return {
        "rwkv_lab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__ if "torch" in sys.modules else version("torch"),  # a refusal does not wait for it
        "numpy": version("numpy"),
        "platform": platform.platform(),
    }


def _files(facts: Iterable[FileFacts]) -> list[dict]:
    return [{"path": f.path.absolute(), "bytes": f.bytes, "fingerprint": f.fingerprint} for f in facts]


def _check(check: Check | NotApplicable) -> dict:
    if isinstance(check, NotApplicable):
        return {"name": check.name, "value": f"not applicable: {check.reason}", "limit": None, "passed": None}
    return {"name": check.name, "value": check.value, "limit": check.limit, "passed": bool(check.passed)}


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and Inf as text, everything unknown as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    is_number = "numpy" in sys.modules and isinstance(value, np.generic)
    if is_number or "torch" in sys.modules and isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int)) else str(value)
