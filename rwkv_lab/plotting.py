"""What all figures share: colours, titles, bars and the layer × matrix map.

Each function returns a matplotlib Figure and touches no global state; colours suit the colour-blind.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from rwkv_lab.names import split_block
from rwkv_lab.text import shown

_WIDTH = 9.0  # inches
_DPI = 144
ROWS = 60  # of a heat map or a bar chart; a hostile file may have any number of names
_DARK, _LIGHT = np.array([0.051, 0.067, 0.09]), np.array([0.9, 0.93, 0.95])  # page and text of a dark report
_GREYISH = 0.12  # largest distance between red, green and blue of what counts as grey
_COLOURED = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
NAME = {"family": "monospace", "parse_math": False}  # a `$` in a tensor's name is no formula
# Okabe and Ito's colours: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8a8f98"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", "#F0E442", GREY)


def png(figure: Figure) -> bytes:
    """The figure as PNG, on white, for screens of twice the usual density. Its parts keep their places from then on."""
    figure.set_facecolor("white")
    return _drawn(figure)


def dark_png(figure: Figure) -> bytes:
    """As `png`, on a dark page: grey, black and white change places, colours stay. Changes the figure."""
    on_data = {text for axes in figure.axes if axes.images for text in axes.texts}  # their colour suits their cell
    behind = [patch for text in figure.findobj(Text) if (patch := text.get_bbox_patch()) and text not in on_data]
    for artist in [*figure.findobj(), *behind]:
        mapped = getattr(artist, "get_array", lambda: None)() is not None
        whole = isinstance(artist, (Figure, Axes))  # what these are asked for is the colour of another artist
        coloured = () if mapped or whole or artist in on_data else _COLOURED
        # All are asked for before any is set: the edge colour of error bars is their colour, and would change twice.
        colours = {what: getattr(artist, f"get_{what}", lambda: None)() for what in coloured}
        for what, colour in colours.items():
            if colour is None or (isinstance(colour, str) and colour in ("none", "auto", "inherit")):
                continue
            seen = to_rgba_array(colour)[:, 3].any()  # set, a transparent one would show at the artist's own alpha
            if seen:
                getattr(artist, f"set_{what}")(_in_dark(colour))
    return _drawn(figure)


def _drawn(figure: Figure) -> bytes:
    """PNG of the figure as it is. `savefig` would draw everything twice, since it finds the places first."""
    buffer = io.BytesIO()
    figure.set_dpi(_DPI)
    FigureCanvasAgg(figure).print_png(buffer)
    figure.set_layout_engine("none")
    return buffer.getvalue()


def _in_dark(colour: Any) -> np.ndarray:
    """RGBA of a colour, or of several, on a dark page: greys from black to white become those from light to dark."""
    rgba = to_rgba_array(colour)
    grey = np.ptp(rgba[:, :3], axis=1) < _GREYISH
    light = rgba[:, :3].mean(1, keepdims=True)
    rgba[grey, :3] = (light * _DARK + (1 - light) * _LIGHT)[grey]
    return rgba if len(rgba) != 1 else rgba[0]


def layer_map(
    values: Mapping[str, float],
    n_layer: int,
    title: str,
    subtitle: str,
    unit: str,
    marks: Mapping[str, set[str]] | None = None,
    shares: bool = False,
) -> Figure:
    """One coloured cell per tensor `blocks.<layer>.<matrix>`; tensors outside the layers are listed below.

    Args:
        values: number by tensor name, on a logarithmic scale; zero and NaN stay grey.
        unit: what the numbers are, for the colour bar.
        marks: text for a cell -> names of the tensors that carry it.
        shares: numbers are from 0 to 1, on a linear scale of that range.
    """
    cells: dict[str, dict[int, float]] = {}
    outside = {}
    for name, value in values.items():
        inside = split_block(name)
        if inside and inside[0] < n_layer:
            cells.setdefault(inside[1], {})[inside[0]] = value
        else:
            outside[name] = value
    matrices = sorted(cells, key=_natural)[:ROWS]
    if len(cells) > ROWS:
        subtitle += f"\nthe first {ROWS} of {len(cells)} matrices"
    grid = np.full((max(len(matrices), 1), max(n_layer, 1)), np.nan)
    for row, matrix in enumerate(matrices):
        for layer, value in cells[matrix].items():
            grid[row, layer] = value
    below = [f"{short(n)} {v:.3g}" for n, v in list(outside.items())[:8]]
    if len(outside) > 8:
        below[-1] = f"… and {len(outside) - 7} more"
    if below:
        subtitle += f"\noutside the layers: {',  '.join(below)}"
    figure, axes = single(max(1.0 + 0.24 * len(grid), 1.9), title, f"{subtitle}\ncolour: {unit}")
    axes.set_facecolor("#e4e7eb")
    shown_cells = np.ma.masked_where(~(grid > 0), grid)
    low, high = (0.0, 1.0) if shares else _log_scale([*values.values()])
    norm = None if shares else LogNorm(low, high)
    image = axes.imshow(shown_cells, aspect="auto", cmap="viridis", norm=norm, interpolation="none")
    image.set_clim(low, high)
    for text, names in (marks or {}).items():
        for name in names:
            inside = split_block(name)
            if inside and inside[1] in matrices:
                axes.text(inside[0], matrices.index(inside[1]), text, ha="center", va="center", fontsize=9)
    axes.set_yticks(range(len(matrices)), [short(m) for m in matrices], fontsize=8, **NAME)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    cell_borders(axes, len(grid), n_layer)
    axes.set_xlabel("layer")
    if not shown_cells.count():
        return figure  # nothing has a colour, so there is no scale to explain
    ticks = MaxNLocator(5) if shares else LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=ticks)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def bits_bars(bits: Mapping[str, Mapping[str, float]], subtitle: str) -> Figure:
    """Bits per byte of held-out text, a group of bars per text and a bar per model; lower is better.

    Args:
        bits: text -> model -> bits per byte.
    """
    models = list(dict.fromkeys(m for row in bits.values() for m in row))
    figure, axes = single(0.8 + 0.4 * len(bits) * len(models), "Held-out text before and after", subtitle)
    height = 0.8 / len(models)
    for i, model in enumerate(models):
        places = [row + (i - (len(models) - 1) / 2) * height for row, text in enumerate(bits) if model in bits[text]]
        widths = [bits[text][model] for text in bits if model in bits[text]]
        bars = axes.barh(places, widths, height * 0.9, color=CYCLE[i % len(CYCLE)], label=model)
        axes.bar_label(bars, fmt=" %.3f", fontsize=9)
    axes.set_yticks(range(len(bits)), list(bits))
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte (lower is better)")
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    quiet(axes)
    return figure


def _log_scale(values: Sequence[float]) -> tuple[float, float]:
    """Both ends of the scale of some values, whose positive and finite ones count."""
    positive = [v for v in values if v > 0 and np.isfinite(v)]
    low, high = (min(positive), max(positive)) if positive else (0.1, 1.0)
    if high / low < 4:  # a scale over a hair's breadth would make noise look like a pattern
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
    return low, high


def _natural(name: str) -> list:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def short(name: str) -> str:
    """A tensor's name for a label: printable, and at most 40 characters."""
    text = shown(name)
    return text if len(text) <= 40 else text[:39] + "…"


