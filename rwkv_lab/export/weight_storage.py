"""How each weight of an exported model is stored: by level, or as chosen for it alone; and how many bytes that takes.

Which matrices: those of time mix and channel mix (attention and feed-forward), and the head, which stays at 8 bits
where the others have 4. The embedding, low-rank pairs and vectors are where quantisation costs most, and small; they
are kept.
"""

import math
import re
from collections.abc import Mapping
from typing import Literal

from rwkv_lab.checkpoint.rounding import BLOCK, NF4_BLOCK
from rwkv_lab.export.onnx_folder import Weights

Level = Literal["none", "fp16", "int8", "int4", "nf4"]
PytorchFormat = Literal["pth", "safetensors", "gguf"]
Stored = Literal["fp32", "fp16", "int8", "int4", "nf4"]
Choice = Mapping[str, Weights]  # name of a matrix -> how it is stored, whatever the level says

_MATRIX = re.compile(
    r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|gate|output)\.weight$"
    r"|model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$"
)
_HEAD = re.compile(r"(lm_)?head\.weight$")
# Small, or of large effect: the first are vectors of heads, whatever their shape.
_VECTOR = re.compile(r"\.(r_k|k_k|k_a|time_(decay|first|faaaa|mix_\w|maa_[xwkvrg]))$")
_SMALL = 1024  # values; smaller tensors stay float32 in fp16, too


def is_matrix(name: str) -> bool:
    """Whether it is a matrix of time mix, channel mix, attention or feed-forward."""
    return _MATRIX.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Whether it is the matrix that makes logits."""
    return _HEAD.fullmatch(name) is not None


def stored_as(name: str, shape: tuple[int, ...], level: Level | Stored, choice: Choice | None = None) -> Stored:
    """How a tensor of the model is stored; "fp32" is what is kept."""
    if choice and name in choice:
        return choice[name]
    if level == "fp16":
        matrix = sum(size > 1 for size in shape) > 1 and math.prod(shape) >= _SMALL and not _VECTOR.search(name)
        return "fp16" if matrix else "fp32"
    if level not in ("int8", "int4", "nf4"):
        return "fp32"
    if is_head(name):
        return "int8"
    return level if is_matrix(name) else "fp32"


def fault_of(name: str, shape: tuple[int, ...], stored: Stored) -> str:
    """Why a matrix `[out,in]` cannot be stored so, and what to do; "" where it can."""
    block = {"int4": BLOCK, "nf4": 2}.get(stored, 1)
    if len(shape) != 2 and stored in ("int8", "int4", "nf4"):
        return f"{name} is no matrix, its shape is {list(shape)}: it cannot be stored in {stored}."
    if shape[-1:] and shape[-1] % block:
        return (
            f"{name} has {shape[-1]} inputs, which is no multiple of {block}, the block of {stored}.\n"
            "Export this model as int8."
        )
    return ""


def bytes_of(shape: tuple[int, ...], stored: Stored) -> int:
    """Bytes of a tensor, those of a matrix `[out,in]` with its scales and zero points."""
    n = math.prod(shape)
    if stored == "nf4":
        return n // 2 + 4 * -(-n // NF4_BLOCK)
    if stored == "int8":
        return n + 4 * shape[0]
    if stored == "int4":
        blocks = shape[1] // BLOCK
        return n // 2 + shape[0] * (4 * blocks + (blocks + 1) // 2)
    return n * (2 if stored == "fp16" else 4)
