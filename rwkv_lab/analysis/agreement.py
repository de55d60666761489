"""Do the modes of one model agree? Every mode, backend and dtype against one run in float64, and where they part."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_lab.checks import Check
from rwkv_lab.errors import KernelError, ParameterError
from rwkv_lab.model.capture import capture
from rwkv_lab.model.dual import RWKV_Dual, RWKVMode
from rwkv_lab.model.state import RWKVState
from rwkv_lab.wkv import backends as all_backends
from rwkv_lab.wkv import use_backend

# How far two modes may be apart in the same dtype, as relative RMS.
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# How far a run may be from float64. In 16 bits all modes round alike, some dozen times per layer, so they are nearer to
# each other than to float64: a trained RWKV-7 of 12 layers in bfloat16 has 2.7e-2 in its state, and 1e-3 between modes.
ACCURACY = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# How much `ModeRow.growth` may be. Errors that settle give 1, errors in proportion to the number of tokens 2.33. Slow
# decays settle late: what is kept for 10,000 tokens gives 1.6 over 512 of them.
GROWTH = 2.0


@dataclass(frozen=True)
class ModeRow:
    """One run, beside the float64 run in TRANSFORMER mode of a model with the same (rounded) weights, and beside the
    first mode on the same backend in its own dtype. Errors are relative RMS: over all logits, and of the final state
    the worst of its parts.
    """

    mode: RWKVMode
    backend: str
    dtype: torch.dtype
    limit: float  # for logits_apart and state_apart
    accuracy: float  # the limit for logits_error and state_error
    logits_error: float = math.nan  # against float64
    state_error: float = math.nan
    logits_apart: float = math.nan  # against the first mode, same backend and dtype
    state_apart: float = math.nan
    curve: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)  # [T], logits_error per position
    problem: str = ""  # why it did not run, "" if it did

    @property
    def passed(self) -> bool:
        apart, error = (self.logits_apart, self.state_apart), (self.logits_error, self.state_error)
        return all(x <= self.limit for x in apart) and all(x <= self.accuracy for x in error)  # NaN does not pass

    @property
    def verdict(self) -> str:
        """ "PASS", "FAIL", or "not run: " and why."""
        return f"not run: {self.problem}" if self.problem else "PASS" if self.passed else "FAIL"

    @property
    def growth(self) -> float:
        """Median error of the last quarter of positions over that of the second: near 1 when errors do not pile up."""
        quarter = max(len(self.curve) // 4, 1)
        parts = self.curve[-quarter:], self.curve[-3 * quarter : -2 * quarter]
        last, second = (float(part.median()) for part in parts)
        return last / second if second else 1.0 if last == 0 else math.inf


@dataclass(frozen=True)
class Run:
    """One way to run a model: which weights, in which mode, on which backend of the WKV operator."""

    model: RWKV_Dual
    mode: RWKVMode = RWKVMode.TRANSFORMER
    backend: str = "auto"

    @torch.no_grad()
    def __call__(self, tokens, state: RWKVState | None = None) -> tuple[torch.Tensor, RWKVState]:
        """Logits `[B,T,V]` and the final state; the model's own mode stays as it is."""
        before = self.model.mode
        self.model.set_mode(self.mode)
        try:
            with use_backend(self.backend):
                return self.model(tokens, state=state)
        finally:
            self.model.set_mode(before)


def compare_modes(
    model: RWKV_Dual | str | Path,
    tokens,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    backends: Sequence[str] | None = None,
    modes: Sequence[RWKVMode] = tuple(RWKVMode),
) -> list[ModeRow]:
    """Run tokens `[B,T]` in every mode, backend and dtype, each beside float64 in TRANSFORMER mode on the
    reference operator, and mode beside mode: the same backend and dtype in the first of the modes.

    The judge has the weights as they are after rounding to the row's dtype, so that a row measures arithmetic alone.
    Costs, at a time, the memory of the model in float64 and in one of the dtypes, and logits of `B*T*V*8` bytes thrice.

    Args:
        model: a model, which stays as it is, or the path of a checkpoint.
        backends: names that `wkv7` takes; None for all that there are for each dtype.
        modes: the first is what the others are compared with.

    Returns:
        One row for each combination; a backend that cannot run here has a row that says why.

    Raises:
        ParameterError: a dtype without a limit, or tokens that do not fit.
    """
    strange = next((d for d in dtypes if d not in LIMITS), None)
    if strange is not None:
        raise ParameterError(f"There is no limit for {strange}; compare {', '.join(map(str, LIMITS))}.")
    model = RWKV_Dual.from_pretrained(model, dtype=torch.float64) if not isinstance(model, RWKV_Dual) else model
    rows = []
    for dtype in dtypes:
        rounded = in_dtype(model, dtype)
        expected, first = Run(in_dtype(rounded, torch.float64), backend="reference")(tokens), {}
        for mode in modes:
            for backend in all_backends(dtype) if backends is None else backends:
                limits = {"limit": LIMITS[dtype], "accuracy": ACCURACY[dtype]}
                try:
                    found = Run(rounded, mode, backend)(tokens)
                except KernelError as e:
                    rows.append(ModeRow(mode, backend, dtype, **limits, problem=str(e)))
                    continue
                error, apart = _errors(found, expected), _errors(found, first.setdefault(backend, found))
                rows.append(
                    ModeRow(
                        mode,
                        backend,
                        dtype,
                        **limits,
                        **{f"{what}_error": x for what, x in error.items()},
                        **{f"{what}_apart": x for what, x in apart.items()},
                        curve=_curve(found[0], expected[0]),
                    )
                )
    return rows


