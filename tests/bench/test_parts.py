"""The operators alone, training, loading and long contexts: rows that say what was measured, and refusals."""

import json
import sys

import pytest
import torch

from rwkv_lab import wkv
from rwkv_lab.bench import gpu_wkv, growth, operators
from rwkv_lab.bench.__main__ import main
from rwkv_lab.bench.comparison import interleave
from rwkv_lab.bench.growth import measure_growth
from rwkv_lab.bench.loading import measure_loading
from rwkv_lab.bench.operators import OPERATORS, Shape, flops, measure_operators, traffic
from rwkv_lab.bench.training import measure_training
from rwkv_lab.errors import DeviceError

SMALL = Shape(length=40, heads=2, head_size=32)


def test_operators_on_every_backend(quick):
    rows, floors = measure_operators(SMALL, wkv.backends(), rounds=2)
    assert {(row.subject, row.engine, row.job) for row in rows} == {
        (operator, backend, job)
        for operator in OPERATORS
        for backend in wkv.backends()
        for job in ("wkv forward", "wkv backward")
    }
    assert all(len(row.samples) == 2 and row.agreement.passed for row in rows), [row.problem for row in rows]
    forward = next(row for row in rows if row.subject == "wkv7")
    assert forward.facts["GFLOP/s"] > 0 and forward.shares.keys() == {"FMA rate", "read floor"}
    assert len(floors["FMA GFLOP/s"]) == 2 * len(OPERATORS)


def test_a_slow_operator_has_fewer_samples(quick, monkeypatch):
    def slow(*given, **options):
        results = interleave(*given, **options)
        return {n: (s[:1], load) if n == "chunked both" else (s, load) for n, (s, load) in results.items()}

    monkeypatch.setattr(operators, "interleave", slow)
    rows, _ = measure_operators(SMALL, ["chunked"], rounds=2, operators=["wkv6"])
    assert [(row.job, len(row.samples)) for row in rows] == [("wkv forward", 2), ("wkv backward", 1)]


def test_a_wrong_operator_gets_no_time(quick, monkeypatch):
    right = wkv._FORMS["wkv6"]["chunked"]
    monkeypatch.setitem(wkv._FORMS["wkv6"], "chunked", lambda r, w, *rest: right(r, 1.01 * w, *rest))
    rows, _ = measure_operators(SMALL, ["reference", "chunked"], rounds=1, operators=["wkv6"])
    wrong = [row for row in rows if row.engine == "chunked"]
    assert [row.job for row in wrong] == ["wkv forward", "wkv backward"]
    assert all(row.disagrees and row.samples == [] and "disagree" in row.problem for row in wrong)
    assert all(row.samples for row in rows if row.engine == "reference")


def test_a_backend_that_is_not_there_says_why(quick):
    rows, _ = measure_operators(SMALL, ["abacus"], rounds=1, operators=["wkv7"])
    assert [row.samples for row in rows] == [[]] and "abacus" in rows[0].problem and not rows[0].disagrees


def test_operations_and_bytes_of_the_operators():
    shape = Shape(batch=1, length=512, heads=12, head_size=64)
    assert flops("wkv7", shape) == 2 * 5 * 64 * 64 * 512 * 12 and flops("wkv6", shape) == flops("wkv7", shape) * 3 // 5
    assert traffic("wkv7", shape) == 7 * 4 * 512 * 768


def test_training_is_told_beside_chunked(monkeypatch):
    rows = measure_training(["chunked", "reference", "abacus"], rounds=1, length=8)
    chunked, reference = (next(row for row in rows if row.engine == name) for name in ("chunked", "reference"))
    assert chunked.shares == {"chunked": 1.0} and reference.agreement.passed and reference.size == 32
    assert next(row for row in rows if row.engine == "abacus").problem


