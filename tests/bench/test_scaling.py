"""Formulas of what jobs take, beside the plans of the jobs, and the runs that measure them, on tiny models."""

import pytest
from random_models import make_layout

from rwkv_lab.analysis import tuned_model
from rwkv_lab.analysis.agreement import check_memory
from rwkv_lab.bench import scaling, scaling_runs
from rwkv_lab.bench.models import random_lora, random_model, random_state
from rwkv_lab.bench.scaling import ALL, JOBS, parameters, reach
from rwkv_lab.bench.scaling_runs import RUNS, table
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.export import ExportConfiguration, plan_export
from rwkv_lab.export import planning as export_planning
from rwkv_lab.merge import merge
from rwkv_lab.train import make_plan

LAYOUT = make_layout("7.0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    paths = {name: folder / f"{name}.pth" for name in ("base", "state", "lora")}
    random_model(paths["base"], LAYOUT)
    random_state(paths["state"], LAYOUT)
    random_lora(paths["lora"], LAYOUT, scaling.RANK)
    return paths


def test_memory_is_that_of_the_plans(inputs, tmp_path):
    base = inputs["base"]
    merged = merge(base, inputs["state"], tmp_path / "o.pth", dry_run=True).plan
    assert JOBS["merge a state"].memory(LAYOUT) == merged.memory_needed
    assert JOBS["merge a state"].disk(LAYOUT) < merged.output_bytes  # which holds names and the state, too
    adapted = merge(base, inputs["lora"], tmp_path / "o.pth", alpha=1, dry_run=True).plan
    assert JOBS["merge a LoRA"].memory(LAYOUT) == adapted.memory_needed
    converted = convert(base, "safetensors", tmp_path / "o.safetensors", dry_run=True).plan
    assert JOBS["convert"].memory(LAYOUT) == converted.memory_needed
    options = dict(checkpoint_path=base, output_directory=tmp_path / "out", run_validation_tests=False)
    exported = plan_export([ExportConfiguration(**options)])
    assert JOBS["export to ONNX, float32"].memory(LAYOUT) == exported.memory_needed - export_planning._PROCESS
    for kind, job in (("full", "train all weights, a step"), ("state", "train a state, a step")):
        plan = make_plan(scaling.training_spec(kind, base))
        assert JOBS[job].memory(LAYOUT) == plan.memory_bytes
        assert JOBS[job].disk(LAYOUT) == 4 * plan.count


def test_memory_of_analyses_is_what_they_ask_for(inputs):
    with open_checkpoint(inputs["base"]) as ck:
        assert JOBS["compare modes"].memory(LAYOUT) == check_memory(ck)
    assert JOBS["look into a tuning"].memory(LAYOUT) == 4 * tuned_model._COPIES * parameters(LAYOUT)


@pytest.mark.parametrize(
    ("size", "billions"), [("v7-0.1b", 0.191), ("v7-0.4b", 0.451), ("v7-1.5b", 1.527), ("v7-7b", 7.2), ("v7-14b", 13.2)]
)
def test_released_models_have_so_many_parameters(size, billions):
    assert parameters(ALL[size]) / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_largest_model_is_the_last_that_fits():
    needed = JOBS["load in float32"].memory(ALL["v7-1.5b"]) + scaling.PROCESS
    assert reach("load in float32", needed, 0).largest == "v7-1.5b"
    less = reach("load in float32", needed - 1, 0)
    assert less.largest == "v7-0.4b" and "v7-1.5b needs 6.6" in less.beyond and "of memory" in less.beyond
    assert reach("load in float32", 0, 0).largest == ""
    disk = JOBS["merge a LoRA"].disk(ALL["v7-0.4b"])
    found = reach("merge a LoRA", 1e12, disk)
    assert found.largest == "v7-0.4b" and "of disk" in found.beyond and "memory" not in found.beyond
    assert reach("merge a LoRA", 1e12, 1e12).beyond == ""


@pytest.mark.parametrize(
    "name", ["merge a LoRA", "convert", "pack to int8", "write one token", "train a state, a step"]
)
def test_jobs_run_and_leave_nothing(name, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_runs, "SHAPES", {"tiny": LAYOUT})
    monkeypatch.setattr(scaling_runs, "_SQUARE", 64)
    monkeypatch.setattr(scaling_runs, "_NUMBERS", 1 << 16)
    paths = [str(inputs[one]) for one in ("base", "state", "lora")]
    found = scaling_runs._measured(name, "tiny", *paths, str(tmp_path / "work" / "out"))
    assert name in RUNS and found["processor"] >= 0 and found["of_work"] >= 0
    assert (found["written"] > 0) == name.startswith(("merge", "convert"))
    assert not [path for path in (tmp_path / "work").iterdir()]


def test_a_job_that_does_not_fit_says_so_and_the_table_has_every_size(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_runs, "memory_free", lambda: 10)
    monkeypatch.setattr(scaling_runs, "SHAPES", {"tiny": LAYOUT})
    row = scaling_runs._result(JOBS["convert"], "tiny", inputs, tmp_path)
    assert row["problem"].endswith("of memory are needed, 10 B are free")
    report = {"results": [row], "rates": {"copy": 1e9, "multiply": 1e11, "read": 1e10}}
    text = table(report)
    assert row["problem"] in text and all(size in text for size in ALL) and all(job in text for job in JOBS)
