"""Every hostile input through the merge notebook: it ends with an error, and says in result.json which and why."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from hostile import CASES
from models import snapshot
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.translators import translate_parameters

# Each as a process of its own, which takes seconds: one for each class of error that test_papermill.py has none of.
BATCH = {
    "1-malicious-pickle-in-a-zip": "UnsafeFileError",
    "13-LoRA-of-another-depth": "LayoutError",
    "17-NaN-and-Inf": "NumericsError",
    "22-output-is-an-input:-hard_link": "OutputError",
}
FORGET = (  # what %reset does, less its collection of garbage, which takes longer than a refusal
    "_kept = ('In', 'Out', 'get_ipython', 'exit', 'quit', 'open')\n"
    "for _n in [n for n in globals() if n[0] != '_' and n not in _kept]:\n"
    "    del globals()[_n]"
)
BY_ID = {c.id: c for c in CASES}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(batch, tmp_path_factory):
    """Name of the case -> (finished papermill run, its folder before, its folder after)."""

    def run(name):
        folder = tmp_path_factory.mktemp("hostile")
        given = BY_ID[name].make(folder)
        before = snapshot(folder)
        finished = batch("merge", "-y", json.dumps({k: v for k, v in given.items() if v is not None}))
        return finished, before, snapshot(folder)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BATCH, pool.map(run, BATCH), strict=True))


@pytest.mark.parametrize("name", BATCH)
def test_papermill_fails_and_leaves_nothing(name, runs):
    finished, before, after = runs[name]
    assert finished.code not in (0, None)
    assert finished.result["status"] == "failed"
    assert finished.result["error"]["class"] == BATCH[name] == BY_ID[name].error
    assert re.search(BY_ID[name].said, finished.result["error"]["message"])
    assert finished.result["error"]["message"].split("\n")[0] in finished.log
    assert after == before


@pytest.fixture(scope="module")
def kernel(environment):
    """Runs the notebook in one kernel, with parameters put in as papermill does; gives the error that ended it."""
    notebook = nbformat.read(ROOT / "notebooks" / "merge.ipynb", as_version=4)
    client = NotebookClient(notebook, kernel_name="python3", timeout=120)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FORGET))
    tagged = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell())

    def run(parameters: dict) -> str:
        notebook.cells[tagged + 1].source = translate_parameters("python3", "python", parameters, "Parameters")
        for i, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, i)
            except CellExecutionError as e:
                return e.ename
        return "no error"

    with client.setup_kernel(env=environment, cwd=str(ROOT)):
        yield run


@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.id)  # the others: workbench/test_panel_refusals.py
def test_the_notebook_stops_with_the_right_error(case, kernel, tmp_path):
    folder, report = tmp_path / "files", tmp_path / "report"
    folder.mkdir()
    given = {k: v for k, v in case.make(folder).items() if v is not None}
    before = snapshot(folder)
    assert kernel(given | {"report": str(report)}) == case.error
    result = json.loads((report / "result.json").read_text())
    assert (result["status"], result["error"]["class"]) == ("failed", case.error)
    assert case.error == "ParameterError" or re.search(case.said, result["error"]["message"])
    assert result["error"]["message"].count("\n") < 3
    assert snapshot(folder) == before
