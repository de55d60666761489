"""An adapter merged into a model's files, a block of rows at a time: the model is never loaded.

W + scale · B @ A is computed in float32 and rounded once, to the dtype that W is stored in. Where a head that is tied
to the embedding does not stay equal to it, it is written as a tensor of its own, and config.json says so.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rwkv_lab.checkpoint import TensorInfo, file_facts
from rwkv_lab.checkpoint.provenance import RECORD, provenance
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import shard_files, write_folder
from rwkv_lab.errors import LayoutError
from rwkv_lab.export.causal_lm.adapter import CausalLmAdapter, LoraLayer
from rwkv_lab.export.causal_lm.folder import CONFIG, CausalLmFolder, architecture, open_folder

SHARD = 5_000_000_000  # bytes of a file of weights
_LOST = 0.1  # of what an adapter adds to a tensor: rounding away more than this share is said
_COMPARED = 3  # tensors of two bases


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: another takes its place, or something is added."""

    name: str  # in the output
    base: TensorInfo  # that it starts from
    replaced: TensorInfo | None = None
    layer: LoraLayer | None = None
    bias: TensorInfo | None = None  # is added times `scale`
    scale: float = 1.0

    @property
    def source(self) -> TensorInfo:
        """What an adapter's product is added to."""
        return self.replaced or self.base


@dataclass
class MergePlan:
    """What a merge will write.

    changes: by name in the output; all other tensors of the base are copied.
    untied: whether the head becomes a tensor of its own.
    lost: by tensor, which share of what was added is rounded away; known when it is written.
    """

    base: CausalLmFolder
    adapter: CausalLmAdapter
    changes: dict[str, Change]
    untied: bool
    notes: list[str] = field(default_factory=list)
    lost: dict[str, float] = field(default_factory=dict)


def plan_merge(base: CausalLmFolder, adapter: CausalLmAdapter) -> MergePlan:
    """What becomes of each tensor, from headers alone.

    Raises:
        LayoutError: the adapter is of another model: a layer is missing, or of another shape.
    """
    _refuse_other_class(base, adapter)
    shapes = dict(base.tensors)
    untied = base.tied and _touches_head(base, adapter)
    if base.tied:
        shapes[base.head] = base.tensors[base.embedding]
    changes: dict[str, Change] = {}
    for name, info in adapter.whole.items():
        at = base.embedding if base.tied and name == base.head and name not in adapter.own else name
        changes[at] = Change(at, _fitting(base, adapter, shapes, at, info.shape), replaced=info)
    for layer, lora in adapter.layers.items():
        name = f"{layer}.weight"
        start = changes.get(name) or Change(name, _fitting(base, adapter, shapes, name, lora.shape))
        _refuse_other_magnitude(adapter, layer, lora)
        changes[name] = Change(name, start.base, start.replaced, lora)
        if lora.bias is not None:
            at = f"{layer}.bias"
            before = changes.get(at) or Change(at, _fitting(base, adapter, shapes, at, lora.bias.shape))
            changes[at] = Change(at, before.base, before.replaced, None, lora.bias, lora.scale)
    _refuse_other_values(base, adapter)
    plan = MergePlan(base, adapter, changes, untied)
    if untied:
        _keep_head(plan)
    return plan


def _keep_head(plan: MergePlan) -> None:
    """The head as its own tensor: what the embedding was before the adapter, unless it is changed itself."""
    base, adapter = plan.base, plan.adapter
    in_place = plan.changes.get(base.embedding)
    if in_place and in_place.replaced and base.embedding not in adapter.own:  # a stored base of both
        head = plan.changes.get(base.head) or Change(base.head, in_place.base)
        plan.changes[base.head] = Change(base.head, head.base, head.replaced or in_place.replaced, head.layer)
    plan.notes.append(
        f"{base.head} was tied to {base.embedding}, and the adapter changes one without the other: it is written as a "
        "tensor of its own, with tie_word_embeddings=false."
    )


def _touches_head(base: CausalLmFolder, adapter: CausalLmAdapter) -> bool:
    both = (base.embedding, base.head)
    return any(name in adapter.own or name.removesuffix(".weight") in adapter.layers for name in both)


