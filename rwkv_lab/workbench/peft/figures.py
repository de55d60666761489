"""Figures of what tuning changed; each answers the question in its title."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from rwkv_lab.analysis.spectra import Spectrum
from rwkv_lab.analysis.tuning import tensor_part
from rwkv_lab.names import split_block
from rwkv_lab.plotting import BLUE, GREEN, GREY, ORANGE, SKY, cell_borders, colour_bound, quiet, titled
from rwkv_lab.text import counted, shown

_ROWS = 60  # of a map or a bar chart
_PANELS = 12  # of a figure with one per matrix
_HEADS = 32  # of a layer, and layers, in the picture of a state
_DEPTH = 12  # orders of magnitude of singular values; below that lies float64's rounding


def counts_by_part(counts: Mapping[str, tuple[int, int]], subtitle: str) -> Figure:
    """Two bars per part of the model: its values, and those that were trained.

    Args:
        counts: part -> (values in the base, values trained).
    """
    figure = titled(1.0 + 0.36 * len(counts), "How much is trained, and where?", subtitle)
    axes = figure.subplots()
    at = np.arange(len(counts))
    for i, (label, color) in enumerate((("in the base", GREY), ("trained", BLUE))):
        values = [pair[i] for pair in counts.values()]
        bars = axes.barh(at + 0.4 * (i - 0.5), values, height=0.36, label=label, color=color)
        axes.bar_label(bars, [f" {v:,}" if v else "" for v in values], fontsize=7.5)
    _rows(axes, list(counts))
    axes.set_xscale("log")
    largest = max((max(pair) for pair in counts.values()), default=1)
    axes.set_xlim(1, max(largest, 10) ** 1.12)  # else the number behind the longest bar lies outside
    axes.set_xlabel("values")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    quiet(axes)
    return figure


def spectra_by_matrix(spectra: Sequence[Spectrum], rank: int, subtitle: str) -> Figure:
    """Singular values of every change, relative to its largest, a panel per kind of matrix and a line per layer."""
    kinds = _by_part(spectra)
    if len(kinds) > _PANELS:
        subtitle += f"\nthe first {_PANELS} of {counted(len(kinds), 'kind')} of matrices"
    kinds = dict(list(kinds.items())[:_PANELS])
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    figure = titled(0.9 + 1.9 * rows, "In how many directions does each matrix change? Singular values of Δ", subtitle)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        for i, s in enumerate(members):
            values = s.singular_values / (s.spectral or 1.0)
            values = values[values > 10.0**-_DEPTH]
            shade = 0.25 + 0.75 * (i + 1) / len(members)
            style = "o-" if len(values) < 40 else "-"
            at = range(1, len(values) + 1)
            axes.semilogy(at, values, style, color=BLUE, alpha=shade, linewidth=1.2, markersize=2.5)
        axes.axvline(rank, color=ORANGE, linestyle="--", linewidth=1, label=f"rank {rank}")
        axes.set_title(shown(kind), fontsize=9, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        quiet(axes)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    for axes in grid[:, 0]:
        axes.set_ylabel("σ / largest σ")
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel("place by size")
    return figure


def ranks_by_matrix(spectra: Sequence[Spectrum], subtitle: str) -> Figure:
    """Effective rank and the ranks that keep 90 and 99 % of the change's squares: means over the layers, and ranges."""
    kinds = _by_part(spectra)
    figure = titled(1.2 + 0.46 * len(kinds), "Which rank would have been enough?", subtitle)
    axes = figure.subplots()
    measures = {
        "effective rank": (lambda s: s.effective_rank, SKY),
        "keeps 90 %": (lambda s: s.rank_for(0.9), BLUE),
        "keeps 99 %": (lambda s: s.rank_for(0.99), GREEN),
    }
    at = np.arange(len(kinds))
    for i, (label, (measure, color)) in enumerate(measures.items()):
        found = [[measure(s) for s in members] for members in kinds.values()]
        means = np.array([np.mean(x) for x in found])
        reach = np.array([(mean - min(x), max(x) - mean) for mean, x in zip(means, found, strict=True)])
        places = at + 0.27 * (i - 1)
        axes.barh(places, means, height=0.24, label=label, color=color)
        axes.errorbar(means, places, xerr=np.maximum(reach.T, 0), fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for mean, (_, up), place in zip(means, reach, places, strict=True):
            axes.annotate(
                f"{mean:.3g}", (mean + up, place), (4, 0), textcoords="offset points", fontsize=7.5, va="center"
            )
    _rows(axes, list(kinds))
    axes.margins(x=0.1)
    axes.set_xlabel("rank")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    quiet(axes)
    return figure


def cosine_map(cosines: Mapping[str, float], title: str, subtitle: str) -> Figure:
    """Layer × matrix map of cosines, blue below and red above zero; tensors outside the layers have a column apart."""
    names = {n: split_block(n.removesuffix(".weight")) for n in cosines}
    rows = list(dict.fromkeys(m[1] if m else n.removesuffix(".weight") for n, m in names.items()))
    columns = sorted({m[0] for m in names.values() if m})
    labels = [str(x) for x in columns]
    if not all(names.values()):
        labels.append("none")
    if len(rows) > _ROWS:
        subtitle += f"\nthe first {_ROWS} of {counted(len(rows), 'matrix', 'matrices')}"
        rows = rows[:_ROWS]
    grid = np.full((len(rows), len(labels)), np.nan)
    for name, m in names.items():
        row = m[1] if m else name.removesuffix(".weight")
        if row in rows:
            grid[rows.index(row), columns.index(m[0]) if m else -1] = cosines[name]
    figure = titled(max(1.0 + 0.27 * len(rows), 1.9), title, subtitle)
    axes = figure.subplots()
    axes.set_facecolor("#e4e7eb")
    image = axes.imshow(np.ma.masked_invalid(grid), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    if len(labels) <= 16:
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(rows)), [shown(r)[:40] for r in rows], fontsize=8, family="monospace", parse_math=False)
    axes.set_xlabel("layer")
    if len(labels) <= 32:
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
    cell_borders(axes, *grid.shape)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30).set_label("cosine", fontsize=9)
    return figure


