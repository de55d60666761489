"""PiSSA (arXiv 2404.02948): a LoRA that starts from the weight's own principal part, and where it started."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter, InMemory, Target, Values
from rwkv_lab.peft.config import LoraConfig, register
from rwkv_lab.peft.kinds.lora import Lora, with_values
from rwkv_lab.peft.lora_target import LoraTarget, lora_targets
from rwkv_lab.text import counted

if TYPE_CHECKING:
    from rwkv_lab.peft.linear import LoraLinear, PissaLinear

_HALF = re.compile(r"^(?P<layer>.+)\.(?:init_)?lora_(?P<half>[AB])(?:\.default)?(?:\.weight)?$")


class Pissa(Lora):
    """Its files are those of LoRA; a file is recognised as PiSSA when it is read."""

    method, described = "pissa", "a PiSSA adapter"
    takes_alpha = False
    peft_types = stems = ()

    @property
    def layer_type(self) -> type[PissaLinear]:
        from rwkv_lab.peft.linear import PissaLinear

        return PissaLinear

    def check(self, config: LoraConfig) -> None:
        super().check(config)
        if config.lora_dropout:
            raise ParameterError("lora_dropout: PiSSA changes the weight itself. Pass dropout 0.")
        if config.use_rslora:
            raise ParameterError("use_rslora goes with method 'lora', not with 'pissa'.")

    def new_layer(self, linear: torch.nn.Linear, config: LoraConfig) -> PissaLinear:
        from rwkv_lab.peft.linear import PissaLinear

        return PissaLinear.from_linear(linear, config.lora_r, adapter_dtype=config.adapter_dtype)

    def start(self, layer: PissaLinear, config: LoraConfig) -> None:
        layer.start(config.svd_niter)

    def start_fingerprint(self, layers: Iterable[PissaLinear]) -> str:
        """Its SVD may come out otherwise on another machine or number of threads."""
        digest = hashlib.sha256()
        for layer in layers:
            assert layer.init_lora_A is not None, "a layer that was started has its start"
            digest.update(layer.init_lora_A.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def target(self, layer: PissaLinear) -> LoraTarget:
        A, B = layer.init_lora_A, layer.init_lora_B
        start = {} if A is None or B is None else {"init_A": InMemory(A), "init_B": InMemory(B)}
        return replace(super().target(layer), pissa=True, **start)

    def trained_layer(self, linear: torch.nn.Linear, target: LoraTarget) -> LoraLinear:
        from rwkv_lab.peft.linear import PissaLinear

        t = target
        layer = PissaLinear.from_linear(linear, t.rank, t.alpha, use_rslora=t.use_rslora, adapter_dtype=t.A.dtype)
        if t.init_A is not None and t.init_B is not None:
            layer.start_from(t.init_A.read(), t.init_B.read())
        return with_values(layer, target)

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
        if match := _HALF.match(name):
            parts.setdefault(match["layer"], {})[match["half"]] = init.info[name]
    targets = lora_targets(adapter)
    missing = [x for x in adapter.targets if set(parts.get(x, ())) != {"A", "B"}]
    if missing or len(parts) != len(adapter.targets):
        raise LayoutError(
            f"{init.path} has starts for {counted(len(parts), 'layer')}, {adapter.where} adapts {len(adapter.targets)}"
            f"{f'; nothing for {missing[0]}' if missing else ''}.\nThey are not of one training run."
        )
    for x, target in targets.items():
        if parts[x]["A"].shape != target.A.shape or parts[x]["B"].shape != target.B.shape:
            raise LayoutError(
                f"{init.path} starts {x} with lora_A {list(parts[x]['A'].shape)}, {adapter.where} has "
                f"{list(target.A.shape)}.\nThey are not of one training run."
            )
    return {x: replace(t, pissa=True, init_A=parts[x]["A"], init_B=parts[x]["B"]) for x, t in targets.items()}


register(Pissa())
