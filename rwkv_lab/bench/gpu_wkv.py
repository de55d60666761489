"""WKV7 on a GPU: milliseconds forward and forward + backward, beside what the memory allows and beside a peer."""

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch.nn.functional import normalize

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import Agreement, Floors, Rounds, Row, log_row, refusal
from rwkv_lab.errors import DeviceError
from rwkv_lab.wkv import cuda, wkv7

# bf16 products in another order: about 3e-3 for our own forms. Another w, or a state the wrong way round, gives 1.
AGREEMENT = 2e-2

FLA = "flash-linear-attention"

_DEVICE = "cuda"


_Dim = Annotated[int, Ge(1), Le(2**16)]


@checked
def measure_gpu(
    rounds: Rounds = 30, B: _Dim = 8, T: _Dim = 4096, H: _Dim = 32, N: _Dim = 64
) -> tuple[list[Row], Floors]:
    """Time WKV7 in bfloat16 on the current GPU: our two forms, and flash-linear-attention where it is installed.

    Each is compared with `reference` in float32 on two heads first; one that disagrees gets no times.

    Returns:
        Rows "wkv7 on a GPU, forward" and "…, forward + backward" in milliseconds, with their share of what a copy on
        the device would take for the bytes that must move; and the rate of that copy.

    Raises:
        DeviceError: there is no CUDA device.
        KernelError: the kernels cannot be compiled.
    """
    if not torch.cuda.is_available():
        raise DeviceError("WKV7 on a GPU cannot be measured: torch finds no CUDA device.")
    inputs = _inputs(B, T, H, N)
    copies = _copy_rates(rounds)
    rows = []
    for name, run in _entries().items():
        agreement = Agreement(_error(run, inputs), AGREEMENT)
        given = [x.detach().requires_grad_() for x in inputs]
        dy = torch.randn_like(inputs[3])

        def forward(run=run):
            with torch.no_grad():
                run(*inputs)

        def both(run=run, given=given, dy=dy):
            y, _ = run(*given)
            torch.autograd.grad(y, given, dy)

        for job, work, size in zip(("forward", "forward + backward"), (forward, both), _bytes(B, T, H, N), strict=True):
            row = Row(f"wkv7 on a GPU, {job}", f"B{B} H{H} N{N}", name, "bf16", T, "ms", agreement=agreement)
            if agreement.passed:
                row.samples = _times(work, rounds)
                row.shares["copy"] = size / statistics.median(copies) / 1e6 / row.median
            else:
                row.problem = refusal(agreement)
            rows.append(log_row(row))
    return rows, {"copy on the GPU GB/s": copies}


def _entries() -> dict[str, Callable]:
    def recurrence(*inputs):
        with cuda.recurrence_only():
            return wkv7(*inputs, backend="cuda")

    found = {"chunks on tensor cores": lambda *inputs: wkv7(*inputs, backend="cuda"), "recurrence": recurrence}
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError:
        return found

    def fla(r, w, k, v, a, b, state):
        y, last = chunk_rwkv7(r=r, w=w, k=k, v=v, a=a, b=b, initial_state=state.mT, output_final_state=True)
        return y, last.mT

    return found | {FLA: fla}


def _inputs(B, T, H, N):
    g = torch.Generator(_DEVICE).manual_seed(0)
    r, w, k, v, kk, a = (torch.randn(B, T, H, N, generator=g, device=_DEVICE) for _ in range(6))
    w, kk = -0.6065 * torch.sigmoid(w), normalize(kk, dim=-1)
    state = torch.randn(B, H, N, N, generator=g, device=_DEVICE)
    return [x.bfloat16() for x in (r, w, k, v, -kk, kk * torch.sigmoid(a))] + [state]


def _error(run, inputs) -> float:
    """Relative RMS error of y and the final state on two heads of the first sequence, the larger one."""
    *tokens, state = inputs
    few = [x[:1, :, :2].contiguous() for x in tokens] + [state[:1, :2].contiguous()]
    with torch.no_grad():
        pairs = zip(run(*few), wkv7(*(x.float() for x in few), backend="reference"), strict=True)
        return max(float(((x.float() - true).square().mean() / true.square().mean()).sqrt()) for x, true in pairs)


def _bytes(B, T, H, N) -> tuple[int, int]:
    """What has to move forward, and forward + backward with one float32 state kept per 64 tokens."""
    tensor, state = 2 * B * T * H * N, 4 * B * H * N * N
    kept = state * -(-T // 64)
    forward = 7 * tensor + 2 * state  # r, w, k, v, a, b in, y out
    backward = 7 * tensor + 6 * tensor + 2 * state + kept  # those and dy in, six gradients out
    return forward, forward + kept + backward


def _copy_rates(rounds: int) -> list[float]:
    """GB/s of a copy on the device, bytes read and written both counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    return [2 * source.numel() / ms / 1e6 for ms in _times(lambda: target.copy_(source), rounds)]


def _times(work: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds on the device between two events, each round by itself, after three that warm up."""
    for _ in range(3):
        work()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found
