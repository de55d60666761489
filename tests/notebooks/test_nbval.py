"""Verdict cells, checked by nbval. Notebooks are committed without outputs: a run is made first, to compare with."""

import copy
import re
import subprocess

import nbformat


def test_a_second_run_gives_the_same_verdicts_and_another_one_would_be_noticed(merged, warm, tmp_path):
    notebook = nbformat.read(merged.notebook, as_version=4)
    (place,) = [i for i, c in enumerate(notebook.cells) if "NBVAL_CHECK_OUTPUT" in c.source]
    # nbval looks only at cells with a count and an output: without them it would pass whatever happens.
    assert notebook.cells[place].execution_count and "PASS" in notebook.cells[place].outputs[0].text
    other = copy.deepcopy(notebook.cells[place])
    other.id, other.outputs[0].text = "other", other.outputs[0].text + "PASS  something that is not there\n"
    notebook.cells.insert(place + 1, other)
    nbformat.write(notebook, tmp_path / "merge.ipynb")

    command = [warm.python, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    where = ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path / "merge.ipynb")]
    done = subprocess.run([*command, *where], env=warm.environment, capture_output=True, text=True, timeout=300)
    assert "something that is not there" in done.stdout
    assert re.search(r"\b1 failed, \d+ passed", done.stdout), done.stdout[-3000:]
