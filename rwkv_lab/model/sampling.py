"""From logits to the next token: penalties, temperature, top-k and top-p, in the order of either convention."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le

from rwkv_lab.arguments import check_fields, checked
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.tokenizer import Tokenizer

Convention = Literal["standard", "rwkv"]
Seed = Annotated[int, Ge(-(2**63))] | None

_UNCOUNTED = " \t0123456789"  # PyPI rwkv: a token whose text is in this one is never counted


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits.

    temperature: 0 always takes the likeliest token.
    top_p: draw from the smallest set of tokens that holds this much probability.
    top_k: draw from this many likeliest tokens; 0 for all.
    presence_penalty: taken off the logit of every token that was generated before.
    frequency_penalty: taken off once for each time that it was.
    penalty_decay: at every new token, the counts of those before are multiplied by it; 0.996 is common with RWKV.
    exempt_tokens: tokens that no penalty is taken off.
    sampling: "standard" takes penalties, then temperature, top_k and top_p, each on what the one before has left.
        "rwkv" is the order of PyPI `rwkv`: penalties, top_p on the probabilities at temperature 1, which keeps ties
        at its limit, then top_k, then temperature. There temperature 0 means top_p 0: a draw among the likeliest, of
        which there may be several. Blanks and digits are not counted, so that presence_penalty alone reaches them.

    Raises:
        ParameterError: a value out of range.
    """

    temperature: Annotated[float, Ge(0)] = 1.0
    top_p: Annotated[float, Ge(0), Le(1)] = 0.9
    top_k: Annotated[int, Ge(0)] = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: Annotated[float, Ge(0), Le(1)] = 1.0
    exempt_tokens: Collection[int] = ()
    sampling: Convention = "standard"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_p == 0 and self.sampling == "standard":
            raise ParameterError(
                'Sampling: top_p=0.0 leaves no token; it must be above 0, except with sampling="rwkv".\n'
                "temperature=0 always takes the likeliest token."
            )

    def count(self, counts: dict[int, float], token: int, tokenizer: Tokenizer) -> None:
        """Note in `counts` that this token was generated."""
        if self.penalty_decay != 1:
            for seen in counts:
                counts[seen] *= self.penalty_decay
        if self.sampling == "rwkv":
            uncounted = tokenizer.decode([token]) in _UNCOUNTED or token in self.exempt_tokens
            counts[token] = counts.get(token, 0) + (not uncounted)
        elif token not in self.exempt_tokens:
            counts[token] = counts.get(token, 0) + 1


@checked
def row_seed(seed: int, row: Annotated[int, Ge(0)]) -> int:
    """The seed by which prompt `row` of a batch draws: `seed` itself for the first, unrelated ones for the others."""
    if row == 0:
        return seed
    return int(np.random.SeedSequence([seed % 2**64, row]).generate_state(1, np.uint64)[0] >> 1)


def sample(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, counts: Mapping[int, float] | None = None
) -> int:
    """Draw a token from logits `[V]`; `counts` says how often each token was generated before.

    Raises:
        NumericsError: the logits hold NaN or infinity.
        ParameterError: penalties with which they would.
    """
    logits = logits.float().cpu()  # a generator on the CPU gives the same draws for every device
    if not logits.isfinite().all():
        raise NumericsError("The model's logits hold NaN or infinity: its weights or its dtype are at fault.")
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = torch.tensor(list(counts), device="cpu")
        often = torch.tensor(list(counts.values()), dtype=torch.float32, device="cpu")
        logits = logits.clone()
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * often
        if not logits.isfinite().all():
            raise ParameterError(
                f"presence_penalty={sampling.presence_penalty}, frequency_penalty={sampling.frequency_penalty}: logits "
                "overflow float32. Pass values near those of logits, such as 0.2."
            )
    if sampling.sampling == "standard" and sampling.temperature == 0:
        return int(logits.argmax())
    tokens, probs = candidates(logits, sampling)
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that can be drawn from logits `[V]` after penalties, and the weights by which they are, float64."""
    return _rwkv(logits, sampling) if sampling.sampling == "rwkv" else _standard(logits, sampling)


def _standard(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    if 0 < sampling.top_k < len(logits):  # a tenth of the time of sorting 65,536
        logits, tokens = logits.topk(sampling.top_k)
    else:
        logits, tokens = logits.sort(descending=True, stable=True)
    probs = ((logits - logits[0]).double() / float(sampling.temperature)).softmax(
        -1
    )  # finite at any temperature above 0
    probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0  # keeps at least the likeliest
    return tokens, probs


def _rwkv(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    temperature, top_p = (sampling.temperature, sampling.top_p) if sampling.temperature else (1.0, 0.0)
    probs, tokens = logits.double().softmax(-1).sort(descending=True, stable=True)
    reached = (probs.cumsum(-1) >= top_p).nonzero()  # empty where rounding keeps the sum below top_p = 1
    if len(reached):
        probs = probs.where(probs >= probs[reached[0]], 0)
    if 0 < sampling.top_k < len(probs):
        probs[sampling.top_k :] = 0
    return tokens, (probs / probs[0]) ** (1 / temperature)  # the likeliest stays 1, whatever the temperature
