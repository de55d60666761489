"""`report.html`: one file that is read offline, without the project, and names no folder of the disk it came from."""

import base64
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path

from rwkv_lab.checkpoint import FileFacts, write_text
from rwkv_lab.checks import Check
from rwkv_lab.progress import human_bytes
from rwkv_lab.samples import Sample
from rwkv_lab.text import counted
from rwkv_lab.workbench.next_steps import next_steps
from rwkv_lab.workbench.pages import environment
from rwkv_lab.workbench.result import Record, versions
from rwkv_lab.workbench.tables import Table

_BY_THEME = (
    'body[data-jp-theme-light="false"] .rwkv-lab-light, '
    'body:not([data-jp-theme-light="false"]) .rwkv-lab-dark { display: none }'
)


@dataclass(frozen=True)
class Picture:
    """A figure as PNG, for light pages and for dark ones."""

    title: str
    caption: str  # how to read it, one or two sentences
    png: bytes
    dark: bytes
    name: str  # of its file, without .png

    def as_html(self) -> str:
        """For JupyterLab, which shows the form that its theme asks for; another front end the light one."""
        shown = (("light", self.png), ("dark", self.dark))
        images = (
            f'<img class="rwkv-lab-{theme}" width="900" style="max-width: 100%" alt="{escape(self.title)}" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for theme, png in shown
        )
        return f"<style>{_BY_THEME}</style>{''.join(images)}"


@dataclass
class Page:
    """What a notebook has to show. All of it may hold text from checkpoints; the template escapes everything."""

    notebook: str
    headline: str = ""  # what was made, of what, in one sentence
    summary: str = ""  # the numbers that matter most, in one sentence
    facts: list[tuple[str, object]] = field(default_factory=list)  # recipe, plan, dimensions
    pictures: list[Picture] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)  # (what it does, lines to copy)
    attached: dict[str, str] = field(default_factory=dict)  # name of a file beside the report -> its text


def write_report(path: Path, page: Page, record: Record, can_repeat: bool) -> None:
    """Write `report.html`, whole or not at all.

    Args:
        can_repeat: whether the parameters were right, so that the report says how to repeat the run.
    Raises:
        OutputError: the folder cannot be written to.
    """
    made = environment(_paths_in(record))
    made.filters["bytes"] = human_bytes
    text = made.get_template("report.html.jinja").render(
        page=page,
        record=record,
        verdict=verdict(record),
        in_words=verdict_in_words(record),
        checks=[(c, isinstance(c, Check)) for c in record.checks],
        files=[(getattr(f, "role", "read"), f) for f in record.inputs] + [("written", f) for f in record.outputs],
        can_repeat=can_repeat,
        next_steps=next_steps(record),
        parameters=[(name, _as_text(value)) for name, value in record.parameters.items()],
        environment=[
            ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
            ("seconds", ", ".join(f"{name} {value:.2f}" for name, value in record.seconds.items())),
        ],
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_text(path, text.encode("utf-8", "replace").decode(), overwrite=True)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _paths_in(record: Record) -> set[str]:
    files: list[FileFacts] = [*record.inputs, *record.outputs]
    values = [v for v in record.parameters.values() if isinstance(v, str)]
    found = {str(f.path) for f in files} | {str(f.path.absolute()) for f in files} | {str(record.folder)}
    found |= {v for v in values if Path(v).is_absolute() and len(Path(v).parts) > 1}
    return found | {str(Path(v).parent) for v in found if len(Path(v).parts) > 2}


def verdict(record: Record) -> str:
    """PASS or FAIL; DONE where a run had nothing to check."""
    if record.status == "failed":
        return "FAIL"
    return "FAIL" if record.failed_checks else "PASS" if record.checks else "DONE"


def verdict_in_words(record: Record) -> str:
    """The verdict as a sentence, with the number of checks."""
    measured = [check for check in record.checks if isinstance(check, Check)]
    failed, others = len(record.failed_checks), len(record.checks) - len(measured)
    if record.status == "failed" and not failed:
        return "The run stopped before its end; the error is above."
    if not measured:
        return (
            "Nothing was checked."
            if not others
            else f"Nothing could be checked: {counted(others, 'check does', 'checks do')} not apply here."
        )
    beside = f"; {counted(others, 'does', 'do')} not apply here" if others else ""
    if failed:
        return f"{failed} of {counted(len(measured), 'check')} failed, first: {record.failed_checks[0].name}{beside}."
    return f"{'The check' if len(measured) == 1 else f'All {len(measured)} checks'} passed{beside}."
