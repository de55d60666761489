"""Weights to 8 and 4 bits by compiled code; `rwkv_lab.checkpoint.grouped.rounded` and `four_bits.nf4` define them."""

import ctypes

import torch

from rwkv_lab.checkpoint.four_bits import nf4, refuse_nonfinite
from rwkv_lab.checkpoint.grouped import code_shapes, rounded
from rwkv_lab.checkpoint.rounding import NF4_BLOCK
from rwkv_lab.errors import KernelError
from rwkv_lab.model.cpu import abi
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.pointers import check, new, span


def packed_codes(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bfloat16 scales of a matrix `[rows,columns]`, as `rounded` gives them, on all threads.

    A group with NaN or infinity in it is NaN as a whole.
    """
    weight = weight.detach()
    library = _library_for(weight)
    if library is None:
        return rounded(weight, bits)
    rows, columns = weight.shape
    shapes = code_shapes(rows, columns, bits)
    codes, scales = new(shapes[0], torch.int8 if bits == 8 else torch.int16), new(shapes[1], torch.bfloat16)
    code = library.pack(
        *(span(weight, weight.shape), abi.DTYPES[weight.dtype], rows, columns, bits),
        *(span(codes, shapes[0], codes.dtype), span(scales, shapes[1], scales.dtype), torch.get_num_threads()),
    )
    check(code, "pack")
    return codes, scales


def packed_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[rows,columns/2]` and absmax float32 of a matrix of even width, as `nf4` gives them.

    Raises:
        NumericsError: NaN or infinity in the weight.
    """
    weight = weight.detach()
    rows, columns = weight.shape
    library = _library_for(weight)
    if library is None:
        codes, absmax = nf4(weight)
        return codes.view(rows, -1), absmax
    codes, absmax = new((rows, columns // 2), torch.uint8), new((-(-weight.numel() // NF4_BLOCK),), torch.float32)
    code = library.pack_nf4(
        *(span(weight, weight.shape), abi.DTYPES[weight.dtype], weight.numel()),
        *(span(codes, codes.shape, codes.dtype), span(absmax, absmax.shape, absmax.dtype), torch.get_num_threads()),
    )
    check(code, "pack_nf4")
    refuse_nonfinite(absmax)
    return codes, absmax


def _library_for(weight: torch.Tensor) -> ctypes.CDLL | None:
    """What packs this weight; None where torch does."""
    if chosen_backend() not in ("auto", "cpu") or weight.dtype not in abi.DTYPES or not weight.is_contiguous():
        return None
    try:
        return abi.packing_library()
    except KernelError:
        return None
