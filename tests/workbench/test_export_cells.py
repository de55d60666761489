"""The functions behind export.ipynb: what is given and what is not, plans, figures, refusals."""

import json
import os
from pathlib import Path

import pytest
from random_models import make_layout, write_model
from tuned_files import write_adapter

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import CorruptFileError, ModelMergeError, OutputError, ParameterError
from rwkv_lab.export import ExportConfiguration
from rwkv_lab.export.attempt import Attempt
from rwkv_lab.export.monitoring_logger import Monitoring, Sample, Stage
from rwkv_lab.export.result import ExportResult
from rwkv_lab.export.sensitivity import FrontierPoint, GroupDamage, Proposal, Sensitivity
from rwkv_lab.plotting import png
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.export import cells, figures
from rwkv_lab.workbench.export.details import results_table, storage_as_csv, tables_of_exports
from rwkv_lab.workbench.export.exported import Exported, one_after_the_other
from rwkv_lab.workbench.registry import parameters_of
from rwkv_lab.workbench.steps import run_all


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("EXPORT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "m.pth", make_layout("7.0", n_layer=1, head_size=32, vocab_size=257))


def begun(tmp_path, **given):
    return start("export", given | {"report": str(tmp_path / "report")})


def result_of(tmp_path) -> dict:
    return json.loads((tmp_path / "report" / "result.json").read_text())


def test_the_notebook_takes_every_option_with_its_help():
    fields, options = parameters_of("export").model_fields, ExportConfiguration.model_fields
    assert set(fields) == {*options, "config", "prompt", "dry_run", "report"}
    own = {"checkpoint_path", "output_directory"}  # what the notebook does without them
    assert all(fields[name].description == options[name].description for name in options if name not in own)
    assert all(fields[name].default in (None, "", []) for name in options)  # not given


def test_pytorch_alone(model, tmp_path):
    write_adapter(tmp_path / "lora.pth", model, lora_r=2)
    given = dict(checkpoint_path=str(tmp_path / "lora.pth"), base_model_name=str(model), export_onnx=False)
    run_all(begun(tmp_path, **given, quantization_level="none,fp16"))
    result = result_of(tmp_path)
    assert result["status"] == "ok" and all(check["passed"] for check in result["checks"])
    assert [Path(f["path"]).parts[-3:] for f in result["outputs"]] == [
        ("lora-none", "pytorch", "lora.pth"),
        ("lora-fp16", "pytorch", "lora.pth"),
    ]
    assert "not compared with the model" in result["metrics"]["summary"]
    assert {Path(figure).name for figure in result["figures"]} == {"sizes.png", "monitoring.png"}
    assert "RWKV_Dual.from_pretrained(" in (tmp_path / "report/report.html").read_text()
    run_all(begun(tmp_path, **given))  # its output is in the report folder, and replaced
    assert result_of(tmp_path)["status"] == "ok"


def test_a_scan_is_shown(model, tmp_path):
    given = dict(checkpoint_path=str(model), export_onnx=False, quantization_level="int8", kl_budget=1e-3)
    run_all(begun(tmp_path, **given, sensitivity_scan=True, calibration_data="english", calibration_samples=1))
    assert "sensitivity-int8.png" in {Path(figure).name for figure in result_of(tmp_path)["figures"]}
    page = (tmp_path / "report/report.html").read_text()
    assert "What suffers most, int8" in page and "256 tokens of english" in page


def test_the_figure_of_a_scan():
    damages = [
        GroupDamage("blocks.0.att", "int4", ("a",), 1e-3, 1e-5, 10, 90),
        GroupDamage("head", *("int8", ("b",)), 0.0, 0.0, 20, 80),
    ]
    frontier = [FrontierPoint(30, 1e-3, "", {}), FrontierPoint(40, 1e-4, "blocks.0.att", {})]
    chosen = Proposal({}, {}, 40, 1e-4, 2e-4, 1e-5, 0.99)
    left, right = figures.sensitivity(Sensitivity("int4", 99, damages, frontier, chosen), "It").axes
    texts = [text.get_text() for axes in (left, right) for text in axes.get_legend().get_texts()]
    assert texts == ["int4", "int8, 1 part costs nothing", "predicted: the sum of the parts"] + [
        "taken: KL 0.0002 measured, 4e-05 MB"
    ]
    assert [text.get_text() for text in left.texts] == ["0.att"]
    assert left.lines[0].get_xydata().tolist() == [[9e-05, 1e-3]]


def test_the_panel_leaves_out_what_is_not_given(model, tmp_path, monkeypatch):
    run = begun(tmp_path, checkpoint_path=str(model), quantization_level="int8", overwrite=False)
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = panels.show_panel(run)
    assert panel.apply(), panel.refusal
    assert run.config.overwrite is False and run.config.quantization_level == ["int8"]
    assert {n for n, v in run.config.model_dump().items() if v not in (None, "", [])} == {
        *("checkpoint_path", "quantization_level", "overwrite", "prompt", "dry_run", "report")
    }
    shown = [getattr(field.widget, "text", field.widget).tooltip for field in panel.fields.values()]
    assert not [words for words in shown if "empty: None" in words or "empty:  (" in words]
    assert "empty: 20 (default)" in panel.fields["onnx_opset_version"].widget.tooltip
    panel.fields["pytorch_format"].widget.value = "safetensors"
    panel.fields["export_onnx"].widget.value = False
    panel.fields["test_input_samples"].widget.value = "3"
    assert (run.config.pytorch_format, run.config.export_onnx, run.config.test_input_samples) == (
        *("safetensors", False),
        3,
    )
    panel.fields["export_pytorch"].widget.value = False
    assert "nothing would be written" in panel.refusal


def test_a_plan_says_what_is_written_and_where_values_come_from(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "export.yaml").write_text("export: {optimization: {quantization_level: [none, int4]}}")
    monkeypatch.setenv("EXPORT_CHECKPOINT_PATH", str(model))
    run = begun(tmp_path, config=str(tmp_path / "export.yaml"), model_name="mine", dry_run=True)
    assert "none, int4 (export.yaml)" in repr(run) and f"{model} (EXPORT_CHECKPOINT_PATH)" in repr(run)
    plan = cells.plan(run)
    sizes = {(output.level, output.format): output.bytes for output in plan.outputs}
    assert sizes.keys() == {("none", "pytorch"), ("none", "onnx"), ("int4", "onnx")}
    assert sizes["int4", "onnx"] < sizes["none", "onnx"] and plan.source_bytes == sizes["none", "pytorch"]
    metrics = run.record.metrics
    assert metrics["levels"] == ["none", "int4"] and metrics["disk_needed"] == sum(sizes.values())
    where = {name: entry["from"] for name, entry in metrics["configuration"].items()}
    assert (where["checkpoint_path"], where["quantization_level"]) == ("EXPORT_CHECKPOINT_PATH", "export.yaml")
    assert (where["model_name"], where["output_directory"], where["tokenizer"]) == ("parameter", "notebook", "default")
    assert cells.carry_out(run, plan) == [] and not (tmp_path / "report/exported").exists()
    for step in cells.STEPS[2:]:
        step.work(run, [])
    assert capsys.readouterr().out.count("dry_run=True: nothing was exported") == len(cells.STEPS) - 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(config="none.yaml"), "none.yaml"),
        (dict(quantization_level="none,int7"), "int7"),
        (dict(quantization_level=3), "quantization_level"),
        (dict(naming_pattern="{name}"), r"\{name\}"),
        (dict(onnx_opset_version=99), "onnx_opset_version=99"),
        (dict(export_pytorch=False, export_onnx=False), "nothing would be written"),
        (dict(checkpoint_path=None, base_model_name="b.pth"), "checkpoint_path is missing"),
        (dict(checkpoint_path="demo:none"), "demo:base"),
        (dict(prompt=""), "prompt"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_happens(model, tmp_path, given, says):
    with pytest.raises(ParameterError, match=says):
        begun(tmp_path, **{"checkpoint_path": str(model)} | given)
    assert result_of(tmp_path)["status"] == "failed"


def test_files_that_cannot_be_exported_are_refused_by_the_plan(model, tmp_path, monkeypatch):
    write_adapter(tmp_path / "lora.pth", model, lora_r=2)
    (tmp_path / "damaged.pth").write_bytes(model.read_bytes()[:-500])
    (tmp_path / "there" / "m-none").mkdir(parents=True)
    cases = [
        (dict(checkpoint_path="none.pth"), ParameterError, "none.pth"),
        (dict(checkpoint_path="damaged.pth"), CorruptFileError, "damaged.pth"),
        (dict(checkpoint_path="lora.pth"), ModelMergeError, "base_model_name"),
        (dict(checkpoint_path="lora.pth", base_model_name="none.pth"), ModelMergeError, "none.pth"),
        (dict(output_directory="there", naming_pattern="{model_name}-{quantization_level}"), OutputError, "m-none exi"),
    ]
    monkeypatch.chdir(tmp_path)
    for given, error, says in cases:
        with pytest.raises(error, match=says):  # by the first cell, or by that of the plan
            cells.plan(begun(tmp_path, **{"checkpoint_path": "m.pth"} | given))
    monkeypatch.setattr("rwkv_lab.export.planning.disk_free", lambda folder: 1000)
    with pytest.raises(OutputError, match="needs about .* of disk, 1 kB are free"):
        cells.plan(begun(tmp_path, checkpoint_path="m.pth"))
    monkeypatch.undo()
    monkeypatch.setattr("rwkv_lab.export.planning.memory_free", lambda: 1000)
    plan = cells.plan(begun(tmp_path, checkpoint_path=str(model)))
    assert "of memory are needed, and 1 kB are free" in plan.notes[0]


def exported(level: str, tmp_path, **measured) -> Exported:
    result = ExportResult("x", "now", True, onnx_model_path=str(tmp_path), original_size_mb=2.0, optimized_size_mb=1.0)
    result.inference_speed_ms, result.seconds = 2.0, {"merge": 1.0}
    result.monitoring = Monitoring([Stage("merge", 0.0, 1.0)], [Sample(0.5, 7, 5, 9), Sample(1.0, None, 6, 9)])
    result.checks = [Check("of the merge", 0, 0, True), Check("KL", measured.get("kl_mean", 0), 1, True)]
    report = {"gate": {"kl": 1e-3, "top1": 0.975}, "measured": measured, "speed": {"torch_decode_ms": 4.0}}
    return Exported(result, level, report)


def test_figures_of_values_that_no_scale_can_show(tmp_path):
    errors = {"logits at 1x1": 0.0, "logits at 1x67": 1e-5, "wkv at 1x67": "inf", "else": 1.0}
    exact = exported("none", tmp_path, kl_mean=0.0, top1=1.0, errors=errors)
    wrong = exported("int8", tmp_path, kl_mean=0.5, top1=0.5, errors={})
    for made in (figures.agreement([exact], "m"), figures.agreement([exact, wrong], "m"), figures.sizes([wrong], "m")):
        assert png(made)[:4] == b"\x89PNG"
    text = [t.get_text() for t in figures.speed([exact, wrong], "m").axes[0].texts]
    assert [t.strip() for t in text] == ["500/s, 2.00 ms", "250/s, 4.00 ms"] * 2
    wrong.measured["drift"] = {"64": {"wkv": 1e-3, "att_shift": 0.0}, "8": {"wkv": 2e-3}}
    lines = figures.drift([exact, wrong], "m").axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[8, 64]] * 2 and list(lines[0].get_ydata()) == [2e-3, 1e-3]


