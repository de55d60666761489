"""The folder of a run's report: what a new run finds there, and what it leaves when it ends.

`result.json` is always of the last run, from its first moment on. A run that ends well replaces `report.html` and the
figures. One that fails replaces them only where they are of a failed run too; else they stay, the result that belongs
to them is kept as `report.json`, and the failed run's report, figures and result go to the folder `failed`.
"""

from pathlib import Path

from rwkv_lab.checkpoint import write_text
from rwkv_lab.errors import OutputError
from rwkv_lab.resources import reports_folder
from rwkv_lab.workbench.process import this_process
from rwkv_lab.workbench.report import Page, write_report
from rwkv_lab.workbench.result import KEPT, RESULT, Record, read_result, status_of, write_json
from rwkv_lab.workbench.runs import write_index

REPORT, FAILED = "report.html", "failed"


def note_on_earlier_run(folder: Path) -> str:
    """What a new run has to know of the one before in its folder: that it was interrupted, or that it is at work."""
    earlier = read_result(folder / RESULT)
    own = earlier is not None and this_process().items() <= earlier.items()  # the first cell was run again
    if earlier is None or earlier["status"] != "running" or own:
        return ""
    which = f"The run before in this folder, started {earlier.get('started', 'earlier')}"
    if status_of(earlier) == "interrupted" or "pid" not in earlier:
        return f"{which}, was interrupted: its process is gone, and it left no report."
    return (
        f"{which} by process {earlier['pid']} on {earlier['host']}, has not ended: "
        "both write to this folder. Give one of them another, by report."
    )


def begin(record: Record) -> None:
    """Write the result of a run that begins; the report of an earlier run that went well stays, with its result.

    Raises:
        OutputError: the folder cannot be written to.
    """
    folder = record.folder
    earlier = read_result(folder / RESULT)
    if earlier is not None and earlier["status"] == "ok" and (folder / REPORT).is_file():
        write_json(folder / KEPT, earlier)
    elif not _is_good(folder):  # it would pass for the report of this run
        (folder / REPORT).unlink(missing_ok=True)
    record.write()
    _list_among_others(folder)


def close(record: Record, page: Page, can_repeat: bool) -> None:
    """Write report, figures and result of a run that has ended.

    Args:
        can_repeat: the parameters are known to be right, so that the report has the command that repeats the run.
    Raises:
        OutputError: the folder cannot be written to.
    """
    good, folder = _is_good(record.folder), record.folder
    if record.status == "failed" and good:
        folder = folder / FAILED
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            raise OutputError(f"{folder}, for the report of a run that failed, cannot be made: {e}") from e
    record.figures = []
    for picture in page.pictures:
        path = folder / f"{picture.name}.png"
        _write_picture(path, picture.png)
        record.figures.append(path)
    for name, text in page.attached.items():
        write_text(folder / name, text, overwrite=True)
    record.report = folder / REPORT
    write_report(record.report, page, record, can_repeat)
    if folder == record.folder:
        _remove_figures_of_the_run_before(record)
        (folder / KEPT).unlink(missing_ok=True)
    else:
        write_json(folder / RESULT, record.as_dict())
    record.write()
    _list_among_others(record.folder)


def _write_picture(path: Path, png: bytes) -> None:
    try:
        path.write_bytes(png)
    except OSError as e:
        raise OutputError(f"the picture {path} cannot be written: {e.strerror or e}") from e


def _is_good(folder: Path) -> bool:
    """Whether `report.html` is of an earlier run that ended well."""
    kept = read_result(folder / KEPT)
    return kept is not None and kept["status"] == "ok" and (folder / REPORT).is_file()


def _remove_figures_of_the_run_before(record: Record) -> None:
    kept = read_result(record.folder / KEPT) or {}
    for figure in map(Path, kept.get("figures", [])):
        if figure.parent == record.folder and figure.suffix == ".png" and figure not in record.figures:
            figure.unlink(missing_ok=True)


def _list_among_others(folder: Path) -> None:
    """Write the index again, where this report is one of those that are given no folder of their own."""
    if folder.parent == reports_folder():
        write_index(folder.parent)
