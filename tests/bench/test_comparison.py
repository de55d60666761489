"""Turns, rows, tables, and what disturbs a sample."""

import json
import subprocess
import sys
import time

import pytest
import torch

from rwkv_lab.bench import comparison
from rwkv_lab.bench.comparison import COLUMNS, Agreement, Row, as_json, compare, interleave, median_share, table
from rwkv_lab.bench.engines import busy_loop
from rwkv_lab.bench.machine import (
    Load,
    child_environment,
    describe_machine,
    floors_are_compiled,
    multiply_add_rate,
    read_rate,
    watched,
)
from rwkv_lab.threads import VARIABLES


def test_entries_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(comparison, "QUIET", 1e9)  # whatever else this machine does
    calls = []

    def take(name):
        return lambda: calls.append(name) or float(len(calls))

    found = interleave({name: take(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert found["a"][0] == [4.0, 9.0, 11.0] and len(found["c"][0]) == 3


def test_a_slow_entry_is_sampled_three_times(monkeypatch):
    seconds = iter(range(1000))
    clock = {"slow": 11, "fast": 0}
    now = 0

    def take(name):
        def sample():
            nonlocal now
            now += clock[name]
            return float(next(seconds))

        return sample

    monkeypatch.setattr(comparison.time, "perf_counter", lambda: now)
    monkeypatch.setattr(comparison, "_sample", lambda take: (take(), 0.0))
    found = interleave({name: take(name) for name in clock}, rounds=5)
    assert len(found["slow"][0]) == 3 and len(found["fast"][0]) == 5
    assert len(interleave({"slow": take("slow")}, rounds=2)["slow"][0]) == 2


def test_a_disturbed_sample_is_taken_again_and_the_quietest_counts(monkeypatch, in_full):
    loads = iter([0.5, 0.9, 0.3])  # all above the limit

    class Watched:
        def __enter__(self):
            return Load(0.1, next(loads))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(comparison, "watched", Watched)
    values = iter([1.0, 2.0, 3.0])
    found = interleave({"a": lambda: next(values)}, rounds=1, warm_up=False)
    assert found == {"a": ([3.0], 0.3)}
    assert Row("j", "s", "e", "", 1, "u", [3.0], 0.3).disturbed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports the load of processes")
def test_our_own_children_are_no_load_of_other_processes():
    with watched() as alone:
        time.sleep(0.3)
    with watched() as beside, busy_loop():
        time.sleep(0.5)
    assert beside.other_load < alone.other_load + 0.5  # a busy loop alone would be 1; others may be at work here
    assert beside.seconds >= 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports the load of processes")
def test_other_processes_are_counted():
    script = "import os, time\nif os.fork(): os._exit(0)\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", script], check=True)  # what runs on is no child of this process
    with watched() as load:
        time.sleep(0.5)
    assert load.other_load > 0.2


def test_logits_are_compared_as_numbers_and_as_distributions():
    expected = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    same = compare(expected.clone(), expected, 1e-6)
    assert same.passed and same.error == 0 and same.kl == 0 and same.top1 == 1 and same.positions == 5
    other = compare(-expected, expected, 1.0)
    assert not other.passed and other.error == pytest.approx(2) and other.kl > 0 and other.top1 == 0
    assert not compare(expected * float("nan"), expected, 1e9).passed


def test_json_has_spread_and_no_nan_and_the_table_a_line_for_each_row():
    rows = [
        Row(
            "decode", "m", "rwkv_lab", "bf16", 1, "tokens/s", [3.0, 1.0, 2.0], 0.0, Agreement(1e-3, 6e-2), {"read": 0.5}
        ),
        Row(
            "decode", "m", "other", "bf16", 1, "tokens/s", agreement=Agreement(float("nan"), 6e-2), problem="it differs"
        ),
    ]
    content = json.loads(as_json({"cpu": "x"}, {"read GB/s": [40.0, 41.0, 39.0]}, rows), parse_constant=pytest.fail)
    assert content["schema"] == 1 and content["floors"]["read GB/s"]["median"] == 40.0
    first, second = content["rows"]
    assert (first["min"], first["median"], first["max"]) == (1, 2, 3) and first["agreement"]["passed"]
    assert second["samples"] == [] and "median" not in second and second["agreement"]["passed"] is False
    head, _, one, two = table(rows).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(COLUMNS)
    assert "| 2 | 1–3 |" in one and "| – | – |" in two and "it differs" in two


def test_a_share_is_taken_round_by_round():
    assert median_share([10, 20, 90], [20, 40, 100]) == 0.5
    assert median_share([10, 30], [20, 40, 1]) == 0.625  # sampled in the first two rounds only


def test_peers_wait_as_the_machine_is_described(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert describe_machine()["wait policy of peers"] == "OMP_WAIT_POLICY=PASSIVE"
    monkeypatch.setenv("KMP_BLOCKTIME", "3")
    assert child_environment()["KMP_BLOCKTIME"] == "3" and "OMP_WAIT_POLICY" not in child_environment()
    assert describe_machine()["wait policy of peers"] == "KMP_BLOCKTIME=3"


def test_the_machine_and_its_floors():
    described = describe_machine()
    assert described["threads"] == torch.get_num_threads() and described["torch"] == torch.__version__
    assert read_rate() > 0.1 and multiply_add_rate() > 0.1 and floors_are_compiled() in (True, False)
