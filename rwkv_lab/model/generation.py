"""From prompts to text: each prompt is read in parallel, then all texts grow together, token by token."""

import operator
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge

from rwkv_lab.arguments import checked, whole_numbers
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.prompts import Prompt, is_whole_number, prompt_ids, prompt_list, start
from rwkv_lab.model.protocol import Model
from rwkv_lab.model.sampling import Convention, Sampling, Seed, row_seed, sample
from rwkv_lab.model.state import RWKVState
from rwkv_lab.model.state_cache import StateCache
from rwkv_lab.tokenizer.stopping import StopText, stop_texts

StopReason = Literal["", "stop", "stop token", "end of text", "max_new_tokens", "stopped"]


@checked
def generate(
    model: Model,
    prompts: Prompt | Iterable[Prompt],
    max_new_tokens: Annotated[int, Ge(0)] = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: Seed = 0,
    state: RWKVState | None = None,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop_tokens: Iterable[int] | int = (),
    cache: StateCache | None = None,
    *,
    stop: str | Iterable[str] | None = (),
    penalty_decay: float = 1.0,
    exempt_tokens: Iterable[int] = (),
    sampling: Convention = "standard",
    logits: torch.Tensor | None = None,
) -> list[str]:
    """Continue several prompts at once, each as if it were alone, and return the new texts.

    Arguments and errors as in `generate_stream`. One text, or one list of token ids, is one prompt. Prompt i draws with
    `row_seed(seed, i)`, which is `seed` itself for the first; a state is of one sequence, from which all start, or of
    as many as there are prompts, and so are logits.
    """
    exempt = _token_set(model, exempt_tokens, "exempt_tokens")
    how = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay, exempt, sampling)
    end = _End(max_new_tokens, stop_texts(stop), _token_set(model, stop_tokens, "stop_tokens"))
    rows = [_Row(model, prompt, number, seed, end) for number, prompt in enumerate(prompt_list(prompts))]
    first, after = start(model, [row.ids for row in rows], state, logits, cache)
    for _ in _run(model, rows, first, after, how, cache):
        pass
    return [row.text for row in rows]


@checked
def generate_stream(
    model: Model,
    prompt: Prompt,
    max_new_tokens: Annotated[int, Ge(0)] = 100,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: Seed = 0,
    state: RWKVState | None = None,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop_tokens: Iterable[int] | int = (),
    cache: StateCache | None = None,
    *,
    stop: str | Iterable[str] | None = (),
    penalty_decay: float = 1.0,
    exempt_tokens: Iterable[int] = (),
    sampling: Convention = "standard",
    logits: torch.Tensor | None = None,
) -> "GenerationStream":
    """Continue a prompt, token by token: an iterator over (token, text), which also says how it ended.

    Args:
        prompt: a text or token ids. Empty, it begins a text; with a state it has to be continued from `logits`.
        max_new_tokens: tokens at most.
        temperature: 0 always takes the likeliest token.
        top_p: draw from the smallest set of tokens that holds this much probability.
        seed: the same seed gives the same text; None for another one each time.
        state: RWKVState of one sequence to start from; None for `create_state()`.
        top_k: draw from this many likeliest tokens; 0 for all.
        presence_penalty, frequency_penalty: taken off the logit of a token that was generated before, once, and once
            for each time.
        stop_tokens: tokens that end the text, as the end of text always does; they are not part of it.
        cache: states of beginnings that were read before; not together with `state`.
        stop: a text or texts that end the text wherever they appear in it; they are not part of it, and what may be the
            beginning of one is held back until it is decided.
        penalty_decay: at every new token, the counts of those before are multiplied by it; 0.996 is common with RWKV.
        exempt_tokens: tokens that no penalty is taken off.
        sampling: "standard" takes penalties, then temperature, top_k and top_p; "rwkv" has the order and the meaning of
            PyPI `rwkv`: penalties, top_p, top_k, temperature. See `Sampling`.
        logits: `[V]`, what the model gave together with `state`: continues from there with an empty prompt.

    Raises:
        ParameterError: values out of range, no tokenizer for this vocabulary, a state that does not fit, or nothing to
            read after a state.
        NumericsError: NaN or infinity in the logits, while it runs.
    """
    exempt = _token_set(model, exempt_tokens, "exempt_tokens")
    how = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay, exempt, sampling)
    end = _End(max_new_tokens, stop_texts(stop), _token_set(model, stop_tokens, "stop_tokens"))
    row = _Row(model, prompt, 0, seed, end)
    first, after = start(model, [row.ids], state, logits, cache)
    row.before = first, after, 0
    return GenerationStream(model, row, _run(model, [row], first, after, how, cache))


