"""Progress in a log: a line once the first step is measured, then one per few per cent, with rate and time left."""

import logging
import time

import pytest

from rwkv_lab import progress
from rwkv_lab.progress import Progress, Watcher, human_seconds, watching


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time; front ends and terminals are not there."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    monkeypatch.setattr(progress, "frontend_present", lambda: False)
    return Clock


def run(clock, caplog, steps, seconds, amount=10, unit="tokens") -> list[str]:
    """The lines of a job of so many steps, each of so many seconds and of that amount."""
    with caplog.at_level(logging.INFO, "rwkv_lab.progress"), Progress("pretrain", steps * amount, unit) as done:
        for _ in range(steps):
            clock.now += seconds
            done.advance(amount)
    return caplog.messages


def test_a_long_job_says_after_its_first_step_how_long_it_will_take(clock, caplog):
    lines = run(clock, caplog, steps=200, seconds=3)
    assert lines[0] == "pretrain: 0 % (3.33 tokens/s, 10 min left)"
    assert 18 < len(lines) <= 21 and lines[-1] == "pretrain: 98 % (3.33 tokens/s, 9 s left)"


def test_short_steps_are_measured_for_a_second(clock, caplog):
    lines = run(clock, caplog, steps=400, seconds=0.125, amount=512)
    assert lines[0] == "pretrain: 2 % (4,096 tokens/s, 49 s left)"
    assert 18 < len(lines) <= 21


def test_a_short_job_logs_nothing(clock, caplog):
    assert run(clock, caplog, steps=9, seconds=0.1) == []


def test_a_job_of_a_few_seconds_has_no_early_line(clock, caplog):
    lines = run(clock, caplog, steps=64, seconds=0.0625, amount=10**7, unit="B")
    assert lines[0] == "pretrain: 25 % (160 MB/s, 3 s left)" and len(lines) <= 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5940, "99 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert human_seconds(seconds) == text


def test_who_watches_sees_the_innermost_and_nothing_is_logged(clock, caplog):
    watcher = Watcher()
    with caplog.at_level(logging.INFO, "rwkv_lab.progress"), watching(watcher), Progress("outer", 10, "files") as outer:
        with Progress("inner", 100, "tokens") as inner:
            for _ in range(50):
                clock.now += 1
                inner.advance(1)
            assert watcher.shown is inner and inner.in_words() == "50 % (1 tokens/s, 50 s left)"
        assert watcher.shown is outer and outer.in_words() == "0 %"
    assert watcher.shown is None and not caplog.messages


def test_who_watches_can_have_the_work_end(clock):
    watcher = Watcher()
    with watching(watcher), Progress("work", 10) as work:
        work.advance(1)
        watcher.stopped = True
        with pytest.raises(KeyboardInterrupt):
            work.advance(1)
    Progress("other work", 10).advance(1)
