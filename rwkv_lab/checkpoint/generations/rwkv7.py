"""RWKV-7: low-rank pairs for decay, rate, gate and the mix with the first layer's values."""

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.generation import (
    ATT,
    LN_X,
    TIME_STATE,
    Generation,
    Shapes,
    ffn,
    ln_x,
    matrices,
    register,
    vectors,
)

# Layer 0 makes v_first, which its own v0, v1 and v2 would mix in: most files lack them, nothing reads them.
UNUSED = ("att.v0", "att.v1", "att.v2")


def _recognise(s: Shapes, dim_att: int) -> tuple[str, str] | None:
    mark = s.first(ATT + "r_k", ATT + "k_k")
    return ("7.0", mark) if mark else None


def _ranks(s: Shapes, n_layer: int) -> dict[str, int]:
    found = {name: s.matrix(f"{ATT}{name}1")[1] for name in "wag"}
    # Layer 0 has no use for v1: released files leave it out, so a one-layer model may have none at all.
    v1 = s.first(*(f"blocks.{i}.att.v1" for i in [*range(1, n_layer), 0]))
    if v1 or n_layer > 1:
        found["v"] = s.matrix(v1 or "blocks.1.att.v1")[1]
    return found


def _block(m: Layout) -> dict[str, Shape]:
    C, A = m.n_embd, m.dim_att
    shapes = vectors(m, "att", [f"x_{z}" for z in "rwkvag"])
    for name, rank in m.ranks.items():
        if name != "g":
            shapes[f"att.{name}0"] = (1, 1, A)
        shapes |= {f"att.{name}1": (C, rank), f"att.{name}2": (rank, A)}
    return {
        **shapes,
        "att.k_k": (1, 1, A),
        "att.k_a": (1, 1, A),
        "att.r_k": (m.n_head, m.head_size),
        **matrices(m, gate=False),
        **ln_x(m),
        **vectors(m, "ffn", ("x_k",)),
        **ffn(m, receptance=False),
    }


register(
    Generation(
        versions=("7.0",),
        recognised_by="r_k (7)",
        recognise=_recognise,
        n_head=lambda s, version, dim_att: s.heads(ATT + "r_k", dim_att),
        ranks=_ranks,
        block=_block,
        names=dict.fromkeys(
            (r"\.att\.(r_k|k_k|k_a|x_[rwkvag]|[wav]0|[wavg][12])$|\.ffn\.x_k$", LN_X, TIME_STATE), ("7.0",)
        ),
        unused_in_layer_0=UNUSED,
    )
)
