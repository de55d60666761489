"""A model as a sensitivity scan sees it: its matrices by name, and its logits with some of them quantised.

What enters each layer is kept: of matrices in layer 5, layers 0 to 4 need not be run again.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from rwkv_lab.checkpoint.rounding import BLOCK
from rwkv_lab.errors import ParameterError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.optimization_processor import restored
from rwkv_lab.export.weight_storage import is_head, is_matrix
from rwkv_lab.model import RWKV_Dual

Kept = Any  # of a text: what enters every layer, and what is behind the last one


class ScannedModel(Protocol):
    """What a scan asks of a model; `heads` are the names of matrices that make logits."""

    model: Any
    vocab_size: int
    layers: int
    matrices: dict[str, torch.Tensor]
    heads: set[str]

    def read(self, ids: torch.Tensor) -> Kept:
        """Tokens `[1,T]`, with the model as it is."""
        ...

    def logits(self, kept: Kept, first: int) -> torch.Tensor:
        """Logits `[T,V]` of a text that was read, run anew from a layer on; `layers`: from behind the last one on."""
        ...


class ScannedRwkv:
    """An RWKV."""

    def __init__(self, model: RWKV_Dual):
        self.model: Any = model
        self.vocab_size, self.layers = model.layout.vocab_size, model.layout.n_layer
        named = {name: p for name, p in model.named_parameters() if p.ndim == 2 and (is_matrix(name) or is_head(name))}
        self.matrices: dict[str, torch.Tensor] = {**named}
        self.heads = {name for name in self.matrices if is_head(name)}

    def read(self, ids: torch.Tensor) -> Kept:
        """As `ScannedModel.read`: (x, v_first) in front of every layer, and behind the last one."""
        model = self.model
        return list(self._run(0, (model.blocks[0].ln0(model.emb(ids)), None)))

    def logits(self, kept: Kept, first: int) -> torch.Tensor:
        """As `ScannedModel.logits`."""
        model = self.model
        *_, (x, _) = self._run(first, kept[first])
        return model.head(model.ln_out(x))[0]

    def _run(self, first: int, entered: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        model = self.model
        x, v_first = entered
        state = model.create_state(1)
        yield x, v_first
        for layer in range(first, self.layers):
            parts = state.att_shift[:, layer], state.ffn_shift[:, layer], state.wkv[:, layer]
            x, _, _, _, v_first = model.blocks[layer](x, *parts, v_first)
            yield x, v_first


class ScannedCausalLm:
    """A causal language model of Hugging Face."""

    def __init__(self, model: Any):
        self.model, self.vocab_size = model, model.get_input_embeddings().weight.shape[0]
        self.layers = int(model.config.num_hidden_layers)
        linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.matrices: dict[str, torch.Tensor] = {name: module.weight for name, module in linear.items()}
        self.heads = {name for name, module in linear.items() if module is model.get_output_embeddings()}
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers]
        if not lists:
            raise ParameterError(f"A {model.config.model_type} has no list of layers that is known; it is not scanned.")
        self._blocks = list(lists[0])

    def read(self, ids: torch.Tensor) -> Kept:
        """As `ScannedModel.read`: the tokens, and what each layer gives."""
        found: list[Any] = []
        with ExitStack() as stack:
            for block in self._blocks:
                hook = block.register_forward_hook(lambda _, given, out: found.append(out))
                stack.callback(hook.remove)
            self._run(ids)
        return ids, found

    def logits(self, kept: Kept, first: int) -> torch.Tensor:
        """As `ScannedModel.logits`."""
        ids, found = kept
        with ExitStack() as stack:
            for block, out in zip(self._blocks[:first], found, strict=False):
                block.forward = lambda *given, out=out, **more: out
                stack.callback(delattr, block, "forward")  # that of its class is there again
            return self._run(ids)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[0]


def scanned(model: nn.Module) -> ScannedModel:
    """A model as a scan sees it.

    Raises:
        ParameterError: it is of no family that is scanned, or has no matrix that is quantised.
    """
    if isinstance(model, RWKV_Dual):
        found: ScannedModel = ScannedRwkv(model)
    elif hasattr(model, "get_output_embeddings"):
        found = ScannedCausalLm(model)
    else:
        raise ParameterError(f"A {type(model).__name__} is not scanned: give an RWKV_Dual or a model of transformers.")
    if not found.matrices:
        raise ParameterError("The model has no matrix that is quantised.")
    return found


def layer_of(name: str) -> int | None:
    """The layer that a matrix is in; None for the head."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def kind_of(name: str) -> str:
    """What a matrix is called in every layer, such as "att.key.weight"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


@contextmanager
def as_exported(model: nn.Module, stored: Mapping[str, Weights]) -> Iterator[None]:
    """Within it the model has some matrices as the ONNX graphs hold them, and rounds what they multiply as the graphs
    do."""
    with swapped(model, stored, rounded_weights(model, stored)):
        yield


def rounded_weights(model: nn.Module, stored: Mapping[str, Weights]) -> dict[str, torch.Tensor]:
    """What is left of matrices that are stored so, float32, by name."""
    return {name: restored(name, model.get_parameter(name).detach(), way) for name, way in stored.items()}


@contextmanager
def swapped(model: nn.Module, stored: Mapping[str, Weights], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """As `as_exported`, with what `rounded_weights` gives."""
    linears: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in stored}
    before = {name: linear.weight for name, linear in linears.items()}
    hooks = []
    try:
        for name, linear in linears.items():
            linear.weight = nn.Parameter(weights[name], requires_grad=False)
            if rounding := _INPUTS.get(stored[name]):
                hooks.append(linear.register_forward_pre_hook(lambda _, given, r=rounding: (r(given[0]),)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            linear.weight = before[name]


def round_inputs_int8(x: torch.Tensor) -> torch.Tensor:
    """As DynamicQuantizeLinear rounds what MatMulInteger multiplies: 256 levels for all of `x` together."""
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = (high - low) / 255
    if not scale:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def round_inputs_int4(x: torch.Tensor) -> torch.Tensor:
    """As MatMulNBits at accuracy level 4 rounds what it multiplies: to int8 with a scale per 32 values."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / torch.where(scale == 0, 1, scale)).round() * scale).flatten(-2)


_INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"int8": round_inputs_int8, "int4": round_inputs_int4}
