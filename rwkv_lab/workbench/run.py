"""One run of a notebook: its parameters, its folder, `result.json` and `report.html`, from first cell to last."""

import atexit
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.errors import OutputError, ParameterError, RwkvLabError
from rwkv_lab.progress import frontend_present
from rwkv_lab.resources import reports_folder
from rwkv_lab.workbench.again import command
from rwkv_lab.workbench.entries import entered, proposed_by
from rwkv_lab.workbench.parameters import Parameters, read_parameters, train_demo
from rwkv_lab.workbench.registry import parameters_of
from rwkv_lab.workbench.report import Page, Picture, verdict, verdict_in_words
from rwkv_lab.workbench.report_folder import begin, close, note_on_earlier_run
from rwkv_lab.workbench.result import INTERRUPTED, Record
from rwkv_lab.workbench.shown import Shown
from rwkv_lab.workbench.tables import Table
from rwkv_lab.workbench.terminal import say
from rwkv_lab.workbench.words import advice_in_words


class Run:
    """What the cells of a notebook hand on to each other. `start` makes it.

    model: the type of the notebook's parameters.
    record: what goes into `result.json`.
    page: what goes into `report.html`.
    cell: the values of the parameters cell; `config` may have others, from the panel.
    stage: what is being done now, in words, where the panel's Run does it.
    """

    stage = ""

    def __init__(self, notebook: str, folder: Path, parameters: Mapping[str, object]):
        self.notebook, self.folder = notebook, folder
        self.model = parameters_of(notebook)
        self._config: Parameters | None = None
        self._earlier = note_on_earlier_run(folder)
        self._shown = Shown()
        self.cell: Mapping[str, Any] = {}
        self.listeners: list[Callable[[], None]] = []  # called when a pass through the notebook begins, and at its end
        self._begin(parameters)

    @property
    def config(self) -> Any:
        """The validated parameters, a `model`; `configure` changes them.

        Raises:
            RuntimeError: they are not validated yet.
        """
        if self._config is None:
            raise RuntimeError(f"the parameters of this {self.notebook} run are not validated yet")
        return self._config

    def _begin(self, parameters: Mapping[str, object]) -> None:
        self._start = time.perf_counter()
        self.page = Page(notebook=self.notebook)
        self.record = Record(self.folder, self.notebook, parameters)
        if self._earlier:
            self.record.notes.append(self._earlier)
        begin(self.record)

    def configure(self, **values: Any) -> None:
        """Change parameters, all or none.

        Raises:
            ParameterError: an unknown name or a value that is refused; nothing has changed then.
        """
        config = self.config.changed(**values)
        config.check_files()
        self._config = config
        self._shown.changed(self._table(), self._changed())

    def begin_again(self) -> None:
        """Start over with the parameters as they are now; forget what an earlier pass through the notebook recorded."""
        self._shown.results_begin(in_panel=bool(self.stage))
        self._begin(self.config.model_dump())
        self._earlier = ""  # a further pass through the notebook has nothing to do with it
        self._tell()

    def _tell(self) -> None:
        for listener in self.listeners:
            listener()

    def refuse_changed(self) -> None:
        """Refuse to go on where parameters are not those that this pass through the notebook began with.

        Raises:
            ParameterError: names them.
        """
        if changed := self._changed():
            raise ParameterError(f"{', '.join(changed)} changed since the plan was made; make the plan again.")

    def _changed(self) -> list[str]:
        """The parameters that are not those that this pass through the notebook began with."""
        now = self.config.model_dump()
        return [name for name, value in self.record.parameters.items() if name in now and now[name] != value]

    def take_entries(self) -> None:
        """Take what was entered in the panel before Run All, or before the kernel was restarted; say what holds."""
        entries = entered(self.folder, self.cell)
        if not entries:
            return
        names, by = ", ".join(entries), proposed_by(self.folder)
        whose = f"Filled in by {by}.ipynb" if by else "Entered in the panel"
        try:
            self.configure(**entries)
        except RwkvLabError as e:
            first = str(e).splitlines()[0]
            print(f"{whose}: {names}. It is not complete, and the cell above holds meanwhile: {first}")
        else:
            print(f"{whose}, and kept: {names}. Reset in the panel takes the values of the cell above.")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the seconds that a stage takes."""
        start = time.perf_counter()
        yield
        self.record.seconds[stage] = time.perf_counter() - start

    def output_path(self, name: str) -> Path:
        """Where the output goes: parameter `out`, or `name` in the report folder."""
        return Path(self.config.out or self.folder / name)

    def may_overwrite(self) -> bool:
        """An output without a name of its own belongs to the report folder, and is replaced with the report."""
        return self.config.overwrite or not self.config.out

    def show_figure(self, name: str, title: str, caption: str, figure: Any) -> None:
        """Display a matplotlib Figure and put it into the report; at its end the run writes it as `<name>.png`."""
        from IPython.core.display import HTML, Image
        from IPython.display import display

        from rwkv_lab.plotting import dark_png, png  # matplotlib takes a second that validation need not wait for

        picture = Picture(title, caption, png(figure), dark_png(figure), name)
        self.page.pictures.append(picture)
        display(HTML(picture.as_html()) if frontend_present() else Image(picture.png, width=900))

    def command(self) -> str:
        """The shell command that repeats this run."""
        own = {str(f.path.absolute()) for f in self.record.outputs}
        replaces = getattr(self.config, "out", None) in own
        return command(self.notebook, self.config.model_dump(), self.folder, self.record.cwd, replaces)

    def fail(self, error: BaseException) -> None:
        """Record that the run failed, and write the report of it; the report of an earlier run that went well stays."""
        if isinstance(error, KeyboardInterrupt):
            error = KeyboardInterrupt(INTERRUPTED)
        self.record.status, self.record.error = "failed", error
        self._end()
        say(f"FAIL    {type(error).__name__}\nreport  {self.record.report}")

    def finish(self, must_pass: bool) -> None:
        """Write `result.json` and `report.html` for good; print the verdict, where they are, and what was found.

        Args:
            must_pass: a check that failed makes the run fail. False where finding faults is the job.
        Raises:
            OutputError: a check failed.
        """
        failed = self.record.failed_checks
        if failed and must_pass:
            advice = "Do not use the output; " if self.record.outputs else ""
            raise OutputError(
                f"{len(failed)} of {len(self.record.checks)} checks failed, first: {failed[0]}.\n"
                f"{advice}the report has all checks."
            )
        self.record.status, self.record.error = "ok", None
        self._end()
        found = f"\nfound   {self.page.summary}" if self.page.summary else ""
        say(f"{verdict(self.record):7} {verdict_in_words(self.record)}{found}\nreport  {self.record.report}")
        print(f"result  {self.folder / 'result.json'}\nagain   {self.command()}")

    def _end(self) -> None:
        self.record.seconds["total"] = time.perf_counter() - self._start
        if self.page.summary:
            self.record.metrics["summary"] = self.page.summary
        close(self.record, self.page, can_repeat=self._config is not None)
        self._tell()

    def after_cell(self, result: Any) -> None:
        """Called by IPython after every cell: one that raised while the run was on makes the run fail."""
        error = result.error_before_exec or result.error_in_exec
        if error is not None and self.record.status == "running":
            self.fail(error)

    def advise_in_words(self, error: BaseException) -> None:
        """In batch, have an error of ours say what to pass as papermill takes it."""
        if isinstance(error, RwkvLabError) and not frontend_present():
            error.args = (advice_in_words(str(error), self.model.model_fields),)

    def _ipython_display_(self) -> None:
        if not frontend_present():
            raise NotImplementedError  # what IPython takes for: show it as any other object
        self._shown.parameters(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def __repr__(self) -> str:
        return repr(self._table())

    def _table(self) -> Table:
        values = self.config.model_dump()
        stands_for = self.model.stands_for(values)
        rows = []
        for name, field in self.model.model_fields.items():
            here = ", entered in the panel" if self.cell.get(name, values[name]) != values[name] else ""
            here += f", here {stands_for[name]}" if values[name] in (None, "", []) and name in stands_for else ""
            rows.append((name, _as_literal(values[name]) + here, field.description))
        return Table(f"Parameters of this {self.notebook} run", ("parameter", "value", "what it is"), rows)


@checked
def start(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Validate the parameters of a notebook and open its run; `result.json` has the status "running" from here on.

    Args:
        notebook: its name, such as "merge".
        namespace: the notebook's `globals()`. In batch every public plain variable in it must be a parameter; in
            JupyterLab a person's own variables may be there too.
    Raises:
        ParameterError: a wrong name, type or value; `result.json` has the status "failed" then, and the error.
        OutputError: the report folder cannot be made.
    """
    wanted = namespace.get("report")
    given = {name: namespace[name] for name in parameters_of(notebook).model_fields if name in namespace}
    folder = _report_folder(notebook, wanted if isinstance(wanted, str) else "")
    run = Run(notebook, folder, given)
    _join_kernel(run)
    for note in run.record.notes:
        say(note)
    try:
        config = read_parameters(run.model, namespace, names_are_all=not frontend_present())
        run._config = config = config.changed(report=str(run.folder))
        run.record.parameters = config.model_dump()
        config.check_files()
        run.cell = config.model_dump()
        if frontend_present():  # the panel is there at once; a cell that uses the demo files trains them
            run.take_entries()
            run.record.parameters = run.config.model_dump()
        else:
            with run.timed("demo"):
                train_demo(config)
    except BaseException as e:
        run.advise_in_words(e)
        run.fail(e)
        raise
    run.record.write()
    return run


