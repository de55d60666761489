"""What may have been trained on a base: adapters, states and fine-tunes with known or random values."""

from pathlib import Path

import torch

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.peft import LoraConfig, adapter_of, apply_peft, save_adapter

ADAPTERS = {
    "lora": dict(lora_r=3, lora_alpha=5),
    "lora-besides": dict(lora_r=3, lora_target_modules=["att.key"], train_parts=["ln", "time_state", "emb"]),
    "pissa-nf4": dict(method="pissa", lora_r=3, quant="nf4"),
    "bat-int8": dict(method="miss", lora_r=4, miss_variant="bat-rwkv-peft", quant="int8"),
}


@torch.no_grad()
def write_adapter(path: Path, base: Path, size: float = 0.05, seed: int = 1, **config) -> Path:
    """An adapter with all that is trained moved by about `size`; the arguments are those of `LoraConfig`."""
    model = RWKV_Dual.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        apply_peft(model, LoraConfig(**config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))
    save_adapter(adapter_of(model), path)
    return path


def write_state(path: Path, base: Path, size: float = 1.0, seed: int = 1) -> Path:
    """A state with random values of about `size`."""
    with open_checkpoint(base) as ck:
        layout = ck.layout
    g = torch.Generator().manual_seed(seed)
    shape = (layout.n_head, layout.head_size, layout.head_size)
    names = [f"blocks.{i}.att.time_state" for i in range(layout.n_layer)]
    write_checkpoint(path, {name: size * torch.randn(shape, generator=g) for name in names})
    return path


def write_fine_tune(path: Path, base: Path, size: float = 0.01, seed: int = 1, only: str = "") -> Path:
    """A whole model, or with `only` the tensors whose names hold that, moved by `size` of their spread or so."""
    g = torch.Generator().manual_seed(seed)
    with open_checkpoint(base) as ck:
        tensors = {n: ck[n] for n in ck if only in n}
    write_checkpoint(path, {n: t + size * torch.randn(t.shape, generator=g) for n, t in tensors.items()})
    return path


def write_tuned(path: Path, base: Path, kind: str, **values) -> Path:
    """One of ADAPTERS, a "state", a "model", or its "norms" alone; `values` are those of the function for it."""
    if kind in ADAPTERS:
        return write_adapter(path, base, **ADAPTERS[kind], **values)
    if kind == "state":
        return write_state(path, base, **values)
    return write_fine_tune(path, base, only="ln" if kind == "norms" else "", **values)
