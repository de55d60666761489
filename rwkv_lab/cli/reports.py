"""Shows what became of runs."""

import os
import sys
import webbrowser
from pathlib import Path

from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import what_is_there
from rwkv_lab.resources import reports_folder


def show_report(given: str | None, in_browser: bool) -> int:
    """Print the verdict of a run, or the list of the runs below a folder; the exit code: 1 where a run is not ok.

    Args:
        given: a run's folder, a folder with runs below it, or the name of a notebook; None: where reports go.
        in_browser: open the report, or the list.
    Raises:
        ParameterError: there is no such folder, or no run in it.
    """
    from rwkv_lab.workbench.result import RESULT, read_result, status_of

    folder = _folder(given)
    result = read_result(folder / RESULT)
    if result is None:
        return _show_all(folder, in_browser)
    status, error = status_of(result), result.get("error") or {}
    said = error.get("message") or (result.get("metrics") or {}).get("summary") or ""
    print(f"{status:<11} {result.get('notebook', '')}, started {result.get('started', 'at a time it does not state')}")
    if said:
        print(f"found       {said}")
    report = Path(result.get("report") or folder / "report.html")
    if report.is_file():
        print(f"report      {report}")
    if in_browser and report.is_file():
        _open(report)
    return 0 if status == "ok" else 1


def _show_all(folder: Path, in_browser: bool) -> int:
    from rwkv_lab.workbench.runs import list_runs, write_index
    from rwkv_lab.workbench.tables import Table

    runs = list_runs(folder)
    if not runs:
        raise ParameterError(f"There are no runs in {folder}: name the folder that holds the folders of reports.")
    rows = [
        (run.status, run.notebook, run.started, os.path.relpath(run.folder, folder), " ".join(run.summary.split()))
        for run in runs
    ]
    print(Table("Runs, the last one first", ("status", "notebook", "started", "folder", "found"), rows))
    index = write_index(folder)
    print(index)
    if in_browser:
        _open(index)
    return 0


def _folder(given: str | None) -> Path:
    if not given:
        return reports_folder().absolute()
    own = reports_folder() / given
    folder = Path(os.path.expanduser(given))
    folder = own if not folder.exists() and own.is_dir() else folder
    folder = folder.parent if folder.is_file() else folder
    if not folder.is_dir():
        raise ParameterError(f"there is no folder {folder}{what_is_there(folder)}")
    return folder.absolute()


def _open(page: Path) -> None:
    if not webbrowser.open(page.as_uri()):
        print(f"There is no browser here. Open {page}", file=sys.stderr)
