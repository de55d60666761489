"""What notebooks share: runs, parameters, panels, result.json and report.html; a folder here for each notebook.

A notebook calls `run = start("merge", globals())`, then `show_panel(run)`, then the functions of its `cells.py`.
"""

from typing import TYPE_CHECKING

from rwkv_lab.arguments import check
from rwkv_lab.workbench.run import Run, start

if TYPE_CHECKING:
    from rwkv_lab.workbench.panel import Panel


def show_panel(run: Run) -> "Panel | None":
    """Show the panel of the run's notebook; None, and a printed line, where there is no front end."""
    check("show_panel", "run", run, Run)
    from rwkv_lab.workbench.panel import show_panel  # ipywidgets take a second that validation need not wait for

    return show_panel(run)


__all__ = ["Run", "show_panel", "start"]
