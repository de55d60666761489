"""Weights in blocks whose values are numbers of 16 levels, two to a byte, the first in its high half: NF4 and FP4."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rwkv_lab.checkpoint.rounding import NF4_BLOCK, NF4_LEVELS
from rwkv_lab.errors import NumericsError
from rwkv_lab.lazy_torch import torch

_AT_ONCE = 1 << 20  # values; what is needed besides input and output stays near 20 MB


def into_4_bits(
    weight: torch.Tensor, block_size: int, nearest: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [ceil(n/2)], absmax float32 [ceil(n/block_size)]) of a weight of n values, of any shape.

    Args:
        nearest: numbers of the levels that are nearest to shares of a block's largest magnitude.
    Raises:
        NumericsError: NaN or infinity in the weight.
    """
    pad = torch.nn.functional.pad
    flat = weight.detach().reshape(-1)
    codes, scales = [], []
    for piece in flat.split(_step(block_size)):
        values = pad(piece.float(), (0, -len(piece) % block_size)).view(-1, block_size)  # [blocks, block_size]
        absmax = values.abs().amax(dim=1)
        refuse_nonfinite(absmax)
        shares = values / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        numbers = nearest(shares).to(torch.uint8).view(-1, 2)
        codes.append((numbers[:, 0] << 4 | numbers[:, 1])[: (len(piece) + 1) // 2])
        scales.append(absmax)
    return torch.cat(codes), torch.cat(scales)


def from_4_bits(
    codes: torch.Tensor, absmax: torch.Tensor, n: int, dtype: torch.dtype, block_size: int, table: Sequence[float]
) -> torch.Tensor:
    """The n values of codes and absmax, flat: level times absmax in float32, rounded to `dtype` once."""
    levels = torch.tensor(table, dtype=torch.float32, device=codes.device)
    # The two levels of each byte, moved as one number of 64 bits.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)  # [256]
    out = torch.empty(n, dtype=dtype, device=codes.device)
    codes, absmax = codes.reshape(-1), absmax.reshape(-1, 1).float()
    step = _step(block_size)
    for start in range(0, n, step):
        end = min(start + step, n)
        values = pairs.index_select(0, codes[start // 2 : (end + 1) // 2].int()).view(torch.float32)
        values = torch.nn.functional.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
        values *= absmax[start // block_size : -(-end // block_size)]
        out[start:end] = values.view(-1)[: end - start]
    return out


def nf4(weight: torch.Tensor, block_size: int = NF4_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of a weight, as `into_4_bits` gives them, on the levels of NF4."""
    return into_4_bits(weight, block_size, _nearest_nf4)


def refuse_nonfinite(absmax: torch.Tensor) -> None:
    """Raises:
    NumericsError: a largest magnitude that is no number.
    """
    if not absmax.isfinite().all():
        raise NumericsError("The weight holds NaN or infinity, or values that float32 cannot hold; not quantised.")


def _nearest_nf4(shares: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=shares.device)
    return torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def _step(block_size: int) -> int:
    return max(_AT_ONCE // block_size, 1) * block_size
