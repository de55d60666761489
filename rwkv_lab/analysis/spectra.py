"""What tuning changed, matrix by matrix: how much, in how many directions, whether two tunings pull the same way.

A change Δ of a low-rank adapter is never written out: its singular values are those of a small matrix between the QR
factors of B and A. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import LayoutError, NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter, Target, Values
from rwkv_lab.suggestions import did_you_mean


@dataclass(frozen=True)
class Spectrum:
    """The change Δ of one matrix beside the base's W.

    singular_values: of Δ, falling, float64; those that are zero by the adapter's rank are left out.
    """

    name: str  # "blocks.0.att.key"
    shape: tuple[int, int]  # [out, in]
    singular_values: torch.Tensor
    base_frobenius: float
    base_spectral: float

    @property
    def frobenius(self) -> float:
        """‖Δ‖, the root of the sum of its squares."""
        return float(self.singular_values.square().sum().sqrt())

    @property
    def spectral(self) -> float:
        """How far Δ can move an input of length 1: its largest singular value."""
        return float(self.singular_values[0]) if len(self.singular_values) else 0.0

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖W‖ in the Frobenius norm; NaN beside a matrix of zeros."""
        return self.frobenius / self.base_frobenius if self.base_frobenius else math.nan

    @property
    def relative_spectral(self) -> float:
        """The same of the largest singular values."""
        return self.spectral / self.base_spectral if self.base_spectral else math.nan

    @property
    def effective_rank(self) -> float:
        """Of its singular values: see `effective_rank`."""
        return effective_rank(self.singular_values)

    def rank_for(self, share: float) -> int:
        """The least rank that keeps this share (0 to 1) of ‖Δ‖².

        Raises:
            ParameterError: a share outside 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ParameterError(f"share={share!r}: it must be from 0 to 1.")
        energy = self.singular_values.square()
        kept = torch.cumsum(energy, 0)
        total = float(energy.sum())
        if not total or not share:
            return 0
        # A sum in float64 may end a rounding below its parts: the last place that can matter for the whole.
        return min(int((kept < share * total * (1 - 1e-12)).sum()) + 1, len(energy))

    def share_of(self, rank: int) -> float:
        """The share (0 to 1) of ‖Δ‖² that the nearest change of this rank keeps; NaN where nothing changed."""
        energy = self.singular_values.square()
        total = float(energy.sum())
        return float(energy[:rank].sum()) / total if total else math.nan

    def metrics(self, rank: int) -> dict[str, float]:
        """What is reported of a change; `rank`: of a LoRA that might hold it."""
        return {
            "relative": self.relative,
            "relative_spectral": self.relative_spectral,
            "effective_rank": self.effective_rank,
            "rank_90": self.rank_for(0.9),
            "rank_99": self.rank_for(0.99),
            f"share_of_rank_{rank}": self.share_of(rank),
        }


@checked
def effective_rank(singular_values: torch.Tensor) -> float:
    """e to the entropy of σ / Σσ (Roy and Vetterli 2007): r for r equal singular values `[r]`, 0 for zeros alone."""
    total = float(singular_values.sum())
    if not total:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()))


@checked
def adapter_spectra(base: Checkpoint, adapter: Adapter, names: Collection[str] | None = None) -> Iterator[Spectrum]:
    """One per adapted matrix, in the base's order.

    Args:
        names: of the weights to look at, "blocks.0.att.key.weight"; None for all.

    Raises:
        LayoutError: no whole model, or an adapter of another generation or other dimensions than the base.
        NumericsError: NaN or Inf in the adapter or in a matrix of the base.
    """
    if base.layout is None:
        raise LayoutError(f"{base.path} is not a whole RWKV model (kind {base.kind!r}): {base.reason}")
    adapter.check({n: t.shape for n, t in base.info.items()}, base.layout)
    for name, info in base.info.items():
        target = adapter.targets.get(name.removesuffix(".weight"))
        if target is None or not name.endswith(".weight") or (names is not None and name not in names):
            continue
        yield _spectrum(name, info.read().double(), _singular_values(name, target, info))


@checked
def model_spectra(
    base: Checkpoint, tuned: Mapping[str, Values], names: Collection[str] | None = None
) -> Iterator[Spectrum]:
    """One per matrix of the layers, embedding and head that stands whole in `tuned`, in the base's shape.

    Args:
        tuned: tensors by name, such as the `info` of a fine-tune, or `full` of an adapter.
        names: as of `adapter_spectra`.

    Raises:
        NumericsError: NaN or Inf in a matrix.
    """
    for name, info in base.info.items():
        if len(info.shape) != 2 or not name.endswith(".weight") or name not in tuned:
            continue
        if names is not None and name not in names:
            continue
        before, after = info.read().double(), tuned[name].read().double()
        yield _spectrum(name, before, _svdvals(name, after - before))


@checked
def delta(base: Checkpoint, adapter: Adapter, layer: str) -> torch.Tensor:
    """What an adapter adds to the weight of a layer ("blocks.0.att.key"), `[out,in]` float64.

    Raises:
        ParameterError: the adapter has no such layer.
    """
    if layer not in adapter.targets:
        raise ParameterError(f"The adapter has no layer {layer!r}{did_you_mean(layer, adapter.targets)}")
    weight = base.info[f"{layer}.weight"].read().double()
    target = adapter.targets[layer]
    return target.adapted_rows(target.residual_rows(weight)) - weight


@checked
def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two changes of one shape, as vectors: 1 the same direction, 0 none in common, -1 opposite; NaN where one is 0.

    Raises:
        ParameterError: shapes that differ.
    """
    if first.shape != second.shape:
        raise ParameterError(
            f"Changes of shapes {list(first.shape)} and {list(second.shape)} have no common direction."
        )
    first, second = first.double().flatten(), second.double().flatten()
    length = float(first.norm() * second.norm())
    return float(first @ second) / length if length else math.nan


def _singular_values(name: str, target: Target, info: TensorInfo) -> torch.Tensor:
    factors = target.factors()
    if factors is None:
        weight = info.read().double()
        return _svdvals(name, target.adapted_rows(weight) - weight)
    left, right = factors
    _refuse_nonfinite(name, left, right)
    return _svdvals(name, torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T)


def _spectrum(name: str, weight: torch.Tensor, values: torch.Tensor) -> Spectrum:
    _refuse_nonfinite(name, weight)
    largest = float(torch.linalg.matrix_norm(weight, 2))
    rows, columns = weight.shape
    return Spectrum(name.removesuffix(".weight"), (rows, columns), values, float(weight.norm()), largest)


def _svdvals(name: str, matrix: torch.Tensor) -> torch.Tensor:
    _refuse_nonfinite(name, matrix)
    return torch.linalg.svdvals(matrix)


def _refuse_nonfinite(name: str, *matrices: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(m).all()) for m in matrices):
        raise NumericsError(f"{name}: NaN or Inf, of which there are no singular values.")
