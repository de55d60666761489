"""The process of one run: `python -m rwkv_lab.workbench.sweep.process FOLDER` does what the folder's run.json says.

It ends when whoever started it does, because stdin ends then: a worker that was killed leaves no run behind that would
write into the folder beside the next attempt.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from rwkv_lab.resources import notebooks_folder
from rwkv_lab.sigterm import sigterm_cleans_up
from rwkv_lab.workbench.batch import execute
from rwkv_lab.workbench.sweep.jobs import RUN, read_json


def main() -> int:
    """Execute the notebook; the exit code."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = read_json(folder / RUN)
    notebook = Path(told["notebook"])
    if not notebook.suffix:
        notebook = notebooks_folder() / f"{notebook}.ipynb"
    with sigterm_cleans_up():
        error = execute(notebook, folder / "run.ipynb", told["parameters"])
    if error:
        print(error, file=sys.stderr)
    return 1 if error else 0


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
