"""JupyterLab as `make lab` opens it, in Chromium: one notebook from the list of tasks to its report, and the chat.

`make browser` goes through all notebooks: tour.py.
"""

import re

import pytest
from browser.accessibility import assert_accessible
from browser.lab import (
    MISSING,
    Lab,
    choose,
    errors_in,
    open_notebook,
    panel_of,
    run_all,
    run_cell,
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
    run, steps = panel.get_by_role("button", name="Run", exact=True), panel.get_by_label("steps", exact=True)
    steps.fill("100000")
    run.click()  # the field has the focus until now
    panel.get_by_text(re.compile("memory .* in use")).wait_for()
    panel.get_by_role("button", name="Stop", exact=True).click()
    panel.get_by_text("stopped after").wait_for()
    assert lab.result("train")["status"] == "failed"
    steps.fill("8")
    run.click()
    panel.get_by_text("done after").wait_for()
    assert lab.result("train")["status"] == "ok" and lab.result("train")["parameters"]["rank"] == 2
    assert panel.locator("img:visible").count() == 3  # the loss while it fell, and the two figures of the report
    panel.get_by_role("button", name="Browse", exact=True).first.click()
    panel.get_by_role("button", name="Open folder", exact=True).first.wait_for()
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
    """The box of chat.ipynb: Send has the model write, Stop and the kernel's Interrupt end it, New forgets it."""
    open_notebook(page, lab, "chat")
    run_all(page)
    panel_of(page).get_by_label("max_new_tokens", exact=True).fill("100000")
    never_ends = "\nfor one in speakers: one.model.tokenizer.end_of_text = None"
    for source, more in (("cells.load", never_ends), ("cells.converse", "")):
        run_cell(page, source, more)  # leaving the field sets it; the box is made again with it
    box = page.locator(".jp-CodeCell", has=page.get_by_role("button", name="Send", exact=True))
    send, stop, new = (box.get_by_role("button", name=name, exact=True) for name in ("Send", "Stop", "New"))
    said = box.locator(".widget-html-content", has_text="You The cat")
    for end in (stop.click, lambda: choose(page, "Kernel", "Interrupt Kernel"), stop.click):
        box.locator("textarea").fill("The cat")
        send.click()
        said.wait_for()
        wait_until(page, lambda: len(said.inner_text()) > len("demo-base.pth You The cat") + 40)
        assert send.is_disabled() and stop.is_enabled()
        end()
        box.get_by_text("stopped", exact=True).wait_for()
        assert send.is_enabled() and stop.is_disabled() and 60 < len(said.inner_text()) < 90_000
        new.click()
        said.wait_for(state="detached")
    assert errors_in(page) == []
