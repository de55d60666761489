"""The key map of a plan for people: tensors that are alike in every layer in one row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rwkv_lab.checkpoint.foreign_format import LAYER, general_name
from rwkv_lab.convert.plan import ConvertPlan, ConvertRow
from rwkv_lab.dtypes import short_name


@dataclass(frozen=True)
class KeyMapRow:
    """Tensors of the output that differ by their layer alone."""

    ours: str  # BlinkDL's names of what they are made from; {i} stands for the layer
    theirs: str  # the name in the output
    layers: tuple[int, ...]  # empty where the names have no {i}
    our_shape: tuple[int, ...] | None  # None where nothing of the source is in it
    shape: tuple[int, ...]  # in the output
    transform: str
    dtype: str  # in the output: "bf16", or the type of its blocks, "Q8_0"
    nbytes: int  # of all of them

    @property
    def tensors(self) -> int:
        return max(len(self.layers), 1)


def key_map(plan: ConvertPlan, folded: bool = True) -> list[KeyMapRow]:
    """One row per tensor of the output in its order, or, `folded`, one for all layers where they are alike."""
    rows = [_row(plan, row) for row in plan.rows]
    if not folded:
        return rows
    groups: dict[tuple, list[KeyMapRow]] = {}
    for made, (ours, theirs, layer) in zip(rows, map(_general, plan.rows), strict=True):
        inside = (ours, theirs) if layer is not None else (made.ours, made.theirs)
        groups.setdefault((*inside, made.our_shape, made.shape, made.transform, made.dtype), []).append(made)
    return [_joined(key, group) for key, group in groups.items()]


def _row(plan: ConvertPlan, row: ConvertRow) -> KeyMapRow:
    layer = _general(row)[2]
    info = plan.checkpoint.info.get(row.sources[0]) if row.sources else None
    return KeyMapRow(
        ours=", ".join(row.sources),
        theirs=row.name,
        layers=() if layer is None else (layer,),
        our_shape=None if info is None else tuple(info.shape),
        shape=row.shape,
        transform=row.action,
        dtype=row.quantised or short_name(row.dtype),
        nbytes=row.nbytes,
    )


def _joined(key: tuple, group: Sequence[KeyMapRow]) -> KeyMapRow:
    if len(group) == 1:
        return replace(group[0], layers=())
    layers = tuple(layer for row in group for layer in row.layers)
    return KeyMapRow(key[0], key[1], layers, *key[2:], nbytes=sum(row.nbytes for row in group))


def _general(row: ConvertRow) -> tuple[str, str, int | None]:
    """(names of ours, name of theirs, layer), with `{i}` in the place of the layer; None outside the layers."""
    pairs = [general_name(name) for name in row.sources]
    layer = pairs[0][1] if pairs and LAYER in pairs[0][0] else None
    if layer is None or any(there != layer for _, there in pairs):
        return ", ".join(row.sources), row.name, None
    theirs = re.sub(rf"(?<![^.]){layer}(?![^.])", LAYER, row.name, count=1)
    return ", ".join(general for general, _ in pairs), theirs, layer
