"""Rates beside a busy loop: processes whose threads wait in different ways, and rows that compare them."""

import math
from contextlib import contextmanager
from pathlib import Path

import pytest

from rwkv_lab.bench import busy
from rwkv_lab.bench.busy import ALONE, BESIDE, SLEEP, SPIN, measure_beside_a_busy_loop
from rwkv_lab.errors import RwkvLabError


def test_work_alone_and_beside_a_busy_loop(tiny, monkeypatch):
    """One work in processes, which take seconds to start; the other is but a number."""
    process = busy._process

    @contextmanager
    def started(work, *given):
        if work == "modes":
            yield lambda: 5.0
        else:
            with process(work, *given) as take:
                yield take

    monkeypatch.setattr(busy, "_process", started)
    monkeypatch.setattr(busy, "WORKS", dict.fromkeys(("modes", "decode")))
    short = "from rwkv_lab.bench.engines import decoder; decoder.__defaults__ = (0.02,)"  # seconds of a sample
    monkeypatch.setattr(busy, "_START", f"{short}; {busy._START}")
    rows = measure_beside_a_busy_loop(tiny("7.0"), "tiny", rounds=1, dtype="fp32")
    assert [(row.job, row.engine) for row in rows] == [
        (f"{work} {where}", f"rwkv_lab, {wait},")
        for work in ("modes", "decode")
        for wait in (SLEEP, SPIN)
        for where in (ALONE, BESIDE)
    ]
    assert all(len(row.samples) == 1 and row.median > 0 for row in rows)
    assert all(row.samples == [5.0] for row in rows[:4])
    sleeping, beside, spinning, _ = rows[4:]
    assert sleeping.shares == {SPIN: pytest.approx(sleeping.median / spinning.median)}
    assert beside.shares[ALONE] == pytest.approx(beside.median / sleeping.median) and spinning.shares == {}


@pytest.mark.parametrize(("wait", "expected"), [(SLEEP, "OMP_WAIT_POLICY=PASSIVE"), (SPIN, "")])
def test_threads_of_a_process_wait_as_its_rows_state(wait, expected, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # of whoever starts the benchmark
    code = "import sys, rwkv_lab.threads as t; [print(len(t.policy_in_force()), flush=True) for _ in sys.stdin]"
    monkeypatch.setattr(busy, "_START", code)
    with busy._process("decode", Path("none.pth"), "fp32", wait) as take:
        assert take() == len(expected) and math.isfinite(take())


def test_a_process_that_ends_is_named(monkeypatch):
    monkeypatch.setattr(busy, "_START", "import sys; sys.exit(1)")
    with busy._process("prefill", Path("none.pth"), "fp32", SLEEP) as take:
        with pytest.raises(RwkvLabError, match="measures prefill ended with code 1"):
            take()
