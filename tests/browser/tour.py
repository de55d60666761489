"""Every notebook in JupyterLab, in Chromium: Run All, panel, plan, run, stop, run again, report: `make browser`.

Screenshots go to reports/ci.
"""

import re
from pathlib import Path

import pytest
from browser.accessibility import assert_accessible
from browser.lab import (
    MISSING,
    Lab,
    choose,
    errors_in,
    open_notebook,
    panel_of,
    restart_and_run_all,
    run_all,
    screenshot,
    use_theme,
    wait_for_end,
    wait_for_kernel,
    wait_until,
)

from rwkv_lab.workbench.registry import cells_of, notebook_names

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# Field and what is written there, so that a run takes long enough to be stopped in its middle.
LONG = {
    "train": ("steps", "100000"),
    "chat": ("prompts", "../questions.txt"),
    "modes": ("length", "4000"),
    "benchmark": ("lengths", "4096"),
}
AT_WORK = re.compile(r"step \d+ of \d+: .* · ([1-9]|\d\d+) (s|min) ·")  # for a second or more
MINUTES = 600


@pytest.mark.parametrize("notebook", notebook_names())
def test_by_mouse(notebook: str, lab: Lab, page):
    """Run All; from the panel a plan, a run that is stopped, and one to its report; both themes; the report."""
    (lab.folder / "questions.txt").write_text("the cat\n" * 20_000)
    before = {path: path.read_bytes() for path in lab.notebooks()}
    open_notebook(page, lab, notebook)
    run_all(page, MINUTES)
    assert errors_in(page) == [] and lab.result(notebook)["status"] == "ok"
    panel = panel_of(page)
    run = panel.get_by_role("button", name="Run", exact=True)
    if panel.get_by_text("More", exact=True).count():
        panel.get_by_text("More", exact=True).click()
    assert hasattr(cells_of(notebook), "preview")
    panel.get_by_role("button", name="Plan", exact=True).click()
    panel.get_by_role("region").first.wait_for()
    panel.get_by_text("done after").wait_for()
    screenshot(page, f"{notebook}-plan")
    run_and_stop(page, notebook, lab)
    begun = lab.begun(notebook)
    run.click()
    wait_until(page, lambda: lab.begun(notebook) != begun and lab.ended(notebook), MINUTES)
    panel.get_by_text("done after").wait_for()
    assert lab.result(notebook)["status"] == "ok" and errors_in(page) == []
    assert panel.get_by_text(re.compile("^(PASS|DONE)")).first.is_visible()
    for theme in ("Dark", "Light"):
        use_theme(page, theme)
        panel_of(page)
        screenshot(page, f"{notebook}-{theme.lower()}")
        assert_accessible(page, ".jp-OutputArea-output")
    panel.get_by_role("link", name="Open report").click()
    page.frame_locator("iframe").locator("h1").first.wait_for()
    assert {path: path.read_bytes() for path in lab.notebooks()} == before  # nothing saves itself
    check_page(page, lab.folder / "reports" / notebook / "report.html", f"{notebook}-report")


def run_and_stop(page, notebook: str, lab: Lab) -> None:
    """Run from the panel, and Stop: in the middle where the run can be made long, else as soon as it begins."""
    panel = panel_of(page)
    run, stop = (panel.get_by_role("button", name=name, exact=True) for name in ("Run", "Stop"))
    if notebook not in LONG:
        run.evaluate("(run, stop) => { run.click(); stop.click(); }", stop.element_handle())
        panel.get_by_text("stopped after").wait_for()
        return
    name, value = LONG[notebook]
    field = panel.get_by_label(name, exact=True)
    short = field.input_value()
    field.fill(value)
    field.press("Tab")
    run.click()
    panel.get_by_text(AT_WORK).wait_for()
    screenshot(page, f"{notebook}-running")
    stop.click()
    panel.get_by_text("stopped after").wait_for()
    assert lab.result(notebook)["status"] == "failed"
    field.fill(short)
    field.press("Tab")


def check_page(page, path: Path, name: str) -> None:
    """Of a page of ours: accessible and no wider than the window, light and dark, on a desk and on a phone."""
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path.as_uri())
        screenshot(page, f"{name}-{scheme}-{width}")
        page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
        assert_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_lists_of_tasks_and_of_runs(lab: Lab, page):
    """index.ipynb in both themes, and the page with all runs."""
    page.goto(lab.first)
    wait_for_kernel(page)
    run_all(page)
    assert errors_in(page) == []
    for theme in ("Dark", "Light"):
        use_theme(page, theme)
        screenshot(page, f"index-{theme.lower()}")
        assert_accessible(page, ".jp-RenderedMarkdown, .jp-OutputArea-output")
    check_page(page, lab.folder / "reports" / "index.html", "runs")


def test_panel_leads_to_the_next_notebook(lab: Lab, page):
    """After a run of merge.ipynb a button opens inspect.ipynb, which has the path filled in."""
    open_notebook(page, lab, "merge")
    run_all(page, MINUTES)
    panel_of(page).get_by_role("button", name="inspect", exact=True).click()
    page.locator(".jp-mod-current", has_text="inspect.ipynb").first.wait_for()
    wait_for_kernel(page)
    run_all(page, MINUTES)
    merged = str(lab.folder / "reports" / "merge" / "merged.pth")
    field = page.get_by_label("checkpoint", exact=True)
    field.wait_for()
    assert field.input_value() == merged == lab.result("inspect")["parameters"]["checkpoint"]
    assert errors_in(page) == []


