"""What the two generations of RWKV that llama.cpp reads have in common in GGUF."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.foreign_format import Facts
from rwkv_lab.errors import CorruptFileError
from rwkv_lab.lazy_torch import torch

READ_BY = "llama.cpp and its relatives"
USE = """
from llama_cpp import Llama  # of PyPI llama-cpp-python; with llama.cpp itself: llama-cli -m {path}
model = Llama("{path}", n_ctx=4096)
print(model("The capital of France is", max_tokens=32)["choices"][0]["text"])
"""
RANK_KEYS = {  # generation -> rank of `Layout` -> key of the header, after the architecture
    "6.0": {"maa": "time_mix_extra_dim", "decay": "time_decay_extra_dim"},
    "7.0": {
        "w": "attention.decay_lora_rank",
        "a": "attention.iclr_lora_rank",
        "v": "attention.value_residual_mix_lora_rank",
        "g": "attention.gate_lora_rank",
    },
}
NOT_READ = "llama.cpp starts from zeros and reads no state with a model"


def whole_number(facts: Facts, key: str, default: int | None = None) -> int:
    """A number of the header that must be 0 or more.

    Raises:
        CorruptFileError: it is something else, or missing without a default.
    """
    stated = facts.metadata.get(key)
    if stated is None and default is not None:
        return default
    if stated is None or not stated.isdecimal():
        raise CorruptFileError(f"{facts.path}: {key} is {stated or 'missing'} in its header; a number is expected.")
    return int(stated)


def head_size(facts: Facts, architecture: str) -> int:
    """N, as the header states it.

    Raises:
        CorruptFileError: it does not, or 0.
    """
    found = whole_number(facts, f"{architecture}.wkv.head_size")
    if not found:
        raise CorruptFileError(f"{facts.path}: {architecture}.wkv.head_size is 0 in its header; 64 is usual.")
    return found


def group_norm_eps(facts: Facts, head_size: int) -> float:
    """llama.cpp's, at any head size; it is BlinkDL's."""
    return 64e-5


def refused(layout: Layout) -> str:
    """Why llama.cpp cannot take such a model."""
    if layout.dim_att != layout.n_embd:
        return f"llama.cpp has no attention of another width ({layout.dim_att}) than the channels ({layout.n_embd})"
    return ""


def vectors_in_float32(full: Collection[str]) -> Callable[[str, Shape, torch.dtype], torch.dtype]:
    """`ForeignFormat.dtype_of`: llama.cpp computes with vectors, and with some tensors more, in float32 only.

    Args:
        full: those tensors, without layer and ".weight".
    """

    def dtype_of(name: str, shape: Shape, wanted: torch.dtype) -> torch.dtype:
        kept = len(shape) == 1 or wanted == torch.float64 or name.split(".")[-2] in full
        return torch.float32 if kept else wanted

    return dtype_of
