"""The recurrences themselves, one token after the other: the reference that every faster form is compared with.

Shapes, dtypes and meanings are those of the functions in `rwkv_lab.wkv`, whose checks come before these.
"""

import torch
from torch import Tensor


def wkv4_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV4 by its definition (RWKV-4 "Dove", arXiv 2305.13048), per channel.

    `y_t = (e^{p-q} a + e^{u+k-q} v) / (e^{p-q} b + e^{u+k-q})`, q the larger of the exponents p and u + k; then
    the sums a e^p and b e^p decay by e^w, and e^k v and e^k are added to them. No exponent is ever positive.
    """
    a, b, p = state.unbind(1)  # [B,A]
    y = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        q = torch.maximum(p, u + k_t)
        past, now = (p - q).exp(), (u + k_t - q).exp()
        y.append((past * a + now * v_t) / (past * b + now))
        q = torch.maximum(p + w, k_t)
        past, now = (p + w - q).exp(), (k_t - q).exp()
        a, b, p = past * a + now * v_t, past * b + now, q
    return torch.stack(y, dim=1), torch.stack([a, b, p], dim=1)  # [B,T,A], [B,3,A]


def wkv5_reference(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV5 by its definition (RWKV-5 "Eagle", arXiv 2404.05892): WKV6 with one decay for all tokens."""
    return wkv6_reference(r, w.expand(r.shape), k, v, u, state)


def wkv6_reference(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV6 by its definition (RWKV-6 "Finch", arXiv 2404.05892).

    Per head, with the state S of shape [V,K] and every vector a column:
    `y_t = (S_{t-1} + v_t (u ⊙ k_t)ᵀ) r_t`, `S_t = S_{t-1} diag(exp(w_t)) + v_t k_tᵀ`.
    """
    d = w.exp()
    S = state
    y = []
    for t in range(r.shape[1]):
        r_t, k_t, v_t = r[:, t], k[:, t], v[:, t]  # [B,H,N]
        bonus = (r_t * u * k_t).sum(-1, keepdim=True) * v_t
        y.append((S @ r_t[..., None]).squeeze(-1) + bonus)
        S = S * d[:, t, :, None, :] + v_t[..., None] * k_t[:, :, None, :]
    return torch.stack(y, dim=1), S  # [B,T,H,V], [B,H,V,K]


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV7 by its definition (RWKV-7 "Goose", arXiv 2503.14456).

    Per head, with the state S of shape [V,K] and every vector a column:
    `S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ`, `y_t = S_t r_t`.
    """
    d = w.exp()
    S = state
    y = []
    for t in range(r.shape[1]):
        Sa = S @ a[:, t, :, :, None]  # [B,H,V,1]
        S = S * d[:, t, :, None, :] + Sa * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(S @ r[:, t, :, :, None])
    return torch.stack(y, dim=1).squeeze(-1), S  # [B,T,H,V], [B,H,V,K]
