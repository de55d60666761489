"""The compiled functions of a merge against torch and float64: outputs, sums, odd sizes, values that are not finite."""

import math

import pytest
import torch
from models import random_lora, random_model

from rwkv_lab import merge
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.errors import NumericsError
from rwkv_lab.merge import compiled, effect_sums, low_rank, verify_merge
from rwkv_lab.merge.effect_sums import sums_of
from rwkv_lab.merge.low_rank import LowRankChange
from rwkv_lab.wkv.pointers import NOTHING, Span

FLOAT32 = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums in float32 of some hundred numbers of one sign: a few units of rounding each.
CLOSE = 200 * FLOAT32


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST", 0)
    assert compiled.functions() is not None


def in_float64(before, values, rounded):
    delta, arrived = values.double() - before.double(), rounded.double() - before.double()
    moved, size = int((arrived != 0).sum()), float(before.double().abs().sum())
    return moved, float(delta @ delta), float(delta @ arrived), size


def alike(found, expected):
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(expected[1:], rel=CLOSE, abs=1e-30)


@pytest.mark.parametrize("n", [1, 3, 15, 17, 4095, 4097, 70_001])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_float64(n, stored, dtype):
    g = torch.Generator().manual_seed(n)
    before = torch.randn(n, generator=g).to(torch.float16).to(torch.bfloat16).to(stored)  # a number of every dtype
    moved = torch.rand(n, generator=g) < 0.5
    values = before.float() + torch.randn(n, generator=g) * 0.1 * moved
    rounded = values.to(dtype)
    found = compiled.effect_sums(before, values, rounded)
    alike(found, in_float64(before, values, rounded))
    alike(sums_of(before, values, rounded, True, compiled=False), in_float64(before, values, rounded))
    assert effect_sums.sums_from(found) == sums_of(before, values, rounded, True, compiled=True)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["base", "values", "both"])
def test_sums_of_values_that_are_not_finite_or_whose_squares_are_not(odd, where):
    before, values = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    if where != "values":
        before[7] = odd
    if where != "base":
        values[7] = odd
    found = sums_of(before, values, values, True, compiled=True)
    expected = sums_of(before, values, values, True, compiled=False)
    alike(found[:3], expected[:3])
    assert all(map(math.isfinite, found[:3]))
    # One that both have counts as not moved, unless the rest of it moved.
    assert found.moved == (99 if where == "both" else 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(1, 1, 1), (5, 3, 2), (6, 64, 8), (7, 63, 1), (7, 65, 3), (13, 257, 40), (67, 129, 17), (200, 31, 5)],
)
def test_a_change_of_low_rank_is_rounded_once(dtype, rows, columns, k, monkeypatch):
    g = torch.Generator().manual_seed(rows)
    base = torch.randn(rows + 2, columns, generator=g).to(dtype)
    left, right = torch.randn(rows + 2, k, generator=g) * 0.1, torch.randn(k, columns, generator=g)
    change = LowRankChange(left, right, compiled.functions())
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    out, sums = change.added_to(base[2:], 2)
    exact = base[2:].double() + left[2:].double() @ right.double()
    # What float32 adds up differs from float64 by a unit for each of k products, and is rounded once.
    error = (k + 2) * FLOAT32 * (base[2:].double().abs() + left[2:].double().abs() @ right.double().abs())
    half_a_step = 0.5 * torch.finfo(dtype).eps * exact.abs() * (dtype != torch.float32)
    assert out.dtype == dtype and ((out.view(rows, columns).double() - exact).abs() <= error + half_a_step).all()
    moved, *expected = in_float64(base[2:].flatten(), exact.flatten(), out)
    assert sums.moved == moved
    # Δ is the small difference of two numbers of float32.
    limit = CLOSE + 4 * FLOAT32 * float(exact.norm() / (exact - base[2:].double()).norm())
    assert sums[1:] == pytest.approx(expected, rel=limit)


