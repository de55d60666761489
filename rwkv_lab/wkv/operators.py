"""The compiled WKV operators as torch knows them: `torch.ops.rwkv_lab.wkv4`, `.wkv6` (also WKV5) and `.wkv7`.

Each returns, behind y and the final state, what its backward pass needs, empty unless `keep`. Registered with shapes
for `torch.compile` and `torch.export`, and with a backward pass that is an operator too. There is no second derivative.
"""

import torch
from torch import Tensor

from rwkv_lab.errors import KernelError
from rwkv_lab.wkv import cpu, cuda

custom_op = torch.library.custom_op


@custom_op("rwkv_lab::wkv4", mutates_args=(), device_types="cpu")
def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.wkv4_forward(w, u, k, v, state, keep)


@custom_op("rwkv_lab::wkv4_backward", mutates_args=(), device_types="cpu")
def wkv4_backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.wkv4_backward(w, u, k, v, kept, dy, d_final)


@custom_op("rwkv_lab::wkv6", mutates_args=(), device_types="cpu")
def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.wkv6_forward(r, w, k, v, u, state, keep)


@custom_op("rwkv_lab::wkv6_backward", mutates_args=(), device_types="cpu")
def wkv6_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, kept: Tensor, dy: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.wkv6_backward(r, w, k, v, u, kept, dy, d_final)


@custom_op("rwkv_lab::wkv7", mutates_args=(), device_types="cpu")
def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.wkv7_forward(r, w, k, v, a, b, state, keep)


@custom_op("rwkv_lab::wkv7_backward", mutates_args=(), device_types="cpu")
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
    return cpu.wkv7_backward(r, w, k, v, a, b, kept, readings, dy, d_final)


for _operator, _on_gpu in (
    (wkv4, cuda.wkv4_forward),
    (wkv4_backward, cuda.wkv4_backward),
    (wkv6, cuda.wkv6_forward),
    (wkv6_backward, cuda.wkv6_backward),
    (wkv7, cuda.wkv7_forward),
    (wkv7_backward, cuda.wkv7_backward),
):
    _operator.register_kernel("cuda")(_on_gpu)


# ---------------------------------------------------------------------- shapes


def _whole(x):
    """A tensor like x, contiguous whatever x is."""
    return x.new_empty(x.shape)


def _chunks(v):
    return -(-v.shape[1] // (cuda.CHUNK if v.is_cuda else cpu.CHUNK))


def _state(state):
    """The final state [B,H,V,K] as it lies in memory: on the CPU with keys outermost."""
    return _whole(state) if state.is_cuda else _whole(state).mT


@wkv4.register_fake
def _(w, u, k, v, state, keep):
    B, _, A = v.shape
    return _whole(v), _whole(state), state.new_empty((B, _chunks(v), 3, A) if keep else (0,))


@wkv6.register_fake
def _(r, w, k, v, u, state, keep):
    B, _, H, N = v.shape
    return _whole(v), _state(state), state.new_empty((B, H, _chunks(v), N, N) if keep else (0,))


@wkv7.register_fake
def _(r, w, k, v, a, b, state, keep):
    B, _, H, N = v.shape
    more, readings = (1, (0,)) if v.is_cuda else (0, v.shape)
    kept, readings = ((B, H, _chunks(v) + more, N, N), readings) if keep else ((0,), (0,))
    return _whole(v), _state(state), state.new_empty(kept), state.new_empty(readings)


@wkv4_backward.register_fake
def _(w, u, k, v, kept, dy, d_final):
    B, _, A = v.shape
    return *(_whole(x) for x in (w, u, k, v)), kept.new_empty(B, 3, A)


@wkv6_backward.register_fake
def _(r, w, k, v, u, kept, dy, d_final):
    B, _, H, N = v.shape
    return *(_whole(x) for x in (r, w, k, v, u)), kept.new_empty(B, H, N, N)


@wkv7_backward.register_fake
def _(r, w, k, v, a, b, kept, readings, dy, d_final):
    B, _, H, N = v.shape
    return *(_whole(x) for x in (r, w, k, v, a, b)), kept.new_empty(B, H, N, N)


# ---------------------------------------------------------------------- gradients


def _differentiable(forward, backward, n_inputs: int) -> None:
    """Register `backward` as the gradient of `forward`, whose arguments are n_inputs of the recurrence, state, keep."""

    def remember(ctx, inputs, output):
        ctx.keep = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:n_inputs], *output[2:])

    def gradients(ctx, dy, d_final, *_):
        if not ctx.keep:
            raise KernelError(f"{forward._name} was run without keep=True, so it has no backward pass.")
        saved = ctx.saved_tensors  # looked at once: gradient checkpointing allows no more
        dy = torch.zeros_like(saved[3]) if dy is None else dy  # saved[3] is v
        return *backward(*saved, dy, d_final), None

    forward.register_autograd(gradients, setup_context=remember)
    backward.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _no_second_derivative(ctx, *_):
    raise KernelError('The compiled WKV operators have no second derivative.\nUse backend="reference" or "chunked".')


_differentiable(wkv4, wkv4_backward, 4)
_differentiable(wkv6, wkv6_backward, 5)
_differentiable(wkv7, wkv7_backward, 6)
