"""Runs that make and tests start: what the cells print appears at once, and no warning of others beside it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]


def command(notebook: str, folder: Path, *options: str) -> list:
    executed = folder / "run.ipynb"
    run = [sys.executable, "-m", "rwkv_lab.workbench.batch", ROOT / "notebooks" / f"{notebook}.ipynb", executed]
    return [*run, "-r", "report", str(folder / "report"), *options]


def test_progress_with_time_left_appears_while_the_notebook_runs(environment, tmp_path):
    """As `make demo` runs train.ipynb, with less to learn."""
    sockets = tmp_path / "tmp"
    sockets.mkdir()
    less = ["-y", '{"steps": 400, "batch_size": 2, "n_embd": 32, "n_layer": 2, "head_size": 16}']
    options = ["-r", "kind", "pretrain", "-r", "base", "", "-r", "data", "english", *less]
    process = subprocess.Popen(
        command("train", tmp_path, *options, "-r", "out", str(tmp_path / "out.pth")),
        cwd=ROOT,
        env={**environment, "TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    while not (lines and lines[-1].endswith(" left)")):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines.append(line.strip())
    assert process.poll() is None and lines[-1].startswith("pretrain: ") and " tokens/s, " in lines[-1]
    assert any(name.startswith("kernel") for folder in sockets.glob("rwkv_lab-*") for name in os.listdir(folder))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and str(tmp_path / "report") in out
    assert "TCP" not in err and "IPKernelApp" not in err and list(sockets.iterdir()) == []
    assert json.loads((tmp_path / "report" / "result.json").read_text())["status"] == "ok"


def test_a_refusal_ends_with_a_code_and_the_message(warm, tmp_path):
    done = subprocess.run(
        [warm.python, *command("inspect", tmp_path, "-r", "checkpoint", str(tmp_path / "none.pth"))[1:]],
        cwd=ROOT,
        env=warm.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "TCP" not in done.stderr
    assert done.stderr.startswith("ParameterError: ") and "none.pth" in done.stderr
    assert json.loads((tmp_path / "report" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_lets_the_cell_that_runs_clean_up(sign, code, environment, tmp_path):
    """However long it takes, and without a word of what Jupyter makes of it."""
    cell = (
        "import time\ntry:\n    print('begun')\n    time.sleep(60)\n"
        "finally:\n    time.sleep(4)\n    open('cleaned-up', 'w').close()"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "sleep.ipynb")
    sockets = tmp_path / "tmp"
    sockets.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_lab.workbench.batch", tmp_path / "sleep.ipynb", tmp_path / "run.ipynb"],
        cwd=tmp_path,
        env={**environment, "TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sign)
    _, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (code, "stopped\n" if sign == signal.SIGINT else "")
    assert (tmp_path / "cleaned-up").exists() and list(sockets.iterdir()) == []
