"""merge.ipynb in a real JupyterLab, driven by a real browser: the panel appears, Plan shows a plan, Run merges."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
WAIT = 90_000  # milliseconds; on an idle machine everything takes seconds


@contextmanager
def jupyter_lab(root, environment):
    """A server of our own on the loopback, without token, on a folder that is thrown away; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = [
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
    ]
    if sys.platform == "linux":
        options.append("--allow-root")
    settings = {
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "IPYTHONDIR": str(root / "ipython"),
    }
    labconfig = root / "config" / "labconfig"
    labconfig.mkdir(parents=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    (labconfig / "default_setting_overrides.json").write_text(json.dumps(quiet))
    with open(root / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=root / "notebooks",
            env=environment | settings,
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (root / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_merge_by_hand(environment, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "notebooks").mkdir()
    report = tmp_path / "report"
    text = (ROOT / "notebooks" / "merge.ipynb").read_text()
    assert text.count('report: str = \\"\\"') == 1
    text = text.replace('report: str = \\"\\"', f'report: str = \\"{report}\\"')
    (tmp_path / "notebooks" / "merge.ipynb").write_text(text)

    def result() -> dict:
        return json.loads((report / "result.json").read_text())

    def wait_for(condition) -> None:
        deadline = time.monotonic() + WAIT / 1000
        while not condition():
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)

    with jupyter_lab(tmp_path, environment) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1800})
        page.set_default_timeout(WAIT)
        page.goto(f"{address}/lab/tree/merge.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.get_by_text("Python 3 (ipykernel)", exact=False).first.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        wait_for(lambda: (report / "result.json").exists() and result()["status"] != "running")
        assert result()["status"] == "ok"

        page.locator(".jp-CodeCell").nth(2).scroll_into_view_if_needed()
        panel = page.locator(".jp-CodeCell").nth(2)
        plan, run = panel.get_by_role("button", name="Plan"), panel.get_by_role("button", name="Run")
        run.wait_for()
        assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

        panel.get_by_placeholder("0 to 1").fill("1.5")
        panel.get_by_placeholder("0 to 1").press("Enter")
        panel.get_by_text("ParameterError").wait_for()
        panel.get_by_placeholder("0 to 1").fill("0.5")
        panel.get_by_placeholder("0 to 1").press("Enter")
        panel.get_by_text("ParameterError").wait_for(state="detached")

        plan.click()
        panel.get_by_text("Plan, tensor by tensor").wait_for()
        assert result()["parameters"]["alpha"] is None  # planning changes nothing
        page.screenshot(path=tmp_path / "planned.png")
        run.click()
        wait_for(lambda: result()["parameters"]["alpha"] == 0.5 and result()["status"] != "running")
        assert result()["status"] == "ok"
        panel.get_by_text(re.compile("PASS")).first.wait_for()
        assert panel.locator("img:visible").count() == 4
        page.screenshot(path=tmp_path / "done.png")
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_train_by_hand(environment, tmp_path):
    """An adapter chosen and trained from the panel; its loss is drawn there while it falls."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "notebooks").mkdir()
    report = tmp_path / "report"
    text = (ROOT / "notebooks" / "train.ipynb").read_text()
    for old, new in (
        ('report: str = \\"\\"', f'report: str = \\"{report}\\"'),
        ('data: str = \\"python\\"', f'data: str = \\"{tmp_path / "cats.txt"}\\"'),
        ("steps: Optional[int] = None", "steps: Optional[int] = 8"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "notebooks" / "train.ipynb").write_text(text)
    (tmp_path / "cats.txt").write_text("the cat sat on the mat; " * 500)

    def ended(kind: str) -> bool:
        if not (report / "result.json").exists():
            return False
        found = json.loads((report / "result.json").read_text())
        return found["parameters"]["kind"] == kind and found["status"] != "running"

    def wait_for(condition) -> None:
        deadline = time.monotonic() + WAIT / 1000
        while not condition():
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)

    with jupyter_lab(tmp_path, environment) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 2400})
        page.set_default_timeout(WAIT)
        page.goto(f"{address}/lab/tree/train.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.get_by_text("Python 3 (ipykernel)", exact=False).first.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        wait_for(lambda: ended("state"))
        panel = page.locator(".jp-CodeCell").nth(2)
        panel.scroll_into_view_if_needed()
        panel.locator("select").first.select_option("lora")
        panel.get_by_placeholder("of adapters").fill("2")
        panel.get_by_placeholder("of adapters").press("Enter")
        panel.get_by_role("button", name="Run").click()
        wait_for(lambda: ended("lora"))
        assert json.loads((report / "result.json").read_text())["status"] == "ok"
        panel.get_by_text(re.compile("PASS")).first.wait_for()
        assert panel.locator("img:visible").count() == 3  # the loss while it fell, and the two figures of the report
        page.screenshot(path=tmp_path / "trained.png")
        browser.close()