def test_what_was_stored_tried_and_lost_is_listed(tmp_path):
    one = exported("int8", tmp_path, kl_mean=0.1, top1=0.9)
    assert tables_of_exports([one]) == []
    one.result.storage = {"int8": {"original_bytes": 8, "bytes": 2, "tensors": ["a", "b"]}}
    one.result.left_out = ["blocks.0.x"]
    one.result.attempts = [
        Attempt({}, "as asked for", 1.0, "ONNXExportError: no\nmore", "a cause"),
        Attempt({}, "a cause", 2.0, lost=["fixed sizes"]),
    ]
    one.result.degraded = ["fixed sizes"]
    storage, left_out, attempts = tables_of_exports([one])
    assert storage.rows == [("int8", "int8", 2, 8, 2)] and left_out.rows == [("blocks.0.x",)]
    assert [row[3:] for row in attempts.rows] == [(1.0, "ONNXExportError: no", ""), (2.0, "", "fixed sizes")]
    assert storage_as_csv([one]) == "level,tensor,stored as\nint8,a,int8\nint8,b,int8\n"
    found = "int8, 1 MB (2 MB before), KL 0.1 nats per token, same likeliest token 90 %; int8 is degraded: fixed sizes."
    assert cells._summary([one]) == f"Exported {found}"
    whole = exported("none", tmp_path, kl_mean=0.0, top1=1.0)
    whole.result.optimized_size_mb = 3.0
    assert cells._summary([whole, one]) == f"Exported float32, int8; the smallest is {found}"


