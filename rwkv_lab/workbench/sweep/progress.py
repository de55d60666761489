"""How far a sweep is: a page in its folder that renews itself, and a line for the terminal."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rwkv_lab.checkpoint import write_text
from rwkv_lab.progress import human_seconds
from rwkv_lab.workbench.pages import environment
from rwkv_lab.workbench.sweep.jobs import LOG, Outcome, read_json
from rwkv_lab.workbench.sweep.runs import SweepRun
from rwkv_lab.workbench.sweep.spec import shown

PAGE, SUMMARY = "progress.html", "summary.html"
_EVERY = 1.0  # seconds between two versions of the page


class SweepProgress:
    """Follows the runs of a sweep.

    folder: of the sweep.
    """

    def __init__(self, notebook: str, folder: Path, runs: Sequence[SweepRun]):
        self.notebook, self.folder, self.runs = notebook, folder, runs
        self._start, self._written = time.monotonic(), 0.0
        self._begun: dict[str, float] = {}

    def changed(self, run: SweepRun, outcome: Outcome | None) -> None:
        """Note that a run was started, where there is no outcome, or what became of it."""
        if outcome is None:
            run.state = "running"
            self._begun[run.job.name] = time.monotonic()
        else:
            run.state, run.error, run.host = outcome.status, outcome.error, outcome.host
            run.memory = outcome.memory or run.memory
            run.seconds = time.monotonic() - self._begun.get(run.job.name, time.monotonic())
            run.result = read_json(run.folder / "result.json")
            print(f"{run.state:<8} {shown(run.swept)}{f': {_first_line(run.error)}' if run.error else ''}", flush=True)
            print(f"         {self.line()}", flush=True)
        self.write(ended=False)

    def line(self) -> str:
        """Such as `12 of 60 finished, 1 failed, 2 at work, about 8 min left`."""
        count = Counter(map(_state, self.runs))
        parts = [f"{count['ok']} of {len(self.runs)} finished"]
        parts += [f"{count[state]} {words}" for state, words in _WORDS.items() if count[state]]
        left = self.seconds_left()
        return ", ".join(parts + ([f"about {human_seconds(left)} left"] if left else []))

    def seconds_left(self) -> float:
        """By the runs that this call has finished; 0 where there are none yet, or nothing is left."""
        done = sum(run.seconds > 0 for run in self.runs)
        left = sum(run.state in ("waiting", "running") for run in self.runs)
        return (time.monotonic() - self._start) / done * left if done else 0.0

    def write(self, ended: bool) -> None:
        """Write the page.

        Args:
            ended: nothing more will change, so that it need not renew itself.
        Raises:
            OutputError: the folder cannot be written to.
        """
        if not ended and time.monotonic() - self._written < _EVERY:
            return
        self._written = time.monotonic()
        page = environment().get_template("sweep/progress.html.jinja")
        text = page.render(
            notebook=self.notebook,
            line=self.line(),
            ended=ended,
            summary=SUMMARY if (self.folder / SUMMARY).is_file() else "",
            when=datetime.now().astimezone().strftime("%H:%M:%S"),
            share=sum(run.state not in ("waiting", "running") for run in self.runs) / max(len(self.runs), 1),
            rows=[
                (_state(run), shown(run.swept), run.seconds, self._link(run), _first_line(run.error))
                for run in self.runs
            ],
        )
        write_text(self.folder / PAGE, text.encode("utf-8", "replace").decode(), overwrite=True)

    def _link(self, run: SweepRun) -> str:
        return link_to(run, self.folder)


def _state(run: SweepRun) -> str:
    """The run's state; a run that a cluster was given is waiting until a worker begins it."""
    return "waiting" if run.state == "running" and not (run.folder / LOG).is_file() else run.state


_WORDS = {"failed": "failed", "skipped": "left out", "stopped": "stopped", "running": "at work"}


def link_to(run: SweepRun, folder: Path) -> str:
    """Of a run's report from the sweep's pages; "" where it has none."""
    report = run.result.get("report")
    path = Path(report) if report else run.folder / "report.html"
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) and path.is_file() else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
