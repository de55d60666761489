"""What is seen of an export: stages, memory and disk over time, a log of its own, and a thread that ends."""

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rwkv_lab import machine
from rwkv_lab.errors import ParameterError
from rwkv_lab.export import MonitoringLogger, monitoring_logger
from rwkv_lab.plotting import png

LOG = logging.getLogger("rwkv_lab.something")


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "monitoring of an export"]


def test_stages_memory_and_disk_over_time(tmp_path):
    with MonitoringLogger(["detect", "merge"]) as monitor:
        assert len(watchers()) == 1
        with monitor.stage("detect"):
            LOG.info("before there is a folder")
        with monitor.writing(tmp_path, "export.log"), monitor.stage("merge"):
            (tmp_path / "part").mkdir()
            (tmp_path / "part/model.bin").write_bytes(bytes(3_000_000))
            held = np.ones(4_000_000)
    found = monitor.found
    assert [stage.name for stage in found.stages] == ["detect", "merge"] and monitor.seconds.keys() == {
        "detect",
        "merge",
    }
    assert all(0 <= stage.start <= stage.end for stage in found.stages)
    times = [sample.seconds for sample in found.samples]
    assert times == sorted(times) and found.samples[-1].disk_free > 0
    assert 3_000_000 < found.peak_disk < 3_010_000
    if machine.memory_of("RssAnon") is not None:
        assert found.peak_memory >= held.nbytes
    text = (tmp_path / "export.log").read_text()
    assert "INFO rwkv_lab.something: before there is a folder" in text and "merge: 0." in text and "on disk" in text
    assert png(monitor.plot("a model"))[:4] == b"\x89PNG"
    assert png(MonitoringLogger().plot())[:4] == b"\x89PNG"  # nothing was seen


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_ends_the_thread_and_the_log(tmp_path, enabled):
    before = logging.getLogger("rwkv_lab").level
    with pytest.raises(RuntimeError), MonitoringLogger(["merge"], "DEBUG", enabled) as monitor:
        with monitor.writing(tmp_path, "export.log"), monitor.stage("merge"):
            LOG.debug("a detail")
            LOG.warning("what it was about")
            raise RuntimeError
    assert monitor.found.stages[0].end is None and monitor.seconds == {} and not watchers()
    package = logging.getLogger("rwkv_lab")
    assert package.level == before and not [h for h in package.handlers if isinstance(h, monitoring_logger._Records)]
    text = (tmp_path / "export.log").read_text()
    assert "what it was about" in text and ("a detail" in text) is enabled
    assert bool(monitor.found.samples) is enabled


def test_exports_at_once_keep_their_messages_apart(tmp_path):
    together = threading.Barrier(2, timeout=30)

    def export(name: str) -> str:
        (tmp_path / name).mkdir()
        with MonitoringLogger([], "INFO") as monitor, monitor.writing(tmp_path / name, "export.log"):
            together.wait()
            LOG.info("message of %s", name)
            together.wait()
        return (tmp_path / name / "export.log").read_text()

    level = logging.getLogger("rwkv_lab").level
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(export, "AB")
    assert "message of A" in first and "message of B" not in first
    assert "message of B" in second and "message of A" not in second
    assert logging.getLogger("rwkv_lab").level == level


def test_messages_of_threads_that_the_export_starts_are_its_own(tmp_path):
    with MonitoringLogger() as monitor, monitor.writing(tmp_path, "export.log"):
        thread = threading.Thread(target=LOG.warning, args=("from a thread",))
        thread.start()
        thread.join()
    assert "from a thread" in (tmp_path / "export.log").read_text()


def test_a_long_export_is_sampled_less_often(monkeypatch, tmp_path):
    monkeypatch.setattr(monitoring_logger, "_MOST", 5)
    with MonitoringLogger() as monitor, monitor.writing(tmp_path, "export.log"):
        for i in range(40):
            with monitor.stage(str(i)):
                pass
    assert 2 <= len(monitor.found.samples) <= 6
    times = [sample.seconds for sample in monitor.found.samples]
    assert times[0] < monitor.found.stages[5].start and times[-1] > monitor.found.stages[-1].start


def test_without_figures_of_the_system_memory_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path / "none")
    with MonitoringLogger() as monitor, monitor.writing(tmp_path, "export.log"), monitor.stage("merge"):
        pass
    assert monitor.found.peak_memory is None and "of memory" not in (tmp_path / "export.log").read_text()
    assert png(monitor.plot())[:4] == b"\x89PNG"


def test_memory_of_processes_that_were_started_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    for process, size, children in (("self", 10, "7"), ("7", 20, "8 9"), ("8", 30, "")):  # 9 has just ended
        (tmp_path / process / "task/1").mkdir(parents=True)
        (tmp_path / process / "status").write_text(f"Name:\tpython\nRssAnon:\t{size} kB\n")
        (tmp_path / process / "task/1/children").write_text(children)
    assert machine.anonymous_memory() == 60 * 1024


def test_memory_is_counted_once_while_processes_start_and_end():
    """Until it begins its own program, a process that was started is reported with the memory of the one that did."""
    code = (
        "import subprocess, threading\n"
        "from rwkv_lab import machine\n"
        "held = bytearray(b'1') * (300 << 20)\n"
        "over, samples = threading.Event(), []\n"
        "def sample():\n"
        "    while not over.is_set(): samples.append(machine.anonymous_memory())\n"
        "thread = threading.Thread(target=sample); thread.start()\n"
        "for _ in range(100): subprocess.run(['true'], check=True)\n"
        "over.set(); thread.join()\n"
        "print(len(samples), max(samples) < 500 << 20 if samples[0] else True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count, once = done.stdout.split()
    assert int(count) > 10 and once == "True" and not done.stderr


def test_an_unknown_level_is_refused():
    with pytest.raises(ParameterError, match="log_level"):
        MonitoringLogger(log_level="LOUD")
