"""The panel without a browser: set a value, click, look at the run."""

import json
import threading

import pytest
from ipywidgets import Dropdown

from rwkv_lab.checkpoint import FileFacts
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.entries import proposed_by
from rwkv_lab.workbench.next_steps import uses
from rwkv_lab.workbench.panel import show_panel
from rwkv_lab.workbench.registry import notebook_names


@pytest.fixture
def panel(tmp_path, demo_folder, monkeypatch):
    run = start("merge", {"report": str(tmp_path / "report")})
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    return show_panel(run)


def test_no_widget_is_made_in_batch(tmp_path, demo_folder, capsys):
    run = start("merge", {"report": str(tmp_path)})
    assert show_panel(run) is None
    assert "No front end" in capsys.readouterr().out


def test_fields_show_the_parameters_and_change_them(panel):
    run = panel.run
    assert panel.fields["base"].widget.text.value == "demo:base"
    panel.fields["alpha"].widget.value = "0.5"
    panel.fields["include"].widget.value = "blocks.0.*\n\n blocks.1.* "
    panel.fields["dtype"].widget.value = "bf16"
    panel.fields["overwrite"].widget.value = True
    assert (run.config.alpha, run.config.include) == (0.5, ["blocks.0.*", "blocks.1.*"])
    assert (run.config.dtype, run.config.overwrite) == ("bf16", True)
    panel.fields["alpha"].widget.value = ""
    assert run.config.alpha is None


@pytest.mark.parametrize("text", ["much", "nan", "-1", "1.5"])
def test_a_refused_value_is_shown_and_leaves_the_parameters_alone(panel, text):
    panel.fields["alpha"].widget.value = text
    assert "ParameterError" in panel.message.value and "alpha" in panel.message.value
    assert panel.run.config.alpha is None
    panel.buttons["Run"].click()
    assert not (panel.run.folder / "merged.pth").exists()
    panel.fields["alpha"].widget.value = "1"
    assert panel.message.value == "" and panel.run.config.alpha == 1


def test_a_parameter_that_is_still_to_be_given_is_no_error(panel, demo_folder):
    panel.fields["base"].widget.text.value = str(demo_folder / "demo-base.pth")
    assert panel.message.value.count("Next, give tuned") == 1 and "error-color" not in panel.message.value
    panel.buttons["Run"].click()
    assert "error-color" in panel.message.value and "ParameterError" in panel.message.value
    panel.fields["tuned"].widget.text.value = str(demo_folder / "demo-state.pth")
    assert panel.message.value == ""
    for method, next_one in {"linear": "weights", "passthrough": "layers", "model_stock": "2 tuned models"}.items():
        panel.fields["method"].widget.value = method
        said = panel.message.value
        assert f"Next: method &#x27;{method}&#x27;" in said and next_one in said and "error-color" not in said
    panel.buttons["Run"].click()
    assert "error-color" in panel.message.value


def test_every_control_has_a_tooltip(panel):
    shown = [getattr(field.widget, "text", field.widget) for field in panel.fields.values()]
    choosers = [field.widget.browse for field in panel.fields.values() if hasattr(field.widget, "browse")]
    assert all(widget.tooltip for widget in [*shown, *choosers, *panel.buttons.values()])


