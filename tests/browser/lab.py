"""A real JupyterLab, started by `make lab` on a copy of the project, and what a person does in it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
MISSING = next((f"{name} is not installed" for name in ("chromium", "make") if not shutil.which(name)), "")
IN_SIGHT = ".jp-NotebookPanel:not(.lm-mod-hidden)"  # of several notebooks that are open, the one that is seen
WAIT = 180  # seconds, for what takes a few on an idle machine
COPIED = ("notebooks", "docs/images", "reports/README.md", "Makefile", "pyproject.toml", "constraints.txt")
LINKED = ("rwkv_lab", "kernels")
SHOTS = ROOT / "reports" / "ci"  # where screenshots go; git ignores it
# Defaults with which a notebook takes seconds.
QUICK: dict[str, dict[str, object]] = {
    "train": {"data": "../cats.txt", "steps": 8, "batch_size": 2, "ctx_len": 64},
    "merge": {"data": ["../cats.txt"]},
    "peft": {"data": "../cats.txt"},
    "modes": {"length": 32, "batch": 1, "dtypes": ["float64", "float32"]},
    "benchmark": {"lengths": [8], "batches": [1], "dtypes": ["fp32"], "backends": ["chunked"], "peers": []},
    "chat": {"max_new_tokens": 20},
}
# Of JupyterLab. No news from the network; all cells are in the page, those that are not in sight too.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


def copy_project(folder: Path, defaults: Mapping[str, Mapping[str, object]]) -> None:
    """What `make lab` needs of the project: notebooks may be written to, and reports lie beside them.

    Args:
        defaults: notebook -> parameter -> value, in place of the notebook's own defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "cats.txt").write_text("the cat sat on the mat; " * 500)
    for name, values in defaults.items():
        _set_parameters(folder / "notebooks" / f"{name}.ipynb", values)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")


def _set_parameters(notebook: Path, values: Mapping[str, object]) -> None:
    """Change defaults in a notebook's parameters cell, as a person would who types there."""
    content = json.loads(notebook.read_text())
    (cell,) = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    source = "".join(cell["source"])
    for name, value in values.items():
        given = json.dumps(value).replace("\\", r"\\")
        source, n = re.subn(rf"(?m)^({name}: .*?) = .*?(  # .*)$", rf"\1 = {given}\2", source)
        assert n == 1, (notebook, name)
    cell["source"] = source.splitlines(keepends=True)
    notebook.write_text(json.dumps(content))


def _configure(folder: Path, opened: Path) -> dict[str, str]:
    """Variables of a server on the loopback without token, whose settings are its own and which opens no window."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = {
        "ServerApp": {
            "ip": "127.0.0.1",
            "port": port,
            "port_retries": 0,
            "allow_root": True,
            "disable_check_xsrf": True,  # for `Lab.start_afresh`
        },
        "IdentityProvider": {"token": ""},
        # where `make lab` writes the settings of the environment; the real environment is only linked to
        "LabApp": {"app_settings_dir": str(folder / ".venv/share/jupyter/lab/settings")},
    }
    made = folder / ".jupyter"
    (made / "labconfig").mkdir(parents=True)
    (made / "jupyter_server_config.json").write_text(json.dumps(config))
    (made / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    browser = made / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{opened}.part" && mv "{opened}.part" "{opened}"\n')
    browser.chmod(0o755)
    return {
        "BROWSER": str(browser),
        "JUPYTER_CONFIG_DIR": str(made),
        "JUPYTERLAB_SETTINGS_DIR": str(made / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(made / "workspaces"),
        "IPYTHONDIR": str(made / "ipython"),
    }


@contextmanager
def jupyter_lab(folder: Path, environment: Mapping[str, str]) -> Iterator["Lab"]:
    """`make lab` in a copy of the project, until the end of the block."""
    opened, log = folder / ".opened", folder / ".log"
    variables = {**environment, **_configure(folder, opened)}
    with open(log, "w") as to:
        # -o: the environment is there
        server = subprocess.Popen(
            ["make", "-o", ".venv/ready", "lab"],
            cwd=folder,
            env=variables,
            stdout=to,
            stderr=to,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + WAIT
        while not opened.exists():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield Lab(folder, opened.read_text().strip(), log)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


class Lab:
    """A server that runs.

    folder: of the project, its root.
    first: the address that a person's browser is opened with.
    """

    def __init__(self, folder: Path, first: str, log: Path):
        self.folder, self.first, self.log = folder, first, log
        self.address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())[0]
        self._first = {path: path.read_bytes() for path in self.notebooks()}

    def result(self, notebook: str) -> dict:
        """`result.json` of the notebook's last run; empty before the first."""
        path = self.folder / "reports" / notebook / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def begun(self, notebook: str) -> str:
        """When its last run began; empty before the first."""
        return self.result(notebook).get("started", "")

    def ended(self, notebook: str) -> bool:
        """Whether its last run is no longer at work."""
        return self.result(notebook).get("status") in ("ok", "failed")

    def start_afresh(self) -> None:
        """Shut down every kernel; forget what was saved in notebooks, and entered in panels."""
        sessions = f"{self.address}/api/sessions"
        with urlopen(sessions) as answer:
            found = json.load(answer)
        for session in found:
            urlopen(Request(f"{sessions}/{session['id']}", method="DELETE")).close()
        for path, content in self._first.items():
            if path.read_bytes() != content:
                path.write_bytes(content)
        for entries in self.folder.glob("reports/*/panel.json"):
            entries.unlink()

    def notebooks(self) -> list[Path]:
        """The files of all notebooks."""
        return sorted((self.folder / "notebooks").glob("*.ipynb"))


