"""WKV5, WKV6 and WKV7 in matrix form: inside a chunk of tokens everything is matrix products; only the state goes from
chunk to chunk.

kernels/README.md derives them. Plain torch operations, so any device and autograd work as they are.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# Keys are divided by the decay accumulated since the chunk's start, which for 32 tokens of the strongest decay that
# RWKV-7 can produce (0.5452) is 3.7e-9: far from float32's limits. Entries that survive the causal mask are products
# of two such factors whose powers cancel, so their relative error stays a few rounding errors.
# Timed forward + backward on two cores at [16,256,4,64]: 16 tokens 198 ms, 32 tokens 118 ms, 64 tokens 123 ms.
CHUNK7 = 32

# A power of two. Timed forward + backward on one core at [4,256,4,64]: 16 tokens 125 ms, 32 tokens 45 ms,
# 64 tokens 71 ms.
CHUNK6 = 32


def wkv5_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV5 in matrix form: WKV6's, whose powers of the decay are then the same for every sequence of the batch."""
    return wkv6_chunked(r, w.expand(1, *r.shape[1:]), k, v, u, state)


def wkv6_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV6 in matrix form; shapes, dtypes and meaning as in `rwkv_lab.wkv.wkv6`, whose checks come before it.

    w may be `[1,T,H,N]`. The tail of the last chunk is filled with tokens that leave the state alone.

    Decays of RWKV-6 may be arbitrarily strong, so nothing may be divided by an accumulated decay. What token s < t
    hands to token t decays from s to t; the two lie in different halves of exactly one block of 2, 4, 8, … tokens, and
    the decay is split where the halves meet: both parts are exponentials of sums that are never positive.
    """
    B, T, H, N = r.shape
    L = min(CHUNK6, 1 << (T - 1).bit_length())  # a power of two
    r, w, k, v = (_into_chunks(x, L) for x in (r, w, k, v))  # [B,H,n,L,N]
    y = (r * u.view(H, 1, 1, N) * k).sum(-1, keepdim=True) * v
    half = 1
    while half < L:
        blocks = [x.unflatten(-2, (-1, 2, half)) for x in (r, w, k, v)]  # [B,H,n,L/(2 half),2,half,N]
        (_, r2), (w1, w2), (k1, _), (v1, _) = (x.unbind(-3) for x in blocks)
        handed_on = (r2 * _decay_before(w2)) @ (k1 * _decay_after(w1)).mT @ v1
        y = y + torch.stack([torch.zeros_like(handed_on), handed_on], -3).flatten(-4, -2)
        half *= 2

    gained = v.mT @ (k * _decay_after(w))  # [B,H,n,V,K]: written by the chunk, as it stands at its end
    kept = w.sum(-2, keepdim=True).exp()  # [B,H,n,1,K]
    S = state
    before = []  # the state at the start of each chunk
    for chunk in range(r.shape[2]):
        before.append(S)
        S = S * kept[:, :, chunk] + gained[:, :, chunk]
    y = y + (r * _decay_before(w)) @ torch.stack(before, 2).mT
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def _decay_before(w):
    """Decay from the start of a run of tokens to just before each of them; w, and the result, `[…,L,N]`."""
    return pad(w[..., :-1, :], (0, 0, 1, 0)).cumsum(-2).exp()


def _decay_after(w):
    """Decay from just after each token of a run to the end of the run."""
    return pad(w[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2).exp()


def wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV7 in matrix form; shapes, dtypes and meaning as in `rwkv_lab.wkv.wkv7`, whose checks come before it.

    The tail of the last chunk is filled with tokens that leave the state alone: no decay (w = 0) and k = v = a = b = 0.
    Needs `w >= -2` or so: the sum of -w over one chunk must stay below 80, or exp overflows float32.
    """
    B, T, H, N = r.shape
    L = min(CHUNK7, T)
    r, w, k, v, a, b = (_into_chunks(x, L).flatten(0, 1) for x in (r, w, k, v, a, b))  # [B*H,n,L,N]

    log_P = w.cumsum(-2)
    P, inverse_P = log_P.exp(), (-log_P).exp()
    r, k, b = r * P, k * inverse_P, b * inverse_P
    a = a * (log_P - w).exp()  # a reads the state before this token's decay
    P_end = P[..., -1:, :]  # [B*H,n,1,N]

    # Which earlier token writes what into which later one; a row [token t] x column [token s] matrix for each pair.
    causal = torch.ones(L, L, dtype=r.dtype, device=r.device).tril()
    reads = torch.cat([r, a], -2) @ torch.cat([k, b], -2).mT  # [B*H,n,2L,2L]
    r_k, r_b = reads[..., :L, :L] * causal, reads[..., :L, L:] * causal
    a_k, a_b = reads[..., L:, :L] * causal.tril(-1), reads[..., L:, L:] * causal.tril(-1)

    # u_t = S_{t-1} a_t depends on earlier u: (I - a_b) U = a_k V + a S0ᵀ. Solved for both terms, S0 left open.
    # Substitution, not the product (I + A)(I + A²)(I + A⁴)...: with equal keys the powers of A grow like binomials.
    unit = torch.eye(L, dtype=r.dtype, device=r.device)
    u = torch.linalg.solve_triangular(unit - a_b, torch.cat([a_k @ v, a], -1), upper=False, unitriangular=True)
    y_from = r_b @ u + torch.cat([r_k @ v, r], -1)  # [B*H,n,L,2N]: from inside the chunk | per unit of S0ᵀ
    k_end, b_end = k * P_end, b * P_end
    S_from = u.mT @ b_end  # [B*H,n,2N,N]: written by U | what U does to S0
    gained = S_from[..., :N, :] + v.mT @ k_end
    carried = S_from[..., N:, :] + torch.diag_embed(P_end.squeeze(-2))

    S = state.reshape(B * H, N, N)
    before = []  # the state at the start of each chunk
    for chunk in range(r.shape[1]):
        before.append(S)
        S = torch.baddbmm(gained[:, chunk], S, carried[:, chunk])
    y = y_from[..., :N] + y_from[..., N:] @ torch.stack(before, 1).mT  # [B*H,n,L,N]
    return y.view(B, H, -1, N)[:, :, :T].transpose(1, 2), S.view(B, H, N, N)


def _into_chunks(x, L):
    """[B,T,H,N] -> [B,H,n,L,N], zeros behind the last token."""
    B, T, H, N = x.shape
    x = pad(x, (0, 0, 0, 0, 0, -T % L))
    return x.view(B, -1, L, H, N).permute(0, 3, 1, 2, 4)
