"""Figures of merge.ipynb: which tensors moved, and how far single weights did."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rwkv_lab.analysis.deltas import BINS, Delta
from rwkv_lab.merge.effect import MergeEffect, in_percent
from rwkv_lab.plotting import BLUE, GREY, layer_map, quiet, single
from rwkv_lab.text import counted


def moved_per_layer(changes: Sequence[Delta], n_layer: int, subtitle: str) -> Figure:
    """Layer × matrix heat map of how far tensors moved, and bars for those outside the layers.

    Args:
        changes: tensors that may have moved; matrices without any are left out.
        subtitle: base, tuned and method.
    """
    relative = {d.name: d.relative for d in changes if not d.new}
    new = {d.name: d.rms for d in changes if d.new}
    if new and not relative:  # the base has none of these tensors, so there is no norm to divide by
        return layer_map(
            new, n_layer, "New tensors, which the base does not have", subtitle, "root mean square of the values"
        )
    marked = {n for n in new if n not in relative}
    title = "What moved: ‖merged − base‖ / ‖base‖ of each tensor"
    return layer_map(
        relative | dict.fromkeys(marked, np.nan),
        n_layer,
        title,
        subtitle,
        "relative Frobenius norm, + is new",
        {"+": marked},
    )


def arrived(effect: MergeEffect, n_layer: int, subtitle: str) -> Figure:
    """Layer × matrix map of how much of the asked-for change reached the output's dtype; × marks unchanged tensors.

    Args:
        effect: of the tensors that were to change.
        subtitle: base, tuned and method.
    """
    changed = len(effect.tensors) - len(effect.unchanged)
    title = f"{changed} of {counted(len(effect.tensors), 'target')} changed"
    if effect.wanted:
        title += f"; {in_percent(effect.share)} of the asked-for change arrived"
    shares = {t.name: t.share if t.changed else 0.0 for t in effect.tensors}
    marks = {"×": {t.name for t in effect.unchanged}}
    unit = "share of ‖Δ‖ that reached the output, × is unchanged"
    return layer_map(shares, n_layer, title, subtitle, unit, marks, shares=True)


def delta_histogram(changes: Sequence[Delta], subtitle: str) -> Figure:
    """How many weights moved how far: |Δ| in bins that double, over all tensors that may have moved."""
    counts = sum((d.histogram for d in changes), np.zeros(BINS, dtype=np.int64))
    total, still = int(counts.sum()), int(counts[0])
    share = f"{still / total:.1%}" if still else "none"
    subtitle += f"\nof {total:,} weights in tensors that changed, {share} stayed where they were"
    if counts[-1]:  # the exponent of NaN and Inf
        subtitle += f", {counts[-1]:,} became NaN or Inf"
    figure, axes = single(3.0, "How far single weights moved", subtitle)
    used = np.flatnonzero(counts[1:-1]) + 1
    if len(used):
        bins = np.arange(used[0], used[-1] + 1)
        axes.bar(2.0 ** (bins - 127.0), counts[bins], width=2.0 ** (bins - 127.0) * 0.94, align="edge", color=BLUE)
        axes.set_xscale("log")
    else:
        axes.text(0.5, 0.5, "no weight moved", ha="center", transform=axes.transAxes, color=GREY)
    axes.set_xlabel("|merged − base| of a weight")
    axes.set_ylabel("weights")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    quiet(axes)
    return figure
