"""Whether a converted model says what its source says."""

from __future__ import annotations

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check
from rwkv_lab.convert.plan import ConvertResult
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import no_grad, torch

_TOKENS = 32  # of the prompt: every so many ids of the vocabulary
_EXACT = 2e-5  # relative RMS: the same weights in float32
_ROUNDINGS = 64  # a rounding of each weight adds up over the layers to no more than so many
_NO_LIMIT = "finite: quantised values have no other bound"


@checked
def compare_logits(result: ConvertResult) -> Check:
    """Logits of source and output on a fixed prompt, both read by rwkv_lab and computed in float32, one model after the
    other: relative RMS of the difference. Takes memory for one model in float32. A state that the output has no place
    for is left out of the source as well.

    Raises:
        ParameterError: a dry run, or no model.
    """
    expected = prompt_logits(load_source(result))
    return logits_check(result, expected, prompt_logits(models.RWKV_Dual.from_pretrained(result.out)))


def load_source(result: ConvertResult) -> models.RWKV_Dual:
    """The model that was converted, as the output can hold it: without the tuned states that were dropped.

    Raises:
        ParameterError: a dry run, or no model.
        LayoutError: a model that does not run here.
    """
    plan = result.plan
    if not result.outputs or plan.layout is None:
        raise ParameterError(f"{plan.out} is no model that was written: there are no logits to compare.")
    model, dropped = models.RWKV_Dual.from_pretrained(plan.checkpoint.path), {d.name for d in plan.dropped}
    for name, values in model.named_parameters():
        if name.endswith(".time_state") and name in dropped:
            values.data.zero_()
    return model


@no_grad
def prompt_logits(model: models.RWKV_Dual) -> torch.Tensor:
    """Logits `[T, V]` in float64 after each token of the fixed prompt, `prompt_tokens`."""
    return model(prompt_tokens(model.layout.vocab_size))[0][0].double()


def prompt_tokens(vocab_size: int) -> torch.Tensor:
    """The fixed prompt, `[1, 32]`: tokens from all over the vocabulary."""
    return torch.arange(_TOKENS, device="cpu")[None] * max(vocab_size // _TOKENS, 1) % vocab_size


def logits_check(result: ConvertResult, expected: torch.Tensor, found: torch.Tensor) -> Check:
    """Relative RMS of the difference of logits `[T, V]`, with what the conversion may cost as its limit."""
    error = float(((found - expected).square().mean() / expected.square().mean()).sqrt())
    limit = _limit(result)
    passed = error < float("inf") if limit is None else error <= limit
    shown = _NO_LIMIT if limit is None else limit
    return Check("logits of source and output, relative RMS of the difference", error, shown, passed)


def _limit(result: ConvertResult) -> float | None:
    """What one rounding of every weight may cost, nothing where none was rounded; quantised weights have no bound."""
    if any(row.quantised for row in result.plan.rows):
        return None
    if not any(r.rounded or r.flushed for r in result.rounding):
        return _EXACT
    return _ROUNDINGS * max(torch.finfo(row.dtype).eps for row in result.plan.rows if row.dtype.is_floating_point)
