"""RWKV-7 "Goose" for transformers (arXiv 2503.14456), in plain torch."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modeling_rwkv_base import (
    RwkvPlainConfig,
    RwkvPlainForCausalLM,
    head_norm,
    linear,
    matrix,
    previous,
    vector,
)


class Rwkv7PlainConfig(RwkvPlainConfig):
    model_type = "rwkv7_plain"


class TimeMix(nn.Module):
    """`blocks.i.att`: mixes along time."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        C, A, rank = config.hidden_size, config.attention_hidden_size, config.ranks
        self.layer, self.heads = layer, (config.num_attention_heads, config.head_size)
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(C) for _ in range(6))
        self.w0, self.w1, self.w2 = vector(A), matrix(C, rank["w"]), matrix(rank["w"], A)
        self.a0, self.a1, self.a2 = vector(A), matrix(C, rank["a"]), matrix(rank["a"], A)
        if layer > 0:
            self.v0, self.v1, self.v2 = vector(A), matrix(C, rank["v"]), matrix(rank["v"], A)
        self.g1, self.g2 = matrix(C, rank["g"]), matrix(rank["g"], A)
        self.k_k, self.k_a, self.r_k = vector(A), vector(A), matrix(*self.heads)
        self.receptance, self.key, self.value = linear(C, A), linear(C, A), linear(C, A)
        self.output = linear(A, C)
        self.ln_x = nn.GroupNorm(config.num_attention_heads, A, eps=config.group_norm_eps)
        self.time_state = matrix(self.heads[0], self.heads[1], self.heads[1]) if config.tuned_state else None

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, mask: Tensor | None) -> Any:
        B, T, _ = x.shape
        delta = previous(x, shift) - x
        xr, xw, xk = x + delta * self.x_r, x + delta * self.x_w, x + delta * self.x_k
        xv, xa, xg = x + delta * self.x_v, x + delta * self.x_a, x + delta * self.x_g
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # In the state's dtype: the decay is very close to 1, where bfloat16 has steps of 0.4 %.
        log_decay = -math.exp(-0.5) * torch.sigmoid((self.w0 + torch.tanh(xw @ self.w1) @ self.w2).to(state.dtype))
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0 or v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        kk = F.normalize((k * self.k_k).view(B, T, *self.heads), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        if mask is not None:  # nothing is written, nothing decays
            log_decay, k, kk = log_decay * mask, k * mask, kk * mask.unsqueeze(-1)

        r, k, v, a = (z.view(B, T, *self.heads) for z in (r, k, v, a))
        y, state = _delta_rule(r, log_decay.view(B, T, *self.heads), k, v, kk, a, state)
        y = head_norm(y.to(x.dtype), self.ln_x)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.output(y * g), state, v_first


def _delta_rule(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor) -> Any:
    """The recurrence, token by token, in the state's dtype.

    `S_t = S_{t-1} diag(exp(log_decay_t)) - (S_{t-1} kk_t) (kk_t * a_t)^T + v_t k_t^T`, `y_t = S_t r_t`; all but the
    state [B,H,V,K] are [B,T,H,N].
    """
    r, k, v, kk, a = (z.to(state.dtype) for z in (r, k, v, kk, a))
    decay, taken_out, y = log_decay.exp(), kk * a, []
    for t in range(r.shape[1]):
        read = state @ kk[:, t, :, :, None]
        state = (
            state * decay[:, t, :, None, :]
            - read * taken_out[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        y.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(y, dim=1), state


class ChannelMix(nn.Module):
    """`blocks.i.ffn`: mixes the channels of one token."""

    def __init__(self, config: RwkvPlainConfig, layer: int):
        super().__init__()
        self.x_k = vector(config.hidden_size)
        self.key = linear(config.hidden_size, config.intermediate_size)
        self.value = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(x + (previous(x, shift) - x) * self.x_k)).square())


class Rwkv7PlainForCausalLM(RwkvPlainForCausalLM):
    config_class = Rwkv7PlainConfig
    time_mix, channel_mix = TimeMix, ChannelMix
