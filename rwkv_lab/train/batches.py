"""Tokens in batches: windows out of long texts, or one example a row; and how a model predicts what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import no_grad, torch
from rwkv_lab.text import counted
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.material import Material, Row, Tokenizer, tokenise
from rwkv_lab.train.token_files import TokenCorpus

SKIP = -100  # a target that does not count, as torch's cross entropy spells it
_TOKENS_AT_ONCE = 4096  # bounds the memory of measuring

Batch = tuple["torch.Tensor", "torch.Tensor"]  # tokens [B,T], and the token that follows each, or SKIP


class Windows:
    """Windows of `ctx_len` tokens drawn at random from a text; what is held out is cut into such windows in order.

    Args:
        train, held_out: `[N]`, whole numbers of any dtype; they may be mapped from a file.

    Raises:
        ParameterError: a text of `ctx_len` tokens or less, or nothing held out.
    """

    def __init__(
        self, name: str, train: np.ndarray, held_out: np.ndarray, held_out_bytes: int, ctx_len: int, seed: int
    ):
        if len(train) <= ctx_len:
            raise ParameterError(
                f"{name} has {counted(len(train), 'token')} to train on; with ctx_len={ctx_len} a window "
                f"takes {ctx_len + 1}.\n"
                "Give more text, or a smaller ctx_len."
            )
        if len(held_out) < 2:
            raise ParameterError(f"{name} leaves {counted(len(held_out), 'token')} to hold out; 2 at least are needed.")
        self.train, self._held_out, self.ctx_len = train, torch.from_numpy(np.array(held_out, dtype=np.int64)), ctx_len
        self.held_out_bytes = held_out_bytes
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Batch:
        """The next `count` windows."""
        start = torch.randint(len(self.train) - self.ctx_len, (count, 1), generator=self._generator, device="cpu")
        places = (start + torch.arange(self.ctx_len + 1, device="cpu")).numpy()  # [count, ctx_len + 1]
        window = torch.from_numpy(np.asarray(self.train[places], dtype=np.int64))
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
            places = torch.arange(count, device="cpu")[:, None] * T + torch.arange(T + 1, device="cpu")
            whole = tokens[places]  # [window, T + 1]
            for part in whole.split(max(1, _TOKENS_AT_ONCE // T)):
                yield part[:, :-1], part[:, 1:]
        tail = tokens[count * T :]
        if len(tail) > 1:
            yield tail[None, :-1], tail[None, 1:]


class Rows:
    """One example a row, padded on the right; every example once before any twice."""

    def __init__(self, train: Sequence[Row], held_out: Sequence[Row], held_out_bytes: int, seed: int):
        self._train, self._held_out, self.held_out_bytes = train, held_out, held_out_bytes
        self._generator = torch.Generator().manual_seed(seed)
        self._order, self._next = torch.empty(0, dtype=torch.int64, device="cpu"), 0

    def draw(self, count: int) -> Batch:
        """The next `count` examples, as wide as the longest of them."""
        rows = []
        while len(rows) < count:
            if self._next == len(self._order):
                self._order, self._next = torch.randperm(len(self._train), generator=self._generator, device="cpu"), 0
            rows.append(self._train[int(self._order[self._next])])
            self._next += 1
        return _padded(rows)

    def position(self) -> dict[str, torch.Tensor]:
        """What `draw` continues from; `resume_from` takes it."""
        state = self._generator.get_state()
        return {"generator": state, "order": self._order, "next": torch.tensor([self._next], device="cpu")}

    def resume_from(self, position: dict[str, torch.Tensor]) -> None:
        order, following, count = position["order"], int(position["next"]), len(self._train)
        known = len(order) == 0 or torch.equal(order.sort().values, torch.arange(count, device="cpu"))
        if not known or not 0 <= following <= len(order):
            raise ValueError(f"{following} of an order of {counted(len(order), 'example')}, there are {count}")
        self._generator.set_state(position["generator"])
        self._order, self._next = order, following

    def held_out(self) -> Iterator[Batch]:
        rows = sorted(self._held_out, key=len)
        widest = len(rows[-1])
        count = max(1, _TOKENS_AT_ONCE // widest)
        for start in range(0, len(rows), count):
            yield _padded(rows[start : start + count])


def _padded(rows: list[Row]) -> Batch:
    shape = len(rows), max(map(len, rows)) - 1
    tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
    targets = torch.full(shape, SKIP, device="cpu")
    for i, row in enumerate(rows):
        ids, learned = torch.from_numpy(row.tokens), torch.from_numpy(row.learned)
        tokens[i, : len(ids) - 1] = ids[:-1]
        targets[i, : len(ids) - 1] = torch.where(learned[1:], ids[1:], SKIP)
    return tokens, targets


def batches_of(material: Material, seed: int) -> Windows | Rows:
    """Batches of what was made tokens.

    Raises:
        ParameterError: too little text for a context.
    """
    train, held_out = material.train, material.held_out
    if isinstance(train, np.ndarray) and isinstance(held_out, np.ndarray):
        return Windows(material.name, train, held_out, material.held_out_bytes, material.ctx_len, seed)
    assert isinstance(train, list) and isinstance(held_out, list)
    return Rows(train, held_out, material.held_out_bytes, seed)


@checked
def in_batches(
    corpus: Corpus | Examples | TokenCorpus, tokenizer: Tokenizer, ctx_len: int, seed: int, long: str | None = None
) -> Windows | Rows:
    """A corpus as tokens of a model, in batches.

    Raises:
        ParameterError: as `tokenise` and `batches_of`.
    """
    return batches_of(tokenise(corpus, tokenizer, ctx_len, long), seed)


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of targets `[B,T]` under logits `[B,T,V]`; those that are SKIP count nothing."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=SKIP, reduction="sum")


@checked
@no_grad
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
