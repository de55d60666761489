"""The layout of Hugging Face's peft: a folder with `adapter_config.json` and `adapter_model.safetensors`.

LoRA (with rank and alpha per layer, rsLoRA), PiSSA, MiSS and its forerunner Bone. Newer RWKV-PEFT saves the same.
Settings that change what an adapter does and are not known here are refused, never passed over.
"""

import json
import math
import os
import re
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint, TensorInfo, write_checkpoint
from rwkv_lab.checkpoint.atomic import atomic_folder, check_target
from rwkv_lab.errors import CorruptFileError, LayoutError, OutputError, ParameterError
from rwkv_lab.peft.adapter import Adapter, InMemory, LoraTarget, MissTarget, Values
from rwkv_lab.peft.asked import Asked
from rwkv_lab.peft.quantised import QUANTS

PREFIX = "base_model.model."
QUANT = "rwkv_lab.quant"  # a note in the safetensors' header, where peft looks for nothing
_PART = re.compile(
    r"^(?P<layer>.+)\.(?:(?P<lora>lora_[AB])(?:\.default)?\.weight|(?P<miss>miss_block|bone_block)(?:\.default)?)$"
)
# Settings that are read here, and those that say nothing about what a trained adapter does.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_READ |= {"init_weights", "mini_r", "target_modules", "modules_to_save"}
_IDLE = {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
_IDLE |= {"lora_dropout", "miss_dropout", "bone_dropout", "exclude_modules", "layers_to_transform", "layers_pattern"}
_IDLE |= {"megatron_core", "qalora_group_size", "eva_config", "runtime_config", "ensure_weight_tying"}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # they leave the base as it is
_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a folder that is written here
_TYPES = {"LORA": "lora", "MISS": "miss", "BONE": "miss"}


def read(ck: Checkpoint, asked: Asked) -> Adapter:
    """The adapter in an open folder.

    Raises: as `open_adapter`.
    """
    config = ck.adapter_config
    kind = _TYPES.get(config.get("peft_type"))
    if kind is None:
        raise LayoutError(f"{ck.path}: peft_type {config.get('peft_type')!r} is not read; {', '.join(_TYPES)} are.")
    unknown = [k for k, v in config.items() if k not in _READ | _IDLE and v not in (None, False, "none", "", [], {})]
    if unknown:
        raise LayoutError(
            f"{ck.path}: adapter_config.json sets {unknown[0]} to {config[unknown[0]]!r}, which changes what the\n"
            "adapter does in a way that is not known here. Merge it with Hugging Face's peft instead."
        )
    layers, full = _sorted(ck)
    if kind == "lora":
        targets, method = _lora_targets(ck, asked, layers)
    else:
        asked.check_lora_only(ck.path, "MiSS")
        targets, method = _miss_targets(ck, asked, layers), "miss"
    return Adapter(method, targets, full, layout="hf", quant=_quant(ck), named_targets=_named_targets(ck))


def _quant(ck: Checkpoint) -> str | None:
    """How training stored the base; None in folders of others, who do not say it."""
    quant = ck.metadata.get(QUANT)
    if quant is not None and quant not in QUANTS:
        raise CorruptFileError(f"{ck.path}: its note {QUANT} is {quant!r}; there are: {', '.join(QUANTS)}.")
    return quant


def _sorted(ck: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    layers: dict[str, dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    for name, info in ck.info.items():
        bare = name.removeprefix(PREFIX)
        match = _PART.match(bare)
        if match:
            parts, part = layers.setdefault(match["layer"], {}), match["lora"] or "miss"
            if part in parts:
                raise LayoutError(f"{ck.path}: {parts[part].name} and {name} are one part of the adapter, said twice.")
            parts[part] = info
        elif re.search(r"(^|[._])(lora|miss|bone)_", bare):
            raise LayoutError(f"{ck.path}: {name} is a part of an adapter that is not known here.")
        elif bare in full:
            raise LayoutError(f"{ck.path}: {full[bare].name} and {name} are one tensor, said twice.")
        else:
            full[bare] = info
    return layers, full


def _named_targets(ck: Checkpoint) -> tuple[str, ...]:
    """Layers that the configuration names one by one, where it says nothing else about them."""
    config = ck.adapter_config
    named = config.get("target_modules")
    if isinstance(named, str):
        return ()  # a regular expression, or a word for many
    if named is not None and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
        raise LayoutError(f"{ck.path}: target_modules is {named!r}, a list of names is expected.")
    if any(config.get(k) for k in ("layers_to_transform", "exclude_modules")):
        return ()
    return tuple(named or ())


def _lora_targets(ck: Checkpoint, asked: Asked, layers) -> tuple[dict[str, LoraTarget], str]:
    config = ck.adapter_config
    start = config.get("init_lora_weights", True)
    pissa = isinstance(start, str) and start.startswith("pissa")
    if not pissa and start not in _PLAIN_STARTS:
        raise LayoutError(
            f"{ck.path}: init_lora_weights {start!r} changes the base before training. Save the adapter again with\n"
            "peft's path_initial_model_for_weight_conversion, or merge it there."
        )
    if pissa and not asked.says_pissa:
        raise ParameterError(
            f"{ck.path} is PiSSA: say pissa_init= (the folder saved before training, with the original base), or\n"
            "residual_base=True where the base is what the SVD left over."
        )
    if asked.says_pissa and not pissa:
        raise ParameterError(f"{ck.path} says that it is a plain LoRA; leave out pissa_init and residual_base.")
    use_rslora = config.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise LayoutError(f"{ck.path}: use_rslora is {use_rslora!r}; true or false is expected.")
    asked.agree("use_rslora", asked.use_rslora, use_rslora, ck.path)
    alpha = _number(ck, "lora_alpha", config.get("lora_alpha"))
    asked.agree("alpha", asked.alpha, alpha, ck.path)
    targets = {}
    for x, parts in layers.items():
        for here, missing in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if missing not in parts:
                raise LayoutError(f"{x}.{here} is there, {x}.{missing} is not; {ck.path} is incomplete.")
        A = parts["lora_A"]
        rank = _of_layer(ck, "rank_pattern", x, config.get("r"))
        if not A.shape or rank != A.shape[0]:
            raise LayoutError(f"{ck.path}: {x}.lora_A is {list(A.shape)}, adapter_config.json says rank {rank!r}.")
        alpha = _number(ck, "lora_alpha", _of_layer(ck, "alpha_pattern", x, config.get("lora_alpha")))
        targets[x] = LoraTarget(A, parts["lora_B"], alpha, use_rslora, pissa)
    return targets, "pissa" if pissa else "lora"


def _of_layer(ck: Checkpoint, patterns: str, layer: str, otherwise):
    """The value for a layer: that of the first pattern, a regular expression, that its name ends in."""
    table = ck.adapter_config.get(patterns) or {}
    if not isinstance(table, dict):
        raise LayoutError(f"{ck.path}: {patterns} is {table!r}, a table is expected.")
    for pattern, value in table.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as e:
            raise LayoutError(f"{ck.path}: {patterns} has {pattern!r}, which is no regular expression ({e}).") from e
    return otherwise


def _number(ck: Checkpoint, what: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ParameterError(f"{ck.path}: adapter_config.json has {what} {value!r}; it must be a positive number.")
    return value


def _miss_targets(ck: Checkpoint, asked: Asked, layers) -> dict[str, MissTarget]:
    config = ck.adapter_config
    start = config.get("init_weights", True)
    if start not in (True, False, "bat", "mini"):
        raise LayoutError(f"{ck.path}: init_weights {start!r} is not known; true, false, 'bat' and 'mini' are.")
    if start == "bat":
        # MiSS says which bat it means; of Bone, its forerunner, versions differed.
        variant = asked.choose_bat(ck.path, "bat-hf" if config["peft_type"] == "MISS" else None)
    else:
        asked.agree("bat", asked.bat, None, ck.path)
        variant = "mini" if start == "mini" else "default"
    targets = {}
    for x, parts in layers.items():
        if set(parts) != {"miss"}:
            raise LayoutError(f"{ck.path}: {x} has a {sorted(parts)[0]}, which is no part of MiSS.")
        target = MissTarget(parts["miss"], variant)
        dimensions = 3 if start == "bat" else 2
        if len(target.block.shape) != dimensions or 0 in target.block.shape or target.rank != config.get("r"):
            raise LayoutError(
                f"{ck.path}: {x} has a block {list(target.block.shape)}; adapter_config.json says rank "
                f"{config.get('r')!r} and init_weights {start!r}."
            )
        targets[x] = target
    return targets


def check_folder(folder: Path) -> None:
    """Refuse to replace what is no folder, or one that holds anything but an adapter: all of it would be gone.

    Raises:
        OutputError: says what is there.
    """
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is no folder of its own, so an adapter folder cannot take its place; remove it")
    other = sorted(p.name for p in folder.iterdir() if p.name not in _FILES) if folder.exists() else []
    if other:
        raise OutputError(
            f"{folder} holds more than an adapter ({', '.join(other[:3])}), which would be gone.\n"
            "Choose another folder, or move that elsewhere."
        )


def write(adapter: Adapter, folder: Path, overwrite: bool) -> None:
    """Write the folder, whole or not at all.

    Raises:
        ParameterError: as `written`.
        OutputError: the folder exists (unless `overwrite`), holds more than an adapter or cannot be written.
    """
    check_target(folder, overwrite)
    check_folder(folder)
    parts, settings = written(adapter)
    tensors = {f"{PREFIX}{name}": values.read() for name, values in parts.items()}
    notes = {} if adapter.quant is None else {QUANT: adapter.quant}
    text = json.dumps(dict(sorted(settings.items())), indent=2) + "\n"
    with atomic_folder(folder, overwrite) as temporary:
        write_checkpoint(temporary / "adapter_model.safetensors", tensors, notes)
        with open(temporary / "adapter_config.json", "x") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())


def written(adapter: Adapter) -> tuple[dict[str, Values], dict]:
    """(tensors by name without `PREFIX`, settings) of a folder in this layout.

    Raises:
        ParameterError: an adapter that peft has no words for.
    """
    if adapter.method == "pissa" and adapter.quant not in (None, "none"):
        raise ParameterError(
            f"PiSSA on a base in {adapter.quant}: what was rounded is the base without PiSSA's start, and a folder of\n"
            "Hugging Face's peft cannot say so. Save it as a .pth or .safetensors, from which it can be merged."
        )
    parts, config = _miss_config(adapter) if adapter.method == "miss" else _lora_config(adapter)
    shared = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": _whole_modules(adapter) or None,
        "revision": None,
        "target_modules": list(adapter.targets),
        "task_type": None,
    }
    return parts | dict(adapter.full), shared | config


def _whole_modules(adapter: Adapter) -> list[str]:
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in adapter.full))
    bare = next((n for n in adapter.full if not re.search(r"(^|\.)(emb|head|ln\w*)\.(weight|bias)$", n)), None)
    if bare is not None:
        raise ParameterError(
            f"{bare} is trained whole, and a folder of Hugging Face's peft holds whole modules only (emb, head, ln*).\n"
            "Save it as a .pth or .safetensors, which becomes RWKV-PEFT's layout."
        )
    return modules


