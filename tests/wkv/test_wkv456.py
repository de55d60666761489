"""WKV4, WKV5 and WKV6: every form against the definition, written here once more in numpy, and the forms against each
other. Decays go from almost 1 down to e^(-e^4), which is 0 in float32 after two tokens."""

import numpy as np
import pytest
import torch

from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.wkv import backends, empty_wkv4_state, wkv4, wkv5, wkv6

OPERATORS = {"wkv4": wkv4, "wkv5": wkv5, "wkv6": wkv6}
NAMES = {"wkv4": ("w", "u", "k", "v", "state"), "wkv5": ("r", "w", "k", "v", "u", "state")}
NAMES["wkv6"] = NAMES["wkv5"]
PER_TOKEN = {"wkv4": "kv", "wkv5": "rkv", "wkv6": "rwkv"}
SIZES = [(1, 1, 1, 64), (3, 1, 2, 32), (1, 63, 2, 32), (3, 63, 1, 64), (1, 32, 1, 64), (2, 33, 3, 8), (1, 1000, 1, 32)]

# The forms order the same float64 operations differently; over 1000 tokens that leaves a few hundred rounding errors.
TIGHT = 1e-12
# float32: the decay over many tokens is a product in one form and the exponential of a sum in the other.
FLOAT32 = 5e-6


def make_inputs(name, B, T, H, N, dtype=torch.float64, seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    heads = (B, T, H, N) if name != "wkv4" else (B, T, H * N)
    one_token = heads[2:]
    x = {z: randn(*heads) for z in "rkv"} | {"u": randn(*one_token)}
    x["w"] = -torch.exp((2 * randn(*(heads if name == "wkv6" else one_token)) - 2).clamp(max=4))
    if name == "wkv4":
        x["k"] = 3 * x["k"]
        x["state"] = torch.stack([randn(B, H * N), randn(B, H * N).abs() + 0.1, randn(B, H * N)], 1)
    else:
        x["state"] = randn(B, H, N, N)
    return {z: x[z].to(dtype) for z in NAMES[name]}


def relative_rms(found, expected) -> float:
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())


def definition(name, x):
    """One token at a time: y, and the state (of WKV4: the two sums, not divided by anything)."""
    x = {z: t.double().numpy() for z, t in x.items()}
    y = np.empty(x["v"].shape)
    if name == "wkv4":
        sums = x["state"][:, :2] * np.exp(x["state"][:, 2:])
        for t in range(y.shape[1]):
            k, v = x["k"][:, t], x["v"][:, t]
            now = np.exp(x["u"] + k)
            y[:, t] = (sums[:, 0] + now * v) / (sums[:, 1] + now)
            sums = sums * np.exp(x["w"]) + np.stack([np.exp(k) * v, np.exp(k)], 1)
        return y, sums
    S = x["state"].copy()
    for b, t, h in np.ndindex(y.shape[:3]):
        r, k, v = (x[z][b, t, h] for z in "rkv")
        w = x["w"][b, t, h] if name == "wkv6" else x["w"][h]
        y[b, t, h] = (S[b, h] + np.outer(v, x["u"][h] * k)) @ r
        S[b, h] = S[b, h] @ np.diag(np.exp(w)) + np.outer(v, k)
    return y, S


def whole(name, state):
    """A state in the form in which `definition` gives it."""
    return state[:, :2] * state[:, 2:].exp() if name == "wkv4" else state


@pytest.fixture(params=OPERATORS)
def name(request):
    return request.param


@pytest.fixture(params=["reference", "chunked"])
def backend(request):
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_output_and_state_follow_the_definition(name, size, backend):
    inputs = make_inputs(name, *size)
    y, S = OPERATORS[name](**inputs, backend=backend)
    y_expected, S_expected = definition(name, inputs)
    assert relative_rms(y, y_expected) < TIGHT
    assert relative_rms(whole(name, S), S_expected) < TIGHT


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_the_chunked_form_are_those_of_the_recurrence(name, size):
    g = torch.Generator()
    found = {}
    for form in ("reference", "chunked"):
        inputs = {z: x.requires_grad_() for z, x in make_inputs(name, *size).items()}
        y, S = OPERATORS[name](**inputs, backend=form)
        g.manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=g)).sum() + (S * torch.randn(S.shape, generator=g)).sum()
        found[form] = torch.autograd.grad(loss, list(inputs.values()))
    for z, fast, slow in zip(NAMES[name], found["chunked"], found["reference"], strict=True):
        assert relative_rms(fast, slow) < TIGHT, z


def test_gradients_agree_with_finite_differences(name, backend):
    inputs = make_inputs(name, 1, 5, 1, 3)
    given = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: OPERATORS[name](*x, backend=backend), given)


