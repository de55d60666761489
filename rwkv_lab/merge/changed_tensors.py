"""Tensors of the output that do not simply come from the base: what every merge method yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.effect_sums import Sums

# Values in the precision of the merge, and the base's at their place in any dtype; None where it has none. Or values as
# they are written, and what was measured of them.
Computed = tuple["torch.Tensor", "torch.Tensor | Sums | None"]


@dataclass(frozen=True)
class ChangedTensor:
    name: str  # in the output
    action: str  # as in `PlanRow`
    source: str  # as in `PlanRow`
    shape: tuple[int, ...]
    dtype: torch.dtype  # unless the caller asks for another
    copy: TensorInfo | None = None  # the tensor whose bytes the output takes, or …
    compute: Callable[[], Iterator[Computed]] | None = None  # … its values, flat and in order; and where there is a
    compute_rounded: Callable[[], Iterator[Computed]] | None = None  # faster way to have them in `dtype`, that one


def from_tuned(
    name: str, base: TensorInfo | None, tuned: TensorInfo, alpha: float, precision: torch.dtype
) -> ChangedTensor:
    """`tuned` in the place of `base`: bit for bit at alpha 1, else base + alpha (tuned - base); no base counts as
    zeros.

    The output has the base's shape where there is one, so that `[C]` may stand for `[1, 1, C]`.
    """
    shape = base.shape if base else tuned.shape
    if alpha == 1:
        return ChangedTensor(name, "overlay" if base else "add", "tuned", shape, tuned.dtype, copy=tuned)
    if base is None:
        return ChangedTensor(
            name,
            "add",
            "tuned",
            shape,
            tuned.dtype,
            compute=lambda: ((t.to(precision) * alpha, None) for t in tuned.blocks()),
        )

    def blend() -> Iterator[Computed]:
        # Blocks of both have equally many elements only if their dtypes are of one size; a tensor is cut by the wider
        # one.
        for b, t in in_step([base, tuned]):
            before = b.to(precision)
            yield torch.lerp(before, t.to(precision), alpha), before

    return ChangedTensor(name, "blend", "base + tuned", shape, base.dtype, compute=blend)


def keeping_zeros(compute: Callable[[], Iterator[Computed]]) -> Callable[[], Iterator[Computed]]:
    """`compute`, with the base's own 0 where it has one and 0 was computed: -0 + 0 is 0, and the base would change
    though nothing is added to it. Compiled code sees to that itself."""

    def values() -> Iterator[Computed]:
        for after, before in compute():
            yield (_with_zeros_of(before, after) if isinstance(before, torch.Tensor) else after), before

    return values


def _with_zeros_of(before: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    bits = before.view(getattr(torch, f"int{8 * before.itemsize}"))
    if not len(bits) or bits.numpy().min() != torch.iinfo(bits.dtype).min:  # the bits of -0, which few models have
        return values
    return torch.where((values == 0) & (before == 0), before.to(values.dtype), values)


def in_step(tensors: Sequence[TensorInfo]) -> Iterator[list[torch.Tensor]]:
    """Blocks of tensors of equal size, with equally many elements each."""
    first, *others = tensors
    # What comes, what is left over.
    flows = [(t.blocks(), [torch.empty(0, dtype=t.dtype, device="cpu")]) for t in others]
    for block in first.blocks():
        pieces = [block]
        for flow, rest in flows:
            while sum(len(p) for p in rest) < len(block):
                rest.append(next(flow))
            parts = [p for p in rest if len(p)]
            joined = parts[0] if len(parts) == 1 else torch.cat([rest[0][:0], *parts])  # cat copies
            pieces.append(joined[: len(block)])
            rest[:] = [joined[len(block) :]]
        yield pieces
