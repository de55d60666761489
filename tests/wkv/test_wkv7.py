"""WKV7: every form against the definition, written here once more in numpy, and the forms against each other."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.wkv import backends, wkv7

SIZES = [(1, 1, 1, 64), (3, 1, 2, 32), (1, 63, 2, 32), (3, 63, 1, 64), (1, 32, 1, 64), (2, 33, 3, 8), (1, 1000, 1, 32)]

# The forms order the same float64 operations differently; over 1000 tokens that leaves a few hundred rounding errors.
TIGHT = 1e-12
# float32: inside a chunk, decay is divided out and multiplied in again, and each of these steps rounds once.
FLOAT32 = 2e-6


def make_inputs(B, T, H, N, dtype=torch.float64, seed=0):
    """r, w, k, v, a, b in the ranges that RWKV-7 produces, and a state."""
    g = torch.Generator().manual_seed(seed)
    r, w, k, v, kk, a = (torch.randn(B, T, H, N, generator=g, dtype=torch.float64) for _ in range(6))
    w = -np.exp(-0.5) * torch.sigmoid(3 * w)
    kk = normalize(kk, dim=-1)
    state = torch.randn(B, H, N, N, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (r, w, k, v, -kk, kk * torch.sigmoid(a), state)]


def relative_rms(found, expected) -> float:
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())


def numpy_wkv7(r, w, k, v, a, b, S):
    """The definition, one batch entry, one head and one token at a time."""
    r, w, k, v, a, b, S = (x.double().numpy() for x in (r, w, k, v, a, b, S))
    B, T, H, _ = r.shape
    y, S = np.full(r.shape, np.nan), S.copy()
    for i in range(B):
        for h in range(H):
            for t in range(T):
                at = i, t, h
                M = S[i, h]
                S[i, h] = M @ np.diag(np.exp(w[at])) + np.outer(M @ a[at], b[at]) + np.outer(v[at], k[at])
                y[at] = S[i, h] @ r[at]
    return y, S


@pytest.fixture(params=["reference", "chunked"])
def backend(request):
    return request.param


def test_the_forms_tested_here_are_all_there_are():
    assert backends() == ("reference", "chunked", "cpu")


@pytest.mark.parametrize("size", SIZES)
def test_output_and_state_follow_the_definition(size, backend):
    inputs = make_inputs(*size)
    y, S = wkv7(*inputs, backend=backend)
    y_expected, S_expected = numpy_wkv7(*inputs)
    assert relative_rms(y, y_expected) < TIGHT
    assert relative_rms(S, S_expected) < TIGHT


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_the_chunked_form_are_those_of_the_recurrence(size):
    g = torch.Generator().manual_seed(1)
    found = {}
    for name in ("reference", "chunked"):
        inputs = [x.requires_grad_() for x in make_inputs(*size)]
        y, S = wkv7(*inputs, backend=name)
        g.manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=g)).sum() + (S * torch.randn(S.shape, generator=g)).sum()
        found[name] = torch.autograd.grad(loss, inputs)
    for name, fast, slow in zip(["r", "w", "k", "v", "a", "b", "state"], *reversed(found.values()), strict=True):
        assert relative_rms(fast, slow) < TIGHT, name


def test_gradients_agree_with_finite_differences(backend):
    inputs = [x.requires_grad_() for x in make_inputs(1, 5, 1, 3)]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, backend=backend), inputs)


@pytest.mark.parametrize("size", SIZES)
def test_float32_stays_near_float64(size, backend):
    inputs = make_inputs(*size, dtype=torch.float32)
    y, S = wkv7(*inputs, backend=backend)
    y_expected, S_expected = wkv7(*(x.double() for x in inputs), backend="reference")
    assert y.dtype == S.dtype == torch.float32
    assert relative_rms(y, y_expected) < FLOAT32
    assert relative_rms(S, S_expected) < FLOAT32


@pytest.mark.parametrize("log_decay", [-1e-5, -0.6065])
def test_equal_keys_at_both_ends_of_the_decay(log_decay, backend):
    """A run of one token repeated: what an explicit inverse by squaring would drown in cancellation."""
    r, w, k, v, a, b, S = make_inputs(1, 100, 1, 64, dtype=torch.float32)
    kk = normalize(torch.ones_like(k), dim=-1)
    inputs = [r, torch.full_like(w, log_decay), k, v, -kk, kk, S]
    y, S = wkv7(*inputs, backend=backend)
    y_expected, S_expected = wkv7(*(x.double() for x in inputs), backend="reference")
    assert relative_rms(y, y_expected) < 5 * FLOAT32  # nothing is forgotten, so nothing of the error is either
    assert relative_rms(S, S_expected) < 5 * FLOAT32


@pytest.mark.parametrize("cut", [1, 31, 32, 62])
def test_a_sequence_may_be_cut_anywhere(cut, backend):
    *inputs, S = make_inputs(2, 63, 2, 16)
    y, S_whole = wkv7(*inputs, S, backend=backend)
    y1, S1 = wkv7(*(x[:, :cut] for x in inputs), S, backend=backend)
    y2, S2 = wkv7(*(x[:, cut:] for x in inputs), S1, backend=backend)
    assert relative_rms(torch.cat([y1, y2], 1), y) < TIGHT
    assert relative_rms(S2, S_whole) < TIGHT


def test_no_state_means_zeros_and_the_state_given_is_left_alone(backend):
    *inputs, S = make_inputs(2, 40, 1, 8)
    assert torch.equal(wkv7(*inputs, backend=backend)[0], wkv7(*inputs, S * 0, backend=backend)[0])
    before = S.clone()
    wkv7(*inputs, S, backend=backend)
    assert torch.equal(S, before)


def test_low_precision_goes_in_and_comes_out_float32_within(backend):
    inputs = make_inputs(1, 40, 2, 16, dtype=torch.bfloat16)
    y, S = wkv7(*inputs, backend=backend)
    y_expected, S_expected = wkv7(*(x.float() for x in inputs), backend=backend)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert torch.equal(S, S_expected)
    assert torch.equal(y, y_expected.bfloat16())


def test_auto_is_one_of_the_forms():
    for T in (1, 3, 4, 50):
        inputs = make_inputs(1, T, 1, 8)
        assert relative_rms(wkv7(*inputs)[0], wkv7(*inputs, backend="reference")[0]) < TIGHT


def test_refusals_say_what_there_is():
    inputs = make_inputs(1, 4, 1, 8)
    with pytest.raises(KernelError, match="'cdua'.*\n.*auto, reference, chunked"):
        wkv7(*inputs, backend="cdua")
    with pytest.raises(ParameterError, match="w has shape"):
        wkv7(inputs[0], inputs[1][:, 1:], *inputs[2:])
    with pytest.raises(ParameterError, match="k is a tensor of torch.int32"):
        wkv7(*inputs[:2], inputs[2].int(), *inputs[3:])
    with pytest.raises(ParameterError, match="state has shape"):
        wkv7(*inputs[:6], inputs[6][:, :, 1:])
    with pytest.raises(ParameterError, match=r"\[B,T,H,N\]"):
        wkv7(*(x[:, :0] for x in inputs[:6]))
