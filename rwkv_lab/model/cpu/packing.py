"""Weights to 8 and 4 bits by compiled code; `rwkv_lab.checkpoint.grouped.rounded` is the definition."""

import torch

from rwkv_lab.checkpoint.grouped import code_shapes, rounded
from rwkv_lab.errors import KernelError
from rwkv_lab.model.cpu import abi
from rwkv_lab.wkv.choice import chosen_backend
from rwkv_lab.wkv.pointers import check, new, span


def packed_codes(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bfloat16 scales of a matrix `[rows,columns]`, as `rounded` gives them, on all threads.

    A group with NaN or infinity in it is NaN as a whole.
    """
    weight = weight.detach()
    if chosen_backend() not in ("auto", "cpu") or weight.dtype not in abi.DTYPES or not weight.is_contiguous():
        return rounded(weight, bits)
    try:
        library = abi.packing_library()
    except KernelError:
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