class GenerationStream:
    """Yields (token, text that it completes) for every new token; the text is "" inside a character, for a token that
    ends the text, and while it may be the beginning of a stop.

    Attributes, up to the token that was yielded last:
        ids: the new tokens, with those of a stop.
        text: the new text.
        reason: why it ended: "stop" (a text of `stop`), "stop token", "end of text", "max_new_tokens" or "stopped" (by
            `stop()`); "" before that.
    """

    def __init__(self, model: Model, row: "_Row", steps: Generator["_Row", None, None]):
        self._model, self._row, self._steps = model, row, steps
        self._after: tuple[int, torch.Tensor, RWKVState] | None = None

    def __iter__(self) -> "GenerationStream":
        return self

    def __next__(self) -> tuple[int, str]:
        row = next(self._steps)
        return row.new[-1], row.piece

    @property
    def ids(self) -> list[int]:
        return self._row.new

    @property
    def text(self) -> str:
        return self._row.text

    @property
    def reason(self) -> StopReason:
        return self._row.reason

    @property
    def state(self) -> RWKVState:
        """The state after the prompt and all `ids`, of one sequence."""
        return self._read()[2]

    @property
    def logits(self) -> torch.Tensor:
        """What follows the prompt and all `ids`, `[V]`: `generate_stream(model, "", state=…, logits=…)` continues."""
        return self._read()[1]

    def stop(self) -> None:
        """End it after the token that was yielded last."""
        self._steps.close()
        self._row.reason = self._row.reason or "stopped"

    @torch.no_grad()
    def _read(self) -> tuple[int, torch.Tensor, RWKVState]:
        """How many new tokens were read, and the logits and the state behind them."""
        new = self._row.new
        if self._after is None or self._after[0] != len(new):
            logits, after, at = self._row.before
            state = after.rows([at])
            if new:
                logits, state = self._model.prefill(torch.tensor([new[-1:]], device="cpu"), state)
                at = 0
            self._after = len(new), logits[at], state
        return self._after


def check_callback(callback: Callable[[int, str], object] | None) -> None:
    """Refuse a callback that `read_to_end` cannot call, before any work.

    Raises:
        ParameterError: says what its arguments are.
    """
    if callback is None:
        return
    try:
        signature(callback).bind(0, "")
    except ValueError:  # some of C state no signature
        return
    except TypeError as e:
        raise ParameterError(f"streaming_callback is called with (token, text); this one cannot be: {e}.") from None


def read_to_end(stream: GenerationStream, callback: Callable[[int, str], object] | None) -> str:
    """The new text of a stream. A callback is told of every token, and ends the text by returning False."""
    for token, text in stream:
        answer = None if callback is None else callback(token, text)
        if isinstance(answer, bool | np.bool_) and not answer:
            stream.stop()
    return stream.text


@dataclass(frozen=True)
class _End:
    """What ends a text besides the end of text."""

    max_new_tokens: int
    stops: tuple[str, ...]
    stop_tokens: frozenset[int]


class _Row:
    """One text under way: what was read and drawn so far, and what draws and decodes it."""

    def __init__(self, model: Model, prompt: Prompt, number: int, seed: int | None, end: _End):
        self.number, self.ids = number, prompt_ids(model, prompt)
        self.new: list[int] = []
        self.text = self.piece = ""
        self.reason: StopReason = "" if end.max_new_tokens else "max_new_tokens"
        self.before: tuple[torch.Tensor, RWKVState, int]  # logits, states and row of them, before the last new token
        self.counts: dict[int, float] = {}
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(int(row_seed(seed, number)))
        self._tokenizer, self._end = model.tokenizer, end
        self._decoder, self._stop = model.tokenizer.stream(), StopText(end.stops)

    def take(self, token: int, how: Sampling) -> None:
        """Append a token that was drawn."""
        self.new.append(token)
        if token == self._tokenizer.end_of_text:
            self.reason, self.piece = "end of text", ""
        elif token in self._end.stop_tokens:
            self.reason, self.piece = "stop token", ""
        else:
            self.piece = self._stop.feed(self._decoder.feed(token))
            how.count(self.counts, token, self._tokenizer)
            if self._stop.found is not None:
                self.reason = "stop"
            elif len(self.new) == self._end.max_new_tokens:
                self.reason = "max_new_tokens"
        if self.reason and self.reason != "stop":
            self.piece += self._stop.feed(self._decoder.close()) + self._stop.close()
        self.text += self.piece


@torch.no_grad()
def _run(
    model: Model,
    rows: list[_Row],
    logits: torch.Tensor,
    after: RWKVState,
    how: Sampling,
    cache: StateCache | None,
) -> Generator[_Row, None, None]:
    """Draw tokens until every row has ended, and yield a row for each; logits `[B,V]` and states are the rows' own."""
    rows = [row for row in rows if not row.reason]
    while rows:
        going = []
        for at, row in enumerate(rows):
            row.before = logits, after, at
            row.take(sample(logits[at], how, row.generator, row.counts), how)
            if not row.reason:
                going.append(at)
            elif cache is not None:  # all but this last token has been read
                cache.put(model, row.ids, after.rows([at]), logits[at])
            row.ids.append(row.new[-1])
            yield row
        going = [at for at in going if not rows[at].reason]  # the caller may have ended one
        if not going:
            return
        rows, after = [rows[at] for at in going], after if len(going) == len(rows) else after.rows(going)
        logits, after = model.prefill(torch.tensor([[row.ids[-1]] for row in rows], device="cpu"), after)


def _token_set(model: Model, tokens: Iterable[int] | int, name: str) -> frozenset[int]:
    V = model.layout.vocab_size
    given: Any = tokens
    ids = [operator.index(given)] if is_whole_number(given) else whole_numbers(given, name)
    wrong = next((t for t in ids if not 0 <= t < V), None)
    if wrong is not None:
        raise ParameterError(f"{name} holds {wrong}, which is outside the vocabulary: 0 to {V - 1}.")
    return frozenset(ids)
