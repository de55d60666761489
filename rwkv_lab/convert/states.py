"""Tuned states for those that read them apart from a model, in the orientation that each one wants."""

from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS, FORMAT_NOTE, Place, general_name
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.output import Output, computed
from rwkv_lab.convert.plan import Dropped
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.errors import LayoutError

_STATE = ".time_state"


def is_state_output(ck: Checkpoint, spec: ConvertSpec, out: Path) -> bool:
    """Whether a state is asked for: of a state file, or of a model that holds one and is converted to a file where the
    target has folders."""
    formats = [f for f in FOREIGN_FORMATS.values() if f.target == spec.to]
    if not formats or ck.kind not in ("state", "model"):
        return False
    if ck.kind == "state":
        return True
    of_folders = all(f.container == "folder" for f in formats)
    return of_folders and out.suffix == ".safetensors" and any(name.endswith(_STATE) for name in ck.info)


def state_output(ck: Checkpoint, spec: ConvertSpec) -> Output:
    """The states of a file, or of a model, for a target.

    Raises:
        LayoutError: what reads this format takes no state.
    """
    known = next((f for f in FOREIGN_FORMATS.values() if f.target == spec.to and f.state_rows), None)
    if known is None:
        targets = sorted({f.target for f in FOREIGN_FORMATS.values() if f.state_rows})
        raise LayoutError(
            f"to={spec.to!r}: its readers take no tuned state. {', '.join([*targets, 'safetensors', 'pth'])} take one."
        )
    rows, content = {row.ours: row for row in known.state_rows}, []
    states = {name: info for name, info in ck.info.items() if name.endswith(_STATE)}
    for name, info in states.items():
        general, layer = general_name(name)
        row = rows[general]
        theirs, forward = row.theirs.replace("{i}", str(layer)), row.transform.forward
        shape = tuple(forward([torch.empty(info.shape, device="meta")], Place(layer)).shape)
        dtype = spec.output_dtype or known.dtype or info.dtype

        def compute(info=info, forward=forward, layer=layer) -> torch.Tensor:
            return forward([info.read()], Place(layer))

        content.append(computed(theirs, (name,), compute, shape, dtype, row.transform.described))
    dropped = [Dropped(name, "only the state is written") for name in ck.info if name not in states]
    note = {FORMAT_NOTE: known.name}
    return Output(spec, CONTAINERS["safetensors"], content, known, dropped=dropped, file_notes=note)
