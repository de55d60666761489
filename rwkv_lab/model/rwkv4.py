"""RWKV-4 "Dove": per channel, a mean of all values so far, weighted by their keys and their age.

Formulas: arXiv 2305.13048. The WKV state of a layer is `[B,3,A]`: the weighted sums with and without the values, and
the exponent that both are divided by; `rwkv_lab.wkv.wkv4` says more.
"""

import torch

from rwkv_lab.model.block import Block, into_residual, linear, matrix, previous, vector
from rwkv_lab.model.capture import Watched
from rwkv_lab.wkv import wkv4


class TimeMix(Watched):
    """`blocks.i.att`: mixes along time through the WKV state."""

    def __init__(self, layout, layer: int):
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

    def forward(self, x, shift, wkv_state, v_first):
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
        if self.watchers:
            self.seen(x=x, r=r, w=log_decay.expand(k.shape), k=k, v=v, y=y, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first


class ChannelMix(Watched):
    """`blocks.i.ffn` of RWKV-4 and 5: mixes the channels of one token, and lets through what receptance says."""

    def __init__(self, layout, layer: int):
        super().__init__()
        C, F = layout.n_embd, layout.dim_ffn
        self.layer = layer
        self.time_mix_k, self.time_mix_r = vector(C), vector(C)
        self.key = linear(C, F)
        self.receptance = linear(C, C)
        self.value = linear(F, C)

    def forward(self, x, shift):
        """x `[B,T,C]`, shift `[B,C]` -> `[B,T,C]`."""
        before = previous(x, shift)
        xk, xr = (torch.addcmul(before, x - before, mu) for mu in (self.time_mix_k, self.time_mix_r))
        k = torch.relu(self.key(xk)).square()
        r = torch.sigmoid(self.receptance(xr))
        out = r * into_residual(self.value, k, self.layer)
        if self.watchers:
            self.seen(x=x, r=r, k=k, out=out)
        return out


def make_block(layout, layer: int, group_norm_eps: float, names) -> Block:
    """`blocks.<layer>` without values. RWKV-4 has no GroupNorm, and no tensors that only some files have."""
    return Block(layout, layer, TimeMix(layout, layer), ChannelMix(layout, layer))
