"""Whether a converted model says what its source says."""

from pathlib import Path

import torch

from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check
from rwkv_lab.convert.plan import ConvertResult
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual

_TOKENS = 32  # of the prompt: every so many ids of the vocabulary
_EXACT = 2e-5  # relative RMS: the same weights in float32
_ROUNDINGS = 64  # a rounding of each weight adds up over the layers to no more than so many


@checked
def compare_logits(result: ConvertResult) -> Check:
    """Logits of source and output on a fixed prompt, both read by rwkv_lab and computed in float32, one model after the
    other: relative RMS of the difference. Takes memory for one model in float32.

    Raises:
        ParameterError: a dry run, or no model.
    """
    plan = result.plan
    if not result.outputs or plan.layout is None:
        raise ParameterError(f"{plan.out} is no model that was written: there are no logits to compare.")
    vocab_size = plan.layout.vocab_size
    tokens = torch.arange(_TOKENS)[None] * max(vocab_size // _TOKENS, 1) % vocab_size
    expected, found = _logits(plan.spec.source, tokens), _logits(plan.out, tokens)
    error = float(((found - expected).square().mean() / expected.square().mean()).sqrt())
    limit = _limit(result)
    return Check("logits of source and output, relative RMS of the difference", error, limit, error <= limit)


def _limit(result: ConvertResult) -> float:
    """What one rounding of every weight may cost, nothing where none was rounded; quantised weights have no bound."""
    if any(row.quantised for row in result.plan.rows):
        return float("inf")
    if not any(r.rounded or r.flushed for r in result.rounding):
        return _EXACT
    return _ROUNDINGS * max(torch.finfo(row.dtype).eps for row in result.plan.rows if row.dtype.is_floating_point)


@torch.no_grad()
def _logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    return RWKV_Dual.from_pretrained(path)(tokens)[0].double()
