"""Tuned states in an output: zeros for the layers that have none, and which programs begin with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rwkv_lab.checkpoint import Layout, TensorInfo
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.changed_tensors import ChangedTensor, Computed
from rwkv_lab.text import counted

ZEROS = "zeros"  # the action of a state that is written for a layer without one
_END = ".att.time_state"

# What other programs make of a `time_state` in the model's file; facts of November 2026.
_CONSUMERS = {
    "5": "rwkv_lab and rwkv (ChatRWKV) begin with it; web-rwkv and Ai00 do once it is converted to their format.\n"
    "RWKV-Runner takes the state's own file beside the model; fla, transformers, llama.cpp and rwkv.cpp ignore it.",
    "7": "rwkv_lab begins with it; web-rwkv and Ai00 do once it is converted to their format.\n"
    "rwkv (ChatRWKV), RWKV-Runner, rwkv7-hf, fla, llama.cpp and rwkv.cpp ignore it.\n"
    "Give RWKV-Runner the state's own file; rwkv and rwkv7-hf the WKV part of the state that they start from, fla its "
    "transpose [H, K, V].",
}


def missing_states(
    kept: Mapping[str, TensorInfo], applied: Sequence[ChangedTensor], layout: Layout
) -> list[ChangedTensor]:
    """States of zeros for the layers that have none, where others get one: some programs need all or none.

    Args:
        kept: tensors of the base that stay in the output.
        applied: what the merge changes.
        layout: of the output.
    """
    states = [c for c in applied if c.name.endswith(_END)]
    if not states or not layout.n_head:
        return []
    there = {*kept, *(c.name for c in applied)}
    shape, dtype = (layout.n_head, layout.head_size, layout.head_size), states[0].dtype
    names = [name for i in range(layout.n_layer) if (name := f"blocks.{i}{_END}") not in there]
    return [_zeros(name, shape, dtype) for name in names]


def _zeros(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> ChangedTensor:
    def compute() -> Iterator[Computed]:
        for part in torch.zeros(shape, dtype=dtype, device="cpu").flatten().split(BLOCK):
            yield part, None

    return ChangedTensor(name, ZEROS, "zeros", shape, dtype, compute=compute)


def notes_on_states(applied: Sequence[ChangedTensor], zeros: Sequence[ChangedTensor], layout: Layout) -> list[str]:
    """Sentences for the plan and the report; none where no state is written."""
    states = [c for c in applied if c.name.endswith(_END)]
    if not states:
        return []
    notes = []
    if zeros:
        layers = ", ".join(c.name.split(".")[1] for c in zeros[:8]) + (", …" if len(zeros) > 8 else "")
        notes.append(
            f"States are written for {layout.n_layer - len(zeros)} of {counted(layout.n_layer, 'layer')}; "
            f"the other {len(zeros)} "
            f"({layers}) get zeros, with which a text begins anyway, since some programs need all or none."
        )
    consumers = _CONSUMERS["7" if layout.version[0] == "7" else "5"]
    notes.append(f"time_state in an RWKV-{layout.version} model: {consumers}")
    return notes
