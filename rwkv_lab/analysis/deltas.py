"""How far each tensor of a merged checkpoint lies from the base's: what the figures of a merge are drawn from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.errors import ParameterError
from rwkv_lab.progress import Progress

_CHUNK = BLOCK // 8  # elements; divides the blocks of every float dtype, so that most are not copied
BINS = 256  # of the histogram: the exponents of float32


@dataclass(frozen=True)
class Delta:
    """One tensor: Δ = merged - base, in float32. A tensor that the base does not have is compared with zeros."""

    name: str
    shape: tuple[int, ...]
    new: bool  # the base does not have it
    relative: float  # ‖Δ‖ / ‖base‖ in the Frobenius norm; NaN where the base's is 0
    rms: float  # root of the mean of Δ², in the unit of the weights
    largest: float  # max |Δ|
    histogram: np.ndarray  # int64 [256]: bin e counts 2^(e-127) <= |Δ| < 2^(e-126); bin 0 counts Δ = 0

    @property
    def numel(self) -> int:
        return int(self.histogram.sum())


@checked
def deltas(base: Checkpoint, merged: Checkpoint, names: Iterable[str]) -> list[Delta]:
    """Compare tensors of two open checkpoints, a block at a time: memory does not grow with their size.

    Args:
        names: which tensors of `merged`, in the order of the answer. Those that are known to be copies need no reading.

    Raises:
        ParameterError: a name that is none of `merged`'s.
    """
    names = list(names)
    if missing := next((name for name in names if name not in merged.info), None):
        raise ParameterError(f"{merged.path} has no tensor {missing!r}.")
    with Progress("comparing with the base", sum(merged.info[n].nbytes for n in names)) as progress:
        return [_delta(base.info.get(name), merged.info[name], progress) for name in names]


def _delta(base: TensorInfo | None, merged: TensorInfo, progress: Progress) -> Delta:
    histogram = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    moved = size = largest = 0.0
    old = _chunks(base) if base else None
    for after in _chunks(merged):
        before = next(old) if old else torch.zeros_like(after)
        size += float(torch.linalg.vector_norm(before, dtype=torch.float64)) ** 2
        change = (after - before).abs_()
        moved += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
        largest = max(largest, float(change.max()))
        # The sign is clear, so that the bits above the mantissa are the exponent.
        histogram += torch.bincount(change.view(torch.int32) >> 23, minlength=BINS)
        progress.advance(len(after) * merged.dtype.itemsize)
    return Delta(
        name=merged.name,
        shape=merged.shape,
        new=base is None,
        relative=(moved / size) ** 0.5 if size else float("nan"),
        rms=(moved / max(merged.numel, 1)) ** 0.5,
        largest=largest,
        histogram=histogram.numpy(),
    )


def _chunks(info: TensorInfo) -> Iterator[torch.Tensor]:
    """The values in order, `_CHUNK` at a time, whatever the blocks are: those of quantised tensors have other sizes."""
    left = torch.empty(0, dtype=info.dtype, device="cpu")
    for block in info.blocks():
        chunks = (torch.cat([left, block]) if len(left) else block).split(_CHUNK)
        whole = [chunk for chunk in chunks if len(chunk) == _CHUNK]
        for chunk in whole:
            yield chunk.float()
        left = chunks[-1] if len(whole) < len(chunks) else block[:0]
    if len(left):
        yield left.float()
