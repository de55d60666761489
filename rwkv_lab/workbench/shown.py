"""What the cells of a notebook show of a run, brought up to date when its panel changes the run: both say the same."""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from rwkv_lab.progress import frontend_present
from rwkv_lab.workbench.tables import Table


class Shown:
    """The table of the parameters, and a line above the results of the cells; nothing outside JupyterLab."""

    def __init__(self) -> None:
        self._table: Any = None  # display handles
        self._line: Any = None
        self._superseded = ""

    def parameters(self, table: Table) -> None:
        """Show the table, in the place of one that another cell shows."""
        from IPython.display import display

        self._table = display(table, display_id=True)

    def results_begin(self, in_panel: bool) -> None:
        """A cell, or the panel, begins to run: the cells below show it, or no longer do."""
        if not in_panel and frontend_present():
            from IPython.core.display import HTML
            from IPython.display import display

            self._superseded, self._line = "", display(HTML(""), display_id=True)
        elif self._line is not None:
            at = datetime.now().strftime("%H:%M:%S")
            self._superseded = f"These cells show an earlier run: the panel began another at {at}. Run All shows it."
            self._say(self._superseded)

    def changed(self, table: Table, names: Sequence[str]) -> None:
        """Parameters are others now.

        Args:
            names: of those that are not what the results were made with.
        """
        if self._table is not None:
            self._table.update(table)
        if self._line is not None and not self._superseded:
            what = f"The panel has changed {', '.join(names)} since these cells ran. Run All shows what it makes."
            self._say(what if names else "")

    def _say(self, text: str) -> None:
        from IPython.core.display import HTML

        style = "color: var(--jp-warn-color0, #a50)"
        self._line.update(HTML(f'<p style="{style}">⚠ {escape(text)}</p>' if text else ""))
