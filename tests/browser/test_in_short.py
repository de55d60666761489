"""JupyterLab as `make lab` opens it, in Chromium: one notebook from the list of tasks to its report, and the chat.

`make browser` goes through all notebooks: tour.py.
"""

import pytest
from browser.accessibility import assert_accessible
from browser.lab import (
    MISSING,
    Lab,
    errors_in,
    open_notebook,
    panel_of,
    run_all,
    screenshot,
    wait_for_kernel,
    wait_until,
)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def test_from_the_list_of_tasks_to_a_report(lab: Lab, page):
    """index.ipynb leads to train.ipynb; its panel is filled by the mouse, plans, trains, and its report is there."""
    before = {path: path.read_bytes() for path in lab.notebooks()}
    page.goto(lab.first)
    wait_for_kernel(page)
    run_all(page)
    assert errors_in(page) == []
    page.get_by_role("link", name="train", exact=True).click()
    page.locator(".jp-mod-current", has_text="train.ipynb").first.wait_for()
    open_notebook(page, lab, "train")
    run_all(page)
    assert errors_in(page) == [] and lab.result("train")["parameters"]["kind"] == "state"

    panel = panel_of(page)
    panel.get_by_label("kind", exact=True).select_option("lora")
    rank = panel.get_by_label("rank", exact=True)
    rank.fill("-1")
    rank.press("Enter")
    panel.get_by_text("ParameterError").wait_for()
    rank.fill("2")
    rank.press("Enter")
    panel.get_by_text("ParameterError").wait_for(state="detached")
    panel.get_by_role("button", name="Plan", exact=True).click()
    panel.get_by_role("region", name="What will happen").wait_for()
    assert lab.result("train")["parameters"]["kind"] == "state"  # planning changes nothing
    panel.get_by_role("button", name="Run", exact=True).click()
    wait_until(page, lambda: lab.result("train")["parameters"]["kind"] == "lora" and lab.ended("train"))
    assert lab.result("train")["status"] == "ok" and lab.result("train")["parameters"]["rank"] == 2
    assert panel.locator("img:visible").count() == 3  # the loss while it fell, and the two figures of the report
    assert_accessible(page, ".jp-OutputArea-output")
    assert {path: path.read_bytes() for path in lab.notebooks()} == before  # nothing saves itself


def test_report_and_list_of_runs(lab: Lab, page):
    """Accessible in light and dark, on a desk and on a phone."""
    pages = [lab.folder / "reports" / "train" / "report.html", lab.folder / "reports" / "index.html"]
    for scheme, width in (("light", 1280), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        for path in pages:
            page.goto(path.as_uri())
            page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
            assert_accessible(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            screenshot(page, f"short-{path.stem}-{scheme}-{width}")


def test_chat(lab: Lab, page):
    """The box of chat.ipynb: Send has the model write, Stop ends it, New forgets it."""
    open_notebook(page, lab, "chat")
    run_all(page)
    box = page.locator(".jp-CodeCell", has=page.get_by_role("button", name="Send", exact=True))
    text, stop = box.locator("textarea"), box.get_by_role("button", name="Stop", exact=True)
    send, new = box.get_by_role("button", name="Send", exact=True), box.get_by_role("button", name="New", exact=True)
    text.fill("The cat")
    send.click()
    box.get_by_text("You", exact=True).wait_for()
    page.wait_for_function("(button) => !button.disabled", arg=send.element_handle())
    assert text.input_value() == ""
    said = box.locator(".widget-html", has_text="You").inner_text()
    assert "The cat" in said and len(said) > len("demo-base.pth You The cat")
    new.click()
    box.get_by_text("You", exact=True).wait_for(state="detached")
    assert stop.is_disabled() and errors_in(page) == []