def wait_until(
    page: "Page", condition: Callable[[], bool], seconds: float = WAIT, state: Callable[[], str] = lambda: ""
) -> None:
    """Let the page work until something holds; after so many seconds, fail with the state."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it took too long; {state()}"
        page.wait_for_timeout(100)


def open_notebook(page: "Page", lab: Lab, name: str) -> None:
    """Open a notebook and wait for its kernel."""
    page.goto(f"{lab.address}/lab/tree/notebooks/{name}.ipynb?reset")
    wait_for_kernel(page)


def wait_for_kernel(page: "Page") -> None:
    page.locator(f"{IN_SIGHT} .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile("Python 3.* Idle")).wait_for()


def choose(page: "Page", menu: str, *items: str) -> None:
    """Choose from JupyterLab's menu by the mouse; of several items, those before the last open a menu of their own."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    for item in items:
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(item)}$")).click()


def use_theme(page: "Page", name: str) -> None:
    """JupyterLab's "Light" or "Dark"; it is kept for all notebooks."""
    choose(page, "Settings", "Theme", f"JupyterLab {name}")
    light = "true" if name == "Light" else "false"
    page.locator(f'body[data-jp-theme-light="{light}"]').wait_for(state="attached")
    page.locator("#jupyterlab-splash").wait_for(state="detached")  # it covers the page while the theme changes


def run_all(page: "Page", seconds: float = WAIT) -> None:
    """Run > Run All Cells, by the mouse, and wait for the last one."""
    choose(page, "Run", "Run All Cells")
    wait_for_end(page, seconds)


def restart_and_run_all(page: "Page", seconds: float = WAIT) -> None:
    """Kernel > Restart Kernel and Run All Cells, by the mouse, and wait for the last one."""
    choose(page, "Kernel", "Restart Kernel and Run All Cells…")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    first = page.locator(f"{IN_SIGHT} .jp-CodeCell .jp-InputPrompt").first
    wait_until(page, lambda: first.inner_text() in ("[ ]:", "[*]:"))  # what was run before is gone
    wait_for_end(page, seconds)


def wait_for_end(page: "Page", seconds: float = WAIT) -> None:
    """Until no cell is at work, after the first one began."""
    prompts = page.locator(f"{IN_SIGHT} .jp-CodeCell .jp-InputPrompt")

    def ended() -> bool:
        texts = prompts.all_inner_texts()
        return "[*]:" not in texts and texts[0] != "[ ]:"

    wait_until(page, ended, seconds, lambda: f"prompts: {prompts.all_inner_texts()}")


def run_cell(page: "Page", source: str, more: str = "") -> None:
    """Run the cell that has this source, and `more` at its end, by the keyboard."""
    cell = page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=source)).first
    cell.locator(".cm-content").click()
    if more:
        page.keyboard.press("Control+End")
        page.keyboard.insert_text(more)
    before = cell.locator(".jp-InputPrompt").inner_text()
    page.keyboard.press("Control+Enter")
    wait_until(page, lambda: cell.locator(".jp-InputPrompt").inner_text() not in (before, "[*]:"))


def panel_of(page: "Page") -> "Locator":
    """The cell with the panel, in sight."""
    panel = page.locator(".jp-CodeCell", has=page.get_by_role("button", name="Run", exact=True)).first
    panel.scroll_into_view_if_needed()
    return panel


def errors_in(page: "Page") -> list[str]:
    """What cells and panels wrote to stderr or raised."""
    found = page.locator(
        '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'
    )
    return found.all_inner_texts()


def screenshot(page: "Page", name: str) -> None:
    """Keep what is seen, for a person to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")
