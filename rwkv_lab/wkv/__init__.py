"""The WKV operators: what an RWKV layer remembers, in forms that agree and differ in speed."""

import torch

from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.wkv.choice import chosen_backend, use_backend
from rwkv_lab.wkv.chunked import wkv7_chunked
from rwkv_lab.wkv.reference import wkv7_reference

__all__ = ["wkv7", "backends", "use_backend"]

_WKV7 = {"reference": wkv7_reference, "chunked": wkv7_chunked}

# Below this many tokens the recurrence is the faster one of the two (measured on two CPU cores, forward only).
_SHORT = 4


def backends() -> tuple[str, ...]:
    """Names that `backend=` takes besides "auto", slowest first."""
    return tuple(_WKV7)


def wkv7(r, w, k, v, a, b, state=None, backend: str = "auto"):
    """Run the RWKV-7 recurrence `S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ`, `y_t = S_t r_t`.

    Args:
        r: receptance `[B,T,H,N]`, any floating dtype.
        w: **log-decay** `[B,T,H,N]`, <= 0; RWKV-7 has `w = -exp(-1/2) sigmoid(wx)`, so -0.6066 < w < 0.
            It is neither the kernels' w of other projects (there the decay is exp(-exp(w))) nor wx.
        k, v: key and value `[B,T,H,N]`.
        a, b: what is read from the state and where it is written back, `[B,T,H,N]`; in RWKV-7 `-kk` and `kk * a`.
        state: S before the first token, `[B,H,V,K]` with V = K = N; None for zeros. Never changed in place.
        backend: one of `backends()`, or "auto" for the fastest at this length.

    Returns:
        y `[B,T,H,N]` in r's dtype, and the state after the last token `[B,H,V,K]`.
        All inner arithmetic and the returned state are float32, or float64 when any input is float64.
        Differentiable with respect to every input, the state included.

    Raises:
        KernelError: no such backend.
        ParameterError: shapes that do not fit.
    """
    B, T, H, N = _check_shapes(r, w, k, v, a, b, state)
    if backend == "auto":
        backend = chosen_backend()
    if backend == "auto":
        backend = "reference" if T < _SHORT else "chunked"
    if backend not in _WKV7:
        raise KernelError(f"There is no wkv backend {backend!r}.\nUse one of: auto, {', '.join(_WKV7)}.")

    given = [r, w, k, v, a, b] + ([] if state is None else [state])
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    if state is None:
        state = torch.zeros(B, H, N, N, device=r.device)
    y, state = _WKV7[backend](*(x.to(dtype) for x in (r, w, k, v, a, b, state)))
    return y.to(r.dtype), state


def _check_shapes(r, w, k, v, a, b, state):
    if r.ndim != 4 or 0 in r.shape:
        raise ParameterError(f"wkv7: r has shape {list(r.shape)}; it must be [B,T,H,N] with nothing empty.")
    for name, x in zip("wkvab", (w, k, v, a, b), strict=True):
        if x.shape != r.shape:
            raise ParameterError(f"wkv7: {name} has shape {list(x.shape)}, r has {list(r.shape)}; they must be equal.")
    B, _, H, N = r.shape
    if state is not None and tuple(state.shape) != (B, H, N, N):
        raise ParameterError(f"wkv7: the state has shape {list(state.shape)}; r needs [B,H,V,K] = {[B, H, N, N]}.")
    return r.shape
