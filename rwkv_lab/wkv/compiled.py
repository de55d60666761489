"""The compiled operators behind the names that `rwkv_lab.wkv` uses for all forms of an operator.

Inputs are what the checks there let through; unlike the torch forms, these take each in its own dtype.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from rwkv_lab.errors import KernelError
from rwkv_lab.torch_private import intercepted, takes_tangents, transformed
from rwkv_lab.wkv import cpu, operators
from rwkv_lab.wkv.choice import only_traced, problem, unfit
from rwkv_lab.wkv.pointers import DTYPES


def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state; see `rwkv_lab.wkv.wkv4`."""
    return _run(operators.wkv4, cpu.wkv4_forward, (w, u, k, v), state)


def wkv6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state; see `rwkv_lab.wkv.wkv6` and, for w of `[H,N]`, `rwkv_lab.wkv.wkv5`."""
    return _run(operators.wkv6, cpu.wkv6_forward, (r, w, k, v, u), state)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state; see `rwkv_lab.wkv.wkv7`."""
    return _run(operators.wkv7, cpu.wkv7_forward, (r, w, k, v, a, b), state)


def check(name: str, backend: str, device: str, double: bool, width: int) -> None:
    """Raise KernelError if that backend cannot run operator `name` on such inputs."""
    if device != backend:
        raise KernelError(f'backend="{backend}" needs tensors on that device; these are on {device}.')
    if double:
        raise KernelError(
            f'backend="{backend}" computes in float32, but an input is float64.\n'
            'Use backend="chunked" or "reference", or convert the inputs.'
        )
    if takes_tangents():
        raise KernelError(
            f'backend="{backend}" has no forward-mode derivatives (torch.func.jvp, forward_ad).\n'
            'Use backend="chunked" or "reference".'
        )
    if transformed(but="Vmap"):
        raise KernelError(
            f'backend="{backend}" takes no transform of torch.func but vmap, though backward().\n'
            'Use backend="chunked" or "reference".'
        )
    if why := unfit(name, backend, width) or problem(name, backend):
        raise KernelError(why)


def _run(operator, on_cpu, inputs, state):
    inputs = [x if x.dtype in DTYPES else x.float() for x in inputs]
    state = state.float()
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    if not keep and _needs_no_operator(*inputs, state):
        return on_cpu(*inputs, state, keep)[:2]
    return operator(*inputs, state, keep)[:2]


def _needs_no_operator(*tensors: Tensor) -> bool:
    """Whether torch would only call the function behind the operator, having imported its compiler for a second."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if only_traced() or intercepted():
        return False
    return all(type(x) in (Tensor, Parameter) and x.is_cpu and not x.is_neg() for x in tensors)
