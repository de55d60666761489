"""Tuned states for those that read them apart from a model, in the orientation that each one wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, Layout, TensorInfo
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS, FORMAT_NOTE, ForeignFormat, Place, general_name
from rwkv_lab.convert.about_source import refuse_odd_weights
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.output import Output, computed, copied
from rwkv_lab.convert.plan import Dropped
from rwkv_lab.convert.spec import ConvertSpec, with_dtype
from rwkv_lab.convert.targets import STATE
from rwkv_lab.errors import LayoutError
from rwkv_lab.lazy_torch import torch

_STATE = ".time_state"


def is_state_output(ck: Checkpoint, spec: ConvertSpec, out: Path) -> bool:
    """Whether a state is asked for: by name, of a state file, or of a model that holds one and is converted to a file
    where the target has folders."""
    if spec.to == STATE:
        return True
    formats = [f for f in FOREIGN_FORMATS.values() if f.target == spec.to]
    if not formats or ck.kind not in ("state", "model"):
        return False
    if ck.kind == "state":
        return True
    of_folders = all(f.container == "folder" for f in formats) and any(f.state_rows for f in formats)
    return of_folders and out.suffix == ".safetensors" and any(name.endswith(_STATE) for name in ck.info)


def state_output(ck: Checkpoint, spec: ConvertSpec) -> Output:
    """The states of a file, or of a model, for a target.

    Raises:
        LayoutError: what reads this format takes no state, or there is none.
    """
    states = _states(ck, spec.to)
    if spec.to == STATE:
        content = [copied(n, (n,), info, info.shape, spec.output_dtype or info.dtype) for n, info in states.items()]
        return Output(spec, CONTAINERS[STATE], content, dropped=_others(ck, states))
    known = _format(spec.to, ck.layout)
    spec = with_dtype(spec, known)
    rows, content = {row.ours: row for row in known.state_rows}, []
    for name, info in states.items():
        general, layer = general_name(name)
        row = rows[general]
        theirs, forward = row.theirs.replace("{i}", str(layer)), row.transform.forward
        shape = tuple(forward([torch.empty(info.shape, device="meta")], Place(layer)).shape)
        dtype = spec.output_dtype or info.dtype

        def compute(info=info, forward=forward, layer=layer) -> torch.Tensor:
            return forward([info.read()], Place(layer))

        content.append(computed(theirs, (name,), compute, shape, dtype, row.transform.described))
    note = {FORMAT_NOTE: known.name}
    return Output(spec, CONTAINERS["safetensors"], content, known, dropped=_others(ck, states), file_notes=note)


def _states(ck: Checkpoint, to: str) -> dict[str, TensorInfo]:
    """The states of every layer.

    Raises:
        LayoutError: there are none, or not of every layer, or of no shape [H, V, K].
    """
    if ck.kind not in ("state", "model"):
        raise LayoutError(f"to={to!r} takes a model or a tuned state; {ck.path} is of kind {ck.kind!r}: {ck.reason}.")
    refuse_odd_weights(ck)
    states = {name: info for name, info in ck.info.items() if name.endswith(_STATE)}
    if not states:
        raise LayoutError(f"to={to!r}: {ck.path} holds no tuned state, no tensor called …{_STATE}.")
    layers, several = sorted(general_name(name)[1] for name in states), len({info.shape for info in states.values()})
    if layers != list(range(ck.layout.n_layer if ck.layout else len(states))):
        raise LayoutError(f"{ck.path} has tuned states of layers {', '.join(map(str, layers[:9]))} only.")
    shape = next(iter(states.values())).shape
    if several > 1 or len(shape) not in (2, 3) or shape[-1] != shape[-2]:
        raise LayoutError(
            f"{ck.path}: tuned states of shape {list(shape)}; [heads, N, N] is expected, the same in all."
        )
    return states


def _format(target: str, layout: Layout | None) -> ForeignFormat:
    """The format of a target that has states, that of the model where it is known.

    Raises:
        LayoutError: what reads it takes none, or none of such a model.
    """
    formats = [f for f in FOREIGN_FORMATS.values() if f.target == target and f.state_rows]
    if not formats:
        targets = sorted({f.target for f in FOREIGN_FORMATS.values() if f.state_rows})
        raise LayoutError(
            f"to={target!r}: its readers take no tuned state. {', '.join([*targets, 'safetensors', 'pth'])} take one."
        )
    if layout is None:
        return formats[0]
    found = next((f for f in formats if layout.version in f.versions), None)
    if found is None:
        versions = ", ".join(sorted({version for f in formats for version in f.versions}))
        raise LayoutError(
            f"to={target!r} takes tuned states of RWKV-{versions}; this model is RWKV-{layout.version}.\n"
            f"to={STATE!r} writes its state as it is."
        )
    return found


def _others(ck: Checkpoint, states: Mapping[str, TensorInfo]) -> list[Dropped]:
    return [Dropped(name, "only the state is written") for name in ck.info if name not in states]


def _layers_with_state(ck: Checkpoint) -> list[int]:
    return sorted(general_name(name)[1] for name in ck.info if name.endswith(_STATE))


def refuse_states_of_some_layers(ck: Checkpoint, known: ForeignFormat, layout: Layout) -> None:
    """Refuse a model with tuned states of some layers only, for readers that want one of every layer or none.

    Raises:
        LayoutError: names the layers.
    """
    layers = _layers_with_state(ck)
    if layers and len(layers) < layout.n_layer and known.why_dropped(f"blocks.{layers[0]}.att.time_state") is None:
        raise LayoutError(
            f"{ck.path} has tuned states of layers {', '.join(map(str, layers[:9]))} only, and the readers of "
            f"{known.described} want one of every layer or none.\nLeave them out, or add zeros for the other layers."
        )


def about_state(ck: Checkpoint, to: str) -> list[str]:
    """What readers of BlinkDL's own format make of the tuned state in a model, in words."""
    layers = _layers_with_state(ck)
    if ck.layout is None or not layers:
        return []
    notes = []
    if len(layers) < ck.layout.n_layer:
        notes.append(
            f"Only the layers {', '.join(map(str, layers[:9]))} of {ck.layout.n_layer} have a tuned state: rwkv_lab "
            "begins the others from zeros, other programs may not."
        )
    if to == "pth" and ck.layout.version == "7.0":
        notes.append(
            "PyPI's rwkv and RWKV-Runner ignore the tuned state inside an RWKV-7 model. "
            f"convert(…, to={STATE!r}, …) writes it alone, which RWKV-Runner loads; docs/convert.md has how rwkv takes "
            "it."
        )
    return notes
