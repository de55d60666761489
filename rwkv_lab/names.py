"""Tensor names of the layers, `blocks.<layer>.<part>`: read here and nowhere else."""

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")


def split_block(name: str) -> tuple[int, str] | None:
    """(layer, rest of the name) of a tensor or module of a layer, (3, "att.key.weight"); None of what is outside."""
    found = _BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def without_block(name: str) -> str:
    """The name without its layer: "att.key.weight"; whole where it is outside the layers."""
    inside = split_block(name)
    return inside[1] if inside else name


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether it is a matrix of a layer, which adapters adapt and quantisers store in fewer bits."""
    return name.endswith(".weight") and len(shape) == 2 and split_block(name) is not None
