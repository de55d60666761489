"""Fields of a panel: a widget for each kind of parameter, made from the parameter's type."""

import html
import json
import re
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import ipywidgets as widgets
from pydantic.fields import FieldInfo

from rwkv_lab.spec import OneOf
from rwkv_lab.workbench.file_chooser import SEPARATOR, FileChooser
from rwkv_lab.workbench.parameters import Files
from rwkv_lab.workbench.words import takes_mapping

_NARROW = {"width": "22rem"}  # with help beside it; no Layout: that would be a widget, made at import
_WIDE = {"width": "44rem"}
_CHOICE = {"width": "max-content", "min_width": "22rem"}
_WORDS = "{words}"  # stands in placeholders for the help
_OF_EMPTY = re.compile(r"\bempty: (.+?)(?:;|$)")  # in a parameter's help: what no value stands for
_SAY_IT = ("empty: ", "None everywhere: ")  # parts of a help that the value itself stands in the place of
_UNNAMED = "(none)"  # an empty choice whose parameter does not say what it stands for
_BESIDE = '<div style="color: var(--jp-ui-font-color2, #616161); line-height: 1.3; padding: 5px 0 0 4px">{}</div>'

M = TypeVar("M")


class Field:
    """A widget for one parameter, and how its value is turned into the parameter's and back.

    A wide one, for a path or a text, has its help as placeholder; the others have it beside them.
    """

    def __init__(self, name: str, widget: Any, to_widget: Callable = lambda v: v, from_widget: Callable = lambda v: v):
        self.name, self.widget = name, widget
        self._to_widget, self._from_widget = to_widget, from_widget
        self._placeholder = ""  # with `_WORDS` in the place of the help
        shown = getattr(widget, "box", widget)
        wide = _typed_in(widget).layout.width == _WIDE["width"]
        self._help = None if wide else widgets.HTML(layout={"flex": "1 1 10rem", "max_width": "32rem"})
        # What is shown: the widget, or the box that it comes in, with the help.
        self.box = shown if self._help is None else widgets.HBox([shown, self._help])

    @property
    def value(self) -> Any:
        """The parameter's value, not yet validated."""
        return self._from_widget(self.widget.value)

    @value.setter
    def value(self, value: Any) -> None:
        self.widget.value = self._to_widget(value)

    def explain(self, words: str, stands_for: object = None) -> None:
        """Show the parameter's help.

        Args:
            stands_for: what the field comes to while it is empty; None where the help says it.
        """
        shown, words = _typed_in(self.widget), words.replace("None: ", "empty: ")  # what a person sees of it
        if isinstance(self.widget, widgets.Dropdown):
            self._name_empty(words if stands_for is None else f"empty: {stands_for}")
            stands_for = None  # the list says it
        if stands_for is not None:
            words = "; ".join(part for part in words.split("; ") if not part.startswith(_SAY_IT))
        here = "" if stands_for is None else f"empty: {stands_for}"
        shown.tooltip = "; ".join(filter(None, (here, words)))  # first, since the end of long words is not seen
        if self._help is None:
            self._placeholder = self._placeholder or shown.placeholder.strip("\u200b") or _WORDS
            shown.placeholder = self._placeholder.replace(_WORDS, shown.tooltip)
        elif hasattr(shown, "placeholder"):
            shown.placeholder, self._help.value = here, _BESIDE.format(html.escape(words))
        else:
            self._help.value = _BESIDE.format(html.escape(shown.tooltip))

    def _name_empty(self, words: str) -> None:
        """Have the empty choice of a drop-down list say what it stands for."""
        labels, found = self.widget._options_labels, _OF_EMPTY.search(words)
        if "" in dict(self.widget.options).values() and found:
            # Not by `options`, which chooses the first one: the value would change, and with it the parameters.
            self.widget.set_trait("_options_labels", (found[1], *labels[1:]))


def _typed_in(widget: Any) -> Any:
    """The widget that has the tooltip and the placeholder: a FileChooser has a text field."""
    return getattr(widget, "text", widget)


