"""Every hostile input through the panel of merge.ipynb: it says what Python says, and nothing else."""

import html
import re

import pytest
from hostile import CASES
from models import snapshot
from traitlets import TraitError

from rwkv_lab.workbench import panel as panels
from rwkv_lab.workbench import start
from rwkv_lab.workbench.panel import show_panel


@pytest.fixture(scope="module")
def panel(tmp_path_factory, demo_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "frontend_present", lambda: True)
        yield show_panel(start("merge", {"report": str(tmp_path_factory.mktemp("report"))}))


@pytest.mark.parametrize("case", CASES[1::2], ids=lambda c: c.id)  # the others: notebooks/test_refusals.py
def test_the_panel_says_what_python_says(case, panel, tmp_path):
    given = {name: value for name, value in case.make(tmp_path).items() if value is not None}
    before = snapshot(tmp_path)
    for name, field in panel.run.model.model_fields.items():
        if name in panel.fields:
            try:
                panel.fields[name].value = given.get(name, field.default)
            except TraitError:
                return  # a list of choices that does not have it
    panel.buttons["Run"].click()
    shown = html.unescape(re.sub(r"<[^>]*>", "", panel.message.value))
    assert shown.startswith(f"{case.error}: ")
    if case.error != "ParameterError":  # those are worded for fields there, for arguments here
        assert re.search(case.said, shown)
    assert shown.count("\n") < 3 and "Traceback" not in str(panel.output.box)
    assert snapshot(tmp_path) == before
