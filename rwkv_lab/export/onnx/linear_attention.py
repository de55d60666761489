"""The recurrence of RWKV-5 and 6 as `LinearAttention`, an operator that onnxruntime alone has (`com.microsoft`).

It computes `S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T` and reads the new state, `o_t = q_t^T S_t`; RWKV reads the old
one, and adds `(r_t · (u * k_t)) v_t` to it. So key, value and decay are fed one token late, with zeros for the first,
the addition is made outside, and so is the last token's part of the state. The state lies as `[B,H,K,V]`.

RWKV-4 has another recurrence; that of RWKV-7, whose removal vector is not its key, cannot be said in it (onnx#8181).
"""

from typing import Any

from onnxscript import FLOAT, script, values
from onnxscript import opset18 as op

from rwkv_lab.export.onnx_folder import CONTRIB

microsoft = values.Opset(CONTRIB, 1)

Tensor = FLOAT[...]
Both = tuple[Tensor, Tensor]

# onnxscript reads these functions, it does not run them; type checkers take its annotations for expressions.
# pyright: basic, reportInvalidTypeForm=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportReturnType=false, reportGeneralTypeIssues=false


@script(default_opset=op)
def _attend(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, keep: bool, heads: int) -> Both:
    time = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[2**31 - 1])
    packed = op.Constant(value_ints=[0, 0, -1])
    none = op.Expand(op.Constant(value_float=0.0), op.Shape(op.Slice(k, op.Constant(value_ints=[0]), time, time)))
    start = op.Constant(value_ints=[0])
    k_late = op.Concat(none, op.Slice(k, start, last, time), axis=1)
    v_late = op.Concat(none, op.Slice(v, start, last, time), axis=1)
    w_late = op.Concat(none, op.Slice(w, start, last, time), axis=1)
    read, S = microsoft.LinearAttention(
        op.Reshape(r, packed), op.Reshape(k_late, packed), op.Reshape(v_late, packed),
        op.Transpose(state, perm=[0, 1, 3, 2]), op.Reshape(w_late, packed),
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    y = op.Reshape(read, op.Shape(v)) + op.ReduceSum(r * u * k, last, keepdims=1) * v
    # [B,1,H,N] -> [B,H,N,1] or [B,H,1,N]
    k_last = op.Transpose(op.Slice(k, last, end, time), perm=[0, 2, 1, 3])
    w_last = op.Transpose(op.Slice(w, last, end, time), perm=[0, 2, 1, 3])
    v_last = op.Transpose(op.Slice(v, last, end, time), perm=[0, 2, 3, 1])
    return y, op.Transpose(S, perm=[0, 1, 3, 2]) * op.Exp(w_last) + v_last * k_last


def attend6(r: Any, w: Any, k: Any, v: Any, u: Any, state: Any, keep: bool) -> Any:
    """`rwkv_lab::wkv6` over a sequence; shapes as in `rwkv_lab.wkv`."""
    return _attend(r, w, k, v, u, state, keep, heads=r.shape[2])