def align(fields: Iterable[Field]) -> None:
    """Give the labels of a panel's fields one width, into which the longest fits."""
    width = max(9.0, 0.48 * max((len(field.name) for field in fields), default=0))  # rem
    for field in fields:
        if isinstance(field.widget, FileChooser):
            field.widget.align(width)
            continue
        field.widget.style.description_width = f"{width:g}rem"
        if field.widget.layout.width == _NARROW["width"]:
            field.widget.layout.width = f"{width + 13:g}rem"
        elif field.widget.layout.min_width == _CHOICE["min_width"]:
            field.widget.layout.min_width = f"{width + 13:g}rem"


def field_for(name: str, info: FieldInfo) -> Field:
    """The field for a parameter, by its type."""
    kind, optional = _without_none(info.annotation)
    if optional and kind is not int and kind is not float:
        return _flag_or_none(name) if kind is bool else _or_none(_given_field(name, info, kind))
    return _given_field(name, info, kind, optional)


def _given_field(name: str, info: FieldInfo, kind: Any, optional: bool = False) -> Field:
    files = _marked([*info.metadata, *_marks(info.annotation)], Files)
    if files:
        return _paths(name, files, is_list=get_origin(kind) is list) if files.several else _path(name, files)
    origin, inside = get_origin(kind), get_args(kind)
    choices = _choices(kind, info.metadata)
    if choices:
        return _choice(name, choices)
    if takes_mapping(info) and kind is not dict and origin is not dict:
        return _setting(name, info.default)
    if origin is list:
        return _list(name, inside[0])
    if origin is dict or kind is dict:
        return _mapping(name, json.dumps(info.examples[0]) if info.examples else "")
    if kind is bool:
        return _flag(name)
    if kind is int:
        return _whole_or_none(name) if optional else _whole(name, _least(info))
    return _number(name) if kind is float else _text(name)


def _list(name: str, inside: Any) -> Field:
    kind, metadata = inside, ()
    if get_origin(inside) is Annotated:
        kind, *metadata = get_args(inside)
    choices = _choices(kind, metadata)
    if choices:
        return _several(name, choices)
    kind = _without_none(inside)[0]
    return {int: _several_whole, float: _numbers}.get(kind, _patterns)(name)


def _choices(kind: Any, metadata: Iterable[object]) -> tuple[str, ...]:
    """What a text may be; empty where it may be anything."""
    among = _marked(metadata, OneOf)
    return get_args(kind) if get_origin(kind) is Literal else tuple(among.names()) if among else ()


def _marked(metadata: Iterable[object], kind: type[M]) -> M | None:
    return next((mark for mark in metadata if isinstance(mark, kind)), None)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """(the type itself, without None and Annotated, whether None is allowed too)."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    kinds = [a for a in get_args(annotation) if a is not type(None)]
    return _without_none(kinds[0])[0], len(kinds) < len(get_args(annotation))


def _marks(annotation: Any) -> tuple[Any, ...]:
    """What `Annotated` adds to a type, or to the first of several."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _least(info: FieldInfo) -> int:
    return next((m.ge for m in info.metadata if hasattr(m, "ge")), 0)


def _path(name: str, files: Files) -> Field:
    return Field(name, FileChooser(name, files))


def _paths(name: str, files: Files, is_list: bool) -> Field:
    """One path, or several with a semicolon and a space between them.

    Args:
        is_list: one path is a list too.
    """

    def read(text: str) -> Any:
        parts = [part.strip() for part in text.split(SEPARATOR) if part.strip()]
        return parts if is_list or len(parts) > 1 else text

    join = lambda v: SEPARATOR.join(v) if isinstance(v, list) else v  # noqa: E731
    return Field(name, FileChooser(name, files), join, read)


def _text(name: str, placeholder: str = _WORDS, layout: dict[str, str] = _WIDE) -> Field:
    return Field(name, widgets.Text(description=name, placeholder=placeholder, layout=layout, continuous_update=False))


