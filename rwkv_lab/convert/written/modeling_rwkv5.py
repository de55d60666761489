"""RWKV-5 "Eagle" for transformers (arXiv 2404.05892): 5.0, 5.1 and 5.2, in plain torch.

5.0 and 5.1 have one decay and one bonus per head, 5.2 has them per channel; 5.0 has no gate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modeling_rwkv_base import (
    RwkvPlainConfig,
    RwkvPlainForCausalLM,
    decaying_attention,
    head_norm,
    into_residual,
    linear,
    matrix,
    previous,
    vector,
)


class Rwkv5PlainConfig(RwkvPlainConfig):
    model_type = "rwkv5_plain"


class TimeMix(nn.Module):
    """`blocks.i.att`: mixes along time, with a decay that is the same for every token."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        C, A = config.hidden_size, config.attention_hidden_size
        self.layer, self.heads = layer, (config.num_attention_heads, config.head_size)
        self.log_bonus, self.gated = config.bonus_name == "time_first", config.version != "5.0"
        per_head = self.heads if config.version == "5.2" else self.heads[:1]
        self.time_decay = matrix(*per_head)  # the log-decay is -exp of it
        setattr(self, config.bonus_name, matrix(*per_head))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = vector(C), vector(C), vector(C)
        self.receptance, self.key, self.value = linear(C, A), linear(C, A), linear(C, A)
        if self.gated:
            self.time_mix_g, self.gate = vector(C), linear(C, A)
        self.output = linear(A, C)
        self.ln_x = nn.GroupNorm(config.num_attention_heads, A, eps=config.group_norm_eps)
        self.time_state = matrix(self.heads[0], self.heads[1], self.heads[1]) if config.tuned_state else None

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, mask: Tensor | None) -> Any:
        B, T, _ = x.shape
        before = previous(x, shift)
        xk, xv, xr = (before + (x - before) * mu for mu in (self.time_mix_k, self.time_mix_v, self.time_mix_r))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        log_decay = -torch.exp(self.time_decay.to(state.dtype)).view(self.heads[0], -1).expand(self.heads)
        log_decay = log_decay.expand(B, T, *self.heads)
        if mask is not None:  # nothing is written, nothing decays
            log_decay, k = log_decay * mask.unsqueeze(-1), k * mask
        r, k, v = (z.to(state.dtype).view(B, T, *self.heads) for z in (r, k, v))
        y, state = decaying_attention(r, log_decay, k, v, self._bonus(state.dtype), state)
        y = head_norm(y, self.ln_x).to(x.dtype)
        if self.gated:
            y = y * F.silu(self.gate(before + (x - before) * self.time_mix_g))
        return into_residual(self.output, y, self.layer), state, v_first

    def _bonus(self, dtype: torch.dtype) -> Tensor:
        """[H,N]; `time_first` holds its logarithm."""
        bonus = torch.exp(self.time_first.to(dtype)) if self.log_bonus else self.time_faaaa.to(dtype)
        return bonus.view(self.heads[0], -1).expand(self.heads)


class ChannelMix(nn.Module):
    """`blocks.i.ffn`: mixes the channels of one token, and lets through what receptance says."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer = layer
        self.time_mix_k, self.time_mix_r = vector(C), vector(C)
        self.key, self.receptance = linear(C, config.intermediate_size), linear(C, C)
        self.value = linear(config.intermediate_size, C)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        before = previous(x, shift)
        k = torch.relu(self.key(before + (x - before) * self.time_mix_k)).square()
        r = torch.sigmoid(self.receptance(before + (x - before) * self.time_mix_r))
        return r * into_residual(self.value, k, self.layer)


class Rwkv5PlainForCausalLM(RwkvPlainForCausalLM):
    config_class = Rwkv5PlainConfig
    time_mix, channel_mix = TimeMix, ChannelMix
