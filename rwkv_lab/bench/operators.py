"""The WKV operators alone: every backend, forward and backward, beside the rate at which the machine multiplies."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rwkv_lab import wkv
from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import (
    Agreement,
    Floors,
    Rounds,
    Row,
    interleave,
    log_row,
    median_share,
    refusal,
    relative_rms,
)
from rwkv_lab.bench.machine import multiply_add_rate, read_rate
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.model.device import device_errors, parse_device

OPERATORS = ("wkv4", "wkv5", "wkv6", "wkv7")
LIMIT = 2e-5  # relative RMS in float32, of outputs, final state and each gradient, beside the reference in float64
_CHECKED = 300  # tokens of which gradients are compared; an odd number of chunks


@dataclass(frozen=True)
class Shape:
    """Sizes of an operator's inputs: `[B,T,H,N]`, for WKV4 `[B,T,H*N]`."""

    batch: int = 1
    length: int = 2048
    heads: int = 12
    head_size: int = 64


@checked
def measure_operators(
    shape: Shape, backends: Sequence[str], rounds: Rounds, device: str = "cpu", operators: Sequence[str] = OPERATORS
) -> tuple[list[Row], Floors]:
    """Milliseconds of each operator and backend: jobs "wkv forward" and "wkv backward" (size: tokens).

    The backward pass is forward and backward together, less the forward of the same round.

    Raises:
        ParameterError: no such operator or device.
    """
    for operator in operators:
        if operator not in OPERATORS:
            raise ParameterError(f"operators: {operator!r} is none of {', '.join(OPERATORS)}.")
    rows: list[Row] = []
    floors: Floors = {}
    where = parse_device(device)
    on_cpu = where.type == "cpu"
    for operator in operators:
        agreed, entries = {}, {}
        inputs = make_inputs(operator, shape, torch.float32, "cpu")
        for backend in backends:
            try:
                with device_errors(where):
                    agreement = _agrees(operator, backend, shape, device)
                    able = _entries(operator, backend, [x.to(where) for x in inputs]) if agreement.passed else {}
            except RwkvLabError as e:
                rows.append(log_row(_row("wkv forward", operator, backend, shape, problem=str(e).splitlines()[0])))
                continue
            if agreement.passed:
                agreed[backend] = agreement
                entries |= able
            else:
                for job in ("wkv forward", "wkv backward"):
                    row = _row(job, operator, backend, shape, agreement=agreement, problem=refusal(agreement))
                    rows.append(log_row(row))
        machine = {"FMA GFLOP/s": multiply_add_rate, "read GB/s": read_rate} if on_cpu else {}
        results = interleave(machine | entries, rounds)
        now = {name: results.pop(name)[0] for name in machine}
        for name, samples in now.items():
            floors.setdefault(name, []).extend(samples)
        for backend, agreement in agreed.items():
            rows += _rows(operator, backend, shape, agreement, results, now)
    return rows, floors


def flops(operator: str, shape: Shape) -> int:
    """Floating-point operations of the recurrence, a multiply-add counted as two, an exponential as one.

    Per head and token, in units of N² multiply-adds: decay, v kᵀ and S r in WKV5 and WKV6; S a and u bᵀ too in WKV7.
    """
    tokens, N = shape.batch * shape.length * shape.heads, shape.head_size
    return tokens * {"wkv4": 20 * N, "wkv5": 6 * N * N, "wkv6": 6 * N * N, "wkv7": 10 * N * N}[operator]


def traffic(operator: str, shape: Shape) -> int:
    """Bytes of inputs and outputs along the text, float32: what must be moved at least."""
    elements = shape.batch * shape.length * shape.heads * shape.head_size
    return 4 * elements * {"wkv4": 3, "wkv5": 4, "wkv6": 5, "wkv7": 7}[operator]