@checked
def check_parameters(notebook: str, values: Mapping[str, Any]) -> None:
    """Refuse what `start` would, in the process that is about to start a kernel for it; a kernel takes a second.

    Args:
        values: those of the parameters cell, and in their place those that were given.
    Raises:
        ParameterError: as `start`, which leaves `result.json` and the report of the refusal.
        RwkvLabError: of a file, as `start`.
    """
    try:
        read_parameters(parameters_of(notebook), values, names_are_all=True).check_files()
    except RwkvLabError:
        start(notebook, values)  # says the same, and writes it down
        raise


def _report_folder(notebook: str, wanted: str) -> Path:
    folder = Path(os.path.expanduser(wanted)).absolute() if wanted.strip() else reports_folder() / notebook
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the report folder {folder} is a file; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        raise OutputError(f"the report folder {folder} cannot be made: {e}") from e
    return folder


def _join_kernel(run: Run) -> None:
    """Register for cells that raise, in the place of an earlier run, and show the package's log under the cells."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:  # plain Python: exceptions reach the caller
        return
    for callback in list(shell.events.callbacks["post_run_cell"]):
        if isinstance(getattr(callback, "__self__", None), Run):
            shell.events.unregister("post_run_cell", callback)
    shell.events.register("post_run_cell", run.after_cell)

    def show(shell: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: Any = None) -> None:
        run.advise_in_words(error)
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((RwkvLabError,), show)
    if not frontend_present():  # at its end Python would look a second for garbage among all that torch made
        atexit.register(gc.freeze)
    log = logging.getLogger("rwkv_lab")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)


def _as_literal(value: object) -> str:
    return value if isinstance(value, str) and value else repr(value)
