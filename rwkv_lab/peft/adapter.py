"""An adapter as its numbers mean it, whatever file it lies in: which matrices it changes, and how each one is changed.

Everything here works from shapes; numbers are read when `read`, `factors` or one of the `…_rows` is called. The kinds
of adapters are in `rwkv_lab.peft.kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, Layout, expected_tensors
from rwkv_lab.checkpoint.layout import Shape, possible_versions, same_shape
from rwkv_lab.errors import LayoutError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.text import counted


class Values(Protocol):
    """A tensor that may still lie in a file; `TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor.detach()


class Target(ABC):
    """How one matrix is changed. A base's weight becomes the residual, which is what training froze, and that becomes
    the merged weight.

    Attributes:
        row_multiple: rows that the `…_rows` are given must come in this multiple, and begin at one of it.
    """

    row_multiple: int = 1

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Values]:
        """Its parts by name, as a layer's parameters are called."""

    @abstractmethod
    def settings(self) -> dict[str, float | str]:
        """What decides the change beside its numbers."""

    @abstractmethod
    def misfit(self, shape: Shape) -> str:
        """Why this cannot change a weight of that shape, "" where it can."""

    def inner_misfit(self) -> str:
        """What is wrong between its parts, whatever the weight's shape is; "" where nothing is."""
        return ""

    @property
    def has_start(self) -> bool:
        """Whether it knows what it started from, where it did not start from the base itself."""
        return False

    @property
    def can_be_undone(self) -> bool:
        """Whether a merged weight still has what this took away."""
        return True

    @property
    def needs_residual(self) -> bool:
        """Whether it goes with a base from which its start was taken out already."""
        return False

    def residual_rows(self, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of the base's weight, what training froze: the rows themselves, for most."""
        return weight

    @abstractmethod
    def adapted_rows(self, residual: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of what was frozen, those of the merged weight, in the same dtype and place."""

    @abstractmethod
    def restored_rows(self, merged: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of a merged weight, the base's, up to rounding.

        Raises:
            torch.linalg.LinAlgError: a change that cannot be undone.
        """

    @abstractmethod
    def prepared(self, weight: float, dtype: torch.dtype) -> Self:
        """The same with its parts read once, in that dtype, and what it adds times `weight`."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(left `[out, k]`, right `[k, in]`), float64, whose product is the change; None where there are none."""
        return None


@dataclass(frozen=True)
class Adapter:
    """An adapter. Use as a context manager where it was opened from files: they are closed at the end."""

    method: str  # of `rwkv_lab.peft.config.ADAPTER_KINDS`
    targets: Mapping[str, Target]  # by the layer's name, "blocks.0.att.key"
    full: Mapping[str, Values]  # whole tensors by name, which take the place of the base's
    path: Path | None = None  # None for one in memory
    layout: str = "memory"  # "rwkv-peft", "hf" or "memory"
    quant: str | None = None  # how the frozen base was stored in training; None where the file does not state it
    origin: str | None = None  # which base it was trained on, as of `checkpoint.origin`; None where it is not stated
    named_targets: tuple[str, ...] = ()  # layers that the file lists as adapted: names or their ends
    notes: tuple[str, ...] = ()  # what its file states otherwise than its tensors have it, in words
    opened: tuple[Checkpoint, ...] = field(default=(), repr=False)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for ck in self.opened:
            ck.close()

    @property
    def residual_base(self) -> bool:
        """Whether this is PiSSA that goes with what the SVD left over, and not with the original model."""
        return any(t.needs_residual for t in self.targets.values())

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.path or "the adapter")

    def tensors(self) -> dict[str, Values]:
        """Every tensor of it by name: `blocks.0.att.key.lora_A`, `blocks.0.ln1.weight`, …"""
        parts = {f"{x}.{part}": v for x, target in self.targets.items() for part, v in target.tensors.items()}
        return parts | dict(self.full)

    @checked
    def check(self, shapes: Mapping[str, Shape], base: Layout) -> None:
        """Refuse a base that this adapter does not belong to.

        Args:
            shapes: of the base's tensors, by name.

        Raises:
            LayoutError: another generation or other dimensions, names that the base does not have, layers that the
                adapter's own configuration names and that it lacks.
        """
        names = [*(f"{x}.weight" for x in self.targets), *self.full]
        optional = expected_tensors(base)[1]
        versions, evidence = possible_versions(names)
        if base.version not in versions:
            has = "RWKV-" + " or ".join(sorted(versions)) if versions else "mixed generations"
            raise LayoutError(f"{self.where} is of {has} ({', '.join(evidence[:3])}), the base is RWKV-{base.version}.")
        unknown = [n for n in names if n not in shapes and n not in optional]
        if unknown:
            raise LayoutError(
                f"{len(unknown)} of the {len(names)} tensors that {self.where} changes are not in the base, first "
                f"{unknown[0]}.\nThe base is RWKV-{base.version} with {counted(base.n_layer, 'layer')}: "
                "they do not go together."
            )
        for x, target in self.targets.items():
            misfit = target.misfit(shapes[f"{x}.weight"])
            if misfit:
                raise LayoutError(f"{self.where}: {x} of the base is {list(shapes[f'{x}.weight'])}, here is {misfit}.")
        for name, values in self.full.items():
            wanted = shapes[name] if name in shapes else optional[name]
            if not same_shape(values.shape, wanted):
                raise LayoutError(f"{self.where}: {name} is {list(values.shape)}, of the base it is {list(wanted)}.")
        matrices = [n.removesuffix(".weight") for n in shapes if n.endswith(".weight")]
        named = [m for m in matrices if any(m == t or m.endswith(f".{t}") for t in self.named_targets)]
        lost = [m for m in named if m not in self.targets]
        if lost:
            raise LayoutError(
                f"{self.where} lists {lost[0]} as adapted, and has nothing for it "
                f"({counted(len(lost), 'such layer')}).\n"
                "It is incomplete: save or download it again."
            )


@checked
def refuse_overlap(adapters: Iterable[Adapter]) -> None:
    """Refuse adapters that carry the same whole tensor: only one of them could be meant.

    Raises:
        LayoutError: with the tensor and both adapters.
    """
    owner: dict[str, Adapter] = {}
    for adapter in adapters:
        for name in adapter.full:
            if name in owner:
                raise LayoutError(
                    f"{name} stands whole in {owner[name].where} and in {adapter.where}; only one can be meant.\n"
                    "Leave it out of one of them."
                )
            owner[name] = adapter


def in_memory(values: Values, scale: float, dtype: torch.dtype) -> InMemory:
    """Read now, in that dtype, and scaled."""
    read = values.read().to(dtype)
    return InMemory(read if scale == 1 else read * scale)
