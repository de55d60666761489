"""What travels in an output: how it was made, and from what."""

import json
from collections.abc import Iterable, Mapping

from rwkv_lab.checkpoint import Checkpoint, FileFacts
from rwkv_lab.checkpoint.foreign_format import RESCALED
from rwkv_lab.checkpoint.origin import ORIGIN, blank_weights, lineage, weights_of
from rwkv_lab.checkpoint.provenance import RECORD, as_text, provenance, provenance_of
from rwkv_lab.convert.hub_download import Download
from rwkv_lab.convert.output import Output
from rwkv_lab.convert.plan import Dropped

_NAMES = 100  # of tensors dropped for one reason; of more, their number tells as much


def made_from(output: Output, ck: Checkpoint, source: FileFacts, downloaded: Download | None) -> dict[str, str]:
    """The notes that travel in the output: how it was made, and which base the source says that it belongs to. The
    weights of a source that is a model are blank there, until `with_weights` has read them."""
    spec = output.spec
    bases = lineage(ck, blank_weights(ck)) if ck.kind == "model" else []
    made = provenance(spec.recipe(), [source], job="convert", bases=bases)
    made |= {"downloaded": downloaded.record()} if downloaded else {}
    made |= {"dropped": _by_reason(output.dropped)} if output.dropped else {}
    before = provenance_of(ck)
    notes = {RECORD: as_text(made | ({"source": before} if before else {}))}
    notes |= {ORIGIN: ck.metadata[ORIGIN]} if ORIGIN in ck.metadata else {}
    return notes | ({RESCALED: str(spec.rescale)} if spec.rescale else {})


def with_weights(notes: Mapping[str, str], ck: Checkpoint) -> dict[str, str]:
    """The notes with what a source that is a model is known again by: as long as they were."""
    if ck.kind != "model":
        return dict(notes)
    made = json.loads(notes[RECORD])
    return {**notes, RECORD: as_text(made | {"bases": [weights_of(ck), *made["bases"][1:]]})}


def _by_reason(dropped: Iterable[Dropped]) -> dict[str, list[str] | int]:
    names: dict[str, list[str]] = {}
    for one in dropped:
        names.setdefault(one.why, []).append(one.name)
    return {why: found if len(found) <= _NAMES else len(found) for why, found in names.items()}
