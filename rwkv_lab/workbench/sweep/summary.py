"""What came out of a sweep: `summary.html` for a reader, `summary.json` and `summary.csv` for a script."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import write_text
from rwkv_lab.progress import human_seconds
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.workbench.pages import environment
from rwkv_lab.workbench.report import Picture
from rwkv_lab.workbench.result import write_json
from rwkv_lab.workbench.sweep.progress import SUMMARY, link_to
from rwkv_lab.workbench.sweep.runs import SweepRun
from rwkv_lab.workbench.sweep.spec import SweepSpec, shown, swept_names, value_in_words

_COLUMNS = 4  # metrics in the table where the spec names none
_PARAMETERS = 4  # with figures of their own
_NOT_FOUND = ("disk_free", "memory_free")  # of the machine, not of the run


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a result's metrics, by dotted name, and its seconds."""
    found: dict[str, float] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = value

    walk({k: v for k, v in (result.get("metrics") or {}).items() if k not in _NOT_FOUND}, "")
    walk((result.get("seconds") or {}).get("total"), "seconds")
    return found


def varying(runs: Sequence[SweepRun]) -> list[str]:
    """The metrics that are not the same in all runs, seconds left out; in the order of the first run."""
    all_of = [metrics_of(run.result) for run in runs if run.state == "ok"]
    names = dict.fromkeys(name for one in all_of for name in one)
    return [n for n in names if n != "seconds" and len({one.get(n) for one in all_of}) > 1]


def ranked(runs: Sequence[SweepRun], metric: str, more: bool) -> list[SweepRun]:
    """The runs that are ok and have a metric, the best first.

    Args:
        more: whether more of it is better.
    """
    found = [(metrics_of(run.result)[metric], run) for run in runs if metric in metrics_of(run.result)]
    return [run for _, run in sorted(found, key=lambda pair: -pair[0] if more else pair[0])]


def front(runs: Sequence[SweepRun], objectives: Mapping[str, bool]) -> list[SweepRun]:
    """The runs that no other is better than by one objective without being worse by another.

    Args:
        objectives: metric -> whether more of it is better.
    """
    signed = []
    for run in runs:
        values = metrics_of(run.result)
        if run.state == "ok" and all(name in values for name in objectives):
            signed.append((run, [-values[name] if more else values[name] for name, more in objectives.items()]))
    return [run for run, own in signed if not any(_beats(other, own) for _, other in signed)]


def write_summary(
    notebook: str, spec: SweepSpec, runs: Sequence[SweepRun], folder: Path
) -> tuple[Path, SweepRun | None]:
    """Write the three files.

    Returns:
        the page, and the best run by the first objective.
    Raises:
        OutputError: the folder cannot be written to.
    """
    objectives = {**dict.fromkeys(spec.minimise, False), **dict.fromkeys(spec.maximise, True)}
    ok = [run for run in runs if run.state == "ok"]
    there = dict.fromkeys(name for run in ok for name in metrics_of(run.result))
    missing = [f"no run has the metric {n}{did_you_mean(n, there)}" for n in objectives if ok and n not in there]
    objectives = {name: more for name, more in objectives.items() if name in there}
    order = _in_order(runs, objectives)
    best = order[0] if objectives and order and order[0].state == "ok" else None
    on_front = front(ok, dict(list(objectives.items())[:2])) if len(objectives) > 1 else []
    content = {
        "notebook": notebook,
        "spec": spec.model_dump(),
        "runs": [_as_dict(run, folder) for run in order],
        "best": best and best.job.name,
        "front": [run.job.name for run in on_front],
        "notes": missing,
    }
    write_json(folder / "summary.json", content)
    write_text(folder / "summary.csv", _csv(order, spec), overwrite=True)
    columns = list(objectives) or varying(ok)[:_COLUMNS]
    facts = _Facts(notebook, spec, order, folder, columns, objectives, best, on_front, missing)
    write_text(folder / SUMMARY, facts.page(), overwrite=True)
    return folder / SUMMARY, best