def titled(height: float, title: str, subtitle: str) -> Figure:
    """A figure with `height` inches for its axes, below a title and a subtitle that begin at its left edge."""
    lines = [part for line in shown(subtitle).split("\n") for part in textwrap.wrap(line, 125)]
    head = 0.42 + 0.16 * len(lines)
    whole = height + head
    figure = Figure(figsize=(_WIDTH, whole), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole)))
    figure.text(0.012, 1 - 0.1 / whole, title, fontsize=12, fontweight="bold", va="top", parse_math=False)
    figure.text(0.012, 1 - 0.36 / whole, "\n".join(lines), fontsize=9, color="#57606a", va="top", parse_math=False)
    return figure


def single(height: float, title: str, subtitle: str) -> tuple[Figure, Axes]:
    """As `titled`, with one pair of axes."""
    figure = titled(height, title, subtitle)
    return figure, figure.subplots()


def cell_borders(axes: Axes, rows: int, columns: int) -> None:
    """White lines between the cells of a map, and neither ticks nor a frame."""
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def colour_bound(values: np.ndarray) -> float:
    """Where a colour scale around zero ends: the 99.5th percentile, since a few large values would leave the rest
    pale; 1 for zeros."""
    return float(np.nanquantile(np.abs(values), 0.995)) or 1.0


def quiet(axes: Axes) -> None:
    """Axes with a light grid and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
