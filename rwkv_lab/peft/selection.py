"""The layers and parameters of a model that settings name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.names import split_block
from rwkv_lab.patterns import matches, matches_any, refuse_unmatched

PARTS = ("emb", "head", "ln", "time", "time_state")


def target_modules(
    model: torch.nn.Module, patterns: Sequence[str] | None, what: str = "lora_target_modules"
) -> list[str]:
    """Full names of the Linear layers that the patterns select, in the model's order; None selects those of the blocks.

    Args:
        what: the caller's parameter, for messages.

    Raises:
        ParameterError: a pattern that matches no layer (near names are listed), or a layer that is adapted already.
    """
    from rwkv_lab.peft.linear import AdaptedLinear  # brings torch, which names of parts do not need

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if patterns is None:
        patterns = ["blocks.*"]
    refuse_unmatched(what, patterns, list(layers), "Linear layers of this model")
    chosen = [name for name in layers if matches_any(name, patterns)]
    adapted = next((name for name in chosen if isinstance(layers[name], AdaptedLinear)), None)
    if adapted:
        raise ParameterError(f"{adapted} has an adapter already; load the model anew, or choose other layers.")
    return chosen


def trained_parts(model: torch.nn.Module, parts: Sequence[str]) -> list[str]:
    """Full names of the parameters that `train_parts` selects, in the model's order. Adapters are not among them.

    Raises:
        ParameterError: a part or pattern that matches no parameter (near names are listed).
    """
    names = [name for name, _ in _own_parameters(model)]
    chosen: set[str] = set()
    for part in parts:
        matched = {name for name in names if in_part(name, part)}
        if not matched:
            kinds = f"parameters of this model, and is none of {', '.join(PARTS)}"
            refuse_unmatched("train_parts", [part], names, kinds)
        chosen |= matched
    return [name for name in names if name in chosen]


def _own_parameters(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Those of the model itself, without adapters."""
    from rwkv_lab.peft.linear import AdaptedLinear

    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (isinstance(module, AdaptedLinear) and name in module.adapter_names):
                yield f"{prefix}.{name}" if prefix else name, parameter


def in_part(name: str, part: str) -> bool:
    """Whether a part of `train_parts`, or a pattern, means the parameter of that name."""
    if part in ("emb", "head"):
        return name == f"{part}.weight"
    norm = re.search(r"(^|\.)ln\w*\.(weight|bias)$", name)
    if part == "ln":
        return norm is not None
    state = name.endswith(".time_state")
    if part == "time_state":
        return state
    if part == "time":
        return split_block(name) is not None and not (norm or state or name.endswith(".weight"))
    return matches(name, part)