def make_inputs(operator: str, shape: Shape, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Arguments of an operator in its own order, the state last; the same numbers each time, as models have them."""
    g = torch.Generator().manual_seed(0)
    B, T, H, N = shape.batch, shape.length, shape.heads, shape.head_size

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    if operator == "wkv4":
        state = torch.stack([draw(B, H * N), draw(B, H * N).abs() + 1, draw(B, H * N)], 1)
        found = [-draw(H * N).exp(), draw(H * N), draw(B, T, H * N), draw(B, T, H * N), state]
    else:
        r, k, v = (draw(B, T, H, N) for _ in range(3))
        state, u = draw(B, H, N, N), draw(H, N)
        if operator == "wkv7":
            kk = torch.nn.functional.normalize(draw(B, T, H, N), dim=-1)
            w = -0.6065 * torch.sigmoid(draw(B, T, H, N) - 2)
            found = [r, w, k * 0.3, v, -kk, kk * torch.sigmoid(draw(B, T, H, N)), state]
        else:
            w = -(draw(H, N) if operator == "wkv5" else draw(B, T, H, N)).sub(3).exp()
            found = [r, w, k, v, u, state]
    return [x.to(device, dtype) for x in found]


def _agrees(operator: str, backend: str, shape: Shape, device: str) -> Agreement:
    """Outputs, final state and all gradients of a shorter text, beside the reference in float64."""
    short = Shape(shape.batch, min(shape.length, _CHECKED), shape.heads, shape.head_size)
    answers = []
    for which, dtype, where in (("reference", torch.float64, "cpu"), (backend, torch.float32, device)):
        inputs = [x.requires_grad_() for x in make_inputs(operator, short, dtype, where)]
        y, state = getattr(wkv, operator)(*inputs, backend=which)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (y, state)]
        (y * weights[0]).sum().add((state * weights[1]).sum()).backward()
        gradients = [x.grad for x in inputs if x.grad is not None]
        answers.append([x.detach().cpu() for x in (y, state, *gradients)])
    expected, found = answers
    error = max(relative_rms(a, b) for a, b in zip(found, expected, strict=True))
    return Agreement(error, LIMIT, positions=short.length)


def _entries(operator: str, backend: str, inputs: Sequence[torch.Tensor]) -> dict[str, Callable[[], float]]:
    run = getattr(wkv, operator)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def forward() -> float:
        with torch.no_grad():
            return _milliseconds(lambda: run(*inputs, backend=backend), inputs[0].device)

    def both() -> float:
        def work() -> None:
            y, state = run(*leaves, backend=backend)
            torch.autograd.backward([y, state], [y.detach(), state.detach()])

        for leaf in leaves:
            leaf.grad = None
        return _milliseconds(work, inputs[0].device)

    return {f"{backend} forward": forward, f"{backend} both": both}


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _rows(operator: str, backend: str, shape: Shape, agreement: Agreement, results: dict, floors: Floors) -> list[Row]:
    forward, other_load = results[f"{backend} forward"]
    both, other_load_too = results[f"{backend} both"]
    # Of the rounds that both have: what takes long is left out of the later ones.
    backward = [max(b - f, 0.0) for b, f in zip(both, forward, strict=False)]
    work, moved = flops(operator, shape), traffic(operator, shape)
    rates = [work / ms * 1e-6 for ms in forward]  # GFLOP/s
    facts = {"GFLOP/s": statistics.median(rates), "flops per byte": work / moved}
    shares = {"FMA rate": median_share(rates, floors["FMA GFLOP/s"])} if floors else {}
    if floors:
        shares["read floor"] = median_share([moved / ms * 1e-6 for ms in forward], floors["read GB/s"])
    ratio = {"times the forward": statistics.median(b / f for b, f in zip(backward, forward, strict=False))}
    values = {"samples": forward, "other_load": other_load, "shares": shares, "facts": facts}
    more = {"samples": backward, "other_load": other_load_too, "facts": ratio}
    return [
        log_row(_row("wkv forward", operator, backend, shape, agreement=agreement, **values)),
        log_row(_row("wkv backward", operator, backend, shape, agreement=agreement, **more)),
    ]


def _row(job: str, operator: str, backend: str, shape: Shape, **values: Any) -> Row:
    return Row(job, operator, backend, "fp32", shape.length, "ms", **values)
