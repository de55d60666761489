"""What a person did in a panel, kept beside the report in `panel.json`: it is there after a restart of the kernel."""

import json
from collections.abc import Mapping
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


def keep_entries(report: Path, values: Mapping[str, Any], cell: Mapping[str, Any]) -> None:
    """Keep what a panel has, as far as it is not what the parameters cell says."""
    entries = {name: value for name, value in values.items() if value != cell.get(name)}
    keep(report, entries=entries, cell={name: cell.get(name) for name in entries}, by="")


def propose(notebook: str, by: str, values: Mapping[str, Any]) -> None:
    """Have the panel of a notebook, which reports to the usual folder, come with these values the next time.

    Args:
        by: the notebook that proposes them.
    Raises:
        OutputError: the folder of its reports cannot be made.
    """
    folder = reports_folder() / notebook
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}, for what {notebook} is to take, cannot be made: {e.strerror or e}") from e
    keep(folder, entries=dict(values), cell={}, by=by)


def proposed_by(report: Path) -> str:
    """The notebook that proposes what `entered` returns; "" where a person entered it."""
    by = kept(report).get("by")
    return by if isinstance(by, str) else ""


def entered(report: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """What was entered in a panel, or proposed, and still holds: a parameters cell that was changed since goes before.

    Args:
        cell: the values of the parameters cell as they are now.
    """
    found = kept(report)
    entries, then = found.get("entries"), found.get("cell")
    if not isinstance(entries, dict) or not isinstance(then, dict):
        return {}
    known = {name: value for name, value in entries.items() if name in cell}
    return {name: value for name, value in known.items() if then.get(name, cell[name]) == cell[name]}
