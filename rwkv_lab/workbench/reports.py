"""Lists runs in the terminal:

python -m rwkv_lab.workbench.reports            those in ./reports
python -m rwkv_lab.workbench.reports FOLDER     those below a folder
"""

import os
import sys
from pathlib import Path

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.resources import reports_folder
from rwkv_lab.workbench.runs import list_runs, write_index
from rwkv_lab.workbench.tables import Table


def main() -> int:
    """Print the runs and write the index; the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else reports_folder()
    runs = list_runs(folder.absolute())
    if not runs:
        print(f"There are no runs in {folder.absolute()}: name the folder that holds the folders of reports.")
        return 1
    rows = [
        (run.status, run.notebook, run.started, os.path.relpath(run.folder, folder), " ".join(run.summary.split()))
        for run in runs
    ]
    print(Table("Runs, the last one first", ("status", "notebook", "started", "folder", "found"), rows))
    try:
        print(write_index(folder.absolute()))
    except RwkvLabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
