"""RWKV-7 "Goose": the layers, and how a fresh model starts.

Formulas: arXiv 2503.14456.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.checkpoint import Layout
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.block import Block, head_norm, linear, matrix, previous, vector
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.cpu import rwkv7 as compiled
from rwkv_lab.model.registry import CompiledForm, Generation, register
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.wkv import wkv7


@standard
class TimeMix(Capturable):
    """`blocks.i.att`: mixes along time through the WKV state."""

    def __init__(self, layout: Layout, layer: int, group_norm_eps: float, value_residual: bool):
        super().__init__()
        C, A = layout.n_embd, layout.dim_att
        self.n_head, self.head_size, self.layer = layout.n_head, layout.head_size, layer
        self.x_r, self.x_w, self.x_k = vector(C), vector(C), vector(C)
        self.x_v, self.x_a, self.x_g = vector(C), vector(C), vector(C)
        rank = layout.ranks
        self.w0, self.w1, self.w2 = vector(A), matrix(C, rank["w"]), matrix(rank["w"], A)
        self.a0, self.a1, self.a2 = vector(A), matrix(C, rank["a"]), matrix(rank["a"], A)
        if value_residual:
            self.v0, self.v1, self.v2 = vector(A), matrix(C, rank["v"]), matrix(rank["v"], A)
        self.g1, self.g2 = matrix(C, rank["g"]), matrix(rank["g"], A)
        self.k_k, self.k_a = vector(A), vector(A)
        self.r_k = matrix(self.n_head, self.head_size)
        self.receptance = linear(C, A)
        self.key = linear(C, A)
        self.value = linear(C, A)
        self.output = linear(A, C)
        self.ln_x = nn.GroupNorm(self.n_head, A, eps=group_norm_eps)
        self.register_parameter("time_state", None)  # [H,V,K] once `RWKV_Dual.add_time_state` was called

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor, wkv_state: torch.Tensor, v_first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x `[B,T,C]`, shift `[B,C]`, wkv_state `[B,H,V,K]`, v_first `[B,T,A]` (None in layer 0).

        Returns the output `[B,T,C]`, the new wkv_state, and v_first, which layer 0 makes.
        """
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        delta = previous(x, shift) - x
        xr, xw, xk, xv, xa, xg = (
            torch.addcmul(x, delta, mu) for mu in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # In float32 even in a bfloat16 model: the decay is very close to 1, where bfloat16 has steps of 0.4 %.
        wx = (self.w0 + torch.tanh(xw @ self.w1) @ self.w2).to(wkv_state.dtype)
        log_decay = -math.exp(-0.5) * torch.sigmoid(wx)
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)  # how much of what is read is taken out again
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = torch.addcmul(v, v_first - v, torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2))
        kk = F.normalize((k * self.k_k).view(heads), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)

        r, k, v_heads, a = (z.view(heads) for z in (r, k, v, a))  # [B,T,H,N]
        y_wkv, wkv_state = wkv7(r, log_decay.view(heads), k, v_heads, -kk, kk * a, wkv_state)
        y = head_norm(y_wkv, self.ln_x)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v_heads).view(B, T, -1)
        out = self.output(y * g)
        if self.receivers:
            self.show(x=x, r=r, w=log_decay.view(heads), v=v_heads, a=a, kk=kk, k=k, g=g.view(heads))
            self.show(y=y_wkv, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first


@standard
class ChannelMix(Capturable):
    """`blocks.i.ffn`: mixes the channels of one token."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.x_k = vector(layout.n_embd)
        self.key = linear(layout.n_embd, layout.dim_ffn)
        self.value = linear(layout.dim_ffn, layout.n_embd)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """x `[B,T,C]`, shift `[B,C]` -> `[B,T,C]`."""
        k = torch.relu(self.key(torch.addcmul(x, previous(x, shift) - x, self.x_k))).square()
        out = self.value(k)
        if self.receivers:
            self.show(x=x, k=k, out=out)
        return out


def make_block(layout: Layout, layer: int, group_norm_eps: float, names: Collection[str]) -> Block:
    """`blocks.<layer>` without values; `names` are those in the file: layer 0's v0, v1, v2 are unused, few files have
    them."""
    value_residual = layer > 0 or "blocks.0.att.v1" in names
    return Block(
        layout, layer, TimeMix(layout, layer, group_norm_eps, value_residual), ChannelMix(layout), halves_float16=False
    )


def fresh_ranks(n_embd: int) -> dict[str, int]:
    """Ranks of a fresh model's low-rank pairs: multiples of 32 near a constant times sqrt(C) (RWKV-LM's newer rule)."""
    return {name: max(32, round(c * n_embd**0.5 / 32) * 32) for name, c in dict(w=2.5, a=2.5, v=1.7, g=5).items()}


def fresh_layout(n_embd: int, n_layer: int, vocab_size: int, head_size: int) -> Layout:
    """The layout of a fresh RWKV-7 of these sizes.

    Raises:
        ParameterError: sizes that do not go together.
    """
    if min(n_embd, n_layer, vocab_size, head_size) < 1 or n_embd % head_size:
        raise ParameterError(
            f"n_embd={n_embd}, n_layer={n_layer}, vocab_size={vocab_size}: all must be at least 1,\n"
            f"and n_embd a multiple of head_size={head_size}."
        )
    return Layout(
        version="7.0",
        n_layer=n_layer,
        n_embd=n_embd,
        dim_att=n_embd,
        dim_ffn=4 * n_embd,
        vocab_size=vocab_size,
        n_head=n_embd // head_size,
        head_size=head_size,
        ranks=fresh_ranks(n_embd),
    )


@torch.no_grad()
def initialise(model: Any) -> None:
    """Fill a fresh model in place, by the start values that RWKV-LM publishes for RWKV-7. Draws from torch's generator.

    LayerNorms are ones and zeros, except ln_x, whose weight grows with depth.
    """
    vocab_size, C = model.head.weight.shape
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
    nn.init.orthogonal_(model.head.weight, gain=0.5 * max(1.0, vocab_size / C) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
    for layer, block in enumerate(model.blocks):
        _initialise_time_mix(block.att, layer, len(model.blocks))
        _initialise_channel_mix(block.ffn, layer, len(model.blocks))


def _initialise_time_mix(att, layer: int, n_layer: int) -> None:
    C, A = att.receptance.weight.shape[1], att.receptance.weight.shape[0]
    depth = layer / max(n_layer - 1, 1)  # 0 in the first layer, 1 in the last
    left = 1 - layer / n_layer  # 1 in the first layer, almost 0 in the last
    channel = _numbers(C) / C
    for name, power in dict(x_r=0.2, x_w=0.9, x_k=0.7, x_v=0.7, x_a=0.9, x_g=0.2).items():
        getattr(att, name)[:] = 1 - channel ** (power * left)

    line = _numbers(A) / max(A - 1, 1)  # 0..1 over all channels
    zigzag = torch.linspace(-1, 1, att.head_size, dtype=torch.float32, device="cpu").repeat(
        att.n_head
    )  # -1..1 over the channels of every head
    zigzag = zigzag * zigzag.abs()
    att.w0[:] = -5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * zigzag  # slow channels and fast ones in every head
    att.a0[:] = -0.19 + 0.3 * zigzag + 0.4 * (line - 0.5)
    att.k_k[:] = 0.71 - 0.1 * (line - 0.5)
    nn.init.constant_(att.k_a, 1.02)
    nn.init.constant_(att.r_k, -0.04)
    pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)]
    if getattr(att, "v0", None) is not None:
        att.v0[:] = 0.73 - 0.4 * (line - 0.5)
        pairs.append((att.v1, att.v2))
    for into, out in pairs:
        nn.init.zeros_(into)
        nn.init.orthogonal_(out, gain=0.1 * max(1.0, out.shape[0] / out.shape[1]) ** 0.5)

    for projection, scale in ((att.receptance, 0.5), (att.key, 0.05), (att.value, 0.5)):
        nn.init.uniform_(projection.weight, -scale / C**0.5, scale / C**0.5)
    nn.init.zeros_(att.output.weight)  # every block starts as the identity
    nn.init.constant_(att.ln_x.weight, ((1 + layer) / n_layer) ** 0.7)


def _initialise_channel_mix(ffn, layer: int, n_layer: int) -> None:
    C = ffn.key.weight.shape[1]
    ffn.x_k[:] = 1 - (_numbers(C) / C) ** ((1 - layer / n_layer) ** 4)
    nn.init.uniform_(ffn.key.weight, -0.5 / C**0.5, 0.5 / C**0.5)
    nn.init.zeros_(ffn.value.weight)


def _numbers(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32, device="cpu")


_SLOTS = {  # place in the table of kernels/cpu/step7.h: parameter, or module whose parameters go there
    "LN1": "ln1",
    "LN2": "ln2",
    "X_R": "att.x_r",
    "X_W": "att.x_w",
    "X_K": "att.x_k",
    "X_V": "att.x_v",
    "X_A": "att.x_a",
    "X_G": "att.x_g",
    "W0": "att.w0",
    "W1": "att.w1",
    "W2": "att.w2",
    "A0": "att.a0",
    "A1": "att.a1",
    "A2": "att.a2",
    "V0": "att.v0",
    "V1": "att.v1",
    "V2": "att.v2",
    "G1": "att.g1",
    "G2": "att.g2",
    "K_K": "att.k_k",
    "K_A": "att.k_a",
    "R_K": "att.r_k",
    "RECEPTANCE": "att.receptance",
    "KEY": "att.key",
    "VALUE": "att.value",
    "OUTPUT": "att.output",
    "LN_X": "att.ln_x",
    "FFN_X_K": "ffn.x_k",
    "FFN_KEY": "ffn.key",
    "FFN_VALUE": "ffn.value",
}

register(
    Generation(
        versions=("7.0",),
        make_block=make_block,
        has_v_first=True,
        compiled=CompiledForm(
            7,
            _SLOTS,
            compiled.time_mix,
            compiled.channel_mix,
            transposed=frozenset(f"att.{z}{i}" for z in "wavg" for i in "12"),
            unused_in_first_layer=frozenset({"att.v0", "att.v1", "att.v2"}),
        ),
    )
)
