"""Parameter-efficient tuning: adapters in models (LoRA, PiSSA, MiSS), on a quantised base or not, and their files."""

from importlib import import_module
from typing import Any

import rwkv_lab.peft.kinds  # noqa: F401  # makes the kinds of adapters known

# Looked up when first asked for: reading an adapter's file needs no model.
_HOME = {
    "Adapter": "adapter",
    "Target": "adapter",
    "refuse_overlap": "adapter",
    "ADAPTER_KINDS": "config",
    "AdapterKind": "config",
    "LoraConfig": "config",
    "LoraTarget": "lora_target",
    "MissTarget": "kinds.miss",
    "register": "config",
    "open_adapter": "files",
    "save_adapter": "files",
    "save_pissa_init": "files",
    "adapter_of": "inject",
    "adapter_parameters": "inject",
    "adapters": "inject",
    "apply_peft": "inject",
    "count_parameters": "inject",
    "load_adapter": "inject",
    "load_model_and_apply_peft": "inject",
    "mark_only_lora_as_trainable": "inject",
    "merged_state_dict": "inject",
    "planned_parameters": "inject",
    "print_model_param": "inject",
    "quantise_blocks": "inject",
    "AdaptedLinear": "linear",
    "LoraLinear": "linear",
    "PissaLinear": "linear",
    "MissLinear": "miss",
    "FrozenLinear": "frozen_linear",
    "NF4Linear": "frozen_linear",
    "dequantize_bnb_int8": "quantised",
    "dequantize_fp4": "quantised",
    "dequantize_int8": "quantised",
    "dequantize_nf4": "quantised",
    "quantised_and_back": "quantised",
    "quantize_bnb_int8": "quantised",
    "quantize_fp4": "quantised",
    "quantize_int8": "quantised",
    "quantize_nf4": "quantised",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwkv_lab.peft' has no attribute {name!r}")
    return getattr(import_module(f"rwkv_lab.peft.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
