"""Entries of a panel after Run All and after a restart of the kernel, and what the cells say beside them."""

import json

import pytest
import torch
from models import random_model, random_state

from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import run as runs
from rwkv_lab.workbench import shown, start
from rwkv_lab.workbench.panel import show_panel
from rwkv_lab.workbench.steps import run_all


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.save(random_model(), folder / "base.pth")
    torch.save(random_state(), folder / "state.pth")
    return {"base": str(folder / "base.pth"), "tuned": str(folder / "state.pth")}


@pytest.fixture
def run_all_cells(tmp_path, demo_folder, monkeypatch):
    """run_all_cells(**values of the parameters cell) -> the panel, as in a new kernel."""
    for module in (panels, runs, shown):
        monkeypatch.setattr(module, "frontend_present", lambda: True)
    return lambda **cell: show_panel(start("merge", {"report": str(tmp_path / "merge"), **cell}))


def enter(panel, **values):
    for name, value in values.items():
        field = panel.fields[name]
        getattr(field.widget, "text", field.widget).value = value


def test_entries_are_there_after_run_all(run_all_cells, files, capsys):
    enter(run_all_cells(), **files, alpha="0.5", include="blocks.0.*")
    capsys.readouterr()
    panel = run_all_cells()
    assert "Entered in the panel, and kept: base, tuned, alpha, include." in capsys.readouterr().out
    assert panel.fields["alpha"].widget.value == "0.5" and panel.fields["base"].value == files["base"]
    config = panel.run.config  # the cells below take what the panel shows
    assert (config.base, config.alpha, config.include) == (files["base"], 0.5, ["blocks.0.*"])
    assert "0.5, entered in the panel" in repr(panel.run) and panel.message.value == ""


def test_a_changed_parameters_cell_goes_before_an_older_entry(run_all_cells, files):
    enter(run_all_cells(), **files, alpha="0.5", precision="float64")
    panel = run_all_cells(alpha=0.25)
    assert panel.run.config.alpha == 0.25 and panel.fields["alpha"].widget.value == "0.25"
    assert panel.run.config.precision == "float64"


def test_entries_that_are_not_complete_are_kept_and_said(run_all_cells, files, capsys):
    enter(run_all_cells(), base=files["base"])
    capsys.readouterr()
    panel = run_all_cells()
    assert "the cell above holds meanwhile: tuned is missing" in capsys.readouterr().out
    assert panel.fields["base"].value == files["base"] and panel.run.config.base == "demo:base"
    assert "Next, give tuned" in panel.message.value
    enter(panel, tuned=files["tuned"])
    assert panel.run.config.base == files["base"]


def test_a_file_that_is_gone_is_said_and_does_not_keep_the_panel_away(run_all_cells, files, tmp_path, capsys):
    gone = tmp_path / "gone.pth"
    torch.save(random_state(), gone)
    enter(run_all_cells(), base=files["base"], tuned=str(gone))
    gone.unlink()
    panel = run_all_cells()
    assert "gone.pth" in capsys.readouterr().out and panel.fields["tuned"].value == str(gone)


def test_reset_takes_the_values_of_the_cell(run_all_cells, files):
    panel = run_all_cells(alpha=0.25)
    enter(panel, **files, alpha="1")
    panel.buttons["Reset"].click()
    assert panel.run.config.base == "demo:base" and panel.run.config.alpha == 0.25 and panel.message.value == ""
    assert run_all_cells(alpha=0.25).run.config.tuned == "demo:state"


@pytest.mark.parametrize("content", ["", "[]", '{"entries": 1}', '{"entries": {"nothing": 1}, "cell": {}}'])
def test_a_damaged_file_of_entries_is_as_none(run_all_cells, tmp_path, content):
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "panel.json").write_text(content)
    assert run_all_cells().run.config.base == "demo:base"


def test_batch_takes_no_entries(run_all_cells, files, tmp_path, monkeypatch):
    enter(run_all_cells(), **files)
    monkeypatch.setattr(runs, "frontend_present", lambda: False)
    assert start("merge", {"report": str(tmp_path / "merge")}).config.base == "demo:base"


class Handle:
    """What `display` gives for a display that can be changed."""

    made: list = []

    def __init__(self, first):
        self.content = [first]
        self.made.append(self)

    def update(self, content):
        self.content.append(content)


def test_cells_say_when_they_show_an_earlier_run_or_other_values(run_all_cells, files, monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda first, display_id: Handle(first))
    panel = run_all_cells(**files)
    run = panel.run
    run._ipython_display_()
    table = Handle.made[-1]
    run.begin_again()  # as the cell of the plan does
    line = Handle.made[-1]
    enter(panel, alpha="0.5")
    assert "The panel has changed alpha since" in line.content[-1].data
    assert "0.5, entered in the panel" in repr(table.content[-1])
    enter(panel, alpha="")
    assert line.content[-1].data == ""
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    run_all(run)  # as the panel's Run does
    assert "the panel began another at" in line.content[-1].data
    assert json.loads((run.folder / "result.json").read_text())["status"] == "ok"


def test_demo_files_are_made_when_they_are_used(run_all_cells, files, tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_LAB_DEMO", str(tmp_path / "demo"))
    monkeypatch.setattr("rwkv_lab.train.demo.train", lambda *_, **__: pytest.fail("the demo model was trained"))
    run_all_cells()  # the panel is there, and no file is used yet
    enter(run_all_cells(), **files)
    panel = run_all_cells()
    panel.buttons["Plan"].click()
    assert panel.message.value == ""
