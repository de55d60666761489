"""The panel of a notebook in JupyterLab: a second way to set its parameters, with Plan and Run buttons.

It is made from the model of the parameters, edits `run.config` and calls the functions that the cells call; nothing can
be done here only. Work runs in a thread of its own, which Stop and the kernel's Interrupt end: `job.py`.
"""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
from IPython.core.display import Javascript
from IPython.core.getipython import get_ipython
from IPython.display import display
from traitlets import TraitError

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.progress import frontend_present
from rwkv_lab.workbench.entries import entered, keep, keep_entries, last_folder
from rwkv_lab.workbench.fields import Field, align, field_for
from rwkv_lab.workbench.file_chooser import FileChooser
from rwkv_lab.workbench.job import Job
from rwkv_lab.workbench.job_output import JobOutput
from rwkv_lab.workbench.job_progress import JobProgress
from rwkv_lab.workbench.listing import Listed, unlike
from rwkv_lab.workbench.onward import Onward
from rwkv_lab.workbench.registry import cells_of
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import run_all
from rwkv_lab.workbench.words import from_words

# JupyterLab takes keys in lists and on buttons for its own: "m" makes the cell Markdown, an arrow leaves the list.
_KEYS = """setTimeout(() => {
  const panel = element.closest?.(".jp-OutputArea");
  panel?.setAttribute("data-lm-suppress-shortcuts", "true");
  panel?.addEventListener("keydown", event => event.stopPropagation());
}, 100);"""
# ipywidgets draws the arrow of drop-down lists in black, also where JupyterLab's theme is dark.
_ARROW = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E"
    "%3Cpath d='M5 7l4 4 4-4' fill='none' stroke='%23e0e0e0' stroke-width='1.8'/%3E%3C/svg%3E"
)
# Buttons that do nothing now are flat. They are not disabled: one without focus is lost by Tab.
_OFF = "rwkv-lab-off"
_STYLE = (
    '<style>body[data-jp-theme-light="false"] .rwkv-lab-panel .widget-dropdown > select '
    f'{{ background-image: url("data:image/svg+xml,{_ARROW}") }}'
    f".rwkv-lab-panel .{_OFF} {{ background: none; box-shadow: none; cursor: default; "
    "color: var(--jp-ui-font-color2) }"
    ".rwkv-lab-panel ::placeholder { color: var(--jp-ui-font-color2); opacity: 1 }</style>"
)
_TOOLTIPS = {
    "Plan": "show what would happen",
    "Run": "do all that the cells below do",
    "Stop": "end what runs now",
    "Reset": "take the values of the parameters cell",
}
# How a message begins where a parameter has not been given yet.
_MISSING = re.compile(r"(?P<name>\w+) is missing\b|method '\w+' (needs|takes at least) ")


