"""The recurrence itself, one token after the other: the arbiter that every faster form has to agree with."""

import torch


def wkv7_reference(r, w, k, v, a, b, state):
    """WKV7 by its definition; shapes, dtypes and meaning as in `rwkv_lab.wkv.wkv7`, whose checks come before it.

    Per head, with the state S of shape [V,K] and every vector a column:
    `S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ`, `y_t = S_t r_t` (RWKV-7 "Goose", arXiv 2503.14456).
    """
    d = w.exp()
    S = state
    y = []
    for t in range(r.shape[1]):
        Sa = S @ a[:, t, :, :, None]  # [B,H,V,1]
        S = S * d[:, t, :, None, :] + Sa * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(S @ r[:, t, :, :, None])
    return torch.stack(y, dim=1).squeeze(-1), S  # [B,T,H,V], [B,H,V,K]
