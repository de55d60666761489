"""The figures of modes.ipynb: whether the modes agree, and what goes on inside the model."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from rwkv_lab.analysis.agreement import ModeRow
from rwkv_lab.dtypes import long_name
from rwkv_lab.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, cell_borders, colour_bound, quiet, titled

_EXACT = 1e-17  # below the precision of float64; an error of 0 is drawn as this
_DTYPES = (BLUE, ORANGE, GREEN, PURPLE)  # as many as `compare_modes` has limits for
_STYLES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)))
_HALF_LIVES = 2.0 ** np.arange(-4, 20.5, 0.5)  # tokens; edges of the bins
_HEADS = 16  # state images of one figure


def agreement_matrix(rows: Sequence[ModeRow], subtitle: str) -> Figure:
    """Mode and backend down, dtype across: each run's error beside float64, and mode beside mode."""
    modes = list(dict.fromkeys(row.mode.value for row in rows))
    runs = sorted(dict.fromkeys((row.mode.value, row.backend) for row in rows), key=lambda run: modes.index(run[0]))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = titled(0.9 + 0.52 * len(runs), "Do the modes agree? Error of each run, with its verdict", subtitle)
    panels = figure.subplots(1, 2, sharey=True)
    scale = LogNorm(_EXACT, 1)
    beside = ("beside float64, same rounded weights", "beside the first mode, same backend and dtype")
    for axes, heading, against_float64 in zip(panels, beside, (True, False), strict=True):
        grid = np.full((len(runs), len(dtypes)), np.nan)
        limits = {}
        for row in rows:
            y, x = runs.index((row.mode.value, row.backend)), dtypes.index(row.dtype)
            error = row.error if against_float64 else row.apart
            limits[row.dtype] = row.accuracy if against_float64 else row.limit
            grid[y, x] = max(error, _EXACT)
            _write_verdict(axes, x, y, row, error, limits[row.dtype], scale)
        image = axes.imshow(np.ma.masked_invalid(grid), cmap="cividis", norm=scale, aspect="auto")
        axes.set_facecolor("#e4e7eb")
        axes.set_title(heading, fontsize=9, loc="left")
        axes.set_xticks(range(len(dtypes)), [f"{long_name(d)}\nlimit {limits[d]:.0e}" for d in dtypes], fontsize=9)
        axes.set_yticks(range(len(runs)), [f"{mode}, {backend}" for mode, backend in runs], fontsize=9)
        cell_borders(axes, len(runs), len(dtypes))
    bar = figure.colorbar(image, ax=panels, pad=0.02, aspect=25, ticks=LogLocator(numticks=6))
    bar.set_label("relative RMS error", fontsize=9)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def _write_verdict(axes, x: int, y: int, row: ModeRow, error: float, limit: float, scale: LogNorm) -> None:
    if row.problem:
        axes.text(x, y, "not run", ha="center", va="center", fontsize=9, color=GREY)
        return
    passed = error <= limit
    dark = np.isfinite(error) and scale(max(error, _EXACT)) < 0.55  # cividis ends in yellow
    text = f"{'PASS' if passed else 'FAIL'}\n{f'{error:.1e}' if error else 'exactly 0'}"
    weight = "normal" if passed else "bold"
    color = "white" if dark else "black"
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=color, weight=weight, zorder=3)
    if not passed:
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, ec=ORANGE, lw=3, zorder=2))


