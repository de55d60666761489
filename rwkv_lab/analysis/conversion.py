"""What a converted model says beside its source, and what became of the values of its tensors."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le

from rwkv_lab.analysis.agreement import error_curve
from rwkv_lab.analysis.deltas import Delta, deltas
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.foreign_format import general_name
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.convert import ConvertResult
from rwkv_lab.convert.logits import load_source, logits_check, prompt_logits, prompt_tokens
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.progress import human_bytes

_GREEDY = 48  # tokens
_LOGITS = "logits of source and output, relative RMS of the difference"
_SAME = "greedy tokens that are the source's"


@dataclass(frozen=True)
class Continued:
    """What source and output write after a prompt, always taking the likeliest token."""

    prompt: str  # as text; of a vocabulary without tokenizer, numbers of tokens
    source: tuple[int, ...]
    output: tuple[int, ...]
    source_text: str
    output_text: str

    @property
    def same(self) -> int:
        """How many tokens from the first on are the same."""
        pairs = zip(self.source, self.output, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.source))


@dataclass(frozen=True)
class ConversionAgreement:
    """Empty where the models cannot be run; `unread` states why."""

    unread: str = ""
    # Logits [T, V] in float64, and the output's.
    expected: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"), repr=False)
    found: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"), repr=False)
    continued: Continued | None = None
    checks: list[Check | NotApplicable] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """RMS of the difference of all logits, relative to the source's."""
        return float(((self.found - self.expected).square().mean() / self.expected.square().mean()).sqrt())

    @property
    def by_position(self) -> torch.Tensor:
        """The same at every position, `[T]`, relative to the RMS of all."""
        return error_curve(self.found[None], self.expected[None])

    @property
    def largest(self) -> float:
        return float((self.found - self.expected).abs().max())

    @property
    def same_likeliest(self) -> torch.Tensor:
        """Whether both hold the same token for the likeliest, at every position, `[T]`."""
        return self.found.argmax(-1) == self.expected.argmax(-1)

    @property
    def divergence(self) -> torch.Tensor:
        """Bits that the output's distribution costs in the place of the source's, at every position, `[T]`."""
        p, q = self.expected.log_softmax(-1), self.found.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).clamp_min(0) / math.log(2)


@dataclass(frozen=True)
class ValueRange:
    """Values of tensors that were cast, all layers of one kind together."""

    name: str  # BlinkDL's, {i} stands for the layer
    tensors: int
    dtype: torch.dtype  # of the output
    smallest: float  # of the absolute values that are not zero, in the source; NaN where there is none
    largest: float
    values: int
    rounded: int
    overflow: int
    flushed: int


@checked
def compare_conversion(
    result: ConvertResult, prompt: str, tokens: Annotated[int, Ge(1), Le(2**16)] = _GREEDY
) -> ConversionAgreement:
    """Run source and output, both read by rwkv_lab and computed in float32, one after the other.

    Args:
        result: of a conversion of a model. Source and output are opened again.
        prompt: what both continue; where the vocabulary tells no tokenizer, the fixed tokens of the logits are.
        tokens: how many both write.
    Raises:
        ParameterError: no model, or nothing was written.
    """
    needed, free = 4 * sum(t.numel for t in result.plan.checkpoint.info.values()), memory_free()
    if needed > free:
        return _not_run(f"in float32 it needs {human_bytes(needed)} of memory, {human_bytes(free)} are free")
    tokenizer = result.plan.spec.tokenizer
    try:
        expected, source_ids, shown, source_text = _said(load_source(result), prompt, tokens, tokenizer)
    except LayoutError as e:
        return _not_run(f"the source does not run here: {e}")
    found, output_ids, _, output_text = _said(RWKV_Dual.from_pretrained(result.out), prompt, tokens, tokenizer)
    if result.nonfinite and not bool(found.isfinite().all()):
        return _not_run("values that are NaN or Inf were allowed into it")
    continued = Continued(shown, source_ids, output_ids, source_text, output_text)
    checks = [logits_check(result, expected, found), _greedy_check(result, continued)]
    return ConversionAgreement("", expected, found, continued, [*checks])


