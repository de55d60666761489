"""What a panel says after a run: its verdict, and where it leads, to the report and to notebooks that go on with it."""

import html
import os
from pathlib import Path
from urllib.parse import quote

import ipywidgets as widgets

from rwkv_lab.resources import notebooks_folder
from rwkv_lab.workbench.entries import propose
from rwkv_lab.workbench.next_steps import Use, uses
from rwkv_lab.workbench.report import verdict, verdict_in_words
from rwkv_lab.workbench.result import Record

# JupyterLab resolves links to files of its own folders, and opens these itself. Elsewhere a person follows the link.
_FOLLOW = """let looks = 0;
const timer = setInterval(() => {
  const link = element.closest(".jp-OutputArea")?.querySelector("a");
  const resolved = link && /^(https?:|[/])/.test(link.getAttribute("href"));
  if (resolved) link.click();
  if (resolved || ++looks > 50) clearInterval(timer);
}, 100);"""


class Onward:
    """The verdict, a link to the report, a button for each notebook that takes what was written; `box` shows them."""

    def __init__(self):
        self.links, self.buttons = widgets.Output(), widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        self.opened = widgets.Output()
        self.box = widgets.VBox([self.links, self.buttons, self.opened], layout=widgets.Layout(display="none"))

    def hide(self) -> None:
        """Show nothing: there is no run, or it has not ended."""
        self.box.layout.display = "none"
        self.opened.outputs = ()

    def show(self, record: Record) -> None:
        """Show where a run that has ended leads."""
        if record.report is None:
            self.hide()
            return
        link = _html(f"{_link(record.report, 'Open report')} {html.escape(str(record.report))}")
        self.links.outputs = (*_found(record), link)
        found = uses(record)
        label = [widgets.Label("Use this output in:")] if found else []
        self.buttons.children = (*label, *(self._button(use, record) for use in found))
        self.opened.outputs = ()
        self.box.layout.display = None

    def _button(self, use: Use, record: Record) -> widgets.Button:
        tooltip = f"{use.purpose}: opens {use.notebook}.ipynb"
        button = widgets.Button(description=use.notebook, tooltip=tooltip, layout=widgets.Layout(width="7rem"))
        button.on_click(lambda _: self._open(use, record))
        return button

    def _open(self, use: Use, record: Record) -> None:
        propose(use.notebook, record.notebook, use.parameters)
        file, names = f"{use.notebook}.ipynb", html.escape(" and ".join(use.parameters))
        folder = next((f for f in (Path.cwd(), notebooks_folder()) if (f / file).is_file()), Path.cwd())
        words = (
            f"{_link(folder / file, f'Open {file}')}: run its cells as far as the panel, which has {names} filled in. "
        )
        words += "Where it is open already, run them again."
        script = {"output_type": "display_data", "data": {"application/javascript": _FOLLOW}, "metadata": {}}
        self.opened.outputs = (_html(words), script)


def _found(record: Record) -> tuple[dict, ...]:
    """The verdict of a run that came to its end, and what it found; of others the panel says what ended them."""
    if record.status == "failed" and not record.failed_checks:
        return ()
    summary = html.escape(str(record.metrics.get("summary", "")))
    return (_html(f"<b>{verdict(record)}</b> {html.escape(verdict_in_words(record))} {summary}"),)


def _link(path: Path, words: str) -> str:
    """A link as notebooks have it: from the folder of the notebook, which is the kernel's."""
    relative = Path(os.path.relpath(path, Path.cwd())).as_posix()
    return f'<a href="{html.escape(quote(relative))}" target="_blank">{html.escape(words)}</a>'


def _html(text: str) -> dict:
    return {"output_type": "display_data", "data": {"text/html": f"<p>{text}</p>"}, "metadata": {}}
