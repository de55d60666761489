"""Figures of a sweep: a metric over each parameter, and the trade-off of two metrics.

Narrow enough to be read on a phone.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rwkv_lab.plotting import CYCLE, short
from rwkv_lab.workbench.pages import without_folders
from rwkv_lab.workbench.sweep.spec import value_in_words

_SIZE = (4.7, 3.4)  # inches
_MARKS = "osD^vP*X"
_SERIES = len(CYCLE)
Point = tuple[Mapping[str, Any], Mapping[str, float]]  # what was swept, the metrics


def by_parameter(points: Sequence[Point], name: str, metric: str, names: Sequence[str]) -> Figure:
    """A metric over one parameter; the colour is of another one that has a few values.

    Args:
        names: the parameters that differ between runs.
    """
    points = [point for point in points if metric in point[1] and name in point[0]]
    colour = _for_colour(points, [n for n in names if n != name])
    figure, axes = _axes()
    numeric = all(_is_number(swept[name]) for swept, _ in points)
    labels = _labels(value_in_words(swept[name]) for swept, _ in points)
    places = [*labels]
    for i, (label, group) in enumerate(_groups(points, colour)):
        x = [swept[name] if numeric else places.index(value_in_words(swept[name])) for swept, _ in group]
        y = [metrics[metric] for _, metrics in group]
        axes.scatter(x, y, s=26, color=CYCLE[i % _SERIES], marker=_MARKS[i % len(_MARKS)], label=label, alpha=0.85)
        if numeric:
            axes.plot(*_means(x, y), color=CYCLE[i % _SERIES], linewidth=1.3)
    if numeric:
        values = [swept[name] for swept, _ in points]
        if min(values, default=0) > 0 and max(values) / min(values) >= 50:
            axes.set_xscale("log")
    else:
        rotation = 20 if max(map(len, labels.values())) > 8 else 0
        axes.set_xticks(range(len(labels)), labels.values(), rotation=rotation, ha="center", parse_math=False)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel(name)
    axes.set_ylabel(_in_lines(metric))
    _legend(figure, axes, colour)
    return figure


def trade_off(points: Sequence[Point], x: str, y: str, front: Sequence[int], names: Sequence[str]) -> Figure:
    """One metric over another, a point for each run; runs on the front are joined.

    Args:
        front: numbers of the points that are on it.
    """
    colour = _for_colour(points, list(names))
    figure, axes = _axes()
    both = [point for point in points if x in point[1] and y in point[1]]
    for i, (label, group) in enumerate(_groups(both, colour)):
        xs, ys = ([metrics[of] for _, metrics in group] for of in (x, y))
        axes.scatter(xs, ys, s=26, color=CYCLE[i % _SERIES], marker=_MARKS[i % len(_MARKS)], label=label, alpha=0.85)
    on = sorted((points[i][1][x], points[i][1][y]) for i in front if x in points[i][1] and y in points[i][1])
    if on:
        axes.plot(*zip(*on, strict=True), color="#8a8f98", linewidth=1.3, linestyle="--", label="front", zorder=0)
    axes.set_xlabel(x)
    axes.set_ylabel(_in_lines(y))
    _legend(figure, axes, colour)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _for_colour(points: Sequence[Point], names: Sequence[str]) -> str:
    """The parameter that colours stand for: the one with the fewest values, two at least; "" where there is none."""
    counts = {name: len({value_in_words(swept.get(name)) for swept, _ in points}) for name in names}
    few = [name for name, count in counts.items() if 1 < count <= _SERIES]
    return min(few, key=lambda name: (all(_is_number(s.get(name)) for s, _ in points), counts[name]), default="")


def _groups(points: Sequence[Point], name: str) -> list[tuple[str, list[Point]]]:
    if not name:
        return [("", list(points))]
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(value_in_words(point[0].get(name)), []).append(point)
    labels = _labels(found)
    return [(labels[value], group) for value, group in found.items()]


def _means(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The mean of y at each x, in the order of x."""
    at: dict[float, list[float]] = {}
    for one, value in zip(x, y, strict=True):
        at.setdefault(one, []).append(value)
    places = sorted(at)
    return places, [sum(at[place]) / len(at[place]) for place in places]


def _legend(figure: Figure, axes: Axes, name: str) -> None:
    if name:
        handles, labels = axes.get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) < 16 else 1
        figure.legend(
            handles, labels, title=short(name), ncols=columns, loc="outside lower left", frameon=False, fontsize=9
        )


def _in_lines(metric: str) -> str:
    """A dotted name in lines that are short enough for the height of a figure."""
    return "\n".join(textwrap.wrap(short(metric).replace(".", ". "), 22)).replace(". ", ".")


def _labels(values: Iterable[str]) -> dict[str, str]:
    """Labels of different values, short and without folders, by value; those that would be the same are numbered."""
    cut = {value: short(without_folders(value)) for value in values}
    again = {label for label, count in Counter(cut.values()).items() if count > 1}
    return {v: f"{label} ({n})" if label in again else label for n, (v, label) in enumerate(cut.items(), 1)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
