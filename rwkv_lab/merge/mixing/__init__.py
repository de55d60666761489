"""Methods that mix whole models. Each is a typed function on tensors in a file of its own; a new one is listed here."""

from collections.abc import Callable

from rwkv_lab.merge.mixing.dare_linear import dare_linear
from rwkv_lab.merge.mixing.dare_ties import dare_ties
from rwkv_lab.merge.mixing.linear import linear
from rwkv_lab.merge.mixing.model_stock import model_stock
from rwkv_lab.merge.mixing.signature import Parameter, Signature, signature_of
from rwkv_lab.merge.mixing.slerp import slerp
from rwkv_lab.merge.mixing.task_arithmetic import task_arithmetic
from rwkv_lab.merge.mixing.ties import ties

MIXING: dict[str, Callable] = {
    f.__name__: f for f in (linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, model_stock)
}

__all__ = ["MIXING", "Parameter", "Signature", "signature_of"]