def check_hand_over(model: RWKV_Dual, tokens, splits: Sequence[int] | None = None) -> list[Check]:
    """Read `tokens[:, :a]` by `prefill`, the rest in RNN mode, and compare with all of it in one pass.

    Args:
        tokens: `[B,T]`, T >= 2.
        splits: values of a, 1 <= a < T; None for 1, T // 2 and T - 1.

    Returns:
        One verdict per split on the logits from position a - 1 on, one on the final state; limit by the model's dtype.

    Raises:
        ParameterError: a split outside the tokens.
    """
    T = tokens.shape[1]
    splits = sorted({1, max(T // 2, 1), T - 1}) if splits is None else splits
    wrong = next((a for a in splits if not 1 <= a < T), None)
    if wrong is not None:
        raise ParameterError(f"{T} tokens cannot be split after {wrong}: 1 to {T - 1}.")
    whole, final = Run(model)(tokens)
    limit, checks = LIMITS[model.emb.weight.dtype], []
    for a in splits:
        with torch.no_grad():
            last, state = model.prefill(tokens[:, :a])
        rest, state = Run(model, RWKVMode.RNN)(tokens[:, a:], state)
        errors = _errors((torch.cat([last[:, None], rest], 1), state), (whole[:, a - 1 :], final))
        for what in ("logits", "state"):
            name = f"{what} after {a} tokens in one pass and {T - a} one by one"
            checks.append(Check(name, errors[what], limit, errors[what] <= limit))
    return checks


def in_dtype(model: RWKV_Dual, dtype: torch.dtype) -> RWKV_Dual:
    """A copy of a model in another dtype; tuned initial states stay float32 or wider, as `from_pretrained` has them."""
    other = copy.deepcopy(model).requires_grad_(False).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".time_state"):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            other.get_parameter(name).data = parameter.detach().to(wide, copy=True)
    return other


# ---------------------------------------------------------------------- where a mismatch starts


@dataclass(frozen=True)
class Mismatch:
    """Where two runs part: what is computed from here on rests on it."""

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


def first_mismatch(reference: Run, suspect: Run, tokens, limit: float | None = None) -> Mismatch | None:
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
    runs = []
    for run in (reference, suspect):
        with capture(run.model) as seen:
            logits, _ = run(tokens)
        runs.append((seen, logits))
    (expected, expected_logits), (found, logits) = runs
    for name in (*expected, "logits"):
        pair = (logits, expected_logits) if name == "logits" else (found[name], expected[name])
        curve = _curve(*pair)
        bad = (~(curve <= limit)).nonzero()  # NaN is bad
        if len(bad):
            layer = None if name == "logits" else int(name.split(".")[1])
            return Mismatch(name, layer, int(bad[0]), float(curve[bad[0]]), limit)
    return None


def _errors(found, expected) -> dict[str, float]:
    """Relative RMS error of logits, and of the final state: the worst of its parts."""
    (logits, state), (right_logits, right_state) = found, expected
    right = right_state.tensors()
    parts = [_relative_rms(part, right[name]) for name, part in state.tensors().items()]
    return {"logits": _relative_rms(logits, right_logits), "state": max(parts)}


def _relative_rms(found, expected) -> float:
    return float(_rms(found.double() - expected.double()) / _rms(expected.double()).clamp_min(1e-300))


def _curve(found, expected) -> torch.Tensor:
    """RMS of the difference at every position `[T]`, relative to the RMS of the whole; tensors `[B,T,...]`."""
    found, expected = (x.detach().double().cpu().transpose(0, 1).flatten(1) for x in (found, expected))
    return (found - expected).square().mean(1).sqrt() / _rms(expected).clamp_min(1e-300)


def _rms(x) -> torch.Tensor:
    return x.square().mean().sqrt()
