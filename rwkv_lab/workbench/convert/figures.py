"""Figures of convert.ipynb: logits before and after, what values became, how far they reach."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rwkv_lab.analysis.conversion import ConversionAgreement, ValueRange
from rwkv_lab.dtypes import long_name
from rwkv_lab.plotting import BLUE, GREEN, GREY, NAME, ORANGE, PURPLE, ROWS, quiet, short, single, titled
from rwkv_lab.text import counted

_POINTS = 20_000  # of a scatter plot


def logits_before_and_after(found: ConversionAgreement, subtitle: str) -> Figure:
    """Each logit of the output over the source's, and the difference at every position of the prompt."""
    figure = titled(3.4, "Does the output say what the source says? Logits on a fixed prompt", subtitle)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    expected, output = (x.flatten().numpy() for x in (found.expected, found.found))
    step = -(-len(expected) // _POINTS)
    left.plot(expected[::step], output[::step], ".", markersize=2, alpha=0.5, color=BLUE, rasterized=True)
    ends = [float(expected.min()), float(expected.max())]
    left.plot(ends, ends, color=GREY, linewidth=0.8)
    left.set_xlabel("logit of the source")
    left.set_ylabel("logit of the output")
    quiet(left)
    _by_position(right, found)
    return figure


def _by_position(axes: Axes, found: ConversionAgreement) -> None:
    errors, same = found.by_position.numpy(), found.same_likeliest.numpy()
    places = np.arange(1, len(errors) + 1)
    if errors.any():
        axes.semilogy(places, np.where(errors > 0, errors, np.nan), "-", color=GREY, linewidth=0.8)
    for mask, marker, colour, label in ((same, "o", BLUE, "same"), (~same, "x", ORANGE, "another")):
        shown = mask & (errors > 0)
        if shown.any():
            text = f"{label} likeliest token: {mask.sum()} of {len(mask)}"
            axes.plot(places[shown], errors[shown], marker, color=colour, label=text)
    if not errors.any():
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
        axes.plot(places, errors, "o", color=BLUE)
        axes.text(0.5, 0.7, "equal to the last bit", ha="center", transform=axes.transAxes, color=GREEN)
    axes.set_xlabel("position in the prompt")
    axes.set_ylabel("difference, relative RMS")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="best")
    quiet(axes)


def ranges(found: Sequence[ValueRange], subtitle: str) -> Figure:
    """From the smallest to the largest absolute value of each kind of tensor, beside what the new dtype can hold.

    Args:
        found: of tensors that were cast; of more than `ROWS` kinds those with overflow and flushing first.
    """
    rows = sorted((r for r in found if r.largest > 0), key=lambda r: -(r.overflow + r.flushed))[:ROWS]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        largest, normal, smallest = _limits(dtype)
        subtitle += f"\n{long_name(dtype)} holds {smallest:.2g} to {largest:.3g}, with all its digits from {normal:.2g}"
    if len(rows) < len(found):
        subtitle += f"\n{len(rows)} of {counted(len(found), 'kind')} of tensors"
    figure, axes = single(0.8 + 0.22 * len(rows), "Does the new dtype hold the values?", subtitle)
    axes.set_xscale("log")
    for place, row in enumerate(rows):
        _draw_range(axes, place, row)
    low, high = axes.get_xlim()
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for limit in _limits(dtype):
            if low / 1e4 < limit < high * 1e4:
                axes.axvline(limit, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [short(row.name) for row in rows], fontsize=8, **NAME)
    axes.invert_yaxis()
    axes.set_xlabel("absolute value that is not zero; blue fits, orange overflows, violet becomes zero")
    quiet(axes)
    return figure


def _draw_range(axes: Axes, place: int, row: ValueRange) -> None:
    largest, _, smallest = _limits(row.dtype)
    to_zero = smallest / 2  # rounds to zero, and all below it
    fits = max(row.smallest, to_zero), min(row.largest, largest)
    beyond, below = (largest, row.largest), (row.smallest, min(to_zero, row.largest))
    for colour, ends in ((BLUE, fits), (ORANGE, beyond), (PURPLE, below)):
        if ends[0] < ends[1] or (ends[0] == ends[1] and colour == BLUE):
            axes.plot(ends, (place, place), "-", color=colour, linewidth=5, solid_capstyle="butt")
            axes.plot(ends, (place, place), "|", color=colour, markersize=8)


def _limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """The largest finite value of a dtype, the smallest with all its digits, and the smallest above zero."""
    info = torch.finfo(dtype)
    return info.max, info.smallest_normal, info.smallest_normal * info.eps
