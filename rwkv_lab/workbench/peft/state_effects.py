"""What a tuned initial state holds, head by head, and what it does to the first tokens of a text."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from rwkv_lab.analysis.spectra import Spectrum
from rwkv_lab.analysis.texts import tokens_to_read
from rwkv_lab.analysis.tuning import TunedFile, open_tuned
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.peft import figures
from rwkv_lab.workbench.peft.ablation import room_for, tuned_model
from rwkv_lab.workbench.run import Run

_TEXTS = 16  # beginnings of texts
_TOKENS = 128  # of each


def show_heads(run: Run) -> None:
    """Every head of a tuned state as a picture; how large each is, and in how many directions it lies."""
    c = run.config
    with run.timed("heads"), open_tuned(input_path(c.base), input_path(c.adapter), c.said(0)) as t:
        if not _has_state(t, "there are no heads to show"):
            return
        state = _stacked(t, t.after)
        subtitle = f"{t.ck.path.name}: {', '.join(f'{n} {what}' for n, what in zip(state.shape, _SHAPE, strict=True))}"
    norms = state.flatten(2).norm(dim=2)  # [L,H]
    sigma = torch.linalg.svdvals(state)  # [L,H,min(V,K)]
    ranks = torch.tensor([[Spectrum("", (0, 0), s, 0.0, 0.0).effective_rank for s in layer] for layer in sigma])
    run.record.metrics["state"] = {"norm": norms.tolist(), "effective_rank": ranks.tolist()}
    caption = "One scale for all; the colours end at the 99.5th percentile of the absolute values."
    title = "What did tuning write into each head's state?"
    run.show_figure("heads", title, caption, figures.state_heads(state.numpy(), subtitle))
    caption = "e to the entropy of the singular values' shares: 1 where a head holds a single pair of value and key."
    title = "Which heads hold the state, and in how many directions?"
    figure = figures.head_map(norms.numpy(), ranks.numpy(), sigma.shape[2], subtitle)
    run.show_figure("head_sizes", title, caption, figure)


@torch.no_grad()
def show_effect(run: Run) -> None:
    """How far the predictions with and without the state are apart along the first tokens, and what that gains."""
    c = run.config
    with run.timed("effect"), open_tuned(input_path(c.base), input_path(c.adapter), c.said(0)) as t:
        if not _has_state(t, "there is no effect to follow"):
            return
        if not room_for(run, t, "what the state does along a text"):
            return
        model = tuned_model(t)
        tokens, source = tokens_to_read(model, _TEXTS, _TOKENS + 1, c.data)  # [B,T+1]
        tuned = model.create_state()
        without = replace(tuned, wkv=_stacked(t, t.before).to(tuned.wkv)[None])
        name = t.ck.path.name
    kl, saved = [], []
    for text in tokens.split(1):  # one by one: logits of a large vocabulary take room
        log_p, log_q = (model.parallel(text[:, :-1], s)[0][0].double().log_softmax(1) for s in (tuned, without))
        kl.append((log_p.exp() * (log_p - log_q)).sum(1) / math.log(2))
        costs = [F.nll_loss(log, text[0, 1:], reduction="none") for log in (log_q, log_p)]
        saved.append((costs[0] - costs[1]) / math.log(2))
    kl, saved = torch.stack(kl), torch.stack(saved)  # [B,T]
    run.record.metrics["state_effect"] = {
        "kl_bits": kl.mean(0).tolist(),
        "bits_saved": saved.mean(0).tolist(),
        "tokens": source,
    }
    subtitle = f"{name}; {_TEXTS} texts of {_TOKENS} tokens, {source}"
    figure = figures.effect_along_text(kl.numpy(), saved.numpy(), subtitle)
    caption = (
        "Above: the divergence of the prediction with the state from that without it. Below: how many bits fewer the "
        "next token takes with the state, as means over spans that double; below zero the state does harm."
    )
    run.show_figure("state_effect", "How long does the tuned state speak, and does it help?", caption, figure)


_SHAPE = ("layers", "heads", "values", "keys")


def _names(t: TunedFile) -> list[str]:
    return [f"blocks.{layer}.att.time_state" for layer in range(t.layout.n_layer)]


def _stacked(t: TunedFile, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """`[L,H,V,K]`, float64."""
    N = t.layout.head_size
    return torch.stack([values(name).reshape(-1, N, N) for name in _names(t)])


def _has_state(t: TunedFile, otherwise: str) -> bool:
    there = all(name in t.whole for name in _names(t))
    if not there:
        print(f"{t.ck.path.name} holds no tuned state (time_state): {otherwise}.")
    return there
