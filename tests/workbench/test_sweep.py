"""Sweeps: what a spec says and refuses, what is run in which order, what is summarised. No notebook is run here."""

import json
import threading
from pathlib import Path

import pytest

from rwkv_lab import cli
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.workbench.sweep import driver, figures, sweep
from rwkv_lab.workbench.sweep.jobs import Job, Outcome, write_job
from rwkv_lab.workbench.sweep.local import next_that_fits, run_here
from rwkv_lab.workbench.sweep.progress import SweepProgress
from rwkv_lab.workbench.sweep.runs import SweepRun, finished_before, runs_of, texts_of
from rwkv_lab.workbench.sweep.spec import SweepSpec, expand, read_sweep, shown
from rwkv_lab.workbench.sweep.summary import front, metrics_of, ranked, varying, write_summary


def test_long_values_that_begin_alike_stay_apart():
    files = [f"/home/ada/{'long ' * 20}/{name}.pth" for name in ("one", "two")]
    points = [({"tuned": path}, {"bits": float(i)}) for i, path in enumerate([*files, files[0]])]
    figure = figures.by_parameter(points, "tuned", "bits", ["tuned"])
    assert [at for at, _ in figure.axes[0].collections[0].get_offsets()] == [0, 1, 0]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len({*labels}) == 2 and "ada" not in "".join(labels)
    alike = [({"prompt": "x" * 60 + str(i)}, {"bits": 1.0}) for i in range(2)]
    figure = figures.by_parameter(alike, "prompt", "bits", ["prompt"])
    assert len({label.get_text() for label in figure.axes[0].get_xticklabels()}) == 2


def test_a_grid_is_every_combination():
    spec = read_sweep({"grid": {"alpha": [0.1, 0.5], "method": ["slerp", "ties", "linear"]}})
    found = expand(spec)
    assert len(found) == 6 and found[0] == {"alpha": 0.1, "method": "slerp"} and found[5]["method"] == "linear"


def test_a_list_is_run_as_it_stands():
    runs = [{"alpha": 0.1}, {"alpha": 0.2, "method": "ties"}]
    assert expand(read_sweep({"runs": runs})) == runs


def test_a_random_draw_is_that_of_its_seed():
    ranges = {"alpha": {"low": 0.0, "high": 1.0}, "rank": {"low": 1, "high": 64, "log": True}, "method": ["a", "b"]}
    spec = {"random": ranges, "draws": 40, "seed": 3}
    drawn = expand(read_sweep(spec))
    assert drawn == expand(read_sweep(spec)) and drawn != expand(read_sweep(spec | {"seed": 4}))
    assert all(0 <= one["alpha"] <= 1 and 1 <= one["rank"] <= 64 and one["method"] in "ab" for one in drawn)
    assert all(isinstance(one["rank"], int) for one in drawn)
    assert sum(one["rank"] < 8 for one in drawn) > 12  # half of a logarithmic scale from 1 to 64
    longer = expand(read_sweep(spec | {"draws": 50}))
    assert longer[:40] == drawn  # more draws keep those that are finished


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "one of grid, runs and random; here: none of them"),
        ({"grid": {"alpha": [1]}, "runs": [{}]}, "here: grid and runs"),
        ({"gird": {}}, "a sweep has no parameter 'gird'; did you mean grid?"),
        ({"grid": {"alpha": 0.5}}, "grid"),
        ({"grid": {"alpha": []}}, "alpha has no values"),
        ({"grid": {"alpha": [1, 1]}}, "two runs have the same parameters: alpha=1"),
        ({"grid": {"alpha": [1]}, "fixed": {"alpha": 2}}, "alpha is among what is fixed and what is swept"),
        ({"grid": {"a": list(range(200)), "b": list(range(200))}}, "40,000 combinations"),
        ({"random": {"alpha": [1, 2]}}, "random needs draws"),
        ({"random": {"alpha": 1}, "draws": 2}, "a list of values or a mapping with low and high"),
        ({"random": {"alpha": {"low": 1, "high": 0}}, "draws": 2}, "low is the smaller"),
        ({"random": {"alpha": {"low": float("nan"), "high": 1}}, "draws": 2}, "low is the smaller"),
        ({"random": {"alpha": {"low": 0, "high": 1, "log": True}}, "draws": 2}, "only where low is above 0"),
        ({"random": {"alpha": {"low": 0, "hihg": 1}}, "draws": 2}, "did you mean high?"),
        ({"grid": {"alpha": [1]}, "minimise": "a", "maximise": ["a"]}, "a is in minimise and in maximise"),
        ({"grid": {"alpha": [1]}, "draws": 0}, "draws=0"),
    ],
)
def test_specs_that_are_refused(spec, said):
    with pytest.raises(ParameterError) as refused:
        expand(read_sweep(spec))
    assert said in str(refused.value)


