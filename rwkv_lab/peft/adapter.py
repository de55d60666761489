"""An adapter as its numbers mean it, whatever file it lies in: which matrices it changes, and how each one is changed.

Everything here works from shapes; numbers are read when `read`, `layer` or one of the `…_rows` is called.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from rwkv_lab.checkpoint import Checkpoint, Layout, expected_tensors
from rwkv_lab.checkpoint.layout import Shape, possible_versions, same_shape
from rwkv_lab.errors import LayoutError
from rwkv_lab.peft.linear import AdaptedLinear, LoraLinear, PissaLinear, lora_scaling
from rwkv_lab.peft.miss import MissLinear, bat_change


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


@dataclass(frozen=True)
class LoraTarget:
    """W + scaling · B A; with init_A and init_B, of PiSSA: (W - scaling · init_B init_A) + scaling · B A."""

    A: Values  # [r, in]
    B: Values  # [out, r]
    alpha: float
    use_rslora: bool = False
    pissa: bool = False
    init_A: Values | None = None  # [r, in]; without them, PiSSA goes with what the SVD left over of the base
    init_B: Values | None = None  # [out, r]

    row_multiple = 1  # rows that `…_rows` are given must come in this multiple

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        return lora_scaling(self.alpha, self.rank, self.use_rslora)

    @property
    def tensors(self) -> dict[str, Values]:
        parts = {"lora_A": self.A, "lora_B": self.B, "init_lora_A": self.init_A, "init_lora_B": self.init_B}
        return {name: values for name, values in parts.items() if values is not None}

    def misfit(self, shape: Shape) -> str:
        """Why this cannot change a weight of that shape, "" where it can."""
        for A, B in ((self.A, self.B), (self.init_A, self.init_B)):
            if A is None:
                continue
            fits = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] > 0
            if not fits or (B.shape[0], A.shape[1]) != tuple(shape):
                found = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
                return f"{found}; [r, in] and [out, r] are needed, with r of at least 1"
            if A.shape[0] > min(shape):
                return f"rank {A.shape[0]}, which is larger than the layer"
        return ""

    def residual_rows(self, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of the base's weight, what the layer kept frozen: for PiSSA less than they are."""
        if self.init_A is None:
            return weight
        return self._plus(weight, self.init_A, self.init_B, first_row, -self.scaling)

    def adapted_rows(self, residual: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of what was frozen, those of the merged weight, in the same dtype and place."""
        return self._plus(residual, self.A, self.B, first_row, self.scaling)

    def restored_rows(self, merged: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Of rows `[rows, in]` of a merged weight, the base's, up to rounding."""
        residual = self._plus(merged, self.A, self.B, first_row, -self.scaling)
        if self.init_A is None:
            return residual
        return self._plus(residual, self.init_A, self.init_B, first_row, self.scaling)

    @staticmethod
    def _plus(weight: torch.Tensor, A: Values, B: Values, first_row: int, factor: float) -> torch.Tensor:
        rows = B.read()[first_row : first_row + len(weight)]
        return torch.addmm(weight, rows.to(weight), A.read().to(weight), alpha=factor)

    def layer(self, linear: nn.Linear) -> AdaptedLinear:
        """The layer that was trained, on top of the base's."""
        kind = PissaLinear if self.pissa else LoraLinear
        layer = kind.from_linear(linear, self.rank, self.alpha, use_rslora=self.use_rslora, adapter_dtype=self.A.dtype)
        with torch.no_grad():
            if self.init_A is not None:
                layer.start_from(self.init_A.read(), self.init_B.read())
            layer.lora_A.copy_(self.A.read())
            layer.lora_B.copy_(self.B.read())
        return layer


@dataclass(frozen=True)
class MissTarget:
    """W changed by a block of numbers as `rwkv_lab.peft.miss` says for the variant."""

    block: Values
    variant: str

    @property
    def rank(self) -> int:
        return self.block.shape[-1] if self.variant.startswith("bat") else self.block.shape[0]

    @property
    def row_multiple(self) -> int:
        """Rows that `…_rows` are given must come in this multiple, and begin at one of it."""
        return self.rank if self.variant.startswith("bat") else 1

    @property
    def tensors(self) -> dict[str, Values]:
        return {"miss_block": self.block}

    def misfit(self, shape: Shape) -> str:
        """Why this cannot change a weight of that shape, "" where it can."""
        if len(shape) != 2:
            return "a matrix is needed"
        out, inputs = shape
        found, r = list(self.block.shape), self.rank
        if self.variant.startswith("bat"):
            per = out if self.variant == "bat-hf" else inputs
            fits = out % r == inputs % r == 0 and found == [per // r, r, r]
            return "" if fits else f"a block {found}; {self.variant} of rank {r} needs {[per // r, r, r]}"
        columns = found[1] if self.variant == "mini" else out
        if r > inputs:
            return f"a block {found}: its rank is larger than the layer's {inputs} inputs"
        return "" if found == [r, columns] and out % columns == 0 else f"a block {found}; [r, {out}] is needed"

    def residual_rows(self, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """As of `LoraTarget`: the rows themselves."""
        return weight

    def adapted_rows(self, residual: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """As of `LoraTarget`."""
        block = self._block(residual, first_row)
        if self.variant.startswith("bat"):
            return residual + bat_change(residual, block, self.variant)
        return residual + self._repeated(block, residual)

    def restored_rows(self, merged: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """As of `LoraTarget`.

        Raises:
            torch.linalg.LinAlgError: a bat that cannot be undone, because I + D has no inverse.
        """
        block = self._block(merged, first_row)
        if not self.variant.startswith("bat"):
            return merged - self._repeated(block, merged)
        # A tile became T = W (I + D) + D; I + D is the same for all tiles of a block.
        r = self.rank
        eye = torch.eye(r, dtype=block.dtype, device=block.device)
        inverse = torch.linalg.inv(eye + block)
        per_tile = (slice(None), None) if self.variant == "bat-hf" else (None, slice(None))
        tiles = merged.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)
        tiles = (tiles - block[per_tile]) @ inverse[per_tile]
        return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def _block(self, like: torch.Tensor, first_row: int) -> torch.Tensor:
        """The part of the block that changes rows `[rows, in]` from first_row on."""
        block, rows = self.block.read().to(like), len(like)
        if self.variant == "bat-hf":
            return block[first_row // self.rank :][: rows // self.rank]
        if self.variant == "bat-rwkv-peft":
            return block
        columns = torch.arange(first_row, first_row + rows, device=block.device) % block.shape[1]
        return block[:, columns]  # [r, rows]

    def _repeated(self, block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        inputs = like.shape[1]
        return block.repeat(-(-inputs // self.rank), 1)[:inputs].T  # [rows, in]

    def layer(self, linear: nn.Linear) -> AdaptedLinear:
        """The layer that was trained, on top of the base's."""
        mini_r = self.block.shape[1] if self.variant == "mini" else 1
        layer = MissLinear.from_linear(linear, self.rank, self.variant, mini_r, adapter_dtype=self.block.dtype)
        with torch.no_grad():
            layer.miss_block.copy_(self.block.read())
        return layer


@dataclass(frozen=True)
class Adapter:
    """An adapter. Use as a context manager where it was opened from files: they are closed at the end."""

    method: str  # "lora", "pissa" or "miss"
    targets: Mapping[str, LoraTarget | MissTarget]  # by the layer's name, "blocks.0.att.key"
    full: Mapping[str, Values]  # whole tensors by name, which take the place of the base's
    path: Path | None = None  # None for one in memory
    layout: str = "memory"  # "rwkv-peft", "hf" or "memory"
    quant: str | None = None  # how the frozen base was stored in training; None where the file does not say
    named_targets: tuple[str, ...] = ()  # layers that the file says it adapts: names or their ends
    opened: tuple[Checkpoint, ...] = field(default=(), repr=False)

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        for ck in self.opened:
            ck.close()

    @property
    def residual_base(self) -> bool:
        """Whether this is PiSSA that goes with what the SVD left over, and not with the original model."""
        return any(isinstance(t, LoraTarget) and t.pissa and t.init_A is None for t in self.targets.values())

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.path or "the adapter")

    def tensors(self) -> dict[str, Values]:
        """Every tensor of it by name: `blocks.0.att.key.lora_A`, `blocks.0.ln1.weight`, …"""
        parts = {f"{x}.{part}": v for x, target in self.targets.items() for part, v in target.tensors.items()}
        return parts | dict(self.full)

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
                f"{unknown[0]}.\nThe base is RWKV-{base.version} with {base.n_layer} layers: they do not go together."
            )
        for x, target in self.targets.items():
            misfit = target.misfit(shapes[f"{x}.weight"])
            if misfit:
                raise LayoutError(f"{self.where}: {x} of the base is {list(shapes[f'{x}.weight'])}, here is {misfit}.")
        for name, values in self.full.items():
            wanted = shapes.get(name, optional.get(name))
            if not same_shape(values.shape, wanted):
                raise LayoutError(f"{self.where}: {name} is {list(values.shape)}, of the base it is {list(wanted)}.")
        matrices = [n.removesuffix(".weight") for n in shapes if n.endswith(".weight")]
        named = [m for m in matrices if any(m == t or m.endswith(f".{t}") for t in self.named_targets)]
        lost = [m for m in named if m not in self.targets]
        if lost:
            raise LayoutError(
                f"{self.where} says that it adapts {lost[0]}, and has nothing for it ({len(lost)} such layers).\n"
                "It is incomplete: save or download it again."
            )


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
