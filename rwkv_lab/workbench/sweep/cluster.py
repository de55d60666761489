"""Carries out jobs on a Dask distributed cluster that is there already, by the address of its scheduler."""

import time
from collections.abc import Sequence
from typing import Any

from rwkv_lab import machine
from rwkv_lab.errors import DeviceError, ParameterError
from rwkv_lab.progress import human_bytes
from rwkv_lab.workbench.sweep.jobs import Job, Outcome, carry_out
from rwkv_lab.workbench.sweep.local import Changed
from rwkv_lab.workbench.sweep.runs import SweepRun

_CONNECT = 20  # seconds
_FOR_MEMORY = 600  # seconds that a job waits on a worker for memory


def run_on_cluster(runs: Sequence[SweepRun], scheduler: str, retries: int, changed: Changed) -> None:
    """Carry out all runs on the workers; a worker that dies loses no finished run, and its runs start again elsewhere.

    Ctrl-C and SIGTERM (`sigterm_cleans_up`) take the runs off the workers, and raise.

    Raises:
        ParameterError: distributed is not installed.
        DeviceError: there is no scheduler at that address, or it has no workers.
        KeyboardInterrupt, SystemExit
    """
    try:
        from distributed import Client, as_completed
    except ImportError as e:
        raise ParameterError("scheduler needs Dask distributed: pip install 'rwkv_lab[cluster]'") from e
    by_key = {run.job.name: run for run in runs}
    with _connected(Client, scheduler) as client:
        waiting = as_completed()
        try:
            for run in runs:
                waiting.add(_submit(client, run, changed))
            for future in waiting:
                run = by_key[future.key.rpartition("/")[0]]
                outcome = _outcome(future)
                if outcome.retry and run.attempts <= retries:
                    waiting.add(_submit(client, run, changed))
                else:
                    changed(run, outcome)
                future.release()
        except (KeyboardInterrupt, SystemExit):
            client.cancel(list(waiting.futures), force=True)
            client.run(_stop_jobs)
            raise


def on_worker(job: Job) -> Outcome:
    """What a worker does: wait for memory, then carry the job out."""
    import threading

    from distributed import get_worker

    stop, worker = threading.Event(), get_worker()
    until = time.monotonic() + _FOR_MEMORY
    while job.memory > machine.memory_free():
        if time.monotonic() > until:
            free = human_bytes(machine.memory_free())
            said = (
                f"DeviceError: it takes {human_bytes(job.memory)} of memory, worker {worker.address} has {free} free."
            )
            return Outcome("failed", said)
        time.sleep(1)
    stops = getattr(worker, "rwkv_lab_stops", set())
    worker.rwkv_lab_stops = stops  # type: ignore[attr-defined]  # where _stop_jobs looks
    stops.add(stop)
    try:
        return carry_out(job, stop)
    finally:
        stops.discard(stop)


def _stop_jobs(dask_worker: Any) -> None:
    for stop in list(getattr(dask_worker, "rwkv_lab_stops", ())):
        stop.set()


def _connected(client: Any, scheduler: str) -> Any:
    try:
        connected = client(scheduler, timeout=_CONNECT, name="rwkv_lab sweep")
    except (OSError, ValueError, TypeError) as e:
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DeviceError(
            f"there is no scheduler at {scheduler}: {said}\nGive the address that `dask scheduler` prints, tcp://host:8786."
        ) from e
    if not connected.scheduler_info(n_workers=-1)["workers"]:
        try:
            connected.wait_for_workers(1, timeout=_CONNECT)
        except TimeoutError as e:
            connected.close()
            raise DeviceError(
                f"the scheduler at {scheduler} has no workers. Start some: dask worker {scheduler}"
            ) from e
    return connected


def _submit(client: Any, run: SweepRun, changed: Changed) -> Any:
    run.attempts += 1
    changed(run, None)
    key = f"{run.job.name}/{run.attempts}"
    return client.submit(on_worker, run.job, key=key, pure=False)


def _outcome(future: Any) -> Outcome:
    """What a task ended with; a task whose workers died one after the other may be tried again."""
    if future.status == "finished":
        return future.result()
    error = future.exception() if future.status == "error" else None
    said = str(error).splitlines()[0] if error is not None and str(error) else future.status
    return Outcome("failed", f"{type(error).__name__ if error else 'cancelled'}: {said}", retry=error is not None)
