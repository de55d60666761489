"""Weights in fewer bits: NF4 and FP4 in blocks of 64, and two kinds of int8.

NF4 ("4-bit NormalFloat", arXiv 2305.14314): the weight is flattened row-major and cut into blocks; each value, divided
by the largest magnitude of its block, becomes the number of the nearest of 16 levels. Two numbers share a byte, the
first in its high half. FP4 is the same with 15 other levels. int8: each row divided by its largest magnitude, times
127, rounded. bitsandbytes stores them like this. "bnb-int8" is its `functional.quantize`, and RWKV-PEFT's int8: the
whole matrix divided by its largest magnitude, each value the nearest of 256 that lie denser near 0 (arXiv 1511.04561).
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from rwkv_lab.arguments import Size, checked, shown_value
from rwkv_lab.checkpoint.four_bits import from_4_bits, into_4_bits, nf4, refuse_nonfinite
from rwkv_lab.checkpoint.rounding import NF4_BLOCK, NF4_LEVELS
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import ParameterError
from rwkv_lab.peft.settings import check_quant

# By code: the sign, then which of eight magnitudes.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_LEVELS = (*_FP4_MAGNITUDES, *(-m for m in _FP4_MAGNITUDES))
BLOCK_SIZE = NF4_BLOCK


@checked
def quantize_nf4(weight: torch.Tensor, block_size: int = BLOCK_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [ceil(n/2)], absmax float32 [ceil(n/block_size)]) of a weight of n values, of any shape.

    Raises:
        NumericsError: NaN or infinity in the weight.
        ParameterError: a block size that is no positive even number.
    """
    _check_block_size(block_size)
    _check_weight(weight)
    return nf4(weight, block_size)


