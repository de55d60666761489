"""What the numbers of a LoRA do to a matrix; with what training started from, those of a PiSSA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from rwkv_lab.checkpoint.layout import Shape
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter, InMemory, Target, Values, in_memory
from rwkv_lab.peft.settings import lora_scaling

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class LoraTarget(Target):
    """W + scaling · B A; with init_A and init_B, of PiSSA: (W - scaling · init_B init_A) + scaling · B A."""

    A: Values  # [r, in]
    B: Values  # [out, r]
    alpha: float
    use_rslora: bool = False
    pissa: bool = False
    init_A: Values | None = None  # [r, in]; without them, PiSSA goes with what the SVD left over of the base
    init_B: Values | None = None  # [out, r]
    magnitude: Values | None = None  # [out], of DoRA (arXiv 2402.09353): the length of each row of the merged weight
    share: float = 1.0  # of DoRA: how much of the change is made

    @property
    def can_be_undone(self) -> bool:
        return self.magnitude is None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        return lora_scaling(self.alpha, self.rank, self.use_rslora)

    @property
    def has_start(self) -> bool:
        return self.init_A is not None

    @property
    def needs_residual(self) -> bool:
        return self.pissa and not self.has_start

    @property
    def tensors(self) -> dict[str, Values]:
        parts = {"lora_A": self.A, "lora_B": self.B, "init_lora_A": self.init_A, "init_lora_B": self.init_B}
        parts[MAGNITUDE] = self.magnitude
        return {name: values for name, values in parts.items() if values is not None}

    def settings(self) -> dict[str, float | str]:
        return {"scaling": self.scaling}

    def misfit(self, shape: Shape) -> str:
        for A, B in ((self.A, self.B), (self.init_A, self.init_B)):
            if A is None or B is None:
                continue
            fits = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] > 0
            if not fits or (B.shape[0], A.shape[1]) != tuple(shape):
                found = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
                return f"{found}; [r, in] and [out, r] are needed, with r of at least 1"
            if A.shape[0] > min(shape):
                return f"rank {A.shape[0]}, which is larger than the layer"
        if self.magnitude is not None and tuple(self.magnitude.shape) != tuple(shape[:1]):
            return f"{MAGNITUDE} {list(self.magnitude.shape)}; one value per row is needed"
        return ""

    def inner_misfit(self) -> str:
        return self.misfit((*self.B.shape[:1], *self.A.shape[1:2]))

    def residual_rows(self, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """As of `Target`: for PiSSA less than the rows are."""
        if self.init_A is None or self.init_B is None:
            return weight
        return self._plus(weight, self.init_A, self.init_B, first_row, -self.scaling)

    def adapted_rows(self, residual: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        changed = self._plus(residual, self.A, self.B, first_row, self.scaling)
        if self.magnitude is None:
            return changed
        lengths = self.magnitude.read()[first_row : first_row + len(residual)].to(residual)
        changed = changed * (lengths / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return changed if self.share == 1 else torch.lerp(residual, changed, self.share)

    def restored_rows(self, merged: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        residual = self._plus(merged, self.A, self.B, first_row, -self.scaling)
        if self.init_A is None or self.init_B is None:
            return residual
        return self._plus(residual, self.init_A, self.init_B, first_row, self.scaling)

    @staticmethod
    def _plus(weight: torch.Tensor, A: Values, B: Values, first_row: int, factor: float) -> torch.Tensor:
        rows = B.read()[first_row : first_row + len(weight)]
        return torch.addmm(weight, rows.to(weight), A.read().to(weight), alpha=factor)

    def prepared(self, weight: float, dtype: torch.dtype) -> Self:
        if self.magnitude is not None:
            parts = {"A": self.A, "B": self.B, "magnitude": self.magnitude}
            return replace(self, share=weight, **{n: in_memory(values, 1, dtype) for n, values in parts.items()})
        halves = {"A": in_memory(self.A, 1, dtype), "B": in_memory(self.B, weight, dtype)}
        if self.init_A is not None and self.init_B is not None:
            halves |= {"init_A": in_memory(self.init_A, 1, dtype), "init_B": in_memory(self.init_B, weight, dtype)}
        return replace(self, **halves)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As of `Target`: the change of DoRA has none."""
        if self.magnitude is not None:
            return None
        left, right = self.scaling * self.B.read().double(), self.A.read().double()  # [out,r], [r,in]
        if self.init_A is not None and self.init_B is not None:
            left = torch.cat([left, -self.scaling * self.init_B.read().double()], 1)  # [out,2r]
            right = torch.cat([right, self.init_A.read().double()], 0)  # [2r,in]
        return left, right


def lora_targets(adapter: Adapter) -> dict[str, LoraTarget]:
    """Those of an adapter that is LoRA or PiSSA."""
    return {x: target for x, target in adapter.targets.items() if isinstance(target, LoraTarget)}


def as_plain_lora(target: LoraTarget) -> LoraTarget:
    """The LoRA of twice the rank that does to the original weight what PiSSA does: B A - B₀A₀ as one product."""
    if target.init_A is None or target.init_B is None:
        return target
    A = torch.cat([target.A.read(), target.init_A.read()])
    B = torch.cat([target.B.read(), -target.init_B.read()], dim=1)
    # The scaling stays what it was: alpha / r, or alpha / sqrt(r).
    alpha = target.alpha * (math.sqrt(2) if target.use_rslora else 2)
    return LoraTarget(InMemory(A), InMemory(B), alpha, target.use_rslora)
