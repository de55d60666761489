"""RWKV-5 "Eagle": matrix states, whose decay is the same for every token; 5.0, 5.1 and 5.2.

Formulas: arXiv 2404.05892. 5.0 and 5.1 have one decay and one bonus per head, 5.2 has them per channel; 5.0 has no
gate. The bonus is stored as its logarithm under the name `time_first`, as it is under the name `time_faaaa`.
"""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_lab.checkpoint import Layout
from rwkv_lab.model.block import Block, head_norm, into_residual, linear, matrix, previous, vector
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.cpu import rwkv5 as compiled
from rwkv_lab.model.registry import CompiledForm, Generation, register
from rwkv_lab.model.rwkv4 import ChannelMix
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.wkv import wkv5


@standard
class TimeMix(Capturable):
    """`blocks.i.att`: mixes along time through the WKV state."""

    def __init__(self, layout: Layout, layer: int, group_norm_eps: float, log_bonus: bool):
        super().__init__()
        C, A = layout.n_embd, layout.dim_att
        self.n_head, self.head_size, self.layer = layout.n_head, layout.head_size, layer
        per_head = (self.n_head, self.head_size) if layout.version == "5.2" else (self.n_head,)
        self.time_decay = matrix(*per_head)  # the log-decay is -exp of it
        if log_bonus:
            self.time_first = matrix(*per_head)
        else:
            self.time_faaaa = matrix(*per_head)
        self.time_mix_k, self.time_mix_v, self.time_mix_r = vector(C), vector(C), vector(C)
        gated = layout.version != "5.0"
        if gated:
            self.time_mix_g = vector(C)
        self.receptance = linear(C, A)
        self.key = linear(C, A)
        self.value = linear(C, A)
        if gated:
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
        before = previous(x, shift)
        xk, xv, xr = (
            torch.addcmul(before, x - before, mu) for mu in (self.time_mix_k, self.time_mix_v, self.time_mix_r)
        )
        heads = (*x.shape[:2], self.n_head, self.head_size)
        # v in the state's dtype makes y so too: before the norm, sums over many tokens may be too large for float16.
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv).to(wkv_state.dtype)
        log_decay, bonus = self.decay_and_bonus(wkv_state.dtype)
        r, k, v = (z.view(heads) for z in (r, k, v))
        y_wkv, wkv_state = wkv5(r, log_decay, k, v, bonus, wkv_state)
        y = head_norm(y_wkv, self.ln_x).to(x.dtype)
        gate = {}
        if self.gated:
            g = F.silu(self.gate(torch.addcmul(before, x - before, self.time_mix_g)))
            y, gate = y * g, {"g": g.view(heads)}
        out = into_residual(self.output, y, self.layer)
        if self.receivers:
            self.show(x=x, r=r, w=log_decay.expand(heads), k=k, v=v, **gate)
            self.show(y=y_wkv, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first

    @property
    def gated(self) -> bool:
        """Whether there is a gate: from 5.1 on."""
        return hasattr(self, "gate")

    @property
    def log_bonus(self) -> bool:
        """Whether the bonus is stored as its logarithm."""
        return hasattr(self, "time_first")

    def decay_and_bonus(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-decay, computed in that dtype, and the bonus, both `[H,N]`."""
        bonus = torch.exp(self.time_first.to(dtype)) if self.log_bonus else self.time_faaaa
        log_decay = -torch.exp(self.time_decay.to(dtype))
        H, N = self.n_head, self.head_size
        return log_decay.view(H, -1).expand(-1, N), bonus.view(H, -1).expand(-1, N)


def make_block(layout: Layout, layer: int, group_norm_eps: float, names: Collection[str]) -> Block:
    """`blocks.<layer>` without values; `names` are those in the file, which decide what its bonus is called."""
    log_bonus = f"blocks.{layer}.att.time_faaaa" not in names
    return Block(
        layout, layer, TimeMix(layout, layer, group_norm_eps, log_bonus), ChannelMix(layout, layer), halves_float16=True
    )


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
    "FFN_MIX_K": "ffn.time_mix_k",
    "FFN_MIX_R": "ffn.time_mix_r",
    "FFN_KEY": "ffn.key",
    "FFN_RECEPTANCE": "ffn.receptance",
    "FFN_VALUE": "ffn.value",
    "MIX_K": "att.time_mix_k",
    "MIX_V": "att.time_mix_v",
    "MIX_R": "att.time_mix_r",
    "MIX_G": "att.time_mix_g",
}

register(
    Generation(
        versions=("5.0", "5.1", "5.2"),
        make_block=make_block,
        halves_float16=True,
        compiled=CompiledForm(5, _SLOTS, compiled.time_mix, compiled.channel_mix),
    )
)
