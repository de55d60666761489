"""A file chooser for checkpoints and YAML files: a text field, and under it a list to walk through folders."""

import os
from pathlib import Path

import ipywidgets as widgets
from traitlets import HasTraits, Unicode

_SUFFIXES = (".pth", ".safetensors", ".yaml", ".yml")  # and recipes and configurations
_MARKS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json")
_HERE = "use this folder"


def listing(folder: Path) -> list[tuple[str, str]]:
    """(label, path) of what can be chosen or entered in a folder; only what this user may read.

    The folder itself is among them where it holds a checkpoint. Empty where it cannot be read.
    """
    try:
        inside = sorted(folder.iterdir(), key=lambda p: (not p.is_dir(), p.name.lower()))
    except OSError:
        inside = []
    rows = [("..", str(folder.parent))]
    if any((folder / mark).is_file() for mark in _MARKS):
        rows.append((_HERE, str(folder)))
    for path in inside:
        if path.name.startswith(".") or not os.access(path, os.R_OK):
            continue
        if path.is_dir() and os.access(path, os.X_OK):
            rows.append((f"{path.name}/", str(path)))
        elif path.suffix in _SUFFIXES:
            rows.append((path.name, str(path)))
    return rows


class FileChooser(HasTraits):
    """`value` is the path as text; it changes when a person types one or picks one from the list."""

    value = Unicode()

    def __init__(self, name: str):
        super().__init__()
        self.text = widgets.Text(
            description=name,
            continuous_update=False,
            style={"description_width": "9rem"},
            layout=widgets.Layout(width="44rem"),
        )
        self.browse = widgets.ToggleButton(
            description="Browse", tooltip="choose from a list of files", layout=widgets.Layout(width="6rem")
        )
        self.place = widgets.Label()
        self.list = widgets.Select(
            tooltip="a file, or a folder to look into", rows=10, layout=widgets.Layout(width="36rem")
        )
        self.walk = widgets.VBox([self.place, self.list], layout=widgets.Layout(margin="0 0 0 9.5rem", display="none"))
        self.box = widgets.VBox([widgets.HBox([self.text, self.browse]), self.walk])
        self.text.observe(lambda change: setattr(self, "value", change["new"]), "value")
        self.observe(lambda change: setattr(self.text, "value", change["new"]), "value")
        self.browse.observe(lambda change: self._open(change["new"]), "value")
        self.list.observe(self._picked, "index")

    def _open(self, opened: bool) -> None:
        self.walk.layout.display = None if opened else "none"
        if opened:
            chosen = Path(self.value)
            self.show(chosen.parent if chosen.is_absolute() and chosen.parent.is_dir() else Path.cwd())

    def show(self, folder: Path) -> None:
        """Fill the list with what is in a folder."""
        self._rows, self.place.value = listing(folder), str(folder)
        self.list.unobserve(self._picked, "index")  # new options choose the first row by themselves, and that is ".."
        # No row is chosen to begin with, so that picking any of them is a change.
        self.list.options, self.list.index = [label for label, _ in self._rows], None
        self.list.observe(self._picked, "index")

    def _picked(self, change: dict) -> None:
        if change["new"] is None:
            return
        label, path = self._rows[change["new"]]
        if label == ".." or label.endswith("/"):
            self.show(Path(path))
        else:
            self.value = path
            self.browse.value = False