class _Facts:
    """What the page shows."""

    def __init__(
        self,
        notebook: str,
        spec: SweepSpec,
        runs: list[SweepRun],
        folder: Path,
        columns: list[str],
        objectives: dict[str, bool],
        best: SweepRun | None,
        on_front: list[SweepRun],
        missing: list[str],
    ):
        self.notebook, self.spec, self.runs, self.folder = notebook, spec, runs, folder
        self.columns, self.objectives, self.best, self.on_front, self.missing = (
            columns,
            objectives,
            best,
            on_front,
            missing,
        )
        self.ok = [run for run in runs if run.state == "ok"]

    def page(self) -> str:
        paths = [v for run in self.runs for v in run.swept.values() if isinstance(v, str) and v.startswith("/")]
        text = (
            environment(paths)
            .get_template("sweep/summary.html.jinja")
            .render(
                notebook=self.notebook,
                headline=self._headline(),
                sentences=[*self._sentences(), *self.missing],
                names=swept_names(self.spec),
                columns=self.columns,
                rows=[self._row(run) for run in self.runs],
                fixed=[(name, value) for name, value in self.spec.fixed.items()],
                figures=self._figures(),
                wrong=[(shown(run.swept), run.state, run.error) for run in self.runs if run.error],
                when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            )
        )
        return text.encode("utf-8", "replace").decode()

    def _headline(self) -> str:
        count = Counter(run.state for run in self.runs)
        words = {"failed": "failed", "skipped": "left out", "stopped": "stopped", "waiting": "to be run"}
        also = [f"{count[state]} {said}" for state, said in words.items() if count[state]]
        return f"{count['ok']} of {len(self.runs)} runs are ok{''.join(f', {one}' for one in also)}."

    def _sentences(self) -> list[str]:
        said = []
        for metric, more in self.objectives.items():
            order = ranked(self.ok, metric, more)
            best, worst = (metrics_of(order[at].result)[metric] for at in (0, -1))
            which = "most" if more else "least"
            said.append(
                f"The {which} {metric}: {best:.4g}, with {shown(order[0].swept)}; the others up to {worst:.4g}."
            )
        if len(self.objectives) > 1:
            first, second = list(self.objectives)[:2]
            said.append(
                f"On the front of {first} and {second}: {len(self.on_front)} of {len(self.ok)} runs. "
                "No other is better by one of the two without being worse by the other."
            )
        return said

    def _row(self, run: SweepRun) -> dict[str, Any]:
        values = metrics_of(run.result)
        return {
            "state": run.state,
            "mark": "best" if run is self.best else "front" if run in self.on_front else "",
            "swept": [(n, value_in_words(run.swept[n]) if n in run.swept else "") for n in swept_names(self.spec)],
            "values": [(name, f"{values[name]:.5g}" if name in values else "") for name in self.columns],
            "seconds": human_seconds(values["seconds"]) if "seconds" in values else "",
            "link": link_to(run, self.folder),
        }

    def _figures(self) -> list[Picture]:
        if len(self.ok) < 2 or not self.columns:
            return []
        from rwkv_lab.plotting import dark_png, png  # matplotlib takes a second
        from rwkv_lab.workbench.sweep import figures

        points = [(run.swept, metrics_of(run.result)) for run in self.ok]
        made = []
        if len(self.columns) > 1:
            at = [i for i, run in enumerate(self.ok) if run in self.on_front]
            x, y = self.columns[:2]
            caption = f"Trade-off: {x} and {y}"
            made.append((caption, figures.trade_off(points, x, y, at, swept_names(self.spec))))
        names = [n for n in swept_names(self.spec) if len({str(swept.get(n)) for swept, _ in points}) > 1]
        for metric in self.columns:
            for name in names[:_PARAMETERS]:
                made.append((f"{metric} by {name}", figures.by_parameter(points, name, metric, names)))
        return [Picture(caption, "", png(figure), dark_png(figure), "") for caption, figure in made]


def _in_order(runs: Sequence[SweepRun], objectives: Mapping[str, bool]) -> list[SweepRun]:
    """The best first, then those that have no such number, then those that are not ok."""
    ok = [run for run in runs if run.state == "ok"]
    metric, more = next(iter(objectives.items()), ("", False))
    first = ranked(ok, metric, more)
    return [*first, *(run for run in ok if run not in first), *(run for run in runs if run.state != "ok")]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def _as_dict(run: SweepRun, folder: Path) -> dict[str, Any]:
    return {
        "name": run.job.name,
        "state": run.state,
        "error": run.error,
        "swept": run.swept,
        "parameters": run.job.parameters,
        "folder": str(run.folder),
        "report": link_to(run, folder),
        "attempts": run.attempts,
        "memory": run.memory,
        "host": run.host,
        "metrics": metrics_of(run.result),
    }


def _csv(runs: Sequence[SweepRun], spec: SweepSpec) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in metrics_of(run.result)))
    names = swept_names(spec)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "state", *names, *metrics, "error"])
    for run in runs:
        values = metrics_of(run.result)
        swept = [value_in_words(run.swept[name]) if name in run.swept else "" for name in names]
        writer.writerow([run.job.name, run.state, *swept, *(values.get(m, "") for m in metrics), run.error])
    return text.getvalue()
