"""The CUDA kernels on a real GPU, against the reference in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from rwkv_lab.wkv import backends, cuda, wkv4, wkv5, wkv6, wkv7

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPERATORS = {"wkv4": wkv4, "wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
NAMES = {
    "wkv4": ("w", "u", "k", "v", "state"),
    "wkv5": ("r", "w", "k", "v", "u", "state"),
    "wkv6": ("r", "w", "k", "v", "u", "state"),
    "wkv7": ("r", "w", "k", "v", "a", "b", "state"),
}
SIZES = [(1, 1, 1, 64), (3, 63, 2, 32), (2, 67, 3, 64), (1, 1000, 1, 64), (1, 33, 2, 128)]
# float32: up to 1000 tokens of rounding. 16 bits: one rounding at the end. On tensor cores every factor is rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
TENSOR_CORES = {torch.float32: 5e-3, torch.bfloat16: 1e-2}


def make_inputs(name, B, T, H, N, dtype):
    """On the GPU, in the ranges that RWKV produces."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    heads = (B, T, H, N) if name != "wkv4" else (B, T, H * N)
    x = {z: randn(*heads) for z in "rkv"} | {"u": randn(*heads[2:]), "state": randn(B, H, N, N)}
    if name == "wkv7":
        kk = normalize(randn(*heads), dim=-1)
        x |= {"w": -0.6065 * torch.sigmoid(3 * randn(*heads)), "a": -kk, "b": kk * torch.sigmoid(randn(*heads))}
    else:
        x["w"] = -torch.exp((2 * randn(*(heads if name == "wkv6" else heads[2:])) - 2).clamp(max=4))
    if name == "wkv4":
        x["state"] = torch.stack([randn(B, H * N), randn(B, H * N).abs() + 0.1, randn(B, H * N)], 1)
    per_token = {z for z in x if x[z].shape == x["v"].shape and z != "state"}
    return [x[z].to("cuda", dtype if z in per_token else torch.float32) for z in NAMES[name]]


def answers(name, inputs, backend):
    given = [x.detach().requires_grad_() for x in inputs]
    y, last = OPERATORS[name](*given, backend=backend)
    g = torch.Generator("cuda").manual_seed(1)
    dy, dlast = (torch.randn(x.shape, generator=g, device="cuda").to(torch.bfloat16).to(x.dtype) for x in (y, last))
    return y, last, *torch.autograd.grad([y, last], given, [dy, dlast])


def check(name, inputs, tolerance):
    found = answers(name, inputs, "cuda")
    expected = answers(name, [x.double() for x in inputs], "reference")
    for z, x, true in zip(("y", "last", *NAMES[name]), found, expected, strict=True):
        error = float(((x.double() - true).square().mean() / true.square().mean()).sqrt())
        assert error < tolerance[x.dtype], z


@pytest.fixture(params=OPERATORS)
def name(request):
    return request.param


def test_the_backend_is_there():
    assert "cuda" in backends()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_answers_and_gradients(name, size, dtype):
    with cuda.recurrence_only():
        check(name, make_inputs(name, *size, dtype), TOLERANCE)


@pytest.mark.parametrize("size", [(1, 1, 1, 64), (3, 63, 2, 64), (2, 1000, 4, 64)])
def test_wkv7_on_tensor_cores(size):
    check("wkv7", make_inputs("wkv7", *size, torch.bfloat16), TENSOR_CORES)


def test_wkv7_on_tensor_cores_with_decays_that_nothing_can_be_divided_by():
    inputs = make_inputs("wkv7", 2, 100, 2, 64, torch.bfloat16)
    inputs[1][:, 14:30, 1, 5] = -30
    check("wkv7", inputs, TENSOR_CORES)


def test_the_same_again_gives_the_same(name):
    """No sum depends on who comes first."""
    inputs = make_inputs(name, 4, 200, 8, 64, torch.bfloat16)
    assert all(torch.equal(x, again) for x, again in zip(*(answers(name, inputs, "cuda") for _ in "12"), strict=True))


def test_a_stream_of_the_callers(name):
    inputs = make_inputs(name, 2, 100, 2, 64, torch.float32)
    expected = OPERATORS[name](*inputs, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = OPERATORS[name](*inputs, backend="cuda")
    stream.synchronize()
    assert all(torch.equal(x, true) for x, true in zip(found, expected, strict=True))
