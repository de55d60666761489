"""Do the modes of one model agree? Every mode, backend and dtype beside one run in float64."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.dtypes import long_name
from rwkv_lab.errors import DeviceError, KernelError, ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.model.dual import RWKV_Dual, RWKVMode
from rwkv_lab.model.inputs import check_tokens
from rwkv_lab.model.state import RWKVState
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted
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

_FINEST = torch.finfo(torch.float64).eps
_ENOUGH = 64  # tokens; quarters of fewer do not show growth
_COPIES = 3  # of the model in float64, at the same time: the model, the reference, the run beside it


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
    # [T], logits_error per position
    curve: torch.Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"), repr=False)
    problem: str = ""  # why it did not run, "" if it did

    @property
    def name(self) -> str:
        """ "float32, transformer, chunked"."""
        return f"{long_name(self.dtype)}, {self.mode.value}, {self.backend}"

    @property
    def error(self) -> float:
        """The larger of logits_error and state_error, for which the limit is `accuracy`; NaN where one of them is."""
        return _larger(self.logits_error, self.state_error)

    @property
    def apart(self) -> float:
        """The larger of logits_apart and state_apart, for which the limit is `limit`; NaN where one of them is."""
        return _larger(self.logits_apart, self.state_apart)

    @property
    def passed(self) -> bool:
        return self.apart <= self.limit and self.error <= self.accuracy  # NaN does not pass

    @property
    def verdict(self) -> str:
        """ "PASS", "FAIL", or "not run: " and why."""
        return f"not run: {self.problem}" if self.problem else "PASS" if self.passed else "FAIL"

    @property
    def growth(self) -> float:
        """Median error of the last quarter of positions over that of the second: near 1 when errors do not pile up.

        Errors below the rounding of float64, in which they are measured, count as that: two runs of one computation are
        equal bit for bit in some positions and not in others.
        """
        quarter = max(len(self.curve) // 4, 1)
        parts = self.curve[-quarter:], self.curve[-3 * quarter : -2 * quarter]
        last, second = (float(part.clamp(min=_FINEST).median()) for part in parts)
        return last / second


@dataclass(frozen=True)
class Execution:
    """One way to run a model: which weights, in which mode, on which backend of the WKV operator."""

    model: RWKV_Dual
    mode: RWKVMode = RWKVMode.TRANSFORMER
    backend: str = "auto"

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, state: RWKVState | None = None) -> tuple[torch.Tensor, RWKVState]:
        """Logits `[B,T,V]` and the final state after tokens `[B,T]`; the model's own mode stays as it is."""
        before = self.model.mode
        self.model.set_mode(self.mode)
        try:
            with use_backend(self.backend):
                return self.model(tokens, state=state)
        finally:
            self.model.set_mode(before)


@checked
def check_memory(ck: Checkpoint) -> int:
    """Bytes of memory that `compare_modes` needs for the model in a checkpoint; read from its header.

    Raises:
        DeviceError: so much is not free.
    """
    name, needed, free = ck.path.name, 8 * _COPIES * sum(t.numel for t in ck.info.values()), memory_free()
    if needed > free:
        raise DeviceError(
            f"{name} needs {human_bytes(needed)} of memory, {human_bytes(free)} are free: modes are compared with\n"
            "the model in float64. A smaller model of the same generation runs through the same operators."
        )
    return needed


@checked
def compare_modes(
    model: RWKV_Dual | str | Path,
    tokens: torch.Tensor,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    backends: Sequence[str] | None = None,
    modes: Sequence[RWKVMode] = tuple(RWKVMode),
) -> list[ModeRow]:
    """Run tokens `[B,T]` in every mode, backend and dtype, each beside float64 in TRANSFORMER mode on the
    reference operator, and mode beside mode: the same backend and dtype in the first of the modes.

    The reference has the weights as they are after rounding to the row's dtype, so that a row measures arithmetic
    alone. Costs, at a time, the memory of the model in float64 and in one of the dtypes, and logits of `B*T*V*8` bytes
    thrice.

    Args:
        model: a model, which stays as it is, or the path of a checkpoint; its packed weights are taken as dense ones of
            the same values.
        backends: names that `wkv7` takes; None for all that there are for each dtype.
        modes: the first is what the others are compared with.

    Returns:
        One row for each combination; a backend that cannot run here has a row that says why.

    Raises:
        ParameterError: a dtype without a limit, or tokens that do not fit.
    """
    without = next((d for d in dtypes if d not in LIMITS), None)
    if without is not None:
        raise ParameterError(f"There is no limit for {without}; compare {', '.join(map(str, LIMITS))}.")
    if not isinstance(model, RWKV_Dual):
        model = RWKV_Dual.from_pretrained(model, dtype=torch.float64, weights="dense")
    rows = []
    for dtype in dtypes:
        rounded = in_dtype(model, dtype)
        expected, first = Execution(in_dtype(rounded, torch.float64), backend="reference")(tokens), {}
        for mode in modes:
            for backend in all_backends(dtype) if backends is None else backends:
                try:
                    found = Execution(rounded, mode, backend)(tokens)
                except KernelError as e:
                    rows.append(ModeRow(mode, backend, dtype, LIMITS[dtype], ACCURACY[dtype], problem=str(e)))
                    continue
                error, apart = _errors(found, expected), _errors(found, first.setdefault(backend, found))
                curve = error_curve(found[0], expected[0])
                rows.append(ModeRow(mode, backend, dtype, LIMITS[dtype], ACCURACY[dtype], *error, *apart, curve))
    return rows