def test_entries_stay_and_cells_agree_with_the_panel(lab: Lab, page):
    """What was entered holds at the next Run All and after a restart of the kernel, until Reset; cells say so."""
    open_notebook(page, lab, "merge")
    run_all(page, MINUTES)
    cells = page.locator(".jp-Notebook")
    enter(page, "alpha", "0.5")
    cells.get_by_text("⚠ The panel has changed alpha since these cells ran").wait_for()
    for again in (run_all, restart_and_run_all):
        again(page, MINUTES)
        assert panel_of(page).get_by_label("alpha", exact=True).input_value() == "0.5"
        assert lab.result("merge")["parameters"]["alpha"] == 0.5
        assert cells.get_by_text("Entered in the panel, and kept: alpha.").count() == 1
        assert cells.get_by_text("⚠").count() == 0
    panel = panel_of(page)
    panel.get_by_role("button", name="Run", exact=True).click()
    cells.get_by_text("⚠ These cells show an earlier run").wait_for()
    panel.get_by_text("done after").wait_for()
    panel.get_by_role("button", name="Reset", exact=True).click()
    wait_until(page, lambda: panel.get_by_label("alpha", exact=True).input_value() == "")
    run_all(page, MINUTES)
    assert lab.result("merge")["parameters"]["alpha"] is None and cells.get_by_text("⚠").count() == 0
    assert errors_in(page) == []


def enter(page, name: str, value: str) -> None:
    """Write into a field of the panel, and leave it."""
    field = panel_of(page).get_by_label(name, exact=True)
    field.fill(value)
    field.press("Tab")


def test_page_is_loaded_again_while_a_job_runs(lab: Lab, page):
    """The page does not contradict the kernel: it is busy, the job can be stopped, and its end is seen."""
    open_notebook(page, lab, "train")
    run_all(page, MINUTES)
    page.keyboard.press("Control+s")
    enter(page, "steps", "100000")
    panel = panel_of(page)
    panel.get_by_role("button", name="Run", exact=True).click()
    panel.get_by_text(AT_WORK).wait_for()
    page.reload()
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile("Python 3.* Busy")).wait_for()
    screenshot(page, "train-loaded-again")
    panel = panel_of(page)
    panel.get_by_text(AT_WORK).wait_for()
    panel.get_by_role("button", name="Stop", exact=True).click()
    panel.get_by_text("stopped after").wait_for()
    assert lab.result("train")["status"] == "failed"
    assert errors_in(page) == []


def test_interrupt_ends_a_job(lab: Lab, page):
    """Kernel > Interrupt Kernel does what Stop does, and a run after it comes to its end."""
    open_notebook(page, lab, "train")
    run_all(page, MINUTES)
    enter(page, "steps", "100000")
    panel = panel_of(page)
    run = panel.get_by_role("button", name="Run", exact=True)
    run.click()
    panel.get_by_text(AT_WORK).wait_for()
    choose(page, "Kernel", "Interrupt Kernel")
    panel.get_by_text("stopped after").wait_for()
    assert lab.result("train")["status"] == "failed"
    panel.get_by_role("button", name="Reset", exact=True).click()
    wait_until(page, lambda: panel.get_by_label("steps", exact=True).input_value() == "8")
    run.click()
    panel.get_by_text("done after").wait_for()
    assert lab.result("train")["status"] == "ok" and errors_in(page) == []


def test_run_all_before_the_kernel_is_there(lab: Lab, page):
    """The cells run as soon as the kernel has connected, or when they are run again: JupyterLab drops what is run while
    there is no kernel at all."""
    page.goto(f"{lab.address}/lab/tree/notebooks/inspect.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    choose(page, "Run", "Run All Cells")
    wait_for_kernel(page)
    page.wait_for_timeout(2000)
    if page.locator(".jp-CodeCell .jp-InputPrompt").first.inner_text() == "[ ]:":
        run_all(page, MINUTES)
    wait_for_end(page, MINUTES)
    panel_of(page).get_by_role("button", name="Plan", exact=True).click()
    panel_of(page).get_by_text("done after").wait_for()
    assert lab.result("inspect")["status"] == "ok" and errors_in(page) == []


def test_lists_show_where_they_open_in_the_dark_theme(lab: Lab, page):
    open_notebook(page, lab, "merge")
    run_all(page, MINUTES)
    use_theme(page, "Dark")
    drawn = "(list) => getComputedStyle(list).backgroundImage"
    arrow = panel_of(page).locator(".widget-dropdown select").first.evaluate(drawn)
    use_theme(page, "Light")
    assert "e0e0e0" in arrow


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
    page.keyboard.type("0.25")
    for name in ("Plan", "Run"):
        press_until_focused(page, "Tab", panel.get_by_role("button", name=name, exact=True))
        page.keyboard.press("Enter")
        panel.get_by_text(re.compile("memory .* in use|done after")).first.wait_for()
        panel.get_by_text("done after").wait_for()
    wait_until(page, lambda: lab.result("merge")["parameters"]["alpha"] == 0.25 and lab.ended("merge"))
    assert lab.result("merge")["status"] == "ok" and errors_in(page) == []


def press_until_focused(page, key: str, wanted) -> None:
    """Move the focus by a key until it is there."""
    for _ in range(200):
        if wanted.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead there")
