"""Choosing files in a panel, without a browser: what is listed, what is said of a file, lists of files with weights."""

import json
import os
import shutil

import pytest
import torch
from models import LAYOUTS, random_lora, random_model, random_state

from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.entries import last_folder
from rwkv_lab.workbench.file_chooser import FileChooser
from rwkv_lab.workbench.listing import described, listing, not_taken
from rwkv_lab.workbench.panel import show_panel
from rwkv_lab.workbench.parameters import MODEL, Files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder as people have them: models, what was tuned on them, and what is damaged or is none."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.save(random_model(), folder / "seven.pth")
    torch.save(random_model(seed=1), folder / "tuned.pth")
    torch.save(random_model(LAYOUTS["6.0"]), folder / "six.pth")
    torch.save(random_state(), folder / "state.pth")
    torch.save(random_lora(), folder / "lora.pth")
    whole = (folder / "seven.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "page.pth").write_text("<!DOCTYPE html><title>404</title>")
    torch.save({"unet.conv.weight": torch.zeros(3)}, folder / "picture.pth")
    (folder / "notes.txt").write_text("no checkpoint")
    write_checkpoint(folder / "renamed.safetensors", random_state())
    (folder / "renamed.safetensors").rename(folder / "renamed.old")
    (folder / "adapter").mkdir()
    return folder


@pytest.fixture
def panel(tmp_path, zoo, demo_folder, monkeypatch):
    monkeypatch.setattr(panels, "frontend_present", lambda: True)
    return lambda notebook, **given: show_panel(
        start(notebook, {"report": str(tmp_path / "reports" / notebook), **given})
    )


def mark(chooser, name):
    """Mark a row, as a click or the arrow keys do."""
    chooser.list.index = next(i for i, row in enumerate(chooser._rows) if row.name == name)


def test_rows_say_what_a_file_is_by_its_header(zoo):
    rows = {row.name: row for row in listing(zoo)}
    assert (rows["seven.pth"].kind, rows["seven.pth"].model[:6]) == ("model", "RWKV-7")
    assert rows["six.pth"].model.startswith("RWKV-6") and rows["seven.pth"].bytes == (zoo / "seven.pth").stat().st_size
    assert (rows["state.pth"].kind, rows["lora.pth"].kind, rows["renamed.old"].kind) == ("state", "lora", "state")
    assert "notes.txt" not in rows and rows["adapter/"].opens and not rows["adapter/"].chosen


@pytest.mark.parametrize(
    ("name", "says"),
    [("cut.pth", "zip directory cannot be read"), ("page.pth", "a web page"), ("picture.pth", "emb.weight is missing")],
)
def test_what_is_wrong_with_a_file_is_said_in_the_list_in_one_sentence(zoo, name, says):
    chooser = FileChooser("base", MODEL)
    chooser.show(zoo)
    (label,) = [label for label in chooser.list.options if label.startswith(name)]
    assert "⚠" in label
    mark(chooser, name)
    assert says in chooser.details.value and "\n" not in chooser.details.value and str(zoo) not in chooser.details.value
    assert chooser.value == ""  # marking chooses nothing


def test_a_kind_that_the_parameter_does_not_take_is_said(zoo):
    rows = {row.name: row for row in listing(zoo)}
    assert not_taken(rows["state.pth"], "base", ("model",)) == "it is a tuned state, and base takes a whole model"
    assert not_taken(rows["state.pth"], "source", ()) == not_taken(rows["seven.pth"], "base", ("model",)) == ""


def test_a_file_that_changes_is_read_again(tmp_path):
    torch.save(random_model(), tmp_path / "m.pth")
    assert listing(tmp_path)[1].kind == "model"
    (tmp_path / "m.pth").write_bytes(b"")
    assert "empty" in listing(tmp_path)[1].fault


def test_headers_of_a_slow_folder_are_read_when_a_row_is_marked(zoo, monkeypatch):
    monkeypatch.setattr("rwkv_lab.workbench.listing._PATIENCE", -1)
    rows = {row.name: row for row in listing(zoo)}
    assert rows["seven.pth"].kind == "" and described(rows["seven.pth"]).kind == "model"
    chooser = FileChooser("base", MODEL)
    chooser.show(zoo)
    mark(chooser, "seven.pth")
    assert "RWKV-7" in chooser.details.value


def test_the_list_has_folders_and_no_hidden_files(tmp_path):
    for name in ("b.pth", "a.safetensors", "notes.txt", ".hidden.pth"):
        (tmp_path / name).touch()
    (tmp_path / "zoo").mkdir()
    assert [row.name for row in listing(tmp_path)] == ["..", "zoo/", "a.safetensors", "b.pth"]
    assert [row.name for row in listing(tmp_path, checkpoints=False)][2:] == ["a.safetensors", "b.pth", "notes.txt"]
    (tmp_path / "model.safetensors").touch()
    assert "this folder" in [row.name for row in listing(tmp_path)]
    assert next(row for row in listing(tmp_path.parent) if row.path == tmp_path).chosen


def test_nothing_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    (tmp_path / "secret.pth").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path))
    assert [row.name for row in listing(tmp_path)] == [".."]
    assert [row.name for row in listing(tmp_path / "not there")] == [".."]


