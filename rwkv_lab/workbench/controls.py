"""Panels for JupyterLab: a second way to set a notebook's parameters, with Plan and Run buttons.

A panel edits `run.config` and calls the functions that the cells call; nothing can be done here only. Work runs in the
main thread, where Interrupt reaches it.
"""

import html
import json
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.merge.methods import METHODS
from rwkv_lab.merge.refusals import DTYPES
from rwkv_lab.progress import frontend_present
from rwkv_lab.wkv import backends
from rwkv_lab.workbench.choosing import FileChooser
from rwkv_lab.workbench.run import Run

_LABEL = {"description_width": "9rem"}
_WIDE = {"width": "44rem"}  # no Layout: that would be a widget, made at import
_WORDS = "{words}"  # stands in placeholders for what `Field.explain` is told


class Field:
    """A widget for one parameter, and how its value is turned into the parameter's and back."""

    def __init__(self, name: str, widget: Any, to_widget: Callable = lambda v: v, from_widget: Callable = lambda v: v):
        self.name, self.widget = name, widget
        self._to_widget, self._from_widget = to_widget, from_widget

    @property
    def value(self) -> Any:
        """The parameter's value, not yet validated."""
        return self._from_widget(self.widget.value)

    @value.setter
    def value(self, value: Any) -> None:
        self.widget.value = self._to_widget(value)

    def explain(self, words: str) -> None:
        """Show what the parameter is, where this kind of widget has room for it."""
        if isinstance(self.widget, widgets.Checkbox):
            self.widget.description = f"{self.name}: {words}"
            return
        shown = getattr(self.widget, "text", self.widget)  # a FileChooser has a text field
        shown.tooltip = words
        if hasattr(shown, "placeholder"):
            shown.placeholder = shown.placeholder.replace(_WORDS, words)


class Panel:
    """Fields and buttons over one run. Every change is validated at once; a refused one leaves the parameters alone.

    Args:
        fields: in the order in which they are shown.
        buttons: label -> what it does with the run.
    """

    def __init__(self, run: Run, fields: list[Field], buttons: dict[str, Callable[[Run], object]]):
        self.run = run
        self.fields = {f.name: f for f in fields}
        self.message = widgets.HTML()
        self.output = widgets.Output()
        for field in fields:
            field.explain(type(run.config).model_fields[field.name].description)
            field.value = getattr(run.config, field.name)
            field.widget.observe(lambda change: self.apply(), "value")
        self.buttons = {}
        for label, work in buttons.items():
            button = widgets.Button(description=label, button_style="primary" if label == "Run" else "")
            button.on_click(lambda _, work=work: self.do(work))
            self.buttons[label] = button
        shown = [getattr(f.widget, "box", f.widget) for f in fields]
        self.box = widgets.VBox([*shown, widgets.HBox([*self.buttons.values()]), self.message, self.output])

    def apply(self) -> bool:
        """Take the fields over into `run.config`, all or none; False, with a message, where they are refused."""
        try:
            self.run.configure(**{name: field.value for name, field in self.fields.items()})
        except RwkvLabError as e:
            self._say(e)
            return False
        self.message.value = ""
        return True

    def do(self, work: Callable[[Run], object]) -> None:
        """What a click does: take the fields over, work, and show the result or the refusal in the panel."""
        if not self.apply():
            return
        self._enable(False)
        self.output.clear_output()
        self.message.value = "working …"
        try:
            with self.output:
                work(self.run)
            self.message.value = ""
        except RwkvLabError as e:
            self._say(e)
        finally:
            self._enable(True)

    def _say(self, error: RwkvLabError) -> None:
        text = html.escape(f"{type(error).__name__}: {error}")
        self.message.value = f'<pre style="color: var(--jp-error-color1, #c00); white-space: pre-wrap">{text}</pre>'

    def _enable(self, enabled: bool) -> None:
        for button in self.buttons.values():
            button.disabled = not enabled


def merge_panel(run: Run) -> Panel | None:
    """Show the panel of merge.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import merging

    if not _someone_there():
        return None
    fields = [
        _path("base"),
        _paths("tuned"),
        _text("out", "merged.pth in the report folder"),
        _choice("method", ("auto", *METHODS)),
        _number("alpha"),
        _numbers("weights"),
        _mapping("parameters", '{"density": 0.3}'),
        _patterns("include"),
        _patterns("exclude"),
        _choice("scan", ("all", "changed")),
        _choice("dtype", (("each its own", ""), *((d, d) for d in DTYPES))),
        _flag("overwrite"),
    ]
    return _show(Panel(run, fields, {"Plan": merging.preview, "Run": merging.everything}))


def train_panel(run: Run) -> Panel | None:
    """Show the panel of train.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import training

    if not _someone_there():
        return None
    fields = [
        _choice("kind", tuple(training.RECIPES)),
        _path("base"),
        _text("data", "english, python, or a path"),
        _text("out", "trained.pth in the report folder"),
        *(_whole_or_none(name) for name in ("steps", "batch_size", "ctx_len", "rank")),
        _number("lr"),
        _number("alpha"),
        _patterns("targets"),
        _choice("quant", training.QUANTS),
        _choice("dtype", tuple(training.DTYPES)),
        _choice("autocast", (("none", ""), *((a, a) for a in training.AUTOCASTS if a))),
        _text("device", "cpu or cuda"),
        _whole("seed", 0),
        _whole("eval_every", 0),
        _whole("patience", 0),
        _whole("checkpoint_every", 0),
        _flag("resume"),
        _flag("compare"),
        _flag("overwrite"),
    ]
    return _show(Panel(run, fields, {"Plan": training.preview, "Run": training.everything}))