def _choice(name: str, choices: tuple[str, ...]) -> Field:
    options = tuple((text or _UNNAMED, text) for text in choices)
    return Field(name, widgets.Dropdown(options=options, description=name, layout=_CHOICE))


def _number(name: str) -> Field:
    field = _text(name, layout=_NARROW)
    # Text that is no number stays text, and is refused by the parameter's type.
    return Field(name, field.widget, lambda v: "" if v is None else f"{v:g}", lambda text: text.strip() or None)


def _numbers(name: str) -> Field:
    field = _text(name, layout=_NARROW)
    return Field(
        name,
        field.widget,
        lambda v: ", ".join(f"{x:g}" for x in v),
        lambda text: [part.strip() for part in text.split(",") if part.strip()],
    )


def _setting(name: str, default: object) -> Field:
    """A number, numbers with commas between them, or JSON; the parameters read them as words."""
    field = _text(name, layout=_NARROW)

    def shown(value: Any) -> str:
        if value == default:
            return ""
        value = value if not isinstance(value, int | float) else [value]
        several = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
        return ", ".join(f"{x:g}" for x in value) if several else json.dumps(value)

    return Field(name, field.widget, shown, lambda text: text.strip() or default)


def _mapping(name: str, example: str) -> Field:
    field = _text(name, f"{_WORDS}: {example}")
    return Field(name, field.widget, lambda v: json.dumps(v) if v else "", _from_json)


def _from_json(text: str) -> object:
    """The value of JSON text; other text as it is, to be refused by the parameter's type."""
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError:
        return text


def _or_none(field: Field) -> Field:
    """A field that is empty where nothing is given."""
    if isinstance(field.widget, widgets.Dropdown):
        field.widget.options = ((_UNNAMED, ""), *field.widget.options)
    to_widget, from_widget = field._to_widget, field._from_widget
    read = lambda v: None if v in ("", (), []) else from_widget(v)  # noqa: E731
    return Field(field.name, field.widget, lambda v: to_widget("" if v is None else v), read)


def _flag_or_none(name: str) -> Field:
    options = ((_UNNAMED, ""), ("True", True), ("False", False))  # None would be no choice, and the list be blank
    widget = widgets.Dropdown(options=options, description=name, layout=_CHOICE)
    return Field(name, widget, lambda v: "" if v is None else v, lambda v: None if v == "" else v)


def _whole(name: str, least: int) -> Field:
    widget = widgets.BoundedIntText(description=name, min=least, max=2**20, layout=_NARROW)
    return Field(name, widget)


def _whole_or_none(name: str) -> Field:
    field = _text(name, layout=_NARROW)

    def read(text: str) -> Any:
        text = text.strip()
        return int(text) if text.isdecimal() else text or None  # other text is refused by the parameter's type

    return Field(name, field.widget, lambda v: "" if v is None else str(v), read)


def _several_whole(name: str) -> Field:
    field = _text(name, layout=_NARROW)
    return Field(name, field.widget, lambda v: ", ".join(map(str, v)), _whole_numbers)


def _whole_numbers(text: str) -> list:
    """Whole numbers; other words stay text, and are refused by the parameter's type."""
    return [int(word) if word.isdecimal() else word for word in text.replace(",", " ").split()]


def _several(name: str, options: tuple[str, ...]) -> Field:
    widget = widgets.SelectMultiple(options=options, description=name, rows=len(options), layout=_NARROW)
    return Field(name, widget, tuple, list)


def _patterns(name: str) -> Field:
    widget = widgets.Textarea(
        description=name,
        placeholder=f"{_WORDS}; one per line",
        rows=2,
        layout=_WIDE | {"align_items": "flex-start"},  # else the label sinks to the last line while a job runs
        continuous_update=False,
    )
    return Field(name, widget, "\n".join, lambda text: [line.strip() for line in text.splitlines() if line.strip()])


def _flag(name: str) -> Field:
    return Field(name, widgets.Checkbox(description=name, layout=_NARROW))
