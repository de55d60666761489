"""Calls into the compiled kernels of `kernels/cpu`: checks nothing, allocates the outputs, hands over pointers.

Inputs may be float32, bfloat16 or float16, each on its own; the state is float32 with any strides. Sums are made in
float32. The state comes back as `[B,H,V,K]` with keys outermost in memory, as the kernels have it.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_lab.machine import proc
from rwkv_lab.wkv.loader import cpu_library

CHUNK = 32  # tokens between two kept states; the same number stands in the sources
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SOURCES = {"wkv4": "wkv4", "wkv5": "wkv6", "wkv6": "wkv6", "wkv7": "wkv7"}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_STATE = [_POINTER, *[_LONG] * 4]  # with its strides
_SIGNATURES = {
    "wkv4_forward": [*[_POINTER] * 4, _LONG, *[_POINTER] * 4, *[_LONG] * 3, _INT],
    "wkv4_backward": [*[_POINTER] * 4, _LONG, *[_POINTER] * 8, *[_LONG] * 3, _INT],
    "wkv6_forward": [*[_POINTER] * 5, _LONG, *_STATE, *[_POINTER] * 3, *[_LONG] * 4, _INT, _INT],
    "wkv6_backward": [*[_POINTER] * 5, _LONG, _POINTER, *_STATE, *[_POINTER] * 8, *[_LONG] * 4, _INT, _INT],
    "wkv7_forward": [*[_POINTER] * 6, _LONG, *_STATE, *[_POINTER] * 4, *[_LONG] * 4, _INT],
    "wkv7_backward": [*[_POINTER] * 6, _LONG, _POINTER, *_STATE, *[_POINTER] * 9, *[_LONG] * 4, _INT],
}
_functions: dict[str, Callable[..., None]] = {}


def wkv4_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,A]`, final state `[B,3,A]`, and, to go backward, states along time `[B,chunks,3,A]` (else empty)."""
    B, T, A = v.shape
    w, u, k, v, state = (x.contiguous() for x in (w, u, k, v, state))
    y, final = torch.empty_like(v), torch.empty_like(state)
    kept = state.new_empty((B, -(-T // CHUNK), 3, A) if keep else 0)
    _function("wkv4_forward")(
        *_addresses(w, u, k, v),
        _dtypes(w, u, k, v),
        *_addresses(state, y, final),
        _address(kept),
        B,
        T,
        A,
        _threads(v, 32),
    )
    return y, final, kept


def wkv4_backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u, k, v and the state; d_final may be None."""
    B, T, A = v.shape
    w, u, k, v, dy = (x.contiguous() for x in (w, u, k, v, dy))
    d_final = None if d_final is None else d_final.contiguous()
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dw, du, d_state = (kept.new_empty(shape) for shape in ((B, A), (B, A), (B, 3, A)))
    _function("wkv4_backward")(
        *_addresses(w, u, k, v),
        _dtypes(w, u, k, v),
        *(dy.data_ptr(), _address(d_final)),
        *_addresses(kept, dk, dv, dw, du, d_state),
        *(B, T, A, _threads(v, 32)),
    )
    return dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dk, dv, d_state


def wkv6_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward, states along time `[B,H,chunks,K,V]` (else empty).

    w is `[B,T,H,N]`, or `[H,N]` for WKV5.
    """
    B, T, H, N = v.shape
    r, w, k, v, u = (x.contiguous() for x in (r, w, k, v, u))
    y, final = torch.empty_like(v), state.new_empty(B, H, N, N)
    kept = state.new_empty((B, H, -(-T // CHUNK), N, N) if keep else 0)
    _function("wkv6_forward")(
        *_addresses(r, w, k, v, u),
        _dtypes(r, w, k, v, u),
        *(state.data_ptr(), *state.stride()),
        *(y.data_ptr(), final.data_ptr(), _address(kept)),
        *(B, T, H, N, w.ndim == 4, _threads(v, N)),
    )
    return y, final.mT, kept


def wkv6_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, u and the state; d_final may be None."""
    B, T, H, N = v.shape
    r, w, k, v, u, dy = (x.contiguous() for x in (r, w, k, v, u, dy))
    per_token = w.ndim == 4
    dr, dk, dv = (torch.empty_like(x) for x in (r, k, v))
    dw = torch.empty_like(w) if per_token else kept.new_empty(B, H, N)
    du, d_state = kept.new_empty(B, H, N), kept.new_empty(B, H, N, N)
    _function("wkv6_backward")(
        *_addresses(r, w, k, v, u),
        _dtypes(r, w, k, v, u),
        dy.data_ptr(),
        *(_address(d_final), *(d_final.stride() if d_final is not None else (0, 0, 0, 0))),
        *_addresses(kept, dr, dw, dk, dv, dw, du, d_state),
        *(B, T, H, N, per_token, _threads(v, N)),
    )
    return dr, dw if per_token else dw.sum(0).to(w.dtype), dk, dv, du.sum(0).to(u.dtype), d_state


def wkv7_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward (else empty), states along time `[B,H,chunks,K,V]`
    and the readings S a `[B,T,H,N]`."""
    B, T, H, N = v.shape
    r, w, k, v, a, b = (x.contiguous() for x in (r, w, k, v, a, b))
    y, final = torch.empty_like(v), state.new_empty(B, H, N, N)
    kept = state.new_empty((B, H, -(-T // CHUNK), N, N) if keep else 0)
    readings = state.new_empty(v.shape if keep else 0)
    _function("wkv7_forward")(
        *_addresses(r, w, k, v, a, b),
        _dtypes(r, w, k, v, a, b),
        *(state.data_ptr(), *state.stride()),
        *(y.data_ptr(), final.data_ptr(), _address(kept), _address(readings)),
        *(B, T, H, N, _threads(v, N)),
    )
    return y, final.mT, kept, readings


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
    r, w, k, v, a, b, dy = (x.contiguous() for x in (r, w, k, v, a, b, dy))
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in (r, w, k, v, a, b))
    d_state = kept.new_empty(B, H, N, N)
    _function("wkv7_backward")(
        *_addresses(r, w, k, v, a, b),
        _dtypes(r, w, k, v, a, b),
        dy.data_ptr(),
        *(_address(d_final), *(d_final.stride() if d_final is not None else (0, 0, 0, 0))),
        *_addresses(kept, readings, dr, dw, dk, dv, da, db, d_state),
        *(B, T, H, N, _threads(v, N)),
    )
    return dr, dw, dk, dv, da, db, d_state


def _function(name: str):
    function = _functions.get(name)
    if function is None:
        function = getattr(library_on_torch_threads(name[:4]), name)
        function.argtypes, function.restype = _SIGNATURES[name], None
        _functions[name] = function
    return function


def library_on_torch_threads(name: str) -> ctypes.CDLL:
    """`cpu_library(name)`, of a source that includes torch_threads.h, with the address of torch's thread pool.

    Raises:
        KernelError: as `cpu_library`.
    """
    library = cpu_library(name)
    library.use_openmp(_gomp_parallel())
    return library


@functools.cache
def _gomp_parallel() -> ctypes.c_void_p:
    """Address of `GOMP_parallel` in the OpenMP library that torch has loaded; NULL where there is none to be found."""
    try:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in proc("self", "maps").read_text().splitlines()}
    except OSError:
        return ctypes.c_void_p()
    inside = str(Path(torch.__file__).parent.parent)  # torch/lib or torch.libs: others (scikit-learn's) are not torch's
    for path in sorted(mapped, key=lambda path: not path.startswith(inside)):
        if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name):
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
    return ctypes.c_void_p()


def _addresses(*tensors) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _address(tensor) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def _dtypes(*tensors) -> int:
    word = 0
    for x in reversed(tensors):
        word = word << 2 | DTYPES[x.dtype]
    return word


def _threads(v, width: int) -> int:
    """As many as torch would use, but none that would get less to do than it costs to wake it."""
    return max(1, min(torch.get_num_threads(), v.numel() * width // 100_000))
