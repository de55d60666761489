"""Sweeps as they run: processes here, workers of a Dask cluster; what dies, what is stopped, what goes on.

Most runs here are of a notebook that needs no torch, so that they take a second.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rwkv_lab.errors import DeviceError
from rwkv_lab.sigterm import sigterm_cleans_up
from rwkv_lab.workbench.sweep import sweep
from rwkv_lab.workbench.sweep.cluster import run_on_cluster
from rwkv_lab.workbench.sweep.jobs import Job, carry_out, write_job
from rwkv_lab.workbench.sweep.local import run_here
from rwkv_lab.workbench.sweep.runs import SweepRun

ROOT = Path(__file__).parents[2]
CELLS = (
    "report = ''\nseconds = 0\nfault = ''",
    "import json, os, pathlib, time\n"
    "pathlib.Path(report, 'began').write_text(str(os.getpid()))\n"
    "try:\n    time.sleep(seconds)\nfinally:\n    pathlib.Path(report, 'cleaned up').touch()\n"
    "error = {'class': fault, 'message': 'no'} if fault else None\n"
    "threads = int(os.environ['OMP_NUM_THREADS'])\n"
    "result = {'status': 'failed' if fault else 'ok', 'error': error, 'metrics': {'threads': threads}}\n"
    "pathlib.Path(report, 'result.json').write_text(json.dumps(result))\n"
    "assert not fault",
)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> str:
    import nbformat

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path = tmp_path_factory.mktemp("notebook") / "short.ipynb"
    nbformat.write(made, path)
    return str(path)


@pytest.fixture
def job(notebook, tmp_path):
    """job(name, **parameters) -> Job, with its run.json written."""

    def make(name: str = "one", **parameters) -> Job:
        folder = tmp_path / "runs" / name
        made = Job(name, notebook, str(folder), str(tmp_path), parameters | {"report": str(folder)}, threads=1)
        write_job(made)
        return made

    return make


def until(is_so, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_and_one_that_fails(job):
    done, failed = carry_out(job("good")), carry_out(job("bad", fault="ParameterError"))
    assert (done.status, done.error, done.retry) == ("ok", "", False) and done.memory > 10**7
    assert (failed.status, failed.error, failed.retry) == ("failed", "ParameterError: no", False)
    good = Path(job("good").folder)
    assert json.loads((good / "result.json").read_text())["metrics"] == {"threads": 1}
    assert (good / "run.ipynb").is_file()


def test_a_sweep_that_is_told_to_end_stops_its_runs_with_their_kernels(job):
    """Also where it was started in the background of a script, which has its children ignore Ctrl-C."""
    one, ended = job(seconds=20), []
    began = Path(one.folder) / "began"

    def end():
        until(began.is_file)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with sigterm_cleans_up(), pytest.raises(SystemExit) as stopped:
            threading.Thread(target=end).start()
            run_here([SweepRun(one, {})], 1, 0, 0, lambda run, outcome: ended.append(outcome))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 143 and ended[-1].status == "stopped"
    assert began.with_name("cleaned up").is_file() and not psutil.pid_exists(int(began.read_text()))


def test_a_run_whose_process_is_killed_may_be_tried_again(job):
    one = job(seconds=600)
    found = []
    thread = threading.Thread(target=lambda: found.append(carry_out(one)))
    thread.start()
    began = Path(one.folder) / "began"
    until(began.is_file)
    kernel = psutil.Process(int(began.read_text()))
    os.kill(kernel.ppid(), signal.SIGKILL)
    thread.join(60)
    assert found[0].status == "failed" and found[0].retry and "signal 9" in found[0].error
    until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE)


def test_what_a_worker_does_not_see_is_said(job, tmp_path):
    from dataclasses import replace

    one = job()
    (tmp_path / "base.pth").write_bytes(b"123")
    for changed, said in (
        (replace(one, sizes={str(tmp_path / "none.pth"): 3}), "does not see"),
        (replace(one, sizes={str(tmp_path / "base.pth"): 4}), "has 3 bytes, not 4"),
        (replace(one, folder=str(tmp_path / "elsewhere")), "workers need the sweep's folder under the same path"),
    ):
        outcome = carry_out(changed)
        assert outcome.status == "failed" and said in outcome.error and not outcome.retry
    told = json.loads((Path(one.folder) / "run.json").read_text())
    (Path(one.folder) / "run.json").write_text(json.dumps(told | {"version": "0.0.1"}))
    assert "install the same" in carry_out(one).error


def test_a_sweep_and_the_same_again(demo_folder, tmp_path, capsys):
    files = [str(demo_folder / name) for name in ("demo-base.pth", "demo-state.pth")]
    spec, folder = {"grid": {"checkpoint": files}, "minimise": "bytes"}, str(tmp_path / "sweep")
    first = sweep("inspect", spec, folder=folder, processes=2)
    assert [run.state for run in first.runs] == ["ok", "ok"] and not first.failed
    assert first.best.swept == {"checkpoint": files[1]} and first.summary.is_file()
    assert "2 of 2 finished" in capsys.readouterr().out
    stamps = [(run.folder / "result.json").stat().st_mtime_ns for run in first.runs]
    again = sweep("inspect", spec | {"grid": {"checkpoint": files}}, folder=folder)
    assert "2 are finished already" in capsys.readouterr().out
    assert [(run.folder / "result.json").stat().st_mtime_ns for run in again.runs] == stamps
    assert again.best.job.name == first.best.job.name


def test_two_workers_of_which_one_is_killed(job, tmp_path):
    pytest.importorskip("distributed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = (
        "import time\nfrom distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    c = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host='127.0.0.1')\n"
        "    print(c.scheduler_address, *[w.pid for w in c.workers.values()], flush=True)\n"
        "    input()\n    c.close()\n"
    )
    (tmp_path / "cluster.py").write_text(code)
    cluster = subprocess.Popen(
        [sys.executable, tmp_path / "cluster.py"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address, *workers = cluster.stdout.readline().split()
        runs = [SweepRun(job(str(i), seconds=1), {"i": i}) for i in range(4)]
        started, ended, killed = [], {}, []

        def changed(run, outcome):
            (started if outcome is None else ended.setdefault(run.job.name, [])).append(outcome or run.job.name)
            if outcome and not killed:  # in the middle: the other worker is at work
                killed.append(os.kill(_worker_of(workers), signal.SIGKILL))

        run_on_cluster(runs, address, 1, changed)
        assert {name: [o.status for o in outcomes] for name, outcomes in ended.items()} == {
            str(i): ["ok"] for i in range(4)
        }
        assert killed
    finally:
        cluster.communicate("\n", timeout=60)


def _worker_of(nannies: list[str]) -> int:
    """The process of a worker that has a run at work."""
    for nanny in map(int, nannies):
        below = [p for p in psutil.Process(nanny).children(recursive=True) if "sweep.process" in _command_of(p)]
        if below:
            return below[0].ppid()
    return int(nannies[0])


def _command_of(process: psutil.Process) -> str:
    """The words that started it; "" where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_an_address_without_a_scheduler(job, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("rwkv_lab.workbench.sweep.cluster._CONNECT", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(DeviceError, match="there is no scheduler at"):
            run_on_cluster([SweepRun(job(), {})], address, 1, lambda *_: None)
