"""The device code of `kernels/cuda`, unchanged, on the CPU, against the reference in float64; see `emulated_gpu`."""

import pytest
import torch
from emulated_gpu import Gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

import rwkv_lab.wkv
from rwkv_lab.errors import KernelError
from rwkv_lab.wkv import cpu, cuda

NAMES = {
    "wkv4": ("w", "u", "k", "v", "state"),
    "wkv5": ("r", "w", "k", "v", "u", "state"),
    "wkv6": ("r", "w", "k", "v", "u", "state"),
    "wkv7": ("r", "w", "k", "v", "a", "b", "state"),
}
PER_TOKEN = {"wkv4": "kv", "wkv5": "rkv", "wkv6": "rwkv", "wkv7": "rwkvab"}
# One token, a part of a tile of 16, one tile and one token, several tiles; every head size; threads that share a row.
SIZES = [(1, 1, 1, 64), (3, 5, 2, 32), (1, 17, 2, 64), (3, 33, 1, 64), (1, 67, 2, 32), (1, 67, 1, 64), (1, 19, 1, 128)]

# float32: 67 tokens of rounding, and a decay that is a product here and the exponential of a sum in no form.
# 16 bits: what comes back is rounded once, by at most half a step; what is float32 stays as exact as above.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}

# On tensor cores every factor of every product is rounded to bf16, an error of 1.7e-3 RMS. A state is one product away
# from its inputs, y and the gradients are two to four, and rounded once more at the end.
TENSOR_CORES = {torch.float32: 4e-3, torch.bfloat16: 8e-3}


