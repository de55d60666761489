"""The panel's Run and Stop in a real kernel, by the messages that JupyterLab sends for clicks and cells."""

import json
import os
import queue
import signal
import time
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

_PANEL = """
import os

from rwkv_lab.workbench import show_panel, start

run = start("train", {parameters})
panel = show_panel(run)
print(os.getpid(), *[panel.buttons[name].comm.comm_id for name in ("Plan", "Run", "Stop")])
"""
_SHOWN = "print([o.get('text', '') for box in panel.output.box.children for o in box.outputs], panel.message.value)"


class Notebook:
    """train.ipynb in a kernel, as its front end sees it."""

    def __init__(self, client, folder: Path):
        self.client, self.folder = client, folder
        self.status, self.said = "", []  # of the kernel; what its widgets were set to
        self.printed: dict[str, str] = {}  # by the cell's message
        self.ended: set[str] = set()
        parameters = {"report": str(folder), "kind": "lora", "base": "demo:base", "steps": 10**6, "rank": 2}
        parameters |= {"batch_size": 1, "ctx_len": 16, "data": str(folder / "cats.txt"), "measure_bytes": 100}
        (folder / "cats.txt").write_text("the cat sat on the mat; " * 500)
        pid, self.plan, self.run, self.stop = self.cell(_PANEL.format(parameters=parameters)).split()
        self.pid = int(pid)

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    def send(self, kind: str, content: dict) -> str:
        """Send what JupyterLab does; the message's number."""
        message = self.client.session.msg(kind, content, metadata={"cellId": "1"})
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def click(self, button: str) -> None:
        data = {"method": "custom", "content": {"event": "click"}}
        self.send("comm_msg", {"comm_id": button, "data": data})

    def begin_cell(self, code: str) -> str:
        return self.send("execute_request", {"code": code, "silent": False, "stop_on_error": True})

    def cell(self, code: str) -> str:
        """Run a cell; what it printed."""
        cell = self.begin_cell(code)
        self.wait(lambda: cell in self.ended)
        return self.printed.get(cell, "")

    def wait(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said[-5:]
            try:
                self._take(self.client.get_iopub_msg(timeout=0.2))
            except queue.Empty:
                continue

    def _take(self, message: dict) -> None:
        kind, content, parent = message["msg_type"], message["content"], message["parent_header"].get("msg_id", "")
        if kind == "status":
            self.status = content["execution_state"]
            if self.status == "idle":
                self.ended.add(parent)
        elif kind == "comm_msg":
            self.said.append(str(content["data"].get("state", {}).get("value", "")))
        elif kind in ("stream", "error"):
            self.printed[parent] = self.printed.get(parent, "") + content.get("text", content.get("evalue", ""))

    def begin_training(self) -> None:
        self.said.clear()
        self.click(self.run)
        self.wait(lambda: any("left) ·" in said for said in self.said))


@pytest.fixture(scope="module")
def notebook(warm, tmp_path_factory):
    kernels = KernelSpecManager(kernel_dirs=[str(Path(warm.environment["JUPYTER_PATH"]) / "kernels")])
    manager = KernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    folder = tmp_path_factory.mktemp("train")
    manager.start_kernel(env=warm.environment, cwd=folder)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)
    yield Notebook(client, folder)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_job_is_shown_and_stopped(notebook):
    notebook.begin_training()
    line = notebook.said[-1]
    assert line.startswith("step 2 of 6: carry out · ") and "lora 0 % (" in line and "· memory " in line
    notebook.wait(lambda: notebook.status == "busy", 5)
    notebook.click(notebook.stop)
    notebook.wait(lambda: any(said.startswith("stopped after") for said in notebook.said))
    notebook.wait(lambda: notebook.status == "idle")
    assert (notebook.result["status"], notebook.result["error"]["class"]) == ("failed", "KeyboardInterrupt")
    assert not list(notebook.folder.glob("*.pth"))
    assert "error" not in notebook.cell(_SHOWN)


def test_a_cell_waits_for_the_end_of_a_job(notebook):
    notebook.begin_training()
    cell = notebook.begin_cell("print(run.record.status)")
    notebook.said.clear()
    notebook.wait(lambda: len(notebook.said) > 3)  # the job goes on, the cell does not begin
    assert cell not in notebook.printed
    notebook.click(notebook.stop)
    notebook.wait(lambda: cell in notebook.ended)
    assert notebook.printed[cell] == "failed\n"


def test_interrupt_ends_a_job_and_the_cells_that_wait_for_it(notebook):
    notebook.begin_training()
    cells = [notebook.begin_cell("print('ran')") for _ in range(2)]
    notebook.said.clear()
    notebook.wait(lambda: len(notebook.said) > 3)
    os.kill(notebook.pid, signal.SIGINT)  # what jupyter does; a warm kernel is not in the group that it knows
    notebook.wait(lambda: cells[1] in notebook.ended)
    assert "with the job of the panel" in notebook.printed[cells[0]] and cells[1] not in notebook.printed
    assert notebook.result["error"]["class"] == "KeyboardInterrupt"
    assert notebook.cell("print('on')") == "on\n"


def test_after_a_stop_a_job_runs_to_its_end_and_sets_the_variables_of_the_cells(notebook):
    notebook.cell("run.configure(steps=2); panel.fields['steps'].value = 2")
    notebook.said.clear()
    notebook.click(notebook.run)
    notebook.wait(lambda: any(said.startswith(("done after", "failed after")) for said in notebook.said))
    shown = notebook.cell(_SHOWN)
    assert "PASS" in shown, shown
    assert notebook.result["status"] == "ok"
    assert notebook.cell("print(result.steps if hasattr(result, 'steps') else type(result).__name__)")


_DEAF = """
import time

from rwkv_lab.workbench.job import Job

done = []
def work():
    try:
        while True:
            time.sleep(0.01)
    except BaseException:
        done.append("lost")  # as Python loses what is raised in a callback
    try:
        while True:
            time.sleep(0.01)
    finally:
        for _ in range(100):
            time.sleep(0.01)
        done.append("cleaned up")
job = Job(work, lambda: None, lambda error: done.append(type(error).__name__))
job.start()
"""


def test_a_stop_that_was_lost_is_repeated_until_the_work_cleans_up(notebook):
    notebook.cell(_DEAF)
    notebook.wait(lambda: notebook.status == "busy", 5)
    os.kill(notebook.pid, signal.SIGINT)
    notebook.wait(lambda: notebook.status == "idle")
    assert notebook.cell("print(done)") == "['lost', 'cleaned up', 'KeyboardInterrupt']\n"


def test_a_click_while_a_cell_runs_waits_for_its_end(notebook):
    cell = notebook.begin_cell("import time; time.sleep(1); print(run.record.status)")
    notebook.said.clear()
    notebook.click(notebook.plan)
    notebook.wait(lambda: any(said.startswith("done after") for said in notebook.said))
    assert cell in notebook.ended and notebook.printed[cell] == "ok\n"
