"""Adapters of a foreign format: their layers under BlinkDL's names, by the rows of the table that are plain matrices.

A change of a matrix is the same change under any name; a matrix that lies transposed there would need its halves
exchanged, which no trainer's adapter asks for.
"""

import re
from collections.abc import Iterable, Mapping

from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS, HALVED, LAYER, SAME, ForeignFormat, general_name
from rwkv_lab.checkpoint.source import TensorInfo

_PART = re.compile(r"\.((init_)?lora_[AB]|lora_magnitude_vector|miss_block|bone_block|bone|disha|alpha)(\.|$)")


def modules_of(known: ForeignFormat) -> dict[str, str]:
    """{their layer: our layer} of the matrices that lie there as they are, `{i}` in both."""
    found = {}
    for row in known.rows:
        if row.transform in (SAME, HALVED) and isinstance(row.ours, str) and row.ours.endswith(".weight"):
            found[row.theirs.removesuffix(".weight")] = row.ours.removesuffix(".weight")
    return found


def adapter_format(names: Iterable[str]) -> ForeignFormat | None:
    """The format of an adapter by the layers that it adapts; None where they are of none, or BlinkDL's."""
    layers = {general_name(name[: part.start()])[0] for name in names if (part := _PART.search(name))}
    if not layers or any(layers <= set(modules_of(f).values()) for f in FOREIGN_FORMATS.values()):
        return None
    return next((f for f in reversed(FOREIGN_FORMATS.values()) if layers <= modules_of(f).keys()), None)


def present_adapter(
    known: ForeignFormat, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors under BlinkDL's names, {our name: the one in the file}). Whole tensors come by the format's rows."""
    modules = modules_of(known)
    rows = {row.theirs: row.ours for row in known.rows if row.transform in (SAME, HALVED) and isinstance(row.ours, str)}
    found, theirs = {}, {}
    for name, info in tensors.items():
        our_name = _ours(name, modules, rows)
        found[our_name], theirs[our_name] = info, name
    return found, theirs


def _ours(name: str, modules: Mapping[str, str], rows: Mapping[str, str]) -> str:
    part = _PART.search(name)
    end = part.start() if part else len(name)
    layer_name, (general, layer) = name[:end], general_name(name[:end])
    among = modules if part else rows
    ours = among.get(layer_name) or among.get(general)
    return name if ours is None else ours.replace(LAYER, str(layer)) + name[end:]


def our_targets(known: ForeignFormat, named: object) -> object:
    """`target_modules` of a configuration in BlinkDL's names; what is no list of names stays as it is."""
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return named
    found: list[str] = []
    for name in named:
        general, layer = general_name(name)
        modules = modules_of(known).items()
        ours = [ours.replace(LAYER, str(layer)) for theirs, ours in modules if theirs == general]
        ours += [ours.replace(f"blocks.{LAYER}.", "") for theirs, ours in modules if theirs.endswith(f".{name}")]
        found += ours or [name]
    return list(dict.fromkeys(found))


def their_module(known: ForeignFormat, module: str) -> str | None:
    """The name there of a layer of ours; None where it has none that takes an adapter."""
    general, layer = general_name(module)
    found = next((t for t, o in modules_of(known).items() if o in (general, module)), None)
    return None if found is None else found.replace(LAYER, str(layer))
