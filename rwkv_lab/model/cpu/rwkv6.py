"""Prefill of RWKV-6's layers, formulas as in `rwkv_lab/model/rwkv6.py`."""

from typing import Any

from torch import Size, Tensor

from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.prefill import Pass, Transposed
from rwkv_lab.model.cpu.rwkv4 import gated_channel_mix
from rwkv_lab.wkv import wkv6


def time_mix(
    p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x `[B*T,C]` plus the time mix, in place; shape is (B, T). Returns the new shift and WKV state, and v_first."""
    att, (rows, C) = block.att, x.shape
    A, heads = att.n_head * att.head_size, (*shape, att.n_head, att.head_size)
    (one,), _ = p.mix_in(block.ln1, x, shape, shift, [att.time_maa_x], "x")
    low = p.scratch("low", rows, att.time_maa_w1.shape[1])
    p.multiply(rows, (one, Transposed(att.time_maa_w1), low))
    parts = zip("wkvrg", low.view(rows, 5, -1).unbind(1), strict=True)
    packed = p.activate(rows, *((f"low {z}", part, abi.TANH) for z, part in parts))
    extra = p.scratch("extra", 5, rows, C)
    p.multiply(rows, *zip(packed, map(Transposed, att.time_maa_w2), extra, strict=True))
    mu = [getattr(att, f"time_maa_{z}") for z in "wkvrg"]
    (xw, xk, xv, xr, xg), shift = p.mix_in(block.ln1, x, shape, shift, mu, "wkvrg", extra=extra)
    r, k, v, g, w = (p.scratch(z, rows, A) for z in "rkvgw")
    low = p.scratch("decay", rows, att.time_decay_w1.shape[1])
    p.multiply(
        *(rows, (xr, att.receptance, r), (xk, att.key, k), (xv, att.value, v)),
        *((xg, att.gate, g), (xw, Transposed(att.time_decay_w1), low)),
    )
    (low,) = p.activate(rows, ("decay", low, abi.TANH))
    p.multiply(rows, (low, Transposed(att.time_decay_w2), w))
    p.call("decays6", p.floats(w, rows, A), p.weights(att.time_decay), p.dtype, rows, A)
    y, wkv = wkv6(r.view(heads), w.view(heads), k.view(heads), v.view(heads), att.time_faaaa, wkv)
    p.heads_out(att, x, y, g, silu=True)
    return shift, wkv, v_first


def channel_mix(p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor) -> Tensor:
    """x `[B*T,C]` plus the channel mix, in place. Returns the new shift."""
    ffn = block.ffn
    return gated_channel_mix(p, block, x, shape, shift, (ffn.time_maa_k, ffn.time_maa_r), of_present=False)
