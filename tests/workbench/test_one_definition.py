"""Spec, function, notebook, panel: an option has one name, one help text and one default in all of them.

That the notebook's cell has them too is in tests/notebooks/test_anatomy.py.
"""

import inspect
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from rwkv_lab.convert import ConvertOptions, ConvertSpec, convert
from rwkv_lab.merge import merge
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.train import TrainOptions, TrainSpec, train
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.options import values_for
from rwkv_lab.workbench.registry import parameters_of

SPECS = {
    "merge": (MergeSpec, MergeOptions),
    "train": (TrainSpec, TrainOptions),
    "convert": (ConvertSpec, ConvertOptions),
}
FUNCTIONS = {"merge": merge, "train": train, "convert": convert}
# What a notebook sets itself, and what only a notebook has.
SET_BY_NOTEBOOK = {"merge": set(), "train": {"log_folder", "samples", "on_step", "parallel"}, "convert": set()}
ONLY_NOTEBOOK = {
    "merge": {"out", "recipe", "report", "data", "tokenizer", "ignore", "template", "window", "measure_bytes"},
    "train": {"out", "compare", "dry_run", "report"},
    "convert": {"out", "prompt", "report"},
}
OWN_DEFAULTS = {
    "merge": {"base": "demo:base", "tuned": "demo:state"},
    "train": {"base": "demo:base", "data": "python"},
    "convert": {"source": "demo:base", "to": "transformers", "max_shard_size": "5GB"},
}


def options(job: str) -> dict:
    return {name: field for spec in SPECS[job] for name, field in spec.model_fields.items()}


@pytest.fixture(params=list(SPECS))
def job(request):
    return request.param


def test_the_function_takes_the_options_and_where_the_output_goes(job):
    """Their defaults are compared in tests/merge/test_merge_spec.py and tests/train/test_train_spec.py."""
    assert set(inspect.signature(FUNCTIONS[job]).parameters) == {"out", *options(job)}


def test_the_notebook_takes_the_options_with_their_help(job):
    parameters = parameters_of(job).model_fields
    assert set(parameters) == options(job).keys() - SET_BY_NOTEBOOK[job] | ONLY_NOTEBOOK[job]
    helps = {name: field.description for name, field in options(job).items() if name in parameters}
    assert {name: parameters[name].description for name in helps} == helps and all(helps.values())


def test_the_notebooks_defaults_are_those_of_the_spec(job):
    read = parameters_of(job).read({})
    for spec in SPECS[job]:
        values = values_for(spec, read)
        for name, default in OWN_DEFAULTS[job].items():
            assert name not in values or values.pop(name) == default
        assert values == {n: spec.model_fields[n].default for n in values}


def test_what_the_notebook_is_given_reaches_the_spec(job, demo_folder):
    given = {
        "merge": {"alpha": 0.5, "dtype": "fp16", "include": ["blocks.0.*"], "precision": "float64", "scan": "changed"},
        "train": {"kind": "lora", "rank": 2, "alpha": 3.0, "targets": ["att.key"], "resume": True, "seed": 5},
        "convert": {"to": "gguf", "dtype": "Q8_0", "alpha": 2.0, "rescale": 6, "generation": "7.0", "verify": False},
    }[job]
    parameters = parameters_of(job).read(given)
    found = dict(parameters.spec()) | dict(parameters.options())
    assert {name: found[name] for name in given} == given
    assert Path(found["source" if job == "convert" else "base"]) == demo_folder / "demo-base.pth"


def test_the_panel_has_a_field_for_each_with_default_and_help(job, demo_folder, tmp_path, monkeypatch):
    run = start(job, {"report": str(tmp_path / "report")})
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    fields = panels.show_panel(run).fields
    parameters = {n: f for n, f in parameters_of(job).model_fields.items() if n not in ("dry_run", "report")}
    assert list(fields) == list(parameters)
    for name, info in parameters.items():
        widget = getattr(fields[name].widget, "text", fields[name].widget)
        assert info.description.split("; ")[0] in widget.tooltip
        assert parameters_of(job).read({name: fields[name].value}) == parameters_of(job).read({})
        assert info.default is not PydanticUndefined


def test_a_whole_rate_is_recorded_with_a_fraction_by_the_notebook(tmp_path):
    """`-p lr 1` is an int; the settings in the file that a notebook trains were, and stay, 1.0."""
    model = parameters_of("train")
    spec = model.read({"kind": "lora", "base": str(tmp_path / "b.pth"), "lr": 1, "alpha": 16}).spec()
    assert [(type(v), v) for v in (spec.lr, spec.alpha)] == [(float, 1.0), (float, 16.0)]
