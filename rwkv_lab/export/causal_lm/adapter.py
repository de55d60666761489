"""LoRA adapters in folders of peft, for models of Hugging Face: every setting is understood, or refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from rwkv_lab.errors import LayoutError
from rwkv_lab.patterns import is_quick

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<kind>weight|bias))?"
)
_STRANGE = re.compile(r"lora_|token_adapter|original_module|trainable_tokens")
# Settings that are read here, and those that do not change what a trained adapter does to a model.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
_READ |= {"init_lora_weights", "modules_to_save", "lora_bias", "bias", "base_model_name_or_path", "auto_mapping"}
_IDLE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode"}
_IDLE |= {"task_type", "revision", "peft_version", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # of A and B, which leave the base as it is
_NOTHING = (None, False, "none", "", [], {})


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to one layer: scale · B @ A to its weight.

    transposed: it is added to the weight's transpose: of an embedding, `[V,H]`, or of a layer that stores `[in,out]`.
    magnitude: of DoRA, the length that each row of the sum is given.
    bias: what is added to the layer's bias, times scale.
    """

    A: TensorInfo
    B: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is for."""
        rows, columns = self.B.shape[0], self.A.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class CausalLmAdapter:
    """An open adapter.

    layers: by the name of the layer in the model.
    whole: tensors that take the place of the model's, by name.
    own: those of `whole` that are copies of their own (`modules_to_save`): a tied head does not follow them.
    """

    path: Path
    ck: Checkpoint
    config: dict[str, Any]
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    own: frozenset[str] = frozenset()

    @property
    def base(self) -> str:
        """What the adapter calls the model that it was trained on: a path or a name; "" where it states none."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) else ""


def open_adapter(path: Path) -> CausalLmAdapter:
    """Open a folder with adapter_config.json and its weights.

    Raises:
        ParameterError: nothing is there.
        LayoutError: no adapter, another kind than LoRA, or a setting whose effect on the weights is not known here.
        CorruptFileError, UnsafeFileError: as `open_checkpoint`.
    """
    ck = open_checkpoint(path)
    try:
        return _read(path, ck)
    except BaseException:
        ck.close()
        raise


def _read(path: Path, ck: Checkpoint) -> CausalLmAdapter:
    config = ck.adapter_config
    if config is None:
        raise LayoutError(f"{path} is no adapter of peft: it has no adapter_config.json.")
    _refuse_unknown(path, config)
    parts, whole, own = _sorted(path, ck, config)
    if not parts and not whole:
        raise LayoutError(f"{path} holds no tensor of an adapter.")
    layers = {layer: _layer(path, config, layer, found) for layer, found in parts.items()}
    return CausalLmAdapter(path, ck, config, layers, whole, frozenset(own))


def _refuse_unknown(path: Path, config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise LayoutError(
            f"{path}: peft_type is {peft_type!r}; LORA is merged here. Merge it with peft (merge_and_unload), and\n"
            "export the model that this gives."
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise LayoutError(
            f"{path}: init_lora_weights is {start!r}, which changes the base before training: it is no adapter of\n"
            "the base itself. Save it as a plain LoRA (path_initial_model_for_weight_conversion of save_pretrained)."
        )
    known = _READ | _IDLE
    for name, value in config.items():
        if name == "loftq_config" and start != "loftq":
            continue
        if name == "ensure_weight_tying" and not _touches_tied(config):
            continue
        if name not in known and value not in _NOTHING:
            raise LayoutError(
                f"{path}: adapter_config.json sets {name} to {str(value)[:60]!r}, which is not merged here.\n"
                "Merge it with peft (merge_and_unload), and export the model that this gives."
            )


def _touches_tied(config: Mapping[str, Any]) -> bool:
    named = [*(config.get("modules_to_save") or ()), *(config.get("target_modules") or ())]
    return isinstance(config.get("target_modules"), str) or any("embed" in str(n) or "head" in str(n) for n in named)


Parts = dict[str, dict[str, TensorInfo]]


def _sorted(path: Path, ck: Checkpoint, config: Mapping[str, Any]) -> tuple[Parts, dict[str, TensorInfo], set[str]]:
    """(parts by layer, whole tensors by their names in the model, those of them that are copies of their own)."""
    parts: Parts = {}
    whole: dict[str, TensorInfo] = {}
    own: set[str] = set()
    saved = config.get("modules_to_save") or ()
    for name, info in ck.stored.items():
        short = name.removeprefix(_PREFIX)
        if found := _PART.fullmatch(short):
            part, here = (
                found["part"] + ("_bias" if found["kind"] == "bias" else ""),
                parts.setdefault(found["layer"], {}),
            )
            if part in here:
                raise LayoutError(f"{path}: {here[part].name} and {name} are the same part of a layer.")
            here[part] = info
            continue
        if _STRANGE.search(short):
            raise LayoutError(f"{path}: {name} is no part of a LoRA that is known here.")
        module = short.rpartition(".")[0]
        plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", short)
        whole[plain] = info
        if ".base_layer." not in short and any(module == m or module.endswith(f".{m}") for m in saved):
            own.add(plain)
    return parts, whole, own


def _layer(path: Path, config: Mapping[str, Any], layer: str, parts: dict[str, TensorInfo]) -> LoraLayer:
    embeds = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise LayoutError(f"{path}: {layer} has no {missing[0]}; save or copy the adapter again.")
    A, B = (parts[name] for name in names)
    rank = _of_layer(path, config, "rank_pattern", layer, "r")
    alpha = _of_layer(path, config, "alpha_pattern", layer, "lora_alpha")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        raise LayoutError(f"{path}: {layer} has lora_A {list(A.shape)} and lora_B {list(B.shape)}: no product of both.")
    if rank != A.shape[0]:
        raise LayoutError(f"{path}: {layer} has rank {A.shape[0]}; adapter_config.json states {rank:g}.")
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        states = "states" if config.get("use_dora") else "does not state"
        raise LayoutError(
            f"{path}: adapter_config.json {states} use_dora, and {layer}.lora_magnitude_vector is "
            f"{'there' if magnitude is not None else 'not there'}: save or copy it again."
        )
    transposed = embeds or bool(config.get("fan_in_fan_out"))
    if magnitude is not None and transposed:
        kind = "an embedding" if embeds else "a layer that stores [in, out]"
        raise LayoutError(f"{path}: use_dora on {layer}, {kind}, is not merged here. Merge it with peft.")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraLayer(A, B, scale, transposed, magnitude, parts.get("lora_B_bias"))


def _of_layer(path: Path, config: Mapping[str, Any], patterns: str, layer: str, default: str) -> float:
    """A number of a layer: of the first pattern that its name ends in, or the one for all."""
    by_pattern = config.get(patterns) or {}
    if not isinstance(by_pattern, dict):
        raise LayoutError(f"{path}: {patterns} is {by_pattern!r}; names and numbers are expected.")
    if slow := next((k for k in by_pattern if not is_quick(k)), None):
        raise LayoutError(
            f"{path}: {patterns} has {slow!r:.80}, a regular expression that may take too long. Name the layers."
        )
    try:
        key = next((k for k in by_pattern if re.match(rf"(.*\.)?({k})$", layer)), None)
    except re.error as e:
        raise LayoutError(f"{path}: {patterns} has a key that is no regular expression: {e}.") from e
    value = config.get(default) if key is None else by_pattern[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise LayoutError(f"{path}: {default} of {layer} is {value!r}; a number above 0 is expected.")
    return float(value)
