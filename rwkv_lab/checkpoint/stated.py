"""What a configuration or a header states of a model's dimensions, beside what its tensors have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.checkpoint.gguf_facts import RANK_KEYS
from rwkv_lab.checkpoint.source import TensorInfo
from rwkv_lab.lazy_torch import torch

_LAYER_NORM_EPS = 1e-5  # of every norm but that over heads, in every generation
_EPS = ("norm_eps", "layer_norm_epsilon")
# Of a config.json; what each one is for a layout, the format's own configuration tells.
_DIMENSIONS = re.compile(
    r"vocab_size|(attention_)?hidden_size|intermediate_size|num_\w+|head_(size|dim)|\w+_low_rank_dim|value_dim|ranks"
    r"|version|model_type"
)
_COMPUTED = ("hidden_act", "norm_bias")  # what BlinkDL's code has one way only
_DTYPES = ("dtype", "torch_dtype")


def contradictions(
    known: ForeignFormat,
    layout: Layout,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
) -> list[str]:
    """Where a file states something else than its tensors have, in words.

    Args:
        known: the format of the file.
        layout: of its tensors.
        config: config.json of a folder.
        metadata: of the header of a file.
        tensors: not read.
    """
    notes = [
        f"config.json states {name} {config[name]!r}, the tensors have {value!r}; the tensors count."
        for name, value in _configured(known, layout)
        if config.get(name) is not None and config[name] != value and config[name] != _for_all_layers(value)
    ]
    notes += [
        f"config.json states {name} {config[name]!r}; RWKV-{layout.version} is computed with {value!r}."
        for name, value in _configuration(known, layout).items()
        if name in _COMPUTED and config.get(name) is not None and config[name] != value
    ]
    notes += _other_dtype(config, tensors)
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
    config = _configuration(known, layout)
    if "v" not in layout.ranks:  # one layer has none; the number stands for nothing
        config.pop("v_low_rank_dim", None)
    return ((name, value) for name, value in config.items() if _DIMENSIONS.fullmatch(name))


def _configuration(known: ForeignFormat, layout: Layout) -> dict[str, Any]:
    return known.config(layout, torch.float32) if known.config is not None else {}


def _for_all_layers(value: object) -> object:
    """The one number that some configurations have in place of a list with it for every layer."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _other_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Where it states a dtype in which least of the tensors are: programs load them in that one."""
    bytes_of = Counter[str]()
    for tensor in tensors.values():
        bytes_of[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    for name in _DTYPES:
        wanted = config.get(name)
        if isinstance(wanted, str) and wanted != "auto" and bytes_of and wanted != bytes_of.most_common(1)[0][0]:
            yield (
                f"config.json states {name} {wanted!r}, most tensors are {bytes_of.most_common(1)[0][0]}; "
                "every tensor is read in its own."
            )


def _of_gguf(layout: Layout) -> Iterator[tuple[str, int]]:
    yield "block_count", layout.n_layer
    yield "embedding_length", layout.n_embd
    yield "feed_forward_length", layout.dim_ffn
    yield "vocab_size", layout.vocab_size
    for rank, key in RANK_KEYS.get(layout.version, {}).items():
        if rank in layout.ranks:
            yield key, layout.ranks[rank]


def _is_usual(eps: object) -> bool:
    try:
        return abs(float(str(eps)) - _LAYER_NORM_EPS) < 1e-9
    except ValueError:
        return False