def state_heads(state: np.ndarray, subtitle: str) -> Figure:
    """Every head of every layer as a picture, blue below and red above zero, all on one scale.

    Args:
        state: `[L,H,V,K]`.
    """
    L, H = state.shape[:2]
    if max(L, H) > _HEADS:
        subtitle += (
            f"\nthe first {_HEADS} of {counted(L, 'layer')} and {H} heads" if L > _HEADS else f"\n{_HEADS} of {H} heads"
        )
    state = state[:_HEADS, :_HEADS]
    L, H, V, K = state.shape
    gap = max(V // 16, 1)
    canvas = np.full((L * (V + gap) - gap, H * (K + gap) - gap), np.nan)
    for layer in range(L):
        for head in range(H):
            y, x = layer * (V + gap), head * (K + gap)
            canvas[y : y + V, x : x + K] = state[layer, head]
    size = min(7.4 / H, 1.5)  # inches of a head
    figure = titled(min(0.8 + size * L, 14.0), "What did tuning write into each head's state?", subtitle)
    axes = figure.subplots()
    bound = colour_bound(state)
    image = axes.imshow(
        np.ma.masked_invalid(canvas), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="equal", interpolation="nearest"
    )
    axes.set_xticks([h * (K + gap) + K / 2 for h in range(H)], [str(h) for h in range(H)], fontsize=8)
    axes.set_yticks([i * (V + gap) + V / 2 for i in range(L)], [str(i) for i in range(L)], fontsize=8)
    axes.set_xlabel(f"head; in each, {K} keys across")
    axes.set_ylabel(f"layer; in each head, {V} values down")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30, extend="both").set_label("entry of the state", fontsize=9)
    return figure


def head_map(norms: np.ndarray, ranks: np.ndarray, size: int, subtitle: str) -> Figure:
    """Layer × head: how large each state is, and in how many directions it lies.

    Args:
        norms, ranks: Frobenius norm and effective rank of each head's matrix, `[L,H]`.
        size: of a full rank.
    """
    L, H = norms.shape
    figure = titled(max(0.9 + 0.3 * L, 1.9), "Which heads hold the state, and in how many directions?", subtitle)
    panels = figure.subplots(1, 2, sharey=True)
    shows = (("‖S‖ of each head", norms, None), (f"effective rank, of {size}", ranks, (0, size)))
    for axes, (label, grid, limits) in zip(panels, shows, strict=True):
        low, high = limits or (0, float(grid.max()) or 1.0)
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="none")
        if L * H <= 64:
            for (y, x), value in np.ndenumerate(grid):
                color = "black" if value > low + 0.6 * (high - low) else "white"
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        cell_borders(axes, *grid.shape)
        figure.colorbar(image, ax=axes, pad=0.02, aspect=25)
    panels[0].set_ylabel("layer")
    return figure


