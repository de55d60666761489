"""Models in 8 and 4 bits to files and back: codes and scales as they are computed with, mapped when they are opened.
Models in more bits are packed while they are read."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checkpoint.mapped import mapped
from rwkv_lab.checkpoint.packed import (
    ACTIVATIONS,
    GROUPED,
    NOTE,
    PARTS,
    VERSION,
    columns_note,
    part_shapes,
    parts_of,
    shown,
)
from rwkv_lab.checkpoint.rounding import NF4_BLOCK
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.model.loading import in_dtype
from rwkv_lab.model.weight_only import ACTIVATIONS as choices
from rwkv_lab.model.weight_only import SCHEMES, PackedEmbedding, PackedLinear, naming, packed_parts

Weights = Literal["stored", "dense", "int8", "int4", "nf4"]
_IN_PLACE_OF = {  # itself: an outline is filled again where a device has failed
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    PackedLinear: PackedLinear,
    PackedEmbedding: PackedEmbedding,
}


def packed_modules(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """The modules in 8 or 4 bits, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}


def tensors_of_file(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a file of the model holds: tensors in the form of `rwkv_lab.checkpoint.packed`, and what it says of them."""
    packed = packed_modules(model)
    if not packed:
        return model.state_dict(), {}
    inside = {f"{name}.{buffer}" for name, module in packed.items() for buffer, _ in module.named_buffers()}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}
    for name, module in packed.items():
        ends = PARTS[module.kind]
        tensors |= {f"{name}.weight.{end}": part for end, part in zip(ends, module.parts(), strict=True)}
    grouped = {name: module for name, module in packed.items() if module.kind in GROUPED}
    columns = {f"{name}.weight": (module.columns, GROUPED[module.kind]) for name, module in grouped.items()}
    notes = {NOTE: VERSION} | columns_note(columns)
    notes[ACTIVATIONS] = next(iter(packed.values())).activations
    return tensors, notes


def take_activations(model: nn.Module, notes: Mapping[str, str]) -> None:
    """Let the modules in 8 or 4 bits read what those that were saved read.

    Raises:
        CorruptFileError: something else than there is.
    """
    read = notes.get(ACTIVATIONS, choices[0])
    if read not in choices:
        raise CorruptFileError(f"The file states {ACTIVATIONS}={read!r:.40}; {', '.join(choices)}.")
    for module in packed_modules(model).values():
        module.activations = read


def take_packed(
    model: Any,
    tensors: Mapping[str, TensorInfo],
    device: torch.device,
    weights: Weights = "stored",
    dtype: torch.dtype = torch.float32,
) -> dict[str, TensorInfo]:
    """Give an outline its memory, and modules in 8 or 4 bits: with a file's codes where the file has them, or packed
    from its matrices while they are read.

    Args:
        weights, dtype: as of `RWKV_Dual.from_pretrained`.
    Returns:
        The tensors that are left to be read. A matrix of another shape than the model's is one of them: who reads it
        says what is wrong.
    Raises:
        NumericsError, ParameterError: as `packed_parts`; a value that the dtype cannot hold.
    """
    rest = dict(tensors)
    for name, module in list(model.named_modules()):
        info = tensors.get(f"{name}.weight")
        if info is None or not isinstance(module, tuple(_IN_PLACE_OF)) or info.shape != tuple(module.weight.shape):
            continue
        new = _packed(name, module, info, weights, dtype)
        if new is not None:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, new.to(dtype).to(device))
            del rest[f"{name}.weight"]
    for module in model.modules():
        if not isinstance(module, PackedLinear | PackedEmbedding):
            module.to_empty(device=device, recurse=False)
    if len(rest) < len(tensors):
        model.requires_grad_(False)
    return rest


def _packed(
    name: str, module: nn.Module, info: TensorInfo, weights: Weights, dtype: torch.dtype
) -> PackedLinear | PackedEmbedding | None:
    """A module in 8 or 4 bits in place of one that has no values; None where it stays as it is."""
    new = next(packed for of, packed in _IN_PLACE_OF.items() if isinstance(module, of))
    if weights in SCHEMES:
        with naming(name):
            return new.of_parts(SCHEMES[weights], _packed_parts_of(info, SCHEMES[weights], dtype), info.shape[1])
    found = parts_of(info)
    if found is None or weights == "dense":
        return None
    kind, parts = found
    return new.of_parts(kind, [mapped(part) for part in parts], info.shape[1])


def _packed_parts_of(info: TensorInfo, kind: str, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """As `packed_parts` of what a file has, rounded to a dtype first, some rows at a time."""
    rows, columns = info.shape
    if kind not in GROUPED and columns % NF4_BLOCK:  # a row begins inside a block
        return packed_parts(in_dtype(info.read(), dtype, info), kind)
    shapes = part_shapes(kind, (rows, columns)).values()
    whole = [torch.empty(shape, dtype=getattr(torch, of), device="cpu") for shape, of in shapes]
    at = 0
    for block in info.blocks(columns):
        some = packed_parts(in_dtype(block, dtype, info).view(-1, columns), kind)
        for part, new in zip(whole, some, strict=True):
            step = len(part) // rows  # of absmax more than one belong to a row
            part[at * step : at * step + len(new)] = new
        at += len(block) // columns
    return whole


def refuse_packed_twice(tensors: Mapping[str, TensorInfo], weights: Weights, path: Any) -> None:
    """Raises:
    ParameterError: a file in 8 or 4 bits is to be packed.
    """
    kinds = {shown(found[0]) for info in tensors.values() if (found := parts_of(info))}
    if weights in SCHEMES and kinds:
        raise ParameterError(
            f'weights="{weights}": {path} is packed already ({", ".join(sorted(kinds))}); rounding it again would lose '
            'more.\nOpen it as it is (weights="stored"), or pack the original.'
        )
