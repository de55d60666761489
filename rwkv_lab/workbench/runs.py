"""What became of each run, and where its report is: for a page that lists and compares them, and for the terminal.

A run whose process was killed cannot say so; in the list it is "interrupted".
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import write_text
from rwkv_lab.paths import to_path
from rwkv_lab.text import shown
from rwkv_lab.workbench.pages import TEMPLATES, environment, without_folders
from rwkv_lab.workbench.result import RESULT, read_result, status_of

INDEX = "index.html"
_DEEPEST = 3  # folders below the one that is listed
_COLUMNS = ("status", "notebook", "started (UTC)", "folder", "inputs", "found")
_LONGEST = 300  # characters of a value that is compared


@dataclass(frozen=True)
class ListedRun:
    """One run, by its `result.json`."""

    folder: Path
    notebook: str
    status: str  # "running", "interrupted", "ok" or "failed"
    started: str  # ISO 8601, UTC; "" of runs by older versions
    inputs: tuple[str, ...]  # names of the files that it read
    summary: str  # what was found, or why it failed
    report: Path | None  # of this run
    good: Path | None  # report of an earlier run in the same folder that went well, where this one did not
    result: Mapping[str, Any]  # content of its result.json


@checked
def list_runs(folder: str | Path) -> list[ListedRun]:
    """The runs in the folders below one, the last one first."""
    folder = to_path(folder, "folder")
    paths = {path for depth in range(1, _DEEPEST + 1) for path in folder.glob("/".join(["*"] * depth + [RESULT]))}
    found = [_listed(path.parent) for path in paths if path.parent.name != "failed"]
    return sorted((run for run in found if run), key=lambda run: (run.started, str(run.folder)), reverse=True)


@checked
def write_index(folder: str | Path) -> Path:
    """Write `index.html`, a page with a line and a link for each run below a folder, and return its path.

    It sorts, filters and compares without a server. `index.html#run=merge&run=merge-2` opens with these compared.

    Raises:
        OutputError: the folder cannot be written to.
    """
    folder = to_path(folder, "folder")
    link = lambda path: path.relative_to(folder).as_posix()  # noqa: E731
    runs, script = list_runs(folder), (TEMPLATES / "index.js").read_text("utf-8")
    text = (
        environment()
        .get_template("index.html.jinja")
        .render(
            runs=runs,
            link=link,
            columns=_COLUMNS,
            data=Markup(_as_script_data([_compared(run, folder) for run in runs])),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    write_text(folder / INDEX, text.encode("utf-8", "replace").decode(), overwrite=True)
    return folder / INDEX


def runs_as_html(folder: Path) -> str:
    """The runs below a folder as a table whose links are seen from the current folder, for a notebook."""
    link = lambda path: escape(os.path.relpath(path))  # noqa: E731
    rows = []
    for run in list_runs(folder):
        name = escape(shown(run.folder.relative_to(folder).as_posix()))
        report = run.report or run.good
        linked = f'<a href="{link(report)}" target="_blank">{name}</a>' if report else name
        cells = (escape(run.status), escape(shown(run.notebook)), run.started[:16].replace("T", " "), linked)
        summary = escape(without_folders(shown(run.summary)))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, summary)) + "</tr>")
    if not rows:
        return f"<p>There are no runs in {escape(str(folder))} yet.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("status", "notebook", "started (UTC)", "report", "found"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _compared(run: ListedRun, folder: Path) -> dict[str, Any]:
    """What the page needs to show a run beside others; names no folder of this disk."""
    result = run.result
    figures = [path for f in result.get("figures") or () if (path := Path(f)).is_relative_to(folder) and path.is_file()]
    checks = [check for check in result.get("checks") or () if isinstance(check, dict)]
    return {
        "folder": run.folder.relative_to(folder).as_posix(),
        "parameters": dict(_flat(result.get("parameters") or {})),
        "metrics": dict(_flat(result.get("metrics") or {})),
        "checks": {str(c.get("name")): _verdict_of(c) for c in checks},
        "figures": [path.relative_to(folder).as_posix() for path in figures],
    }


def _verdict_of(check: Mapping[str, Any]) -> str:
    passed = check.get("passed")
    word = "n/a" if passed is None else "PASS" if passed else "FAIL"
    return f"{word}: {_short(check.get('value'))}"


def _flat(values: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts by name, those inside mappings as "outer.inner"; long lists as text."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            number = value is None or isinstance(value, bool | int | float)
            yield shown(f"{before}{name}"), value if number else _short(value)


def _short(value: object) -> str:
    text = without_folders(shown(value))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _as_script_data(content: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")


def _listed(folder: Path) -> ListedRun | None:
    result = read_result(folder / RESULT)
    if result is None:
        return None
    status, error = status_of(result), result.get("error") or {}
    report = Path(result.get("report") or folder / "report.html")
    report = (
        report if result["status"] in ("ok", "failed") and report.is_relative_to(folder) and report.is_file() else None
    )
    good = folder / "report.html"
    return ListedRun(
        folder=folder,
        notebook=str(result.get("notebook", "")),
        status=status,
        started=str(result.get("started", "")),
        inputs=tuple(Path(f["path"]).name for f in result.get("inputs") or () if isinstance(f, dict) and "path" in f),
        summary=str(error.get("message") or (result.get("metrics") or {}).get("summary") or ""),
        report=report,
        good=good if good.is_file() and good != report else None,
        result=result,
    )
