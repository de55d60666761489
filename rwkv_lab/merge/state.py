"""Method "state": a tuned initial state goes into the base as `blocks.i.att.time_state`, `[H, V, K]`."""

import torch

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.layout import same_shape
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge.change import Change, overwrite
from rwkv_lab.merge.overlay import same_dimensions


def changes(base: Checkpoint, tuned: Checkpoint, layout: Layout, alpha: float, precision: torch.dtype) -> list[Change]:
    """One change per layer. A whole checkpoint may serve as `tuned`: only its `time_state` is taken.

    Args:
        alpha: factor on the state, 0 to 1.
    Raises:
        LayoutError: the base's generation has no such state, or layers, heads or head sizes do not fit.
    """
    if not layout.n_head:
        raise LayoutError(f"the base is RWKV-{layout.version}, which has no time_state; states exist from RWKV-5 on")
    same_dimensions(tuned, layout)
    states = {n: t for n, t in tuned.info.items() if n.endswith(".time_state")}
    if not states:
        raise LayoutError(f"{tuned.path} has no tensor named *.time_state; it is of kind {tuned.kind!r}")
    expected = [f"blocks.{i}.att.time_state" for i in range(layout.n_layer)]
    missing, extra = [n for n in expected if n not in states], [n for n in states if n not in expected]
    if missing or extra:
        raise LayoutError(
            f"{tuned.path} holds states for {len(states)} layers, the base has {layout.n_layer} layers.\n"
            f"Missing: {', '.join(missing[:3]) or 'none'}. Not in the base: {', '.join(extra[:3]) or 'none'}."
        )
    wanted = (layout.n_head, layout.head_size, layout.head_size)
    out = []
    for name in expected:
        info = states[name]
        if not same_shape(info.shape, wanted):
            raise LayoutError(
                f"{name} in {tuned.path} has shape {list(info.shape)}; the base has {layout.n_head} heads of "
                f"{layout.head_size}, so {list(wanted)} is needed"
            )
        change = overwrite(name, base.info.get(name), info, alpha, precision)
        out.append(change)
    return out
