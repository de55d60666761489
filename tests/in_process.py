"""A notebook run in this process, cell by cell, in the place of a kernel that takes seconds to start."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_lab.errors import RwkvLabError


def execute(notebook: Path, executed: Path, parameters: Mapping[str, Any]) -> str:
    """As `rwkv_lab.workbench.batch.execute`: the error that ended the run, "" where none did."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    try:
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)
            if number == 0:
                namespace |= parameters
    except RwkvLabError as e:
        if "run" in namespace:  # what IPython does after a cell that raised
            namespace["run"].advise_in_words(e)
            namespace["run"].fail(e)
        return f"{type(e).__name__}: {e}".strip()
    return ""
