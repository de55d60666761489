"""The layout of Hugging Face's peft: a folder with `adapter_config.json` and `adapter_model.safetensors`.

LoRA (with rank and alpha per layer, rsLoRA), PiSSA, MiSS and its forerunner Bone. Newer RWKV-PEFT saves the same.
Settings that change what an adapter does and are not known here are refused, never passed over.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo, write_checkpoint
from rwkv_lab.checkpoint.atomic import atomic_folder, check_target
from rwkv_lab.checkpoint.origin import ORIGIN
from rwkv_lab.errors import CorruptFileError, LayoutError, OutputError, ParameterError
from rwkv_lab.peft.adapter import Adapter, Values
from rwkv_lab.peft.config import ADAPTER_KINDS, AdapterKind
from rwkv_lab.peft.options import AdapterOptions
from rwkv_lab.peft.peft_settings import contradictions, listed
from rwkv_lab.peft.settings import QUANTS

PREFIX = "base_model.model."
QUANT = "rwkv_lab.quant"  # a note in the safetensors' header, where peft looks for nothing
# Settings that are read here, and those without effect on what a trained adapter does; kinds have more of both.
_READ = {"peft_type", "target_modules", "modules_to_save"}
_IDLE = {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
_IDLE |= {"exclude_modules", "layers_to_transform", "layers_pattern"}
_IDLE |= {"megatron_core", "runtime_config", "ensure_weight_tying"}
_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a folder that is written here


def read(ck: Checkpoint, options: AdapterOptions) -> Adapter:
    """The adapter in an open folder.

    Raises: as `open_adapter`.
    """
    config = ck.adapter_config or {}
    kind = _kind(ck, config)
    layers, full = _sorted(ck, kind)
    targets, method = kind.read_folder(ck, config, layers, options)
    origin, named = ck.metadata.get(ORIGIN), _named_targets(ck, config)
    notes = tuple(contradictions(config, list(targets), list(full), ck.names_in_file))
    return Adapter(
        method, targets, full, layout="hf", quant=_quant(ck), origin=origin, named_targets=named, notes=notes
    )


def _kind(ck: Checkpoint, config: Mapping[str, Any]) -> AdapterKind:
    """By the configuration, all settings of which must be known.

    Raises:
        LayoutError: another kind, or a setting that may change what the adapter does.
    """
    types = {name: kind for kind in ADAPTER_KINDS.values() for name in kind.peft_types}
    kind = types.get(str(config.get("peft_type")))
    if kind is None:
        raise LayoutError(f"{ck.path}: peft_type {config.get('peft_type')!r} is not read; {', '.join(types)} are.")
    known = set().union(_READ, _IDLE, *(k.folder_settings | k.idle_settings for k in ADAPTER_KINDS.values()))
    unknown = [k for k, v in config.items() if k not in known and v not in (None, False, "none", "", [], {})]
    if unknown:
        raise LayoutError(
            f"{ck.path}: adapter_config.json sets {unknown[0]} to {config[unknown[0]]!r}, which changes what the\n"
            "adapter does in a way that is not known here. Merge it with Hugging Face's peft instead."
        )
    return kind


def _quant(ck: Checkpoint) -> str | None:
    """How training stored the base; None in folders of others, which do not state it."""
    quant = ck.metadata.get(QUANT)
    if quant is not None and quant not in QUANTS:
        raise CorruptFileError(f"{ck.path}: its note {QUANT} is {quant!r}; there are: {', '.join(QUANTS)}.")
    return quant


def _sorted(ck: Checkpoint, kind: AdapterKind) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """({layer: parts by name}, whole tensors)."""
    stems = "|".join(stem for k in ADAPTER_KINDS.values() for stem in k.stems)
    layers: dict[str, dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    for bare, info in ck.info.items():
        name = info.name
        if found := kind.folder_part(bare):
            layer, part = found
            parts = layers.setdefault(layer, {})
            if part in parts:
                raise LayoutError(f"{ck.path}: {parts[part].name} and {name} are the same part of a layer.")
            parts[part] = info
        elif re.search(rf"(^|[._])({stems})_", bare):
            raise LayoutError(f"{ck.path}: {name} is no part of {kind.described} that is known here.")
        else:
            full[bare] = info
    return layers, full


def _named_targets(ck: Checkpoint, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Layers that the configuration names one by one, where it states nothing else about them."""
    named = config.get("target_modules")
    if isinstance(named, str):
        return ()  # a regular expression, or a word for many
    if named is not None and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
        raise LayoutError(f"{ck.path}: target_modules is {named!r}, a list of names is expected.")
    if any(config.get(k) for k in ("layers_to_transform", "exclude_modules")):
        return ()
    return listed(named)


def check_folder(folder: Path) -> None:
    """Refuse to replace what is no folder, or one that holds anything but an adapter: all of it would be gone.

    Raises:
        OutputError: names what is there.
    """
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is no folder of its own, so an adapter folder cannot take its place; remove it")
    other = sorted(p.name for p in folder.iterdir() if p.name not in _FILES) if folder.exists() else []
    if other:
        raise OutputError(
            f"{folder} holds more than an adapter ({', '.join(other[:3])}), which would be gone.\n"
            "Choose another folder, or move that elsewhere."
        )


def write(adapter: Adapter, folder: Path, overwrite: bool, notes: Mapping[str, str]) -> None:
    """Write the folder, whole or not at all.

    Args:
        notes: short texts for the metadata of its tensors.

    Raises:
        ParameterError: as `written`.
        OutputError: the folder exists (unless `overwrite`), holds more than an adapter or cannot be written.
    """
    check_target(folder, overwrite)
    check_folder(folder)
    parts, settings = written(adapter)
    tensors = {f"{PREFIX}{name}": values.read() for name, values in parts.items()}
    origin = {} if adapter.origin is None else {ORIGIN: adapter.origin}
    notes = {**origin, **notes, **({} if adapter.quant is None else {QUANT: adapter.quant})}
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
    parts, config = ADAPTER_KINDS[adapter.method].folder_content(adapter)
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
