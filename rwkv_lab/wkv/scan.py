"""WKV4 over all tokens at once. It has no matrices to multiply; its parallel form is a scan in log2(T) rounds."""

import torch
from torch import Tensor


def wkv4_chunked(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV4 by doubling; shapes, dtypes and meaning as in `rwkv_lab.wkv.wkv4`, whose checks come before it.

    Entry t begins as what token t alone adds, `(v, 1, k)` for (a, b, p). Round i adds to it what entry t - 2^i has
    gathered so far, decayed by 2^i tokens; when 2^i reaches T, every entry holds the state after its token.
    Two tokens are never further apart than their exponents say, so no exponential overflows.
    """
    T = k.shape[1]
    a, b, p = (  # [B,T+1,A]; entry 0 is the state before the first token
        torch.cat([before.unsqueeze(1), own], dim=1)
        for before, own in zip(state.unbind(1), (v, torch.ones_like(k), k), strict=True)
    )
    step = 1
    while step <= T:
        past = p[:, :-step] + step * w
        q = torch.maximum(past, p[:, step:])
        e_past, e_own = (past - q).exp(), (p[:, step:] - q).exp()
        a_sum = torch.addcmul(e_past * a[:, :-step], e_own, a[:, step:])
        b_sum = torch.addcmul(e_past * b[:, :-step], e_own, b[:, step:])
        a, b, p = (torch.cat([x[:, :step], new], dim=1) for x, new in ((a, a_sum), (b, b_sum), (p, q)))
        step *= 2

    q = torch.maximum(p[:, :-1], u + k)
    e_past, e_own = (p[:, :-1] - q).exp(), (u + k - q).exp()
    y = (e_past * a[:, :-1] + e_own * v) / (e_past * b[:, :-1] + e_own)
    return y, torch.stack([a[:, -1], b[:, -1], p[:, -1]], dim=1)
