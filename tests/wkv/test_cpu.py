"""The compiled CPU operators against the recurrence in float64: outputs, final states, gradients, at odd sizes."""

from hashlib import sha256

import pytest
import torch
from models import bits
from test_wkv7 import make_inputs as make_wkv7
from test_wkv456 import make_inputs as make_wkv456
from test_wkv456 import relative_rms

from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.wkv import backends, cpu, use_backend, wkv4, wkv5, wkv6, wkv7

OPERATORS = {"wkv4": wkv4, "wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
SIZES = [
    (1, 1, 1, 64),
    (3, 1, 2, 32),
    (1, 63, 1, 32),
    (3, 63, 1, 64),
    (1, 63, 2, 128),
    (2, 33, 3, 40),
    (1, 1000, 1, 64),
]
SHORT = (2, 37, 3, 32)

# Rounding errors of float32 (6e-8) that pile up along time and in sums over N. Where nearly nothing is forgotten over
# 1000 tokens (WKV5's slowest decays, WKV4's sums) they grow with the number of tokens.
OUTPUT, GRADIENT = 3e-6, 2e-5
# An input in 16 bits is exact once it is read; what comes out in 16 bits is rounded once.
ROUNDED = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="no C++ compiler")


@pytest.fixture(params=OPERATORS)
def name(request):
    return request.param


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    """Work is small here: let two threads share it all the same."""
    before = cpu._threads
    cpu._threads = lambda v, width: request.param
    yield
    cpu._threads = before


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory for outputs and scratch comes full of NaN; what a kernel forgets to write shows."""
    new, nan = cpu.new, float("nan")
    monkeypatch.setattr(cpu, "new", lambda shape, dtype: new(shape, dtype).fill_(nan))


def make(name, *size, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Inputs by name, those that models hold in their dtype rounded to it; w and the state stay float32."""
    if name == "wkv7":
        x = dict(zip(["r", "w", "k", "v", "a", "b", "state"], make_wkv7(*size), strict=True))
    else:
        x = make_wkv456(name, *size)
    return {z: t.to(torch.float32 if z in ("w", "state") else dtype) for z, t in x.items()}


def run(name, inputs, backend):
    """y, the final state, and the gradients of a random loss, by name."""
    given = {z: x.detach().clone().requires_grad_() for z, x in inputs.items()}
    y, state = OPERATORS[name](**given, backend=backend)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g).to(y)).sum() + (state * torch.randn(state.shape, generator=g)).sum()
    return y, state, dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))


REFERENCES = {}  # each is computed once for both numbers of threads


def both(name, inputs):
    key = name, *(z + sha256(bits(x)).hexdigest() for z, x in inputs.items())
    if key not in REFERENCES:
        REFERENCES[key] = run(name, {z: x.double() for z, x in inputs.items()}, "reference")
    return run(name, inputs, "cpu"), REFERENCES[key]


def agree(found, expected, rounded=0.0, factor=1):
    (y, state, gradients), (y_expected, state_expected, expected_gradients) = found, expected
    assert relative_rms(y, y_expected) < factor * OUTPUT + rounded
    assert relative_rms(state, state_expected) < factor * OUTPUT
    for z, gradient in gradients.items():
        assert relative_rms(gradient, expected_gradients[z]) < factor * GRADIENT + 2 * rounded, z


@pytest.mark.parametrize("size", SIZES)
def test_float32_agrees_with_the_recurrence_in_float64(name, size):
    found, expected = both(name, make(name, *size))
    assert found[0].dtype == found[1].dtype == torch.float32
    # The exponent p of WKV4, here up to 10, is rounded once per token, and the sums a and b stand for a e^p and b e^p.
    agree(found, expected, factor=1 if size[1] < 1000 else 10 if name == "wkv4" else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_read_as_they_are_and_summed_in_float32(name, dtype):
    found, expected = both(name, make(name, *SHORT, dtype=dtype))
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert {z: g.dtype for z, g in found[2].items()} == {z: x.dtype for z, x in make(name, *SHORT, dtype=dtype).items()}
    agree(found, expected, rounded=ROUNDED[dtype])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(name, make(name, *SHORT, dtype=dtype), "cpu")[1], found[1])


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -20.0, -80.0, -1e4])
def test_both_ends_of_the_decay(name, log_decay):
    inputs = make(name, 1, 70, 1, 64)
    inputs["w"] = torch.full_like(inputs["w"], log_decay)
    if name == "wkv7":
        inputs["b"] = inputs["b"] * 0.1  # with no decay at all, what is read and written back must not blow up
    (y, state, gradients), (y_expected, state_expected, expected) = both(name, inputs)
    assert relative_rms(y, y_expected) < OUTPUT and relative_rms(state, state_expected) < 10 * OUTPUT
    for z, gradient in gradients.items():
        if z == "w" and log_decay < -30:  # e^w is below float32's steps; below 1e-38 it counts as 0
            assert (gradient - expected[z]).abs().max() < 1e-6
        else:
            assert relative_rms(gradient, expected[z]) < 3 * GRADIENT, z


