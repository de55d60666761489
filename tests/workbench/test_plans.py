"""Every notebook shows a plan before anything heavy: what would be run, in which memory, about how long it takes."""

import re

import pytest
import torch
from models import random_model

from rwkv_lab.errors import LayoutError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.workbench import estimate, start
from rwkv_lab.workbench.registry import cells_of, notebook_names


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m.pth"
    torch.save(random_model(), path)
    return path


def plan(notebook, tmp_path, capsys, **given) -> str:
    run = start(notebook, {"report": str(tmp_path / "report"), **given})
    capsys.readouterr()
    cells_of(notebook).preview(run)
    assert run.record.inputs == [] and run.page.facts == []  # it notes nothing
    return capsys.readouterr().out


@pytest.mark.parametrize("notebook", notebook_names())
def test_every_notebook_has_a_plan_that_loads_no_model(notebook, demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RWKV_Dual, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    said = plan(notebook, tmp_path, capsys)
    assert re.search(r"memory .*\d [kMG]?B.* are free", said)
    assert re.search(r"about \d+ (s|min).*timed now", said)


def test_what_a_plan_counts(model, tmp_path, capsys):
    said = plan("modes", tmp_path, capsys, model=str(model), dtypes=["float32"], backends=["reference", "chunked"])
    assert re.search(r"runs +4: ", said) and "reference, chunked" in said and "2 sequences of 512" in said
    said = plan("benchmark", tmp_path, capsys, model=str(model), lengths=[32], batches=[1, 2], peers=[])
    assert "batches 1, 2, prompts of 32 tokens, 3 rounds" in said and "up to 512 tokens" in said
    said = plan("modes", tmp_path, capsys, model=str(model), batch=1)
    assert "1 sequence of 512" in said


@pytest.mark.parametrize("notebook", ["modes", "benchmark", "chat"])
def test_a_plan_refuses_what_the_job_would_refuse(notebook, demo_folder, tmp_path, capsys):
    with pytest.raises(LayoutError, match="no whole model"):
        plan(notebook, tmp_path, capsys, model=str(demo_folder / "demo-state.pth"))


def seconds(said: str) -> float:
    number, unit = re.search(r"time +about (\S+) (s|min|h),", said).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_the_time_of_a_merge_counts_the_text_and_the_models(demo_folder, tmp_path, capsys, monkeypatch, in_full):
    counted = lambda models, size, values, layers, read, written: models * (read + written)  # noqa: E731
    monkeypatch.setattr("rwkv_lab.workbench.merge.cells.running_seconds", counted)
    (tmp_path / "long.txt").write_text("the cat sat on the mat. " * 500_000)
    without, long = (seconds(plan("merge", tmp_path, capsys, data=d)) for d in ([], [str(tmp_path / "long.txt")]))
    assert 3 * 400 <= without < 3600 and long > 3 * 50_000  # three models write 400 tokens each


def test_the_time_of_an_export_counts_the_comparison(demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.export.cells.stepping_seconds", lambda *_: 60.0)
    given = {"quantization_level": ["none"]}
    compared = plan("export", tmp_path, capsys, **given)
    alone = plan("export", tmp_path, capsys, **given, run_validation_tests=False)
    assert seconds(alone) + 30 < seconds(compared)
    scanned = plan("export", tmp_path, capsys, quantization_level=["int8"], sensitivity_scan=True)
    assert "a sensitivity scan is not in it" in scanned


def test_the_time_of_answers_counts_their_tokens(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.chat.cells.writing_seconds", lambda tokens, *_: tokens)
    (tmp_path / "p.txt").write_text("the cat\n" * 50)
    given = {"model": str(model), "max_new_tokens": 12, "second": {"max_new_tokens": 24}}
    assert seconds(plan("chat", tmp_path, capsys, prompts=str(tmp_path / "p.txt"), **given)) == 50 * 36


def test_choosing_tokens_and_showing_their_text_is_counted():
    size = (4, torch.float32)  # of a small model, which takes less itself
    writing = estimate.writing_seconds(1000, 257, 50_000, *size)
    assert writing > 3 * estimate.stepping_seconds(1000, 1, 50_000, *size, "cpu")


def test_the_time_of_an_export_has_tracing_where_no_graph_is_kept(demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.export.cells.file_seconds", lambda *_: 60.0)
    taken = {}
    for kept in (True, False):
        monkeypatch.setattr("rwkv_lab.workbench.export.cells.graphs_are_kept", lambda plan, kept=kept: kept)
        said = plan("export", tmp_path, capsys, quantization_level=["none"], run_validation_tests=False)
        taken[kept] = seconds(said)
        assert ("; 8 s of it trace graphs, once for models of these shapes" in said) is not kept
    assert taken[False] - taken[True] >= 5


def test_the_time_of_modes_counts_runs_states_and_figures(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.modes.cells.stepping_seconds", lambda *_: 1000.0)
    monkeypatch.setattr("rwkv_lab.workbench.modes.cells.figure_seconds", lambda count: 10_000.0 * count)
    given = {"model": str(model), "length": 32, "backends": ["reference", "chunked"], "dtypes": ["float32"]}
    assert abs(seconds(plan("modes", tmp_path, capsys, **given)) - (3.5 * 1000 + 5 * 10_000)) < 1800


def test_the_time_of_training_counts_what_is_measured(demo_folder, tmp_path, capsys, monkeypatch, in_full):
    counted = lambda tokens, rows, *_: float(tokens * rows)  # noqa: E731
    monkeypatch.setattr("rwkv_lab.workbench.train.cells.forward_seconds", counted)
    given = {"kind": "state", "steps": 2, "batch_size": 1, "ctx_len": 8}
    once, often = (seconds(plan("train", tmp_path, capsys, **given, eval_every=n)) for n in (0, 1))
    assert once > 3 * 50_000 and often == pytest.approx(5 / 3 * once, rel=0.05)


def test_the_time_of_a_benchmark_is_that_of_its_parts(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.benchmark.cells.figure_seconds", lambda count: 36_000.0 * count)
    said = plan("benchmark", tmp_path, capsys, model=str(model), lengths=[32], batches=[1], peers=[])
    parts = [float(n) for n in re.findall(r"about (\S+) h\s*\n", said)]
    total = float(re.search(r"in all +about (\S+) h,", said)[1])
    assert len(parts) == 4 and total == pytest.approx(sum(parts), rel=0.05)


def test_a_longer_text_takes_longer_and_token_by_token_longest():
    size = (1, 1_000_000, 4, torch.float32)
    short, long = (estimate.forward_seconds(tokens, *size, "cpu") for tokens in (100, 10_000))
    assert 10 * short < long
    assert estimate.forward_seconds(1000, *size, "reference") < estimate.stepping_seconds(1000, *size, "reference")
