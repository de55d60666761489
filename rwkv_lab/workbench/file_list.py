"""The files of a list, a row each: what it is, its weight where the job takes one, and a button to remove it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets

from rwkv_lab.workbench.listing import Listed, described, size_in_words


class FileList:
    """Rows under a file chooser that takes several files. They are shown where there is more than one.

    Args:
        changed: called with the paths that are left when a person removes one.
    """

    def __init__(self, changed: Callable[[Sequence[str]], None]):
        self._changed = changed
        self._shown: tuple = ()
        self.weights: list[widgets.Text] = []
        self.give_weights: Callable[[str], None] = lambda text: None
        self.box = widgets.VBox(layout=widgets.Layout(display="none"))

    def refresh(self, paths: Sequence[str], weighted: Sequence[str] = (), weights: object = None) -> None:
        """Show these paths.

        Args:
            weighted: paths that have a weight, in the order of the weights; a base may come before the paths.
            weights: a number for each of `weighted`; anything else where they are not given, or differ by tensor.
        """
        several = len(paths) > 1 or len(weighted) > 1
        self.box.layout.display = None if several and paths else "none"
        if self._shown != (tuple(paths), tuple(weighted)):  # a box that a person is typing into stays
            self._shown = (tuple(paths), tuple(weighted))
            self._make_rows(paths, weighted)
        numbers = weights if isinstance(weights, list) and len(weights) == len(self.weights) else None
        if numbers is not None:
            for box, number in zip(self.weights, numbers, strict=True):
                box.value = f"{number:g}" if isinstance(number, int | float) else str(number)

    def _make_rows(self, paths: Sequence[str], weighted: Sequence[str]) -> None:
        self.weights = [self._weight(path) for path in weighted]
        before = list(weighted[: len(weighted) - len(paths)]) if weighted else []  # the base, which is not of the list
        boxes = self.weights or [None] * len(paths)
        places = [*[None] * len(before), *range(len(paths))]
        self.box.children = [
            self._row(path, box, at) for path, box, at in zip([*before, *paths], boxes, places, strict=True)
        ]

    def _row(self, path: str, weight: widgets.Text | None, at: int | None) -> widgets.HBox:
        """A row, of the file at this place of the list; None: not of the list."""
        label = widgets.Label(_in_words(path), tooltip=path, layout=widgets.Layout(width="27rem"))
        remove = widgets.Button(
            description="Remove",
            tooltip=f"take {Path(path).name} off the list",
            layout=widgets.Layout(width="6rem", visibility="hidden" if at is None else None),
        )
        remove.on_click(lambda _: self._changed([p for i, p in enumerate(self._shown[0]) if i != at]))
        return widgets.HBox([label, *([weight] if weight else []), remove])

    def _weight(self, path: str) -> widgets.Text:
        box = widgets.Text(
            description="weight",
            tooltip=f"weight of {Path(path).name}",
            continuous_update=False,
            style={"description_width": "4rem"},
            layout=widgets.Layout(width="10rem"),
        )
        box.observe(lambda change: self._weigh(), "value")
        return box

    def _weigh(self) -> None:
        """Pass the weights on once every file has one, or none has."""
        given = [box.value.strip() for box in self.weights]
        if all(given) or not any(given):
            self.give_weights(", ".join(given) if all(given) else "")


def _in_words(path: str) -> str:
    """Name, kind, generation and size of a file, or what is wrong with it."""
    if path.startswith("demo:"):
        return path
    file = described(Listed(Path(path).expanduser(), Path(path).name))
    what = ", ".join(filter(None, (file.kind, file.model, size_in_words(file))))
    return f"{file.name}: {f'⚠ {file.fault}' if file.fault else what}"
