"""Figures of what tuning changed; each answers the question in its title."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rwkv_lab.peft.spectra import Spectrum
from rwkv_lab.workbench.figures import _CYCLE, BLUE, ORANGE, quiet, titled


def spectra_by_matrix(spectra: Sequence[Spectrum], subtitle: str) -> Figure:
    """Singular values of every change, relative to its largest, a panel per kind of matrix and a line per layer."""
    kinds: dict[str, list[Spectrum]] = {}
    for s in spectra:
        kinds.setdefault(_kind(s.name), []).append(s)
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    figure = titled(0.9 + 1.9 * rows, "In how many directions do matrices change?", subtitle)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        for i, s in enumerate(members):
            values = s.singular_values[s.singular_values > 0] / max(s.spectral, 1e-300)
            shade = 0.25 + 0.75 * (i + 1) / len(members)
            axes.semilogy(range(1, len(values) + 1), values, color=BLUE, alpha=shade, linewidth=1.2)
        axes.set_title(kind, fontsize=9)
        quiet(axes)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("σ / largest σ")
    for axes in grid[-1]:
        axes.set_xlabel("singular value, by size")
    return figure


def ranks_by_matrix(spectra: Sequence[Spectrum], subtitle: str) -> Figure:
    """Effective rank and the ranks that keep 90 and 99 % of the change's squares, as means over the layers."""
    kinds: dict[str, list[Spectrum]] = {}
    for s in spectra:
        kinds.setdefault(_kind(s.name), []).append(s)
    figure = titled(1.3 + 0.36 * len(kinds), "Which rank would have been enough?", subtitle)
    axes = figure.subplots()
    measures = {
        "effective rank": lambda s: s.effective_rank,
        "keeps 90 %": lambda s: s.rank_for(0.9),
        "keeps 99 %": lambda s: s.rank_for(0.99),
    }
    at = np.arange(len(kinds))
    for i, (label, measure) in enumerate(measures.items()):
        means = [np.mean([measure(s) for s in members]) for members in kinds.values()]
        axes.barh(at + 0.27 * (i - 1), means, height=0.24, label=label, color=_CYCLE[i])
    axes.set_yticks(at, list(kinds), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("rank, mean over the layers")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


def cosines_by_matrix(cosines: Mapping[str, float], subtitle: str) -> Figure:
    """Cosine between two changes of each matrix that both have."""
    figure = titled(1.3 + 0.2 * len(cosines), "Do the two tunings pull the same way?", subtitle)
    axes = figure.subplots()
    at = np.arange(len(cosines))
    values = np.array(list(cosines.values()), float)
    axes.barh(at, np.nan_to_num(values), color=np.where(values < 0, ORANGE, BLUE), height=0.7)
    axes.set_yticks(at, list(cosines), fontsize=7, family="monospace", parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1, 1)
    axes.set_xlabel("cosine: 1 the same direction, 0 nothing in common, −1 opposite")
    quiet(axes)
    return figure


def costs_of_dropping(costs: Mapping[str, float], with_all: float, without: float, subtitle: str) -> Figure:
    """Bits per byte that are lost when one layer's tuning is taken out."""
    figure = titled(1.5 + 0.26 * len(costs), "Which layers' tuning matters?", subtitle)
    axes = figure.subplots()
    at = np.arange(len(costs))
    axes.barh(at, [value - with_all for value in costs.values()], color=BLUE, height=0.7)
    axes.set_yticks(at, list(costs), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(without - with_all, color=ORANGE, linestyle="--", label="all of it taken out")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("bits per byte of held-out text lost without it (higher: it matters more)")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


def effect_along_text(divergence: np.ndarray, subtitle: str) -> Figure:
    """Kullback-Leibler divergence of predictions with and without the tuned state, token by token."""
    figure = titled(2.6, "How long does the tuned state speak?", subtitle)
    axes = figure.subplots()
    axes.plot(range(1, len(divergence) + 1), divergence, color=BLUE, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_xlabel("token of the text")
    axes.set_ylabel("KL, nats")
    quiet(axes)
    return figure


def _kind(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" and len(parts) > 3 else name
