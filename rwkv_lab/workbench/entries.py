"""What a person did in a panel, kept beside the report in `panel.json`: it is there after a restart of the kernel."""

import json
from pathlib import Path
from typing import Any

from rwkv_lab.errors import OutputError
from rwkv_lab.resources import reports_folder
from rwkv_lab.workbench.result import write_json

_FILE = "panel.json"


def kept(report: Path) -> dict[str, Any]:
    """What was kept in the folder of a run's report; empty where nothing was, or nothing that can be read."""
    try:
        content = json.loads((report / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def keep(report: Path, **values: Any) -> None:
    """Keep these values too. Where the folder cannot be written they are lost at the next start, and no more."""
    try:
        write_json(report / _FILE, kept(report) | values)
    except OutputError:
        pass


def last_folder(report: Path) -> Path:
    """The folder that files were taken from last, in this panel or that of a run beside it; else the project's."""
    files = sorted(report.parent.glob(f"*/{_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (kept(file.parent).get("folder") for file in files):
        if isinstance(folder, str) and Path(folder).is_dir():
            return Path(folder)
    return reports_folder().parent
