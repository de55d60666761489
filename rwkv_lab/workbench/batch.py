"""Runs a notebook as papermill does, showing what its cells print while they run:

    python -m rwkv_lab.workbench.batch notebooks/train.ipynb reports/train/run.ipynb -p steps 100
    python -m rwkv_lab.workbench.batch --again reports/train    the run whose report lies there, with its parameters

The arguments are papermill's; the folder of the executed notebook is made where it is not there. The kernel is reached
through sockets in a folder of its own instead of TCP ports, so nothing of the run goes over the network, and ipykernel
has nothing to warn of. This process starts a kernel and waits for it: it imports no torch.
"""

# ruff: noqa: E402  the first statement comes before what it is for

import asyncio
import logging
import sys

# Notebooks hold no addresses in other alphabets. jsonschema checks such where it finds this package, whose import alone
# takes a second.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill import execute_notebook
from papermill.cli import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.sigterm import sigterm_cleans_up

# Seconds that a cell has to end after an interrupt.
_PATIENCE = 30.0


class _Kernel(AsyncKernelManager):
    """Stops a kernel that is done without interrupting it first, which ipykernel reports as an error at times, and one
    whose cell runs after that cell has ended."""

    computes = False  # while a cell is being executed; one kernel per process
    latest: "_Kernel | None" = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        _Kernel.latest = self

    async def _async_interrupt_kernel(self) -> None:
        if self.computes or not self.shutting_down:
            await super()._async_interrupt_kernel()
        if self.computes and self.shutting_down:
            _Kernel.computes = False
            await self._cell_has_ended()

    async def _cell_has_ended(self) -> None:
        """Wait for the end of an interrupted cell. A kernel that is told to shut down before closes the sockets that
        the cell answers by, and is killed seconds later, whatever the cell has to clean up."""
        client = self.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=_PATIENCE)  # a kernel answers when no cell runs
        except RuntimeError:  # it is stuck, or has died
            pass
        finally:
            client.stop_channels()
        # What still waits for the cell's reply may have been cut short, and would report that the kernel is gone.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


def _cell_begins(**_: object) -> None:
    _Kernel.computes = True


def _cell_ended(**_: object) -> None:
    _Kernel.computes = False


class Engine(NBClientEngine):
    """papermill's own way to execute a notebook, with another connection to the kernel."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        streams = {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
        options |= {name: stream for name, stream in streams.items() if not options.get(name)}
        with tempfile.TemporaryDirectory(prefix="rwkv_lab-") as folder:  # short: a socket's path has 104 bytes
            connection = {"connection_file": str(Path(folder) / "kernel.json")}  # goes with the folder, however it ends
            connection |= {"transport": "ipc", "ip": str(Path(folder) / "kernel")}
            options |= {"kernel_manager_class": _Kernel, "config": Config({"KernelManager": connection})}
            options |= {"on_cell_execute": _cell_begins, "on_cell_executed": _cell_ended}
            try:
                with sigterm_cleans_up():
                    return super().execute_managed_notebook(nb_man, kernel_name, **options)
            except (KeyboardInterrupt, SystemExit):
                if _Kernel.latest and _Kernel.latest.has_kernel:  # nbclient leaves one alone that was still starting
                    run_sync(_Kernel.latest.shutdown_kernel)(now=True)
                raise


def main(words: Sequence[str] | None = None) -> None:
    """Run a notebook; ends the process, with papermill's exit code."""
    papermill_engines.register(None, Engine)  # None: where no engine is named
    # What the cells print takes the place of a bar that counts cells.
    given = ["--no-progress-bar", "--log-level", "WARNING", *_arguments(sys.argv[1:] if words is None else words)]
    try:
        with papermill.make_context("papermill", given) as context:
            output = context.params["output_path"]
            if output and "://" not in output:
                Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
            papermill.invoke(context)
    except click.exceptions.Exit as e:  # after --help and the like
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except OSError as e:
        sys.exit(f"{type(e).__name__}: {e}")
    except PapermillExecutionError as e:
        sys.exit(f"{e.ename}: {e.evalue}")  # the traceback is in the notebook
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def execute(notebook: Path, executed: Path, parameters: Mapping[str, Any]) -> str:
    """Run a notebook with these parameters, from the current folder, showing what its cells print.

    Args:
        executed: where the executed notebook goes; its folder is made where it is not there.
    Returns:
        The error that ended it, in a line or a few; "" where none did.
    Raises:
        OSError: the executed notebook cannot be written.
    """
    papermill_engines.register(None, Engine)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    executed.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        # Braces in a path would be filled with parameters.
        paths = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed))
        execute_notebook(*paths, parameters=dict(parameters), progress_bar=False)
    except PapermillExecutionError as e:
        return f"{e.ename}: {e.evalue}".strip()
    return ""


def _arguments(words: Sequence[str]) -> list[str]:
    """papermill's arguments; those of an earlier run where its folder is given."""
    if "--again" not in words:
        return list(words)
    from rwkv_lab.workbench.again import recorded_arguments  # brings torch

    at = list(words).index("--again")
    if at + 1 == len(words):
        sys.exit("--again needs the folder that a report lies in.")
    try:
        return [*recorded_arguments(Path(words[at + 1])), *words[:at], *words[at + 2 :]]
    except RwkvLabError as e:
        sys.exit(f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    main()