def _fitting(
    base: CausalLmFolder, adapter: CausalLmAdapter, shapes: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> TensorInfo:
    """The tensor of the base that the adapter's is for."""
    if name not in shapes:
        why = ": it has a bias where the model has none" if name.endswith(".bias") else ""
        raise LayoutError(f"{adapter.path} is of another model: {base.path} has no {name}{why}.")
    found = shapes[name]
    if tuple(found.shape) != tuple(shape):
        raise LayoutError(
            f"{adapter.path} is of another model: it changes {name} as {list(shape)}, and in {base.path} that is "
            f"{list(found.shape)}."
        )
    if not found.dtype.is_floating_point or found.dtype.itemsize < 2:
        raise LayoutError(f"{base.path}: {name} is stored as {found.dtype}; give the model before it was quantised.")
    return found


def _refuse_other_magnitude(adapter: CausalLmAdapter, layer: str, lora: LoraLayer) -> None:
    if lora.magnitude is not None and lora.magnitude.numel != lora.shape[0]:
        raise LayoutError(
            f"{adapter.path}: the magnitude of {layer} has {lora.magnitude.numel} values for {lora.shape[0]} rows."
        )


def _refuse_other_class(base: CausalLmFolder, adapter: CausalLmAdapter) -> None:
    stated = adapter.config.get("auto_mapping")
    named = stated.get("base_model_class") if isinstance(stated, dict) else None
    if named and architecture(base.config) != named:
        raise LayoutError(f"{adapter.path} is of a {named}; {base.path} is a {architecture(base.config)}.")


def _refuse_other_values(base: CausalLmFolder, adapter: CausalLmAdapter) -> None:
    """An adapter whose base, by the path that it states, lies on this machine and has other weights."""
    path = Path(adapter.base).expanduser() if adapter.base else None
    if path is None or not (path / CONFIG).is_file() or path.resolve() == base.path.resolve():
        return
    with (trained_on := open_folder(path)).ck:
        for name in sorted(f"{layer}.weight" for layer in adapter.layers)[:_COMPARED] or [base.embedding]:
            if name in base.tensors and not _same(base.tensors[name], trained_on.tensors.get(name)):
                raise LayoutError(
                    f"{adapter.path} states that it was trained on {path}, whose {name} differs from that of "
                    f"{base.path}.\nGive that one, or correct base_model_name_or_path in its adapter_config.json."
                )


def _same(one: TensorInfo, other: TensorInfo | None) -> bool:
    """Whether two tensors are equal but for the rounding of their dtypes."""
    if other is None or one.shape != other.shape:
        return False
    unit = max(torch.finfo(t.dtype).eps for t in (one, other))
    a, b = one.read().float(), other.read().float()
    return bool(((a - b).abs() <= unit * a.abs() + 1e-7).all())


# ------------------------------------------------------------------ values


def rows(change: Change, plan: MergePlan | None = None) -> Iterator[torch.Tensor]:
    """The new values, float32, flat, some rows at a time; shares that rounding takes away go into `plan.lost`."""
    base = change.source
    if change.bias is not None:
        yield base.read().float().flatten() + change.scale * change.bias.read().float().flatten()
        return
    if change.layer is None:
        yield from base.blocks()
        return
    layer = change.layer
    A, B = layer.A.read().float(), layer.B.read().float()
    left, right = (A.T, B.T) if layer.transposed else (B, A)
    length = None if layer.magnitude is None else layer.magnitude.read().float().flatten()
    at, added, lost = 0, 0.0, 0.0
    for block in base.blocks(base.shape[1]):
        before = block.view(-1, base.shape[1]).float()
        after = before + layer.scale * (left[at : at + len(before)] @ right)
        if length is not None:
            after *= (length[at : at + len(before)] / after.norm(dim=1))[:, None]
        at += len(before)
        if plan is not None:
            added += float((after - before).square().sum())
            lost += float((after.to(change.base.dtype).float() - after).square().sum())
        yield after.flatten()
    if plan is not None:
        plan.lost[change.name] = (lost / added) ** 0.5 if added else 0.0


def write_merge(plan: MergePlan, out: Path, others: Mapping[str, bytes], overwrite: bool, shard: int = SHARD) -> None:
    """Write the merged model as a folder of safetensors, whole or not at all.

    Args:
        others: files beside config.json, by name.
        shard: bytes of a file at most; a tensor that is larger has one of its own.

    Raises:
        OutputError: as `write_folder`.
        NumericsError: NaN, or a value that the dtype cannot hold.
    """
    base = plan.base
    tensors = [_written(plan, name, info) for name, info in base.tensors.items()]
    if plan.untied:
        tensors.append(_written(plan, base.head, base.tensors[base.embedding]))
    config = base.config | ({"tie_word_embeddings": False} if plan.untied else {})
    inputs = [file_facts(base.ck), file_facts(plan.adapter.ck)]
    record = provenance({"method": "lora", "untied": plan.untied}, inputs)
    notes = {"format": "pt", RECORD: json.dumps(record)}
    files = {CONFIG: config_file(config), **others}
    with plan.adapter.ck, base.ck:
        write_folder(out, shard_files(tensors, shard), notes, files, overwrite, scan=lambda t: True)
    if gone := {name: share for name, share in plan.lost.items() if share > _LOST}:
        worst = max(gone, key=lambda name: gone[name])
        plan.notes.append(
            f"in {len(gone)} of {len(plan.changes)} tensors rounding takes away more than {_LOST:.0%} of what the "
            f"adapter adds; most in {worst}: {gone[worst]:.0%}."
        )


def config_file(config: Mapping[str, Any]) -> bytes:
    """config.json."""
    return (json.dumps(config, indent=2) + "\n").encode()


def _written(plan: MergePlan, name: str, info: TensorInfo) -> OutTensor:
    change = plan.changes.get(name)
    if change is None:
        return OutTensor(name, info.shape, info.dtype, source=info)
    return OutTensor(name, info.shape, info.dtype, compute=lambda: rows(change, plan))
