"""One tensor of the output that does not simply come from the base: what every merge method yields."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rwkv_lab.checkpoint import TensorInfo


@dataclass(frozen=True)
class Change:
    name: str  # in the output
    action: str  # as in `PlanRow`
    source: str  # as in `PlanRow`
    shape: tuple[int, ...]
    dtype: torch.dtype  # unless the caller asks for another
    copy: TensorInfo | None = None  # the tensor whose bytes the output takes, or …
    compute: Callable[[], Iterator[torch.Tensor]] | None = None  # … its values, flat and in order, in the precision


def overwrite(name: str, base: TensorInfo | None, tuned: TensorInfo, alpha: float, precision: torch.dtype) -> Change:
    """`tuned` in the place of `base`: bit for bit at alpha 1, else base + alpha (tuned - base); no base counts as
    zeros.

    The output has the base's shape where there is one, so that `[C]` may stand for `[1, 1, C]`.
    """
    shape = base.shape if base else tuned.shape
    if alpha == 1:
        return Change(name, "overlay" if base else "add", "tuned", shape, tuned.dtype, copy=tuned)
    if base is None:
        return Change(
            name, "add", "tuned", shape, tuned.dtype, compute=lambda: (t.to(precision) * alpha for t in tuned.blocks())
        )

    def blend() -> Iterator[torch.Tensor]:
        # Blocks of both have equally many elements only if their dtypes are of one size; a tensor is cut by the wider
        # one.
        for b, t in _in_step(base, tuned):
            yield torch.lerp(b.to(precision), t.to(precision), alpha)

    return Change(name, "blend", "base + tuned", shape, base.dtype, compute=blend)


def _in_step(first: TensorInfo, second: TensorInfo) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of two tensors of equal size, with equally many elements each."""
    rest = torch.empty(0, dtype=second.dtype)
    others = second.blocks()
    for block in first.blocks():
        parts = [rest]
        while sum(len(p) for p in parts) < len(block):
            parts.append(next(others))
        joined = torch.cat(parts)
        yield block, joined[: len(block)]
        rest = joined[len(block) :]
