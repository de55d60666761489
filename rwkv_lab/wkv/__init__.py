"""The WKV operators: what an RWKV layer remembers, in forms that agree and differ in speed.

Names, shapes, dtypes and formulas are given once per operator here; kernels/README.md derives the faster forms.
`reference` and `chunked` are plain torch; `cpu` and `cuda` are compiled on first use,
for float32, bfloat16 and float16.
All of them compute and return the state in float32, or in float64 when any input is float64, autocast or not; y comes
back in the dtype that v has. All are differentiable with respect to every input, the state included, and never change
an input in place.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from rwkv_lab.arguments import Size, checked, shown_value
from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.wkv import compiled
from rwkv_lab.wkv.choice import available, chosen_backend, fastest, only_traced, trace_operators, use_backend
from rwkv_lab.wkv.chunked import wkv5_chunked, wkv6_chunked, wkv7_chunked
from rwkv_lab.wkv.pointers import missing_memory
from rwkv_lab.wkv.reference import wkv4_reference, wkv5_reference, wkv6_reference, wkv7_reference
from rwkv_lab.wkv.scan import wkv4_chunked

__all__ = ["wkv4", "wkv5", "wkv6", "wkv7", "backends", "empty_wkv4_state", "trace_operators", "use_backend"]

_FORMS = {
    "wkv4": {"reference": wkv4_reference, "chunked": wkv4_chunked, "cpu": compiled.wkv4, "cuda": compiled.wkv4},
    "wkv5": {"reference": wkv5_reference, "chunked": wkv5_chunked, "cpu": compiled.wkv6, "cuda": compiled.wkv6},
    "wkv6": {"reference": wkv6_reference, "chunked": wkv6_chunked, "cpu": compiled.wkv6, "cuda": compiled.wkv6},
    "wkv7": {"reference": wkv7_reference, "chunked": wkv7_chunked, "cpu": compiled.wkv7, "cuda": compiled.wkv7},
}

_COMPILED = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Below this many tokens the recurrence is the faster one of the two in torch (measured on CPU, forward only).
_SHORT = {"wkv4": 6, "wkv5": 12, "wkv6": 12, "wkv7": 4}

_EMPTY = -1e30  # exponent p before the first token: e^p is 0, and differences of exponents stay finite


def backends(dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Names that `backend=` takes here besides "auto"; every operator has all of them.

    Compiles nothing: "cpu" is among them when there is a compiler and nothing went wrong so far.

    Args:
        dtype: leaves out the backends that do not compute in it: the compiled ones for float64.
    """
    return tuple(x for x in _FORMS["wkv7"] if x not in _COMPILED or (dtype != torch.float64 and available(x)))


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-4 recurrence: per channel, a mean of all values so far, weighted by key and age.

    `y_t = (Σ_{s<t} e^{(t-1-s)w + k_s} v_s + e^{u+k_t} v_t) / (Σ_{s<t} e^{(t-1-s)w + k_s} + e^{u+k_t})`

    Args:
        w: **log-decay** `[A]`, < 0; RWKV-4 has `w = -exp(time_decay)`.
        u: bonus of the present token `[A]`, added to its key; `time_first` as it stands in the file.
        k, v: key and value `[B,T,A]`, any floating dtype.
        state: `[B,3,A]` = (a, b, p) before the first token: both sums, without and with v, are kept divided by e^p,
            so a e^p is the sum with v and b e^p the one without. None for `empty_wkv4_state`.
        backend: one of `backends()`, or "auto" for the fastest that is there.

    Returns:
        y `[B,T,A]` in v's dtype, and the state after the last token `[B,3,A]`, its p the largest exponent so far.

    Raises:
        KernelError: no such backend, or one that was named and cannot run here.
        ParameterError: shapes, dtypes or devices that do not fit.
    """
    _refuse_others("wkv4", w=w, u=u, k=k, v=v, state=state)
    if v.ndim != 3 or 0 in v.shape:
        raise ParameterError(f"wkv4: v has shape {list(v.shape)}; it must be [B,T,A] with nothing empty.")
    B, T, A = v.shape
    _check("wkv4", v, k=(k, (B, T, A)), w=(w, (A,)), u=(u, (A,)), state=(state, (B, 3, A)))
    if state is None:
        state = empty_wkv4_state(B, A, v.device)
    return _run("wkv4", backend, T, v.dtype, w, u, k, v, state)


@checked
def empty_wkv4_state(B: Size, A: Size, device: torch.device | str | None = None) -> torch.Tensor:
    """The state of WKV4 before the first token, `[B,3,A]` float32: a = b = 0, p so low that e^p is 0."""
    state = torch.zeros(B, 3, A, dtype=torch.float32, device=device)
    state[:, 2] = _EMPTY
    return state


def wkv5(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-5 recurrence: as `wkv6`, with one decay for all tokens.

    Args:
        w: **log-decay** `[H,N]`, <= 0; RWKV-5 has `w = -exp(time_decay)`, in 5.0 and 5.1 one number per head, which
            has to be expanded.
        r, k, v, u, state, backend: as in `wkv6`.

    Returns, raises: as `wkv6`.
    """
    _refuse_others("wkv5", r=r, w=w, k=k, v=v, u=u, state=state)
    B, T, H, N = _heads("wkv5", v)
    _check_heads("wkv5", v, (r, k), w, (H, N), u, state)
    return _run("wkv5", backend, T, v.dtype, r, w, k, v, u, _or_zeros(state, v))


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-6 recurrence `y_t = (S_{t-1} + v_t (u ⊙ k_t)ᵀ) r_t`, `S_t = S_{t-1} diag(exp(w_t)) + v_t k_tᵀ`.

    The output reads the state before this token's decay, and the present token through the bonus u.

    Args:
        r: receptance `[B,T,H,N]`, any floating dtype.
        w: **log-decay** `[B,T,H,N]`, <= 0, as strong as you like; RWKV-6 has `w = -exp(time_decay + …)`.
        k, v: key and value `[B,T,H,N]`.
        u: bonus of the present token `[H,N]`; `time_faaaa`.
        state: S before the first token, `[B,H,V,K]` with V = K = N; None for zeros.
        backend: one of `backends()`, or "auto" for the fastest that is there.

    Returns:
        y `[B,T,H,N]` in v's dtype, and the state after the last token `[B,H,V,K]`.

    Raises:
        KernelError: no such backend, or one that was named and cannot run here.
        ParameterError: shapes, dtypes or devices that do not fit.
    """
    _refuse_others("wkv6", r=r, w=w, k=k, v=v, u=u, state=state)
    B, T, H, N = _heads("wkv6", v)
    _check_heads("wkv6", v, (r, k), w, (B, T, H, N), u, state)
    return _run("wkv6", backend, T, v.dtype, r, w, k, v, u, _or_zeros(state, v))


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-7 recurrence `S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ`, `y_t = S_t r_t`.

    Args:
        r: receptance `[B,T,H,N]`, any floating dtype.
        w: **log-decay** `[B,T,H,N]`, <= 0; RWKV-7 has `w = -exp(-1/2) sigmoid(wx)`, so -0.6066 < w < 0.
            It is neither the kernels' w of other projects (there the decay is exp(-exp(w))) nor wx.
        k, v: key and value `[B,T,H,N]`.
        a, b: what is read from the state and where it is written back, `[B,T,H,N]`; in RWKV-7 `-kk` and `kk * a`.
        state: S before the first token, `[B,H,V,K]` with V = K = N; None for zeros.
        backend: one of `backends()`, or "auto" for the fastest that is there.

    Returns:
        y `[B,T,H,N]` in v's dtype, and the state after the last token `[B,H,V,K]`.

    Raises:
        KernelError: no such backend, or one that was named and cannot run here.
        ParameterError: shapes, dtypes or devices that do not fit.
    """
    _refuse_others("wkv7", r=r, w=w, k=k, v=v, a=a, b=b, state=state)
    B, T, H, N = _heads("wkv7", v)
    shape = v.shape
    inputs = {"r": (r, shape), "w": (w, shape), "k": (k, shape), "a": (a, shape), "b": (b, shape)}
    _check("wkv7", v, **inputs, state=(state, (B, H, N, N)))
    return _run("wkv7", backend, T, v.dtype, r, w, k, v, a, b, _or_zeros(state, v))