class Panel:
    """Fields and buttons over one run. Every change is validated at once; a refused one leaves the parameters alone.

    Args:
        fields: in the order of the parameters; those that most people set are shown, the others folded.
        buttons: label -> what it does with the run.
    """

    def __init__(self, run: Run, fields: Sequence[Field], buttons: Mapping[str, Callable[[Run], object]]):
        self.run = run
        self.fields = {f.name: f for f in fields}
        self.message, self.refusal = widgets.HTML(), ""
        self.output, self.progress, self.onward = JobOutput(), JobProgress(), Onward()
        self.job: Job | None = None
        self._before = run.record  # the last run, before the job
        self._disabled: list[Any] = []  # while a job reads the fields
        entries = entered(run.folder, run.cell)
        align(fields)
        for field in fields:
            self._fill(field, entries.get(field.name, getattr(run.config, field.name)))
            field.widget.observe(lambda change: self._changed(), "value")
            if isinstance(field.widget, FileChooser):
                self._connect(field.name, field.widget)
        self.hide()
        actions = {label: lambda work=work: self.do(work) for label, work in buttons.items()} | {
            "Stop": self.stop,
            "Reset": self.reset,
        }
        self.buttons = {label: _button(label, action) for label, action in actions.items()}
        self.buttons["Stop"].add_class(_OFF)
        basic = run.model.basic
        more = widgets.Accordion([widgets.VBox([f.box for f in fields if f.name not in basic])], titles=["More"])
        folded = [more] if len(basic) < len(fields) else []
        row = widgets.HBox([*self.buttons.values(), self.progress.box], layout=widgets.Layout(flex_flow="row wrap"))
        self.controls = widgets.VBox([f.box for f in fields if f.name in basic] + folded)
        # HTML with a style in it would be a row of its own.
        style = widgets.HTML(_STYLE, layout=widgets.Layout(height="0", margin="0"))
        self.box = widgets.VBox([self.controls, row, self.message, self.onward.box, self.output.box, style])
        self.box.add_class("rwkv-lab-panel")
        run.listeners.append(self._run_changed)
        if entries:
            self._changed()

    def _run_changed(self) -> None:
        """A pass through the cells, or of a job, begins or has ended."""
        if self.job is not None:
            return  # its end says so
        if self.run.record.status == "running":
            self.output.clear()
            self.onward.hide()
            self.progress.say("the cells below run")
        else:
            self.onward.show(self.run.record)
            self.progress.say("the cells below have run")

    def _fill(self, field: Field, value: object) -> None:
        try:
            field.value = value
        except (TypeError, ValueError, TraitError):  # kept as it was written, and no value of this kind
            field.value = getattr(self.run.config, field.name)

    def reset(self) -> None:
        """Take the values of the parameters cell."""
        if self.job is not None:
            return
        for name, field in self.fields.items():
            field.value = self.run.cell[name]
        self.apply()

    def _connect(self, name: str, chooser: FileChooser) -> None:
        """Have a file chooser begin where files were taken last, and know what the other fields say."""
        chooser.begins_in = lambda: last_folder(self.run.folder)
        chooser.used = lambda folder: keep(self.run.folder, folder=str(folder))
        chooser.objection = lambda file: self._objection(name, file)
        weights = self.fields.get(chooser.files.weights)
        if weights is not None:
            chooser.several.give_weights = lambda text: setattr(weights.widget, "value", text)

    def _objection(self, name: str, file: Listed) -> str:
        """What the other values have against this file, from headers; "" for nothing."""
        others = [f.widget for n, f in self.fields.items() if n != name and isinstance(f.widget, FileChooser)]
        models = [path for other in others if other.files.checkpoints for path in other.paths]
        try:
            self.run.config.changed(**self.values() | {name: str(file.path)}).check_files()
        except RwkvLabError as e:
            if file.name in str(e) and not _MISSING.match(str(e)):
                return str(e)
        return unlike(file, models)

    def values(self) -> dict[str, Any]:
        """The values of the fields, not yet validated; of a hidden field the default."""
        model = self.run.model
        given = {name: field.value for name, field in self.fields.items()}
        return {
            name: value if model.applies(name, given) else model.model_fields[name].default
            for name, value in given.items()
        }

    def hide(self) -> None:
        """Show the fields that apply beside the others' values, and no others, with what they stand for if empty."""
        given = {name: field.value for name, field in self.fields.items()}
        stands_for = self.run.model.stands_for(given | {"report": str(self.run.folder)})
        for name, field in self.fields.items():
            field.box.layout.display = None if self.run.model.applies(name, given) else "none"
            words = self.run.model.model_fields[name].description or ""
            field.explain(words, stands_for.get(name))
            if isinstance(field.widget, FileChooser) and field.widget.files.several:
                self._list_files(field.widget, given)

    def _list_files(self, chooser: FileChooser, given: Mapping[str, Any]) -> None:
        """Show the files of a list, with their weights."""
        weights = chooser.files.weights
        weighted = self.run.model.weighted(given) if weights else ()
        numbers = from_words(self.run.model.model_fields[weights], given[weights]) if weights else None
        chooser.several.refresh(chooser.paths if chooser.files.checkpoints else [], weighted, numbers)

    def apply(self) -> bool:
        """Take the fields over into `run.config`, all or none; False, with a message, where they are refused."""
        self.hide()
        self.refusal = ""
        values = self.values()
        try:
            self.run.configure(**values)
        except RwkvLabError as e:
            keep_entries(self.run.folder, values, self.run.cell)
            self._show_error(e)
            return False
        accepted = self.run.config.model_dump()
        keep_entries(self.run.folder, {name: accepted[name] for name in values}, self.run.cell)
        self.message.value = ""
        return True

    def _changed(self) -> None:
        """Take a change over; what is still to be given is said as a step that comes next, not as an error."""
        self.apply()
        missing = _MISSING.match(self.refusal)
        if missing:
            name, rest = missing["name"], self.refusal[missing.end() :].lstrip(": ")
            text = html.escape(f"Next, give {name}: {rest}" if name else f"Next: {self.refusal}")
            style = "color: var(--jp-ui-font-color2, #616161); white-space: pre-wrap"
            self.message.value = f'<span style="{style}">{text}</span>'

    def do(self, work: Callable[[Run], object]) -> None:
        """What a click does: take the fields over, work, and show the result or the refusal in the panel."""
        if self.job is not None or not self.apply():
            return
        self.job = Job(lambda: self._work(work), self._look, self._ended)
        self._before = self.run.record
        self.output.clear()
        self.onward.hide()
        self.progress.begin()
        self._enable(False)
        if not self.job.start():
            self.job = None
            self._enable(True)
            self.progress.end("another panel of this notebook is at work; wait for its end, or stop it")

    def stop(self) -> None:
        """End what runs now; nothing where nothing does."""
        if self.job is not None:
            self.job.stop()
            self._look()

    def _work(self, work: Callable[[Run], object]) -> None:
        with self.output.captured():
            work(self.run)

    def _look(self) -> None:
        if self.job is not None:
            self.progress.show(self.run.stage, self.job.watcher)

    def _ended(self, error: BaseException | None) -> None:
        self.job = None
        self._enable(True)
        if self.run.record is not self._before:
            self.onward.show(self.run.record)
        if error is None:
            self.progress.end("done after")
        elif isinstance(error, KeyboardInterrupt):
            self.progress.end("stopped after")
        else:
            self.progress.end("failed after")
            if isinstance(error, RwkvLabError):
                self._show_error(error)
            else:
                self.output.show_error(error)

    def _show_error(self, error: RwkvLabError) -> None:
        self.refusal = str(error)
        text = html.escape(f"{type(error).__name__}: {error}")
        self.message.value = f'<pre style="color: var(--jp-error-color1, #c00); white-space: pre-wrap">{text}</pre>'

    def _enable(self, enabled: bool) -> None:
        """Fields cannot be changed while a job reads them; buttons do nothing then, and Stop nothing at other times."""
        if not enabled:
            self._disabled = [w for w in _inside(self.controls) if w.has_trait("disabled") and not w.disabled]
        for widget in self._disabled:
            widget.disabled = not enabled
        for label, button in self.buttons.items():
            chief = "Run" if enabled else "Stop"
            button.button_style = ("primary" if enabled else "warning") if label == chief else ""
            (button.remove_class if enabled == (label != "Stop") else button.add_class)(_OFF)


