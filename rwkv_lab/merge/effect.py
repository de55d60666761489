"""What a merge did, measured while its output is written: which tensors changed, and how much of the change arrived.

The change that was asked for is Δ = what was computed, before it is rounded to the output's dtype, minus the base. What
arrived is the output minus the base as the output's dtype holds it. Of what arrived, the part along Δ counts: rounding
moves values up and down, and what it adds across Δ is what was not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checks import Check
from rwkv_lab.dtypes import short_name
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.changed_tensors import Computed
from rwkv_lab.merge.compiled import worth_compiling
from rwkv_lab.merge.effect_sums import NONE, Sums, count, same_bytes, sums_of

ENOUGH = 0.9  # of the change: where less arrives, a note says so
_NORMAL = 2.0**-14  # the smallest number of float16 that has all its digits
# Units of the arithmetic's precision, of the base's mean magnitude: of normal values, 4 of the root mean square.
_ROUNDING = 5
_HALF = 0.5  # of the change: less is no effect as it was asked for


@dataclass(frozen=True)
class TensorEffect:
    """One tensor that a merge was to change. A tensor that the base does not have is compared with zeros."""

    name: str
    dtype: torch.dtype  # in the output
    values: int
    moved: int | None  # of the values, how many are not the base's; None of a copy, where the first one decides
    wanted: float | None  # ‖Δ‖ that was asked for; None of a copy, all of which arrives
    reached: float | None  # ⟨output - base, Δ⟩ / ‖Δ‖, what of it arrived
    changed: bool  # whether any value differs from the base's by more than the arithmetic's own rounding

    @property
    def share(self) -> float:
        """How much of the change arrived, 0 to 1; 1 where none was asked for."""
        if not self.wanted or self.reached is None:
            return 1.0
        return min(max(self.reached / self.wanted, 0.0), 1.0)


@dataclass(frozen=True)
class Small:
    """Values of one tensor below the normal range of float16, some of whose digits it does not hold."""

    name: str
    rounded: int  # how many are not what they were
    zero: int  # of those, how many became 0


@dataclass(frozen=True)
class MergeEffect:
    """Of all tensors that a merge was to change, in the order of the output."""

    tensors: tuple[TensorEffect, ...] = ()
    small: tuple[Small, ...] = ()  # of all tensors of the output

    @property
    def unchanged(self) -> tuple[TensorEffect, ...]:
        return tuple(t for t in self.tensors if not t.changed)

    @property
    def wanted(self) -> float:
        """‖Δ‖ over all tensors whose values were computed, and copies that were measured (`with_copies`)."""
        return math.sqrt(math.fsum((t.wanted or 0.0) ** 2 for t in self.tensors))

    @property
    def reached(self) -> float:
        """What of it arrived, as of `TensorEffect`."""
        total = self.wanted
        return math.fsum((t.wanted or 0.0) * (t.reached or 0.0) for t in self.tensors) / total if total else 0.0

    @property
    def share(self) -> float:
        """How much of the change arrived, 0 to 1; 1 where none was asked for."""
        return min(max(self.reached / self.wanted, 0.0), 1.0) if self.wanted else 1.0

    def with_copies(self, norms: Mapping[str, float]) -> MergeEffect:
        """The same, with ‖output - base‖ of tensors that were copied, which writing does not look at: all of it was
        asked for, and arrived.

        Args:
            norms: by name; those of other tensors are not used.
        """
        tensors = [
            replace(t, wanted=norms[t.name], reached=norms[t.name]) if t.wanted is None and t.name in norms else t
            for t in self.tensors
        ]
        return replace(self, tensors=tuple(tensors))

    @property
    def worst_dtype(self) -> str:
        """The dtype, in short, in which most of the change is lost."""
        lost: dict[torch.dtype, float] = {}
        for t in self.tensors:
            lost[t.dtype] = lost.get(t.dtype, 0.0) + (1 - t.share) * (t.wanted or 0.0) ** 2
        worst = max(lost, key=lambda dtype: lost[dtype]) if lost else torch.float32
        return short_name(worst)

    def notes(self) -> tuple[str, ...]:
        """Sentences for the result and the report."""
        notes, still, count = [], self.unchanged, len(self.tensors)
        lost = [t for t in still if t.wanted]
        if still:
            rounded = ", up to rounding" * any(t.moved for t in still)
            only = f" The output is the base{rounded}." if len(still) == count else ""
            why = f"; of {len(lost)} the change is below {short_name(lost[0].dtype)}'s resolution" if lost else ""
            computed = any(t.wanted is not None for t in still)
            why = why or f"; nothing is added to them{', or less than the arithmetic holds' * computed}"
            notes.append(f"{len(still)} of {count} targets are unchanged (first {still[0].name}){why}.{only}")
        if self.share < ENOUGH:
            name = self.worst_dtype
            wider = "precision='float64' and a wider dtype keep" if name in ("fp32", "fp64") else "dtype='fp32' keeps"
            notes.append(
                f"{in_percent(1 - self.share)} of the change is below {name}'s resolution (norm {self.reached:.3g} of "
                f"{self.wanted:.3g} arrived); {wider} it."
            )
        if self.small:
            rounded, zero = (sum(getattr(t, what) for t in self.small) for what in ("rounded", "zero"))
            notes.append(
                f"{rounded:,} values in {len(self.small)} tensors (first {self.small[0].name}) are smaller than fp16's "
                f"normal range, {_NORMAL:.3g}, and lost digits; {zero:,} of them became 0. dtype='bf16' keeps them."
            )
        return tuple(notes)

    def record(self) -> dict[str, int]:
        """Counts, for what is written beside an output; norms may differ in the last digit between processors."""
        return {"targets": len(self.tensors), "changed": len(self.tensors) - len(self.unchanged)}

    def checks(self) -> tuple[Check, ...]:
        """Whether the merge had an effect; none where nothing was to change."""
        if not self.tensors:
            return ()
        changed = len(self.tensors) - len(self.unchanged)
        name = f"the merge has an effect: targets that changed, of {len(self.tensors)}"
        checks = [Check(name, changed, "at least 1", changed > 0)]
        if self.wanted:
            share, name = self.share, "share of the asked-for change that reached the output's dtype"
            checks.append(Check(name, round(share, 4), f"at least {_HALF:g}", share >= _HALF))
        return tuple(checks)


def in_percent(share: float) -> str:
    """In whole per cent; never 100 % where something is left, nor 0 % where something is lost."""
    whole = round(100 * share)
    return f"{share:.2%}".replace("%", " %") if whole in (0, 100) and 0 < share < 1 else f"{whole} %"


class Meter:
    """Measures one tensor while it is written.

    Args:
        base: the base's tensor of that name; None where it has none.
        copied: the output takes the bytes of another file: only whether they are the base's is found out then.
        target: whether the merge was to change it; of others only small values are counted.
    """

    def __init__(
        self, name: str, values: int, dtype: torch.dtype, base: TensorInfo | None, copied: bool, target: bool = True
    ):
        self.name, self.values, self.dtype, self.base, self.target = name, values, dtype, base, target
        self.stops_early = copied and base is not None
        self.same_dtype = base is not None and base.dtype == dtype
        self.reset()

    def reset(self) -> None:
        """Begin anew: a plan may be carried out more than once."""
        self.sums, self.eps = NONE, 0.0
        self.rounded = self.zero = 0
        self._let_go()

    def _let_go(self) -> None:
        """Hold no values of the base: there is a meter for every tensor of a model."""
        self._before: torch.Tensor | Sums | None = None
        self._first = 0  # place of its first value in the tensor
        self._blocks: Iterator[torch.Tensor] | None = None  # of a base that is not stored as it is read
        dtype = self.base.dtype if self.base else self.dtype
        self._left = torch.empty(0, dtype=dtype, device="cpu")  # of them, not looked at yet

    def watched(self, compute: Callable[[], Iterator[Computed]]) -> Callable[[], Iterator[torch.Tensor]]:
        """`compute` as the writer takes it: values alone.

        The writer shows each piece to `see` before it asks for the next.
        """

        def values() -> Iterator[torch.Tensor]:
            self.reset()
            start = 0
            for after, before in compute():
                self._before, self._first = before, start
                start += len(after)
                yield after

        return values

    def see(self, start: int, values: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in values of the output.

        Args:
            start: place of the first in the tensor.
            values: flat, as they were computed.
            rounded: flat, as they are written.
        """
        if start == 0 and self._before is None:
            self.reset()
        if self.dtype == torch.float16 and values.dtype != torch.float16:
            lost = (rounded.abs() < _NORMAL) & (rounded.to(values.dtype) != values)
            self.rounded += count(lost)
            self.zero += count(lost & (rounded == 0))
        if self.target and not (self.stops_early and self.sums.moved):
            self._measure(start, values, rounded)
        if start + len(values) == self.values:
            self._let_go()

    def _measure(self, start: int, values: torch.Tensor, rounded: torch.Tensor) -> None:
        if isinstance(self._before, Sums):  # of the whole block, of which this is a piece
            found = self._before if start == self._first else NONE
        else:
            before = self._base_at(start, len(values))
            if self.stops_early and before is not None and same_bytes(before, rounded):
                return
            found = sums_of(before, values, rounded, self.same_dtype, worth_compiling(self.values))
        self.sums = self.sums.plus(found)
        self.eps = torch.finfo(torch.float64 if values.dtype == torch.float64 else torch.float32).eps

    def result(self) -> TensorEffect:
        """What was found."""
        sums = self.sums
        if self.stops_early:
            return TensorEffect(self.name, self.dtype, self.values, None, None, None, sums.moved > 0)
        # As large as what adding and taking away the same leaves, of the values that moved or of all: nothing is meant.
        # The mean magnitude stands for the base's values, since of squares a single one could be nearly all.
        of = sums.moved or self.values
        noise = _ROUNDING * self.eps * sums.size / max(self.values, 1)
        wanted = math.sqrt(sums.wanted)
        if wanted == 0 or math.isfinite(noise) and wanted <= noise * math.sqrt(max(of, 1)):
            return TensorEffect(self.name, self.dtype, self.values, sums.moved, 0.0, 0.0, False)
        return TensorEffect(self.name, self.dtype, self.values, sums.moved, wanted, sums.along / wanted, sums.moved > 0)

    def _base_at(self, start: int, count: int) -> torch.Tensor | None:
        if isinstance(self._before, torch.Tensor):
            inside = start - self._first
            return self._before[inside : inside + count]
        if self.base is None:
            return None
        if not self.base.plain:
            return self._next_of_base(count)
        size = self.base.dtype.itemsize
        data = bytearray(count * size)
        self.base.file.read_into(memoryview(data), self.base.offset + start * size)
        return torch.frombuffer(data, dtype=self.base.dtype)

    def _next_of_base(self, count: int) -> torch.Tensor:
        """The writer goes through a tensor once, in order, and so does this."""
        self._blocks = self.base.blocks() if self._blocks is None and self.base else self._blocks
        while self._blocks is not None and len(self._left) < count:
            self._left = torch.cat([self._left, next(self._blocks)])
        found, self._left = self._left[:count], self._left[count:]
        return found


def effect_of(meters: Sequence[Meter]) -> MergeEffect:
    """What they found."""
    small = tuple(Small(meter.name, meter.rounded, meter.zero) for meter in meters if meter.rounded)
    return MergeEffect(tuple(meter.result() for meter in meters if meter.target), small)
