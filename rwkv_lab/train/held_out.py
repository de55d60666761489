"""The one measurement of held-out text, by training, merging and analyses alike.

The same model, data, window and bytes give the same number everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.text import counted
from rwkv_lab.train.batches import held_out_bits, in_batches
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Example, Examples
from rwkv_lab.train.token_files import TokenCorpus

WINDOW = 128  # tokens, as most kinds of training take by default
_COUNTS = 0.0005  # of the bits: a change that is smaller is none that counts


@dataclass(frozen=True)
class Measurement:
    """Bits per byte, and of what."""

    bits: float
    size: int  # bytes that were predicted
    window: int  # tokens, each window or example from a fresh state

    @property
    def described(self) -> str:
        """What was measured, in words: "65,535 bytes in windows of 128 tokens, each from a fresh state"."""
        return f"{self.size:,} bytes in windows of {counted(self.window, 'token')}, each from a fresh state"


def change_in_words(before: float, after: float, less: str = "better", more: str = "worse") -> str:
    """How much bits per byte changed: "6.1% better", "the same", or "no difference that counts" of less than 0.05%."""
    share = abs(after / before - 1)
    if after == before:
        return "the same"
    return "no difference that counts" if share < _COUNTS else f"{share:.1%} {less if after < before else more}"


@checked
def measure_held_out(
    model: models.RWKV_Dual,
    corpus: Corpus | Examples | TokenCorpus,
    window: int = WINDOW,
    long: str | None = None,
    most: int | None = None,
) -> Measurement:
    """Bits per byte of what a corpus holds out; of examples with prompts, of their responses.

    Args:
        window: tokens after which the model starts from a fresh state; longer windows give better numbers.
        long: what becomes of examples longer than that; see `tokenise`.
        most: bytes of text, or of examples, from the beginning; None for all.

    Raises:
        ParameterError: the vocabulary's size does not tell its tokenizer, or there is too little text.
    """
    if most is not None:
        corpus = _beginning(corpus, most)
    if isinstance(corpus, Corpus):
        bits = models.bits_per_byte(model, corpus.held_out, window)
        first = model.tokenizer.encode(corpus.held_out)[:1]  # nothing comes before it, so it is not predicted
        return Measurement(bits, len(corpus.held_out) - len(model.tokenizer.decode_bytes(first)), window)
    material = in_batches(corpus, model.tokenizer, window, seed=0, long=long)
    return Measurement(held_out_bits(model, material, model.get_device()), material.held_out_bytes, window)


def _beginning(corpus: Corpus | Examples | TokenCorpus, most: int) -> Corpus | Examples | TokenCorpus:
    """The corpus with less held out."""
    if isinstance(corpus, TokenCorpus):
        return replace(corpus, held_out=corpus.held_out[: max(most // 4, 2)])  # a token is some four bytes
    if isinstance(corpus, Examples):
        return replace(corpus, held_out=_fewer(corpus.held_out, most))
    if most < 2:
        raise ParameterError(f"{most} bytes of held-out text cannot be measured: 2 at least.")
    text = corpus.held_out[:most]
    if len(text) < len(corpus.held_out):  # not in the middle of a character, which some tokenizers refuse
        text = text.decode("utf-8", errors="ignore").encode()
    return replace(corpus, held_out=text)


def _fewer(examples: Sequence[Example], most: int) -> tuple[Example, ...]:
    kept: list[Example] = []
    for example in examples:
        if kept and sum(len(e.response) for e in kept) + len(example.response) > most:
            break
        kept.append(example)
    return tuple(kept)
