"""What lies beside the tensors of a source: its chat template, which goes along where the target has a place for it,
and its licence, which a person has to take along."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.convert.output import Output
from rwkv_lab.tokenizer.chat_template import TEMPLATE_FILES, template_of

GGUF_TEMPLATE = "tokenizer.chat_template"  # in the header of a GGUF file
LICENCES = re.compile(r"(licen[sc]e|notice|copying|use_policy)([-_.].*)?", re.IGNORECASE)
_LARGEST = 1 << 20  # bytes of a file that is taken for a template, or for a licence


def world_template() -> str:
    """The chat template of the World models."""
    return (files("rwkv_lab.convert") / "written" / "chat_template.jinja").read_text("utf-8")


def own_template(ck: Checkpoint) -> str | None:
    """The chat template that the source has, None where it has none.

    Raises:
        CorruptFileError: one that is not UTF-8.
    """
    if GGUF_TEMPLATE in ck.metadata:
        return ck.metadata[GGUF_TEMPLATE]
    if not ck.path.is_dir():
        return None
    there = {name: ck.path / name for name in TEMPLATE_FILES}
    return template_of({name: path.read_bytes() for name, path in there.items() if _is_small(path)})


def about_files_beside(ck: Checkpoint, output: Output) -> Iterator[str]:
    """What stays behind, or goes along in the place of what is usual, in words."""
    own = own_template(ck)
    if own is not None and own != world_template():
        if output.layout is not None and output.container.holds_vocabulary:
            yield "The source's own chat template goes along."
        else:
            yield "The source's chat template stays behind: the output has no place for it."
    if ck.path.is_dir():
        licences = [p.name for p in sorted(ck.path.iterdir()) if LICENCES.fullmatch(p.name) and _is_small(p)]
        if licences:
            yield f"{', '.join(licences[:3])} of the source stays behind: copy it to where the output goes."


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _LARGEST
