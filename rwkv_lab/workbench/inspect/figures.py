"""Figures of inspect.ipynb: where the bytes of a checkpoint are."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.names import split_block
from rwkv_lab.plotting import CYCLE, NAME, ROWS, quiet, short, single


def sizes_by_part(info: Mapping[str, TensorInfo], subtitle: str) -> Figure:
    """Where the bytes of a checkpoint lie, and in which dtype: a bar per part of the model."""
    parts: dict[str, dict[str, int]] = {}
    for name, tensor in info.items():
        row = parts.setdefault(_part(name), {})
        dtype = str(tensor.dtype).removeprefix("torch.")
        row[dtype] = row.get(dtype, 0) + tensor.nbytes
    names = sorted(parts, key=lambda p: -sum(parts[p].values()))[:ROWS]
    dtypes = sorted({d for row in parts.values() for d in row})
    figure, axes = single(0.8 + 0.3 * len(names), "Where the bytes are", subtitle)
    left = np.zeros(len(names))
    for i, dtype in enumerate(dtypes):
        widths = np.array([parts[p].get(dtype, 0) / 1e6 for p in names])
        axes.barh(range(len(names)), widths, 0.72, left=left, color=CYCLE[i % len(CYCLE)], label=dtype)
        left += widths
    axes.set_yticks(range(len(names)), [short(n) for n in names], fontsize=9, **NAME)
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.legend(frameon=False, loc="lower right")
    quiet(axes)
    return figure


def _part(name: str) -> str:
    inside = split_block(name)
    if not inside:
        return name.split(".")[0]
    part, *rest = inside[1].split(".")
    if part in ("att", "ffn") and len(rest) == 2 and rest[1] in ("weight", "bias"):
        return f"blocks.*.{part}.{rest[0]}"
    return f"blocks.*.{part}.*"
