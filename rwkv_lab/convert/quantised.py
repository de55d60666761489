"""Matrices in blocks of fewer bits, bit for bit those of the package gguf, and compared with what they were made from.

Made here, by kernels/cpu/gguf_blocks.cpp or in torch, several times as fast; the package reads them back.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterable, Iterator
from functools import cache

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checkpoint.formats.gguf_container import dequantised
from rwkv_lab.checkpoint.gguf_types import BY_NAME, TensorType
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.errors import KernelError, NumericsError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.wkv.loader import cpu_library
from rwkv_lab.wkv.pointers import DTYPES, Span, check, new, span

log = logging.getLogger(__name__)

# Largest difference between a value and what a block makes of it, in steps that the values of the block need: half a
# step from rounding (a whole one at the end of Q4_0's range that has no level), and the step itself is rounded to
# float16, times the levels.
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
    compute = lambda: quantised_values(t.name, blocks(), BY_NAME[kind])  # noqa: E731
    held = max(t.gathered, source.gathered if source else 0)
    return OutTensor(t.name, t.shape, torch.uint8, compute=compute, quantised=kind, gathered=held)


def quantised_values(name: str, values: Iterable[torch.Tensor], kind: TensorType) -> Iterator[torch.Tensor]:
    """Flat uint8: the blocks of values that come in flat runs of whole blocks."""
    make = _blocks_in_torch if _compiled() is None else _blocks_compiled
    for run in values:
        for piece in run.flatten().split(_PIECE):
            piece = piece if piece.dtype in DTYPES else piece.float()
            made = make(piece, kind)
            if made is None:
                largest = float(piece.abs().max())
                raise NumericsError(
                    f"{name} has values that no block of {kind.name} can hold: {largest} is among them.\n"
                    "Repair the source, or choose another dtype."
                )
            yield made.view(-1)


def _blocks_compiled(values: torch.Tensor, kind: TensorType) -> torch.Tensor | None:
    """As `_blocks_in_torch`."""
    functions = _compiled()
    assert functions is not None, "not compiled"
    n = len(values) // kind.elements
    made = new((n, kind.nbytes), torch.uint8)
    spans = span(values, values.shape), DTYPES[values.dtype], span(made, made.shape, torch.uint8)
    code = functions.gguf_blocks(*spans, n, _BITS[kind.name])
    if code == _NO_SUCH_STEP:
        return None
    check(code, "gguf_blocks")
    return made


def _blocks_in_torch(values: torch.Tensor, kind: TensorType) -> torch.Tensor | None:
    """Blocks `[n, bytes]` of flat values; None where a block has no step in float16."""
    steps, levels = _IN_TORCH[kind.name](values.float().view(-1, kind.elements))
    steps = steps.half()
    if not bool(steps.isfinite().all()):
        return None
    return torch.cat([steps.view(torch.uint8), levels], 1)


def _q8_0(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(step of each row [n, 1], its 32 levels from -127 to 127, two's complement)"""
    steps = rows.abs().amax(1, keepdim=True) / 127
    scaled = rows * torch.where(steps == 0, 0, 1 / steps)
    scaled += scaled.sign() * _BELOW_HALF  # to the nearest level, ties away from zero
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


@cache
def _compiled() -> ctypes.CDLL | None:
    try:
        library = cpu_library("gguf_blocks")
    except KernelError as e:
        log.info("quantising in torch, which is slower: %s", e)
        return None
    of_both = Span, ctypes.c_int64, Span, ctypes.c_int64, ctypes.c_int64
    library.gguf_blocks.argtypes, library.gguf_blocks.restype = of_both, ctypes.c_int64
    library.gguf_excess.argtypes = (*of_both, ctypes.c_float, ctypes.c_float, Span)
    library.gguf_excess.restype = ctypes.c_int64
    return library


_NO_SUCH_STEP = 2  # what the compiled function returns then
_PIECE = 1 << 17  # values, which stay in the cache as float32
_BELOW_HALF = 0.5 - 2.0**-25  # float32; 0.5 itself would take what is just below a tie


def excess(source: TensorInfo, written: TensorInfo) -> float:
    """By how much the largest difference between a tensor and its blocks exceeds what blocks of its values allow: 1 and
    less is right.

    Args:
        source: with the values.
        written: in a file, in blocks of a type of `STEPS`.
    """
    assert written.derived is not None, f"{written.name} is not quantised"
    kind = BY_NAME[written.derived.quantised]
    most = 0.0
    pieces = source.pieces(_PIECE), written.derived.of.pieces(_PIECE // kind.elements * kind.nbytes)
    for values, blocks in zip(*pieces, strict=True):
        found = _excess(values if values.dtype in DTYPES else values.float(), blocks, kind)
        most = max(most, float("inf") if math.isnan(found) else found)
    return most


def _excess(values: torch.Tensor, blocks: torch.Tensor, kind: TensorType) -> float:
    """The same of flat values and the bytes of their blocks."""
    functions, n = _compiled(), len(values) // kind.elements
    limits = STEPS[kind.name], LEVELS[kind.name] * _SMALLEST
    if functions is not None:
        most = new((1,), torch.float32)
        spans = span(values, values.shape), DTYPES[values.dtype], span(blocks, blocks.shape, torch.uint8)
        check(functions.gguf_excess(*spans, n, _BITS[kind.name], *limits, span(most, (1,))), "gguf_excess")
        return float(most)
    rows = values.float().view(-1, kind.elements)
    steps = rows.abs().amax(1, keepdim=True) / LEVELS[kind.name]
    found = (rows - dequantised(blocks, kind).view(rows.shape)).abs()
    return float((found / (limits[0] * steps + limits[1])).max()) if n else 0.0
