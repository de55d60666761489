"""The layout of RWKV-LM-LoRA and of RWKV-PEFT before it turned to Hugging Face's peft: one file, bare names.

* LoRA and PiSSA: `X.lora_A [r, in]` and `X.lora_B [out, r]`. Neither alpha nor which of the two it is stands in it.
* PiSSA's start, a file of its own: `X.init_lora_A` and `X.init_lora_B`; newer ones begin with `model.`.
* MiSS: `X.disha`, earlier `X.bone`: `[r, out]`, or three dimensions for "bat".
* Any other tensor is whole, and takes the place of the base's.
What rwkv_lab saves has PiSSA's start in the same file, and a note with what the layout leaves open. The parts of each
kind of adapter are read and written by its module in `rwkv_lab.peft.kinds`.
"""

import json
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.kind import ADAPTER_NOTE
from rwkv_lab.checkpoint.origin import ORIGIN
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError
from rwkv_lab.peft.adapter import Adapter, Values
from rwkv_lab.peft.config import ADAPTER_KINDS, AdapterKind
from rwkv_lab.peft.options import AdapterOptions

NOTE = ADAPTER_NOTE

Parts = dict[str, dict[str, TensorInfo]]  # by layer and part


def read(ck: Checkpoint, options: AdapterOptions) -> Adapter:
    """The adapter in an open file.

    Raises: as `open_adapter`.
    """
    note = _note(ck)
    by_kind, full = _sorted(ck)
    if not by_kind:
        raise LayoutError(f"{ck.path} has no tensor named *.lora_A, *.disha or *.bone; it is of kind {ck.kind!r}.")
    if len(by_kind) > 1:
        names = " and ".join(ADAPTER_KINDS[method].described for method in by_kind)
        raise LayoutError(f"{ck.path} holds {names} together; an adapter is one of them.")
    (method, layers), *_ = by_kind.items()
    targets, method = ADAPTER_KINDS[method].read_file(ck, layers, note, options)
    return Adapter(method, targets, full, layout="rwkv-peft", quant=note.get("quant"), origin=ck.metadata.get(ORIGIN))


def _sorted(ck: Checkpoint) -> tuple[dict[str, Parts], dict[str, TensorInfo]]:
    """({method of the kind whose parts they are: parts}, whole tensors)."""
    by_kind: dict[str, Parts] = {}
    full: dict[str, TensorInfo] = {}
    for name, info in ck.info.items():
        kind, found = _part(name)
        if kind is None or found is None:
            full[name] = info
            continue
        layer, part = found
        parts = by_kind.setdefault(kind.method, {}).setdefault(layer, {})
        if part in parts:
            raise LayoutError(f"{ck.path} has {parts[part].name} and {info.name}, which are the same part of a layer.")
        parts[part] = info
    return by_kind, full


def _part(name: str) -> tuple[AdapterKind | None, tuple[str, str] | None]:
    """The kind whose part this is, with layer and part."""
    for kind in ADAPTER_KINDS.values():
        if found := kind.file_part(name):
            return kind, found
    return None, None


def _note(ck: Checkpoint) -> dict[str, Any]:
    """What rwkv_lab wrote when it saved the file; {} for files of others."""
    text = ck.metadata.get(NOTE)
    if text is None:
        return {}
    try:
        note = json.loads(text)
        ADAPTER_KINDS[note["method"]].check_note(note)
        return note
    except (ValueError, KeyError, TypeError, RecursionError, ParameterError) as e:
        raise CorruptFileError(f"{ck.path}: its note {NOTE} cannot be understood ({e}).") from e


def written(adapter: Adapter) -> tuple[dict[str, Values], str]:
    """(tensors by name, the note) of a file in this layout.

    Raises:
        ParameterError: MiSS that RWKV-PEFT does not have, alphas that differ between layers.
    """
    tensors, note = ADAPTER_KINDS[adapter.method].file_content(adapter)
    return tensors, json.dumps(note)


def written_init(adapter: Adapter) -> dict[str, Values]:
    """Tensors of an `init_pissa.pth`, named as RWKV-PEFT's trainer names them.

    Raises:
        ParameterError: no PiSSA, or one without its start.
    """
    if adapter.residual_base or not all(t.has_start for t in adapter.targets.values()):
        raise ParameterError(f"{adapter.where} is no PiSSA adapter that knows what it started from.")
    parts = ("init_lora_A", "init_lora_B")
    return {f"model.{x}.{part}": t.tensors[part] for x, t in adapter.targets.items() for part in parts}
