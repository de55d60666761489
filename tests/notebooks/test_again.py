"""What a batch run ends with in the terminal, and the commands that repeat it, run as they are printed."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shell(warm):
    """shell(command, folder) -> what it printed; the environment of this Python is activated."""

    def run(command: str, folder: Path) -> str:
        activated = {
            **warm.environment,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        done = subprocess.run(
            command, shell=True, cwd=folder, env=activated, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def finished(shell, demo_folder, tmp_path_factory) -> tuple[Path, str]:
    """(its report folder, stdout) of a run by papermill with a file of one's own, from a folder with a blank."""
    folder = tmp_path_factory.mktemp("a folder")
    (folder / "my base.pth").write_bytes((demo_folder / "demo-base.pth").read_bytes())
    notebook = ROOT / "notebooks" / "inspect.ipynb"
    stdout = shell(f"papermill --no-progress-bar '{notebook}' run.ipynb -r checkpoint 'my base.pth'", folder)
    return folder / "reports" / "inspect", stdout


def test_papermill_ends_with_verdict_path_and_numbers(finished):
    folder, stdout = finished
    result = json.loads((folder / "result.json").read_text())
    assert stdout.splitlines() == [
        f"PASS    All {len(result['checks'])} checks passed.",
        f"found   {result['metrics']['summary']}",
        f"report  {folder / 'report.html'}",
    ]


def test_the_command_in_the_report_works_as_printed(finished, shell):
    folder, _ = finished
    before = json.loads((folder / "result.json").read_text())
    report = (folder / "report.html").read_text()
    (command,) = re.findall(r"<pre>(.*?)</pre>", report)
    assert "In the folder of this report" in report and str(folder.parents[1]) not in report
    stdout = shell(html.unescape(command), folder)
    after = json.loads((folder / "result.json").read_text())
    assert after["started"] > before["started"] and after["status"] == "ok"
    assert after["parameters"] == before["parameters"] and after["inputs"] == before["inputs"]
    (again,) = [line.removeprefix("again   ") for line in stdout.splitlines() if line.startswith("again ")]
    shell(again, Path("/"))
    assert json.loads((folder / "result.json").read_text())["started"] > after["started"]


def test_again_in_a_folder_without_a_report(warm, tmp_path):
    command = [warm.python, "-m", "rwkv_lab.workbench.batch", "--again"]
    for words in ([str(tmp_path)], []):
        done = subprocess.run([*command, *words], env=warm.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "the folder that a report lies in" in done.stderr
        assert "Traceback" not in done.stderr
