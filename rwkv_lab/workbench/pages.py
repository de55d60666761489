"""HTML pages from the templates here: what they show is escaped, and names no folder of the disk that it came from."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rwkv_lab.text import shown

TEMPLATES = Path(__file__).parent


def environment(known: Iterable[str] = ()) -> Environment:
    """For templates of this folder.

    Args:
        known: as in `without_folders`.
    """
    known = list(known)
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        # Whatever a template writes goes through here, then through the escaping; Markup is what it wrote itself.
        finalize=lambda v: v if isinstance(v, Markup) else without_folders(shown(v), known),
    )
    made.filters["base64"] = lambda content: Markup(base64.b64encode(content).decode())
    return made


def without_folders(text: str, known: Iterable[str] = ()) -> str:
    """`text` with every absolute path cut down to its last part: a report that is passed on names no home folder.

    Args:
        known: paths that are known to occur, which may have spaces in them.
    """
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return re.sub(r"(?<![\w.~/<-])~?/(?:[^\s/'\"<>]+/)+(?=[^\s/])", "", text)
