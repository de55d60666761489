"""A corpus as tokens of a model: a long text, or one example a row; and what the length of the context does to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.text import counted
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Example, Examples, split_examples
from rwkv_lab.train.token_files import TokenCorpus


class Tokenizer(Protocol):
    """What is needed of a tokenizer of `rwkv_lab.model`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    def encode(self, text: str | bytes) -> list[int]: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of an example, and which of them are learned; nothing comes before the first, so it never is."""

    tokens: np.ndarray  # [T], int64
    learned: np.ndarray  # [T], bool

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> Row:
        """Tokens from `start` to before `end`, as a row of its own."""
        learned = self.learned[start:end].copy()
        learned[:1] = False
        return Row(self.tokens[start:end], learned)


@dataclass(frozen=True)
class Fit:
    """How many examples fit into the context, and what became of the others."""

    long: str  # "split", "cut", "drop" or "error"
    ctx_len: int
    examples: int  # all, held-out ones too
    tokens: int  # of all
    longer: int  # examples that do not fit
    lost: int  # tokens that are neither read nor learned
    pieces: int  # rows that longer examples became
    needed: int  # the ctx_len into which the longest fits

    @property
    def lost_ends(self) -> int:
        """Examples whose end is not learned."""
        return self.longer if self.long in ("cut", "drop") else 0

    def __str__(self) -> str:
        of = f"{self.longer:,} of {counted(self.examples, 'example')}"
        if not self.longer:
            fit = counted(self.examples, "example fits", "examples fit")
            return f"All {fit} into ctx_len={self.ctx_len}; ctx_len={self.needed} would do."
        if self.long == "split":
            return (
                f"{of} are longer than ctx_len={self.ctx_len}: they are split into {self.pieces:,} pieces, each from a "
                f"fresh state; {self.lost:,} of {self.tokens:,} tokens are in pieces with nothing to learn. "
                f"ctx_len={self.needed} would split none."
            )
        what = "cut off, and lose their end" if self.long == "cut" else "left out"
        return (
            f"{of} are longer than ctx_len={self.ctx_len} and are {what}: {self.lost:,} of {self.tokens:,} tokens are "
            f"lost. ctx_len={self.needed} would keep all, long='split' trains on all in pieces."
        )


@dataclass(frozen=True, eq=False)
class Material:
    """Tokens to train on, and tokens that are held out.

    train, held_out: `[N]` whole numbers of a text, or rows.
    """

    name: str
    ctx_len: int
    train: np.ndarray | list[Row]
    held_out: np.ndarray | list[Row]
    held_out_bytes: int  # that are predicted of what is held out
    fit: Fit | None = None  # None where windows are drawn from a text
    notes: tuple[str, ...] = field(default=())  # what is worth knowing before training, a sentence each


def tokenise(
    corpus: Corpus | Examples | TokenCorpus, tokenizer: Tokenizer, ctx_len: int, long: str | None = None
) -> Material:
    """A corpus as tokens of a model. Examples without any prompt are texts: joined, and drawn from in windows.

    Args:
        long: what becomes of examples of more than `ctx_len` tokens: "split", "cut", "drop" or "error". None: texts are
            split, since windows are drawn from them; examples with prompts are cut.

    Raises:
        ParameterError: too little text for a context, a prompt as long as the context, a token outside the vocabulary,
            examples that are too long with `long="error"`, or `long` for a text, which has no end to be lost.
    """
    if isinstance(corpus, Examples) and not (corpus.are_texts and long in (None, "split")):
        return _of_examples(corpus, tokenizer, ctx_len, long or "cut")
    if not isinstance(corpus, Examples) and long not in (None, "split"):
        raise ParameterError(
            f"long={long!r} is for examples; {corpus.name} is text, of which windows of ctx_len tokens are drawn.\n"
            "Leave it out: nothing of a text is cut."
        )
    if isinstance(corpus, TokenCorpus):
        corpus.check(tokenizer.vocab_size)
        train, held_out = corpus.train, np.asarray(corpus.held_out, dtype=np.int64)
    else:
        train, held_out = (_text_tokens(part, tokenizer) for part in (corpus.train, corpus.held_out))
    predicted = [t for t in held_out[1:].tolist() if t != tokenizer.end_of_text]
    size = len(tokenizer.decode_bytes(predicted))
    return Material(corpus.name, ctx_len, train, held_out, size, notes=corpus.notes)


def _text_tokens(part: bytes | Sequence[Example], tokenizer: Tokenizer) -> np.ndarray:
    """Of texts one after the other, each with the end of text after it, or an empty line where no token is that."""
    if isinstance(part, bytes):
        ids = tokenizer.encode(part)
    else:
        end = tokenizer.encode(b"\n\n") if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        ids = [token for e in part for token in (*tokenizer.encode(e.response), *end)]
    return np.array(ids, dtype=np.int64)


def _of_examples(corpus: Examples, tokenizer: Tokenizer, ctx_len: int, long: str) -> Material:
    examples = [*corpus.train, *corpus.held_out]
    rows = [_row(e, tokenizer) for e in examples]
    most = ctx_len + 1  # the last token is predicted only
    longer = [i for i, row in enumerate(rows) if len(row) > most]
    needed = max(map(len, rows)) - 1
    if long == "error" and longer:
        raise ParameterError(
            f"{examples[longer[0]].place}: the example has {len(rows[longer[0]])} tokens; {len(longer):,} of "
            f"{len(rows):,} are longer than ctx_len={ctx_len}.\nctx_len={needed} would fit all; long='split', 'cut' or "
            "'drop' do without."
        )
    if long == "cut":
        _refuse_long_prompts(corpus.name, examples, rows, most, tokenizer, needed)
    fitted = [_fitted(row, most, long) for row in rows]
    pieces_of = {id(e): pieces for e, pieces in zip(examples, fitted, strict=True)}
    if long == "drop" and longer:
        kept = [e for e in examples if pieces_of[id(e)]]
        if len({e.turns for e in kept}) < 2:
            raise ParameterError(
                f"{corpus.name}: {len(longer):,} of {len(rows):,} examples are longer than ctx_len={ctx_len}; what is "
                f"left is too little to train on and to hold some out.\nctx_len={needed} would fit all."
            )
        corpus = split_examples(corpus.name, kept, corpus.notes, stop=corpus.stop)  # all that was held out may be gone
    train, held_out = ([p for e in part for p in pieces_of[id(e)]] for part in (corpus.train, corpus.held_out))
    lost = sum(len(rows[i]) - 1 - sum(len(piece) - 1 for piece in fitted[i]) for i in longer)  # pieces overlap by one
    fit = Fit(
        long=long,
        ctx_len=ctx_len,
        examples=len(rows),
        tokens=sum(map(len, rows)),
        longer=len(longer),
        lost=lost + (len(longer) if long == "drop" else 0),
        pieces=sum(len(fitted[i]) for i in longer),
        needed=needed,
    )
    size = sum(_learned_bytes(row, tokenizer) for row in held_out)
    return Material(corpus.name, ctx_len, train, held_out, size, fit, (*corpus.notes, str(fit)))


def _row(example: Example, tokenizer: Tokenizer) -> Row:
    ids: list[int] = []
    learned: list[bool] = []
    for read, answer in example.turns:
        for text, is_learned in ((read, False), (answer, True)):
            tokens = tokenizer.encode(text)
            ids += tokens
            learned += [is_learned] * len(tokens)
    if tokenizer.end_of_text is not None:
        ids.append(tokenizer.end_of_text)
        learned.append(True)
    return Row(np.array(ids, dtype=np.int64), np.array(learned)).part(0, len(ids))


def _fitted(row: Row, most: int, long: str) -> list[Row]:
    """The rows that an example becomes, of at most `most` tokens."""
    if len(row) <= most:
        return [row]
    if long == "drop":
        return []
    if long == "cut":
        return [row.part(0, most)]
    pieces = [row.part(start, start + most) for start in range(0, len(row) - 1, most - 1)]
    return [piece for piece in pieces if piece.learned.any()]


def _refuse_long_prompts(
    name: str, examples: Sequence[Example], rows: Sequence[Row], most: int, tokenizer: Tokenizer, needed: int
) -> None:
    bare = [e for e, row in zip(examples, rows, strict=True) if not row.learned[:most].any()]
    if bare:
        prompt, response = (len(tokenizer.encode(text)) for text in bare[0].turns[0])
        raise ParameterError(
            f"{bare[0].place}: the prompt has {prompt} tokens, the response {response}; with ctx_len={most - 1} "
            f"nothing of it is left to learn.\nThis holds for {len(bare):,} of {len(rows):,} examples of {name}: pass "
            f"ctx_len={needed}, or long='drop' or 'split'."
        )


def _learned_bytes(row: Row, tokenizer: Tokenizer) -> int:
    learned = row.tokens[row.learned].tolist()
    return len(tokenizer.decode_bytes([t for t in learned if t != tokenizer.end_of_text]))
