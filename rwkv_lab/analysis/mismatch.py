"""Where two runs of a model start to differ: the first tensor, in the order of computation, and the token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rwkv_lab.analysis.agreement import LIMITS, Execution, ModeRow, error_curve, in_dtype
from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.capture import capture
from rwkv_lab.model.dual import RWKV_Dual


@dataclass(frozen=True)
class Mismatch:
    """Where two runs part: what is computed from here on depends on it."""

    name: str  # as `capture` calls it: "blocks.3.att.w", or "logits"
    layer: int | None  # None behind the last layer
    token: int  # first position whose error is above the limit
    error: float  # RMS of the difference at that position, relative to the RMS of the whole tensor
    limit: float

    def __str__(self) -> str:
        where = "behind the last layer" if self.layer is None else f"in layer {self.layer}"
        meaning = _MEANING.get(self.name.split(".", 2)[-1], self.name)
        return (
            f"The runs part {where}, from token {self.token} on, at {meaning}.\n"
            f"{self.name} differs by {self.error:.1e} there (limit {self.limit:.0e}); everything before it agrees."
        )


_MEANING = {
    "x": "what comes in: for layer 0 the embedding or ln0, else the sum of what the layer before gives",
    "att.x": "ln1, the norm before the time mix",
    "att.r": "r, the receptance",
    "att.w": "w, the log-decay",
    "att.v": "v, the value",
    "att.a": "a, how much is taken out of the state again",
    "att.kk": "kk, the normalised key",
    "att.k": "k, the key",
    "att.g": "g, the gate",
    "att.y": "y, the WKV operator, whose inputs agree",
    "att.out": "the time mix behind the WKV operator: norm over heads, bonus, gate or output matrix",
    "ffn.x": "ln2, the norm before the channel mix",
    "ffn.r": "r of the channel mix, its receptance",
    "ffn.k": "k of the channel mix, its key",
    "ffn.out": "the channel mix behind its activation: the value matrix",
    "logits": "the logits: ln_out or the head",
}


@dataclass(frozen=True)
class Failure:
    """A run of `compare_modes` that failed, and where it departs from one that is right."""

    row: ModeRow
    beside: str  # what it was compared with: "float64", or the name of another run
    mismatch: Mismatch | None  # None where no single tensor is beyond the limit
    limit: float  # of a tensor at one token

    @property
    def where(self) -> str:
        """Layer, operator and token in words."""
        if self.mismatch:
            return str(self.mismatch)
        return f"No tensor inside is off by {self.limit:.0e} at any token: small errors of all layers add up."


@checked
def first_mismatch(
    reference: Execution, suspect: Execution, tokens: torch.Tensor, limit: float | None = None
) -> Mismatch | None:
    """The first tensor, in the order of computation, in which two runs over tokens `[B,T]` differ.

    Two modes or backends of one model, or two models: a good one and a copy that misbehaves. `print` it: it says where.
    Everything inside both runs is kept for comparison: some hundred tokens of a large model are enough.

    Args:
        limit: error at one position, relative to the RMS of the whole tensor; None for ten times the limit of the
            coarser dtype of the two, since single positions vary.

    Returns:
        None where everything agrees.

    Raises:
        ParameterError: two models that do not have the same layers and sizes.
    """
    one, other = reference.model.layout, suspect.model.layout
    if str(one) != str(other):
        raise ParameterError(f"These models cannot be compared:\n{one}\n{other}")
    if limit is None:
        limit = 10 * max(LIMITS[run.model.emb.weight.dtype] for run in (reference, suspect))
    (expected, expected_logits), (found, logits) = (_captured(run, tokens) for run in (reference, suspect))
    for name in (*expected, "logits"):
        pair = (logits, expected_logits) if name == "logits" else (found[name], expected[name])
        curve = error_curve(*pair)
        bad = (~(curve <= float(limit))).nonzero()  # NaN is bad
        if len(bad):
            layer = None if name == "logits" else int(name.split(".")[1])
            return Mismatch(name, layer, int(bad[0]), float(curve[bad[0]]), limit)
    return None


@checked
def explain_failures(model: RWKV_Dual, tokens: torch.Tensor, rows: Sequence[ModeRow]) -> list[Failure]:
    """For every mode and backend that failed in `compare_modes`, in the first dtype where it did: where it departs.

    Args:
        model: the model that was compared, in the widest of the dtypes.
        tokens: `[B,T]`, the same as then.
        rows: what `compare_modes` returned.
    """
    found: list[Failure] = []
    for row in rows:
        seen = {(failure.row.mode, failure.row.backend) for failure in found}
        if not row.problem and not row.passed and (row.mode, row.backend) not in seen:
            found.append(_explain(model, tokens, row, rows))
    return found


def _explain(model: RWKV_Dual, tokens: torch.Tensor, row: ModeRow, rows: Sequence[ModeRow]) -> Failure:
    rounded = in_dtype(model, row.dtype)
    suspect = Execution(rounded, row.mode, row.backend)
    first = next(r for r in rows if r.dtype == row.dtype and not r.problem)
    if row.apart <= row.limit:  # it agrees with its like, so that all of them are off
        reference = Execution(in_dtype(rounded, torch.float64), backend="reference")
        beside, limit = "float64", row.accuracy
    else:
        reference = Execution(rounded, first.mode, first.backend)
        beside, limit = first.name, row.limit
    for bound in (10 * limit, limit):  # the coarse one first: single positions vary
        mismatch = first_mismatch(reference, suspect, tokens, bound)
        if mismatch:
            return Failure(row, beside, mismatch, bound)
    return Failure(row, beside, None, limit)


def _captured(run: Execution, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with capture(run.model) as seen:
        logits, _ = run(tokens)
    return dict(seen), logits
