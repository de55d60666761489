"""Prefill of RWKV-5's layers, formulas as in `rwkv_lab/model/rwkv5.py`."""

from typing import Any

import torch
from torch import Size, Tensor

from rwkv_lab.model.cpu.prefill import Pass
from rwkv_lab.model.cpu.rwkv4 import channel_mix
from rwkv_lab.wkv import wkv5

__all__ = ["channel_mix", "time_mix"]


def time_mix(
    p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x `[B*T,C]` plus the time mix, in place; shape is (B, T). Returns the new shift and WKV state, and v_first."""
    att, rows = block.att, len(x)
    A, heads = att.n_head * att.head_size, (*shape, att.n_head, att.head_size)
    names = "kvrg" if att.gated else "kvr"
    mu = [getattr(att, f"time_mix_{z}") for z in names]
    inputs, shift = p.mix_in(block.ln1, x, shape, shift, mu, names, of_present=True)
    weights = {"k": att.key, "v": att.value, "r": att.receptance} | ({"g": att.gate} if att.gated else {})
    out = {z: p.scratch(z, rows, A) for z in names}
    p.multiply(rows, *((one, weights[z], out[z]) for z, one in zip(names, inputs, strict=True)))
    log_decay, bonus = att.decay_and_bonus(torch.float32)
    y, wkv = wkv5(out["r"].view(heads), log_decay, out["k"].view(heads), out["v"].view(heads), bonus, wkv)
    p.heads_out(att, x, y, out.get("g"), silu=True)
    return shift, wkv, v_first