@checked
def value_ranges(result: ConvertResult) -> list[ValueRange]:
    """How far the values of tensors that were cast reach, read from the source, and what became of them."""
    plan, counted = result.plan, {r.name: r for r in result.rounding}
    groups: dict[tuple[str, torch.dtype], list] = {}
    for row in plan.rows:
        if row.name in counted and row.sources:
            groups.setdefault((general_name(row.sources[0])[0], row.dtype), []).append(row)
    found = []
    with plan.source_opened():
        for (name, dtype), rows in groups.items():
            infos = [plan.checkpoint.info[n] for row in rows for n in row.sources if n in plan.checkpoint.info]
            reach, sums = _reach(infos), Counter()
            for row in rows:
                r = counted[row.name]
                sums.update(values=r.values, rounded=r.rounded, overflow=r.overflow, flushed=r.flushed)
            counts = [sums[n] for n in ("values", "rounded", "overflow", "flushed")]
            found.append(ValueRange(name, len(rows), dtype, *reach, *counts))
    return found


@checked
def changes_of_values(result: ConvertResult) -> list[Delta]:
    """How far each tensor that was rounded or quantised lies from its source, under BlinkDL's names."""
    plan = result.plan
    cast = {r.name for r in result.rounding if r.rounded or r.flushed or r.overflow}
    names = [n for row in plan.rows if row.quantised or row.name in cast for n in row.sources]
    with plan.source_opened(), open_checkpoint(result.out) as written:
        return deltas(plan.checkpoint, written, [n for n in names if n in written.info and n in plan.checkpoint.info])


def _reach(infos: Sequence[TensorInfo]) -> tuple[float, float]:
    """The smallest absolute value that is not zero, and the largest that is finite; NaN where there is none."""
    smallest, largest = math.inf, -math.inf
    for info in infos:
        for block in info.blocks():
            size = block.float().abs()
            size = size[(size > 0) & size.isfinite()]
            if len(size):
                smallest, largest = min(smallest, float(size.min())), max(largest, float(size.max()))
    return (smallest, largest) if largest > 0 else (math.nan, math.nan)


@torch.no_grad()
def _said(model: RWKV_Dual, prompt: str, count: int, tokenizer: str) -> tuple[torch.Tensor, tuple[int, ...], str, str]:
    """(logits on the fixed prompt, greedy tokens, the prompt as text or numbers, the tokens likewise)."""
    if tokenizer:
        model.tokenizer = tokenizer
    try:
        ids = list(model.tokenizer.encode(prompt))
        text = lambda new: model.tokenizer.decode(new)  # noqa: E731
        shown = prompt
    except ParameterError:
        ids = prompt_tokens(model.layout.vocab_size)[0].tolist()
        text = lambda new: " ".join(map(str, new))  # noqa: E731
        shown = text(ids)
    logits = prompt_logits(model)
    last, state = model.prefill(torch.tensor([ids], device="cpu"))
    new: list[int] = []
    for _ in range(count):
        new.append(int(last[0].argmax()))
        last, state = model.prefill(torch.tensor([new[-1:]], device="cpu"), state)
    return logits, tuple(new), shown, text(new)


def _greedy_check(result: ConvertResult, continued: Continued) -> Check | NotApplicable:
    """The same tokens where no value was rounded; else no bound holds for how many are."""
    rounded = any(row.quantised for row in result.plan.rows) or any(r.rounded or r.flushed for r in result.rounding)
    count = len(continued.source)
    name = f"{_SAME}, from the first of {count} on"
    if rounded:
        return NotApplicable(name, f"{continued.same}; values were rounded, so that any number may be")
    return Check(name, continued.same, count, continued.same == count)


def _not_run(reason: str) -> ConversionAgreement:
    checks: list[Check | NotApplicable] = [NotApplicable(_LOGITS, reason), NotApplicable(_SAME, reason)]
    return ConversionAgreement(f"Not run: {reason}.", checks=checks)
