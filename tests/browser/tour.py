"""Every notebook in JupyterLab, in Chromium: Run All, panel, plan, run, stop, run again, report: `make browser`.

Screenshots go to reports/ci.
"""

import re

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
    wait_for_end,
    wait_for_kernel,
    wait_until,
)

from rwkv_lab.workbench.registry import cells_of, notebook_names

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# Field and what is written there, so that a run takes long enough to be stopped, and what it was before.
LONG = {
    "train": {"steps": "100000"},
    "chat": {"max_new_tokens": "100000"},
    "modes": {"length": "4000"},
    "benchmark": {"lengths": "4096"},
}
MINUTES = 600


@pytest.mark.parametrize("notebook", notebook_names())
def test_by_mouse(notebook: str, lab: Lab, page):
    """Run All; then from the panel a plan, a run that is stopped where it can be made long, and one to its report."""
    before = {path: path.read_bytes() for path in lab.notebooks()}
    open_notebook(page, lab, notebook)
    run_all(page, MINUTES)
    assert errors_in(page) == [] and lab.result(notebook)["status"] == "ok"
    panel = panel_of(page)
    run, stop = (panel.get_by_role("button", name=name, exact=True) for name in ("Run", "Stop"))
    if hasattr(cells_of(notebook), "preview"):
        panel.get_by_role("button", name="Plan", exact=True).click()
        panel.get_by_role("region").first.wait_for()
        panel.get_by_text("done after").wait_for()
        screenshot(page, f"{notebook}-plan")
    for name, value in LONG.get(notebook, {}).items():
        fields = panel.get_by_label(name, exact=True)
        short = fields.input_value()
        fields.fill(value)
        fields.press("Tab")
        run.click()
        panel.get_by_text(re.compile("memory .* in use")).wait_for()
        screenshot(page, f"{notebook}-running")
        stop.click()
        panel.get_by_text("stopped after").wait_for()
        assert lab.result(notebook)["status"] == "failed"
        fields.fill(short)
        fields.press("Tab")
    begun = lab.begun(notebook)
    run.click()
    wait_until(page, lambda: lab.begun(notebook) != begun and lab.ended(notebook), MINUTES)
    panel.get_by_text("done after").wait_for()
    assert lab.result(notebook)["status"] == "ok" and errors_in(page) == []
    panel_of(page)
    screenshot(page, f"{notebook}-done")
    assert_accessible(page, ".jp-OutputArea-output")
    assert {path: path.read_bytes() for path in lab.notebooks()} == before  # nothing saves itself


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("notebook", notebook_names())
def test_report(notebook: str, width: int, scheme: str, lab: Lab, page):
    """Accessible, and no wider than the window."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((lab.folder / "reports" / notebook / "report.html").as_uri())
    screenshot(page, f"{notebook}-report-{scheme}-{width}")
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_report_link_and_next_notebook(lab: Lab, page):
    """After a run of merge.ipynb its report opens, and a button opens inspect.ipynb with the path filled in."""
    open_notebook(page, lab, "merge")
    run_all(page, MINUTES)
    panel = panel_of(page)
    panel.get_by_role("link", name="Open report").click()
    page.frame_locator("iframe").get_by_text("What to do next").first.wait_for()
    screenshot(page, "merge-report-in-lab")
    page.get_by_role("tab", name="merge.ipynb").click()
    panel.get_by_role("button", name="inspect", exact=True).click()
    page.locator(".jp-mod-current", has_text="inspect.ipynb").first.wait_for()
    wait_for_kernel(page)
    run_all(page, MINUTES)
    merged = str(lab.folder / "reports" / "merge" / "merged.pth")
    field = page.get_by_label("checkpoint", exact=True)
    field.wait_for()
    assert field.input_value() == merged == lab.result("inspect")["parameters"]["checkpoint"]
    assert errors_in(page) == []


def test_page_is_loaded_again_while_a_job_runs(lab: Lab, page):
    """The page does not contradict the kernel: it is busy, the job can be stopped, and its end is seen."""
    open_notebook(page, lab, "train")
    run_all(page, MINUTES)
    page.keyboard.press("Control+s")
    panel = panel_of(page)
    steps = panel.get_by_label("steps", exact=True)
    steps.fill("100000")
    steps.press("Tab")
    panel.get_by_role("button", name="Run", exact=True).click()
    panel.get_by_text(re.compile("memory .* in use")).wait_for()
    page.reload()
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile("Python 3.* Busy")).wait_for()
    screenshot(page, "train-loaded-again")
    panel = panel_of(page)
    panel.get_by_text(re.compile("memory .* in use")).wait_for()
    panel.get_by_role("button", name="Stop", exact=True).click()
    panel.get_by_text("stopped after").wait_for()
    assert lab.result("train")["status"] == "failed" and errors_in(page) == []


def test_run_all_before_the_kernel_is_there(lab: Lab, page):
    """The cells run as soon as the kernel has connected."""
    page.goto(f"{lab.address}/lab/tree/notebooks/inspect.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    run_all(page, MINUTES)
    panel_of(page).get_by_role("button", name="Plan", exact=True).click()
    panel_of(page).get_by_text("done after").wait_for()
    assert lab.result("inspect")["status"] == "ok" and errors_in(page) == []


@pytest.mark.parametrize("notebook", ["merge", "export"])
def test_panel_in_the_dark_theme(notebook: str, lab: Lab, page):
    """Accessible, with every field in sight; lists show where they open."""
    open_notebook(page, lab, notebook)
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    for label in ("Theme", "JupyterLab Dark"):
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{label}$")).click()
    page.locator('body[data-jp-theme-light="false"]').wait_for(state="attached")
    run_all(page, MINUTES)
    panel = panel_of(page)
    panel.get_by_text("More", exact=True).click()
    panel_of(page)
    screenshot(page, f"{notebook}-dark")
    arrow = panel.locator(".widget-dropdown select").first.evaluate("(list) => getComputedStyle(list).backgroundImage")
    assert "e0e0e0" in arrow
    assert_accessible(page, ".jp-OutputArea-output")


def test_by_keyboard(lab: Lab, page):
    """merge.ipynb without the mouse: Run All from the palette, a value, Plan and Run, all reached by Tab."""
    open_notebook(page, lab, "merge")
    page.keyboard.press("Control+Shift+C")
    page.keyboard.type("Run All Cells")
    page.locator(".lm-CommandPalette-item.lm-mod-active", has_text="Run All Cells").wait_for()
    page.keyboard.press("Enter")
    wait_for_end(page, MINUTES)
    panel = panel_of(page)
    alpha = panel.get_by_label("alpha", exact=True)
    press_until_focused(page, "Shift+Tab", alpha)
    page.keyboard.type("0.5")
    for name in ("Plan", "Run"):
        press_until_focused(page, "Tab", panel.get_by_role("button", name=name, exact=True))
        page.keyboard.press("Enter")
        panel.get_by_text(re.compile("memory .* in use|done after")).first.wait_for()
        panel.get_by_text("done after").wait_for()
    wait_until(page, lambda: lab.result("merge")["parameters"]["alpha"] == 0.5 and lab.ended("merge"))
    assert lab.result("merge")["status"] == "ok" and errors_in(page) == []


def press_until_focused(page, key: str, wanted) -> None:
    """Move the focus by a key until it is there."""
    for _ in range(200):
        if wanted.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead there")
