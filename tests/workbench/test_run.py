"""A run writes result.json from its first moment on, and ends as "ok" or "failed", never in between."""

import json
import shlex
from types import SimpleNamespace

import pytest

from rwkv_lab.checkpoint import FileFacts
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.resources import notebooks_folder
from rwkv_lab.workbench import start

KEYS = (
    "notebook status error parameters inputs outputs checks metrics figures versions seconds notes report started host "
    "pid process_started boot cwd"  # as promised to scripts
)


def result(folder) -> dict:
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


@pytest.fixture
def run(tmp_path, demo_folder):
    return start("merge", {"report": str(tmp_path / "a" / "b")})


def test_running_first_then_ok(run):
    assert result(run.folder)["status"] == "running"
    assert not (run.folder / "report.html").exists()
    run.finish(must_pass=True)
    found = result(run.folder)
    assert list(found) == KEYS.split() and found["status"] == "ok" and found["error"] is None
    assert {p.name for p in run.folder.iterdir()} == {"result.json", "report.html"}


@pytest.mark.parametrize("values", [{"alpha": float("nan")}, {"dry_run": "true"}, {"alhpa": 1}])
def test_refused_parameters_are_recorded(tmp_path, values):
    with pytest.raises(ParameterError):
        start("merge", {"report": str(tmp_path), **values})
    found = result(tmp_path)
    assert (found["status"], found["error"]["class"]) == ("failed", "ParameterError")
    assert next(iter(values)) in found["error"]["message"]
    assert next(iter(values)) in (tmp_path / "report.html").read_text()


def test_a_cell_that_raises_makes_the_run_fail(run):
    run.after_cell(SimpleNamespace(error_before_exec=None, error_in_exec=None))
    assert result(run.folder)["status"] == "running"
    run.after_cell(SimpleNamespace(error_before_exec=None, error_in_exec=KeyboardInterrupt()))
    assert (result(run.folder)["status"], result(run.folder)["error"]["class"]) == ("failed", "KeyboardInterrupt")


def test_what_raises_after_the_end_is_not_the_runs_fault(run):
    run.finish(must_pass=True)
    run.after_cell(SimpleNamespace(error_before_exec=None, error_in_exec=ValueError("scratch")))
    assert result(run.folder)["status"] == "ok"


def test_a_failed_check_fails_the_run_only_where_it_must_pass(run):
    run.record.checks = [Check("fine", 0, 0, True), Check("twice two", 5, 4, False), NotApplicable("rest", "why not")]
    with pytest.raises(OutputError, match="1 of 3 checks failed, first: FAIL  twice two"):
        run.finish(must_pass=True)
    run.finish(must_pass=False)
    found = result(run.folder)["checks"]
    assert [c["passed"] for c in found] == [True, False, None]
    assert found[2]["value"] == "not applicable: why not"


def test_numbers_that_json_cannot_hold_become_text(run):
    run.record.metrics = {"a": float("nan"), "b": [float("inf")], "c": "\ud800"}
    run.finish(must_pass=True)
    assert result(run.folder)["metrics"] == {"a": "nan", "b": ["inf"], "c": "?"}


def test_paths_for_scripts_are_absolute(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").touch()
    run.record.outputs = [FileFacts((tmp_path / "x.pth").relative_to(tmp_path), 0, "")]
    run.finish(must_pass=True)
    assert result(run.folder)["outputs"][0]["path"] == str(tmp_path / "x.pth")


def test_starting_again_forgets_the_earlier_pass(run):
    run.record.checks = [Check("old", 0, 0, True)]
    run.finish(must_pass=True)
    run.configure(scan="changed")
    run.begin_again()
    found = result(run.folder)
    assert (found["status"], found["checks"], found["parameters"]["scan"]) == ("running", [], "changed")
    assert (run.folder / "report.html").exists()  # of a run that went well: it stays until another one does


def test_the_command_repeats_the_run(tmp_path, demo_folder):
    files = {"base": str(demo_folder / "demo-base.pth"), "tuned": str(demo_folder / "demo-state.pth")}
    given = {**files, "report": str(tmp_path / "it's"), "include": ["b*'\"é"], "dry_run": True, "alpha": 0.5}
    words = shlex.split(start("merge", given).command())
    assert words[1:3] == ["-m", "rwkv_lab.workbench.batch"] and words[4] == str(tmp_path / "it's" / "run.ipynb")
    assert words[3] == str(notebooks_folder() / "merge.ipynb")
    assert words[words.index("-y") + 1] == '{"include": ["b*\'\\"é"]}'
    assert words[words.index("dry_run") - 1 :][:3] == ["-p", "dry_run", "True"]
    assert words[words.index("alpha") - 1 :][:3] == ["-p", "alpha", "0.5"]
    assert words[words.index("base") - 1 :][:3] == ["-r", "base", files["base"]]
    assert words[words.index("report") - 1 :][:3] == ["-r", "report", str(tmp_path / "it's")]


def test_a_report_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        start("merge", {"report": str(tmp_path / "file" / "x")})
