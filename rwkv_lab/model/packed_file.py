"""Models in 8 and 4 bits to files and back: codes and scales as they are computed with, mapped when they are opened."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checkpoint.mapped import mapped
from rwkv_lab.checkpoint.packed import ACTIVATIONS, GROUPED, NOTE, PARTS, VERSION, columns_note, grouped
from rwkv_lab.errors import CorruptFileError
from rwkv_lab.model.weight_only import ACTIVATIONS as choices
from rwkv_lab.model.weight_only import PackedEmbedding, PackedLinear

_KINDS = {bits: kind for kind, bits in GROUPED.items()}
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
        ends = PARTS[_KINDS[module.bits]]
        tensors |= {f"{name}.weight.{end}": part for end, part in zip(ends, module.parts(), strict=True)}
    columns = {f"{name}.weight": (module.columns, module.bits) for name, module in packed.items()}
    read = next(iter(packed.values())).activations
    return tensors, {NOTE: VERSION, ACTIVATIONS: read} | columns_note(columns)


def take_activations(model: nn.Module, notes: Mapping[str, str]) -> None:
    """Let the modules in 8 or 4 bits read what those that were saved read.

    Raises:
        CorruptFileError: something else than there is.
    """
    for module in packed_modules(model).values():
        module.activations = notes.get(ACTIVATIONS, choices[0])
        if module.activations not in choices:
            raise CorruptFileError(f"The file states {ACTIVATIONS}={module.activations!r:.40}; {', '.join(choices)}.")


def take_packed(model: Any, tensors: Mapping[str, TensorInfo], device: torch.device) -> dict[str, TensorInfo]:
    """Give an outline its memory, and modules that compute with a file's codes where the file has them.

    Returns:
        The tensors that are left to be read. A matrix of another shape than the model's is one of them: who reads it
        says what is wrong.
    """
    rest = dict(tensors)
    for name, module in list(model.named_modules()):
        info = tensors.get(f"{name}.weight")
        found = grouped(info) if info is not None else None
        if info is None or found is None or not isinstance(module, tuple(_IN_PLACE_OF)):
            continue
        if info.shape == tuple(module.weight.shape):
            bits, parts = found
            kind = next(packed for of, packed in _IN_PLACE_OF.items() if isinstance(module, of))
            new = kind.of_codes(*(mapped(part) for part in parts), info.shape[1], bits).to(module.weight.dtype)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, new.to(device))
            del rest[f"{name}.weight"]
    for module in model.modules():
        if not isinstance(module, PackedLinear | PackedEmbedding):
            module.to_empty(device=device, recurse=False)
    if len(rest) < len(tensors):
        model.requires_grad_(False)
    return rest
