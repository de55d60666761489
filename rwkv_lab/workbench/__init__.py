"""What notebooks share: runs, parameters, panels, result.json and report.html; a folder here for each notebook.

A notebook calls `run = start("merge", globals())`, then `show_panel(run)`, then the functions of its `cells.py`.
Names are imported on first use: the process that starts a notebook's kernel needs neither torch nor ipywidgets.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_lab.workbench.panel import Panel
    from rwkv_lab.workbench.run import Run, start


def __getattr__(name: str) -> Any:
    if name not in ("Run", "start"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rwkv_lab.workbench import run

    return getattr(run, name)


def show_panel(run: "Run") -> "Panel | None":
    """Show the panel of the run's notebook; None, and a printed line, where there is no front end."""
    from rwkv_lab.arguments import check
    from rwkv_lab.workbench.run import Run

    check("show_panel", "run", run, Run)
    from rwkv_lab.workbench.panel import show_panel  # ipywidgets take a second that validation need not wait for

    return show_panel(run)


def show_runs() -> None:
    """Show the runs whose reports lie in the usual folder, the last one first, with links to the reports."""
    from IPython.core.display import HTML
    from IPython.display import display

    from rwkv_lab.resources import reports_folder
    from rwkv_lab.workbench.runs import runs_as_html

    display(HTML(runs_as_html(reports_folder())))


__all__ = ["Run", "show_panel", "show_runs", "start"]
