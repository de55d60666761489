"""Adapters into models: layers replaced, everything frozen but what is trained, and what that comes to in numbers."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rwkv_lab.arguments import Size, checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model import RWKV_Dual, RWKVMode
from rwkv_lab.model.packed_file import packed_modules
from rwkv_lab.names import split_block
from rwkv_lab.peft.adapter import Adapter, InMemory
from rwkv_lab.peft.config import ADAPTER_KINDS, LoraConfig
from rwkv_lab.peft.frozen_linear import FrozenLinear, NF4Linear
from rwkv_lab.peft.linear import AdaptedLinear
from rwkv_lab.peft.quantised import PackedWeight
from rwkv_lab.peft.selection import target_modules, trained_parts
from rwkv_lab.peft.settings import check_quant


@checked
def load_model_and_apply_peft(config: object, lora_config: LoraConfig) -> RWKV_Dual:
    """Load a base model, freeze it, and give it adapters that are trained.

    Args:
        config: any object with `peft_load_path`, the base: a checkpoint of any generation. Taken where it has them:
            `dtype` (torch's or its name, "bfloat16" or "bf16"; float32), `device` ("cpu"), `mode`, `group_norm_eps`.
        lora_config: which adapters, on which layers.

    Returns:
        the RWKV_Dual with its layers replaced; right after, it computes what the base computes, PiSSA up to rounding.

    Raises:
        ParameterError: a target that matches nothing, a rank larger than its layer, no `peft_load_path`.
        NumericsError: NaN or infinity in a weight that is decomposed or quantised.
        LayoutError, CorruptFileError, UnsafeFileError, DeviceError: of the base; see `RWKV_Dual.from_pretrained`.
    """
    path = getattr(config, "peft_load_path", None)
    if not path:
        raise ParameterError(f"{type(config).__name__} has no peft_load_path: it must be the base model's checkpoint.")
    with open_checkpoint(path) as ck:
        refuse_packed(ck.path, ck.info.values(), "An adapter")
    model = RWKV_Dual.from_pretrained(
        path,
        dtype=to_dtype(getattr(config, "dtype", torch.float32)),
        device=getattr(config, "device", "cpu"),
        mode=getattr(config, "mode", RWKVMode.TRANSFORMER),
        group_norm_eps=getattr(config, "group_norm_eps", None),
    )
    apply_peft(model, lora_config)
    return model


@checked
def apply_peft(model: RWKV_Dual, lora_config: LoraConfig) -> None:
    """Freeze a model and give it adapters, in place. New values are drawn from torch's generator.

    Raises:
        ParameterError: as `load_model_and_apply_peft`; the model is as it was then.
        NumericsError: as there; some layers may have been replaced by then, so load the model anew.
    """
    if packed := next(iter(packed_modules(model)), None):
        raise ParameterError(
            f"{packed} of this model is in 8 or 4 bits: adapters are given to the model that it was packed from.\n"
            'LoraConfig(quant="nf4") packs frozen matrices.'
        )
    names = target_modules(model, lora_config.lora_target_modules)
    for name in names:
        layer = _linear(model, name)
        planned_parameters(name, layer.out_features, layer.in_features, lora_config)  # refuses what does not fit
    if "time_state" in lora_config.train_parts:
        model.add_time_state()
    besides = trained_parts(model, lora_config.train_parts)
    clash = next((name for name in besides if name.removesuffix(".weight") in names), None)
    if clash:
        raise ParameterError(f"{clash} is named by train_parts and adapted too; only one of them can be meant.")
    kind = ADAPTER_KINDS[lora_config.method]
    for name in names:
        with _named(name):
            layer = kind.new_layer(_linear(model, name), lora_config)
            kind.start(layer, lora_config)
        _replace(model, name, layer)
    quantise_blocks(model, lora_config.quant, besides)
    _train_only(model, besides)


@checked
def planned_parameters(name: str, out_features: Size, in_features: Size, lora_config: LoraConfig) -> int:
    """How many parameters an adapter of a layer would have, before anything is changed or read.

    Raises:
        ParameterError: names the layer; a rank that is larger than it, or that does not divide it where it has to.
    """
    with _named(name):
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer = ADAPTER_KINDS[lora_config.method].new_layer(linear, lora_config)
    return sum(p.numel() for p in layer.adapter().values())


@contextmanager
def _named(layer: str):
    """Put the layer's name before what is wrong with it."""
    try:
        yield
    except (ParameterError, NumericsError) as e:
        raise type(e)(f"{layer}: {e}") from e


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} was selected among Linear layers"
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def quantise_blocks(model: nn.Module, quant: str, trained: Sequence[str] = ()) -> None:
    """Store the matrices of the blocks as `quant`, in place; they are frozen by that.

    Args:
        trained: names of weights that are trained whole, and stay as they are.

    Raises:
        ParameterError: no such storage.
        NumericsError: NaN or infinity in a weight, named.
    """
    check_quant(quant)
    if quant == "none":
        return
    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, nn.Linear) and split_block(name)) or f"{name}.weight" in trained:
            continue
        with _named(name):
            if not isinstance(layer, FrozenLinear):
                layer = (NF4Linear if quant == "nf4" else FrozenLinear).from_linear(layer)
            if layer.packed is None:
                layer.pack(quant)
        _replace(model, name, layer)