def test_inputs_in_any_memory_order_and_none_changed(name):
    inputs = make(name, *SHORT)
    mixed = {z: x.to(memory_format=torch.contiguous_format).clone() for z, x in inputs.items()}
    for z, x in inputs.items():  # every other element of something larger, and transposed in memory
        mixed[z] = (
            torch.stack([x, x + 1], -1)[..., 0].mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[..., 0]
        )
    before = {z: x.clone() for z, x in mixed.items()}
    found, expected = run(name, mixed, "cpu"), run(name, inputs, "cpu")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert all(torch.equal(found[2][z], expected[2][z]) for z in inputs)
    assert all(torch.equal(x, before[z]) for z, x in mixed.items())
    again = OPERATORS[name](**inputs | {"state": expected[1].detach()}, backend="cpu")  # a state as the kernel laid it
    plain = OPERATORS[name](**inputs | {"state": expected[1].detach().contiguous()}, backend="cpu")
    assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


def test_nothing_is_written_beside_the_outputs(name, monkeypatch):
    """Every output lies between two guards."""
    guards = []

    def guarded(shape, dtype):
        shape = torch.Size(shape)
        block = torch.full((shape.numel() + 64,), 7.0, dtype=dtype)
        guards.append((block[:32], block[-32:]))
        return block[32:-32].view(shape)

    monkeypatch.setattr(cpu, "new", guarded)
    for dtype in ROUNDED:
        run(name, make(name, 2, 35, 1, 40, dtype=dtype), "cpu")
    assert len(guards) > 12 and all((guard == 7).all() for pair in guards for guard in pair)


def test_nan_comes_through(name):
    inputs = make(name, 1, 8, 1, 32)
    inputs["v"][0, 3] = float("nan")
    y, _, _ = run(name, inputs, "cpu")
    assert y[0, :3].isfinite().all() and y[0, 3].isnan().any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("which", ["w", "u", "k", "v", "state"])
def test_wkv4_hides_no_infinity(which, value):
    """Where the recurrence has a number and where it has none, channel by channel."""
    inputs = make("wkv4", 2, 9, 1, 37)
    inputs["state"][:, 1] = inputs["state"][:, 1].abs() + 1  # a sum of positive numbers
    for i in range(3):
        changed = {z: x.clone() for z, x in inputs.items()}
        where = (i,) if which in "wu" else (1, i, 5) if which == "state" else (0, i, 5)
        changed[which][where] = value
        found, expected = (wkv4(**changed, backend=backend) for backend in ("cpu", "reference"))
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for its derivatives
def test_forward_derivatives_are_left_to_torch(name):
    inputs = make(name, 1, 5, 1, 32)

    def run_v(v, backend="auto"):
        return OPERATORS[name](**inputs | {"v": v}, backend=backend)[0]

    _, found = torch.func.jvp(run_v, (inputs["v"],), (torch.ones_like(inputs["v"]),))
    _, expected = torch.func.jvp(lambda v: run_v(v, "reference"), (inputs["v"],), (torch.ones_like(inputs["v"]),))
    assert expected.abs().sum() > 0 and relative_rms(found, expected) < GRADIENT
    with pytest.raises(KernelError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda v: run_v(v, "cpu"), (inputs["v"],), (torch.ones_like(inputs["v"]),))


def test_gradients_of_torch_func_are_left_to_torch(name):
    inputs = make(name, 1, 5, 1, 32)
    names = tuple(inputs)

    def total(*values, backend="auto"):
        return OPERATORS[name](**dict(zip(names, values, strict=True)), backend=backend)[0].square().sum()

    each = tuple(range(len(names)))
    found = torch.func.grad(total, argnums=each)(*inputs.values())
    given = {z: x.clone().requires_grad_() for z, x in inputs.items()}
    for one, right in zip(found, torch.autograd.grad(total(*given.values()), list(given.values())), strict=True):
        assert relative_rms(one, right) < GRADIENT
    two = [torch.stack([x, x / 2]) for x in inputs.values()]
    rows = torch.func.vmap(torch.func.grad(total))(*two)
    assert relative_rms(rows[0], found[0]) < GRADIENT
    with pytest.raises(KernelError, match="no transform of torch.func but vmap"):
        torch.func.grad(lambda *values: total(*values, backend="cpu"))(*inputs.values())


