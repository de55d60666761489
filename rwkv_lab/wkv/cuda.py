"""Calls into the kernels of `kernels/cuda`: checks nothing, allocates the outputs, hands over pointers.

Per-token tensors may be float32, bfloat16 or float16; where they differ, all are passed as what holds them all. Only a
per-token w may be float32 beside 16-bit others: rounding a log-decay changes every state after it. y and the gradients
come back in the dtypes of v and of the inputs. States, and what has no token axis, are float32.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rwkv_lab.errors import KernelError
from rwkv_lab.wkv.loader import cuda_library

HEAD_SIZES = (32, 64, 128)
CHUNK = 16  # tokens between two kept states; the same number stands in the sources

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in kernels/cuda/dispatch.cuh
_SOURCES = {"wkv4": "wkv4", "wkv5": "wkv6", "wkv6": "wkv6", "wkv7": "wkv7"}
_chunked = True  # whether WKV7 may take the tensor cores


def wkv4_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,A]`, final state `[B,3,A]`, and, to go backward, states along time `[B,chunks,3,A]` (else empty)."""
    B, T, A = v.shape
    dtype = v.dtype
    k, v = _tokens(k, v)
    w, u, state = (_laid_out(x.float()) for x in (w, u, state))
    y, final = _empty_like(v), _empty_like(state)
    kept = _empty((B, -(-T // CHUNK), 3, A) if keep else 0, v)
    _call("wkv4_forward", (_TYPES[v.dtype], B, T, A), w, u, k, v, state, y, final, kept)
    return y.to(dtype), final, kept


def wkv4_backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u, k, v and the state; d_final may be None."""
    B, T, A = v.shape
    dtypes = [x.dtype for x in (w, u, k, v)]
    k, v, dy = _tokens(k, v, dy)
    w, u, d_final = _laid_out(w.float()), _laid_out(u.float()), _or_zeros(d_final, (B, 3, A), v)
    dw, du = _empty((B, A), v), _empty((B, A), v)
    dk, dv, d_state = _empty_like(k), _empty_like(v), _empty_like(d_final)
    _call("wkv4_backward", (_TYPES[v.dtype], B, T, A), w, u, k, v, kept, dy, d_final, dw, du, dk, dv, d_state)
    dw, du, dk, dv = _as(dtypes, dw.sum(0), du.sum(0), dk, dv)
    return dw, du, dk, dv, d_state


def wkv6_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward, states along time `[B,H,chunks,V,K]` (else empty).

    w is `[B,T,H,N]`, or `[H,N]` for WKV5.
    """
    B, T, H, N = v.shape
    dtype = v.dtype
    w = _laid_out(w.to(_decay_dtype(w, r, k, v)))
    r, k, v = _tokens(r, k, v)
    u, state = _laid_out(u.float()), _laid_out(state.float())
    y, final = _empty_like(v), _empty_like(state)
    kept = _empty((B, H, -(-T // CHUNK), N, N) if keep else 0, v)
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    _call(f"wkv{6 if w.ndim == 4 else 5}_forward", sizes, r, w, k, v, u, state, y, final, kept)
    return y.to(dtype), final, kept


def wkv6_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, u and the state; d_final may be None."""
    B, T, H, N = v.shape
    dtypes = [x.dtype for x in (r, w, k, v, u)]
    w = _laid_out(w.to(_decay_dtype(w, r, k, v, dy)))
    r, k, v, dy = _tokens(r, k, v, dy)
    u, d_final = _laid_out(u.float()), _or_zeros(d_final, (B, H, N, N), v)
    dr, dk, dv, d_state = (_empty_like(x) for x in (r, k, v, d_final))
    dw, du = _empty_like(w) if w.ndim == 4 else _empty((B, H, N), v), _empty((B, H, N), v)
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    function = f"wkv{6 if w.ndim == 4 else 5}_backward"
    _call(function, sizes, r, w, k, v, u, kept, dy, d_final, dr, dw, dk, dv, du, d_state)
    dr, dw, dk, dv, du = _as(dtypes, dr, dw if w.ndim == 4 else dw.sum(0), dk, dv, du.sum(0))
    return dr, dw, dk, dv, du, d_state


def wkv7_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward, states along time `[B,H,chunks+1,V,K]` with the
    final one (else empty); the fourth place, where the CPU keeps readings, is empty."""
    B, T, H, N = v.shape
    dtype = v.dtype
    w = _laid_out(w.to(_decay_dtype(w, r, k, v, a, b)))
    r, k, v, a, b = _tokens(r, k, v, a, b)
    state = _laid_out(state.float())
    y, final = _empty_like(v), _empty_like(state)
    kept = _empty((B, H, -(-T // CHUNK) + 1, N, N) if keep else 0, v)
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    function = "wkv7_forward_chunked" if _on_tensor_cores(v) else "wkv7_forward"
    _call(function, sizes, r, w, k, v, a, b, state, y, final, kept)
    return y.to(dtype), final, kept, _empty(0, v)


def wkv7_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    kept: Tensor,
    readings: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, a, b and the state; d_final may be None."""
    B, T, H, N = v.shape
    dtypes = [x.dtype for x in (r, w, k, v, a, b)]
    w = _laid_out(w.to(_decay_dtype(w, r, k, v, a, b, dy)))
    r, k, v, a, b, dy = _tokens(r, k, v, a, b, dy)
    d_final = _or_zeros(d_final, (B, H, N, N), v)
    gradients = [_empty_like(x) for x in (r, w, k, v, a, b, d_final)]
    sizes = (_TYPES[v.dtype], _TYPES[w.dtype], B, T, H, N)
    tensors = (r, w, k, v, a, b, kept, dy, d_final, *gradients)
    if _on_tensor_cores(v):
        _call("wkv7_backward_chunked", sizes, *tensors, _empty((B * H,), v, dtype=torch.int32))
    else:
        _call("wkv7_backward", sizes, *tensors)
    dr, dw, dk, dv, da, db = _as(dtypes, *gradients[:6])
    return dr, dw, dk, dv, da, db, gradients[6]


def library(source: str) -> ctypes.CDLL:
    """The functions of `kernels/cuda/<source>.cu` for the current device, compiled now if need be.

    Raises:
        KernelError: no device, no nvcc, or a compile error.
    """
    return cuda_library(source, architectures())


def architectures() -> tuple[str]:
    """What to compile for: the current device.

    Raises:
        KernelError: there is none.
    """
    if not torch.cuda.is_available():
        raise KernelError("torch finds no CUDA device, so there is no GPU architecture to compile for.")
    return ("{}{}".format(*torch.cuda.get_device_capability()),)


@contextmanager
def recurrence_only() -> Iterator[None]:
    """Inside the block WKV7 goes token by token also where there is a form for tensor cores, whose check that is."""
    global _chunked
    before, _chunked = _chunked, False
    try:
        yield
    finally:
        _chunked = before


def _on_tensor_cores(v) -> bool:
    """Whether WKV7 has a chunked kernel for such per-token tensors."""
    return _chunked and v.dtype == torch.bfloat16 and v.shape[-1] == 64


def _tokens(*tensors):
    """Per-token tensors in the one dtype that holds them all, as the kernels want them."""
    dtype = _common_dtype(*tensors)
    return [_laid_out(x.to(dtype)) for x in tensors]


def _decay_dtype(w, *others):
    """What w is passed as: what the others are, unless that would round it, or it has no token axis."""
    dtype = _common_dtype(*others)
    return dtype if w.ndim == 4 and w.dtype == dtype else torch.float32


def _common_dtype(first, *others):
    dtype = first.dtype
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _laid_out(x):
    """Contiguous, and where 16 bytes can be moved at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _or_zeros(x, shape, like):
    return torch.zeros(shape, dtype=torch.float32, device=like.device) if x is None else _laid_out(x.float())


def _as(dtypes, *tensors):
    return [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]


def _empty(shape, like, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_like(x):
    return _empty(x.shape, x, dtype=x.dtype)


def _call(function: str, numbers: tuple[int, ...], *tensors) -> None:
    """Queue a kernel on the current stream of the tensors' device. An empty tensor is passed as a null pointer."""
    with _current(tensors[0].device) as (library, stream):
        pointers = [ctypes.c_void_p(x.data_ptr() if x.numel() else None) for x in tensors]
        code = getattr(library(_SOURCES[function[:4]]), function)(*numbers, *pointers, ctypes.c_void_p(stream))
    if code:
        raise KernelError(f"{function} with {numbers}: the CUDA kernel was not started, error {code}.")


@contextmanager
def _current(device: torch.device) -> Iterator[tuple]:
    """Inside the block the device is current; how to get a library for it, and the stream to use."""
    with torch.cuda.device(device):
        yield library, torch.cuda.current_stream(device).cuda_stream
