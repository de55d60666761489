"""What a run finds in its folder: one that was killed is told from one that is at work, and a good report stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.resources import reports_folder
from rwkv_lab.workbench import start
from rwkv_lab.workbench.process import is_running, start_of, this_process
from rwkv_lab.workbench.reports import main as list_in_terminal
from rwkv_lab.workbench.result import read_result, status_of
from rwkv_lab.workbench.runs import list_runs, runs_as_html, write_index


def begun(folder: Path):
    return start("merge", {"report": str(folder)})


@pytest.fixture
def good(tmp_path, demo_folder) -> Path:
    """The folder of a run that went well."""
    run = begun(tmp_path / "merge")
    run.show_figure("one", "One", "What it shows.", Figure())
    run.show_figure("two", "Two", "What it shows.", Figure())
    run.page.headline = "It went well."
    run.page.summary = "3.0 to 2.0 bits per byte."
    run.record.checks = [Check("twice two", 4, 4, True)]
    run.finish(must_pass=True)
    return run.folder


@pytest.fixture
def killed(tmp_path, warm) -> Path:
    """The folder of a run whose process was killed."""
    code = "import os, signal, sys; from rwkv_lab.workbench import start; start('merge', {'report': sys.argv[1]})"
    folder = tmp_path / "merge"
    words = [warm.python, "-c", f"{code}; os.kill(os.getpid(), signal.SIGKILL)", str(folder)]
    subprocess.run(words, env=warm.environment, check=False)
    return folder


def test_a_run_that_was_killed_is_interrupted(killed, capsys):
    result = read_result(killed / "result.json")
    assert result["status"] == "running" and status_of(result) == "interrupted"
    assert result["pid"] != os.getpid() and result["host"] and result["started"].endswith("+00:00")
    assert [run.status for run in list_runs(killed.parent)] == ["interrupted"]
    assert "interrupted" in write_index(killed.parent).read_text()
    run = begun(killed)
    assert "was interrupted" in capsys.readouterr().out and "was interrupted" in run.record.notes[0]
    run.begin_again()  # as every notebook's first step does
    run.finish(must_pass=True)
    assert "was interrupted" in read_result(killed / "result.json")["notes"][0]
    run.begin_again()
    assert run.record.notes == []


def test_a_run_that_is_at_work_is_running(tmp_path, demo_folder, capsys):
    run = begun(tmp_path / "merge")
    result = read_result(run.folder / "result.json")
    assert status_of(result) == "running" and [r.status for r in list_runs(tmp_path)] == ["running"]
    begun(run.folder)  # the first cell, run again in the same process
    assert capsys.readouterr().out == ""


def test_a_run_of_another_process_that_is_at_work_is_told(tmp_path, demo_folder, capsys):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = this_process() | {"pid": other.pid, "process_started": start_of(other.pid)}
        (tmp_path / "result.json").write_text(json.dumps({"status": "running", "started": "today"} | process))
        begun(tmp_path)
        other.communicate(b"\n")
    assert f"process {other.pid}" in capsys.readouterr().out


def test_a_number_that_was_given_to_another_process_is_not_the_run():
    own = this_process()
    assert is_running(own) is True
    assert is_running(own | {"process_started": 0}) is False
    assert is_running(own | {"boot": "another"}) is False
    assert is_running(own | {"host": "elsewhere"}) is None and is_running({}) is None


def test_a_process_that_has_ended_and_was_not_asked_how_is_not_running():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        described = this_process() | {"pid": process.pid, "process_started": start_of(process.pid)}
        assert is_running(described) is True
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays in the table
        assert is_running(described) is False
    assert is_running(described) is False


def test_a_run_that_fails_never_replaces_a_good_report(good, capsys):
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    with pytest.raises(ParameterError):
        start("merge", {"report": str(good), "alpha": "much"})
    assert {name: (good / name).read_bytes() for name in before if name != "result.json"} == {
        name: content for name, content in before.items() if name != "result.json"
    }
    result = read_result(good / "result.json")  # for scripts: always of the last run
    assert result["status"] == "failed" and result["report"] == str(good / "failed" / "report.html")
    assert read_result(good / "failed" / "result.json") == result
    assert "alpha=" in (good / "failed" / "report.html").read_text()
    assert read_result(good / "report.json")["metrics"]["summary"] == "3.0 to 2.0 bits per byte."
    assert str(good / "failed" / "report.html") in capsys.readouterr().out
    with pytest.raises(ParameterError):  # nor does the next one
        start("merge", {"report": str(good), "alpha": "more"})
    assert "It went well" in (good / "report.html").read_text()


def test_a_failed_check_does_not_replace_a_good_report_either(good):
    run = begun(good)
    figure = Figure()
    figure.text(0.5, 0.5, "another")
    run.show_figure("one", "One", "Another.", figure)
    before = (good / "one.png").read_bytes()
    run.fail(RuntimeError("out of memory"))
    assert (good / "one.png").read_bytes() == before != (good / "failed" / "one.png").read_bytes()
    assert read_result(good / "result.json")["figures"] == [str(good / "failed" / "one.png")]


def test_a_run_that_goes_well_replaces_it_whole(good):
    with pytest.raises(ParameterError):
        start("merge", {"report": str(good), "alpha": "much"})
    run = begun(good)
    run.show_figure("two", "Two", "What it shows.", Figure())
    run.page.headline = "Better."
    run.finish(must_pass=True)
    assert {p.name for p in good.iterdir()} == {"two.png", "report.html", "result.json", "failed"}
    assert "Better." in (good / "report.html").read_text() and read_result(good / "result.json")["status"] == "ok"


def test_without_a_good_report_the_failed_one_is_there(tmp_path, demo_folder):
    for alpha in ("much", "more"):
        with pytest.raises(ParameterError):
            start("merge", {"report": str(tmp_path), "alpha": alpha})
        assert alpha in (tmp_path / "report.html").read_text() and not (tmp_path / "failed").exists()


def test_reports_lie_in_the_current_folder(tmp_path, monkeypatch, demo_folder):
    monkeypatch.chdir(tmp_path)
    run = start("inspect", {})
    assert run.folder == tmp_path / "reports" / "inspect"
    run.finish(must_pass=False)
    assert '<a href="inspect/report.html">inspect</a>' in (tmp_path / "reports" / "index.html").read_text()


def test_in_the_folder_of_the_notebooks_reports_are_those_of_the_checkout(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root / "notebooks")
    assert reports_folder() == root / "reports"
    monkeypatch.setattr("rwkv_lab.resources.checkout_folder", lambda: None)
    monkeypatch.setattr("rwkv_lab.resources.notebooks_folder", Path.cwd)
    assert reports_folder() == Path.home() / "reports"


def test_the_list_names_the_good_report_beside_a_run_that_failed(good, monkeypatch, capsys):
    with pytest.raises(ParameterError):
        start("merge", {"report": str(good), "alpha": "much"})
    (run,) = list_runs(good.parent)
    assert (run.status, run.report, run.good) == ("failed", good / "failed" / "report.html", good / "report.html")
    text = write_index(good.parent).read_text()
    assert 'href="merge/failed/report.html"' in text and 'href="merge/report.html"' in text
    monkeypatch.setattr(sys, "argv", ["reports", str(good.parent)])
    assert list_in_terminal() == 0 and "failed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["reports", str(good)])
    assert list_in_terminal() == 1


def test_a_notebook_lists_them_with_links(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError):
        start("merge", {"report": str(tmp_path / "second"), "alpha": "<b>"})
    text = runs_as_html(tmp_path)
    assert '<a href="merge/report.html" target="_blank">merge</a>' in text and 'href="second/report.html"' in text
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "no runs" in runs_as_html(tmp_path / "merge")


def test_a_result_that_cannot_be_read_is_no_run(tmp_path):
    for name, text in {"a": "{", "b": "[]", "c": '{"status": 3}', "d": '{"status": "running"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    assert [run.folder.name for run in list_runs(tmp_path)] == ["d"]
