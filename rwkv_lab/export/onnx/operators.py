"""How the registered WKV operators are written in ONNX: over a sequence as one `Scan`, for one token without one.

Inputs and formulas are those of `rwkv_lab.wkv`; T is the axis that `Scan` runs along. Everything that does not depend
on the state is computed for all tokens before the loop, and each vector enters it as a row `[B,H,1,K]` or a column
`[B,H,V,1]`. onnxruntime asks for the shape of everything that a body gives out.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

from rwkv_lab.export.onnx.linear_attention import attend6
from rwkv_lab.export.onnx_folder import Recurrence
from rwkv_lab.wkv import operators  # noqa: F401  makes torch.ops.rwkv_lab known

# Types of values, whose names stand for axes; within a body, onnxruntime wants all of them.
Tensor = FLOAT[...]
Both = tuple[Tensor, Tensor]
Channels, Channel = FLOAT["B", "A"], FLOAT["A"]
Matrix, RowK = FLOAT["B", "H", "V", "K"], FLOAT["B", "H", 1, "K"]
ColumnK, ColumnV = FLOAT["B", "H", "K", 1], FLOAT["B", "H", "V", 1]

# onnxscript reads these functions, it does not run them; type checkers take its annotations for expressions.
# pyright: basic, reportInvalidTypeForm=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportReturnType=false, reportGeneralTypeIssues=false

# ------------------------------------------------------------------ over a sequence


@script(default_opset=op)
def _scan4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool) -> Both:
    @graph()
    def body(
        a: Channels, b: Channels, p: Channels,
        uk: Channels, k: Channels, v: Channels, w: Channel,
    ):  # fmt: skip
        q = op.Max(p, uk)
        past = op.Exp(p - q)
        now = op.Exp(uk - q)
        y: Channels = (past * a + now * v) / (past * b + now)
        decayed = p + w
        p1: Channels = op.Max(decayed, k)
        past = op.Exp(decayed - p1)
        now = op.Exp(k - p1)
        a1: Channels = past * a + now * v
        b1: Channels = past * b + now
        return a1, b1, p1, y

    first = op.Constant(value_int=0)
    second = op.Constant(value_int=1)
    third = op.Constant(value_int=2)
    one = op.Constant(value_ints=[1])
    k_t = op.Transpose(k, perm=[1, 0, 2])
    v_t = op.Transpose(v, perm=[1, 0, 2])
    w_t = op.Expand(w, op.Concat(op.Shape(k, start=1, end=2), op.Shape(w), axis=0))  # [T,A]
    a, b, p, y = op.Scan(
        op.Gather(state, first, axis=1), op.Gather(state, second, axis=1), op.Gather(state, third, axis=1),
        k_t + u, k_t, v_t, w_t, body=body, num_scan_inputs=4,
    )  # fmt: skip
    state_out = op.Concat(op.Unsqueeze(a, one), op.Unsqueeze(b, one), op.Unsqueeze(p, one), axis=1)
    return op.Transpose(y, perm=[1, 0, 2]), state_out


@script(default_opset=op)
def _scan6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool) -> Both:
    @graph()
    def body(
        S: Matrix, r: ColumnK, d: RowK,
        k: RowK, v: ColumnV,
    ):  # fmt: skip
        y: ColumnV = op.MatMul(S, r)
        S1: Matrix = S * d + v * k
        return S1, y

    row = op.Constant(value_ints=[-2])
    column = op.Constant(value_ints=[-1])
    S, y = op.Scan(
        state,
        op.Unsqueeze(op.Transpose(r, perm=[1, 0, 2, 3]), column),
        op.Unsqueeze(op.Exp(op.Transpose(w, perm=[1, 0, 2, 3])), row),
        op.Unsqueeze(op.Transpose(k, perm=[1, 0, 2, 3]), row),
        op.Unsqueeze(op.Transpose(v, perm=[1, 0, 2, 3]), column),
        body=body, num_scan_inputs=4,
    )  # fmt: skip
    read = op.Transpose(op.Squeeze(y, column), perm=[1, 0, 2, 3])
    bonus = op.ReduceSum(r * u * k, column, keepdims=1) * v
    return read + bonus, S


@script(default_opset=op)
def _scan7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    keep: bool,
) -> Both:  # fmt: skip
    @graph()
    def body(
        S: Matrix, r: ColumnK, d: RowK,
        k: RowK, v: ColumnV, a: ColumnK, b: RowK,
    ):  # fmt: skip
        S1: Matrix = S * d + op.MatMul(S, a) * b + v * k
        y: ColumnV = op.MatMul(S1, r)
        return S1, y

    row = op.Constant(value_ints=[-2])
    column = op.Constant(value_ints=[-1])
    S, y = op.Scan(
        state,
        op.Unsqueeze(op.Transpose(r, perm=[1, 0, 2, 3]), column),
        op.Unsqueeze(op.Exp(op.Transpose(w, perm=[1, 0, 2, 3])), row),
        op.Unsqueeze(op.Transpose(k, perm=[1, 0, 2, 3]), row),
        op.Unsqueeze(op.Transpose(v, perm=[1, 0, 2, 3]), column),
        op.Unsqueeze(op.Transpose(a, perm=[1, 0, 2, 3]), column),
        op.Unsqueeze(op.Transpose(b, perm=[1, 0, 2, 3]), row),
        body=body, num_scan_inputs=6,
    )  # fmt: skip
    return op.Transpose(op.Squeeze(y, column), perm=[1, 0, 2, 3]), S


# ------------------------------------------------------------------ for one token, T = 1


@script(default_opset=op)
def _step4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool) -> Both:
    a, b, p = op.Split(state, axis=1, num_outputs=3)  # [B,1,A], as k and v are
    uk = k + u
    q = op.Max(p, uk)
    past = op.Exp(p - q)
    now = op.Exp(uk - q)
    y = (past * a + now * v) / (past * b + now)
    decayed = p + w
    p1 = op.Max(decayed, k)
    past = op.Exp(decayed - p1)
    now = op.Exp(k - p1)
    return y, op.Concat(past * a + now * v, past * b + now, p1, axis=1)


@script(default_opset=op)
def _step6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool) -> Both:
    # [B,1,H,N] -> [B,H,N,1] or [B,H,1,N]: no axis but the one of length 1 moves.
    v_column = op.Transpose(v, perm=[0, 2, 3, 1])
    k_row = op.Transpose(k, perm=[0, 2, 1, 3])
    read = op.Transpose(op.MatMul(state, op.Transpose(r, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])
    bonus = op.ReduceSum(r * u * k, op.Constant(value_ints=[-1]), keepdims=1) * v
    return read + bonus, state * op.Exp(op.Transpose(w, perm=[0, 2, 1, 3])) + v_column * k_row


@script(default_opset=op)
def _step7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    keep: bool,
) -> Both:  # fmt: skip
    read = op.MatMul(state, op.Transpose(a, perm=[0, 2, 3, 1]))
    decayed = state * op.Exp(op.Transpose(w, perm=[0, 2, 1, 3]))
    written = op.Transpose(v, perm=[0, 2, 3, 1]) * op.Transpose(k, perm=[0, 2, 1, 3])
    S = decayed + read * op.Transpose(b, perm=[0, 2, 1, 3]) + written
    return op.Transpose(op.MatMul(S, op.Transpose(r, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]), S


# ------------------------------------------------------------------ what torch.onnx looks up


def _with_decay_per_token(form: Callable) -> Callable:
    """`rwkv_lab::wkv6`, which is also WKV5: there the decay w is `[H,N]`, the same for all tokens."""

    def wkv6(r: Any, w: Any, k: Any, v: Any, u: Any, state: Any, keep: bool) -> Any:
        return form(r, op.Expand(w, op.Shape(r)) if len(w.shape) == 2 else w, k, v, u, state, keep)

    return wkv6


def _addcmul(x: Any, a: Any, b: Any, value: float = 1.0) -> Any:
    """torch.onnx's own multiplies by `value` too."""
    return op.Add(x, op.Mul(a, b)) if value == 1 else op.Add(x, op.Mul(value, op.Mul(a, b)))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Always a MatMul: torch.onnx's own is a Gemm for `[B,C]`."""
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def translations(one_token: bool, recurrence: Recurrence) -> dict[Callable, Callable]:
    """torch's operators -> how they are written in ONNX; for a graph of one token, or of a sequence."""
    wkv4, wkv6, wkv7 = (_step4, _step6, _step7) if one_token else (_scan4, _scan6, _scan7)
    if recurrence == "linear_attention" and not one_token:
        wkv6 = attend6
    ops: Any = torch.ops
    return {
        ops.rwkv_lab.wkv4.default: wkv4,
        ops.rwkv_lab.wkv6.default: _with_decay_per_token(wkv6),
        ops.rwkv_lab.wkv7.default: wkv7,
        ops.aten.addcmul.default: _addcmul,
        ops.aten.linear.default: _linear,
    }
