"""PiSSA (arXiv 2404.02948): a LoRA that starts from the weight's own principal part, and where it started."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.peft.adapter import Adapter, InMemory, Target, Values
from rwkv_lab.peft.config import LoraConfig, register
from rwkv_lab.peft.hf_layout import PREFIX
from rwkv_lab.peft.kinds.lora import Lora, LoraTarget
from rwkv_lab.peft.linear import AdaptedLinear, PissaLinear

_HALF = re.compile(r"^(?P<layer>.+)\.(?:init_)?lora_(?P<half>[AB])(?:\.default)?(?:\.weight)?$")


class Pissa(Lora):
    """Its files are those of LoRA; a file is recognised as PiSSA when it is read."""

    method, described = "pissa", "a PiSSA adapter"
    layer_type = PissaLinear
    takes_alpha = False
    peft_types = stems = ()

    def check(self, config: LoraConfig) -> None:
        super().check(config)
        if config.lora_dropout:
            raise ParameterError("lora_dropout: PiSSA changes the weight itself. Pass dropout 0.")
        if config.use_rslora:
            raise ParameterError("use_rslora goes with method 'lora', not with 'pissa'.")

    def new_layer(self, linear: nn.Linear, config: LoraConfig) -> PissaLinear:
        return PissaLinear.from_linear(linear, config.lora_r, adapter_dtype=config.adapter_dtype)

    def start(self, layer: AdaptedLinear, config: LoraConfig) -> None:
        layer.start(config.svd_niter)

    def start_fingerprint(self, layers: Iterable[AdaptedLinear]) -> str:
        """Its SVD may come out otherwise on another machine or number of threads."""
        digest = hashlib.sha256()
        for layer in layers:
            digest.update(layer.init_lora_A.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def target(self, layer: PissaLinear) -> LoraTarget:
        start = (None if t is None else InMemory(t) for t in (layer.init_lora_A, layer.init_lora_B))
        return LoraTarget(*super().target(layer).tensors.values(), layer.lora_alpha, layer.use_rslora, True, *start)

    def file_part(self, name: str) -> None:
        return None

    folder_part = file_part

    def folder_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        if adapter.quant not in (None, "none"):
            raise ParameterError(
                f"PiSSA on a base in {adapter.quant}: what was rounded is the base without its start, and a folder of\n"
                "Hugging Face's peft cannot state that. Save it as a .pth or .safetensors, from which it can be merged."
            )
        if adapter.residual_base:
            raise ParameterError(
                f"{adapter.where} is PiSSA without what it started from: saved like this it would turn the original\n"
                "model into something else. Open it with pissa_init=."
            )
        return super().folder_content(adapter)


def with_start(adapter: Adapter, init: Checkpoint) -> dict[str, Target]:
    """The targets of an adapter with the halves that they started from: those of RWKV-PEFT's `init_pissa.pth`, or of
    the folder that Hugging Face's peft saved before training.

    Raises:
        LayoutError: a start of other layers or shapes.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    names = [n for n in init.info if "init_lora_" in n] or list(init.info)
    for name in names:
        if match := _HALF.match(name.removeprefix(PREFIX).removeprefix(init.identity.prefix)):
            parts.setdefault(match["layer"], {})[match["half"]] = init.info[name]
    missing = [x for x in adapter.targets if set(parts.get(x, ())) != {"A", "B"}]
    if missing or len(parts) != len(adapter.targets):
        raise LayoutError(
            f"{init.path} has starts for {len(parts)} layers, {adapter.where} adapts {len(adapter.targets)}"
            f"{f'; nothing for {missing[0]}' if missing else ''}.\nThey are not of one training run."
        )
    for x, target in adapter.targets.items():
        if parts[x]["A"].shape != target.A.shape or parts[x]["B"].shape != target.B.shape:
            raise LayoutError(
                f"{init.path} starts {x} with lora_A {list(parts[x]['A'].shape)}, {adapter.where} has "
                f"{list(target.A.shape)}.\nThey are not of one training run."
            )
    return {x: replace(t, pissa=True, init_A=parts[x]["A"], init_B=parts[x]["B"]) for x, t in adapter.targets.items()}


register(Pissa())
