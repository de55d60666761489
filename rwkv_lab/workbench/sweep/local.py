"""Carries out jobs on this machine: some at the same time, as many as memory allows."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from rwkv_lab.workbench.sweep.jobs import Job, Outcome, carry_out
from rwkv_lab.workbench.sweep.runs import SweepRun

Changed = Callable[[SweepRun, Outcome | None], None]  # None: it was started


def run_here(
    runs: Sequence[SweepRun],
    processes: int,
    memory: int,
    retries: int,
    changed: Changed,
    carry_out: Callable[[Job, threading.Event], Outcome] = carry_out,
) -> None:
    """Carry out all runs; Ctrl-C and SIGTERM (`sigterm_cleans_up`) stop those at work and raise.

    Args:
        memory: bytes that all may take together.
        changed: called when a run was started, and when it ended for good.
        carry_out: what does it.
    Raises:
        KeyboardInterrupt, SystemExit
    """
    waiting, stop = list(runs), threading.Event()
    at_work: dict[Future[Outcome], SweepRun] = {}
    with ThreadPoolExecutor(processes) as pool:
        try:
            while waiting or at_work:
                while waiting and len(at_work) < processes:
                    run = next_that_fits(waiting, list(at_work.values()), memory)
                    if run is None:
                        break
                    waiting.remove(run)
                    run.attempts += 1
                    at_work[pool.submit(carry_out, run.job, stop)] = run
                    changed(run, None)
                for future in wait(at_work, timeout=1, return_when=FIRST_COMPLETED).done:
                    run, outcome = at_work.pop(future), future.result()
                    if outcome.retry and run.attempts <= retries:
                        waiting.append(run)
                    else:
                        changed(run, outcome)
        except (KeyboardInterrupt, SystemExit):
            stop.set()
            for future, run in at_work.items():
                changed(run, future.result())
            raise


def next_that_fits(waiting: Sequence[SweepRun], at_work: Sequence[SweepRun], memory: int) -> SweepRun | None:
    """The first of the waiting runs that fits into memory beside those at work; where none is at work, the first.

    Args:
        memory: bytes that all may take together.
    """
    if not at_work:
        return waiting[0]
    left = memory - sum(run.memory for run in at_work)
    return next((run for run in waiting if run.memory <= left), None)
