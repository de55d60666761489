"""RWKV-4 "Dove": per channel, a mean of all values so far, weighted by their keys and their age.

Formulas: arXiv 2305.13048. The WKV state of a layer is `[B,3,A]`: the weighted sums with and without the values, and
the exponent that both are divided by; `rwkv_lab.wkv.wkv4` says more.
"""

from collections.abc import Collection

import torch

from rwkv_lab.checkpoint import Layout
from rwkv_lab.model.block import Block, into_residual, linear, matrix, previous, vector
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.cpu import rwkv4 as compiled
from rwkv_lab.model.registry import CompiledForm, Generation, register
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.wkv import empty_wkv4_state, wkv4


@standard
class TimeMix(Capturable):
    """`blocks.i.att`: mixes along time through the WKV state."""

    def __init__(self, layout: Layout, layer: int):
        super().__init__()
        C, A = layout.n_embd, layout.dim_att
        self.layer = layer
        self.time_decay = matrix(A)  # the log-decay is -exp of it
        self.time_first = matrix(A)  # added to the key of the present token
        self.time_mix_k, self.time_mix_v, self.time_mix_r = vector(C), vector(C), vector(C)
        self.key = linear(C, A)
        self.value = linear(C, A)
        self.receptance = linear(C, A)
        self.output = linear(A, C)

    def forward(
        self, x: torch.Tensor, shift: torch.Tensor, wkv_state: torch.Tensor, v_first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x `[B,T,C]`, shift `[B,C]`, wkv_state `[B,3,A]`; v_first is handed through.

        Returns the output `[B,T,C]`, the new wkv_state, v_first.
        """
        before = previous(x, shift)
        xk, xv, xr = (
            torch.addcmul(before, x - before, mu) for mu in (self.time_mix_k, self.time_mix_v, self.time_mix_r)
        )
        k, v, r = self.key(xk), self.value(xv), torch.sigmoid(self.receptance(xr))
        log_decay = -torch.exp(self.time_decay.to(wkv_state.dtype))
        y, wkv_state = wkv4(log_decay, self.time_first, k, v, wkv_state)
        out = into_residual(self.output, r * y, self.layer)
        if self.receivers:
            self.show(x=x, r=r, w=log_decay.expand(k.shape), k=k, v=v, y=y, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first


@standard
class ChannelMix(Capturable):
    """`blocks.i.ffn` of RWKV-4 and 5: mixes the channels of one token, and lets through what receptance says."""

    def __init__(self, layout: Layout, layer: int):
        super().__init__()
        C, F = layout.n_embd, layout.dim_ffn
        self.layer = layer
        self.time_mix_k, self.time_mix_r = vector(C), vector(C)
        self.key = linear(C, F)
        self.receptance = linear(C, C)
        self.value = linear(F, C)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """x `[B,T,C]`, shift `[B,C]` -> `[B,T,C]`."""
        before = previous(x, shift)
        xk, xr = (torch.addcmul(before, x - before, mu) for mu in (self.time_mix_k, self.time_mix_r))
        k = torch.relu(self.key(xk)).square()
        r = torch.sigmoid(self.receptance(xr))
        out = r * into_residual(self.value, k, self.layer)
        if self.receivers:
            self.show(x=x, r=r, k=k, out=out)
        return out


def make_block(layout: Layout, layer: int, group_norm_eps: float, names: Collection[str]) -> Block:
    """`blocks.<layer>` without values. RWKV-4 has no GroupNorm, and no tensors that only some files have."""
    return Block(layout, layer, TimeMix(layout, layer), ChannelMix(layout, layer), halves_float16=True)


_SLOTS = {  # place in the table of kernels/cpu/step4.h: parameter, or module whose parameters go there
    "LN1": "ln1",
    "LN2": "ln2",
    "DECAY": "att.time_decay",
    "FIRST": "att.time_first",
    "MIX_K": "att.time_mix_k",
    "MIX_V": "att.time_mix_v",
    "MIX_R": "att.time_mix_r",
    "KEY": "att.key",
    "VALUE": "att.value",
    "RECEPTANCE": "att.receptance",
    "OUTPUT": "att.output",
    "FFN_MIX_K": "ffn.time_mix_k",
    "FFN_MIX_R": "ffn.time_mix_r",
    "FFN_KEY": "ffn.key",
    "FFN_RECEPTANCE": "ffn.receptance",
    "FFN_VALUE": "ffn.value",
}

register(
    Generation(
        versions=("4.0",),
        make_block=make_block,
        wkv_shape=lambda layout: (3, layout.dim_att),
        first_wkv=lambda layout, device: empty_wkv4_state(layout.n_layer, layout.dim_att, device),
        has_time_state=False,
        halves_float16=True,
        compiled=CompiledForm(4, _SLOTS, compiled.time_mix, compiled.channel_mix),
    )
)
