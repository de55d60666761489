"""RWKV-6 "Finch" for transformers (arXiv 2404.05892), in plain torch."""

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


class Rwkv6PlainConfig(RwkvPlainConfig):
    model_type = "rwkv6_plain"


class TimeMix(nn.Module):
    """`blocks.i.att`: mixes along time. Decay and share of the token before depend on the token."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        C, A, rank = config.hidden_size, config.attention_hidden_size, config.ranks
        self.layer, self.heads = layer, (config.num_attention_heads, config.head_size)
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1 = matrix(C, 5 * rank["maa"])
        self.time_maa_w2 = matrix(5, rank["maa"], C)  # in the order w, k, v, r, g
        self.time_decay = vector(A)  # the log-decay is -exp of it and what the token adds to it
        self.time_decay_w1, self.time_decay_w2 = matrix(C, rank["decay"]), matrix(rank["decay"], A)
        self.time_faaaa = matrix(*self.heads)  # bonus of the present token
        self.receptance, self.key, self.value = linear(C, A), linear(C, A), linear(C, A)
        self.gate, self.output = linear(C, A), linear(A, C)
        self.ln_x = nn.GroupNorm(config.num_attention_heads, A, eps=config.group_norm_eps)
        self.time_state = matrix(self.heads[0], self.heads[1], self.heads[1]) if config.tuned_state else None

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, mask: Tensor | None) -> Any:
        B, T, C = x.shape
        delta = previous(x, shift) - x
        m = torch.tanh((x + delta * self.time_maa_x) @ self.time_maa_w1)
        m = (m.view(B * T, 5, -1).transpose(0, 1) @ self.time_maa_w2).view(5, B, T, C)
        mu = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (x + delta * (mu[i] + m[i]) for i in range(5))
        wx = self.time_decay.to(state.dtype) + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        r, log_decay, k, v = self.receptance(xr), -torch.exp(wx), self.key(xk), self.value(xv)
        if mask is not None:  # nothing is written, nothing decays
            log_decay, k = log_decay * mask, k * mask
        r, log_decay, k, v = (z.to(state.dtype).view(B, T, *self.heads) for z in (r, log_decay, k, v))
        y, state = decaying_attention(r, log_decay, k, v, self.time_faaaa.to(state.dtype), state)
        y = head_norm(y, self.ln_x).to(x.dtype) * F.silu(self.gate(xg))
        return into_residual(self.output, y, self.layer), state, v_first


class ChannelMix(nn.Module):
    """`blocks.i.ffn`: mixes the channels of one token, and lets through what receptance says."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer = layer
        self.time_maa_k, self.time_maa_r = vector(C), vector(C)
        self.key, self.receptance = linear(C, config.intermediate_size), linear(C, C)
        self.value = linear(config.intermediate_size, C)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        delta = previous(x, shift) - x
        k = torch.relu(self.key(x + delta * self.time_maa_k)).square()
        r = torch.sigmoid(self.receptance(x + delta * self.time_maa_r))
        return r * into_residual(self.value, k, self.layer)


class Rwkv6PlainForCausalLM(RwkvPlainForCausalLM):
    config_class = Rwkv6PlainConfig
    time_mix, channel_mix = TimeMix, ChannelMix
