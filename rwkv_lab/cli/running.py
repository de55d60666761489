"""Runs one notebook, as papermill does."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_lab.cli.notebooks import Notebook
from rwkv_lab.cli.words import parameters_from
from rwkv_lab.resources import notebooks_folder, reports_folder


def run_notebook(notebook: Notebook, words: Sequence[str]) -> int:
    """Run a notebook with the parameters that words give; the exit code.

    What its cells print is shown, which ends with the verdict and the path of the report. The executed notebook goes
    beside the report. What the first cell of one of our notebooks refuses is refused before a kernel is started.

    Raises:
        ParameterError: a name that the notebook does not have, or a word that gives no parameter.
        RwkvLabError: what one of our notebooks refuses.
    """
    parameters = parameters_from(words, notebook)
    os.environ["RWKV_LAB_COMMAND"] = "rwkv-lab"  # for advice in refusals, here and in the kernel
    if notebook.path.parent == notebooks_folder():
        _check(notebook, parameters)
    try:
        from rwkv_lab.workbench.batch import execute
    except ImportError as e:
        print(
            f"{e.name} is not installed; pip install 'rwkv_lab[workbench]' brings what notebooks need.", file=sys.stderr
        )
        return 1
    folder = os.path.expanduser(str(parameters.get("report") or "")) or reports_folder() / notebook.name
    try:
        error = execute(notebook.path, Path(folder) / "run.ipynb", parameters)
    except OSError as e:
        error = f"OutputError: the executed notebook cannot be written: {e}"
    if error:
        print(error, file=sys.stderr)
    return 1 if error else 0


def _check(notebook: Notebook, parameters: Mapping[str, Any]) -> None:
    """Refuse what the first cell would, by the values of a parameters cell that its owner may have changed."""
    from rwkv_lab.workbench.registry import notebook_names
    from rwkv_lab.workbench.run import check_parameters

    if notebook.name in notebook_names():
        cell = {name: one.default for name, one in notebook.parameters.items()}
        check_parameters(notebook.name, cell | dict(parameters))
