"""What a conversion puts into its output: rows for people, tensors for the writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rwkv_lab.checkpoint import Layout, TensorInfo
from rwkv_lab.checkpoint.dimensions import Shape
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.convert.containers import Container
from rwkv_lab.convert.plan import ConvertRow, Dropped
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.lazy_torch import torch
from rwkv_lab.tokenizer import Tokenizer

Tensors = list[tuple[ConvertRow, OutTensor]]


@dataclass(frozen=True)
class Output:
    """What goes into an output, before it is known where."""

    spec: ConvertSpec  # with what the target decides filled in
    container: Container
    content: Tensors
    format: ForeignFormat | None = None
    layout: Layout | None = None
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    as_adapter: bool = False  # whether it was read as an adapter, and is to be compared as one
    file_notes: Mapping[str, str] = field(default_factory=dict)  # beside the provenance


def copied(
    name: str, sources: tuple[str, ...], info: TensorInfo, shape: Shape, dtype: torch.dtype
) -> tuple[ConvertRow, OutTensor]:
    """A tensor whose elements keep their order."""
    same = dtype == info.dtype
    tensor = OutTensor(name, shape, dtype, source=info, compute=None if same else info.blocks)
    return ConvertRow(name, sources, "copy" if same else "cast", shape, dtype, tensor.nbytes), tensor


def computed(
    name: str,
    sources: tuple[str, ...],
    compute: Callable[[], torch.Tensor],
    shape: Shape,
    dtype: torch.dtype,
    action: str,
) -> tuple[ConvertRow, OutTensor]:
    """A tensor that `compute` makes whole."""
    tensor = OutTensor(name, shape, dtype, compute=lambda: [compute().contiguous().flatten()])
    return ConvertRow(name, sources, action, shape, dtype, tensor.nbytes), tensor
