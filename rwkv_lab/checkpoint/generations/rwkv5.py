"""RWKV-5.0, 5.1 and 5.2: heads with one decay each, then a gate, then one decay per channel."""

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.generation import (
    ATT,
    FFN_RECEPTANCE,
    GATE,
    LN_X,
    TIME_FAAAA,
    TIME_FIRST,
    TIME_MIX,
    TIME_STATE,
    Generation,
    Shapes,
    ffn,
    ln_x,
    matrices,
    register,
    vectors,
)

VERSIONS = ("5.0", "5.1", "5.2")


def _recognise(s: Shapes, dim_att: int) -> tuple[str, str] | None:
    mark = s.first(*(f"{ATT}time_mix_{z}" for z in "kvr"))
    if not mark or not s.first(ATT + "ln_x.weight", ATT + "ln_x.bias"):
        return None
    # One decay per head, or one per channel: a squeezed [1, N] of a one-head 5.2 model counts N = dim_att values.
    if s.numel(ATT + "time_decay") == dim_att:
        return "5.2", ATT + "time_decay"
    return ("5.1" if s.first(ATT + "gate.weight", ATT + "time_mix_g") else "5.0"), ATT + "time_decay"


def _n_head(s: Shapes, version: str, dim_att: int) -> int:
    return s.heads(ATT + "time_faaaa", dim_att) if version == "5.2" else s.numel(ATT + "time_decay")


def _block(m: Layout) -> dict[str, Shape]:
    gated, per_channel = m.version != "5.0", m.version == "5.2"
    decay: Shape = (m.n_head, m.head_size) if per_channel else (m.n_head,)
    return {
        "att.time_decay": decay,
        "att.time_faaaa" if per_channel else "att.time_first": decay,
        **vectors(m, "att", ("time_mix_k", "time_mix_v", "time_mix_r") + (("time_mix_g",) if gated else ())),
        **matrices(m, gate=gated),
        **ln_x(m),
        **vectors(m, "ffn", ("time_mix_k", "time_mix_r")),
        **ffn(m),
    }


register(
    Generation(
        versions=VERSIONS,
        recognised_by="time_mix_* with ln_x (5)",
        recognise=_recognise,
        n_head=_n_head,
        block=_block,
        names={
            r"\.att\.time_mix_g$": ("5.1", "5.2"),
            TIME_FAAAA: VERSIONS,
            GATE: ("5.1", "5.2"),
            TIME_MIX: VERSIONS,
            TIME_FIRST: ("5.0", "5.1"),
            FFN_RECEPTANCE: VERSIONS,
            LN_X: VERSIONS,
            TIME_STATE: VERSIONS,
        },
        also_named={"att.time_first": "att.time_faaaa"},  # the `r2` files of 5.0 and 5.1
    )
)
