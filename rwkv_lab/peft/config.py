"""What is adapted and how: the settings, and the layers and parameters of a model that they name."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rwkv_lab.errors import ParameterError
from rwkv_lab.names import split_block
from rwkv_lab.patterns import matches, matches_any, refuse_unmatched
from rwkv_lab.peft.linear import AdaptedLinear, check_dropout, lora_scaling
from rwkv_lab.peft.miss import check_variant
from rwkv_lab.peft.quantised import check_quant

METHODS = ("lora", "pissa", "miss")
PARTS = ("emb", "head", "ln", "time", "time_state")


@dataclass(frozen=True)
class LoraConfig:
    """How a model is adapted.

    Args:
        method: "lora", "pissa" or "miss".
        lora_target_modules: patterns of layers, as `rwkv_lab.patterns` reads them: "att.key", "blocks.3.ffn.value",
            "blocks.[0-3]". None for all matrices of the blocks.
        lora_r: rank.
        lora_alpha: of LoRA: its change is scaled by lora_alpha / lora_r. PiSSA's scale is 1, MiSS has none.
        lora_dropout: of LoRA, and of MiSS but for its bats.
        use_rslora: scale LoRA by lora_alpha / sqrt(lora_r).
        svd_niter: of PiSSA: power iterations of the randomised SVD; None for the exact one.
        miss_variant: "default", "mini", "bat-hf" or "bat-rwkv-peft"; `rwkv_lab.peft.miss` has the formulas.
        mini_r: of MiSS "mini": columns of its block.
        quant: "none", "int8" or "nf4": how the frozen matrices of the blocks are stored, adapted ones and others.
        train_parts: what is trained besides: "emb", "head", "ln" (every norm), "time" (the vectors and low-rank pairs
            of att and ffn), "time_state" (made where the model has none), or shell patterns of parameter names.
        adapter_dtype: of the adapters' parameters; None for the model's dtype.

    Raises:
        ParameterError: a value that there is not, or settings that contradict each other.
    """

    method: str = "lora"
    lora_target_modules: Sequence[str] | None = None
    lora_r: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    svd_niter: int | None = 4
    miss_variant: str = "default"
    mini_r: int = 1
    quant: str = "none"
    train_parts: Sequence[str] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ParameterError(f"There is no method {self.method!r}; there are: {', '.join(METHODS)}.")
        for what, names in (("lora_target_modules", self.lora_target_modules), ("train_parts", self.train_parts)):
            if names is not None and (isinstance(names, str) or not all(isinstance(n, str) for n in names)):
                raise ParameterError(f"{what}={names!r}: it must be a list of names or patterns.")
        if self.lora_target_modules is not None and not list(self.lora_target_modules):
            raise ParameterError("lora_target_modules is empty: nothing would be adapted. None stands for all layers.")
        if not _is_whole(self.lora_r) or self.lora_r < 1:
            raise ParameterError(f"lora_r={self.lora_r!r}: it must be a whole number of at least 1.")
        check_quant(self.quant)
        check_dropout(self.lora_dropout)
        if self.method == "miss":
            check_variant(self.miss_variant)
        else:
            lora_scaling(self.lora_alpha, self.lora_r)
        if self.lora_dropout and (self.method == "pissa" or self.method == "miss" and "bat" in self.miss_variant):
            raise ParameterError("lora_dropout: PiSSA and the bats of MiSS change the weight itself; say dropout 0.")
        if self.use_rslora and self.method != "lora":
            raise ParameterError(f"use_rslora goes with method 'lora', not with {self.method!r}.")
        if self.svd_niter is not None and not (_is_whole(self.svd_niter) and self.svd_niter >= 0):
            raise ParameterError(
                f"svd_niter={self.svd_niter!r}: it must be a whole number of at least 0, or None for the exact SVD."
            )
        if not _is_whole(self.mini_r) or self.mini_r < 1:
            raise ParameterError(f"mini_r={self.mini_r!r}: it must be a whole number of at least 1.")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ParameterError(f"adapter_dtype={dtype!r}: it must be a floating dtype, such as torch.float32.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def target_modules(model: nn.Module, patterns: Sequence[str] | None, what: str = "lora_target_modules") -> list[str]:
    """Full names of the Linear layers that the patterns select, in the model's order; None selects those of the blocks.

    Args:
        what: the caller's parameter, for messages.

    Raises:
        ParameterError: a pattern that matches no layer (near names are listed), or a layer that is adapted already.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if patterns is None:
        patterns = ["blocks.*"]
    refuse_unmatched(what, patterns, list(layers), "Linear layers of this model")
    chosen = [name for name in layers if matches_any(name, patterns)]
    adapted = next((name for name in chosen if isinstance(layers[name], AdaptedLinear)), None)
    if adapted:
        raise ParameterError(f"{adapted} has an adapter already; load the model anew, or choose other layers.")
    return chosen


def trained_parts(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Full names of the parameters that `train_parts` selects, in the model's order. Adapters are not among them.

    Raises:
        ParameterError: a part or pattern that matches no parameter (near names are listed).
    """
    names = [name for name, _ in _own_parameters(model)]
    chosen: set[str] = set()
    for part in parts:
        matched = {name for name in names if _in_part(name, part)}
        if not matched:
            kinds = f"parameters of this model, and is none of {', '.join(PARTS)}"
            refuse_unmatched("train_parts", [part], names, kinds)
        chosen |= matched
    return [name for name in names if name in chosen]


def _own_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Those of the model itself, without adapters."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (isinstance(module, AdaptedLinear) and name in module.adapter_names):
                yield f"{prefix}.{name}" if prefix else name, parameter


def _in_part(name: str, part: str) -> bool:
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
