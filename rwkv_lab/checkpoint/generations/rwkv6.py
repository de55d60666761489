"""RWKV-6: decay and token shift that depend on the token, through low-rank pairs."""

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.generation import (
    ATT,
    FFN_RECEPTANCE,
    GATE,
    LN_X,
    TIME_FAAAA,
    TIME_STATE,
    Generation,
    Shapes,
    ffn,
    ln_x,
    matrices,
    register,
    vectors,
)
from rwkv_lab.errors import LayoutError


def _recognise(s: Shapes, dim_att: int) -> tuple[str, str] | None:
    mark = s.first(*(f"{ATT}time_maa_{z}" for z in "xwkvrg"))
    if mark and ATT + "gate.weight" not in s:
        raise LayoutError(f"not supported: RWKV-6 without gate ({mark} is there, {ATT}gate.weight is not)")
    return ("6.0", mark) if mark else None


def _ranks(s: Shapes, n_layer: int) -> dict[str, int]:
    return {"maa": s.matrix(ATT + "time_maa_w1")[1] // 5, "decay": s.matrix(ATT + "time_decay_w1")[1]}


def _block(m: Layout) -> dict[str, Shape]:
    C, A, D, DD = m.n_embd, m.dim_att, m.ranks["maa"], m.ranks["decay"]
    return {
        **vectors(m, "att", [f"time_maa_{z}" for z in "xwkvrg"]),
        "att.time_maa_w1": (C, 5 * D),
        "att.time_maa_w2": (5, D, C),
        "att.time_decay": (1, 1, A),
        "att.time_decay_w1": (C, DD),
        "att.time_decay_w2": (DD, A),
        "att.time_faaaa": (m.n_head, m.head_size),
        **matrices(m, gate=True),
        **ln_x(m),
        **vectors(m, "ffn", ("time_maa_k", "time_maa_r")),
        **ffn(m),
    }


register(
    Generation(
        versions=("6.0",),
        recognised_by="time_maa_* (6)",
        recognise=_recognise,
        n_head=lambda s, version, dim_att: s.heads(ATT + "time_faaaa", dim_att),
        ranks=_ranks,
        block=_block,
        names=dict.fromkeys(
            (r"\.time_maa_|\.time_decay_w[12]$", TIME_FAAAA, GATE, FFN_RECEPTANCE, LN_X, TIME_STATE), ("6.0",)
        ),
    )
)
