"""What a tuned initial state holds, head by head, and its effect by token position."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch.nn import functional as F

from rwkv_lab.analysis.spectra import effective_rank
from rwkv_lab.analysis.texts import AnyCorpus, tokens_to_read
from rwkv_lab.analysis.tuned_model import tuned_model, why_not_run
from rwkv_lab.analysis.tuning import Tuning
from rwkv_lab.arguments import checked
from rwkv_lab.checks import NotApplicable
from rwkv_lab.errors import LayoutError


@dataclass(frozen=True)
class StateHeads:
    """The matrices of a tuned state, in the logical order of values by keys."""

    state: torch.Tensor  # [L,H,V,K] float64
    norms: torch.Tensor  # [L,H] Frobenius norms
    effective_ranks: torch.Tensor  # [L,H]
    full_rank: int  # the most that they can be


@dataclass(frozen=True)
class StateEffect:
    """Predictions with and without a tuned state after each token of some texts. Empty, with the reason among the
    checks, where the model cannot run here.
    """

    # [B,T] KL(with ‖ without), and how many bits fewer the next token takes; float64.
    kl_bits: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    bits_saved: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    source: str = ""  # where the tokens come from, in words
    checks: list[NotApplicable] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        return self.kl_bits.numel() > 0


@checked
def state_heads(tuning: Tuning) -> StateHeads:
    """Every head of a tuned state: how large it is, and in how many directions it lies.

    Raises:
        LayoutError: a tuning without a state for every layer.
    """
    _refuse_without_state(tuning)
    state = tuning.state(tuning.after)
    sigma = torch.linalg.svdvals(state)  # [L,H,min(V,K)]
    ranks = torch.tensor([[effective_rank(head) for head in layer] for layer in sigma], device="cpu")
    return StateHeads(state, state.flatten(2).norm(dim=2), ranks, sigma.shape[2])


@checked
@torch.no_grad()
def measure_state_effect(
    tuning: Tuning,
    data: str | AnyCorpus = "python",
    texts: Annotated[int, Ge(1), Le(2**16)] = 16,
    length: Annotated[int, Ge(1), Le(2**20)] = 128,
    tokenizer: str = "",
) -> StateEffect:
    """How far the predictions with and without the state are apart by token position, and what the state gains.

    Args:
        data: the corpus whose held-out text is read, from `texts` places of it, `length` tokens each.
        tokenizer: as in `load_tokenizer`; "" where the size of the vocabulary tells.

    Raises:
        LayoutError: a tuning without a state for every layer.
        ParameterError: no such corpus; see `load_corpus`.
    """
    _refuse_without_state(tuning)
    if reason := why_not_run(tuning):
        return StateEffect(checks=[NotApplicable("what the state does along a text", reason)])
    model = tuned_model(tuning)
    if tokenizer:
        model.tokenizer = tokenizer
    tokens, source = tokens_to_read(model, texts, length + 1, data)  # [B,T+1]
    tuned = model.create_state()
    without = replace(tuned, wkv=tuning.state(tuning.before).to(tuned.wkv)[None])
    kl, saved = [], []
    for text in tokens.split(1):  # one by one: logits of a large vocabulary take memory
        log_p, log_q = (model.parallel(text[:, :-1], s)[0][0].double().log_softmax(1) for s in (tuned, without))
        kl.append((log_p.exp() * (log_p - log_q)).sum(1) / math.log(2))
        costs = [F.nll_loss(log, text[0, 1:], reduction="none") for log in (log_q, log_p)]
        saved.append((costs[0] - costs[1]) / math.log(2))
    return StateEffect(torch.stack(kl), torch.stack(saved), source)


def _refuse_without_state(tuning: Tuning) -> None:
    if not tuning.state_names:
        raise LayoutError(f"{tuning.tuned.path.name} holds no tuned state (time_state) for every layer of the base.")