def test_files_of_specs_that_are_refused(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("grid: {alpha: [1}")
    assert cli.main(["sweep", "merge", str(tmp_path / "none.yaml")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert cli.main(["sweep", "merge", str(tmp_path / "grid.yaml")]) == 1
    assert "is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("notebook", "spec", "said"),
    [
        ("merg", {"grid": {"alpha": [1]}}, "did you mean merge?"),
        ("merge", {"grid": {"alhpa": [1]}}, "merge has no parameter 'alhpa'; did you mean alpha?"),
        ("merge", {"grid": {"report": ["a", "b"]}}, "report cannot be set in a sweep"),
        ("merge", {"grid": {"alpha": [1]}, "fixed": {"out": "o.pth"}}, "out cannot be set in a sweep"),
        ("merge", {"grid": {"alpha": [0.5, "x"]}}, "the run with alpha=x is refused: alpha='x'"),
        (
            "inspect",
            {"grid": {"checkpoint": ["/none.pth"]}},
            "the run with checkpoint=/none.pth is refused: there is no",
        ),
    ],
)
def test_a_sweep_is_refused_before_anything_is_run(notebook, spec, said, tmp_path, demo_folder):
    with pytest.raises(ParameterError) as refused:
        sweep(notebook, spec, folder=str(tmp_path / "sweep"))
    assert said in str(refused.value) and not (tmp_path / "sweep").exists()


def test_combinations_that_are_refused_may_be_left_out(tmp_path, demo_folder, capsys):
    spec = {"grid": {"checkpoint": ["demo:base", "/none.pth"]}, "skip_refused": True}
    result = sweep("inspect", spec, folder=str(tmp_path / "sweep"), dry_run=True)
    assert [run.state for run in result.runs] == ["waiting", "skipped"]
    assert "there is no file" in result.runs[1].error and "1 are refused and left out" in capsys.readouterr().out
    with pytest.raises(ParameterError, match="the notebook refuses every run, 1 run in all"):
        sweep("inspect", {"runs": [{"checkpoint": "/none.pth"}], "skip_refused": True}, folder=str(tmp_path / "sweep"))


def test_plans_say_what_runs_take(tmp_path, demo_folder):
    spec = read_sweep({"grid": {"alpha": [0.25, 0.75]}})
    runs = runs_of("merge", spec, tmp_path / "sweep", tmp_path)
    base = demo_folder / "demo-base.pth"
    assert [run.job.parameters["alpha"] for run in runs] == [0.25, 0.75]
    for run in runs:
        assert run.job.parameters["base"] == str(base) and run.job.sizes[str(base)] == base.stat().st_size
        assert run.memory > 700_000_000 and run.output_bytes > base.stat().st_size
        assert run.job.parameters["report"] == str(run.folder)
    assert list(tmp_path.iterdir()) == []  # nothing was written
    assert runs[0].folder.name.startswith("alpha=0.25-") and runs[0].folder != runs[1].folder


def test_outputs_that_do_not_fit_are_refused(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setattr(driver.machine, "disk_free", lambda folder: 10**9)
    large = [made(name, memory=1, output_bytes=6 * 10**8) for name in "ab"]
    monkeypatch.setattr(driver, "runs_of", lambda *_: large)
    with pytest.raises(OutputError, match="keep_outputs=False"):
        sweep("merge", {"runs": [{}]}, folder=str(tmp_path / "sweep"))
    kept = sweep("merge", {"runs": [{}]}, folder=str(tmp_path / "sweep"), keep_outputs=False, dry_run=True)
    assert len(kept.runs) == 2


def made(name: str, folder: Path = Path("/none"), **values) -> SweepRun:
    result = values.pop("result", {})
    run = SweepRun(Job(name, "n", str(folder / name), "/", {"x": name}), {"x": name}, **values)
    run.result = result
    return run


def carried_out(runs, processes=2, memory=10**12, retries=1, outcomes=None):
    """(order of starts, most at once by memory, ended) of runs whose jobs end as `outcomes` has it."""
    started, ended, at_once, most = [], {}, [0], [0]
    lock = threading.Lock()
    memory_of = {run.job.name: run.memory for run in runs}

    def carry_out(job, stop):
        with lock:
            started.append(job.name)
            at_once[0] += memory_of[job.name]
            most[0] = max(most[0], at_once[0])
        stop.wait(0.02)
        with lock:
            at_once[0] -= memory_of[job.name]
        return (outcomes or {}).get(job.name, [Outcome("ok")]).pop(0) if outcomes else Outcome("ok")

    run_here(runs, processes, memory, retries, lambda run, o: o and ended.update({run.job.name: o.status}), carry_out)
    return started, most[0], ended


def test_runs_that_do_not_fit_together_are_not_started_together():
    runs = [made(str(i), memory=size) for i, size in enumerate((6, 6, 3, 3, 9))]
    started, most, ended = carried_out(runs, processes=5, memory=10)
    assert len(ended) == 5 and most <= 10
    assert started[:2] == ["0", "2"]  # the second does not fit beside the first, the third does
    alone = [made("huge", memory=100)]
    assert carried_out(alone, memory=10)[2] == {"huge": "ok"}
    assert next_that_fits(alone, runs[:1], 10) is None


def test_a_run_whose_process_died_is_tried_again():
    died, refused = Outcome("failed", "killed", retry=True), Outcome("failed", "ParameterError: no")
    outcomes = {"a": [died, Outcome("ok")], "b": [died, died, died], "c": [refused]}
    started, _, ended = carried_out([made(n, memory=1) for n in "abc"], outcomes=outcomes)
    assert ended == {"a": "ok", "b": "failed", "c": "failed"}
    assert sorted(started) == ["a", "a", "b", "b", "c"]


def test_ctrl_c_stops_what_is_at_work():
    stopped = []

    def carry_out(job, stop):
        if job.name == "first":
            raise KeyboardInterrupt
        assert stop.wait(10)
        return Outcome("stopped")

    def changed(run, outcome):
        if outcome:
            stopped.append((run.job.name, outcome.status))

    with pytest.raises(KeyboardInterrupt):
        run_here(
            [made("second", memory=1), made("first", memory=1), made("third", memory=1)], 2, 10, 1, changed, carry_out
        )
    assert stopped == [("second", "stopped")]


def test_a_finished_run_is_recognised_by_parameters_and_inputs(tmp_path, demo_folder):
    base = tmp_path / "base.pth"
    base.write_bytes((demo_folder / "demo-base.pth").read_bytes())
    spec = read_sweep({"runs": [{"checkpoint": str(base)}]})
    (run,) = runs_of("inspect", spec, tmp_path / "sweep", tmp_path)
    assert not finished_before(run, {})
    write_job(run.job)
    told = json.loads((run.folder / "run.json").read_text()) | {"texts": texts_of(run.job.parameters)}
    (run.folder / "run.json").write_text(json.dumps(told))
    from rwkv_lab.checkpoint import file_facts, open_checkpoint

    with open_checkpoint(base) as ck:
        inputs = [{"path": str(base), "bytes": base.stat().st_size, "fingerprint": file_facts(ck).fingerprint}]
    result = {"status": "ok", "inputs": inputs}
    (run.folder / "result.json").write_text(json.dumps(result))
    assert finished_before(run, {})
    (run.folder / "result.json").write_text(json.dumps(result | {"status": "running"}))
    assert not finished_before(run, {})
    changed = [inputs[0] | {"fingerprint": "records:other"}]
    (run.folder / "result.json").write_text(json.dumps(result | {"inputs": changed}))
    assert not finished_before(run, {})


METRICS = {"bits": {"python": 2.5}, "ok": True, "name": "x", "disk_free": 5, "nan": float("nan")}


def test_metrics_are_numbers_by_dotted_name():
    assert metrics_of({"metrics": METRICS, "seconds": {"total": 3, "plan": 1}}) == {"bits.python": 2.5, "seconds": 3}
    assert metrics_of({}) == {}


def points(*pairs) -> list[SweepRun]:
    """Runs with metrics a and b."""
    results = [{"metrics": {"a": a, "b": b, "same": 1}} for a, b in pairs]
    return [made(str(i), state="ok", result=result) for i, result in enumerate(results)]


def test_best_and_front():
    runs = points((1, 9), (2, 5), (3, 6), (4, 1), (1, 9))
    assert [run.job.name for run in ranked(runs, "b", more=True)][:2] == ["0", "4"]
    assert [run.job.name for run in front(runs, {"a": False, "b": False})] == ["0", "1", "3", "4"]
    assert [run.job.name for run in front(runs, {"a": True, "b": False})] == ["3"]
    assert varying(runs) == ["a", "b"]


def summary(tmp_path, runs, **spec):
    names = {"runs": [run.swept for run in runs]} | spec
    return write_summary("merge", SweepSpec.read(names), runs, tmp_path)


def test_the_summary_has_table_figures_and_what_went_wrong(tmp_path):
    runs = points((1, 9), (2, 5), (3, 6))
    for run, alpha in zip(runs, (0.1, 0.5, 0.9), strict=True):
        run.swept = {"alpha": alpha, "method": "<b>ties</b>"}
    runs.append(made("broken", state="failed", error="KernelError: <script>"))
    page, best = summary(tmp_path, runs, minimise=["b", "a"])
    text = page.read_text()
    assert best is runs[1] and "3 of 4 runs are ok, 1 failed." in text
    assert "The least b: 5, with alpha=0.5" in text and "Trade-off: b and a" in text and text.count("<picture>") == 3
    assert "&lt;script&gt;" in text and "<script" not in text and "<b>ties" not in text
    assert "http" not in text.replace("http-equiv", "") and text.count("prefers-color-scheme: dark") > 3
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["best"] == "1" and content["runs"][0]["metrics"]["b"] == 5 and len(content["runs"]) == 4
    header, *rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert header.startswith("run,state,alpha,method,") and len(rows) == 4 and rows[0].startswith("1,ok,0.5,")


def test_a_metric_that_no_run_has_is_said(tmp_path):
    page, best = summary(tmp_path, points((1, 2), (3, 4)), minimise=["aa"])
    assert best is None and "no run has the metric aa; did you mean a?" in page.read_text()


def test_a_summary_of_nothing(tmp_path):
    page, best = summary(tmp_path, [made("a"), made("b")], minimise=["a"])
    assert best is None and "0 of 2 runs are ok, 2 to be run." in page.read_text()


def test_progress_page_and_line(tmp_path, capsys):
    runs = [made(name, tmp_path) for name in "abc"]
    progress = SweepProgress("merge", tmp_path, runs)
    progress.changed(runs[0], None)
    assert progress.line() == "0 of 3 finished"  # a cluster has it, and has not begun
    runs[0].folder.mkdir()
    (runs[0].folder / "log.txt").touch()
    assert 'http-equiv="refresh"' in (tmp_path / "progress.html").read_text()
    assert progress.line() == "0 of 3 finished, 1 at work"
    progress.changed(runs[0], Outcome("ok", memory=5))
    progress.changed(runs[1], Outcome("failed", "KernelError: <no>\nmore"))
    assert progress.line().startswith("1 of 3 finished, 1 failed, about ") and runs[0].memory == 5
    assert "failed   x=b: KernelError: <no>" in capsys.readouterr().out
    progress.write(ended=True)
    page = (tmp_path / "progress.html").read_text()
    assert "refresh" not in page and "KernelError: &lt;no&gt;" in page and "final" in page


def test_a_folder_that_is_of_something_else(tmp_path, demo_folder):
    spec = {"runs": [{"checkpoint": "demo:base"}]}
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError, match="holds no sweep"):
        sweep("inspect", spec, folder=str(tmp_path))
    (tmp_path / "sweep.json").write_text(json.dumps({"notebook": "merge"}))
    with pytest.raises(OutputError, match="is of a sweep of merge"):
        sweep("inspect", spec, folder=str(tmp_path))


def test_parameters_in_a_line():
    given = {"alpha": 1 / 3, "include": ["a", "b"], "method": "ties"}
    assert shown(given) == "alpha=0.333333, include=a,b, method=ties"
    assert shown({"include": [], "out": ""}) == "include=[], out=''"