@checked
def agreement_checks(rows: Sequence[ModeRow]) -> list[Check | NotApplicable]:
    """Two checks per row: logits and state beside float64, and beside the first mode."""
    checks: list[Check | NotApplicable] = []
    for row in rows:
        if row.problem:
            checks.append(NotApplicable(row.name, row.problem))
            continue
        for error, limit, beside in (
            (row.error, row.accuracy, "float64"),
            (row.apart, row.limit, "the first mode"),
        ):
            name = f"{row.name}: logits and state beside {beside}"
            checks.append(Check(name, _digits(error), limit, error <= limit))
    return checks


@checked
def growth_checks(rows: Sequence[ModeRow]) -> list[Check | NotApplicable]:
    """One check per row that ran: the error along the text does not grow without bound."""
    checks: list[Check | NotApplicable] = []
    for row in rows:
        if row.problem:
            continue
        name = f"{row.name}: error at the end over error in the second quarter of the text"
        if len(row.curve) < _ENOUGH:
            checks.append(
                NotApplicable(name, f"{counted(len(row.curve), 'token is', 'tokens are')} too few to tell growth")
            )
        else:
            checks.append(Check(name, _digits(row.growth), GROWTH, row.growth <= GROWTH))
    return checks


@checked
def check_hand_off(model: RWKV_Dual, tokens: torch.Tensor, splits: Sequence[int] | None = None) -> list[Check]:
    """Read `tokens[:, :a]` by `prefill`, the rest in RNN mode, and compare with all of it in one pass.

    Args:
        tokens: `[B,T]`, T >= 2.
        splits: values of a, 1 <= a < T; None for 1, T // 2 and T - 1.

    Returns:
        One verdict per split on the logits from position a - 1 on, one on the final state; limit by the model's dtype.

    Raises:
        ParameterError: a split outside the tokens.
    """
    tokens = check_tokens(model, tokens)
    T = tokens.shape[1]
    splits = sorted({1, max(T // 2, 1), T - 1}) if splits is None else splits
    wrong = next((a for a in splits if not 1 <= a < T), None)
    if wrong is not None:
        raise ParameterError(f"{counted(T, 'token cannot', 'tokens cannot')} be split after {wrong}: 1 to {T - 1}.")
    whole, final = Execution(model)(tokens)
    dtype = model.emb.weight.dtype
    limit, checks = LIMITS[dtype], []
    for a in splits:
        with torch.no_grad():
            last, state = model.prefill(tokens[:, :a])
        rest, state = Execution(model, RWKVMode.RNN)(tokens[:, a:], state)
        errors = _errors((torch.cat([last[:, None], rest], 1), state), (whole[:, a - 1 :], final))
        for what, error in zip(("logits", "state"), errors, strict=True):
            name = f"{long_name(dtype)}: {what} after {counted(a, 'token')} in one pass and {T - a} one by one"
            checks.append(Check(name, _digits(error), limit, error <= limit))
    return checks


@checked
def in_dtype(model: RWKV_Dual, dtype: torch.dtype) -> RWKV_Dual:
    """A copy of a model in another dtype; tuned initial states stay float32 or wider, as `from_pretrained` has them."""
    other = copy.deepcopy(model).requires_grad_(False).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".time_state"):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            other.get_parameter(name).data = parameter.detach().to(wide, copy=True)
    return other


@checked
def error_curve(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """RMS of the difference at every position `[T]`, relative to the RMS of the whole; tensors `[B,T,...]`.

    Raises:
        ParameterError: tensors of different shapes, or of another kind.
    """
    if found.shape != expected.shape or found.ndim < 2 or 0 in found.shape or found.is_complex():
        shapes = f"{list(found.shape)} and {list(expected.shape)}"
        raise ParameterError(f"Real tensors of one shape [B,T,...] are compared by position, not those of {shapes}.")
    found, expected = (x.detach().double().cpu().transpose(0, 1).flatten(1) for x in (found, expected))
    return (found - expected).square().mean(1).sqrt() / _rms(expected).clamp_min(1e-300)


def _errors(found: tuple[torch.Tensor, RWKVState], expected: tuple[torch.Tensor, RWKVState]) -> tuple[float, float]:
    """Relative RMS error of logits, and of the final state: the worst of its parts."""
    (logits, state), (right_logits, right_state) = found, expected
    right = right_state.tensors()
    parts = [_relative_rms(part, right[name]) for name, part in state.tensors().items()]
    return _relative_rms(logits, right_logits), reduce(_larger, parts)


def _relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(_rms(found.double() - expected.double()) / _rms(expected.double()).clamp_min(1e-300))


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _digits(x: float) -> float:
    return float(f"{x:.3g}")
