"""What a tuning changes: how many values it trains, how far every tensor moved, and whether another moved it alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rwkv_lab.analysis.spectra import Spectrum, adapter_spectra, cosine, model_spectra
from rwkv_lab.analysis.tuning import Tuning, tensor_part
from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check

_AGREE = 1e-6  # between two ways to ‖Δ‖ in float64, where Δ is as small as a rounding of float32 in W


@dataclass(frozen=True)
class ValueCounts:
    """How many values of a model a tuning trains."""

    parts: dict[str, tuple[int, int]]  # part, such as "att.key" -> (values in the base, values trained)
    trained: int
    frozen: int  # values of the base that nothing takes the place of


@dataclass(frozen=True)
class Changes:
    """How far tensors moved: of matrices the spectrum of the change, of other tensors of the base ‖Δ‖ / ‖W‖."""

    spectra: list[Spectrum]
    others: dict[str, float]  # tensor name -> ‖Δ‖ / ‖W‖; NaN beside zeros
    checks: list[Check] = field(default_factory=list)
    heads: list[Spectrum] = field(default_factory=list)  # of a tuned state, "blocks.0.state.head 1": the base has zeros


@dataclass(frozen=True)
class Directions:
    """Two changes of the same tensors, as vectors."""

    cosines: dict[str, float]  # tensor name -> cosine; NaN where one of them is 0
    chance: dict[str, float]  # tensor name -> the size that two random directions have, 1 / √values


@checked
def count_values(tuning: Tuning, changed: Sequence[str]) -> ValueCounts:
    """Values in the base and values trained, part by part.

    Args:
        changed: what `tuning.changed_names()` gave.
    """
    parts: dict[str, tuple[int, int]] = {}
    base, trains = tuning.base.info, set(changed)
    for name in dict.fromkeys([*base, *changed]):
        there = base[name].numel if name in base else 0
        before, trained = parts.get(tensor_part(name), (0, 0))
        parts[tensor_part(name)] = before + there, trained + (tuning.trained_values(name) if name in trains else 0)
    replaced = sum(tuning.trained_values(n) for n in changed if n in tuning.replacements and n in base)
    return ValueCounts(parts, sum(t for _, t in parts.values()), sum(there for there, _ in parts.values()) - replaced)


@checked
def measure_changes(tuning: Tuning, names: Sequence[str]) -> Changes:
    """The singular values of every changed matrix, and how far other tensors of the base moved.

    Args:
        names: changed tensors, in the order of the answer.

    Raises:
        NumericsError: NaN or Inf in a matrix.
    """
    spectra = list(model_spectra(tuning.base, tuning.replacements, set(names)))
    if tuning.adapter:
        spectra += adapter_spectra(tuning.base, tuning.adapter, set(names))
    place = {name.removesuffix(".weight"): i for i, name in enumerate(names)}
    spectra.sort(key=lambda s: place[s.name])
    matrices = {f"{s.name}.weight" for s in spectra}
    others = {n: _relative(tuning, n) for n in names if n in tuning.base.info and n not in matrices}
    checks = []
    if spectra:
        apart = max(_apart(tuning, s) for s in spectra)
        name = "‖Δ‖ from singular values, against Δ written out: largest relative difference"
        checks.append(Check(name, float(f"{apart:.1g}"), _AGREE, apart <= _AGREE))
    return Changes(spectra, others, checks, _heads(tuning, names))


def _heads(tuning: Tuning, names: Sequence[str]) -> list[Spectrum]:
    """The heads of a tuned state, where all of its layers are looked at and the base has none."""
    states = tuning.state_names
    if not states or not set(states) <= set(names) or any(name in tuning.base.info for name in states):
        return []
    state = tuning.state(tuning.after)  # [L,H,V,K]
    return [
        Spectrum(f"blocks.{layer}.state.head {head}", (V, K), torch.linalg.svdvals(state[layer, head]), 0.0, 0.0)
        for L, H, V, K in [tuple(state.shape)]
        for layer in range(L)
        for head in range(H)
    ]


@checked
def compare_directions(one: Tuning, other: Tuning, names: Sequence[str]) -> Directions:
    """The cosine between the changes of two tunings of one base, of every tensor that both change.

    Args:
        names: changed tensors of the first.

    Raises:
        ParameterError: the second changes nothing.
        NumericsError: NaN or Inf in one of them.
    """
    both = set(other.changed_names())
    cosines = {n: cosine(one.delta(n), other.delta(n)) for n in names if n in both}
    return Directions(cosines, {n: 1 / math.sqrt(one.delta(n).numel()) for n in cosines})


def _apart(tuning: Tuning, s: Spectrum) -> float:
    """How far ‖Δ‖ is off, of ‖Δ‖ or, where that is tiny, of what a rounding in W comes to."""
    written = float(tuning.delta(f"{s.name}.weight").norm())
    return abs(written - s.frobenius) / (written + _AGREE * s.base_frobenius)


def _relative(tuning: Tuning, name: str) -> float:
    before = float(tuning.before(name).norm())
    return float(tuning.delta(name).norm()) / before if before else math.nan