def test_what_none_stands_for_is_shown_with_its_number(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    run = start("train", {"report": str(tmp_path)})
    panel = show_panel(run)
    assert "empty: 400" == panel.fields["steps"].widget.placeholder
    panel.fields["kind"].widget.value = "lora"
    assert "empty: 200" == panel.fields["steps"].widget.placeholder
    panel.fields["rank"].widget.value = "16"
    assert "empty: 32" == panel.fields["alpha"].widget.placeholder
    assert "None, here 200" in repr(run)


def test_alpha_of_a_merge_says_what_it_is_where_none_is_given(panel, demo_folder):
    alpha, method = panel.fields["alpha"], panel.fields["method"].widget
    assert alpha.widget.placeholder == "empty: 1" and "how far to go" in alpha.box.children[1].value
    method.value = "slerp"
    assert alpha.widget.placeholder == "empty: 0.5"
    method.value = "lora"
    assert alpha.widget.placeholder == "empty: what the file states"
    method.value = "auto"
    panel.fields["tuned"].widget.text.value = str(demo_folder / "demo-state.pth")
    assert alpha.widget.placeholder == "empty: 1"
    panel.fields["tuned"].widget.text.value = str(demo_folder / "none.pth")
    assert alpha.widget.placeholder == ""


def test_labels_are_as_wide_as_the_longest_needs(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    for notebook, width in (("inspect", "9rem"), ("export", "12.48rem")):
        panel = show_panel(start(notebook, {"report": str(tmp_path / notebook)}))
        widths = {getattr(f.widget, "text", f.widget).style.description_width for f in panel.fields.values()}
        assert widths == {width}


def test_buttons_that_do_nothing_now_are_flat(panel):
    flat = lambda: {name for name, button in panel.buttons.items() if button._dom_classes}  # noqa: E731
    assert flat() == {"Stop"}
    panel._enable(False)
    assert flat() == {"Plan", "Run", "Reset"}
    panel._enable(True)
    assert flat() == {"Stop"}


def test_an_empty_choice_says_what_it_stands_for(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    expected = {
        ("export", "export_onnx"): "True (default)",
        ("export", "log_level"): "INFO (default)",
        ("export", "use_external_data_format"): "where there are more than 16 MiB",
        ("convert", "dtype"): "each keeps its own",
        ("train", "preset"): "the kind's own",
        ("train", "autocast"): "float32",
        ("train", "long"): "cut",
        ("chat", "think"): "do not say",
    }
    for notebook in notebook_names():
        panel = show_panel(start(notebook, {"report": str(tmp_path / notebook)}))
        for name, field in panel.fields.items():
            if isinstance(field.widget, Dropdown) and "" in dict(field.widget.options).values():
                label = field.widget._options_labels[0]  # what the browser shows
                assert label == expected.get((notebook, name), label) and label not in ("", "(none)", "(default)")
                assert field.widget.index == 0 and not field.value
    panel = show_panel(start("train", {"report": str(tmp_path / "again")}))
    panel.fields["dtype"].widget.value = "bfloat16"
    assert panel.fields["autocast"].widget._options_labels[0] == "bfloat16" and panel.run.config.autocast == ""


def test_opening_a_panel_trains_no_demo_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_LAB_DEMO", str(tmp_path / "none"))
    monkeypatch.setattr("rwkv_lab.train.demo.train", lambda *_, **__: pytest.fail("a model was trained"))
    monkeypatch.setattr("rwkv_lab.workbench.run.frontend_present", lambda: True)
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    for notebook in notebook_names():
        assert show_panel(start(notebook, {"report": str(tmp_path / notebook)})) is not None


def test_fields_that_hold_no_text_have_their_help_beside_them(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = show_panel(start("export", {"report": str(tmp_path)}))
    levels = panel.fields["quantization_level"]
    assert "empty: none, int8 (notebook); how" in levels.box.children[1].value
    assert panel.fields["output_directory"].widget.placeholder.startswith(
        f"empty: {tmp_path / 'exported'} (notebook); where"
    )
    assert panel.fields["checkpoint_path"].widget.text.placeholder.startswith("empty: demo:state (notebook); an ")


def test_messages_are_escaped(panel):
    panel.fields["base"].widget.text.value = panel.fields["tuned"].widget.text.value = "<b>x"
    assert "<b>" not in panel.message.value and "&lt;b&gt;x" in panel.message.value


def test_plan_writes_nothing_and_run_does_it_all(panel):
    panel.buttons["Plan"].click()
    assert not (panel.run.folder / "merged.pth").exists()
    panel.buttons["Run"].click()
    result = json.loads((panel.run.folder / "result.json").read_text())
    assert result["status"] == "ok" and all(c["passed"] for c in result["checks"]) and len(result["checks"]) > 8
    assert (panel.run.folder / "merged.pth").is_file() and (panel.run.folder / "report.html").is_file()
    assert not panel.buttons["Run"].disabled


def test_a_run_that_fails_says_so_and_is_recorded(panel):
    panel.fields["exclude"].widget.value = "no such tensor"
    panel.buttons["Run"].click()
    assert "no such tensor" in panel.message.value
    result = json.loads((panel.run.folder / "result.json").read_text())
    assert (result["status"], result["error"]["class"]) == ("failed", "ParameterError")


def test_inspect_panel(tmp_path, demo_folder, monkeypatch):
    run = start("inspect", {"report": str(tmp_path)})
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    panel = show_panel(run)
    panel.fields["checkpoint"].widget.text.value = str(demo_folder / "demo-state.pth")
    panel.buttons["Run"].click()
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["kind"] == "state"


def test_a_run_leads_to_its_report_and_to_the_notebooks_that_take_its_output(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert panel.onward.box.layout.display == "none"
    panel.buttons["Run"].click()
    found, link = panel.onward.links.outputs
    summary = panel.run.page.summary
    assert f"<b>PASS</b> All {len(panel.run.record.checks)} checks passed. {summary}" in found["data"]["text/html"]
    assert '<a href="report/report.html" target="_blank">Open report</a>' in link["data"]["text/html"]
    label, *buttons = panel.onward.buttons.children
    named = {button.description: button for button in buttons}
    assert label.value == "Use this output in:" and {"inspect", "modes", "chat", "convert", "export"} <= set(named)
    named["inspect"].click()
    assert "Open inspect.ipynb" in panel.onward.opened.outputs[0]["data"]["text/html"]
    run = start("inspect", {})
    assert proposed_by(run.folder) == "merge"
    other = show_panel(run)
    assert run.config.checkpoint == str(panel.run.folder / "merged.pth") == other.fields["checkpoint"].widget.text.value
    other.buttons["Reset"].click()
    assert run.config.checkpoint == "demo:base" and proposed_by(run.folder) == ""
    panel.buttons["Plan"].click()
    assert panel.onward.box.layout.display == "none"


def test_an_adapter_comes_with_its_base(panel, demo_folder):
    record = panel.run.record
    record.status, record.notebook = "ok", "train"
    record.outputs = [FileFacts(demo_folder / "demo-state.pth", 1, "")]
    found = {use.notebook: use.parameters for use in uses(record)}
    state = str(demo_folder / "demo-state.pth")
    assert found["merge"] == {"tuned": state, "base": "demo:base"}
    assert found["chat"] == {"state": state, "model": "demo:base"}
    assert found["export"] == {"checkpoint_path": state, "base_model_name": "demo:base"}


def test_what_the_kernel_says_while_a_job_runs_is_not_the_jobs(panel, capsys):
    prints, ends = threading.Event(), threading.Event()

    def work():
        with panel.output.captured():
            print("of the job")
            prints.set()
            ends.wait()

    job = threading.Thread(target=work)
    job.start()
    prints.wait()
    print("No such comm")
    ends.set()
    job.join()
    assert [output["text"] for box in panel.output.box.children for output in box.outputs] == ["of the job\n"]
    assert "No such comm\n" in capsys.readouterr().out


def test_what_cells_run_replaces_what_the_panel_shows(panel):
    panel.buttons["Run"].click()
    assert panel.output.box.children
    panel.run.begin_again()
    assert not panel.output.box.children and panel.onward.box.layout.display == "none"
    assert panel.progress.words.value == "the cells below run"
    panel.run.finish(must_pass=True)
    assert panel.onward.box.layout.display is None and panel.progress.words.value == "the cells below have run"
