"""What became of each run, and where its report is: for a page that lists them, and for the terminal.

A run whose process was killed cannot say so; in the list it is "interrupted".
"""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import write_text
from rwkv_lab.paths import to_path
from rwkv_lab.text import shown
from rwkv_lab.workbench.report import without_folders
from rwkv_lab.workbench.result import RESULT, read_result, status_of

INDEX = "index.html"
_DEEPEST = 3  # folders below the one that is listed


@dataclass(frozen=True)
class ListedRun:
    """One run, by its `result.json`."""

    folder: Path
    notebook: str
    status: str  # "running", "interrupted", "ok" or "failed"
    started: str  # ISO 8601, UTC; "" of runs by older versions
    summary: str  # what was found, or why it failed
    report: Path | None  # of this run
    good: Path | None  # report of an earlier run in the same folder that went well, where this one did not


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

    Raises:
        OutputError: the folder cannot be written to.
    """
    folder = to_path(folder, "folder")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: without_folders(shown(value), []),  # as in the reports
    )
    link = lambda path: path.relative_to(folder).as_posix()  # noqa: E731
    text = environment.get_template("index.html.jinja").render(runs=list_runs(folder), link=link)
    write_text(folder / INDEX, text.encode("utf-8", "replace").decode(), overwrite=True)
    return folder / INDEX


def _listed(folder: Path) -> ListedRun | None:
    result = read_result(folder / RESULT)
    if result is None:
        return None
    status, error = status_of(result), result.get("error") or {}
    report = Path(result.get("report") or folder / "report.html")
    report = report if status in ("ok", "failed") and report.is_relative_to(folder) and report.is_file() else None
    good = folder / "report.html"
    return ListedRun(
        folder=folder,
        notebook=str(result.get("notebook", "")),
        status=status,
        started=str(result.get("started", "")),
        summary=str(error.get("message") or (result.get("metrics") or {}).get("summary") or ""),
        report=report,
        good=good if good.is_file() and good != report else None,
    )
