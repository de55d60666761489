"""Prefill of RWKV-4's layers, formulas as in `rwkv_lab/model/rwkv4.py`; the channel mix is also that of RWKV-5."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.prefill import Pass
from rwkv_lab.wkv import wkv4


def time_mix(
    p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x `[B*T,C]` plus the time mix, in place; shape is (B, T). Returns the new shift and WKV state, and v_first."""
    att, rows, A = block.att, len(x), len(block.att.time_decay)
    mu = (att.time_mix_k, att.time_mix_v, att.time_mix_r)
    (xk, xv, xr), shift = p.mix_in(block.ln1, x, shape, shift, mu, "kvr", of_present=True)
    k, v, r = (p.scratch(z, rows, A) for z in "kvr")
    p.multiply(rows, (xk, att.key, k), (xv, att.value, v), (xr, att.receptance, r))
    y, wkv = wkv4(-torch.exp(att.time_decay.float()), att.time_first, k.view(*shape, A), v.view(*shape, A), wkv)
    packed = p.packed("out", rows, A)
    y = y.contiguous().view(rows, A)
    p.call("gate4", p.floats(r, rows, A), p.floats(y, rows, A), rows, A, p.floats(packed), p.pairs)
    p.multiply(rows, (packed, att.output, x), add=True)
    return shift, wkv, v_first


def channel_mix(p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor) -> Tensor:
    """x `[B*T,C]` plus the channel mix, in place. Returns the new shift."""
    ffn = block.ffn
    return gated_channel_mix(p, block, x, shape, shift, (ffn.time_mix_k, ffn.time_mix_r), of_present=True)


def gated_channel_mix(
    p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor, mu: Sequence[Tensor], of_present: bool
) -> Tensor:
    """The channel mix of RWKV-4 to 6; mu are the shares of k and r, of the present token's where `of_present`."""
    ffn, (rows, C) = block.ffn, x.shape
    (xk, xr), shift = p.mix_in(block.ln2, x, shape, shift, mu, "kr", of_present=of_present)
    hidden = p.scratch("ffn", rows, ffn.key.weight.shape[0])
    r, y = p.scratch("ffn r", rows, C), p.scratch("ffn y", rows, C)
    p.multiply(rows, (xk, ffn.key, hidden), (xr, ffn.receptance, r))
    (packed,) = p.activate(rows, ("ffn", hidden, abi.RELU_SQUARE))
    p.multiply(rows, (packed, ffn.value, y))
    p.call("add_gated", *(p.floats(z, rows, C) for z in (x, r, y)), rows, C)
    return shift