def test_ties_are_rounded_to_even():
    high = torch.randint(0x3000, 0x5000, (999, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = (high << 16 | torch.tensor([0x7FFF, 0x8000, 0x8001])).view(torch.float32).view(1, -1)
    change = LowRankChange(torch.ones(1, 1), values, compiled.functions())
    out, _ = change.added_to(torch.zeros(values.shape, dtype=torch.bfloat16), 0)
    assert torch.equal(out, values.bfloat16().flatten())


def test_no_values_and_no_rank():
    change = LowRankChange(torch.ones(4, 0), torch.ones(0, 5), compiled.functions())
    out, sums = change.added_to(torch.arange(20.0).view(4, 5), 0)
    assert torch.equal(out, torch.arange(20.0)) and sums == (0, 0, 0, 190)
    out, sums = change.added_to(torch.ones(0, 5), 0)
    assert len(out) == 0 and sums == effect_sums.NONE


@pytest.mark.parametrize("odd", [math.nan, math.inf, 3e38])
def test_a_change_with_values_that_are_not_finite_is_left_to_torch(odd):
    base = torch.ones(4, 40, dtype=torch.bfloat16)
    base[2, 3] = odd
    change = LowRankChange(torch.full((4, 2), 1e19), torch.full((2, 40), 1e19), compiled.functions())
    values, before = change.added_to(base, 0)
    assert values.dtype == before.dtype == torch.float32
    assert torch.equal(before.isfinite(), base.flatten().isfinite()) and not values.isfinite().all()


def test_sizes_that_do_not_go_together_are_refused():
    library = compiled.functions()
    x, sums = torch.zeros(6, 8), torch.zeros(4, dtype=torch.float64)
    there, out = Span(x.data_ptr(), x.nbytes), Span(sums.data_ptr(), 32)
    short, few = Span(x.data_ptr(), x.nbytes - 1), Span(sums.data_ptr(), 31)
    good = [there, there, 0, there, 0, 48, out]
    assert library.merge_effect(*good) == 0
    wrong = [(0, short), (1, short), (3, short), (3, NOTHING), (2, 3), (2, -1), (4, 3), (5, 49), (5, -1), (5, 1 << 62)]
    for at, value in [*wrong, (6, few), (6, NOTHING)]:
        assert library.merge_effect(*good[:at], value, *good[at + 1 :]) == 1, (at, value)
    good = [there, there, there, there, 0, 6, 8, 6, out]
    assert library.merge_low_rank(*good) == 0
    wrong = [(0, short), (3, short), (4, 2), (4, -1), (5, 7), (6, 9), (7, 9), (7, -1), (7, 1 << 62), (1, NOTHING)]
    for at, value in [*wrong, (2, Span(x.data_ptr(), 191)), (1, Span(x.data_ptr(), 143)), (8, few)]:
        assert library.merge_low_rank(*good[:at], value, *good[at + 1 :]) == 1, (at, value)


ADAPTERS = [
    ({"alpha": 4}, 1),
    ({"alpha": 4, "weights": [0.5, -2.0]}, 2),
    ({"alpha": 4, "weights": [{"blocks.0.*": 0, "*": 1}, 1]}, 2),
    ({"alpha": 4, "dtype": "fp32"}, 1),
    ({"alpha": 4, "precision": "float64"}, 1),
    ({"alpha": 4, "parameters": {"quant": "nf4"}}, 1),
]


@pytest.mark.parametrize(("given", "count"), ADAPTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_the_same_with_and_without_compiled_code(given, count, dtype, tmp_path, monkeypatch):
    base = random_model(dtype=dtype)
    write_checkpoint(tmp_path / "base.pth", base)
    tuned = [tmp_path / f"lora{i}.pth" for i in range(count)]
    for i, path in enumerate(tuned):
        write_checkpoint(path, {n: t * 0.1 for n, t in random_lora(seed=i, full=i == 0).items()})
    fast = merge(tmp_path / "base.pth", tuned, tmp_path / "fast.pth", **given)
    assert all(check.passed for check in (*fast.checks, *verify_merge(fast)))
    monkeypatch.setattr(compiled, "_LEAST", 1 << 60)
    slow = merge(tmp_path / "base.pth", tuned, tmp_path / "slow.pth", **given)
    a, b = (torch.load(path, weights_only=True) for path in (fast.out, slow.out))
    for name, expected in b.items():
        # Sums in another order: a value beside a tie goes to the other neighbour.
        step = torch.finfo(expected.dtype).eps * expected.float().abs() + 8 * FLOAT32
        assert ((a[name].float() - expected.float()).abs() <= step).all(), name
    for one, other in zip(fast.effect.tensors, slow.effect.tensors, strict=True):
        assert (one.name, one.changed) == (other.name, other.changed)
        assert abs(one.moved - other.moved) <= 0.01 * other.values if other.moved is not None else one.moved is None
        assert one.share == pytest.approx(other.share, abs=1e-2)


@pytest.mark.parametrize(
    "given", [{}, {"alpha": 0.5}, {"method": "linear", "weights": [1, 1]}, {"method": "slerp"}], ids=str
)
def test_nothing_of_a_merge_is_measured_in_torch_where_compiled_code_can(given, tmp_path, monkeypatch):
    """So that a merge stays as fast as it is: one pass over the values of a block."""
    base = random_model()
    frozen = dict(list(base.items())[:5])  # a tuned model has the base's values where it was not trained
    write_checkpoint(tmp_path / "base.pth", base)
    write_checkpoint(tmp_path / "lora.pth", {n: t * 0.1 for n, t in random_lora(full=False).items()})
    write_checkpoint(tmp_path / "tuned.pth", random_model(seed=1) | frozen)
    in_torch = []
    monkeypatch.setattr(effect_sums, "_sums_in_torch", lambda *given: in_torch.append(given) or effect_sums.NONE)
    merge(tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "out.pth", **given)
    changed = len(base) - len(frozen) if not given else 0  # of a copy the first block that differs decides
    assert len(in_torch) == changed
    added = []
    add = low_rank.low_rank_added
    monkeypatch.setattr(low_rank, "low_rank_added", lambda *given: added.append(given) or add(*given))
    merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "adapted.pth", alpha=4)
    assert len(added) == len(random_lora(full=False)) // 2 and len(in_torch) == changed


def test_a_merge_that_overflows_is_refused_as_without_compiled_code(tmp_path):
    write_checkpoint(tmp_path / "base.pth", random_model())
    lora = {n: t * 1e19 for n, t in random_lora(dtype=torch.float32, full=False).items()}
    write_checkpoint(tmp_path / "lora.pth", lora)
    with pytest.raises(NumericsError, match="overflow|Inf"):
        merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "out.pth", alpha=400)
    assert not (tmp_path / "out.pth").exists()


def test_without_a_compiler_torch_merges(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "base.pth", random_model())
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    for module in (low_rank, compiled):
        monkeypatch.setattr(module, "functions", lambda: None)
    result = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "out.pth", alpha=4)
    assert all(check.passed for check in (*result.checks, *verify_merge(result)))
