"""RWKV-6 "Finch": matrix states; their decay, and how much of the token before is mixed in, depend on the token.

Formulas: arXiv 2404.05892.
"""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.checkpoint import Layout
from rwkv_lab.model.block import Block, head_norm, into_residual, linear, matrix, previous, vector
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.cpu import rwkv6 as compiled
from rwkv_lab.model.registry import CompiledForm, Generation, register
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.wkv import wkv6


@standard
class TimeMix(Capturable):
    """`blocks.i.att`: mixes along time through the WKV state."""

    def __init__(self, layout: Layout, layer: int, group_norm_eps: float):
        super().__init__()
        C, A = layout.n_embd, layout.dim_att
        self.n_head, self.head_size, self.layer = layout.n_head, layout.head_size, layer
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1 = matrix(C, 5 * layout.ranks["maa"])
        self.time_maa_w2 = matrix(5, layout.ranks["maa"], C)  # in the order w, k, v, r, g
        self.time_decay = vector(A)  # the log-decay is -exp of it and what the token adds to it
        self.time_decay_w1 = matrix(C, layout.ranks["decay"])
        self.time_decay_w2 = matrix(layout.ranks["decay"], A)
        self.time_faaaa = matrix(self.n_head, self.head_size)  # bonus of the present token
        self.receptance = linear(C, A)
        self.key = linear(C, A)
        self.value = linear(C, A)
        self.gate = linear(C, A)
        self.output = linear(A, C)
        self.ln_x = nn.GroupNorm(self.n_head, A, eps=group_norm_eps)
        self.register_parameter("time_state", None)  # [H,V,K] once `RWKV_Dual.add_time_state` was called

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor, wkv_state: torch.Tensor, v_first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x `[B,T,C]`, shift `[B,C]`, wkv_state `[B,H,V,K]`; v_first is handed through.

        Returns the output `[B,T,C]`, the new wkv_state, v_first.
        """
        B, T, C = x.shape
        delta = previous(x, shift) - x
        m = torch.tanh(torch.addcmul(x, delta, self.time_maa_x) @ self.time_maa_w1)  # [B,T,5 ranks]
        m = m.view(B * T, 5, -1).transpose(0, 1) @ self.time_maa_w2  # [5,B*T,C]
        mu = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (torch.addcmul(x, delta, mu + m) for mu, m in zip(mu, m.view(5, B, T, C), strict=True))

        # v in the state's dtype makes y so too: before the norm, sums over many tokens may be too large for float16.
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv).to(wkv_state.dtype)
        wx = self.time_decay.to(wkv_state.dtype) + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        heads = (B, T, self.n_head, self.head_size)
        r, log_decay, k, v = (z.view(heads) for z in (r, -torch.exp(wx), k, v))
        y_wkv, wkv_state = wkv6(r, log_decay, k, v, self.time_faaaa, wkv_state)
        g = F.silu(self.gate(xg))
        out = into_residual(self.output, head_norm(y_wkv, self.ln_x).to(x.dtype) * g, self.layer)
        if self.receivers:
            self.show(x=x, r=r, w=log_decay, k=k, v=v, g=g.view(heads))
            self.show(y=y_wkv, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first


@standard
class ChannelMix(Capturable):
    """`blocks.i.ffn`: RWKV-4's, with the share of the token before stored instead of the present one's."""

    def __init__(self, layout: Layout, layer: int):
        super().__init__()
        C = layout.n_embd
        self.layer = layer
        self.time_maa_k, self.time_maa_r = vector(C), vector(C)
        self.key = linear(C, layout.dim_ffn)
        self.receptance = linear(C, C)
        self.value = linear(layout.dim_ffn, C)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """x `[B,T,C]`, shift `[B,C]` -> `[B,T,C]`."""
        delta = previous(x, shift) - x
        k = torch.relu(self.key(torch.addcmul(x, delta, self.time_maa_k))).square()
        r = torch.sigmoid(self.receptance(torch.addcmul(x, delta, self.time_maa_r)))
        out = r * into_residual(self.value, k, self.layer)
        if self.receivers:
            self.show(x=x, r=r, k=k, out=out)
        return out


def make_block(layout: Layout, layer: int, group_norm_eps: float, names: Collection[str]) -> Block:
    """`blocks.<layer>` without values. RWKV-6 has no tensors that only some files have, but for time_state."""
    return Block(layout, layer, TimeMix(layout, layer, group_norm_eps), ChannelMix(layout, layer), halves_float16=True)


_SLOTS = {  # place in the table of kernels/cpu/step56.h: parameter, or module whose parameters go there
    "LN1": "ln1",
    "LN2": "ln2",
    "BONUS": "att.time_faaaa",
    "LOG_BONUS": "att.time_first",
    "DECAY": "att.time_decay",
    "RECEPTANCE": "att.receptance",
    "KEY": "att.key",
    "VALUE": "att.value",
    "GATE": "att.gate",
    "OUTPUT": "att.output",
    "LN_X": "att.ln_x",
    "FFN_MIX_K": "ffn.time_maa_k",
    "FFN_MIX_R": "ffn.time_maa_r",
    "FFN_KEY": "ffn.key",
    "FFN_RECEPTANCE": "ffn.receptance",
    "FFN_VALUE": "ffn.value",
    "MAA_X": "att.time_maa_x",
    "MAA_W": "att.time_maa_w",
    "MAA_K": "att.time_maa_k",
    "MAA_V": "att.time_maa_v",
    "MAA_R": "att.time_maa_r",
    "MAA_G": "att.time_maa_g",
    "MAA_W1": "att.time_maa_w1",
    "MAA_W2": "att.time_maa_w2",
    "DECAY_W1": "att.time_decay_w1",
    "DECAY_W2": "att.time_decay_w2",
}

register(
    Generation(
        versions=("6.0",),
        make_block=make_block,
        halves_float16=True,
        compiled=CompiledForm(
            6,
            _SLOTS,
            compiled.time_mix,
            compiled.channel_mix,
            transposed=frozenset(f"att.time_{z}_w{i}" for z in ("maa", "decay") for i in "12"),
        ),
    )
)
