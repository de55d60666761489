"""RWKV-0.1, a toy whose states decay at one rate per head: it would be `rwkv_lab/model/rwkv01.py`."""

import torch

from rwkv_lab.model.block import Block, linear, matrix, previous
from rwkv_lab.model.capture import Capturable
from rwkv_lab.model.registry import Generation, register
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.wkv import wkv5


@standard
class TimeMix(Capturable):
    """`blocks.i.att`."""

    def __init__(self, layout):
        super().__init__()
        C, A = layout.n_embd, layout.dim_att
        self.n_head, self.head_size = layout.n_head, layout.head_size
        self.time_toy = matrix(self.n_head)  # the log-decay is -exp of it
        self.receptance, self.key, self.value, self.output = linear(C, A), linear(C, A), linear(C, A), linear(A, C)
        self.register_parameter("time_state", None)

    def forward(self, x, shift, wkv_state, v_first):
        heads = (*x.shape[:2], self.n_head, self.head_size)
        mixed = (x + previous(x, shift)) / 2
        r, k, v = (f(mixed).view(heads) for f in (self.receptance, self.key, self.value))
        w = -torch.exp(self.time_toy.to(wkv_state.dtype))[:, None].expand(heads[2:])
        y, wkv_state = wkv5(r, w, k, v, torch.ones_like(w), wkv_state)
        out = self.output(y.flatten(2).to(x.dtype))
        if self.receivers:
            self.show(x=x, r=r, k=k, v=v, y=y, state=wkv_state[:, None], out=out)
        return out, wkv_state, v_first


@standard
class ChannelMix(Capturable):
    """`blocks.i.ffn`."""

    def __init__(self, layout):
        super().__init__()
        self.key, self.value = linear(layout.n_embd, layout.dim_ffn), linear(layout.dim_ffn, layout.n_embd)

    def forward(self, x, shift):
        return self.value(torch.relu(self.key((x + previous(x, shift)) / 2)).square())


def make_block(layout, layer: int, group_norm_eps: float, names) -> Block:
    return Block(layout, layer, TimeMix(layout), ChannelMix(layout), halves_float16=False)


register(Generation(versions=("0.1",), make_block=make_block))