@checked
def quantize_fp4(weight: torch.Tensor, block_size: int = BLOCK_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_nf4`, to the levels of FP4.

    Raises:
        NumericsError, ParameterError: as there.
    """
    _check_block_size(block_size)
    _check_weight(weight)
    return into_4_bits(weight, block_size, _nearest_fp4)


def _nearest_fp4(shares: torch.Tensor) -> torch.Tensor:
    positive = torch.tensor(FP4_LEVELS[:8], dtype=torch.float32, device=shares.device)
    levels, codes = positive.sort()
    numbers = torch.bucketize(shares.abs(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    found = codes.int().index_select(0, numbers.flatten()).view_as(numbers)
    return found + 8 * ((shares < 0) & (found > 0))  # the eighth bit of a level is its sign


@checked
def dequantize_nf4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[Size],
    dtype: torch.dtype | str = torch.float32,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """The weight `[shape]` that `quantize_nf4` left: level times absmax in float32, rounded to `dtype` once.

    Raises:
        ParameterError: codes or absmax of another number of values than the shape has.
    """
    return _from_4bit(codes, absmax, shape, dtype, block_size, NF4_LEVELS)


@checked
def dequantize_fp4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[Size],
    dtype: torch.dtype | str = torch.float32,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """As `dequantize_nf4`, of what `quantize_fp4` left.

    Raises:
        ParameterError: as there.
    """
    return _from_4bit(codes, absmax, shape, dtype, block_size, FP4_LEVELS)


def _from_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | str,
    block_size: int,
    table: tuple[float, ...],
) -> torch.Tensor:
    _check_block_size(block_size)
    n, dtype = math.prod(shape), to_dtype(dtype)
    if codes.dtype != torch.uint8 or not absmax.is_floating_point():
        raise ParameterError(
            f"codes are {shown_value(codes)}, absmax {shown_value(absmax)}; uint8 and float32 belong here"
        )
    if codes.numel() != (n + 1) // 2 or absmax.numel() != -(-n // block_size):
        raise ParameterError(
            f"{codes.numel()} bytes and {absmax.numel()} scales do not make {list(shape)}: "
            f"{(n + 1) // 2} and {-(-n // block_size)} would, in blocks of {block_size}."
        )
    return from_4_bits(codes, absmax, n, dtype, block_size, table).view(*shape)


def _check_weight(weight: torch.Tensor, ndim: int | None = None) -> None:
    if not weight.is_floating_point() or weight.numel() == 0 or ndim not in (None, weight.ndim):
        shape = "" if ndim is None else " [out,in]"
        raise ParameterError(f"weight={shown_value(weight)}: it must be a floating-point tensor{shape} with values.")


@checked
def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [out, in], absmax float32 [out]) of a weight [out, in].

    Raises:
        NumericsError: NaN or infinity in the weight.
    """
    _check_weight(weight, 2)
    values = weight.detach().float()
    absmax = values.abs().amax(dim=1)
    refuse_nonfinite(absmax)
    steps = 127 / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return (values * steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), absmax


@checked
def dequantize_int8(
    codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype | str = torch.float32
) -> torch.Tensor:
    """The weight [out, in] that `quantize_int8` left.

    Raises:
        ParameterError: codes and absmax that do not belong together.
    """
    if codes.dtype != torch.int8 or codes.ndim != 2 or absmax.shape != codes.shape[:1]:
        raise ParameterError(
            f"codes are {shown_value(codes)}, absmax {shown_value(absmax)}; they must be int8 [out,in] and [out]."
        )
    return (codes.float() * (absmax.float() / 127)[:, None]).to(to_dtype(dtype))


@cache
def _dynamic_levels() -> torch.Tensor:
    """The 256 values of "bnb-int8", in order: of each power of ten from 1e-6 to 1 the middles of 1, 2, 4, … 64 equal
    steps, both signs, and 0 and 1."""
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


@checked
def quantize_bnb_int8(weight: torch.Tensor, absmax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 of the weight's shape, absmax float32 []) as bitsandbytes' `functional.quantize`.

    Args:
        absmax: the largest magnitude of the matrix, where only some of its rows are given.
    Raises:
        NumericsError: NaN or infinity in the weight.
    """
    _check_weight(weight)
    if absmax is not None and (absmax.numel() != 1 or not absmax.is_floating_point()):
        raise ParameterError(f"absmax={shown_value(absmax)}: it must be one floating-point number.")
    values = weight.detach().float()
    absmax = (values.abs().amax() if absmax is None else absmax).float()
    refuse_nonfinite(absmax)
    levels = _dynamic_levels().to(values.device)
    shares = values / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8), absmax


@checked
def dequantize_bnb_int8(
    codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype | str = torch.float32
) -> torch.Tensor:
    """The weight that `quantize_bnb_int8` left.

    Raises:
        ParameterError: codes and absmax that do not belong together.
    """
    if codes.dtype != torch.uint8 or absmax.numel() != 1:
        raise ParameterError(
            f"codes are {shown_value(codes)}, absmax {shown_value(absmax)}; they must be uint8 and one."
        )
    levels = _dynamic_levels().to(codes.device)
    return (levels.index_select(0, codes.flatten().int()).view(codes.shape) * absmax.float()).to(to_dtype(dtype))


@checked
def quantised_and_back(weight: torch.Tensor, quant: str, absmax: torch.Tensor | None = None) -> torch.Tensor:
    """What remains of a weight [out, in] when it is stored as `quant`: the same shape and dtype.

    Rows may be given apart for "int8", for "nf4" and "fp4" where they begin a block, and for "bnb-int8" with `absmax`,
    the largest magnitude of the whole matrix.

    Raises:
        ParameterError: no such storage.
        NumericsError: NaN or infinity in the weight.
    """
    check_quant(quant)
    return weight if quant == "none" else PackedWeight(weight, quant, absmax).dense()


def _check_block_size(block_size: int) -> None:
    if not 2 <= block_size <= 2**31 or block_size % 2:
        raise ParameterError(f"block_size={block_size}: two values share a byte, so it must be even, from 2 to 2^31.")


class PackedWeight(nn.Module):
    """A weight stored in fewer bits: buffers `codes` and `absmax`. Its scales stay float32 whatever the model becomes.

    Args:
        quant: of `QUANTS` in `rwkv_lab.peft.settings`, but for "none".
        absmax: of "bnb-int8", where only some rows are given: the largest magnitude of all.
    """

    def __init__(self, weight: torch.Tensor, quant: str, absmax: torch.Tensor | None = None):
        super().__init__()
        if quant == "bnb-int8":
            codes, absmax = quantize_bnb_int8(weight, absmax)
        else:
            codes, absmax = {"nf4": quantize_nf4, "fp4": quantize_fp4, "int8": quantize_int8}[quant](weight)
        self.quant, self.shape, self.dtype = quant, tuple(weight.shape), weight.dtype
        self.codes: torch.Tensor
        self.absmax: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, in the dtype of the model or another one."""
        if self.quant in ("nf4", "fp4"):
            back = dequantize_nf4 if self.quant == "nf4" else dequantize_fp4
            return back(self.codes, self.absmax, self.shape, dtype or self.dtype)
        if self.quant == "bnb-int8":
            return dequantize_bnb_int8(self.codes, self.absmax, dtype or self.dtype)
        return dequantize_int8(self.codes, self.absmax, dtype or self.dtype)

    def _apply(self, fn, recurse=True):
        # `model.to(dtype)` goes through here: the dtype to give out changes, the scales only move.
        absmax = self.absmax
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=absmax.device)).dtype
        super()._apply(fn, recurse)
        self.absmax = absmax.to(self.absmax.device)
        return self
