"""Figures of export.ipynb: sizes, what quantisation costs each part, agreement with the model, speed."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rwkv_lab.export.sensitivity import Sensitivity
from rwkv_lab.plotting import BLUE, CYCLE, GREEN, GREY, ORANGE, quiet, single, titled
from rwkv_lab.text import counted
from rwkv_lab.workbench.export.exported import Exported, size_of

_NAMED = 5  # parts that lose most
_FLOOR = 1e-12  # of a divergence that is zero, on a logarithmic scale
_STYLES = ("-o", "--s", ":^", "-.v")
_SHAPE = re.compile(r"(?P<name>.+) at (?P<batch>\d+)x(?P<length>\d+)$")


def sizes(results: Sequence[Exported], subtitle: str) -> Figure:
    """A bar for the model, and one for each output."""
    rows = [("model", (results[0].result.original_size_mb or 0) * 1e6, GREY)]
    for one in results:
        rows += [(f"PyTorch, {one.label}", size_of(one.pytorch), GREEN)] if one.pytorch else []
        rows += [(f"ONNX, {one.label}", size_of(one.onnx), BLUE)] if one.onnx else []
    figure, axes = single(0.9 + 0.32 * len(rows), "How large is what was exported?", subtitle)
    bars = axes.barh([name for name, _, _ in rows], [size / 1e6 for _, size, _ in rows], color=[c for *_, c in rows])
    share = rows[0][1] or 1
    axes.bar_label(bars, [f" {size / 1e6:.3g} MB, {size / share:.0%}" for _, size, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("MB")
    quiet(axes)
    return figure


def agreement(results: Sequence[Exported], subtitle: str) -> Figure:
    """Divergence and changed likeliest tokens of each level, with their limits; errors over the length."""
    figure = titled(3.6, "Does it compute what the model does?", subtitle)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    labels = [one.label for one in results]
    kl = [one.measured["kl_mean"] for one in results]
    _bars(left, labels, kl, [one.gate["kl"] for one in results], "mean KL, nats per token", _FLOOR)
    left.set_yscale("log")
    left.set_ylim(bottom=max(min([value for value in kl if value > 0], default=_FLOOR) / 10, _FLOOR))
    changed = [100 * (1 - one.measured["top1"]) for one in results]
    _bars(middle, labels, changed, [100 * (1 - one.gate["top1"]) for one in results], "other likeliest token, %")
    middle.set_ylim(bottom=0)
    for place, one in enumerate(results):
        _errors(right, one, CYCLE[place % len(CYCLE)])
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("tokens")
    right.set_ylabel("largest relative error")
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    quiet(right)
    return figure


def drift(results: Sequence[Exported], subtitle: str) -> Figure:
    """The error of the state along a text."""
    figure, axes = single(3.0, "Does the state drift away from the model's?", subtitle)
    for place, one in enumerate(results):
        points = sorted((int(n), parts) for n, parts in one.measured.get("drift", {}).items())
        for part, style in zip(dict.fromkeys(p for _, parts in points for p in parts), _STYLES, strict=False):
            errors = [parts.get(part, 0.0) for _, parts in points]
            shown = [error if error > 0 else float("nan") for error in errors]
            label = f"{one.label}, {part}"
            axes.plot([n for n, _ in points], shown, style, color=CYCLE[place % len(CYCLE)], markersize=3, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("largest relative error")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    quiet(axes)
    return figure


def speed(results: Sequence[Exported], subtitle: str) -> Figure:
    """Tokens per second, one after the other; torch's own beside them where it was measured in the same run."""
    rows = []
    for one in results:
        measured = one.report.get("speed") or {}
        if one.result.inference_speed_ms:
            rows.append((f"{one.label}, onnxruntime", 1000 / one.result.inference_speed_ms, BLUE))
        if measured.get("torch_decode_ms"):
            rows.append((f"{one.label}, the model in torch", 1000 / measured["torch_decode_ms"], GREY))
    figure, axes = single(0.9 + 0.3 * len(rows), "How fast is one token after another?", subtitle)
    bars = axes.barh([name for name, *_ in rows], [rate for _, rate, _ in rows], color=[c for *_, c in rows])
    axes.bar_label(bars, [f" {rate:,.0f}/s, {1000 / rate:.2f} ms" for _, rate, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("tokens per second")
    quiet(axes)
    return figure


def sensitivity(found: Sensitivity, subtitle: str) -> Figure:
    """What each part costs in few bits, against the bytes that it saves; and the mixed choices, with the one taken."""
    figure = titled(3.8, "Which parts lose most in few bits?", subtitle)
    left, right = figure.subplots(1, 2)
    for stored, colour, mark in (("int4", ORANGE, "o"), ("int8", BLUE, "s")):
        every = [d for d in found.damages if d.stored == stored]
        some = [d for d in every if d.kl > 0]
        label = stored + (
            f", {counted(len(every) - len(some), 'part costs', 'parts cost')} nothing" if len(some) < len(every) else ""
        )
        left.plot([d.saved_bytes / 1e6 for d in some], [d.kl for d in some], mark, color=colour, ms=4, label=label)
    for d in sorted(found.damages, key=lambda d: -d.kl)[:_NAMED]:
        if not d.kl:
            continue
        text = d.group.removeprefix("blocks.")
        left.annotate(text, (d.saved_bytes / 1e6, d.kl), (5, 2), textcoords="offset points", fontsize=8)
    left.set_xlabel("MB saved against float32")
    left.margins(x=0.2)
    left.legend(frameon=False, fontsize=8)
    sizes_of, kls = zip(*[(p.bytes / 1e6, p.predicted_kl) for p in found.frontier if p.predicted_kl > 0], strict=True)
    right.plot(sizes_of, kls, "-o", color=GREY, markersize=3, label="predicted: the sum of the parts")
    if chosen := found.proposal:
        where = chosen.bytes / 1e6, max(chosen.kl, _FLOOR)
        right.plot(*where, "D", color=GREEN, label=f"taken: KL {chosen.kl:.2g} measured, {where[0]:.3g} MB")
    right.set_xlabel("MB of weights")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("mean KL, nats per token")
        quiet(axes)
    return figure


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], limits: Sequence[float], unit: str, floor: float = 0.0
) -> None:
    """A bar per level: blue within its limit, which is a short line, orange beyond.

    Args:
        floor: where the axis begins at the latest; what is below it ends there, with its number.
    """
    places = np.arange(len(labels))
    colours = [BLUE if value <= limit else ORANGE for value, limit in zip(values, limits, strict=True)]
    bars = axes.bar(places, np.maximum(values, floor), 0.6, color=colours)
    axes.bar_label(bars, [f"{value:.2g}" for value in values], fontsize=8)
    axes.hlines(limits, places - 0.4, places + 0.4, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_xticks(places, labels, fontsize=8)
    axes.set_ylabel(unit, fontsize=9)
    axes.margins(y=0.15)
    quiet(axes)


def _errors(axes: Axes, one: Exported, colour: str) -> None:
    """Largest errors of logits (solid) and of the state (dashed) by length."""
    found: dict[str, dict[int, float]] = {"logits": {}, "state": {}}
    for name, error in one.measured["errors"].items():
        match = _SHAPE.match(name)
        if match is None or not float(error) > 0:
            continue
        lengths = found["logits" if match["name"] == "logits" else "state"]
        length = int(match["length"])
        lengths[length] = max(float(error), lengths.get(length, 0.0))
    for (part, lengths), style in zip(found.items(), ("-o", "--s"), strict=True):
        if lengths:
            points = sorted(lengths.items())
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3, label=f"{one.label}, {part}")