@pytest.mark.parametrize("size", SIZES)
def test_float32_stays_near_float64(name, size, backend):
    inputs = make_inputs(name, *size, dtype=torch.float32)
    y, S = OPERATORS[name](**inputs, backend=backend)
    y_expected, S_expected = definition(name, inputs)
    assert y.dtype == S.dtype == torch.float32
    assert relative_rms(y, y_expected) < FLOAT32
    # WKV4's sums are what is kept times e^p, and p, here up to 10, is rounded once per token in the recurrence.
    assert relative_rms(whole(name, S), S_expected) < (10 * FLOAT32 if name == "wkv4" else FLOAT32)


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -54.6, -1e4])
def test_both_ends_of_the_decay(name, log_decay, backend):
    """Nothing forgotten over 100 tokens, and everything at once: no overflow, no 0/0, gradients finite."""
    inputs = make_inputs(name, 1, 100, 1, 64, dtype=torch.float32)
    inputs["w"] = torch.full_like(inputs["w"], log_decay)
    given = {z: x.requires_grad_() for z, x in inputs.items()}
    y, S = OPERATORS[name](**given, backend=backend)
    y_expected, S_expected = definition(name, {z: x.detach() for z, x in inputs.items()})
    assert relative_rms(y, y_expected) < FLOAT32
    assert relative_rms(whole(name, S), S_expected) < FLOAT32
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum() + S.sum(), list(given.values())))


def test_wkv4_with_keys_that_no_exponential_could_take(backend):
    inputs = make_inputs("wkv4", 2, 70, 1, 32, dtype=torch.float32)
    inputs["k"] = inputs["k"] * 100
    y, S = wkv4(**inputs, backend=backend)
    y_expected, S_expected = wkv4(**{z: x.double() for z, x in inputs.items()}, backend="reference")
    assert y.isfinite().all() and S.isfinite().all()
    assert relative_rms(y, y_expected) < 1e-4  # keys of 1000 have steps of 6e-5, and the weights are their exponentials
    assert relative_rms(S, S_expected) < 1e-4


@pytest.mark.parametrize("cut", [1, 31, 32, 62])
def test_a_sequence_may_be_cut_anywhere(name, cut, backend):
    inputs, operator = make_inputs(name, 2, 63, 2, 16), OPERATORS[name]
    y, S_whole = operator(**inputs, backend=backend)
    first = inputs | {z: inputs[z][:, :cut] for z in PER_TOKEN[name]}
    y1, S1 = operator(**first, backend=backend)
    second = inputs | {z: inputs[z][:, cut:] for z in PER_TOKEN[name]} | {"state": S1}
    y2, S2 = operator(**second, backend=backend)
    assert relative_rms(torch.cat([y1, y2], 1), y) < TIGHT
    assert relative_rms(S2, S_whole) < TIGHT


def test_no_state_means_the_empty_one_and_the_state_given_is_left_alone(name, backend):
    inputs, operator = make_inputs(name, 2, 40, 1, 8), OPERATORS[name]
    state = inputs.pop("state")
    empty = empty_wkv4_state(2, 8) if name == "wkv4" else state * 0
    assert torch.equal(operator(**inputs, backend=backend)[0], operator(**inputs, state=empty, backend=backend)[0])
    before = state.clone()
    operator(**inputs, state=state, backend=backend)
    assert torch.equal(state, before)


def test_low_precision_and_autocast_stay_float32_within(name, backend):
    inputs, operator = make_inputs(name, 1, 40, 2, 16, dtype=torch.bfloat16), OPERATORS[name]
    y, S = operator(**inputs, backend=backend)
    y_expected, S_expected = operator(**{z: x.float() for z, x in inputs.items()}, backend=backend)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert torch.equal(S, S_expected)
    assert torch.equal(y, y_expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(**inputs, backend=backend)[1], S_expected)


def test_auto_is_one_of_the_forms(name):
    for T in (1, 5, 6, 11, 12, 50):
        inputs = make_inputs(name, 1, T, 1, 8)
        found, expected = OPERATORS[name](**inputs)[0], OPERATORS[name](**inputs, backend="reference")[0]
        assert relative_rms(found, expected) < TIGHT


def test_refusals_say_what_there_is(name):
    inputs, operator = make_inputs(name, 1, 4, 1, 8), OPERATORS[name]
    assert backends() == ("reference", "chunked", "cpu")
    with pytest.raises(KernelError, match="'cdua'.*\n.*auto, reference, chunked"):
        operator(**inputs, backend="cdua")
    for z in inputs:
        called = "the state" if z == "state" else z
        with pytest.raises(ParameterError, match=f"{name}: ({called}|[kr]) has shape"):
            operator(**inputs | {z: inputs[z][..., 1:]})
        for wrong in (inputs[z].long(), inputs[z].bool(), inputs[z].to(torch.complex64), inputs[z].to_sparse()):
            with pytest.raises(ParameterError, match=f"{called} is a tensor of (.|\n)*torch.bfloat16"):
                operator(**inputs | {z: wrong})
    with pytest.raises(ParameterError, match="u is on meta, v on cpu"):
        operator(**inputs | {"u": inputs["u"].to("meta")})
    with pytest.raises(ParameterError, match=r"\[B,T,"):
        operator(**inputs | {z: inputs[z][:, :0] for z in PER_TOKEN[name]})
