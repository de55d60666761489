"""Whether a folder holds weights that transformers' classes have halved.

In evaluation they divide att.output and ffn.value of layer i by 2^(i // rescale_every), in place, and save them so
afterwards; nothing in the folder tells. The step down by two can be seen: it is at every layer where it should be, in
both matrices, and nowhere else. A few kilobytes of each are read.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rwkv_lab.checkpoint.source import TensorInfo
from rwkv_lab.lazy_torch import torch

_MATRICES = ("att.output.weight", "ffn.value.weight")
_CHUNKS, _CHUNK = 8, 512  # values read: their mean square is known to about 2 per cent
_STEP, _WIDTH = -1.0, 0.4  # of log2 of the size from one layer to the next, and how far off it may be seen


def looks_rescaled(tensors: Mapping[str, TensorInfo], every: int) -> bool:
    """Whether the weights are smaller by two from every `every`-th layer on.

    Args:
        tensors: of a model, under BlinkDL's names.
    """
    return all(_steps_down(tensors, matrix, every) for matrix in _MATRICES)


def _steps_down(tensors: Mapping[str, TensorInfo], matrix: str, every: int) -> bool:
    sizes = []
    while (info := tensors.get(f"blocks.{len(sizes)}.{matrix}")) is not None:
        if not info.plain or info.numel < _CHUNK or not info.dtype.is_floating_point:
            return False
        sizes.append(_log_size(info))
    steps = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]  # steps[i]: from layer i to i + 1
    at, between = steps[every - 1 :: every], [d for i, d in enumerate(steps) if (i + 1) % every]
    if not at or not all(map(torch.isfinite, map(torch.tensor, steps))):
        return False
    usual = statistics.fmean(between) if between else 0.0
    expected = all(abs(d - usual - _STEP) < _WIDTH for d in at)
    return expected and all(abs(d - usual) < abs(_STEP) - _WIDTH for d in between)


def _log_size(info: TensorInfo) -> float:
    """log2 of the root mean square of some of its values; -inf where all are zero."""
    squares, itemsize = 0.0, info.itemsize
    for k in range(_CHUNKS):
        first = k * (info.numel - _CHUNK) // max(_CHUNKS - 1, 1)
        data = info.file.read(info.offset + first * itemsize, _CHUNK * itemsize)
        squares += float(torch.frombuffer(bytearray(data), dtype=info.dtype).double().square().sum())
    return float(torch.tensor(squares / (_CHUNKS * _CHUNK), dtype=torch.float64, device="cpu").log2() / 2)
