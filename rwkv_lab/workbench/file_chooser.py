"""A file chooser: a text field, and under it a list to walk through folders, which says what each file is."""

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from traitlets import HasTraits, Unicode

from rwkv_lab.workbench.file_list import FileList
from rwkv_lab.workbench.listing import Listed, described, listing, not_taken, size_in_words
from rwkv_lab.workbench.parameters import Files

SEPARATOR = "; "  # between several paths in the text field
_NAME, _BYTES, _KIND = 36, 8, 10  # characters of the columns
# Rows are columns of one font width; without this a list has that of buttons.
_STYLE = "<style>.rwkv-files select {font-family: var(--jp-code-font-family, monospace); font-size: 12px}</style>"


class FileChooser(HasTraits):
    """`value` is the path as text; it changes when a person types one or takes one from the list.

    Args:
        files: what is chosen: which kinds of checkpoints, whether several.

    Attributes:
        begins_in: the folder to begin with, where no path is given yet.
        objection: file -> what the other fields' values have against it, "" for nothing.
        used: called with the folder of a file that was taken.
    """

    value = Unicode()

    def __init__(self, name: str, files: Files):
        super().__init__()
        self.name, self.files = name, files
        self.begins_in: Callable[[], Path] = Path.cwd
        self.objection: Callable[[Listed], str] = lambda file: ""
        self.used: Callable[[Path], None] = lambda folder: None
        self._rows: list[Listed] = []
        self.text = widgets.Text(
            description=name,
            continuous_update=False,
            layout=widgets.Layout(width="44rem"),
        )
        self.browse = widgets.ToggleButton(
            description="Browse", tooltip="choose from a list of files", layout=widgets.Layout(width="6rem")
        )
        self._make_list()
        self.several = FileList(lambda paths: setattr(self, "value", SEPARATOR.join(paths)))
        self.box = widgets.VBox([widgets.HBox([self.text, self.browse]), self.several.box, self.walk])
        self.text.observe(lambda change: setattr(self, "value", change["new"]), "value")
        self.observe(lambda change: setattr(self.text, "value", change["new"]), "value")
        self.browse.observe(lambda change: self._open(change["new"]), "value")
        self.align(9)

    def align(self, width: float) -> None:
        """Give the label so many rem; what is under it begins where the text does."""
        self.text.style.description_width = f"{width:g}rem"
        self.several.box.layout.margin = f"0 0 0 {width + 0.5:g}rem"
        self.walk.layout.margin = f"0 0 0 {width - 4:g}rem"  # its own labels have 4

    def _make_list(self) -> None:
        """What Browse unfolds: the folder, its rows, what the marked row is, and buttons: the arrow keys only mark."""
        shape = {"layout": widgets.Layout(width="auto", max_width="50rem"), "style": {"description_width": "4rem"}}
        tooltip = "the folder; another can be written"
        self.place = widgets.Text(description="folder", continuous_update=False, tooltip=tooltip, **shape)
        self.list = widgets.Select(description="files", tooltip="a file, or a folder to look into", rows=10, **shape)
        self.list.add_class("rwkv-files")
        self.details = widgets.HTML(layout=widgets.Layout(max_width="46rem", margin="0 0 0 4.5rem"))
        self.open = _button("Open folder", "look into the marked folder")
        self.use = _button("Use", f"take the marked file as {self.name}")
        self.add = _button("Add", f"take the marked file too, beside those of {self.name}")
        shown = [self.open, self.use, *([self.add] if self.files.several else [])]
        buttons = widgets.HBox(shown, layout=widgets.Layout(margin="0 0 0 4.5rem"))
        # HTML with a style in it would be a row of its own.
        style = widgets.HTML(_STYLE, layout=widgets.Layout(height="0", margin="0"))
        self.walk = widgets.VBox(
            [self.place, self.list, self.details, buttons, style],
            layout=widgets.Layout(display="none"),
        )
        self.place.observe(lambda change: self._fill(Path(change["new"]).expanduser()), "value")
        self.list.observe(self._marked, "index")
        self.open.on_click(lambda _: self.show(self._rows[self.list.index or 0].path))
        self.use.on_click(lambda _: self._take(beside=[]))
        self.add.on_click(lambda _: self._take(beside=self.paths))

    @property
    def paths(self) -> list[str]:
        """The paths in the text field, without the demo's, which give way to the first that is added."""
        paths = [path.strip() for path in self.value.split(SEPARATOR)] if self.files.several else [self.value]
        return [path for path in paths if path and not path.startswith("demo:")]

    def _open(self, opened: bool) -> None:
        self.walk.layout.display = None if opened else "none"
        if opened:
            chosen = Path(self.paths[-1]).expanduser() if self.paths else Path()
            self.show(chosen.parent if chosen.is_absolute() and chosen.parent.is_dir() else self.begins_in())

    def show(self, folder: Path) -> None:
        """Fill the list with what is in a folder."""
        if self.place.value == str(folder):
            self._fill(folder)  # again: files may have come
        else:
            self.place.value = str(folder)

    def _fill(self, folder: Path) -> None:
        self._rows = listing(folder, self.files.checkpoints)
        self.list.unobserve(self._marked, "index")  # new options mark the first row by themselves, and that is ".."
        self.list.options, self.list.index = [self._label(row) for row in self._rows], None
        self.list.observe(self._marked, "index")
        self._marked({"new": None})

    def _label(self, row: Listed) -> str:
        """A row of the list: name, bytes, kind, generation and size of the model; or what is wrong instead of these."""
        fault = not_taken(row, self.name, self.files.kinds)
        cells = [_cut(row.name, _NAME), size_in_words(row).rjust(_BYTES)]
        cells += [f"⚠ {fault}"] if fault else [row.kind.ljust(_KIND), row.model]
        label = "  ".join(cells).rstrip()
        return label.replace(" ", "\N{NO-BREAK SPACE}")  # a browser draws several blanks as one

    def _marked(self, change: dict) -> None:
        """Say what the marked row is, and what can be done with it."""
        at: int | None = change["new"]
        row = None if at is None else self._rows[at]
        self.open.disabled = row is None or not row.opens
        self.use.disabled = self.add.disabled = row is None or not row.chosen
        if row is None or not row.chosen:
            self.details.value = ""
            return
        if self.files.checkpoints and not row.kind and not row.fault:
            row = described(row)
        fault = not_taken(row, self.name, self.files.kinds) or self.objection(row)
        what = ", ".join(filter(None, (row.kind, row.model, size_in_words(row), row.more)))
        self.details.value = f"<b>{html.escape(row.name)}</b> {html.escape(what)}" + warning(fault)

    def _take(self, beside: list[str]) -> None:
        """Take the marked file, beside those that stay."""
        path = self._rows[self.list.index or 0].path  # the buttons are off while no row is marked
        self.used(path.parent)
        self.value = SEPARATOR.join(dict.fromkeys([*beside, str(path)]))
        if not beside:
            self.browse.value = False


def warning(text: str) -> str:
    """A sentence of what is wrong, as HTML; "" where nothing is."""
    if not text:
        return ""
    sentence = text[:1].upper() + text[1:]
    end = "" if sentence.endswith(".") else "."
    return f'<br><span style="color: var(--jp-error-color1, #c00)">⚠ {html.escape(sentence + end)}</span>'


def _button(label: str, tooltip: str) -> widgets.Button:
    return widgets.Button(description=label, tooltip=tooltip, disabled=True, layout=widgets.Layout(width="7rem"))


def _cut(name: str, width: int) -> str:
    """The name in so many characters: with its beginning and its end, which tell files apart."""
    if len(name) <= width:
        return name.ljust(width)
    return f"{name[: width - 13]}…{name[-12:]}"
