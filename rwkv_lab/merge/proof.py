"""What a proof is made of: files as their formats' own libraries read them, and for each tensor of the output what must
stand there.

A proof shares no code with the method that it proves. It may take the memory that merging does not.
"""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rwkv_lab.lazy_torch import torch

Tensors = Mapping[str, "torch.Tensor"]  # of a file, by name; read when they are taken out
Source = tuple[Tensors, str]  # a file and a name in it

# For a part of a flat tensor: what may stand there, float64 (several where a sum too near 0 to have a sign decides),
# and what the arithmetic may add to the error of the last rounding.
Exact = Callable[[slice], tuple[list["torch.Tensor"], "torch.Tensor | float"]]


@dataclass(frozen=True)
class ProofInputs:
    """The inputs of a merge, opened again, and its recipe as the output records it."""

    base: Tensors
    tuned: Sequence[Tensors]
    paths: Sequence[Path]  # of `tuned`
    init: Sequence[Tensors | None]  # one per tuned: of a PiSSA adapter, what it started from
    recipe: Mapping[str, Any]

    @property
    def precision(self) -> torch.finfo:
        """Of the merge's arithmetic. An operation may err by `eps` / 2 of its result, and of `smallest_normal` where
        that is larger: numbers below it are equally far apart."""
        return torch.finfo(getattr(torch, self.recipe["precision"]))

    def may_change(self, name: str) -> bool:
        """Whether include and exclude let the merge touch a tensor."""
        include, exclude = self.recipe["include"], self.recipe["exclude"] or []
        wanted = include is None or any(pattern_matches(name, p) for p in include)
        return wanted and not any(pattern_matches(name, p) for p in exclude)


class Proof(ABC):
    """The proof of one merge: `Method.proof` makes it."""

    def __init__(self, inputs: ProofInputs):
        self.inputs = inputs

    @abstractmethod
    def sources(self) -> dict[str, Source | None]:
        """For every tensor of the output what it is a copy of; None where it is computed."""

    @abstractmethod
    def exact(self, name: str) -> Exact:
        """The values of a computed tensor."""

    def like(self, name: str) -> torch.Tensor:
        """A tensor of the shape that `name` must have in the output, and of its dtype where it is computed."""
        files = (self.inputs.base, *self.inputs.tuned)
        return next(tensors[name] for tensors in files if name in tensors)


def pattern_matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches any run of the name's dotted parts, which are tried one by one."""
    parts = name.split(".")
    runs = [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(re.fullmatch(fnmatch.translate(pattern), run) for run in runs)


@dataclass(frozen=True)
class WholeTensor:
    """One tensor of every model, whole and flat: what a mixing method's proof computes from."""

    name: str
    base: torch.Tensor  # [n], of the base's dtype; zeros where the base has no such tensor
    tuned: Sequence[torch.Tensor]  # [n] each, the base's where a model has no such tensor
    precision: torch.dtype  # of the merge's arithmetic

    @property
    def models(self) -> list[torch.Tensor]:
        """The base's and the tuned ones."""
        return [self.base, *self.tuned]

    @property
    def eps(self) -> float:
        """What the arithmetic may add to an error, relative to the size of its terms."""
        return torch.finfo(self.precision).eps * (4 + 2 * len(self.models))

    @property
    def tiny(self) -> float:
        """The size that a smaller term's error grows with: numbers below it are equally far apart."""
        return torch.finfo(self.precision).smallest_normal

    def each(self, value: Any) -> list:
        """A number per tuned model; one that is given alone holds for all."""
        return value if isinstance(value, list) else [value] * len(self.tuned)


def total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, in order; at least one."""
    return reduce(torch.add, terms)


def elementwise(t: WholeTensor, formula: Callable[..., torch.Tensor]) -> Exact:
    """Element i of the output is `formula(base[i], tuned1[i], …)`, which is given float64 tensors; its arithmetic may
    err by a few units of the sum of the magnitudes."""

    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        values = [model[part].double() for model in t.models]
        size = total([v.abs() for v in values])
        return [formula(*values)], t.eps * (size + t.tiny)

    return exact


def combined(t: WholeTensor, shares: Sequence[float]) -> Exact:
    """Σ shareᵢ · modelᵢ, the base first."""

    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        terms = [m[part].double() * s for m, s in zip(t.models, shares, strict=True) if s]
        # lerp forms a difference of the two, so the size of each counts whole.
        sizes = [
            m[part].double().abs() * max(abs(s), min(1.0, max(map(abs, shares))))
            for m, s in zip(t.models, shares, strict=True)
        ]
        size = total(sizes)
        return [total(terms) if terms else torch.zeros_like(size)], t.eps * (size + t.tiny)

    return exact


def added(
    t: WholeTensor,
    weights: Sequence[float],
    alpha: float,
    divisor: float = 1.0,
    kept: Sequence[torch.Tensor | None] = (),
    scale: Sequence[float] = (),
) -> Exact:
    """base + alpha · Σ weightᵢ · scaleᵢ · (tunedᵢ - base where keptᵢ) / divisor."""

    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        base = t.base[part].double()
        deltas, sizes = _deltas(t, part, weights, kept, scale)
        size = base.abs() + abs(alpha / divisor) * total(sizes)
        return [base + alpha * total(deltas) / divisor], t.eps * (size + t.tiny)

    return exact


def elected(
    t: WholeTensor,
    weights: Sequence[float],
    alpha: float,
    normalize: bool,
    kept: Sequence[torch.Tensor | None] = (),
    scale: Sequence[float] = (),
) -> Exact:
    """As `added`, of those deltas alone whose sign is that of the sum of all; with `normalize` their weighted mean.

    Both signs are answers where the sum is too near 0 for its sign to be certain.
    """

    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        base = t.base[part].double()
        deltas, sizes = _deltas(t, part, weights, kept, scale)
        everything, size = total(deltas), total(sizes)
        answers, allowed = [], torch.zeros_like(base)
        for positive in (True, False):
            agree = [(d > 0 if positive else d < 0).double() for d in deltas]
            divisor = total([a * w for a, w in zip(agree, weights, strict=True)])
            magnitude = total([a * abs(w) for a, w in zip(agree, weights, strict=True)])
            cancels = divisor.abs() <= 1e-6 * magnitude  # what rounding left, or none agrees: a sum, and no mean
            divisor = divisor.masked_fill(cancels, 1.0) if normalize else torch.ones_like(base)
            answers.append(base + alpha * total([d * a for d, a in zip(deltas, agree, strict=True)]) / divisor)
            allowed = torch.maximum(allowed, t.eps * (base.abs() + t.tiny + abs(alpha) * size / divisor.abs()))
        # Rounded deltas may add up to the other sign.
        one, other = (torch.where(everything >= 0, x, y) for x, y in (answers, answers[::-1]))
        return [one, torch.where(everything.abs() <= t.eps * size, other, one)], allowed

    return exact


def _deltas(
    t: WholeTensor,
    part: slice,
    weights: Sequence[float],
    kept: Sequence[torch.Tensor | None],
    scale: Sequence[float],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weighted deltas of the tuned models, and the sizes that their rounding errors grow with."""
    base, deltas, sizes = t.base[part].double(), [], []
    masks, factors = kept or [None] * len(weights), scale or [1.0] * len(weights)
    for tuned, mask, s, w in zip(t.tuned, masks, factors, weights, strict=True):
        wide = tuned[part].double()
        keep = 1.0 if mask is None else mask[part].double()
        deltas.append((wide - base) * keep * s * w)
        sizes.append((wide.abs() + base.abs()) * keep * abs(s * w) + t.tiny)
    return deltas, sizes
