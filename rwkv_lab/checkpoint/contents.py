"""Which adapters a checkpoint says that were merged into it, and what its files say when they are written again.

An entry is a mapping with at least a "fingerprint", that of the adapter's file; `rwkv_lab.merge.contained_adapters` has
the others. One with "mixed": true is in there in part: models were mixed, or the weights trained since.
"""

from collections.abc import Mapping
from typing import Any

from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.checkpoint.origin import ORIGIN
from rwkv_lab.checkpoint.provenance import RECORD, as_text, records_of
from rwkv_lab.version import __version__


def adapters_in(*models: Checkpoint) -> list[dict[str, Any]]:
    """The adapters that checkpoints say they contain, each once; none of a file by others, or one that cannot be
    understood."""
    held: dict[str, dict[str, Any]] = {}
    for record in (record for ck in models for record in records_of(ck)):
        try:
            for one in [dict(one) for one in record["contains"] if isinstance(one["fingerprint"], str)]:
                held.setdefault(one["fingerprint"], one)
        except (KeyError, ValueError, TypeError):
            continue
    return list(held.values())


def mixed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of an adapter of which it is unknown how much is left."""
    known_by = ("name", "fingerprint", "content", "training")
    return {key: entry[key] for key in known_by if key in entry} | {"mixed": True}


def kept_notes(ck: Checkpoint, job: str, is_changed: bool) -> dict[str, str]:
    """What the metadata of a model say that is written again from this one: where it comes from, and which adapters it
    contains; {} where the file says neither.

    Args:
        job: that writes it.
        is_changed: its weights were trained, so that of adapters only a part may be in there.
    """
    made = {"made_by": f"rwkv_lab {__version__}", "job": job}
    if is_changed:
        contains = [mixed(one) for one in adapters_in(ck)]
        return {RECORD: as_text(made | {"contains": contains})} if contains else {}
    notes = {ORIGIN: ck.metadata[ORIGIN]} if ORIGIN in ck.metadata else {}
    before = next(iter(records_of(ck)), None)
    return notes | ({RECORD: as_text(made | {"source": before})} if before else {})