def _run(name, backend, T, dtype, *inputs):
    """Call one form of an operator; its y comes back in `dtype`."""
    double = any(x.dtype == torch.float64 for x in inputs)
    device, width = inputs[0].device.type, inputs[-1].shape[-1]
    if backend == "auto" and only_traced():
        return _FORMS[name]["cpu"](*inputs)
    if backend == "auto":
        backend = chosen_backend()
    if backend == "auto":
        backend = fastest(name, device, double, width) or ("reference" if T < _SHORT[name] else "chunked")
    if not isinstance(backend, str) or backend not in _FORMS[name]:
        raise KernelError(
            f"There is no wkv backend {shown_value(backend)}.\nUse one of: auto, {', '.join(_FORMS[name])}."
        )
    if backend in _COMPILED:
        compiled.check(name, backend, device, double, width)
        return _FORMS[name][backend](*inputs)
    inner = torch.float64 if double else torch.float32
    # Autocast would run the products in 16 bits: a state whose decay is near 1 does not survive that.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y, state = _FORMS[name][backend](*(x.to(inner) for x in inputs))
    return y.to(dtype), state


def _refuse_others(name, **inputs):
    for which, x in inputs.items():
        if not isinstance(x, torch.Tensor) and not (which == "state" and x is None):
            raise ParameterError(f"{name}: {which} is a {type(x).__name__}; it must be a tensor.")
        if x is not None and x.is_nested:  # which has no shape
            raise ParameterError(f"{name}: {which} is nested; it must be a dense tensor.")