def _lora_config(adapter: Adapter) -> tuple[dict[str, Values], dict]:
    if adapter.residual_base:
        raise ParameterError(
            f"{adapter.where} is PiSSA without what it started from: saved like this it would turn the original\n"
            "model into something else. Open it with pissa_init=."
        )
    targets = {x: _as_plain_lora(t) for x, t in adapter.targets.items()}
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
    }
    return {f"{x}.{part}.weight": v for x, t in targets.items() for part, v in t.tensors.items()}, config


def _as_plain_lora(target: LoraTarget) -> LoraTarget:
    """The LoRA of twice the rank that does to the original weight what PiSSA does: B A - B₀A₀ as one product."""
    if target.init_A is None:
        return target
    A = torch.cat([target.A.read(), target.init_A.read()])
    B = torch.cat([target.B.read(), -target.init_B.read()], dim=1)
    # The scaling stays what it was: alpha / r, or alpha / sqrt(r).
    alpha = target.alpha * (math.sqrt(2) if target.use_rslora else 2)
    return LoraTarget(InMemory(A), InMemory(B), alpha, target.use_rslora)


def _miss_config(adapter: Adapter) -> tuple[dict[str, Values], dict]:
    variants = {t.variant for t in adapter.targets.values()}
    shapes = {(t.rank, t.block.shape[1] if t.variant == "mini" else 1) for t in adapter.targets.values()}
    if len(variants) > 1 or "bat-rwkv-peft" in variants or len(shapes) > 1:
        raise ParameterError(
            f"Hugging Face's peft has no MiSS of the kind {' and '.join(sorted(variants))} with "
            f"{'several ranks' if len(shapes) > 1 else 'one rank'}.\n"
            "Save it as a .pth or .safetensors, which becomes RWKV-PEFT's layout."
        )
    (variant,), ((r, mini_r),) = variants, shapes
    start = {"default": True, "mini": "mini", "bat-hf": "bat"}[variant]
    config = {"peft_type": "MISS", "r": r, "mini_r": mini_r, "miss_dropout": 0.0, "init_weights": start}
    return {f"{x}.miss_block": t.block for x, t in adapter.targets.items()}, config
