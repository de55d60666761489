"""The cells of a notebook as data, so that a panel's Run button does what the cells do."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from rwkv_lab.workbench.registry import cells_of
from rwkv_lab.workbench.run import Run


@dataclass(frozen=True)
class Step:
    """One call that a notebook's cells make.

    work: a function of `run` and of earlier results; its parameters have their names.
    result: the variable that holds what it returns; empty where nothing needs it.
    """

    work: Callable[..., object]
    result: str = ""

    def statement(self) -> str:
        """The call as the notebook has it."""
        call = f"cells.{self.work.__name__}({', '.join(inspect.signature(self.work).parameters)})"
        return f"{self.result} = {call}" if self.result else call


def show_verdict(run: Run) -> None:
    """Print a PASS or FAIL line for each check."""
    for check in run.record.checks:
        print(check)


def run_all(run: Run) -> dict[str, object]:
    """Do all steps of the run's notebook in order, then finish the run; a step that raises makes the run fail.

    Returns:
        The variables that the notebook's cells would have set.
    Raises:
        RwkvLabError: what a step refuses.
    """
    if "dry_run" in run.model.model_fields:
        run.configure(dry_run=False)
    cells = cells_of(run.notebook)
    results: dict[str, object] = {"run": run}
    try:
        for number, step in enumerate(cells.STEPS, 1):
            name = step.work.__name__.replace("_", " ")
            run.stage = f"step {number} of {len(cells.STEPS)}: {name}"
            needed = inspect.signature(step.work).parameters
            results[step.result] = step.work(*(results[name] for name in needed))
        run.stage = "writing the report"
        run.finish(must_pass=cells.MUST_PASS)
    except BaseException as e:
        run.fail(e)  # a click is no cell: IPython does not report it
        raise
    finally:
        run.stage = ""
    return {name: result for name, result in results.items() if name}
