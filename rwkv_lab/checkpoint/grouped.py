"""Weights in 8 or 4 bits with a bfloat16 scale per group: what models compute with, and what they are saved as.

* 8 bits: int8 codes, -127 .. 127, `[rows, columns padded to 64]`; a scale for every 64 of them.
* 4 bits: int16 words `[rows, columns padded to 128, / 4]`: nibble j of word i of a line of 128 numbers is number
  32 j + i, and 8 stands for zero; a scale for every 32 numbers.

A number is exactly code times scale; a group with NaN or infinity in it is NaN. `kernels/cpu/weights.h` reads the same
layout, and `kernels/cpu/pack.cpp` makes it.
"""

from __future__ import annotations

from rwkv_lab.lazy_torch import torch

GROUPS = {8: 64, 4: 32}  # bits -> numbers per scale
PADDING = {8: 64, 4: 128}  # to which rows are padded

# The largest number of a group of 4 bits becomes this code, and the others what fits: the best of them is kept.
LARGEST = (-8.0, -7.4, -6.8)
_AT_ONCE = 1 << 20  # weights that are rounded at a time


def padded(columns: int, bits: int) -> int:
    """Numbers in a row of codes."""
    return -(-columns // PADDING[bits]) * PADDING[bits]


def code_shapes(rows: int, columns: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of codes and scales of a matrix `[rows,columns]`."""
    width = padded(columns, bits)
    return (rows, width if bits == 8 else width // 4), (rows, width // GROUPS[bits])


def rounded(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bfloat16 scales of a matrix `[rows,columns]` of any floating dtype, which is computed in float32."""
    rows, columns = weight.shape
    of_codes, of_scales = code_shapes(rows, columns, bits)
    codes = torch.empty(of_codes, dtype=torch.int8 if bits == 8 else torch.int16, device="cpu")
    scales = torch.empty(of_scales, dtype=torch.bfloat16, device="cpu")
    width = padded(columns, bits)
    step = max(_AT_ONCE // width, 1)
    for at in range(0, rows, step):
        part = torch.nn.functional.pad(weight.detach()[at : at + step].float(), (0, width - columns))
        numbers, scales[at : at + step] = _rounded(part.unflatten(1, (-1, GROUPS[bits])), bits)
        codes[at : at + step] = numbers.to(torch.int8) if bits == 8 else _into_nibbles(numbers)
    return codes, scales


def restored(
    codes: torch.Tensor, scales: torch.Tensor, columns: int, bits: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The numbers `[...,columns]` of codes and bfloat16 scales, code times scale in `dtype`; float32 unless given."""
    dtype = dtype or torch.float32
    numbers = codes if bits == 8 else _from_nibbles(codes)
    numbers = numbers.unflatten(-1, (-1, GROUPS[bits])).to(dtype) * scales.to(dtype).unsqueeze(-1)
    return numbers.flatten(-2)[..., :columns]


def _rounded(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """groups `[rows,n,group]` -> integers `[rows,n*group]` as floats, bfloat16 scales `[rows,n]`."""
    if bits == 8:
        scales = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
        return _codes(groups, scales, -127, 127).flatten(1), scales.squeeze(-1).bfloat16()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))

    def rounded_with(code: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared error, codes and scales where the largest number of a group becomes this code."""
        scales = (largest / code).bfloat16().float()
        codes = _codes(groups, scales, -8, 7)
        # Added up in float64: in which order hardly ever decides.
        return (codes * scales - groups).double().square_().sum(-1, keepdim=True), codes, scales

    best, best_codes, best_scales = rounded_with(LARGEST[0])
    for code in LARGEST[1:]:
        error, codes, scales = rounded_with(code)
        better = error < best
        best = torch.where(better, error, best)
        best_codes, best_scales = torch.where(better, codes, best_codes), torch.where(better, scales, best_scales)
    return best_codes.flatten(1), best_scales.squeeze(-1).bfloat16()


def _codes(groups: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = 1 / scales
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    return (groups * inverse).round_().clamp_(low, high).nan_to_num_()


def _into_nibbles(numbers: torch.Tensor) -> torch.Tensor:
    """Integers -8 .. 7 as floats `[rows,128 n]` -> int16 `[rows,32 n]`."""
    lines = (numbers.to(torch.int32) + 8).unflatten(1, (-1, 4, 32))
    words = torch.stack([lines[:, :, j] << (4 * j) for j in range(4)]).sum(0)
    return words.to(torch.int16).flatten(1)


def _from_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int16 `[...,32 n]` -> int16 `[...,128 n]`."""
    lines = words.unflatten(-1, (-1, 32))
    numbers = torch.stack([(lines >> (4 * j) & 15) - 8 for j in range(4)], -2)  # [...,n,4,32]
    return numbers.flatten(-3)
