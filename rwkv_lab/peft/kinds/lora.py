"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732) in models and in files of both layouts.

Files of PiSSA have the same parts, so they are read here too; what PiSSA does otherwise is in `pissa.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.patterns import is_quick
from rwkv_lab.peft.adapter import Adapter, InMemory, Target, Values
from rwkv_lab.peft.config import AdapterKind, Layers, LoraConfig, register
from rwkv_lab.peft.lora_target import MAGNITUDE, LoraTarget, as_plain_lora, lora_targets
from rwkv_lab.peft.options import AdapterOptions
from rwkv_lab.peft.settings import lora_scaling
from rwkv_lab.text import counted

if TYPE_CHECKING:
    from rwkv_lab.peft.linear import AdaptedLinear, LoraLinear

_FILE_PART = re.compile(
    r"^(?P<layer>.+)\.(?P<part>(?:init_)?lora_[AB]|lora_(?:down|up|magnitude_vector)|alpha)(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
_AS_OF_KOHYA = {"lora_down": "lora_A", "lora_up": "lora_B"}
# kohya's scripts and LyCORIS write dots of a layer's name as underscores, after what they call the network.
_FLAT = re.compile(r"^(?:lora|lycoris)_(?:[a-z0-9]+_)??blocks_(?P<layer>\d+)_(?P<part>att|ffn)_(?P<name>\w+)$")
_FOLDER_PART = re.compile(
    r"^(?P<layer>.+)\.(?P<part>lora_[AB](?=.*\.weight$)|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # they leave the base as it is


class Lora(AdapterKind):
    method, described = "lora", "a LoRA"
    takes_alpha = True
    peft_types, stems = ("LORA",), ("lora",)
    folder_settings = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})
    folder_settings |= {"use_dora"}
    idle_settings = frozenset({"lora_dropout", "qalora_group_size", "eva_config"})

    @property
    def layer_type(self) -> type[LoraLinear]:
        from rwkv_lab.peft.linear import LoraLinear  # brings torch, which files do not need

        return LoraLinear

    def check(self, config: LoraConfig) -> None:
        lora_scaling(config.lora_alpha, config.lora_r)

    def new_layer(self, linear: torch.nn.Linear, config: LoraConfig) -> AdaptedLinear:
        from rwkv_lab.peft.linear import LoraLinear

        c = config
        return LoraLinear.from_linear(linear, c.lora_r, c.lora_alpha, c.lora_dropout, c.use_rslora, c.adapter_dtype)

    def target(self, layer: LoraLinear) -> LoraTarget:
        return LoraTarget(InMemory(layer.lora_A), InMemory(layer.lora_B), layer.lora_alpha, layer.use_rslora)

    def trained_layer(self, linear: torch.nn.Linear, target: LoraTarget) -> LoraLinear:
        t = target
        if t.magnitude is not None:
            raise ParameterError("it is DoRA, which is merged here and not run or trained; merge it first")
        from rwkv_lab.peft.linear import LoraLinear

        layer = LoraLinear.from_linear(linear, t.rank, t.alpha, use_rslora=t.use_rslora, adapter_dtype=t.A.dtype)
        return with_values(layer, target)

    # In a file of RWKV-PEFT's layout

    def file_part(self, name: str) -> tuple[str, str] | None:
        match = _FILE_PART.match(name)
        if match is None:
            return None
        flat = _FLAT.match(match["layer"])
        layer = f"blocks.{flat['layer']}.{flat['part']}.{flat['name']}" if flat else match["layer"]
        return layer, _AS_OF_KOHYA.get(match["part"], match["part"])

    def check_note(self, note: dict[str, Any]) -> None:
        lora_scaling(note["alpha"], 1)
        note["use_rslora"] = bool(note["use_rslora"])

    def read_file(
        self, ck: Checkpoint, layers: Layers, note: Mapping[str, Any], options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        has_start = _has_start(ck, layers)
        pissa = _is_pissa(ck, note, options, has_start)
        alpha, use_rslora = options.alpha, bool(options.use_rslora)
        stated = {x: _stated_alpha(ck, parts["alpha"]) for x, parts in layers.items() if "alpha" in parts}
        if len(stated) == len(layers):  # else the one that is given is for the others
            _refuse_other_alpha(ck, stated, options)
        if note:
            alpha, use_rslora = note["alpha"], note["use_rslora"]
            options.refuse_other("alpha", options.alpha, alpha, ck.path)
            options.refuse_other("use_rslora", options.use_rslora, use_rslora, ck.path)
        elif not stated and pissa and (alpha is not None or use_rslora):
            raise ParameterError("alpha is not used by PiSSA in RWKV-PEFT's layout: its scale is 1; leave it out.")
        elif not pissa and alpha is None and len(stated) < len(layers):
            where = f" of {next(x for x in layers if x not in stated)}" if stated else ""
            raise ParameterError(
                f"{ck.path} does not state its alpha{where}, which must be known: pass alpha= (16, 32, 64, …).\n"
                "If it is PiSSA, pass pissa_init= or residual_base=True instead."
            )
        targets: dict[str, Target] = {}
        for x, parts in layers.items():
            A, B = parts["lora_A"], parts["lora_B"]
            rank = A.shape[0] if A.shape else 0
            start = parts.get("init_lora_A"), parts.get("init_lora_B")
            own = stated.get(x, (rank or 1) if alpha is None else alpha)
            targets[x] = LoraTarget(A, B, own, use_rslora, pissa, *start, magnitude=parts.get(MAGNITUDE))
        return targets, "pissa" if pissa else "lora"

    def file_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        scalings = {(t.alpha, t.use_rslora) for t in lora_targets(adapter).values()}
        if len(scalings) > 1:
            raise ParameterError(
                f"alpha differs between layers ({sorted(a for a, _ in scalings)[:4]}), and a file in RWKV-PEFT's\n"
                "layout has one for all: save it to a folder, which becomes one of Hugging Face's peft."
            )
        return adapter.tensors(), lora_note(adapter.method, adapter.quant, *scalings.pop())

    # In a folder of Hugging Face's peft

    def folder_part(self, name: str) -> tuple[str, str] | None:
        match = _FOLDER_PART.match(name)
        return (match["layer"], match["part"]) if match else None

    def read_folder(
        self, ck: Checkpoint, config: Mapping[str, Any], layers: Layers, options: AdapterOptions
    ) -> tuple[dict[str, Target], str]:
        pissa = _is_pissa_folder(ck, config, options)
        use_rslora = config.get("use_rslora") or False
        if not isinstance(use_rslora, bool):
            raise LayoutError(f"{ck.path}: use_rslora is {use_rslora!r}; true or false is expected.")
        options.refuse_other("use_rslora", options.use_rslora, use_rslora, ck.path)
        alpha = _number(ck, "lora_alpha", config.get("lora_alpha"))
        options.refuse_other("alpha", options.alpha, alpha, ck.path)
        targets: dict[str, Target] = {}
        for x, parts in layers.items():
            for here, missing in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
                if missing not in parts:
                    raise LayoutError(f"{x}.{here} is there, {x}.{missing} is not; {ck.path} is incomplete.")
            A = parts["lora_A"]
            # Their patterns are of the names as they were in training, with what wrapped the model then.
            called = A.name.removeprefix("base_model.model.").partition(".lora_A")[0]
            rank = _of_layer(ck, config, "rank_pattern", called, config.get("r"))
            if not A.shape or rank != A.shape[0]:
                raise LayoutError(
                    f"{ck.path}: {x}.lora_A is {list(A.shape)}, adapter_config.json states rank {rank!r}."
                )
            alpha = _number(ck, "lora_alpha", _of_layer(ck, config, "alpha_pattern", called, config.get("lora_alpha")))
            if bool(config.get("use_dora")) != (MAGNITUDE in parts):
                states = "states use_dora" if config.get("use_dora") else "does not state use_dora"
                there = "there" if MAGNITUDE in parts else "not there"
                raise LayoutError(f"{ck.path} {states}, and {x}.{MAGNITUDE} is {there}: save or download it again.")
            targets[x] = LoraTarget(A, parts["lora_B"], alpha, use_rslora, pissa, magnitude=parts.get(MAGNITUDE))
        return targets, "pissa" if pissa else "lora"

    def folder_content(self, adapter: Adapter) -> tuple[dict[str, Values], dict[str, Any]]:
        targets = {x: as_plain_lora(t) for x, t in lora_targets(adapter).items()}
        with_lengths = [x for x, t in targets.items() if t.magnitude is not None]
        if with_lengths and len(with_lengths) < len(targets):
            other = next(x for x in targets if x not in with_lengths)
            raise ParameterError(
                f"{adapter.where}: {with_lengths[0]} is DoRA and {other} is not; peft has one way for all of them.\n"
                "Save it as a .pth or .safetensors."
            )
        ranks, alphas = {x: t.rank for x, t in targets.items()}, {x: t.alpha for x, t in targets.items()}
        r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        if len({t.use_rslora for t in targets.values()}) > 1:
            raise ParameterError("Some layers are scaled as rsLoRA and some are not; peft has one way for all of them.")
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "use_rslora": next(iter(targets.values())).use_rslora,
            "rank_pattern": {x.replace(".", r"\."): n for x, n in ranks.items() if n != r},
            "alpha_pattern": {x.replace(".", r"\."): a for x, a in alphas.items() if a != alpha},
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "use_dora": bool(with_lengths),
        }
        parts = [(x, part, v) for x, t in targets.items() for part, v in t.tensors.items()]
        return {f"{x}.{part}" + ("" if part == MAGNITUDE else ".weight"): v for x, part, v in parts}, config


def with_values(layer: LoraLinear, target: LoraTarget) -> LoraLinear:
    """The layer, with A and B as they are in the target."""
    with torch.no_grad():
        layer.lora_A.copy_(target.A.read())
        layer.lora_B.copy_(target.B.read())
    return layer


def lora_note(method: str, quant: str | None, alpha: float, use_rslora: bool = False) -> dict[str, Any]:
    """What a file in RWKV-PEFT's layout states beside the tensors of "lora" or "pissa".

    Args:
        quant: how training stored the base; None where that is not known.
    """
    return {"method": method, "quant": quant, "alpha": alpha, "use_rslora": use_rslora}


def _has_start(ck: Checkpoint, layers: Layers) -> bool:
    """Whether the file holds what its layers started from; refuses one that lacks halves.

    Raises:
        LayoutError: names what is missing.
    """
    for x, parts in layers.items():
        wanted = {"lora_A", "lora_B"} | ({"init_lora_A", "init_lora_B"} if any("init" in p for p in parts) else set())
        if wanted - set(parts):
            has, lacks = sorted(parts)[0], sorted(wanted - set(parts))[0]
            raise LayoutError(f"{x}.{has} is there, {x}.{lacks} is not; {ck.path} is incomplete.")
    started = ["init_lora_A" in parts for parts in layers.values()]
    if any(started) and not all(started):
        raise LayoutError(f"{ck.path} has a start for {sum(started)} of its {counted(len(started), 'layer')} only.")
    return any(started)


def _stated_alpha(ck: Checkpoint, info: TensorInfo) -> float:
    """The alpha that stands beside a pair of halves, as a tensor of one value.

    Raises:
        LayoutError: no positive number.
    """
    value = float(info.read()) if info.numel == 1 and not info.dtype.is_complex else math.nan
    if not 0 < value < math.inf:
        raise LayoutError(f"{ck.path}: {info.name} is {value:g} {list(info.shape)}; an alpha is one positive number.")
    return value


def _refuse_other_alpha(ck: Checkpoint, stated: Mapping[str, float], options: AdapterOptions) -> None:
    """Refuse an alpha that was given beside others that the file states for all of its matrices."""
    other = next((x for x, value in stated.items() if options.alpha not in (None, value)), None)
    if other is not None:
        raise ParameterError(
            f"alpha={options.alpha!r} was given, {ck.path} states {stated[other]:g} in {other}.alpha; leave it out."
        )


def _is_pissa(ck: Checkpoint, note: Mapping[str, Any], options: AdapterOptions, has_start: bool) -> bool:
    """Of a file, by its note, its parts and the options.

    Raises:
        ParameterError: a start that is missing, or that is given though there is none or one already.
    """
    pissa = note["method"] == "pissa" if note else has_start or options.states_pissa
    if options.states_pissa and not pissa:
        raise ParameterError(f"{ck.path} is {note['method']} by its note, not PiSSA; leave out what PiSSA needs.")
    if has_start and options.states_pissa:
        raise ParameterError(f"{ck.path} holds what it started from; leave out pissa_init and residual_base.")
    if pissa and not has_start and not options.states_pissa:
        raise ParameterError(
            f"{ck.path} is PiSSA: pass pissa_init= (what it started from, with the original base), or\n"
            "residual_base=True where the base is what the SVD left over."
        )
    return pissa


def _is_pissa_folder(ck: Checkpoint, config: Mapping[str, Any], options: AdapterOptions) -> bool:
    """Of a folder, by its configuration and the options.

    Raises:
        LayoutError: another start that changes the base.
        ParameterError: as `_is_pissa`.
    """
    start = config.get("init_lora_weights", True)
    pissa = isinstance(start, str) and start.startswith("pissa")
    if not pissa and start not in _PLAIN_STARTS:
        raise LayoutError(
            f"{ck.path}: init_lora_weights {start!r} changes the base before training. Save the adapter again with\n"
            "peft's path_initial_model_for_weight_conversion, or merge it there."
        )
    if pissa and not options.states_pissa:
        raise ParameterError(
            f"{ck.path} is PiSSA: pass pissa_init= (the folder saved before training, with the original base), or\n"
            "residual_base=True where the base is what the SVD left over."
        )
    if options.states_pissa and not pissa:
        raise ParameterError(f"{ck.path} is a plain LoRA by its configuration; leave out pissa_init and residual_base.")
    return pissa


def _of_layer(ck: Checkpoint, config: Mapping[str, Any], patterns: str, layer: str, otherwise: Any) -> Any:
    """The value for a layer: that of the first pattern, a regular expression, that its name ends in."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise LayoutError(f"{ck.path}: {patterns} is {table!r}, a table is expected.")
    for pattern, value in table.items():
        if not is_quick(pattern):
            raise LayoutError(
                f"{ck.path}: {patterns} has {pattern!r:.80}, a regular expression that may take too long. "
                "Name the layers."
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as e:
            raise LayoutError(f"{ck.path}: {patterns} has {pattern!r}, which is no regular expression ({e}).") from e
    return otherwise


def _number(ck: Checkpoint, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ParameterError(f"{ck.path}: adapter_config.json has {name} {value!r}; it must be a positive number.")
    return value


register(Lora())
