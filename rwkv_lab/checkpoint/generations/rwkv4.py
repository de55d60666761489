"""RWKV-4: no heads, one decay per channel."""

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.generation import (
    ATT,
    FFN_RECEPTANCE,
    TIME_FIRST,
    TIME_MIX,
    Generation,
    Shapes,
    ffn,
    matrices,
    register,
    vectors,
)


def _recognise(s: Shapes, dim_att: int) -> tuple[str, str] | None:
    mark = s.first(*(f"{ATT}time_mix_{z}" for z in "kvr"))
    return ("4.0", s.first(ATT + "time_first") or mark) if mark else None


def _block(m: Layout) -> dict[str, Shape]:
    return {
        "att.time_decay": (m.dim_att,),
        "att.time_first": (m.dim_att,),
        **vectors(m, "att", ("time_mix_k", "time_mix_v", "time_mix_r")),
        **matrices(m, gate=False),
        **vectors(m, "ffn", ("time_mix_k", "time_mix_r")),
        **ffn(m),
    }


register(
    Generation(
        versions=("4.0",),
        recognised_by="time_mix_* (4)",
        recognise=_recognise,
        n_head=None,
        block=_block,
        names=dict.fromkeys((TIME_MIX, TIME_FIRST, FFN_RECEPTANCE), ("4.0",)),
    )
)