MEMORY = {
    "freed": lambda x: x.untyped_storage().resize_(0),
    "cut": lambda x: x.untyped_storage().resize_(x.nbytes - x.itemsize),
}


@pytest.mark.parametrize("order", ["dense", "strided"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "chunked", "reference"])
@pytest.mark.parametrize("lose", MEMORY.values(), ids=MEMORY)
def test_an_input_without_its_memory_is_refused(name, lose, backend, order):
    for which in make(name, 1, 5, 1, 32):
        inputs = make(name, 1, 5, 1, 32)
        x = inputs[which].clone()
        inputs[which] = x if order == "dense" else x.transpose(0, -1).contiguous().transpose(0, -1)
        lose(inputs[which])
        with pytest.raises(ParameterError, match=f"{which} needs .* bytes, its memory has .*: it was resized or freed"):
            OPERATORS[name](**inputs, backend=backend)


@pytest.mark.parametrize("order", ["dense", "strided"])
def test_what_was_freed_before_the_backward_pass_is_refused(name, order):
    for which in make(name, 1, 5, 2, 32):
        inputs = make(name, 1, 5, 2, 32)
        x = inputs[which].clone()
        inputs[which] = x if order == "dense" else x.transpose(0, -1).contiguous().transpose(0, -1)
        other = "k" if which == "v" else "v"
        y = OPERATORS[name](**inputs | {other: inputs[other].requires_grad_()}, backend="cpu")[0]
        inputs[which].untyped_storage().resize_(0)
        if which == "state":  # not looked at any more
            y.sum().backward()
            continue
        with pytest.raises(ParameterError, match="it was resized or freed"):
            y.sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own
def test_nested_tensors_are_refused(name):
    inputs = make(name, 1, 5, 1, 32)
    for which, x in inputs.items():
        with pytest.raises(ParameterError, match=f"{which} is nested"):
            OPERATORS[name](**inputs | {which: torch.nested.nested_tensor([x])})


@pytest.mark.parametrize("other", [None, [1.0], 3])
def test_what_is_no_tensor_is_refused(name, other):
    inputs = make(name, 1, 5, 1, 32)
    for which in inputs:
        if which == "state" and other is None:
            continue
        with pytest.raises(ParameterError, match=f"{which} is a {type(other).__name__}; it must be a tensor"):
            OPERATORS[name](**inputs | {which: other})


def test_without_gradients_nothing_is_kept_and_the_answer_is_the_same(name):
    inputs = make(name, *SHORT)
    y, state = OPERATORS[name](**inputs, backend="cpu")
    expected = run(name, inputs, "cpu")
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1]) and not y.requires_grad


def test_gradients_where_only_one_output_is_used(name):
    inputs = {z: x.requires_grad_() for z, x in make(name, 1, 5, 1, 32).items()}
    exact = {z: x.detach().double().requires_grad_() for z, x in inputs.items()}
    for which in (0, 1):
        found = torch.autograd.grad(OPERATORS[name](**inputs, backend="cpu")[which].sum(), inputs["v"])[0]
        expected = torch.autograd.grad(OPERATORS[name](**exact, backend="reference")[which].sum(), exact["v"])[0]
        assert relative_rms(found, expected) < GRADIENT


def test_what_cpu_cannot_do_it_says(name):
    inputs = make(name, 1, 4, 1, 32)
    with pytest.raises(KernelError, match="float64"):
        OPERATORS[name](**{z: x.double() for z, x in inputs.items()}, backend="cpu")
    meta = {z: x.to("meta") for z, x in inputs.items()}
    with pytest.raises(KernelError, match='"cpu".*meta'):
        OPERATORS[name](**meta, backend="cpu")
    given = {z: x.requires_grad_() for z, x in inputs.items()}
    y, _ = OPERATORS[name](**given, backend="cpu")
    (first,) = torch.autograd.grad(y.square().sum(), given["v"], create_graph=True)
    with pytest.raises(KernelError, match="no second derivative"):
        torch.autograd.grad(first.sum(), given["k"])


def test_auto_takes_it_for_all_but_float64(name):
    inputs = make(name, *SHORT)
    with use_backend("cpu"):
        expected = OPERATORS[name](**inputs)
    assert torch.equal(OPERATORS[name](**inputs)[0], expected[0])
    exact = {z: x.double() for z, x in inputs.items()}
    assert torch.equal(OPERATORS[name](**exact)[0], OPERATORS[name](**exact, backend="chunked")[0])