def error_growth(rows: Sequence[ModeRow], subtitle: str) -> Figure:
    """Error of the logits along the sequence, a line per run, and the limit of each dtype."""
    figure = titled(3.9, "Does the error grow along the text? Logits beside float64, at every position", subtitle)
    axes = figure.subplots()
    runs = list(dict.fromkeys((row.mode, row.backend) for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for row in rows:
        curve = row.curve.numpy()
        if not np.nansum(curve) > 0:
            continue  # not run, or the reference itself, which a logarithm cannot show
        window = max(len(curve) // 32, 1)
        mean = np.convolve(curve, np.ones(window) / window, mode="valid")
        axes.plot(
            np.arange(len(mean)) + window / 2,
            mean,
            color=_DTYPES[dtypes.index(row.dtype)],
            linestyle=_STYLES[runs.index((row.mode, row.backend)) % len(_STYLES)],
            linewidth=1.4,
            label=f"{long_name(row.dtype)}, {row.mode.value}, {row.backend}",
        )
    length = max(len(row.curve) for row in rows)
    for i, (dtype, limit) in enumerate(dict((row.dtype, row.accuracy) for row in rows).items()):
        axes.axhline(limit, color=_DTYPES[i], linewidth=0.8, alpha=0.6)
        text = f"limit of {long_name(dtype)}"
        axes.text(length, limit, text, color=_DTYPES[i], fontsize=8, ha="right", va="bottom")
    axes.set_yscale("log")
    axes.set_xlabel("position in the sequence, tokens")
    axes.set_ylabel("relative RMS error")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    quiet(axes)
    return figure


def half_lives(log_decays: Sequence[np.ndarray], subtitle: str) -> Figure:
    """How long channels remember: per layer, which share of them halves in how many tokens, and the median.

    Args:
        log_decays: for each layer the log-decays w <= 0 of all channels and tokens, in any shape.
    """
    figure = titled(3.6, "How long do channels remember? Half-life of the state, per layer", subtitle)
    axes = figure.subplots()
    n_layer = len(log_decays)
    with np.errstate(divide="ignore"):  # no decay at all: a half-life without end
        lives = [np.log(2) / -w.ravel() for w in log_decays]
    inside = [np.clip(x, _HALF_LIVES[0], _HALF_LIVES[-1] * 0.999) for x in lives]
    shares = np.stack([np.histogram(x, _HALF_LIVES)[0] / x.size for x in inside], 1)
    edges = np.arange(n_layer + 1) - 0.5
    image = axes.pcolormesh(edges, _HALF_LIVES, np.ma.masked_equal(shares, 0) * 100, cmap="viridis", vmin=0)
    median = [np.median(x) for x in inside]
    axes.plot(range(n_layer), median, "o", ms=5, color=ORANGE, mec="white", label="median of the layer")
    used = np.flatnonzero(shares.any(1))
    lowest, highest = _HALF_LIVES[used[0]], _HALF_LIVES[used[-1] + 1]
    axes.set_ylim(float(lowest), float(max(highest, 20 * lowest)))  # so that a power of ten is among the ticks
    axes.set_yscale("log")
    axes.set_ylabel("half-life, tokens")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel("layer")
    quiet(axes)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, borderpad=0)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=25).set_label("share of the layer's channels, %", fontsize=9)
    return figure


def state_sizes(positions: Sequence[int], sizes: np.ndarray, what: str, subtitle: str) -> Figure:
    """How large the state is along a text, a line per layer.

    Args:
        positions: tokens read so far, P of them.
        sizes: `[P,L]`.
        what: what is measured, for the axis.
    """
    figure = titled(3.4, "How large does the state get along the text? One line per layer", subtitle)
    axes = figure.subplots()
    n_layer = sizes.shape[1]
    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, n_layer)))  # its last yellows are hard to see
    for layer in range(n_layer):
        axes.plot(positions, sizes[:, layer], color=colors(layer), linewidth=1.6)
    if (sizes > 0).any():
        axes.set_yscale("log")
    axes.set_xlabel("tokens read")
    axes.set_ylabel(what)
    norm = BoundaryNorm(np.arange(n_layer + 1) - 0.5, n_layer)
    ticks = MaxNLocator(integer=True, nbins=8).tick_values(0, n_layer - 1)
    shown = [int(t) for t in ticks if 0 <= t < n_layer and t == int(t)]
    figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02, aspect=25, ticks=shown).set_label("layer")
    quiet(axes)
    return figure


def state_images(images: np.ndarray, title: str, subtitle: str, down: str, across: str, each: str) -> Figure:
    """Matrices side by side on one scale, blue below and red above zero; of many the first 16.

    Args:
        images: `[n, rows, columns]`.
        down, across: what rows and columns are.
        each: what one of them is ("head"); "" where there is one only.
    """
    drawn = images[:_HEADS]
    if len(images) > _HEADS:
        subtitle += f"\nthe first {_HEADS} of {len(images)}"
    columns = min(max(len(drawn), 3), 8) if each else 1  # a single head need not fill the page
    lines = -(-len(drawn) // columns)
    figure = titled(max(0.5 + 1.4 * lines, 3.0 if columns <= 4 else 0), title, subtitle)
    grid = figure.subplots(lines, columns, squeeze=False)
    bound = colour_bound(drawn)
    for axes in grid.flat[len(drawn) :]:
        axes.axis("off")
    for i, (axes, picture) in enumerate(zip(grid.flat, drawn, strict=False)):
        aspect = "equal" if each else "auto"
        image = axes.imshow(picture, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect=aspect, interpolation="nearest")
        if each:
            axes.set_title(f"{each} {i}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3 if each else 12))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3 if each else 12))
        axes.tick_params(labelsize=7)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(down, fontsize=8)
        axes.label_outer()
    figure.colorbar(image, ax=grid, pad=0.02, aspect=25, extend="both")
    return figure
