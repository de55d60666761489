"""Adapters that look as if they had been trained."""

import torch

from rwkv_lab.peft import LoraConfig

CONFIGS = {
    "lora": LoraConfig(lora_r=4, lora_alpha=6),
    "rslora": LoraConfig(lora_r=4, lora_alpha=6, use_rslora=True),
    "pissa": LoraConfig("pissa", lora_r=4),
    "pissa-exact": LoraConfig("pissa", lora_r=4, svd_niter=None),
    "miss": LoraConfig("miss", lora_r=6),  # divides neither 32 nor 52 columns
    "miss-mini": LoraConfig("miss", lora_r=4, miss_variant="mini", mini_r=2),
    "bat-hf": LoraConfig("miss", lora_r=4, miss_variant="bat-hf"),
    "bat-rwkv-peft": LoraConfig("miss", lora_r=4, miss_variant="bat-rwkv-peft"),
}


@torch.no_grad()
def as_if_trained(model, size: float = 0.05, seed: int = 1):
    """Move everything that is trained by about `size`, in place; returns the model."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_((size * torch.randn(parameter.shape, generator=g)).to(parameter.dtype))
    return model
