"""Calls into the compiled kernels of `kernels/cpu`: checks shapes and memory, allocates the outputs, passes memory.

Inputs may be float32, bfloat16 or float16, each on its own; the state is float32 with any strides. Sums are made in
float32. The state comes back as `[B,H,V,K]` with keys outermost in memory, as the kernels have it.
"""

import ctypes
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_lab.errors import KernelError
from rwkv_lab.machine import proc
from rwkv_lab.wkv.loader import cpu_library
from rwkv_lab.wkv.pointers import DTYPES, NOTHING, Span, check, dense, new, span, strided_span

CHUNK = 32  # tokens between two kept states; the same number stands in the sources
SOURCES = {"wkv4": "wkv4", "wkv5": "wkv6", "wkv6": "wkv6", "wkv7": "wkv7"}

_LONG, _INT = ctypes.c_int64, ctypes.c_int
_STATE = [Span, *[_LONG] * 4]  # with its strides
_SIGNATURES = {
    "wkv4_forward": [*[Span] * 4, _LONG, *[Span] * 4, *[_LONG] * 3, _INT],
    "wkv4_backward": [*[Span] * 4, _LONG, *[Span] * 8, *[_LONG] * 3, _INT],
    "wkv6_forward": [*[Span] * 5, _LONG, *_STATE, *[Span] * 3, *[_LONG] * 4, _INT, _INT],
    "wkv6_backward": [*[Span] * 5, _LONG, Span, *_STATE, *[Span] * 8, *[_LONG] * 4, _INT, _INT],
    "wkv7_forward": [*[Span] * 6, _LONG, *_STATE, *[Span] * 4, *[_LONG] * 4, _INT],
    "wkv7_backward": [*[Span] * 6, _LONG, Span, *_STATE, *[Span] * 9, *[_LONG] * 4, _INT],
}
_functions: dict[str, Callable[..., int]] = {}


