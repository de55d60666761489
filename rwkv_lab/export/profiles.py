"""Profiles: how much an export tries, by the size of the model and by what earlier exports of it ended in.

A profile sets options that were not given. `aggressive` tries most, `conservative` asks for least.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rwkv_lab.export.result import FAILED, RESULT

ProfileName = Literal["aggressive", "balanced", "conservative"]

PROFILES: dict[ProfileName, dict[str, Any]] = {
    "aggressive": {"max_attempts": 9, "attempt_time_limit": 1800.0},
    "balanced": {"max_attempts": 5, "attempt_time_limit": 3600.0},
    "conservative": {
        "onnx_optimize_graph": False,
        "use_external_data_format": True,
        "max_attempts": 3,
        "attempt_time_limit": 7200.0,
    },
}
_NAMES = tuple(PROFILES)
_BALANCED, _CONSERVATIVE = 1_000_000_000, 5_000_000_000  # parameters from which on
_READ = 200  # earlier results, the newest


def choose_profile(parameters: int, failures: int) -> tuple[ProfileName, str]:
    """The profile for a model, and why: by its size, and one step further for every earlier export with an error.

    Args:
        failures: earlier exports of the model in which an attempt failed.
    """
    step = (parameters >= _BALANCED) + (parameters >= _CONSERVATIVE) + failures
    why = f"{parameters / 1e6:,.1f} million parameters, {failures or 'no'} earlier exports with a failed attempt"
    return _NAMES[min(step, len(_NAMES) - 1)], why


def earlier_failures(folder: Path, checkpoint: Path) -> int:
    """How many earlier exports of a checkpoint into a folder had an attempt that failed."""
    found = [*folder.glob(f"*{FAILED}"), *folder.glob(f"*/{RESULT}")] if folder.is_dir() else []
    newest = sorted(found, key=_time, reverse=True)[:_READ]
    return sum(_failed(path, str(checkpoint)) for path in newest)


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _failed(path: Path, checkpoint: str) -> bool:
    """Whether a result is of the checkpoint and has a failed attempt; one that cannot be read is none."""
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
        if result["configuration"]["checkpoint_path"]["value"] != checkpoint:
            return False
        return any(isinstance(one, Mapping) and one.get("error") for one in result.get("attempts") or ())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
