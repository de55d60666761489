"""Text that a model reads to find out what quantisation costs it: samples of training data, and what tokens they
hold."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.train import Corpus, Examples, TokenCorpus, load_corpus

Count = Annotated[int, Ge(1), Le(2**16)]
_LONGEST = 16  # bytes of a token, as a mean over a text
_FREQUENT = 10  # tokens that are listed


@dataclass(frozen=True)
class TokenStatistics:
    """What tokens some texts hold.

    vocabulary_share: of the vocabulary, 0 to 1, how much occurs.
    entropy: of the tokens' frequencies, in bits per token.
    most_frequent: the ten most frequent tokens, and how often each occurs.
    """

    count: int
    distinct: int
    vocabulary_share: float
    entropy: float
    most_frequent: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Calibration:
    """Texts as tokens.

    data: where they come from.
    notes: how the data was read, a sentence each.
    """

    data: str
    texts: list[list[int]]
    statistics: TokenStatistics
    notes: tuple[str, ...] = ()


@checked
def load_calibration(
    data: str | Path,
    vocab_size: Annotated[int, Ge(1), Le(2**24)],
    encode: Callable[[bytes], Sequence[int]] | None = None,
    samples: Count = 8,
    length: Count = 256,
) -> Calibration:
    """Samples spread over what a corpus has for training.

    Args:
        data: as `rwkv_lab.train.load_corpus` takes it: "english", "python", a file or a folder.
        encode: bytes to tokens; None where there is no tokenizer, for data that are tokens.
        samples, length: how many texts, of how many tokens at most.

    Raises:
        ParameterError: no such data, text without a tokenizer, or tokens of another vocabulary.
        CorruptFileError: as `load_corpus`.
    """
    corpus = load_corpus(data)
    if isinstance(corpus, TokenCorpus):
        corpus.check(vocab_size)
        starts = [i * len(corpus.train) // samples for i in range(samples)]
        found = [corpus.train[start : start + length].tolist() for start in starts]
    elif encode is None:
        raise ParameterError(f"{corpus.name} is text, and the model has no tokenizer: name it as tokenizer.")
    else:
        found = [list(encode(text))[:length] for text in _texts(corpus, samples, _LONGEST * length)]
    texts = [ids for ids in found if len(ids) > 1]
    if not texts:
        raise ParameterError(f"{corpus.name} has no text of two tokens or more to calibrate with.")
    return Calibration(str(data), texts, token_statistics(texts, vocab_size), tuple(corpus.notes))


@checked
def token_statistics(texts: Sequence[Sequence[int]], vocab_size: Annotated[int, Ge(1)]) -> TokenStatistics:
    """Of texts as tokens.

    Raises:
        ParameterError: there are no tokens.
    """
    counts = Counter(token for ids in texts for token in ids)
    n = sum(counts.values())
    if not n:
        raise ParameterError("texts hold no tokens.")
    entropy = -sum(k / n * math.log2(k / n) for k in counts.values())
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return TokenStatistics(n, len(counts), len(counts) / vocab_size, entropy, tuple(ordered[:_FREQUENT]))


def _texts(corpus: Corpus | Examples, count: int, size: int) -> list[bytes]:
    """Parts of the training data, spread over it, that begin where lines or examples do."""
    if isinstance(corpus, Examples):
        chosen = [corpus.train[i * len(corpus.train) // count] for i in range(min(count, len(corpus.train)))]
        return [example.text[:size] for example in chosen]
    text = corpus.train
    starts = [i * len(text) // count for i in range(count)]
    lines = [start and text.find(b"\n", start) + 1 for start in starts]  # 0 where no line begins any more
    return [_whole(text[start : start + size]) for start in lines]


def _whole(text: bytes) -> bytes:
    """Without a part of a character at its end."""
    return text.decode("utf-8", errors="ignore").encode()