def wkv4_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,A]`, final state `[B,3,A]`, and, to go backward, states along time `[B,chunks,3,A]` (else empty)."""
    B, T, A = _sizes(v, 3)
    w, u, k, v, state = (dense(x) for x in (w, u, k, v, state))
    y, final = new(v.shape, v.dtype), new((B, 3, A), torch.float32)
    kept = new((B, -(-T // CHUNK), 3, A) if keep else (0,), torch.float32)
    _function("wkv4_forward")(
        *_inputs((w, (A,)), (u, (A,)), (k, v.shape), (v, v.shape)),
        *_floats((state, (B, 3, A))),
        *(span(y, v.shape, v.dtype), *_floats((final, (B, 3, A))), _kept(kept)),
        *(B, T, A, _threads(v, 32)),
    )
    return y, final, kept


def wkv4_backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u, k, v and the state; d_final may be None."""
    B, T, A = _sizes(v, 3)
    w, u, k, v, dy = (dense(x) for x in (w, u, k, v, dy))
    d_final = None if d_final is None else dense(d_final)
    dk, dv = new(v.shape, k.dtype), new(v.shape, v.dtype)
    dw, du, d_state = (new(shape, torch.float32) for shape in ((B, A), (B, A), (B, 3, A)))
    _function("wkv4_backward")(
        *_inputs((w, (A,)), (u, (A,)), (k, v.shape), (v, v.shape)),
        span(dy, v.shape, v.dtype),
        *([NOTHING] if d_final is None else _floats((d_final, (B, 3, A)))),
        *_floats((kept, (B, -(-T // CHUNK), 3, A))),
        *(span(dk, v.shape, k.dtype), span(dv, v.shape, v.dtype)),
        *_floats((dw, (B, A)), (du, (B, A)), (d_state, (B, 3, A))),
        *(B, T, A, _threads(v, 32)),
    )
    return dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dk, dv, d_state


def wkv6_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward, states along time `[B,H,chunks,K,V]` (else empty).

    w is `[B,T,H,N]`, or `[H,N]` for WKV5.
    """
    B, T, H, N = _sizes(v, 4)
    r, w, k, v, u = (dense(x) for x in (r, w, k, v, u))
    y, final = new(v.shape, v.dtype), new((B, H, N, N), torch.float32)
    kept = new((B, H, -(-T // CHUNK), N, N) if keep else (0,), torch.float32)
    _function("wkv6_forward")(
        *_inputs_of_6(r, w, k, v, u),
        *_strided(state, (B, H, N, N)),
        *(span(y, v.shape, v.dtype), *_floats((final, (B, H, N, N))), _kept(kept)),
        *(B, T, H, N, w.ndim == 4, _threads(v, N)),
    )
    return y, final.mT, kept


def wkv6_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, u and the state; d_final may be None."""
    B, T, H, N = _sizes(v, 4)
    r, w, k, v, u, dy = (dense(x) for x in (r, w, k, v, u, dy))
    per_token = w.ndim == 4
    dr, dk, dv = (new(v.shape, x.dtype) for x in (r, k, v))
    dw = new(v.shape, w.dtype) if per_token else new((B, H, N), torch.float32)
    du, d_state = new((B, H, N), torch.float32), new((B, H, N, N), torch.float32)
    _function("wkv6_backward")(
        *_inputs_of_6(r, w, k, v, u),
        *(span(dy, v.shape, v.dtype), *_strided(d_final, (B, H, N, N))),
        *_floats((kept, (B, H, -(-T // CHUNK), N, N))),
        span(dr, v.shape, r.dtype),
        span(dw, v.shape, w.dtype) if per_token else NOTHING,
        *(span(dk, v.shape, k.dtype), span(dv, v.shape, v.dtype)),
        *([NOTHING] if per_token else _floats((dw, (B, H, N)))),
        *_floats((du, (B, H, N)), (d_state, (B, H, N, N))),
        *(B, T, H, N, per_token, _threads(v, N)),
    )
    return dr, dw if per_token else dw.sum(0).to(w.dtype), dk, dv, du.sum(0).to(u.dtype), d_state


def wkv7_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[B,T,H,N]`, final state `[B,H,V,K]`, and, to go backward (else empty), states along time `[B,H,chunks,K,V]`
    and the readings S a `[B,T,H,N]`."""
    B, T, H, N = _sizes(v, 4)
    inputs = tuple(dense(x) for x in (r, w, k, v, a, b))
    y, final = new(v.shape, v.dtype), new((B, H, N, N), torch.float32)
    kept = new((B, H, -(-T // CHUNK), N, N) if keep else (0,), torch.float32)
    readings = new(v.shape if keep else (0,), torch.float32)
    _function("wkv7_forward")(
        *_inputs(*((x, v.shape) for x in inputs)),
        *_strided(state, (B, H, N, N)),
        *(span(y, v.shape, v.dtype), *_floats((final, (B, H, N, N))), _kept(kept), _kept(readings)),
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
    B, T, H, N = _sizes(v, 4)
    inputs, dy = tuple(dense(x) for x in (r, w, k, v, a, b)), dense(dy)
    gradients = tuple(new(v.shape, x.dtype) for x in inputs)
    d_state = new((B, H, N, N), torch.float32)
    _function("wkv7_backward")(
        *_inputs(*((x, v.shape) for x in inputs)),
        *(span(dy, v.shape, v.dtype), *_strided(d_final, (B, H, N, N))),
        *_floats((kept, (B, H, -(-T // CHUNK), N, N)), (readings, v.shape)),
        *(span(x, v.shape, of.dtype) for x, of in zip(gradients, inputs, strict=True)),
        *_floats((d_state, (B, H, N, N))),
        *(B, T, H, N, _threads(v, N)),
    )
    dr, dw, dk, dv, da, db = gradients
    return dr, dw, dk, dv, da, db, d_state


def _function(name: str):
    function = _functions.get(name)
    if function is None:
        function = getattr(library_on_torch_threads(name[:4]), name)
        function.argtypes, function.restype = _SIGNATURES[name], _LONG
        _functions[name] = function
    return lambda *arguments: check(function(*arguments), name)


def library_on_torch_threads(name: str) -> ctypes.CDLL:
    """`cpu_library(name)`, of a source that includes torch_threads.h, with the address of torch's thread pool.

    Raises:
        KernelError: as `cpu_library`.
    """
    library = cpu_library(name)
    if library not in _on_torch_threads:
        library.use_openmp.argtypes = [ctypes.c_void_p]
        library.use_openmp(None if _forked else _gomp_parallel())
        _on_torch_threads.add(library)
    return library


_on_torch_threads: set[ctypes.CDLL] = set()
_forked = False  # torch's threads stayed in the parent, and OpenMP does not begin new ones: it would wait for ever


def _after_fork() -> None:
    global _forked
    _forked = True
    for library in _on_torch_threads:
        library.use_openmp(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


def _sizes(v, n: int) -> tuple[int, ...]:
    if v.ndim != n or 0 in v.shape:
        raise KernelError(f"v has shape {list(v.shape)}; it must have {n} dimensions with nothing empty.")
    return tuple(v.shape)


def _inputs(*inputs) -> list:
    """The memory of the (tensor, shape) given, and their dtypes in one number, two bits each, the first lowest."""
    word = 0
    for x, _ in reversed(inputs):
        word = word << 2 | DTYPES.get(x.dtype, 3)
    return [*(span(x, shape) for x, shape in inputs), word]


def _inputs_of_6(r, w, k, v, u) -> list:
    heads = v.shape[2:]
    return _inputs((r, v.shape), (w, v.shape if w.ndim == 4 else heads), (k, v.shape), (v, v.shape), (u, heads))


def _floats(*tensors) -> list[Span]:
    """The memory of the (tensor, shape) given, which are float32."""
    return [span(x, shape, torch.float32) for x, shape in tensors]


def _strided(state, shape) -> tuple:
    """Memory and strides of a state, float32; it may be None."""
    return (NOTHING, 0, 0, 0, 0) if state is None else (strided_span(state, shape, torch.float32), *state.stride())


def _kept(x) -> Span:
    """The memory of what was made here, none where it is empty."""
    return span(x, x.shape, torch.float32) if x.numel() else NOTHING


def _threads(v, width: int) -> int:
    """As many as torch would use, but none that would get less to do than it costs to wake it."""
    return max(1, min(torch.get_num_threads(), v.numel() * width // 100_000))