def inspect_panel(run: Run) -> Panel | None:
    """Show the panel of inspect.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import inspecting

    if not _someone_there():
        return None
    return _show(Panel(run, [_path("checkpoint")], {"Run": inspecting.everything}))


def modes_panel(run: Run) -> Panel | None:
    """Show the panel of modes.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import modes

    if not _someone_there():
        return None
    fields = [
        _path("model"),
        _path("compare_with"),
        _whole("length", 16),
        _whole("batch", 1),
        _several("dtypes", tuple(modes.DTYPES)),
        _several("backends", backends()),
    ]
    return _show(Panel(run, fields, {"Run": modes.everything}))


def benchmark_panel(run: Run) -> Panel | None:
    """Show the panel of benchmark.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import benchmarking

    if not _someone_there():
        return None
    fields = [
        _path("model"),
        _several_whole("lengths"),
        _several_whole("batches"),
        _several("dtypes", ("bf16", "fp32", "fp16", "int8", "int4")),
        _several("backends", backends()),
        _choice("device", ("cpu", "cuda")),
        _patterns("peers"),
        _whole("rounds", 1),
    ]
    return _show(Panel(run, fields, {"Run": benchmarking.everything}))


def peft_panel(run: Run) -> Panel | None:
    """Show the panel of peft.ipynb; None, and a line that says so, where no front end is there."""
    from rwkv_lab.workbench import adapting

    if not _someone_there():
        return None
    fields = [
        _path("base"),
        _path("adapter"),
        _path("second"),
        _patterns("targets"),
        _whole("rank", 1),
        _text("data", "english, python, or a path"),
        _number("alpha"),
        _paths("pissa_init"),
        _mapping("parameters", '{"use_rslora": true}'),
    ]
    return _show(Panel(run, fields, {"Run": adapting.everything}))


def _someone_there() -> bool:
    """In batch no widget may even be made: its state would be saved in the executed notebook."""
    if not frontend_present():
        print("No front end here: the parameters above hold.")
    return frontend_present()


def _show(panel: Panel) -> Panel:
    display(panel.box)
    return panel


def _path(name: str) -> Field:
    return Field(name, FileChooser(name))


def _paths(name: str) -> Field:
    """One path, or several with a semicolon and a space between them."""
    field = _path(name)
    join = lambda v: "; ".join(v) if isinstance(v, list) else v  # noqa: E731
    return Field(name, field.widget, join, lambda text: text.split("; ") if "; " in text else text)


def _text(name: str, placeholder: str = _WORDS) -> Field:
    widget = widgets.Text(
        description=name, placeholder=placeholder, style=_LABEL, layout=_WIDE, continuous_update=False
    )
    return Field(name, widget)


def _choice(name: str, options: tuple) -> Field:
    return Field(name, widgets.Dropdown(options=options, description=name, style=_LABEL))


def _number(name: str) -> Field:
    field = _text(name)
    # Text that is no number goes on as it is, and is refused with the parameter's own words.
    return Field(name, field.widget, lambda v: "" if v is None else f"{v:g}", lambda text: text.strip() or None)


def _numbers(name: str) -> Field:
    field = _text(name)
    return Field(
        name,
        field.widget,
        lambda v: ", ".join(f"{x:g}" for x in v),
        lambda text: [part.strip() for part in text.split(",") if part.strip()],
    )


def _mapping(name: str, example: str) -> Field:
    field = _text(name, f"{_WORDS}: {example}")
    return Field(name, field.widget, lambda v: json.dumps(v) if v else "", _from_json)


def _from_json(text: str) -> object:
    """What the text stands for; as it is, to be refused with the parameter's own words, where it is not JSON."""
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError:
        return text


def _whole(name: str, least: int) -> Field:
    widget = widgets.BoundedIntText(description=name, min=least, max=2**20, style=_LABEL)
    return Field(name, widget)


def _whole_or_none(name: str) -> Field:
    field = _text(name)

    def read(text: str) -> Any:
        text = text.strip()
        return int(text) if text.isdecimal() else text or None  # what is no number is refused in the parameter's words

    return Field(name, field.widget, lambda v: "" if v is None else str(v), read)


def _several_whole(name: str) -> Field:
    field = _text(name)
    return Field(name, field.widget, lambda v: ", ".join(map(str, v)), _whole_numbers)


def _whole_numbers(text: str) -> list:
    """Words that are no numbers go on as they are, and are refused with the parameter's own words."""
    return [int(word) if word.isdecimal() else word for word in text.replace(",", " ").split()]


def _several(name: str, options: tuple[str, ...]) -> Field:
    widget = widgets.SelectMultiple(options=options, description=name, rows=len(options), style=_LABEL)
    return Field(name, widget, tuple, list)


def _patterns(name: str) -> Field:
    widget = widgets.Textarea(
        description=name,
        placeholder=f"{_WORDS}; one per line",
        rows=2,
        style=_LABEL,
        layout=_WIDE,
        continuous_update=False,
    )
    return Field(name, widget, "\n".join, lambda text: [line.strip() for line in text.splitlines() if line.strip()])


def _flag(name: str) -> Field:
    return Field(name, widgets.Checkbox(style=_LABEL, layout=_WIDE))
