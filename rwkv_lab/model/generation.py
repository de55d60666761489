"""From prompts to text: each prompt is read in parallel, then all texts grow together, token by token."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.state import RWKVState, join
from rwkv_lab.model.state_cache import StateCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits: penalties first, then temperature, top_k and top_p.

    temperature: 0 always takes the likeliest token.
    top_p: draw from the smallest set of tokens that holds this much probability.
    top_k: draw from this many likeliest tokens; 0 for all.
    presence_penalty: taken off the logit of every token that was generated before.
    frequency_penalty: taken off once for each time that it was.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ParameterError(
                "Sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0; "
                f"given: {self.temperature}, {self.top_p}, {self.top_k}."
            )


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, counts: Counter[int]) -> int:
    """Draw a token from logits `[V]`; `counts` says how often each token was generated before.

    Raises:
        NumericsError: the logits hold NaN or infinity.
    """
    logits = logits.float().cpu()  # a generator on the CPU gives the same draws for every device
    if not logits.isfinite().all():
        raise NumericsError("The model's logits hold NaN or infinity: its weights or its dtype are at fault.")
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, often = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
        logits = logits.clone()
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * often
    if sampling.temperature == 0:
        return int(logits.argmax())
    if 0 < sampling.top_k < len(logits):  # a tenth of the time of sorting 65,536
        logits, tokens = logits.topk(sampling.top_k)
    else:
        logits, tokens = logits.sort(descending=True, stable=True)
    probs = ((logits - logits[0]).double() / sampling.temperature).softmax(-1)  # finite at any temperature above 0
    probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0  # keeps at least the likeliest
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
    state: RWKVState | None = None,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop_tokens: Collection[int] = (),
    cache: StateCache | None = None,
) -> list[str]:
    """Continue several prompts at once, each as if it were alone, and return the new texts.

    Arguments and errors as in `RWKV_Dual.generate_with_streaming`. Prompt i draws with `seed + i`; a state is of one
    sequence, from which all start, or of as many as there are prompts.
    """
    sampling = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty)
    texts = [""] * len(prompts)
    for row, _, text in stream(model, prompts, max_new_tokens, sampling, seed, state, stop_tokens, cache):
        texts[row] += text
    return texts


@torch.no_grad()
def stream(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    state: RWKVState | None,
    stop_tokens: Collection[int],
    cache: StateCache | None,
) -> Iterator[tuple[int, int, str]]:
    """Yields (which prompt, token, the text that it completes) for every new token; arguments as in `generate`.

    A text ends with a stop token or the end of text, which come with no text of their own.
    """
    V = model.layout.vocab_size
    wrong = next((t for t in stop_tokens if not 0 <= t < V), None)
    if wrong is not None:
        raise ParameterError(f"The stop token {wrong} is outside the vocabulary: 0 to {V - 1}.")
    if max_new_tokens < 0:
        raise ParameterError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more.")
    rows = [_Row(row, _encode(model, prompt), model.tokenizer, seed + row) for row, prompt in enumerate(prompts)]
    logits, after = read_prompts(model, [row.ids for row in rows], state, cache)  # [B,V]
    stop = {*stop_tokens, model.tokenizer.end_of_text}
    for left in range(max_new_tokens - 1, -1, -1):
        if not rows:
            return
        going = []
        for at, row in enumerate(rows):
            token = sample(logits[at], sampling, row.generator, row.counts)
            stopped = token in stop
            text = "" if stopped else row.decoder.feed(token)
            if not stopped:
                row.counts[token] += 1
            if stopped or left == 0:
                text += row.decoder.close()
                if cache is not None:  # all but this last token has been read
                    cache.put(model, row.ids, after.rows([at]), logits[at])
            else:
                going.append(at)
            row.ids.append(token)
            yield row.number, token, text
        if not going or left == 0:
            return
        rows, after = [rows[at] for at in going], after if len(going) == len(rows) else after.rows(going)
        logits, after = model.prefill(torch.tensor([[row.ids[-1]] for row in rows]), after)


class _Row:
    """One text under way: what was read and drawn so far, and what draws and decodes it."""

    def __init__(self, number: int, ids: list[int], tokenizer, seed: int):
        self.number, self.ids = number, ids
        self.decoder = tokenizer.stream()
        self.generator = torch.Generator().manual_seed(seed)
        self.counts: Counter[int] = Counter()


def _encode(model, prompt: str) -> list[int]:
    ids = model.tokenizer.encode(prompt)
    if ids:
        return ids
    if model.tokenizer.end_of_text is None:
        raise ParameterError("The prompt is empty, and this vocabulary has no token to begin a text with.")
    return [model.tokenizer.end_of_text]


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
    start = (model.create_state() if state is None else state).expand(len(prompts))
    known = [(0, start.rows([i]), None) for i in range(len(prompts))]
    if cache is not None:
        known = [cache.longest_prefix(model, prompt) or begin for prompt, begin in zip(prompts, known, strict=True)]
    read, states, logits = (list(column) for column in zip(*known, strict=True))
    while unread := [i for i, prompt in enumerate(prompts) if read[i] < len(prompt)]:
        n = min(model.ctx_len, *(len(prompts[i]) - read[i] for i in unread))
        tokens = torch.tensor([prompts[i][read[i] : read[i] + n] for i in unread])
        after, joined = model.prefill(tokens, join([states[i] for i in unread]))
        for row, i in enumerate(unread):
            read[i] += n
            states[i], logits[i] = joined.rows([row]), after[row]
            if cache is not None:
                cache.put(model, prompts[i][: read[i]], states[i], logits[i])
    return torch.stack(logits), join(states)


def generate_one(
    model: Model,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    state: RWKVState | None,
    streaming_callback: Callable[[int, str], None] | None,
    stop_tokens: Collection[int],
    cache: StateCache | None,
) -> str:
    """The text that follows the prompt; arguments as in `RWKV_Dual.generate_with_streaming`."""
    pieces = []
    for _, token, text in stream(model, [prompt], max_new_tokens, sampling, seed, state, stop_tokens, cache):
        pieces.append(text)
        if streaming_callback is not None:
            streaming_callback(token, text)
    return "".join(pieces)
