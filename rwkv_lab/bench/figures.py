"""The figures of the benchmark: rates beside their floors, memory, the roofline, and growth with the context."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rwkv_lab.bench.comparison import OURS, Floors, Row
from rwkv_lab.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, quiet, titled

_FLOORS = ("read floor", "FMA rate", "bf16 matmul rate")
_PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
_MARKERS = "osD^vP"


def all_figures(rows: Sequence[Row], floors: Floors, subtitle: str) -> dict[str, tuple[str, str, Figure]]:
    """Every figure that these rows have something for: file name -> (title, caption, figure)."""
    found = {}
    for subject in dict.fromkeys(row.subject for row in rows if row.job in ("decode", "prefill") and row.samples):
        title = f"Rates of {subject}"
        caption = (
            "Medians; whiskers from the slowest to the fastest sample. The tick is what the machine allowed in the "
            "same rounds: for decoding the rate at which memory is read, for prefill that of multiply-adds."
        )
        mine = [row for row in rows if row.subject == subject]
        found[f"rates-{_file(subject)}"] = (title, caption, rates(mine, title, subtitle))
    batches = [row for row in rows if row.job == "decode" and row.samples]
    if len({row.size for row in batches}) > 1:
        caption = "Tokens per second of all sequences together; the weights are read once for all of them."
        found["batches"] = ("Decoding several sequences at once", caption, batch_rates(batches, subtitle))
    if any(row.job == "wkv forward" and row.samples for row in rows):
        caption = "Forward pass. Grey: what multiply-adds and reading memory allowed in the same rounds."
        found["roofline"] = ("The WKV operators beside their roofline", caption, roofline(rows, floors, subtitle))
    if any(row.job == "load memory" and row.samples for row in rows):
        caption = "Peak of resident memory while loading, above the imports; the tick is the model's own size."
        found["memory"] = ("Memory while loading", caption, memory(rows, subtitle))
    if any(row.job.startswith("growth") for row in rows):
        caption = "The state has one size, so neither time nor memory may grow with the context."
        found["growth"] = ("Cost along the context", caption, growth(rows, subtitle))
    return found


def rates(rows: Sequence[Row], title: str, subtitle: str) -> Figure:
    """Bars of tokens per second: decoding one sequence, alone and beside a busy loop, and prefill by length."""
    panels = []
    for job in ("decode", "decode beside a busy loop", "prefill"):
        for size in sorted({row.size for row in rows if row.job == job}):
            if job == "prefill" or size == 1:
                chosen = [row for row in rows if (row.job, row.size) == (job, size)]
                heading = f"prefill, {size:,} tokens" if job == "prefill" else f"{job}, 1 sequence"
                panels.append((heading, chosen))
    panels = panels or [("decode", list(rows))]
    heights = [0.5 + 0.27 * len(chosen) for _, chosen in panels]
    figure = titled(sum(heights) + 0.35 * len(panels), title, subtitle)
    stacked = np.ravel(figure.subplots(len(panels), 1, height_ratios=heights))
    for axes, (heading, chosen) in zip(stacked, panels, strict=True):
        _bars(axes, chosen, marked=_FLOORS)
        axes.set_title(heading, fontsize=10, loc="left")
        axes.set_xlabel("tokens per second", fontsize=9)
    return figure


def _bars(axes: Axes, rows: Sequence[Row], marked: Sequence[str]) -> None:
    """A bar per row with its spread, and a tick at the floor that is nearest; rows without a rate give the reason.

    Args:
        marked: shares that are of a floor; others are only named.
    """
    widest = max((max(row.samples) for row in rows if row.samples), default=1.0)
    ends = [1.5 * widest]
    for y, row in enumerate(rows):
        if not row.samples:
            why = "its answers disagree" if row.disagrees else "it did not run"
            axes.text(widest * 0.01, y, f"no rate: {why}", va="center", fontsize=8, color="#57606a")
            continue
        low, high = row.median - min(row.samples), max(row.samples) - row.median
        axes.barh(y, row.median, 0.66, color=BLUE if row.engine == OURS else ORANGE)
        axes.errorbar(row.median, y, xerr=[[low], [high]], color="#333333", capsize=2, linewidth=1)
        note = f"{row.median:,.0f}" if row.median >= 1000 else f"{row.median:.3g}"
        if row.shares:
            floor, share = max(row.shares.items(), key=lambda item: item[1])
            note += f"  ({share:.0%} of {floor})"
            at = row.median / share if share else 0
            if floor in marked and at < 6 * widest:  # a floor too far away would press all bars to the left
                axes.plot([at, at], [y - 0.4, y + 0.4], color="black", linewidth=2)
                ends.append(1.03 * at)
        behind = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        place = max(row.samples) + 0.012 * max(ends)
        axes.text(place, y, note, va="center", fontsize=8, bbox=behind, parse_math=False)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(ends))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    quiet(axes)


def batch_rates(rows: Sequence[Row], subtitle: str) -> Figure:
    """Lines of tokens per second over the number of sequences, one per model and dtype of ours."""
    figure = titled(3.4, "Decoding several sequences at once", subtitle)
    axes = figure.subplots()
    series = dict.fromkeys((row.subject, row.dtype) for row in rows if row.engine == OURS)
    subjects = list(dict.fromkeys(subject for subject, _ in series))
    dtypes = list(dict.fromkeys(dtype for _, dtype in series))
    for subject, dtype in series:
        mine = sorted(
            (r for r in rows if (r.engine, r.subject, r.dtype) == (OURS, subject, dtype)), key=lambda r: r.size
        )
        color, marker = _PALETTE[dtypes.index(dtype) % 6], _MARKERS[subjects.index(subject) % 6]
        sizes, medians = [r.size for r in mine], [r.median for r in mine]
        axes.plot(sizes, medians, label=f"{subject} {dtype}", color=color, marker=marker)
        axes.fill_between(
            [r.size for r in mine],
            [min(r.samples) for r in mine],
            [max(r.samples) for r in mine],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    sizes = sorted({row.size for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("sequences")
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    quiet(axes)
    return figure


def roofline(rows: Sequence[Row], floors: Floors, subtitle: str) -> Figure:
    """GFLOP/s of every operator and backend over the operations it does per byte that it must move."""
    rows = [row for row in rows if row.job == "wkv forward" and row.samples]
    figure = titled(4.0, "The WKV operators beside their roofline", f"{subtitle}\n{rows[0].size:,} tokens, float32")
    axes = figure.subplots()
    x = np.geomspace(0.25, 128, 200)
    if floors.get("FMA GFLOP/s") and floors.get("read GB/s"):
        peak, read = median(floors["FMA GFLOP/s"]), median(floors["read GB/s"])
        axes.plot(x, np.minimum(peak, x * read), color=GREY, linewidth=2)
        axes.text(128, peak, f"{peak:,.0f} GFLOP/s", ha="right", va="bottom", fontsize=9, color="#57606a")
        axes.text(0.27, 0.27 * read, f"  {read:.0f} GB/s", ha="left", va="top", fontsize=9, color="#57606a")
    backends = list(dict.fromkeys(row.engine for row in rows))
    operators = list(dict.fromkeys(row.subject for row in rows))
    for row in rows:
        i, j = backends.index(row.engine), operators.index(row.subject)
        style = {"color": _PALETTE[i % 6], "marker": _MARKERS[j % 6], "s": 55, "edgecolor": "white", "zorder": 3}
        axes.scatter(row.facts["flops per byte"], row.facts["GFLOP/s"], **style)
    for i, backend in enumerate(backends):
        axes.scatter([], [], color=_PALETTE[i % 6], marker="s", label=backend)
    for j, operator in enumerate(operators):
        axes.scatter([], [], color="#333333", marker=_MARKERS[j % 6], label=operator)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("floating-point operations per byte of inputs and outputs")
    axes.set_ylabel("GFLOP/s")
    _legend(axes)
    quiet(axes)
    return figure


def memory(rows: Sequence[Row], subtitle: str) -> Figure:
    """Bars of peak memory while loading, with a tick at the size of the model."""
    rows = [row for row in rows if row.job == "load memory" and row.samples]
    subjects = list(dict.fromkeys(row.subject for row in rows))
    groups = [[row for row in rows if row.subject == subject] for subject in subjects]
    heights = [0.5 + 0.27 * len(group) for group in groups]
    figure = titled(sum(heights) + 0.35 * len(groups), "Memory while loading", subtitle)
    panels = np.ravel(figure.subplots(len(groups), 1, height_ratios=heights))
    for axes, subject, group in zip(panels, subjects, groups, strict=True):
        _bars(axes, group, marked=("the model's size",))
        axes.set_title(subject, fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("MB above the imports", fontsize=9)
    return figure


def growth(rows: Sequence[Row], subtitle: str) -> Figure:
    """Time per token and memory over the context, one line per model."""
    figure = titled(3.2, "What does a token cost after a long context?", subtitle)
    units = {"growth decode": "ms per token, decoding", "growth prefill": "ms per token, prefill"}
    units["growth memory"] = "MB above the loaded model"
    for axes, (job, unit) in zip(figure.subplots(1, 3), units.items(), strict=True):
        mine = [row for row in rows if row.job == job and row.samples]
        for i, subject in enumerate(dict.fromkeys(row.subject for row in mine)):
            line = sorted((row for row in mine if row.subject == subject), key=lambda row: row.size)
            x, y = [row.size for row in line], np.array([row.median for row in line])
            spread = [y - [min(row.samples) for row in line], [max(row.samples) for row in line] - y]
            label = f"{subject} {line[0].dtype}"
            axes.errorbar(x, y, yerr=spread, color=_PALETTE[i % 6], marker=_MARKERS[i % 6], capsize=2, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
        top = max((max(row.samples) for row in mine), default=0.0)
        axes.set_ylim(0, 1.25 * top if top > 0 else 1)
        axes.set_xlabel("tokens before", fontsize=9)
        axes.set_title(unit, fontsize=10, loc="left")
        quiet(axes)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _file(subject: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in subject)[:60]