def test_training_with_wrong_gradients_has_no_rate(monkeypatch):
    right = wkv._FORMS["wkv7"]["chunked"]
    monkeypatch.setitem(wkv._FORMS["wkv7"], "chunked", lambda r, w, *rest: right(r, 1.5 * w, *rest))
    (row,) = measure_training(["chunked"], rounds=1, length=8)
    assert row.disagrees and row.samples == []


def test_loading_in_processes_of_their_own(tiny):
    rows = measure_loading(tiny("6.0"), "tiny", ["fp32"], rounds=1)
    assert rows[0].job == "load" and rows[0].unit == "s" and len(rows[0].samples) == 1
    if sys.platform.startswith("linux"):
        assert rows[1].job == "load memory" and rows[1].samples[0] > 0
        assert rows[1].facts["model MB"] == pytest.approx(rows[1].median / rows[1].shares["the model's size"])


def test_loading_what_is_no_model_says_why(warm_children, tmp_path):
    (tmp_path / "m.pth").write_bytes(b"nothing")
    (row,) = measure_loading(tmp_path / "m.pth", "tiny", ["fp32"], rounds=1)
    assert row.samples == [] and "m.pth" in row.problem


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_contexts_are_measured_in_turn_from_kept_states(version, tiny, monkeypatch):
    monkeypatch.setattr(growth, "_PIECE", 8)
    rows = measure_growth(tiny(version), "tiny", "fp32", [4, 40], rounds=2)
    timed = [(row.job, row.size) for row in rows if row.unit == "ms per token"]
    assert timed == [(job, size) for job in ("growth decode", "growth prefill") for size in (4, 40)]
    assert all(row.samples and row.agreement.passed for row in rows if row.unit == "ms per token")
    assert next(row for row in rows if row.job == "growth decode").shares == {"that at 4": 1.0}


def test_the_gpu_job_times_what_agrees_and_leaves_the_rest(monkeypatch, tmp_path):
    """On the CPU, in place of a GPU: what is timed, what is said, what is refused."""
    entries = {
        "right": lambda *inputs: wkv.wkv7(*inputs, backend="chunked"),
        "wrong": lambda r, *others: wkv.wkv7(2 * r, *others, backend="chunked"),
    }
    calls = []
    monkeypatch.setattr(gpu_wkv, "_DEVICE", "cpu")
    monkeypatch.setattr(gpu_wkv, "_entries", lambda: entries)
    monkeypatch.setattr(gpu_wkv, "_copy_rates", lambda rounds: [100.0] * rounds)
    monkeypatch.setattr(gpu_wkv, "_times", lambda work, rounds: calls.append(work()) or [0.5] * rounds)
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        gpu_wkv.measure_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows, floors = gpu_wkv.measure_gpu(2, B=2, T=20, H=2, N=32)
    assert [(row.engine, bool(row.samples)) for row in rows] == [("right", True)] * 2 + [("wrong", False)] * 2
    assert all("answers disagree" in row.problem for row in rows[2:]) and len(calls) == 2
    forward = 7 * 2 * 2 * 20 * 2 * 32 + 2 * 4 * 2 * 2 * 32 * 32  # bytes: seven tensors in bf16, two states in float32
    assert rows[0].shares["copy"] == pytest.approx(forward / 100e6 / 0.5) and floors["copy on the GPU GB/s"] == [
        100,
        100,
    ]


@pytest.mark.parametrize("job", ["wkv", "growth"])
def test_the_other_jobs_as_commands(job, tiny, quick, tmp_path):
    given = ["--models", str(tiny("7.0")), "--dtypes", "fp32", "--rounds", "1", "--report", str(tmp_path)]
    main([job, *given, "--backends", "chunked", "--lengths", "20", "--contexts", "4", "8", "--folder", str(tmp_path)])
    assert json.loads((tmp_path / f"{job}.json").read_text())["rows"]
    assert (tmp_path / f"{job}-{'roofline' if job == 'wkv' else 'growth'}.png").exists()