def test_walking_through_folders(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "x.pth").touch()
    chooser = FileChooser("base", Files())
    chooser.value = str(tmp_path / "anything.pth")
    chooser.browse.value = True
    mark(chooser, "zoo/")
    assert chooser.use.disabled
    chooser.open.click()
    assert chooser.value == str(tmp_path / "anything.pth") and chooser.place.value == str(tmp_path / "zoo")
    mark(chooser, "x.pth")
    assert chooser.open.disabled
    chooser.use.click()
    assert chooser.value == chooser.text.value == str(tmp_path / "zoo" / "x.pth")
    assert chooser.browse.value is False
    chooser.place.value = str(tmp_path)  # written instead
    assert [row.name for row in chooser._rows] == ["..", "zoo/"]


def test_choosing_begins_where_files_were_taken_last_in_any_notebook(panel, zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = panel("merge").fields["base"].widget
    first.browse.value = True
    assert first.place.value == str(tmp_path)  # the project's folder
    first.show(zoo)
    mark(first, "seven.pth")
    first.use.click()
    assert last_folder(tmp_path / "reports" / "inspect") == zoo
    second = panel("inspect").fields["checkpoint"].widget
    second.browse.value = True
    assert second.place.value == str(zoo)


def test_a_file_that_the_other_values_refuse_says_so_before_it_is_chosen(panel, zoo):
    made = panel("merge", base=str(zoo / "seven.pth"), tuned=str(zoo / "state.pth"))
    chooser = made.fields["tuned"].widget
    chooser.show(zoo)
    mark(chooser, "six.pth")
    assert "RWKV-7" in chooser.details.value and "⚠" in chooser.details.value
    mark(chooser, "lora.pth")
    assert made.run.config.tuned == str(zoo / "state.pth") and made.message.value == ""


def test_several_files_are_added_to_a_list_and_removed(panel, zoo):
    shutil.copy(zoo / "tuned.pth", zoo / "other.pth")
    made = panel("merge", base=str(zoo / "seven.pth"), tuned=str(zoo / "state.pth"))
    made.fields["method"].widget.value = "linear"
    chooser = made.fields["tuned"].widget
    chooser.show(zoo)
    mark(chooser, "tuned.pth")
    chooser.use.click()
    chooser.show(zoo)
    mark(chooser, "other.pth")
    chooser.add.click()
    assert made.fields["tuned"].value == [str(zoo / "tuned.pth"), str(zoo / "other.pth")]
    labels = [row.children[0].value for row in chooser.several.box.children]
    assert [label.split(":")[0] for label in labels] == ["seven.pth", "tuned.pth", "other.pth"]  # the base has a weight
    assert all("RWKV-7" in label for label in labels)
    for box, weight in zip(chooser.several.weights, ("0.5", "0.3", "0.2"), strict=True):
        assert made.run.config.weights == []  # until every file has one
        box.value = weight
    assert made.run.config.weights == [0.5, 0.3, 0.2] and made.message.value == ""
    made.fields["weights"].widget.value = "1, 2, 3"
    assert [box.value for box in chooser.several.weights] == ["1", "2", "3"]
    chooser.several.box.children[1].children[-1].click()  # Remove
    assert made.fields["tuned"].value == str(zoo / "other.pth")


def test_lists_of_other_notebooks(panel, zoo):
    chooser = panel("peft").fields["pissa_init"].widget
    assert chooser.add in chooser.walk.children[3].children and chooser.several.weights == []
    data = panel("merge").fields["data"]
    data.widget.show(zoo)
    mark(data.widget, "notes.txt")
    data.widget.add.click()
    assert data.value == ["english", "python", str(zoo / "notes.txt")]
    assert json.dumps(data.value)


def test_every_parameter_that_is_a_file_has_a_chooser(panel):
    found = {
        notebook: {name for name, field in panel(notebook).fields.items() if isinstance(field.widget, FileChooser)}
        for notebook in ("merge", "train", "peft", "modes", "chat", "convert", "export")
    }
    assert found["merge"] == {"base", "tuned", "pissa_init", "recipe", "data", "tokenizer", "template"}
    assert found["train"] == {"base", "start", "data", "tokenizer", "template"}
    assert found["peft"] == {"base", "adapter", "second", "pissa_init", "data", "tokenizer", "template"}
    assert found["modes"] == {"model", "compare_with"}
    assert found["chat"] == {"model", "state", "adapter", "prompts", "tokenizer", "template"}
    assert found["convert"] == {"source", "tokenizer"}
    assert {"config", "checkpoint_path", "base_model_name"} <= found["export"]
