"""NF4 weights as bitsandbytes keeps them, and back. int8 needs nothing: `int8_vectorwise_quant` gives codes and absmax
as `quantize_int8` does."""

from collections.abc import Sequence
from typing import Any

import torch

from rwkv_lab.errors import LayoutError, ParameterError


def nf4_from_bitsandbytes(data: torch.Tensor, quant_state: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(codes uint8 [n/2], absmax float32, block size) from what `bitsandbytes.functional.quantize_nf4` returns, which
    `Params4bit` holds as `data` and `quant_state`; scales that are quantised themselves are unpacked.

    Raises:
        LayoutError: another 4-bit format.
    """
    if quant_state.quant_type != "nf4":
        raise LayoutError(f"This weight of bitsandbytes is {quant_state.quant_type}; nf4 is read.")
    absmax = quant_state.absmax
    if quant_state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    return data.contiguous().view(torch.uint8).flatten(), absmax.float(), quant_state.blocksize


def nf4_to_bitsandbytes(
    codes: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, block_size: int = 64
) -> tuple[torch.Tensor, Any]:
    """(data uint8 [n/2, 1], QuantState) as bitsandbytes wants them, from `quantize_nf4`'s codes and absmax.

    Raises:
        ParameterError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import QuantState, get_4bit_type
    except ImportError as e:
        raise ParameterError("This needs bitsandbytes: pip install bitsandbytes") from e
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=block_size,
        code=get_4bit_type("nf4", device=codes.device),
        quant_type="nf4",
    )
    return codes.view(-1, 1), state
