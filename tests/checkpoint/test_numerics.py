"""NaN and Inf are found in every format, and rounding happens once."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkv_lab.checkpoint.numerics import all_finite, round_to

SIXTEEN = [torch.bfloat16, torch.float16]
EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", SIXTEEN + EIGHT)
def test_every_bit_pattern_of_the_small_formats(dtype):
    unsigned = torch.uint16 if dtype.itemsize == 2 else torch.uint8
    values = torch.arange(2 ** (8 * dtype.itemsize)).to(unsigned).view(dtype)
    wanted = values.float().isfinite()
    found = [all_finite(raw(v), dtype) for v in values.split(1)]
    assert found == wanted.tolist()
    assert not all_finite(raw(values), dtype) and all_finite(raw(values.float()[wanted].to(dtype)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128, *SIXTEEN])
@given(st.lists(st.floats(width=32), max_size=40))
def test_all_finite_agrees_with_torch(dtype, values):
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    assert all_finite(raw(tensor), dtype) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_all_finite_of_any_bits(dtype, pattern, place):
    unsigned = np.uint32 if dtype == torch.float32 else np.uint64
    values = np.zeros(4, unsigned)
    values[place] = pattern % 2 ** (8 * values.itemsize)
    tensor = torch.from_numpy(values.view(values.dtype.str.replace("u", "f")))
    assert all_finite(raw(tensor), dtype) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_integers_are_always_finite(dtype):
    assert all_finite(b"\xff" * 16, dtype) and all_finite(b"", dtype)


def all_finite_values(dtype: torch.dtype) -> list[Fraction]:
    """Every finite value of a 16-bit format, in order, and with even mantissas at even places counted from zero."""
    positive = torch.arange(2**15).to(torch.uint16).view(dtype).double()
    return [Fraction(v) for v in positive[positive.isfinite()].tolist()]


TABLES = {dtype: all_finite_values(dtype) for dtype in SIXTEEN}


def nearest(value: float, dtype: torch.dtype) -> float:
    """Exact rounding to nearest, ties to even, in rational arithmetic."""
    table, x = TABLES[dtype], abs(Fraction(value))
    low, high = 0, len(table) - 1
    while low < high:  # first entry >= x
        middle = (low + high) // 2
        low, high = (low, middle) if table[middle] >= x else (middle + 1, high)
    if x > table[-1]:
        half = (table[-1] - table[-2]) / 2
        return float("inf") if x >= table[-1] + half else float(table[-1])
    above, below = low, max(low - 1, 0)
    over, under = table[above] - x, x - table[below]
    pick = above if over < under or (over == under and above % 2 == 0) else below
    return float(table[pick])


@st.composite
def awkward(draw) -> float:
    """Values at, and a hair beside, the middle between two neighbours, where rounding twice goes wrong."""
    table = TABLES[draw(st.sampled_from(SIXTEEN))]
    i = draw(st.integers(0, len(table) - 2))
    middle = float((table[i] + table[i + 1]) / 2)
    for _ in range(draw(st.integers(0, 2))):
        middle = float(np.nextafter(middle, draw(st.sampled_from([-np.inf, np.inf]))))
    return middle * draw(st.sampled_from([-1.0, 1.0]))


@pytest.mark.parametrize("dtype", SIXTEEN)
@given(st.one_of(awkward(), st.floats(allow_nan=False, allow_infinity=False)))
def test_float64_is_rounded_once(dtype, value):
    found = round_to(torch.tensor([value], dtype=torch.float64), dtype)
    assert found.dtype == dtype and float(found.abs()) == nearest(value, dtype)
    assert value == 0 or float(found) == 0 or np.sign(float(found)) == np.sign(value)


def test_rounding_twice_would_be_seen():
    """The case that torch gets wrong on its own: else the test above proves nothing."""
    value = 1 + 2**-8 + 2**-40  # a hair above the middle of two bfloat16, which float32 cannot see
    assert float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16)) == 1.0
    assert float(round_to(torch.tensor([value], dtype=torch.float64), torch.bfloat16)) == 1 + 2**-7


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_float64_specials_keep_what_they_are(dtype):
    specials = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e300, -1e300], dtype=torch.float64)
    found = round_to(specials, dtype)
    assert found.isnan().tolist() == [False] * 4 + [True] + [False] * 2
    assert found.isinf().tolist() == [False, False, True, True, False, True, True]
    assert found.signbit().tolist()[:4] == [False, True, False, True] and found.signbit().tolist()[5:] == [False, True]


@pytest.mark.parametrize("dtype", SIXTEEN)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_float32_is_rounded_to_nearest(dtype, value):
    found = round_to(torch.tensor([value], dtype=torch.float32), dtype)
    assert float(found.abs()) == nearest(value, dtype)
