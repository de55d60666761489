"""The figures of training: the loss, held-out text on the way, and methods side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rwkv_lab.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, quiet, titled
from rwkv_lab.text import counted
from rwkv_lab.train import Compared

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)  # one per method


def loss_curve(losses: Sequence[float], subtitle: str) -> Figure:
    """Training loss by step, in bits per token: every batch, and a running mean."""
    figure = titled(3.0, "Loss while training", subtitle)
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, color=SKY, linewidth=0.8, alpha=0.7, label="each batch")
    window = _window(len(losses))
    if window > 1:
        axes.plot(*_smooth(losses), color=BLUE, linewidth=2, label=f"mean of {counted(window, 'batch', 'batches')}")
        # Above the lines: they may run through any corner.
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    _by_step(axes, "loss, bits per token")
    return figure


def held_out_curve(held_out: Sequence[tuple[int, float]], before: float, subtitle: str) -> Figure:
    """Bits per byte of held-out text by step, the best one marked.

    Args:
        held_out: (steps done, bits per byte).
        before: bits per byte at step 0.
    """
    steps, bits = zip((0, before), *held_out, strict=True)
    best = int(np.argmin(bits))
    figure = titled(2.6, "Held-out text while training", subtitle)
    axes = figure.subplots()
    axes.plot(steps, bits, "o-", color=BLUE, markersize=4)
    axes.plot(steps[best], bits[best], "o", color=ORANGE, markersize=8)
    axes.annotate(
        f"best: {bits[best]:.3f}, step {steps[best]:,}",
        (steps[best], bits[best]),
        (0, 10),
        textcoords="offset points",
        ha="right" if steps[best] > max(steps) / 2 else "left",
        fontsize=9,
    )
    axes.margins(y=0.15)
    _by_step(axes, "bits per byte")
    return figure


def methods_compared(found: Sequence[Compared], subtitle: str) -> Figure:
    """What each method gains on held-out text from the same base, and its loss on the way there."""
    best = min(found, key=lambda c: c.bits_after)
    figure = titled(3.4, f"At equal trained parameters, {best.method} gains most", subtitle)
    reached, course = figure.subplots(1, 2, width_ratios=(5, 4))
    base = found[0].bits_before
    for row, (c, colour) in enumerate(zip(found, _COLOURS, strict=False)):
        reached.plot([base, c.bits_after], [row, row], color=colour, linewidth=2)
        reached.plot(c.bits_after, row, "o", color=colour, markersize=8)
        label = f"{c.bits_after:.3f}, {c.bits_after / base - 1:+.1%}"
        reached.annotate(label, (c.bits_after, row), (0, 8), textcoords="offset points", ha="left", fontsize=9)
        course.plot(*_smooth(c.losses), color=colour, linewidth=1.5, label=c.method)
    reached.axvline(base, color=GREY, linestyle="--", linewidth=1.2)
    reached.annotate(
        f"base {base:.3f} ",
        (base, 1),
        (-2, 4),
        ("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=GREY,
    )
    reached.set_yticks(range(len(found)), [c.method if c.rank is None else f"{c.method}, r {c.rank}" for c in found])
    reached.set_ylim(len(found) - 0.5, -0.7)
    reached.margins(x=0.08)
    reached.set_xlabel("held-out text, bits per byte (lower is better)")
    quiet(reached)
    course.legend(frameon=False, fontsize=9)
    _by_step(course, "loss, bits per token")
    return figure


def _by_step(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    quiet(axes)


def _window(count: int) -> int:
    """Batches to take the mean of: a twentieth of the run; of a short one ten, or a third of it."""
    return max(count // 20, min(count // 3, 10), 1)


def _smooth(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(last step of each window, mean of the window)."""
    window = _window(len(losses))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    return np.arange(window, len(losses) + 1), mean