def make_inputs(name, B, T, H, N, dtype, w_dtype=None, seed=0) -> dict[str, torch.Tensor]:
    """In the ranges that RWKV produces, rounded to the dtypes that the kernel gets."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    heads = (B, T, H, N) if name != "wkv4" else (B, T, H * N)
    x = {z: randn(*heads) for z in "rkv"} | {"u": randn(*heads[2:]), "state": randn(B, H, N, N)}
    if name == "wkv7":
        kk = normalize(randn(*heads), dim=-1)
        x |= {"w": -0.6065 * torch.sigmoid(3 * randn(*heads)), "a": -kk, "b": kk * torch.sigmoid(randn(*heads))}
    else:
        x["w"] = -torch.exp((2 * randn(*(heads if name == "wkv6" else heads[2:])) - 2).clamp(max=4))
    if name == "wkv4":
        x["k"] = 3 * x["k"]
        x["state"] = torch.stack([randn(B, H * N), randn(B, H * N).abs() + 0.1, randn(B, H * N)], 1)
    dtypes = dict.fromkeys(PER_TOKEN[name], dtype)
    if w_dtype is not None:
        dtypes["w"] = w_dtype
    return {z: x[z].to(dtypes.get(z, torch.float32)) for z in NAMES[name]}


def relative_rms(found, expected) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())


def expected_answers(name, inputs, dy, dlast):
    """y, final state and gradients, from the reference in float64."""
    inputs = [x.double().requires_grad_() for x in inputs.values()]
    y, last = getattr(rwkv_lab.wkv, name)(*inputs, backend="reference")
    loss = (y * dy.double()).sum() + (last * dlast.double()).sum()
    return y, last, *torch.autograd.grad(loss, inputs)


def emulated_answers(gpu, name, inputs, dy, dlast):
    inputs = [gpu.put(x) for x in inputs.values()]
    y, last, *kept = forward(name)(*inputs, keep=True)
    gradients = backward(name)(*inputs[:-1], *kept, gpu.put(dy), gpu.put(dlast))
    gpu.check_guards()
    return y, last, *gradients


def forward(name):
    return getattr(cuda, f"{name.replace('5', '6')}_forward")


def backward(name):
    return getattr(cuda, f"{name.replace('5', '6')}_backward")


def check(gpu, name, inputs, tolerance=None):
    v, state = inputs["v"], inputs["state"]
    g = torch.Generator().manual_seed(1)
    dy, dlast = torch.randn(v.shape, generator=g).to(v.dtype), torch.randn(state.shape, generator=g)
    found = emulated_answers(gpu, name, inputs, dy, dlast)
    expected = expected_answers(name, inputs, dy, dlast)
    for z, x, true in zip(("y", "last", *(f"d{z}" for z in inputs)), found, expected, strict=True):
        assert x.shape == true.shape, z
        assert relative_rms(x, true) < (tolerance or TOLERANCE)[x.dtype], z


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Gpu(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def gpu(compiled, monkeypatch):
    compiled.take_over(monkeypatch)
    return compiled


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_answers_and_gradients_in_float32(gpu, name, size):
    check(gpu, name, make_inputs(name, *size, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 17, 2, 64), (1, 5, 1, 32), (1, 3, 1, 128)])
def test_answers_and_gradients_in_16_bits(gpu, name, size, dtype):
    with cuda.recurrence_only():
        check(gpu, name, make_inputs(name, *size, dtype))


@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_decays_may_stay_float32(gpu, name, dtype):
    inputs = make_inputs(name, 1, 18, 1, 64, dtype, w_dtype=torch.float32)
    with cuda.recurrence_only():
        y, last, *_ = forward(name)(*inputs.values(), keep=False)
        check(gpu, name, inputs)
    expected = getattr(rwkv_lab.wkv, name)(*(x.double() for x in inputs.values()), backend="reference")
    assert y.dtype == dtype and relative_rms(y, expected[0]) < TOLERANCE[dtype]
    assert relative_rms(last, expected[1]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -54.6, -1e4])
def test_both_ends_of_the_decay(gpu, name, log_decay):
    """Nothing forgotten, and everything at once: no overflow, no 0/0, the gradients still right."""
    inputs = make_inputs(name, 1, 35, 1, 64, torch.float32)
    inputs["w"] = torch.full_like(inputs["w"], log_decay)
    if name == "wkv7":
        inputs["a"], inputs["b"] = inputs["a"] / 2, inputs["b"] / 2  # no growth where nothing decays
    g = torch.Generator().manual_seed(1)
    dy, dlast = torch.randn(inputs["v"].shape, generator=g), torch.randn(inputs["state"].shape, generator=g)
    found = emulated_answers(gpu, name, inputs, dy, dlast)
    expected = expected_answers(name, inputs, dy, dlast)
    for z, x, true in zip(("y", "last", *(f"d{z}" for z in inputs)), found, expected, strict=True):
        assert (x.double() - true).abs().max() <= 2e-5 * true.abs().max() + 1e-30, z


def test_wkv4_with_keys_that_no_exponential_could_take(gpu):
    inputs = make_inputs("wkv4", 2, 20, 1, 32, torch.float32)
    inputs["k"] = inputs["k"] * 100
    check(gpu, "wkv4", inputs, {torch.float32: 1e-4})  # keys of 1000 have steps of 6e-5: their exponentials, too


@pytest.mark.parametrize("A", [1, 33, 40, 100])
def test_wkv4_with_any_number_of_channels(gpu, A):
    check(gpu, "wkv4", make_inputs("wkv4", 2, 19, 1, A, torch.float32))
    check(gpu, "wkv4", make_inputs("wkv4", 2, 19, 1, A, torch.bfloat16))


def test_wkv4_starts_from_the_empty_state(gpu):
    inputs = make_inputs("wkv4", 2, 19, 1, 32, torch.float32)
    inputs["state"] = rwkv_lab.wkv.empty_wkv4_state(2, 32)
    y, last, _ = cuda.wkv4_forward(*(gpu.put(x) for x in inputs.values()), keep=False)
    expected = rwkv_lab.wkv.wkv4(*(x.double() for x in inputs.values()), backend="reference")
    assert relative_rms(y, expected[0]) < TOLERANCE[torch.float32]
    assert relative_rms(last, expected[1]) < TOLERANCE[torch.float32]


def test_views_and_mixed_dtypes_are_laid_out_first(gpu):
    """A transposed r, a v that starts 4 bytes off, an r of 16 bits beside float32."""
    inputs = make_inputs("wkv7", 1, 6, 2, 32, torch.float32)
    odd = dict(inputs)
    odd["r"] = inputs["r"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["v"] = torch.cat([torch.zeros(1), inputs["v"].flatten()])[1:].view(inputs["v"].shape)
    found, expected = (cuda.wkv7_forward(*x.values(), keep=False) for x in (odd, inputs))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for z in "rv":
        odd[z] = inputs[z].bfloat16()
        y, *_ = cuda.wkv7_forward(*odd.values(), keep=False)
        assert y.dtype == odd["v"].dtype
        exact = cuda.wkv7_forward(*(x.float() for x in odd.values()), keep=False)[0]
        assert torch.equal(y, exact.to(y.dtype))


def test_sizes_that_are_not_compiled_are_refused(gpu):
    with pytest.raises(KernelError, match=r"wkv7_forward with .* error 1"):
        cuda.wkv7_forward(*make_inputs("wkv7", 1, 2, 1, 48, torch.float32).values(), keep=False)


def test_no_gradient_of_the_final_state_is_one_of_zeros(gpu, name):
    inputs = [gpu.put(x) for x in make_inputs(name, 1, 18, 1, 64, torch.float32).values()]
    y, last, *kept = forward(name)(*inputs, keep=True)
    found, expected = (backward(name)(*inputs[:-1], *kept, gpu.put(y), d) for d in (None, torch.zeros_like(last)))
    assert all(torch.equal(x, true) for x, true in zip(found, expected, strict=True))


def test_through_torch(gpu, name, monkeypatch):
    """The same kernels behind the operators that torch knows, with its autograd."""
    for way in ("wkv4_forward", "wkv4_backward", "wkv6_forward", "wkv6_backward", "wkv7_forward", "wkv7_backward"):
        monkeypatch.setattr(cpu, way, getattr(cuda, way))
    inputs = make_inputs(name, 2, 18, 1, 64, torch.float32)
    found, expected = [], []
    for answers, dtype, backend in ((found, torch.float32, "cpu"), (expected, torch.float64, "reference")):
        given = [x.to(dtype).requires_grad_() for x in inputs.values()]
        y, last = getattr(rwkv_lab.wkv, name)(*given, backend=backend)
        answers += [y, last, *torch.autograd.grad(y.square().sum() + last.sum(), given)]
    for x, true in zip(found, expected, strict=True):
        assert relative_rms(x, true) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("keep", [False, True])
def test_torch_is_told_the_shapes_that_come_out(gpu, name, keep):
    inputs = make_inputs(name, 2, 18, 1, 64, torch.bfloat16)
    made = forward(name)(*inputs.values(), keep)
    with FakeTensorMode():
        fake = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs.values()]
        told = getattr(torch.ops.rwkv_lab, name.replace("5", "6"))(*fake, keep)
    for x, true in zip(told, made, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (true.shape, true.dtype, true.stride())


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1, 1, 64), (3, 16, 1, 64), (1, 17, 2, 64), (1, 67, 1, 64)])
def test_wkv7_on_tensor_cores(gpu, size, w_dtype):
    check(gpu, "wkv7", make_inputs("wkv7", *size, torch.bfloat16, w_dtype), TENSOR_CORES)


def test_tensor_cores_and_recurrence_start_a_backward_from_the_same_states(gpu):
    inputs = [gpu.put(x) for x in make_inputs("wkv7", 1, 35, 1, 64, torch.bfloat16).values()]
    fast = cuda.wkv7_forward(*inputs, keep=True)
    with cuda.recurrence_only():
        slow = cuda.wkv7_forward(*inputs, keep=True)
    for x, true in zip(fast[:3], slow[:3], strict=True):
        assert relative_rms(x, true) < TENSOR_CORES[x.dtype]
    assert torch.equal(slow[2][:, :, 0], inputs[-1]) and torch.equal(slow[2][:, :, -1], slow[1])


@pytest.mark.parametrize("log_decay", [-2.0, -2.5, -1e4])
def test_tensor_cores_with_decays_that_nothing_can_be_divided_by(gpu, log_decay):
    """One channel of one head, most of the second chunk: on both sides of the bound, and far beyond it."""
    inputs = make_inputs("wkv7", 1, 34, 2, 64, torch.bfloat16)
    inputs["w"][:, 14:30, 1, 5] = log_decay
    check(gpu, "wkv7", inputs, TENSOR_CORES)


@pytest.mark.parametrize("log_decay", [-1e-5, -0.6065])
def test_tensor_cores_with_one_token_repeated(gpu, log_decay):
    """The triangular system at its hardest: an inverse by squaring would drown in cancellation."""
    inputs = make_inputs("wkv7", 1, 34, 1, 64, torch.bfloat16)
    kk = normalize(torch.ones_like(inputs["k"]), dim=-1)
    inputs |= {"w": torch.full_like(inputs["w"], log_decay), "a": -kk, "b": kk}
    # Every token makes the same rounding errors, and next to nothing of them is forgotten.
    check(gpu, "wkv7", inputs, {dtype: 2 * bound for dtype, bound in TENSOR_CORES.items()})
