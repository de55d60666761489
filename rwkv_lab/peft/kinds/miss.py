"""MiSS: what the numbers of its block mean, and its files. `rwkv_lab.peft.miss` has the formulas and the layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.layout import Shape
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.peft.adapter import Adapter, InMemory, Target, Values, in_memory
from rwkv_lab.peft.config import AdapterKind, Layers, LoraConfig, register
from rwkv_lab.peft.options import AdapterOptions
from rwkv_lab.peft.settings import check_variant

if TYPE_CHECKING:
    from rwkv_lab.peft.linear import AdaptedLinear
    from rwkv_lab.peft.miss import MissLinear

BATS = {"hf": "bat-hf", "rwkv-peft": "bat-rwkv-peft"}  # as `open_adapter` calls them -> variant
_FILE_PART = re.compile(r"^(?P<layer>.+)\.(?:disha|bone|bone_block|miss_block)(?:\.default)?$")
_FOLDER_PART = re.compile(r"^(?P<layer>.+)\.(?:miss_block|bone_block)(?:\.default)?$")
_BLOCK = "block"  # its only part


@dataclass(frozen=True)
class MissTarget(Target):
    """W changed by a block of numbers by the formula that `rwkv_lab.peft.miss` has for the variant."""

    block: Values
    variant: str

    @property
    def rank(self) -> int:
        return self.block.shape[-1] if self.variant.startswith("bat") else self.block.shape[0]

    @property
    def row_multiple(self) -> int:
        return self.rank if self.variant.startswith("bat") else 1

    @property
    def tensors(self) -> dict[str, Values]:
        return {"miss_block": self.block}

    def settings(self) -> dict[str, float | str]:
        return {"variant": self.variant}

    def misfit(self, shape: Shape) -> str:
        if len(shape) != 2:
            return "a matrix is needed"
        out, inputs = shape
        found, r = list(self.block.shape), self.rank
        if self.variant.startswith("bat"):
            per = out if self.variant == "bat-hf" else inputs
            fits = out % r == inputs % r == 0 and found == [per // r, r, r]
            return "" if fits else f"a block {found}; {self.variant} of rank {r} needs {[per // r, r, r]}"
        columns = found[1] if self.variant == "mini" else out
        if r > inputs:
            return f"a block {found}: its rank is larger than the layer's {inputs} inputs"
        return "" if found == [r, columns] and out % columns == 0 else f"a block {found}; [r, {out}] is needed"

    def adapted_rows(self, residual: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        from rwkv_lab.peft.miss import bat_change

        block = self._block(residual, first_row)
        if self.variant.startswith("bat"):
            return residual + bat_change(residual, block, self.variant)
        return residual + self._repeated(block, residual)

    def restored_rows(self, merged: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """As of `Target`; a bat cannot be undone where I + D has no inverse."""
        block = self._block(merged, first_row)
        if not self.variant.startswith("bat"):
            return merged - self._repeated(block, merged)
        # A tile became T = W (I + D) + D; I + D is the same for all tiles of a block.
        r = self.rank
        eye = torch.eye(r, dtype=block.dtype, device=block.device)
        inverse = torch.linalg.inv(eye + block)
        per_tile = (slice(None), None) if self.variant == "bat-hf" else (None, slice(None))
        tiles = merged.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)
        tiles = (tiles - block[per_tile]) @ inverse[per_tile]
        return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def prepared(self, weight: float, dtype: torch.dtype) -> Self:
        return replace(self, block=in_memory(self.block, weight, dtype))

    def _block(self, like: torch.Tensor, first_row: int) -> torch.Tensor:
        """The part of the block that changes rows `[rows, in]` from first_row on."""
        block, rows = self.block.read().to(like), len(like)
        if self.variant == "bat-hf":
            return block[first_row // self.rank :][: rows // self.rank]
        if self.variant == "bat-rwkv-peft":
            return block
        columns = torch.arange(first_row, first_row + rows, device=block.device) % block.shape[1]
        return block[:, columns]  # [r, rows]

    def _repeated(self, block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        inputs = like.shape[1]
        return block.repeat(-(-inputs // self.rank), 1)[:inputs].T  # [rows, in]


class Miss(AdapterKind):
    method, described = "miss", "a MiSS adapter"
    peft_types, stems = ("MISS", "BONE"), ("miss", "bone")
    folder_settings = frozenset({"r", "init_weights", "mini_r"})
    idle_settings = frozenset({"miss_dropout", "bone_dropout"})

    @property
    def layer_type(self) -> type[MissLinear]:
        from rwkv_lab.peft.miss import MissLinear  # brings torch, which files do not need

        return MissLinear

    def check(self, config: LoraConfig) -> None:
        check_variant(config.miss_variant)
        if config.lora_dropout and "bat" in config.miss_variant:
            raise ParameterError("lora_dropout: the bats of MiSS change the weight itself. Pass dropout 0.")
        if config.use_rslora:
            raise ParameterError("use_rslora goes with method 'lora', not with 'miss'.")

    def new_layer(self, linear: torch.nn.Linear, config: LoraConfig) -> AdaptedLinear:
        from rwkv_lab.peft.miss import MissLinear

        c = config
        return MissLinear.from_linear(linear, c.lora_r, c.miss_variant, c.mini_r, c.lora_dropout, c.adapter_dtype)

    def target(self, layer: MissLinear) -> MissTarget:
        return MissTarget(InMemory(layer.miss_block), layer.variant)

    def trained_layer(self, linear: torch.nn.Linear, target: MissTarget) -> MissLinear:
        from rwkv_lab.peft.miss import MissLinear

        mini_r = target.block.shape[1] if target.variant == "mini" else 1
        dtype = target.block.dtype
        layer = MissLinear.from_linear(linear, target.rank, target.variant, mini_r, adapter_dtype=dtype)
        with torch.no_grad():
            layer.miss_block.copy_(target.block.read())
        return layer

    # In a file of RWKV-PEFT's layout

    def file_part(self, name: str) -> tuple[str, str] | None:
        match = _FILE_PART.match(name)
        return (match["layer"], _BLOCK) if match else None

    def check_note(self, note: dict[str, Any]) -> None:
        """A variant that is missing, or of blocks of another shape, is refused with the blocks."""

    def read_file(
        self, ck: Checkpoint, layers: Layers, note: Mapping[str, Any], options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        options.refuse_for_lora(ck.path, "MiSS")
        variants = {x: _variant(x, parts[_BLOCK], note, ck, options) for x, parts in layers.items()}
        return {x: MissTarget(parts[_BLOCK], variants[x]) for x, parts in layers.items()}, "miss"

    def file_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        targets = _targets(adapter)
        variants = {t.variant for t in targets.values()}
        if variants - {"default", "bat-rwkv-peft"} or len(variants) > 1:
            raise ParameterError(
                f"RWKV-PEFT has no MiSS of the kind {' and '.join(sorted(variants))}: save it to a folder, which\n"
                "becomes one of Hugging Face's peft."
            )
        note = {"method": "miss", "quant": adapter.quant, "variant": variants.pop()}
        return {f"{x}.disha": t.block for x, t in targets.items()} | dict(adapter.full), note

    # In a folder of Hugging Face's peft

    def folder_part(self, name: str) -> tuple[str, str] | None:
        match = _FOLDER_PART.match(name)
        return (match["layer"], _BLOCK) if match else None

    def read_folder(
        self, ck: Checkpoint, config: Mapping[str, Any], layers: Layers, options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        options.refuse_for_lora(ck.path, "MiSS")
        start = config.get("init_weights", True)
        if start not in (True, False, "bat", "mini"):
            raise LayoutError(f"{ck.path}: init_weights {start!r} is not known; true, false, 'bat' and 'mini' are.")
        if start == "bat":
            # MiSS states which bat it means; of Bone, its forerunner, versions differed.
            variant = _bat(ck, "bat-hf" if config["peft_type"] == "MISS" else None, options)
        else:
            options.refuse_other("bat", options.bat, None, ck.path)
            variant = "mini" if start == "mini" else "default"
        targets: dict[str, Target] = {}
        for x, parts in layers.items():
            target = MissTarget(parts[_BLOCK], variant)
            dimensions = 3 if start == "bat" else 2
            if len(target.block.shape) != dimensions or 0 in target.block.shape or target.rank != config.get("r"):
                raise LayoutError(
                    f"{ck.path}: {x} has a block {list(target.block.shape)}; adapter_config.json states rank "
                    f"{config.get('r')!r} and init_weights {start!r}."
                )
            targets[x] = target
        return targets, "miss"

    def folder_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        targets = _targets(adapter)
        variants = {t.variant for t in targets.values()}
        shapes = {(t.rank, t.block.shape[1] if t.variant == "mini" else 1) for t in targets.values()}
        if len(variants) > 1 or "bat-rwkv-peft" in variants or len(shapes) > 1:
            several = " with several ranks" if len(shapes) > 1 else ""
            raise ParameterError(
                f"Hugging Face's peft has no MiSS of the kind {' and '.join(sorted(variants))}{several}.\n"
                "Save it as a .pth or .safetensors, which becomes RWKV-PEFT's layout, or merge it into its base."
            )
        (variant,), ((r, mini_r),) = variants, shapes
        start = {"default": True, "mini": "mini", "bat-hf": "bat"}[variant]
        config = {"peft_type": "MISS", "r": r, "mini_r": mini_r, "miss_dropout": 0.0, "init_weights": start}
        return {f"{x}.miss_block": t.block for x, t in targets.items()}, config


def _targets(adapter: Adapter) -> dict[str, MissTarget]:
    return {x: target for x, target in adapter.targets.items() if isinstance(target, MissTarget)}


def _variant(x: str, block: TensorInfo, note: Mapping[str, Any], ck: Checkpoint, options: AdapterOptions) -> str:
    if len(block.shape) == 3:
        return _bat(ck, note.get("variant"), options)
    if len(block.shape) != 2 or 0 in block.shape:
        raise LayoutError(f"{ck.path}: {x} has a block {list(block.shape)}; two dimensions, or three for a bat, exist.")
    if options.bat is not None:
        raise ParameterError(f"bat was given, and the blocks of {ck.path} have two dimensions: they are no bat.")
    return "default"


def _bat(ck: Checkpoint, found: str | None, options: AdapterOptions) -> str:
    """The variant of a block with three dimensions.

    Args:
        found: in the file.

    Raises:
        ParameterError: neither given nor found, or contradictory.
    """
    if found is not None:
        options.refuse_other("bat", options.bat and BATS[options.bat], found, ck.path)
        return found
    if options.bat is None:
        raise ParameterError(
            f"{ck.path} holds MiSS blocks of the kind 'bat', of which there are two that do not go together:\n"
            'pass bat="hf" (one block per output tile, Hugging Face peft) or bat="rwkv-peft" (one per input tile).'
        )
    return BATS[options.bat]


register(Miss())