def _heads(name, v):
    if v.ndim != 4 or 0 in v.shape:
        raise ParameterError(f"{name}: v has shape {list(v.shape)}; it must be [B,T,H,N] with nothing empty.")
    return v.shape


def _check_heads(name, v, r_and_k, w, w_shape, u, state):
    B, _, H, N = v.shape
    r, k = r_and_k
    _check(name, v, r=(r, v.shape), k=(k, v.shape), w=(w, w_shape), u=(u, (H, N)), state=(state, (B, H, N, N)))


def _check(name, v, **inputs):
    """Refuse an input that is not of its shape, not on v's device, or no plain tensor of floating-point numbers;
    `inputs` are (tensor or None, shape)."""
    device = v.device
    for which, (x, shape) in (inputs | {"v": (v, v.shape)}).items():
        if x is None:
            continue
        called = "the state" if which == "state" else which
        if x.shape == shape and x.device == device and x.dtype in _DTYPES and x.layout == torch.strided:
            if not torch.compiler.is_compiling() and (missing := missing_memory(x)):
                raise ParameterError(f"{name}: {called} {missing}.")  # torch would read what lies there
            continue
        if x.dtype not in _DTYPES or x.layout != torch.strided:
            is_of = x.dtype if x.dtype not in _DTYPES else x.layout
            raise ParameterError(
                f"{name}: {called} is a tensor of {is_of}; it must be a dense one of {', '.join(map(str, _DTYPES))}."
            )
        if x.shape != shape:
            raise ParameterError(
                f"{name}: {called} has shape {list(x.shape)}; beside v of {list(v.shape)} it must be {list(shape)}."
            )
        raise ParameterError(f"{name}: {called} is on {x.device}, v on {device}; they must be on one device.")


def _or_zeros(state, v):
    if state is not None:
        return state
    B, _, H, N = v.shape
    return torch.zeros(B, H, N, N, dtype=torch.float32, device=v.device)
