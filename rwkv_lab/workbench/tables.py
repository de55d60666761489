"""Tables as JupyterLab, a log and the report show them. Every cell is escaped: names may come from a hostile file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from rwkv_lab.text import counted, shown

_TEXT_ROWS = 40  # of a table in a log
_SIDES = (' style="text-align: left; white-space: pre-wrap"', ' style="text-align: right"')  # of words, of numbers
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|min|h|B|kB|MB|GB|%)\b)")  # a number and its unit stay on one line


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names. Cells are text or numbers; columns with a number in them stand to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def of_numbers(self) -> list[bool]:
        """Of each column, whether there is a number in it: words beside it, such as "new", stand where it does."""
        return [any(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]

    def _repr_html_(self) -> str:
        sides = [_SIDES[numbers] for numbers in self.of_numbers()]
        head = "".join(f"<th{side}>{escape(c)}</th>" for c, side in zip(self.columns, sides, strict=True))
        head = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        body = "".join(f"<tr>{''.join(map(_cell, row, sides))}</tr>" for row in self.rows)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        table = f"<table>{head}<tbody>{body}</tbody></table>"
        title = escape(self.title)
        # Arrow keys scroll it once it has the focus; JupyterLab would take them for moves between cells.
        scrolls = f'tabindex="0" role="region" aria-label="{title}" data-lm-suppress-shortcuts="true"'
        return f'<p><b>{title}</b></p><div {scrolls} style="max-height: 36em; overflow: auto">{table}</div>{note}'

    def __repr__(self) -> str:
        head = [self.columns] if any(self.columns) else []
        cells = [[shown(v).split("\n") for v in row] for row in [*head, *self.rows[:_TEXT_ROWS]]]
        widths = [max((len(part) for row in cells for part in row[i]), default=0) for i in range(len(self.columns))]
        lines = [self.title]
        for row in cells:
            for parts in zip_longest(*row, fillvalue=""):  # a cell of several lines stays in its column
                lines.append("  ".join(c.ljust(w) for c, w in zip(parts, widths, strict=True)).rstrip())
        if len(self.rows) > _TEXT_ROWS:
            lines.append(f"… and {counted(len(self.rows) - _TEXT_ROWS, 'more row')}")
        return "\n".join(lines + ([self.note] if self.note else []))


def _cell(value: object, side: str) -> str:
    text = _UNIT.sub("\N{NO-BREAK SPACE}", shown(value))
    return f"<td{side}>{escape(text)}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