def test_warnings_do_not_hide_that_all_checks_passed(tmp_path):
    one = exported("int8", tmp_path, kl_mean=0.1, top1=0.9)
    one.result.validation_passed, one.result.warnings = True, ["cut"]
    assert results_table([one]).rows[0][-1] == "PASS, 1 warning"
    one.result.validation_passed = None
    assert results_table([one]).rows[0][-1] == "WARN"


def test_checks_of_several_levels_have_their_names(tmp_path):
    one, other = exported("none", tmp_path, kl_mean=0.0), exported("int8", tmp_path, kl_mean=0.5)
    names = [check.name for check in cells._checks([one, other])]
    assert names == ["of the merge", "float32: KL", "int8: KL"]
    assert [check.name for check in cells._checks([one])] == ["of the merge", "KL"]


def test_what_was_seen_of_several_exports_is_put_one_after_the_other(tmp_path):
    seen = one_after_the_other([exported("none", tmp_path), exported("int8", tmp_path)])
    assert [(s.name, s.start, s.end) for s in seen.stages] == [("float32: merge", 0.0, 1.0), ("int8: merge", 1.0, 2.0)]
    assert [sample.seconds for sample in seen.samples] == [0.5, 1.0, 1.5, 2.0]


def test_a_value_that_was_not_planned_is_refused(model, tmp_path):
    run = begun(tmp_path, checkpoint_path=str(model))
    plan = cells.plan(run)
    run.configure(model_name="other")
    with pytest.raises(ParameterError, match="model_name changed since the plan"):
        cells.carry_out(run, plan)


def test_other_objects_beside_a_model_are_named_in_the_report(model, tmp_path):
    from rwkv_lab.checkpoint import open_checkpoint

    with open_checkpoint(model) as ck:
        tensors = {name: ck[name] for name in ck}
    write_checkpoint(tmp_path / "more.pth", tensors | {"optimizer.exp_avg": tensors["ln_out.weight"]})
    run_all(begun(tmp_path, checkpoint_path=str(tmp_path / "more.pth"), export_onnx=False, base_model_name=str(model)))
    notes = " ".join(result_of(tmp_path)["notes"])
    assert "optimizer.exp_avg" in notes and "base_model_name is not used" in notes