def _button(label: str, action: Callable[[], None]) -> widgets.Button:
    style = "primary" if label == "Run" else ""
    button = widgets.Button(description=label, tooltip=_TOOLTIPS.get(label, label), button_style=style)
    button.on_click(lambda _: action())
    return button


def _inside(box: Any) -> Iterator[Any]:
    """A widget and all that it holds."""
    yield box
    for child in getattr(box, "children", ()):
        yield from _inside(child)


def _run_for_cells(run: Run) -> None:
    """Do all steps, and set the variables that the cells below would have set: these continue with this run."""
    shell = get_ipython()
    variables = {} if shell is None else shell.user_ns
    for step in cells_of(run.notebook).STEPS:
        variables.pop(step.result, None)  # of the run before
    variables.update(run_all(run))


def show_panel(run: Run) -> Panel | None:
    """Show the panel of the run's notebook; None, and a printed line, where there is no front end."""
    if not frontend_present():  # no widget may even be made: its state would be saved in the executed notebook
        print("No front end here: the parameters above hold.")
        return None
    cells = cells_of(run.notebook)
    fields = [field_for(n, f) for n, f in run.model.model_fields.items() if n not in ("dry_run", "report")]
    buttons: dict[str, Callable[[Run], object]] = {"Plan": cells.preview} if hasattr(cells, "preview") else {}
    panel = Panel(run, fields, buttons | {"Run": _run_for_cells})
    display(panel.box, Javascript(_KEYS))
    return panel
