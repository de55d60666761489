"""The functions behind merge.ipynb when it mixes models: recipes, stacks, the panel's fields."""

import json
import re
from pathlib import Path

import pytest
from random_models import make_layout, write_model
from tuned_files import write_adapter, write_fine_tune

from rwkv_lab.analysis import behaviour
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.merge import cells
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.registry import parameters_of
from rwkv_lab.workbench.steps import run_all

MERGE = parameters_of("merge")


@pytest.fixture(autouse=True)
def brief(monkeypatch, unpainted):
    monkeypatch.setattr(behaviour, "_SAMPLE", 5)


@pytest.fixture
def models(demo_folder, tmp_path) -> list[str]:
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        tensors = {name: ck[name] for name in ck}
    for name, factor in (("base", 1.0), ("one", 1.01), ("two", 1.02)):
        write_checkpoint(tmp_path / f"{name}.pth", {n: t * factor for n, t in tensors.items()})
    return [str(tmp_path / f"{n}.pth") for n in ("base", "one", "two")]


def done(tmp_path, **given) -> dict:
    run = start("merge", {"measure_bytes": 300} | given | {"report": str(tmp_path / "report")})
    run_all(run)
    return json.loads((tmp_path / "report" / "result.json").read_text())


def test_a_stack_runs_and_says_how_deep_it_is(models, tmp_path):
    layers = {"layers": ["base[0:2]", "tuned[1:2]"]}
    result = done(tmp_path, base=models[0], tuned=models[1], method="passthrough", parameters=layers)
    assert result["status"] == "ok" and all(c["passed"] is not False for c in result["checks"])
    with open_checkpoint(tmp_path / "report" / "merged.pth") as ck:
        assert ck.layout.n_layer == 3
    assert "never trained to follow each other" in (tmp_path / "report" / "report.html").read_text()


def test_a_merge_without_effect_fails_its_check_and_says_so_in_result_and_report(models, tmp_path):
    with open_checkpoint(models[0]) as ck:
        write_checkpoint(tmp_path / "same.safetensors", {name: ck[name] for name in ck})
    with pytest.raises(RwkvLabError):
        done(tmp_path, base=models[0], tuned=str(tmp_path / "same.safetensors"), method="slerp")
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    assert result["metrics"]["targets_changed"] == 0 < result["metrics"]["targets"]
    effect = next(c for c in result["checks"] if c["name"].startswith("the merge has an effect"))
    assert effect["passed"] is False and any("The output is the base" in n for n in result["notes"])
    assert "The output is the base" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_change_of_tensors_that_are_copied_is_in_the_result_as_that_of_computed_ones(models, tmp_path, alpha):
    given = {"base": models[0], "tuned": models[1], "method": "overlay", "alpha": alpha}
    run = start("merge", given | {"report": str(tmp_path / "report")})
    result = cells.carry_out(run, cells.plan(run))
    cells.show_what_moved(run, result)
    with open_checkpoint(models[0]) as base, open_checkpoint(models[1]) as one:
        squares = [float((one[n].double() - base[n].double()).square().sum()) for n in base]
    metrics = run.record.metrics
    assert metrics["targets_changed"] == metrics["targets"] == len(squares)
    for name in ("change_asked_for", "change_that_arrived"):
        assert metrics[name] == pytest.approx(alpha * sum(squares) ** 0.5, rel=1e-3)


def test_the_report_names_the_role_of_each_input(models, tmp_path):
    done(tmp_path, base=models[0], tuned=models[1:], method="linear", weights=[1, 1, 1])
    text = (tmp_path / "report" / "report.html").read_text()
    roles = re.findall(r"<tr><td>(\w+)</td><td>([\w.]+)</td><td class=.number", text)
    assert roles[:4] == [("base", "base.pth"), ("tuned", "one.pth"), ("tuned", "two.pth"), ("written", "merged.pth")]


def test_the_report_has_rank_alpha_and_scale_of_a_merged_adapter(models, tmp_path):
    write_adapter(tmp_path / "lora.pth", Path(models[0]), lora_r=4, lora_alpha=8)
    done(tmp_path, base=models[0], tuned=str(tmp_path / "lora.pth"))
    text = (tmp_path / "report" / "report.html").read_text()
    assert re.search(r"lora.pth: rank 4, alpha 8, scale 2 \(alpha / rank\), on \d+ matrices", text)


def test_the_report_has_no_marks_of_markdown(models, tmp_path, demo_folder):
    done(tmp_path, base=models[0], tuned=str(demo_folder / "demo-state.pth"))
    assert "`" not in (tmp_path / "report" / "report.html").read_text()


def test_the_report_states_why_nothing_was_read(tmp_path):
    base = write_model(tmp_path / "base.pth", make_layout("7.0", vocab_size=70))
    write_fine_tune(tmp_path / "tuned.pth", base)
    result = done(tmp_path, base=str(base), tuned=str(tmp_path / "tuned.pth"), data=["english"])
    assert "bits_per_byte" not in result["metrics"] and result["metrics"]["summary"].startswith("Not read: ")
    assert "does not tell its tokenizer" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(ParameterError, match="do not belong together"):
        done(tmp_path, base=str(base), tuned=str(tmp_path / "tuned.pth"), tokenizer="world")


def test_a_recipe_takes_the_place_of_the_models(models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": models[0],
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models[1:]],
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    result = done(tmp_path, recipe=str(tmp_path / "recipe.yml"))
    assert result["status"] == "ok" and len(result["inputs"]) == 3
    for more in ({"method": "ties"}, {"alpha": 0.5}, {"base": models[0]}):
        with pytest.raises(ParameterError, match="the recipe states it"):
            read_parameters(
                parameters_of("merge"), {"recipe": str(tmp_path / "recipe.yml"), **more}, names_are_all=True
            )


def test_values_are_checked_by_the_methods_own_signature(models):
    base, *tuned = models
    for given, says in [
        ({"method": "linear"}, "needs weights"),
        ({"method": "ties", "parameters": {"densty": 1}}, "did you mean density"),
        ({"method": "model_stock", "alpha": 0.5}, "takes no parameter 'alpha'"),
    ]:
        with pytest.raises(ParameterError, match=says):
            read_parameters(
                parameters_of("merge"), {"base": base, "tuned": tuned, **given}, names_are_all=True
            ).check_files()
    with pytest.raises(ParameterError, match='-y \'{"parameters"'):
        read_parameters(MERGE, {"parameters": 3}, names_are_all=True)


def test_fields_for_lists_and_mappings(models, tmp_path, monkeypatch):
    run = start("merge", {"base": models[0], "tuned": models[1:], "method": "ties", "report": str(tmp_path / "report")})
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = panels.show_panel(run)
    assert panel.fields["tuned"].widget.text.value == "; ".join(models[1:])
    panel.fields["weights"].widget.value = "1, 0.5"
    panel.fields["parameters"].widget.value = '{"density": 0.3}'
    assert panel.message.value == "" and run.config.tuned == models[1:]
    assert (run.config.weights, run.config.parameters) == ([1.0, 0.5], {"density": 0.3})
    panel.fields["parameters"].widget.value = "density"
    assert "ParameterError" in panel.message.value and run.config.parameters == {"density": 0.3}
    panel.fields["parameters"].widget.value = ""
    assert run.config.parameters == {}
    assert "; " not in run.command() and json.dumps({"tuned": models[1:]}) in run.command()
