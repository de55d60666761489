"""Runs one notebook, as papermill does."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_lab.cli.notebooks import Notebook
from rwkv_lab.cli.words import parameters_from
from rwkv_lab.resources import reports_folder


def run_notebook(notebook: Notebook, words: Sequence[str]) -> int:
    """Run a notebook with the parameters that words give; the exit code.

    What its cells print is shown, which ends with the verdict and the path of the report. The executed notebook goes
    beside the report.

    Raises:
        ParameterError: a name that the notebook does not have, or a word that gives no parameter.
    """
    parameters = parameters_from(words, notebook)
    try:
        from rwkv_lab.workbench.batch import execute
    except ImportError as e:
        print(
            f"{e.name} is not installed; pip install 'rwkv_lab[workbench]' brings what notebooks need.", file=sys.stderr
        )
        return 1
    os.environ["RWKV_LAB_COMMAND"] = "rwkv-lab"  # for the kernel
    folder = os.path.expanduser(str(parameters.get("report") or "")) or reports_folder() / notebook.name
    try:
        error = execute(notebook.path, Path(folder) / "run.ipynb", parameters)
    except OSError as e:
        error = f"OutputError: the executed notebook cannot be written: {e}"
    if error:
        print(error, file=sys.stderr)
    return 1 if error else 0