@checked
def mark_only_lora_as_trainable(model: nn.Module, train_parts: Sequence[str] = ()) -> list[str]:
    """Freeze everything but the adapters (of any kind) and `train_parts`, which are those of `LoraConfig`.

    Returns:
        names of the parameters that are trained.

    Raises:
        ParameterError: a model without adapters, or a part that matches nothing.
    """
    if not any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ParameterError("The model has no adapters; give it some with apply_peft or load_adapter.")
    return _train_only(model, trained_parts(model, train_parts))


def _train_only(model: nn.Module, besides: Sequence[str]) -> list[str]:
    wanted = {*besides, *adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@checked
def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@checked
def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by full name."""
    return {f"{name}.{part}": p for name, layer in adapters(model).items() for part, p in layer.adapter().items()}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a packed weight counts as the values that it stands for."""

    adapters: int  # trained, in adapters
    besides: int  # trained, elsewhere
    frozen: int

    @property
    def trained(self) -> int:
        return self.adapters + self.besides

    def __str__(self) -> str:
        total = self.trained + self.frozen
        return (
            f"{self.trained:,} parameters are trained ({self.adapters:,} in adapters, {self.besides:,} besides), "
            f"{self.frozen:,} are frozen: {self.trained / max(total, 1):.2%} of {total:,}"
        )


@checked
def count_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters are trained and frozen."""
    adapting = set(map(id, adapter_parameters(model).values()))
    trained = [p for p in model.parameters() if p.requires_grad]
    inside = sum(p.numel() for p in trained if id(p) in adapting)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    packed = [m.packed for m in model.modules() if isinstance(m, FrozenLinear) and m.packed is not None]
    frozen += sum(p.shape[0] * p.shape[1] for p in packed)
    return ParameterCount(inside, sum(p.numel() for p in trained) - inside, frozen)


@checked
def print_model_param(model: nn.Module) -> None:
    """Print what is trained, tensor by tensor, and how much is trained and frozen in all."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            print(f"{name} {list(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}")
    print(count_parameters(model))


@checked
@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The plain model that computes what this adapted one does: names of a checkpoint, adapters worked into weights.

    Weights are computed in float32 (float64 for float64) and rounded to the model's dtype once.
    """
    modules, out = dict(model.named_modules()), {}
    for name, tensor in model.state_dict().items():
        if not isinstance(modules.get(name.rpartition(".")[0]), FrozenLinear | PackedWeight):
            out[name] = tensor
    for name, layer in modules.items():
        if isinstance(layer, FrozenLinear):
            weight = layer.weight
            merged = layer.merged_weight().to(weight.dtype) if isinstance(layer, AdaptedLinear) else weight
            out[f"{name}.weight"] = merged
    return out


@checked
@torch.no_grad()
def load_adapter(model: RWKV_Dual, adapter: Adapter, quant: str | None = None) -> None:
    """Put an adapter's values into a plain model, in place: as it was trained, ready to run or to be trained on.

    Args:
        model: the base, or for an adapter with `residual_base` what PiSSA left over of it.
        quant: how the base's matrices are stored; None for what training did where the adapter states it, else "none".

    Raises:
        LayoutError: an adapter of another model, or incomplete; the model is as it was then.
        NumericsError: NaN or infinity in the adapter; the model is as it was then.
        ParameterError: a model that has adapters already, or another `quant` than the adapter states.
    """
    if adapters(model):
        raise ParameterError("The model has adapters already; load it anew.")
    if quant is not None and adapter.quant not in (None, quant):
        raise ParameterError(f"quant={quant!r} was given, {adapter.where} states {adapter.quant!r}; leave it out.")
    quant = quant or adapter.quant or "none"
    check_quant(quant)
    adapter.check({name: tuple(p.shape) for name, p in model.named_parameters()}, model.layout)
    for name, values in adapter.tensors().items():
        if not values.read().isfinite().all():
            raise NumericsError(f"{name} of {adapter.where} holds NaN or infinity.")
    for name, target in adapter.targets.items():
        layer = ADAPTER_KINDS[adapter.method].trained_layer(_linear(model, name), target)
        _replace(model, name, layer)
    if any(name.endswith(".time_state") for name in adapter.full):
        model.add_time_state()
    parameters = dict(model.named_parameters())
    for name, values in adapter.full.items():
        parameters[name].copy_(values.read().view(parameters[name].shape))
    quantise_blocks(model, quant, list(adapter.full))
    _train_only(model, list(adapter.full))


@checked
def adapter_of(model: nn.Module) -> Adapter:
    """What was trained in an adapted model, ready to be saved: its adapters, and what is trained besides them.

    The tensors are the model's own, not copies.

    Raises:
        ParameterError: a model without adapters.
    """
    layers = adapters(model)
    if not layers:
        raise ParameterError("The model has no adapters; give it some with apply_peft or load_adapter.")
    first = next(iter(layers.values()))
    kind = next(kind for kind in ADAPTER_KINDS.values() if kind.layer_type is type(first))
    inside = adapter_parameters(model)
    return Adapter(
        method=kind.method,
        targets={name: kind.target(layer) for name, layer in layers.items()},
        full={n: InMemory(p) for n, p in model.named_parameters() if p.requires_grad and n not in inside},
        quant="none" if first.packed is None else first.packed.quant,
    )
