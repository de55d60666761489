"""What a PiSSA adapter started from, computed again from the base: the exact SVD gives the same product everywhere.

Signs and order of singular vectors are free, and cancel in B₀A₀; only where the last singular value that belongs to it
and the next one nearly agree is the product undetermined. A randomised SVD cannot be had again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.peft.lora_target import LoraTarget, lora_targets

# Of the largest singular value: float32 finds vectors to about 1e-7 of it over their distance to the others.
_DISTINCT = 1e-5
_ALIKE = 0.5  # cosine between what training left and what it started from; unrelated matrices have less than 0.1


@dataclass(frozen=True)
class _Start:
    """The principal part of a base's matrix, as the halves of an adapter."""

    name: str
    weight: TensorInfo
    target: LoraTarget  # what became of it

    @cached_property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A₀ [r, in], B₀ [out, r]), float64."""
        r = self.target.rank
        weight = self.weight.read().double()
        if not weight.isfinite().all():
            raise NumericsError(f"{self.name} holds NaN or infinity; it has no singular value decomposition.")
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        if r < len(S) and S[r - 1] - S[r] < _DISTINCT * S[0]:
            raise NumericsError(
                f"{self.name}: its singular values {r} and {r + 1} nearly agree ({float(S[r - 1]):.6g}, "
                f"{float(S[r]):.6g}), so what PiSSA took is not determined.\nPass the file that it started from."
            )
        root = (S[:r] / self.target.scaling).sqrt()
        halves = root[:, None] * Vh[:r], U[:, :r] * root
        self._refuse_another(*halves)
        return halves

    def _refuse_another(self, A0: torch.Tensor, B0: torch.Tensor) -> None:
        """Training moves an adapter little from its start."""
        A, B = self.target.A.read().double(), self.target.B.read().double()

        def dot(A1: torch.Tensor, B1: torch.Tensor, A2: torch.Tensor, B2: torch.Tensor) -> float:
            return float(((B1.T @ B2) * (A1 @ A2.T)).sum())  # of two products, without forming them

        cosine = dot(A, B, A0, B0) / max((dot(A, B, A, B) * dot(A0, B0, A0, B0)) ** 0.5, 1e-300)
        if not cosine >= _ALIKE:
            raise NumericsError(
                f"{self.name}: the adapter does not resemble the principal part of the base (cosine {cosine:.2f}).\n"
                "It is of another base, or no PiSSA: a LoRA takes alpha= and no pissa_init."
            )


@dataclass(frozen=True)
class ComputedHalf:
    """One half of a start; nothing is computed before it is read."""

    start: _Start
    which: int  # 0: A₀, 1: B₀
    shape: tuple[int, ...]
    dtype: torch.dtype = field(default_factory=lambda: torch.float64)

    def read(self) -> torch.Tensor:
        """Its values.

        Raises:
            NumericsError: a start that is not determined, or an adapter that did not start there.
        """
        return self.start.halves[self.which]


def check_computable(ck: Checkpoint) -> None:
    """Refuse an adapter whose file states another start than the exact SVD.

    Raises:
        ParameterError: names it.
    """
    how = (ck.adapter_config or {}).get("init_lora_weights")
    if isinstance(how, str) and how != "pissa":
        raise ParameterError(
            f"pissa_init='svd': {ck.path} began with {how!r} by its configuration, which is no exact SVD and\n"
            "cannot be computed again. Pass the folder that was saved before training."
        )


def with_computed_start(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The PiSSA adapter with the base's principal parts as what it started from; they are computed when they are read.

    Raises:
        ParameterError: no PiSSA.
    """
    targets = lora_targets(adapter)
    if len(targets) < len(adapter.targets):
        raise ParameterError(f"pissa_init='svd': {adapter.where} is {adapter.method}, not PiSSA; leave it out.")
    out = {}
    for x, target in targets.items():
        start = _Start(f"{x}.weight", base.info[f"{x}.weight"], target)
        halves = ComputedHalf(start, 0, target.A.shape), ComputedHalf(start, 1, target.B.shape)
        out[x] = replace(target, pissa=True, init_A=halves[0], init_B=halves[1])
    return replace(adapter, targets=out)
