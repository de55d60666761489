"""The WKV operators on a GPU: hands tensors to the kernels in `kernels/cuda`, forwards and backwards.

Shapes and meanings are those of the functions in `rwkv_lab.wkv`, whose checks come before these. Per-token tensors may
be float32, bfloat16 or float16; y and the gradients come back in their dtype. States, and what has no token axis, are
float32. A per-token w may be float32 beside 16-bit others: rounding a log-decay changes every state after it.

`…_forward` returns y, the final state, and, when `keep` is set, the states that `…_backward` starts from, else None.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rwkv_lab.errors import KernelError
from rwkv_lab.wkv.loader import cuda_library

HEAD_SIZES = (32, 64, 128)
TILE = 16  # tokens between two kept states, as in kernels/cuda/tiles.cuh

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in kernels/cuda/dispatch.cuh
_chunked = True  # tests switch it off, to have the recurrence for the same tensors
_SOURCES = {"wkv4": "wkv4", "wkv5": "wkv6", "wkv6": "wkv6", "wkv7": "wkv7"}


def wkv4_forward(w, u, k, v, state, keep: bool = False):
    """WKV4; the states kept are `[B,ceil(T/16),3,A]`."""
    B, T, A = v.shape
    dtype = v.dtype
    k, v = _tokens(k, v)
    w, u, state = (_laid_out(x.float()) for x in (w, u, state))
    y, last = _empty_like(v), _empty_like(state)
    kept = _empty((B, -(-T // TILE), 3, A), v) if keep else None
    _call("wkv4_forward", (_TYPES[v.dtype], B, T, A), w, u, k, v, state, y, last, kept)
    return y.to(dtype), last, kept


def wkv4_backward(w, u, k, v, kept, dy, dlast):
    """Gradients of w, u, k, v and the state, from those of y and the final state."""
    B, T, A = v.shape
    dtypes = [x.dtype for x in (w, u, k, v)]
    k, v, dy = _tokens(k, v, dy)
    w, u, dlast = (_laid_out(x.float()) for x in (w, u, dlast))
    dw, du = _empty((B, A), v), _empty((B, A), v)
    dk, dv, dstate = _empty_like(k), _empty_like(v), _empty_like(dlast)
    _call("wkv4_backward", (_TYPES[v.dtype], B, T, A), w, u, k, v, kept, dy, dlast, dw, du, dk, dv, dstate)
    return *_as(dtypes, dw.sum(0), du.sum(0), dk, dv), dstate


def wkv5_forward(r, w, k, v, u, state, keep: bool = False):
    """WKV5, with w `[H,N]`; the states kept are `[B,H,ceil(T/16),V,K]`."""
    return _wkv6_forward("wkv5_forward", r, w.float(), k, v, u, state, keep)


def wkv5_backward(r, w, k, v, u, kept, dy, dlast):
    """Gradients of r, w, k, v, u and the state, from those of y and the final state."""
    H, N = w.shape
    dw = _empty((v.shape[0], H, N), v)
    dr, dk, dv, du, dstate = _wkv6_backward("wkv5_backward", dw, r, w.float(), k, v, u, kept, dy, dlast)
    return dr, dw.sum(0).to(w.dtype), dk, dv, du, dstate


def wkv6_forward(r, w, k, v, u, state, keep: bool = False):
    """WKV6; the states kept are `[B,H,ceil(T/16),V,K]`."""
    return _wkv6_forward("wkv6_forward", r, w, k, v, u, state, keep)


def wkv6_backward(r, w, k, v, u, kept, dy, dlast):
    """Gradients of r, w, k, v, u and the state, from those of y and the final state."""
    dw = _empty(w.shape, v, dtype=_decay_dtype(w, r, k, v, dy))
    dr, dk, dv, du, dstate = _wkv6_backward("wkv6_backward", dw, r, w, k, v, u, kept, dy, dlast)
    return dr, dw.to(w.dtype), dk, dv, du, dstate


def _wkv6_forward(function, r, w, k, v, u, state, keep):
    B, T, H, N = v.shape
    dtype = v.dtype
    w = _laid_out(w.to(_decay_dtype(w, r, k, v)))
    r, k, v = _tokens(r, k, v)
    u, state = _laid_out(u.float()), _laid_out(state.float())
    y, last = _empty_like(v), _empty_like(state)
    kept = _empty((B, H, -(-T // TILE), N, N), v) if keep else None
    _call(function, (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N), r, w, k, v, u, state, y, last, kept)
    return y.to(dtype), last, kept


def _wkv6_backward(function, dw, r, w, k, v, u, kept, dy, dlast):
    B, T, H, N = v.shape
    dtypes = [x.dtype for x in (r, k, v, u)]
    w = _laid_out(w.to(dw.dtype))
    r, k, v, dy = _tokens(r, k, v, dy)
    u, dlast = _laid_out(u.float()), _laid_out(dlast.float())
    dr, dk, dv, dstate = (_empty_like(x) for x in (r, k, v, dlast))
    du = _empty((B, H, N), v)
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    _call(function, sizes, r, w, k, v, u, kept, dy, dlast, dr, dw, dk, dv, du, dstate)
    return *_as(dtypes, dr, dk, dv, du.sum(0)), dstate


def wkv7_forward(r, w, k, v, a, b, state, keep: bool = False):
    """WKV7; the states kept are `[B,H,ceil(T/16)+1,V,K]`, the final one among them."""
    B, T, H, N = v.shape
    dtype = v.dtype
    w = _laid_out(w.to(_decay_dtype(w, r, k, v, a, b)))
    r, k, v, a, b = _tokens(r, k, v, a, b)
    state = _laid_out(state.float())
    y, last = _empty_like(v), _empty_like(state)
    kept = _empty((B, H, -(-T // TILE) + 1, N, N), v) if keep else None
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    function = "wkv7_forward_chunked" if _on_tensor_cores(v) else "wkv7_forward"
    _call(function, sizes, r, w, k, v, a, b, state, y, last, kept)
    return y.to(dtype), last, kept


def wkv7_backward(r, w, k, v, a, b, kept, dy, dlast):
    """Gradients of r, w, k, v, a, b and the state, from those of y and the final state."""
    B, T, H, N = v.shape
    dtypes = [x.dtype for x in (r, w, k, v, a, b)]
    w = _laid_out(w.to(_decay_dtype(w, r, k, v, a, b, dy)))
    r, k, v, a, b, dy = _tokens(r, k, v, a, b, dy)
    dlast = _laid_out(dlast.float())
    gradients = [_empty_like(x) for x in (r, w, k, v, a, b, dlast)]
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    tensors = (r, w, k, v, a, b, kept, dy, dlast, *gradients)
    if _on_tensor_cores(v):
        _call("wkv7_backward_chunked", sizes, *tensors, _empty((B * H,), v, dtype=torch.int32))
    else:
        _call("wkv7_backward", sizes, *tensors)
    return *_as(dtypes, *gradients[:6]), gradients[6]


def _on_tensor_cores(v) -> bool:
    """Whether WKV7 has a chunked kernel for such per-token tensors."""
    return _chunked and v.dtype == torch.bfloat16 and v.shape[-1] == 64


def _tokens(*tensors):
    """Per-token tensors in the one dtype that holds them all, as the kernels want them."""
    dtype = _common_dtype(*tensors)
    return [_laid_out(x.to(dtype)) for x in tensors]


def _decay_dtype(w, *others):
    """What a per-token w is passed as: what the others are, unless that would round it."""
    dtype = _common_dtype(*others)
    return dtype if w.dtype == dtype else torch.float32


def _common_dtype(first, *others):
    dtype = first.dtype
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    if dtype not in _TYPES:
        raise KernelError(f"The wkv backend 'cuda' has no kernels for {dtype}; use 'chunked', or float32.")
    return dtype


def _laid_out(x):
    """Contiguous, and where 16 bytes can be moved at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _as(dtypes, *tensors):
    return [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]


def _empty(shape, like, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_like(x):
    return _empty(x.shape, x, dtype=x.dtype)


def _call(function: str, numbers: tuple[int, ...], *tensors) -> None:
    """Queue a kernel on the current stream of the tensors' device."""
    with _current(tensors[0].device) as (library, stream):
        pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
        code = getattr(library(_SOURCES[function[:4]]), function)(*numbers, *pointers, ctypes.c_void_p(stream))
    if code:
        raise KernelError(f"{function} with {numbers}: the CUDA kernel was not started, error {code}.")


@contextmanager
def _current(device: torch.device) -> Iterator[tuple]:
    """Inside the block: how to get a library for this device, and the stream to use, the device being current."""
    with torch.cuda.device(device):
        architecture = "{}{}".format(*torch.cuda.get_device_capability(device))
        yield lambda name: cuda_library(name, (architecture,)), torch.cuda.current_stream(device).cuda_stream
