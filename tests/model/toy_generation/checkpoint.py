"""What a checkpoint has to know of RWKV-0.1, a toy: it would be `rwkv_lab/checkpoint/generations/rwkv01.py`."""

from rwkv_lab.checkpoint.generation import ATT, TIME_STATE, Generation, Shapes, ffn, matrices, register


def _recognise(s: Shapes, dim_att: int) -> tuple[str, str] | None:
    mark = s.first(ATT + "time_toy")
    return ("0.1", mark) if mark else None


register(
    Generation(
        versions=("0.1",),
        recognised_by="time_toy (0.1)",
        recognise=_recognise,
        n_head=lambda s, version, dim_att: s.numel(ATT + "time_toy"),
        block=lambda m: {"att.time_toy": (m.n_head,), **matrices(m, gate=False), **ffn(m, receptance=False)},
        names=dict.fromkeys((r"\.att\.time_toy$", TIME_STATE), ("0.1",)),
    )
)
