"""Matrices in blocks of fewer bits, bit for bit those of the package gguf, and compared with what they were made from.

Made here, by kernels/cpu/gguf_blocks.cpp or in torch, several times as fast; the package reads them back.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch

from rwkv_lab.checkpoint.gguf_types import BY_NAME, TensorType
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.errors import KernelError, NumericsError
from rwkv_lab.wkv.loader import cpu_library
from rwkv_lab.wkv.pointers import Span, check, span

log = logging.getLogger(__name__)

# Largest difference between a value and what a block makes of it, in the block's steps: half a step from rounding (a
# whole one at the end of Q4_0's range that has no level), and the step itself is rounded to float16, times the levels.
STEPS = {"Q8_0": 0.5 + 127 * 2**-11, "Q4_0": 1 + 8 * 2**-11}
LEVELS = {"Q8_0": 127, "Q4_0": 8}
_SMALLEST = 2.0**-24  # of float16, in which the step is stored


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Whether rows of this length are whole blocks."""
    return len(shape) >= 2 and shape[-1] % BY_NAME[kind].elements == 0


def quantised(t: OutTensor, kind: str) -> OutTensor:
    """The tensor in blocks, made from the values of its source before any rounding."""
    blocks, source = t.compute, t.source
    if source is not None:
        blocks = lambda: source.blocks(BY_NAME[kind].elements)  # noqa: E731
    assert blocks is not None, f"{t.name} has neither a source nor a computation"
    compute = lambda: _blocks(t.name, blocks(), BY_NAME[kind])  # noqa: E731
    return OutTensor(t.name, t.shape, torch.uint8, compute=compute, quantised=kind)


def _blocks(name: str, values: Iterable[torch.Tensor], kind: TensorType) -> Iterator[torch.Tensor]:
    buffer = torch.empty(_PIECE)
    for run in values:
        for piece in run.flatten().split(_PIECE):
            rows = buffer[: len(piece)].copy_(piece).view(-1, kind.elements)
            steps, levels = _made(rows, kind.name)
            steps = steps.half()
            if not bool(steps.isfinite().all()):
                largest = float(rows.abs().max())
                raise NumericsError(
                    f"{name} has values that no block of {kind.name} can hold: {largest} is among them.\n"
                    "Repair the source, or choose another dtype."
                )
            data = torch.empty(len(rows), kind.nbytes, dtype=torch.uint8)
            data[:, :2] = steps.view(torch.uint8)
            data[:, 2:] = levels
            yield data.view(-1)


def _q8_0(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(step of each row [n, 1], its 32 levels from -127 to 127, two's complement)"""
    steps = rows.abs().amax(1, keepdim=True) / 127
    scaled = rows * torch.where(steps == 0, 0, 1 / steps)
    scaled += torch.copysign(_BELOW_HALF, scaled)  # to the nearest level, ties away from zero
    return steps, scaled.to(torch.int8).view(torch.uint8)


def _q4_0(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(step of each row [n, 1], its 32 levels from 0 to 15, which stand for -8 to 7, two to a byte)

    The value of the largest magnitude, the first of several, becomes level -8.
    """
    high, low = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    tied = (high == -low).view(-1)
    some = rows[tied]
    largest[tied] = some.gather(1, some.abs().argmax(1, keepdim=True))
    steps = largest / -8
    levels = (rows * torch.where(steps == 0, 0, 1 / steps)).add_(8.5).clamp_(max=15).to(torch.uint8)
    return steps, levels[:, :16] | levels[:, 16:] << 4


_IN_TORCH = {"Q8_0": _q8_0, "Q4_0": _q4_0}
_BITS = {"Q8_0": 8, "Q4_0": 4}


def _made(rows: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps, levels) of rows [n, 32] in float32, by the compiled function where there is one."""
    compiled, n = _compiled(), len(rows)
    if compiled is None:
        return _IN_TORCH[kind](rows)
    steps, levels = torch.empty(n, 1), torch.empty(n, 4 * _BITS[kind], dtype=torch.uint8)
    spans = span(rows, (n, 32), torch.float32), span(steps, (n, 1)), span(levels, levels.shape, torch.uint8)
    check(compiled(*spans, n, _BITS[kind]), "gguf_blocks")
    return steps, levels


@cache
def _compiled() -> Callable[..., int] | None:
    try:
        function = cpu_library("gguf_blocks").gguf_blocks
    except KernelError as e:
        log.info("quantising in torch, which is slower: %s", e)
        return None
    function.argtypes = (Span, Span, Span, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int64
    return function


_PIECE = 1 << 17  # values, which stay in the cache as float32
_BELOW_HALF = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))  # 0.5 itself would take what is just below a tie


def excess(values: torch.Tensor, made: torch.Tensor, blocks: torch.Tensor, kind: str) -> float:
    """By how much the largest difference exceeds what the blocks allow: 1 and less is right.

    Args:
        values: of the source, flat.
        made: what the blocks mean, flat float32.
        blocks: their bytes, flat uint8; a block begins with its step in float16.
    """
    steps = blocks.view(-1, BY_NAME[kind].nbytes)[:, :2].contiguous().view(torch.float16).float().abs()
    allowed = STEPS[kind] * steps + LEVELS[kind] * _SMALLEST
    found = (values.float() - made).abs().view(-1, BY_NAME[kind].elements)
    return float((found / allowed).max()) if found.numel() else 0.0
