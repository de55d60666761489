"""Models of Hugging Face with matrices in NF4, as transformers loads them by bitsandbytes, which is not needed here."""

import json
from collections.abc import Iterable
from typing import Any

import torch

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checkpoint.stream import OutTensor, computed_together
from rwkv_lab.errors import NumericsError
from rwkv_lab.peft.quantised import BLOCK_SIZE, NF4_LEVELS, quantize_nf4

STATE = "quant_state.bitsandbytes__nf4"  # the end of the name of what describes a matrix


def nf4_parts(info: TensorInfo) -> list[OutTensor]:
    """The tensors that bitsandbytes keeps of a matrix: codes, a scale for 64 values, the levels, and what describes
    them."""

    def rounded() -> tuple[torch.Tensor, torch.Tensor]:
        weight = info.read()
        if not weight.isfinite().all():
            raise NumericsError(f"{info.name} holds NaN or infinity; not quantised.")
        return quantize_nf4(weight)

    dtype = str(info.dtype).removeprefix("torch.")
    about = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": dtype, "shape": list(info.shape)}
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    taken = 4 * info.numel * 3  # bytes that rounding takes
    codes = OutTensor(info.name, (info.numel // 2, 1), torch.uint8)
    scales = OutTensor(f"{info.name}.absmax", (-(-info.numel // BLOCK_SIZE),), torch.float32)
    return [
        *computed_together([codes, scales], rounded, taken),
        OutTensor(f"{info.name}.quant_map", (len(levels),), torch.float32, compute=lambda: [levels]),
        OutTensor(f"{info.name}.{STATE}", (len(text),), torch.uint8, compute=lambda: [text]),
    ]


def nf4_config(kept: Iterable[str], dtype: str) -> dict[str, Any]:
    """What config.json states as quantization_config.

    Args:
        kept: layers that stay as they are.
        dtype: that products are computed in.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept),
    }
