"""What made an output: enough to make it again, bit for bit. No clock, no folder names: they would change its bytes."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint.fingerprint import FileFacts
from rwkv_lab.checkpoint.open import Checkpoint
from rwkv_lab.checkpoint.stream import Findings
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.version import __version__

RECORD = "rwkv_lab.json"  # its name among the records of a .pth, and as a key of a .safetensors' metadata


Provenance = dict[str, Any]  # JSON-ready


def provenance(
    recipe: Mapping[str, Any],
    inputs: Sequence[FileFacts],
    contains: Sequence[Mapping[str, Any]] = (),
    job: str = "merge",
    bases: Sequence[Mapping[str, str]] = (),
    downloads: Sequence[Mapping[str, Any] | None] = (),
) -> Provenance:
    """Of a merge, or of another job that makes a checkpoint from checkpoints; `contains` as of `contained_adapters`,
    where there are any adapters; `bases` as of `origin.weights_of`: the base, and those that it was made from;
    `downloads` as of `downloaded`, one per input."""
    listed = [{"name": printable(f.path.name), "bytes": f.bytes, "fingerprint": f.fingerprint} for f in inputs]
    for one, came in zip(listed, downloads, strict=bool(downloads)):
        one |= {"downloaded": dict(came)} if came else {}
    made = {
        "made_by": f"rwkv_lab {__version__}",
        "job": job,
        "recipe": dict(recipe),
        "inputs": listed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    made |= {"bases": [dict(one) for one in bases]} if bases else {}
    return made | ({"contains": list(contains)} if contains else {})


def provenance_of(ck: Checkpoint) -> Provenance | None:
    """That which a checkpoint carries, None where it has none. It is what the file says: keys may be missing."""
    return next(iter(records_of(ck)), None)


def records_of(ck: Checkpoint) -> list[Provenance]:
    """The provenance that a checkpoint carries, then those of the files that it was converted from, the latest first;
    none where there is none, or none that can be understood."""
    try:
        record = json.loads(ck.metadata[RECORD])
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    records = []
    while isinstance(record, dict):
        records.append(record)
        record = record.get("source")
    return records


def downloaded(ck: Checkpoint) -> Provenance | None:
    """How what a checkpoint was made from came from the Hugging Face Hub, as conversions record it: the checkpoint
    itself, what it was converted from, or the base of a merge; None where nothing states it."""
    return next(filter(None, map(download_in, records_of(ck))), None)


def download_in(record: Mapping[str, Any]) -> Provenance | None:
    """As `downloaded`, of one record: of its source, or of its first input, which is the base of a merge."""
    inputs = record.get("inputs")
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    found = (one.get("downloaded") for one in (record, first))
    return next((one for one in found if isinstance(one, dict) and isinstance(one.get("repo_id"), str)), None)


def printable(name: str) -> str:
    """A file name may be any bytes; text in a file is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def as_text(made: Provenance) -> str:
    """As it is written; in order, since of patterns the first that matches decides."""
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def provenance_path(out: Path) -> Path:
    """The file beside an output that holds its provenance."""
    return out.with_name(out.name + ".json")


def text_beside(
    made: Provenance, output: FileFacts, findings: Sequence[Findings], effect: Mapping[str, int] | None = None
) -> str:
    """What that file holds: the provenance, and what the output turned out to be; of a merge also its effect."""
    facts = {"name": output.path.name, "bytes": output.bytes, "fingerprint": output.fingerprint}
    found = {"output": facts, "nonfinite": [str(f) for f in findings]}
    return as_text(made | found | ({} if effect is None else {"effect": dict(effect)}))
