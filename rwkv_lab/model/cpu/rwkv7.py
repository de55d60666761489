"""Prefill of RWKV-7's layers, formulas as in `rwkv_lab/model/rwkv7.py`."""

from typing import Any

from torch import Size, Tensor

from rwkv_lab.model.cpu import abi
from rwkv_lab.model.cpu.prefill import Pass, Transposed
from rwkv_lab.wkv import wkv7


def time_mix(
    p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x `[B*T,C]` plus the time mix, in place; shape is (B, T). Returns the new shift and WKV state, and v_first."""
    att, rows = block.att, len(x)
    H, N = att.n_head, att.head_size
    A, heads = H * N, (*shape, H, N)
    mu = (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
    (xr, xw, xk, xv, xa, xg), shift = p.mix_in(block.ln1, x, shape, shift, mu, "rwkvag")
    # Layer 0's values are read by all others, so they stay where no other layer's go.
    r, k, w, a, g, read = (p.scratch(z, rows, A) for z in ("r", "k", "w", "a", "g", "read"))
    first = v_first is None
    v = p.scratch("v_first" if first else "v", rows, A)
    low = {z: getattr(att, f"{z}1") for z in ("wag" if first else "wagv")}
    hidden = {z: p.scratch(f"hidden {z}", rows, weight.shape[1]) for z, weight in low.items()}
    inputs = {"w": xw, "a": xa, "g": xg, "v": xv}
    p.multiply(
        *(rows, (xr, att.receptance, r), (xk, att.key, k), (xv, att.value, v)),
        *((inputs[z], Transposed(weight), hidden[z]) for z, weight in low.items()),
    )
    activation = {"w": abi.TANH, "a": abi.NONE, "g": abi.SIGMOID, "v": abi.NONE}
    packed = p.activate(rows, *((f"hidden {z}", hidden[z], activation[z]) for z in low))
    vx = None if first else p.scratch("vx", rows, A)
    outputs = {"w": w, "a": a, "g": g, "v": vx}
    seconds = ((one, Transposed(getattr(att, f"{z}2")), outputs[z]) for z, one in zip(low, packed, strict=True))
    p.multiply(rows, *seconds)
    p.call(
        *("gates7", *(p.floats(z, rows, A) for z in (k, v, w, a, vx, v_first, read))),
        *(p.weights(z) for z in (att.w0, att.a0, None if first else att.v0, att.k_k, att.k_a)),
        *(p.dtype, rows, H, N),
    )
    y, wkv = wkv7(r.view(heads), w.view(heads), k.view(heads), v.view(heads), read.view(heads), a.view(heads), wkv)
    p.heads_out(att, x, y, g, silu=False, bonus=(r, k, v, att.r_k))
    return shift, wkv, v if first else v_first


def channel_mix(p: Pass, block: Any, x: Tensor, shape: Size, shift: Tensor) -> Tensor:
    """x `[B*T,C]` plus the channel mix, in place. Returns the new shift."""
    ffn = block.ffn
    (xk,), shift = p.mix_in(block.ln2, x, shape, shift, [ffn.x_k], "k")
    hidden = p.scratch("ffn", len(x), ffn.key.weight.shape[0])
    p.multiply(len(x), (xk, ffn.key, hidden))
    (packed,) = p.activate(len(x), ("ffn", hidden, abi.RELU_SQUARE))
    p.multiply(len(x), (packed, ffn.value, x), add=True)
    return shift
