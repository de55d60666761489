"""The model of each kind of training: made ready, with all frozen that is not trained; written; opened again."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft import (
    FrozenLinear,
    LoraConfig,
    adapter_of,
    adapters,
    load_adapter,
    load_model_and_apply_peft,
    open_adapter,
    save_adapter,
)
from rwkv_lab.train.recipe import ADAPTER_KINDS, DTYPES, Tuning

# RWKV-7's first layer makes the values that later ones mix in; where its file has these, nothing reads them.
_UNUSED = re.compile(r"^blocks\.0\.att\.v[012]$")


def make_model(tuning: Tuning, base: str | Path | None, sizes: Mapping[str, int]) -> RWKV_Dual:
    """The model that `tuning` trains; what is not trained is frozen. Draws from torch's generator are its seed's alone.

    Args:
        sizes: n_embd, n_layer and head_size of a fresh model, where there is no base.

    Raises:
        ParameterError, NumericsError: of adapters and quantisation, see `load_model_and_apply_peft`.
        LayoutError, CorruptFileError, UnsafeFileError, DeviceError: of the base.
    """
    dtype, device = DTYPES[tuning.dtype], torch.device(tuning.device)
    with _own_draws(tuning.seed, device):
        if tuning.kind in ADAPTER_KINDS:
            where = SimpleNamespace(peft_load_path=base, dtype=dtype, device=device)
            return load_model_and_apply_peft(where, adapter_settings(tuning))
        if base:
            model = RWKV_Dual.from_pretrained(base, dtype=dtype, device=device)
        else:
            model = RWKV_Dual(**sizes, vocab_size=257).to(device, dtype)
    if tuning.kind == "state":
        model.add_time_state()
        _pack(model, tuning.quant)
    for name, parameter in model.named_parameters():
        trained = name.endswith(".time_state") if tuning.kind == "state" else not is_unused(name)
        parameter.requires_grad_(trained)
    return model


def adapter_settings(tuning: Tuning) -> LoraConfig:
    """Of the adapters: those of a bfloat16 model are float32 all the same, or small updates would be rounded away.

    Raises:
        ParameterError: see `LoraConfig`.
    """
    return LoraConfig(
        method=tuning.kind,
        lora_target_modules=tuning.targets,
        lora_r=tuning.rank,
        lora_alpha=2.0 * tuning.rank if tuning.alpha is None else tuning.alpha,
        quant=tuning.quant,
        train_parts=tuning.train_parts,
        adapter_dtype=torch.float32 if tuning.dtype == "bfloat16" else None,
    )


def pissa_start(model: nn.Module) -> str:
    """A fingerprint of where PiSSA started: its SVD may come out otherwise on another machine or number of threads."""
    digest = hashlib.sha256()
    for layer in adapters(model).values():
        digest.update(layer.init_lora_A.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_unused(name: str) -> bool:
    """Whether nothing reads this tensor."""
    return _UNUSED.match(name) is not None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_tuned(model: RWKV_Dual, tuning: Tuning, out: Path, note: Mapping[str, str], overwrite: bool) -> None:
    """Write what was trained: a whole model, states, or an adapter (a folder of Hugging Face's peft where `out` has no
    suffix). `note` travels in the file, but for adapters, which have notes of their own.

    Raises:
        OutputError: `out` exists (unless `overwrite`) or cannot be written.
    """
    if tuning.kind in ADAPTER_KINDS:
        save_adapter(adapter_of(model), out, overwrite)
    else:
        tensors = trained_parameters(model) if tuning.kind == "state" else model.state_dict()
        write_checkpoint(out, tensors, metadata=note, overwrite=overwrite)


def open_tuned(kind: str, out: Path, base: str | Path | None, dtype: str, device: str, quant: str) -> RWKV_Dual:
    """The model that training ended with, from the files alone.

    Raises:
        RwkvLabError: of the files.
    """
    whole = kind in ("pretrain", "full")
    model = RWKV_Dual.from_pretrained(out if whole else base, dtype=DTYPES[dtype], device=device)
    if kind == "state":
        model.load_state_file(out)
        _pack(model, quant)
    elif not whole:
        with open_adapter(out) as adapter:
            load_adapter(model, adapter, quant)
    return model


def _pack(model: nn.Module, quant: str) -> None:
    """Store the matrices of the blocks in fewer bits; they are frozen by that."""
    if quant == "none":
        return
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = FrozenLinear.from_linear(layer)
            packed.pack(quant)
            parent, _, last = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), last, packed)


@contextmanager
def _own_draws(seed: int, device: torch.device):
    """Leave the caller's generators alone, and draw the same whatever they have drawn before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
