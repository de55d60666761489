"""Prompts: texts or token ids, read in parallel, whatever their lengths."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rwkv_lab.arguments import shown_value
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.state import RWKVState, check_state, join
from rwkv_lab.model.state_cache import StateCache
from rwkv_lab.tokenizer.decoding import checked

_TEXTS = (str, bytes, bytearray, memoryview)
_UNORDERED = (dict, set, frozenset)  # of texts or ids, whose order matters

Prompt = str | bytes | Iterable[int]  # a text, or token ids


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Any]:
    """Several prompts as a list; one text, or one list of token ids, is one prompt.

    Raises:
        ParameterError: no prompt.
    """
    if isinstance(prompts, _TEXTS):
        return [prompts]
    if isinstance(prompts, torch.Tensor):
        return [prompts] if prompts.ndim == 1 else [*prompts] if prompts.ndim == 2 else [prompts]
    if isinstance(prompts, _UNORDERED) or not isinstance(prompts, Iterable):
        raise ParameterError(f"prompts={shown_value(prompts)}: it must be texts or lists of token ids.")
    listed = list(prompts)
    if not listed:
        raise ParameterError("There must be at least one prompt.")
    return [listed] if all(is_whole_number(item) for item in listed) else listed


def is_whole_number(item: Any) -> bool:
    """Whether this is one whole number, such as a token id: of Python, NumPy or a tensor without dimensions."""
    if isinstance(item, bool) or isinstance(item, torch.Tensor) and item.ndim:
        return False
    try:
        operator.index(item)
    except (TypeError, RuntimeError):
        return False
    return True


def prompt_ids(model: Model, prompt: Prompt) -> list[int]:
    """The token ids of a prompt; none where it is empty.

    Raises:
        ParameterError: no text and no ids of this vocabulary.
    """
    if isinstance(prompt, _TEXTS):
        return model.tokenizer.encode(prompt if isinstance(prompt, str) else bytes(prompt))
    if isinstance(prompt, _UNORDERED) or not isinstance(prompt, Iterable):
        raise ParameterError(f"prompt={shown_value(prompt)}: it must be a text or a list of token ids.")
    return checked(prompt, model.layout.vocab_size)


def start(
    model: Model,
    prompts: Sequence[list[int]],
    state: RWKVState | None,
    logits: torch.Tensor | None,
    cache: StateCache | None,
) -> tuple[torch.Tensor, RWKVState]:
    """Logits `[B,V]` from which B texts continue, and the states that belong to them.

    Args:
        prompts: token ids; all of them empty where `logits` are given. An empty one without a state begins a text.
        state: as in `read_prompts`.
        logits: `[V]` or `[B,V]`, what the model gave together with `state`.

    Raises:
        ParameterError: nothing to read after a state, logits that are not wanted or do not fit; as `read_prompts`.
    """
    if logits is not None:
        return _with_logits(model, prompts, state, logits)
    if not all(prompts) and state is not None:
        raise ParameterError(
            "The prompt is empty, so there is nothing to read after the state.\n"
            "Give the text that follows, or continue from logits=…, which the model gave together with the state."
        )
    for prompt in prompts:
        if not prompt:
            if model.tokenizer.end_of_text is None:
                raise ParameterError("The prompt is empty, and this vocabulary has no token to begin a text with.")
            prompt.append(model.tokenizer.end_of_text)
    return read_prompts(model, prompts, state, cache)


def _with_logits(model, prompts, state, logits) -> tuple[torch.Tensor, RWKVState]:
    B, V = len(prompts), model.layout.vocab_size
    if state is None or any(prompts):
        raise ParameterError("logits are those after a state: pass state=… too, and an empty prompt.")
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ParameterError(f"logits={shown_value(logits)}: they must be a tensor of floating-point numbers.")
    if logits.is_meta:
        raise ParameterError(f"logits={shown_value(logits)}: they are on the meta device, which holds no values.")
    if logits.shape not in ((V,), (1, V), (B, V)):
        raise ParameterError(f"logits have shape {list(logits.shape)}; they must be {[V]} or {[B, V]}.")
    state = state.expand(B)
    check_state(state, model, B)
    return logits.detach().expand(B, V), state


@torch.no_grad()
def read_prompts(
    model: Model, prompts: Sequence[Sequence[int]], state: RWKVState | None = None, cache: StateCache | None = None
) -> tuple[torch.Tensor, RWKVState]:
    """Read prompts of different lengths: logits after the last token of each `[B,V]`, and their states.

    Nothing is padded: prompts run side by side as far as the shortest one goes, then the rest goes on without it. A
    state never sees a token that is not of its text.

    Args:
        prompts: token ids, at least one in each.
        state: of one sequence, from which all start, or of as many as there are prompts; None for `create_state`.
        cache: gives what it knows of the beginnings, and takes what is read. Not together with `state`.

    Raises:
        ParameterError: no prompt or an empty one, both a state and a cache, or a state that does not fit.
    """
    if not prompts or not all(prompts):
        raise ParameterError("Every prompt needs at least one token, and there must be at least one prompt.")
    if state is not None and cache is not None:
        raise ParameterError("A state cache knows texts from their beginning; it cannot be combined with a state.")
    begin = (model.create_state() if state is None else state).expand(len(prompts))
    known = [(0, begin.rows([i]), None) for i in range(len(prompts))]
    if cache is not None:
        known = [cache.longest_prefix(model, prompt) or unread for prompt, unread in zip(prompts, known, strict=True)]
    read, states, logits = (list(column) for column in zip(*known, strict=True))
    while unread := [i for i, prompt in enumerate(prompts) if read[i] < len(prompt)]:
        n = min(model.ctx_len, *(len(prompts[i]) - read[i] for i in unread))
        tokens = torch.tensor([prompts[i][read[i] : read[i] + n] for i in unread], device="cpu")
        after, joined = model.prefill(tokens, join([states[i] for i in unread]))
        for row, i in enumerate(unread):
            read[i] += n
            states[i], logits[i] = joined.rows([row]), after[row]
            if cache is not None:
                cache.put(model, prompts[i][: read[i]], states[i], logits[i])
    return torch.stack(logits), join(states)
