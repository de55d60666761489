"""What a configuration or a header states of a model's dimensions, beside what its tensors have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.lazy_torch import torch

_LAYER_NORM_EPS = 1e-5  # of every norm but that over heads, in every generation
_EPS = ("norm_eps", "layer_norm_epsilon")
# Of a config.json; what each one is for a layout, the format's own configuration tells.
_DIMENSIONS = re.compile(
    r"vocab_size|(attention_)?hidden_size|intermediate_size|num_\w+|head_(size|dim)|\w+_low_rank_dim"
)


def contradictions(
    known: ForeignFormat, layout: Layout, config: Mapping[str, Any], metadata: Mapping[str, str]
) -> list[str]:
    """Where a file states other dimensions than its tensors have, in words.

    Args:
        known: the format of the file.
        layout: of its tensors.
        config: config.json of a folder.
        metadata: of the header of a file.
    """
    notes = [
        f"config.json states {name} {config[name]!r}, the tensors have {value}; the tensors count."
        for name, value in _configured(known, layout)
        if config.get(name) is not None and config[name] != value
    ]
    architecture = metadata.get("general.architecture", "")
    for name, value in _of_gguf(layout):
        stated = metadata.get(f"{architecture}.{name}")
        if stated is not None and stated != str(value):
            notes.append(f"The header states {architecture}.{name} {stated}, the tensors have {value}; they count.")
    stated = [(name, config.get(name)) for name in _EPS]
    key = f"{architecture}.attention.layer_norm_epsilon"
    return notes + [
        f"{name} is stated as {eps}; the norms are computed with {_LAYER_NORM_EPS}, as BlinkDL's code has it."
        for name, eps in [*stated, (key, metadata.get(key))]
        if eps is not None and not _is_usual(eps)
    ]


def _configured(known: ForeignFormat, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Names and values of the dimensions in the configuration that such a folder would get."""
    config = known.config(layout, torch.float32) if known.config is not None else {}
    if "v" not in layout.ranks:  # one layer has none; the number stands for nothing
        config.pop("v_low_rank_dim", None)
    return ((name, value) for name, value in config.items() if _DIMENSIONS.fullmatch(name))


def _of_gguf(layout: Layout) -> Iterator[tuple[str, int]]:
    yield "block_count", layout.n_layer
    yield "embedding_length", layout.n_embd
    yield "feed_forward_length", layout.dim_ffn
    yield "vocab_size", layout.vocab_size


def _is_usual(eps: object) -> bool:
    try:
        return abs(float(str(eps)) - _LAYER_NORM_EPS) < 1e-9
    except ValueError:
        return False
