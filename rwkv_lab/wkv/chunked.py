"""The matrix form: inside a chunk of tokens everything is matrix products; only the state goes from chunk to chunk.

kernels/README.md derives it. Plain torch operations, so any device and autograd work as they are.
"""

import torch
from torch.nn.functional import pad

# Keys are divided by the decay accumulated since the chunk's start, which for 32 tokens of the strongest decay that
# RWKV-7 can produce (0.5452) is 3.7e-9: far from float32's limits. Entries that survive the causal mask are products
# of two such factors whose powers cancel, so their relative error stays a few rounding errors.
# Timed forward + backward on two cores at [16,256,4,64]: 16 tokens 198 ms, 32 tokens 118 ms, 64 tokens 123 ms.
CHUNK = 32


def wkv7_chunked(r, w, k, v, a, b, state):
    """WKV7 in matrix form; shapes, dtypes and meaning as in `rwkv_lab.wkv.wkv7`, whose checks come before it.

    The tail of the last chunk is filled with tokens that leave the state alone: no decay (w = 0) and k = v = a = b = 0.
    Needs `w >= -2` or so: the sum of -w over one chunk must stay below 80, or exp overflows float32.
    """
    B, T, H, N = r.shape
    L = min(CHUNK, T)
    r, w, k, v, a, b = (_into_chunks(x, L) for x in (r, w, k, v, a, b))  # [B*H,n,L,N]

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
    """[B,T,H,N] -> [B*H,n,L,N], zeros behind the last token."""
    B, T, H, N = x.shape
    x = pad(x, (0, 0, 0, 0, 0, -T % L))
    return x.view(B, -1, L, H, N).permute(0, 3, 1, 2, 4).reshape(B * H, -1, L, N)