def effect_by_position(kl: np.ndarray, saved: np.ndarray, subtitle: str) -> Figure:
    """How far predictions with the tuned state are from those without it, token by token, and what that gains.

    Args:
        kl: divergence of both predictions after each token, in bits, `[B,T]`.
        saved: bits fewer that the next token takes with the state, `[B,T]`.
    """
    figure = titled(4.6, "Effect of the tuned state by token position, and whether it helps", subtitle)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    T = kl.shape[1]
    at = np.arange(1, T + 1)
    low, middle, high = np.quantile(kl, (0.25, 0.5, 0.75), axis=0)
    floor = max(float(kl.mean()) * 1e-6, 1e-12)
    upper.fill_between(at, np.maximum(low, floor), np.maximum(high, floor), color=SKY, alpha=0.35, linewidth=0)
    upper.plot(at, np.maximum(middle, floor), color=BLUE, linewidth=1.5)
    upper.set_yscale("log")
    upper.set_ylabel("KL, bits:\nmedian and quartiles")
    edges = [2**i for i in range(max(math.ceil(math.log2(T)), 1))]
    for start, end in zip(edges, [*edges[1:], T + 1], strict=True):
        gain = float(saved[:, start - 1 : end - 1].mean())
        up, left, right = gain >= 0, 0.97 * start, 0.97 * end
        lower.bar(left, gain, width=(right - left) * 0.96, align="edge", color=BLUE if up else ORANGE)
        lower.annotate(
            f"{gain:+.2g}",
            ((left * right) ** 0.5, gain),
            (0, 3 if up else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=8,
        )
    lower.axhline(0, color="black", linewidth=0.8)
    lower.margins(y=0.25)
    lower.set_xscale("log", base=2)
    lower.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    lower.xaxis.set_major_formatter("{x:g}")
    lower.xaxis.set_minor_formatter(NullFormatter())
    lower.set_xlim(0.95, T * 1.02)
    lower.set_xlabel("tokens read")
    lower.set_ylabel("bits saved\nper next token")
    for axes in (upper, lower):
        quiet(axes)
    figure.align_ylabels()
    return figure


def ablation_costs(costs: Sequence[Mapping[str, float]], all_of_it: float, subtitle: str) -> Figure:
    """What held-out text costs more without the tuning of one layer, or of one kind of matrix.

    Args:
        costs: label -> bits per byte more than with everything; one mapping per panel, empty ones are not drawn.
        all_of_it: the same with no tuning at all.
    """
    drawn = [panel for panel in costs if panel]
    title = "Which layers' tuning matters? What held-out text costs more without each"
    figure = titled(1.2 + 0.26 * max(map(len, drawn)), title, subtitle)
    grid = figure.subplots(1, len(drawn), squeeze=False, sharex=True)
    for axes, panel in zip(grid.flat, drawn, strict=True):
        values = np.array(list(panel.values()))
        bars = axes.barh(np.arange(len(values)), values, color=np.where(values < 0, ORANGE, BLUE), height=0.7)
        axes.bar_label(bars, [f"{v:+.3f}" for v in values], fontsize=7.5, padding=3)
        _rows(axes, list(panel))
        axes.axvline(all_of_it, color=GREEN, linestyle="--", label=f"without any of it: {all_of_it:+.3f}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.18)
        axes.set_xlabel("bits per byte more than with all of it")
        quiet(axes)
    grid[0, 0].legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def _by_part(spectra: Sequence[Spectrum]) -> dict[str, list[Spectrum]]:
    kinds: dict[str, list[Spectrum]] = {}
    for s in spectra:
        kinds.setdefault(tensor_part(f"{s.name}.weight"), []).append(s)
    return kinds


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(labels)), [shown(x)[:40] for x in labels], fontsize=8.5, parse_math=False)
    axes.invert_yaxis()
