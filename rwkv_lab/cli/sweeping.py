"""Runs a notebook many times."""

from pathlib import Path
from typing import Any

from rwkv_lab.command_line import settings_of
from rwkv_lab.workbench.sweep.spec import SweepOptions, shown


def run_sweep(given: dict[str, Any]) -> int:
    """Carry out a sweep, and say what was best and where the summary is; the exit code: 1 where a run is not ok.

    Args:
        given: the parsed command line.
    Raises:
        RwkvLabError: see `sweep`.
        KeyboardInterrupt, SystemExit: it was stopped.
    """
    notebook, grid = given["notebook"], given["grid"]
    options = settings_of({n: given[n] for n in ("json", *SweepOptions.model_fields)}, (), SweepOptions.model_fields)
    from rwkv_lab.workbench.sweep import sweep

    try:
        result = sweep(Path(notebook).stem if notebook.endswith(".ipynb") else notebook, grid, **options)
    except (KeyboardInterrupt, SystemExit):
        print("Stopped. The same command continues from here; what is finished is not run again.")
        raise
    if result.summary is None:
        for run in result.runs:
            print(f"{run.state:<8} {shown(run.swept)}{f': {run.error}' if run.error else ''}")
        return 0
    if result.best is not None:
        print(f"best     {shown(result.best.swept)}")
    print(f"summary  {result.summary}")
    return 1 if result.failed else 0
