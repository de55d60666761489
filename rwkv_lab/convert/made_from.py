"""What travels in an output: how it was made, and from what."""

from collections.abc import Iterable

from rwkv_lab.checkpoint import Checkpoint, FileFacts
from rwkv_lab.checkpoint.foreign_format import RESCALED
from rwkv_lab.checkpoint.provenance import RECORD, as_text, provenance, provenance_of
from rwkv_lab.convert.hub_download import Download
from rwkv_lab.convert.output import Output
from rwkv_lab.convert.plan import Dropped

_NAMES = 100  # of tensors dropped for one reason; of more, their number tells as much


def made_from(output: Output, ck: Checkpoint, source: FileFacts, downloaded: Download | None) -> dict[str, str]:
    """The notes that travel in the output."""
    spec = output.spec
    made = provenance(spec.recipe(), [source], job="convert")
    made |= {"downloaded": downloaded.record()} if downloaded else {}
    made |= {"dropped": _by_reason(output.dropped)} if output.dropped else {}
    before = provenance_of(ck)
    notes = {RECORD: as_text(made | ({"source": before} if before else {}))}
    return notes | ({RESCALED: str(spec.rescale)} if spec.rescale else {})


def _by_reason(dropped: Iterable[Dropped]) -> dict[str, list[str] | int]:
    names: dict[str, list[str]] = {}
    for one in dropped:
        names.setdefault(one.why, []).append(one.name)
    return {why: found if len(found) <= _NAMES else len(found) for why, found in names.items()}
