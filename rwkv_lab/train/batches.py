"""Tokens in batches: windows out of long texts, or one example a row; and how a model predicts what was held out."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from rwkv_lab.errors import ParameterError
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Example, Examples

SKIP = -100  # a target that does not count, as torch's cross entropy spells it
_TOKENS_AT_ONCE = 4096  # bounds the memory of measuring

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens [B,T], and the token that follows each, or SKIP


class Tokenizer(Protocol):
    """What is needed of a tokenizer of `rwkv_lab.model`."""

    @property
    def end_of_text(self) -> int | None: ...
    def encode(self, text: str | bytes) -> list[int]: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


class Windows:
    """Windows of `ctx_len` tokens drawn at random from a text; what is held out is cut into such windows in order.

    Raises:
        ParameterError: a text of `ctx_len` tokens or less, or nothing held out.
    """

    def __init__(self, name: str, train: list[int], held_out: list[int], held_out_bytes: int, ctx_len: int, seed: int):
        if len(train) <= ctx_len:
            raise ParameterError(
                f"{name} has {len(train)} tokens to train on; with ctx_len={ctx_len} a window takes {ctx_len + 1}.\n"
                "Give more text, or a smaller ctx_len."
            )
        if len(held_out) < 2:
            raise ParameterError(f"{name} leaves {len(held_out)} tokens to hold out; 2 at least are needed.")
        self.train, self._held_out, self.ctx_len = torch.tensor(train), torch.tensor(held_out), ctx_len
        self.held_out_bytes = held_out_bytes
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Batch:
        """The next `count` windows."""
        start = torch.randint(len(self.train) - self.ctx_len, (count, 1), generator=self._generator)
        window = self.train[start + torch.arange(self.ctx_len + 1)]  # [count, ctx_len + 1]
        return window[:, :-1], window[:, 1:]

    def position(self) -> dict[str, torch.Tensor]:
        """What `draw` continues from; `resume_from` takes it."""
        return {"generator": self._generator.get_state()}

    def resume_from(self, position: dict[str, torch.Tensor]) -> None:
        self._generator.set_state(position["generator"])

    def held_out(self) -> Iterator[Batch]:
        T, tokens = self.ctx_len, self._held_out
        count = (len(tokens) - 1) // T
        if count:
            whole = tokens[torch.arange(count)[:, None] * T + torch.arange(T + 1)]  # [window, T + 1]
            for part in whole.split(max(1, _TOKENS_AT_ONCE // T)):
                yield part[:, :-1], part[:, 1:]
        tail = tokens[count * T :]
        if len(tail) > 1:
            yield tail[None, :-1], tail[None, 1:]


class Rows:
    """One example a row, cut off after `ctx_len` tokens, padded on the right; every example once before any twice.

    Raises:
        ParameterError: a prompt as long as the context.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, ctx_len: int, seed: int):
        self._train = [_row(e, tokenizer, ctx_len, examples.name) for e in examples.train]
        self._held_out = [_row(e, tokenizer, ctx_len, examples.name) for e in examples.held_out]
        self.held_out_bytes = sum(row.learned_bytes for row in self._held_out)
        self._generator = torch.Generator().manual_seed(seed)
        self._order, self._next = torch.empty(0, dtype=torch.int64), 0

    def draw(self, count: int) -> Batch:
        """The next `count` examples, as wide as the longest of them."""
        rows = []
        while len(rows) < count:
            if self._next == len(self._order):
                self._order, self._next = torch.randperm(len(self._train), generator=self._generator), 0
            rows.append(self._train[self._order[self._next]])
            self._next += 1
        return _padded(rows)

    def position(self) -> dict[str, torch.Tensor]:
        """What `draw` continues from; `resume_from` takes it."""
        state = self._generator.get_state()
        return {"generator": state, "order": self._order, "next": torch.tensor([self._next])}

    def resume_from(self, position: dict[str, torch.Tensor]) -> None:
        order, following, count = position["order"], int(position["next"]), len(self._train)
        known = len(order) == 0 or torch.equal(order.sort().values, torch.arange(count))
        if not known or not 0 <= following <= len(order):
            raise ValueError(f"{following} of an order of {len(order)} examples, there are {count}")
        self._generator.set_state(position["generator"])
        self._order, self._next = order, following

    def held_out(self) -> Iterator[Batch]:
        rows = sorted(self._held_out, key=lambda row: len(row.tokens))
        widest = len(rows[-1].tokens)
        count = max(1, _TOKENS_AT_ONCE // widest)
        for start in range(0, len(rows), count):
            yield _padded(rows[start : start + count])


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    first: int  # index of the first token that is learned, at least 1
    learned_bytes: int


def _row(example: Example, tokenizer: Tokenizer, ctx_len: int, name: str) -> _Row:
    prompt, response = tokenizer.encode(example.prompt), tokenizer.encode(example.response)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    first = max(len(prompt), 1)  # nothing comes before the first token of all, so it cannot be learned
    tokens = [*prompt, *response, *end][: ctx_len + 1]
    if len(tokens) <= first:
        raise ParameterError(
            f"{name}, line {example.line}: the prompt has {len(prompt)} tokens, the response {len(response)}; with "
            f"ctx_len={ctx_len} nothing of it is left to learn."
        )
    learned = [t for t in tokens[first:] if t != tokenizer.end_of_text]
    return _Row(tokens, first, len(tokenizer.decode_bytes(learned)))


def _padded(rows: list[_Row]) -> Batch:
    T = max(len(row.tokens) for row in rows) - 1
    tokens, targets = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), SKIP)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.tokens)
        tokens[i, : len(ids) - 1] = ids[:-1]
        targets[i, row.first - 1 : len(ids) - 1] = ids[row.first :]
    return tokens, targets


def in_batches(corpus: Corpus | Examples, tokenizer: Tokenizer, ctx_len: int, seed: int) -> Windows | Rows:
    """A corpus as tokens of a model. Examples without any prompt are texts: joined, and cut into windows.

    Raises:
        ParameterError: too little text for a context, or a prompt as long as the context.
    """
    if isinstance(corpus, Examples):
        if any(e.prompt for e in (*corpus.train, *corpus.held_out)):
            return Rows(corpus, tokenizer, ctx_len, seed)
        train, held_out = (_joined(part, tokenizer) for part in (corpus.train, corpus.held_out))
    else:
        train, held_out = tokenizer.encode(corpus.train), tokenizer.encode(corpus.held_out)
    predicted = [t for t in held_out[1:] if t != tokenizer.end_of_text]
    return Windows(corpus.name, train, held_out, len(tokenizer.decode_bytes(predicted)), ctx_len, seed)


def _joined(examples: tuple[Example, ...], tokenizer: Tokenizer) -> list[int]:
    """Texts one after the other, each with the end of text after it, or an empty line where there is no such token."""
    end = tokenizer.encode(b"\n\n") if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return [token for e in examples for token in (*tokenizer.encode(e.response), *end)]


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of targets `[B,T]` under logits `[B,T,V]`; those that are SKIP count nothing."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=SKIP, reduction="sum")


@torch.no_grad()
def held_out_bits(run: Callable, material: Windows | Rows, device: torch.device) -> float:
    """Bits per byte of what is held out, a fresh state for every window or example.

    Args:
        run: tokens `[B,T]` -> (logits `[B,T,V]`, state): the model, or what wraps it.
    """
    total = 0.0
    for tokens, targets in material.held_out():
        logits, _ = run(tokens.to(device))
        total += nats(logits, targets.to(device)).item()
    return total / math.log(2) / max(material.held_out_bytes, 1)
