"""Text that models read while they are looked at, none of it trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.text import counted
from rwkv_lab.tokenizer import Tokenizer, load_tokenizer, tokenizer_for
from rwkv_lab.train import CORPORA, Corpus, Examples, TokenCorpus, load_corpus
from rwkv_lab.train.held_out import WINDOW

Count = Annotated[int, Ge(1), Le(2**20)]
AnyCorpus = Corpus | Examples | TokenCorpus

_BYTES = 257  # tokens of a vocabulary of bytes
_LONGEST = 16  # bytes of a token, as a mean over a text


@dataclass(frozen=True)
class Reading:
    """What models read and continue.

    data: of what is held out of these; see `load_corpus`.
    tokenizer: as in `load_tokenizer`; "" where the size of the vocabulary tells.
    window: tokens after which a model starts from a fresh state.
    most: bytes of each text that are measured; None for all, as training measures it.
    ignore, template: of records; as in `load_corpus`.
    """

    data: tuple[str, ...] = CORPORA
    tokenizer: str = ""
    window: int = WINDOW
    most: int | None = None
    ignore: tuple[str, ...] = ()
    template: str = "world"

    def load(self, data: str) -> AnyCorpus:
        """One of the data.

        Raises:
            ParameterError, CorruptFileError: as `load_corpus`.
        """
        return load_corpus(data, self.ignore, self.template)

    def corpora(self) -> dict[str, AnyCorpus]:
        """What is read, by name.

        Raises:
            ParameterError: two of one name, or as `load_corpus`.
            CorruptFileError: as `load_corpus`.
        """
        names = [name if name in CORPORA else Path(name).name for name in self.data]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ParameterError(f"data has {twice} twice; give one of them, or another name.")
        return dict(zip(names, map(self.load, self.data), strict=True))

    def check(self, vocab_size: int) -> None:
        """Refuse data and a tokenizer that cannot be read, before any model is.

        Raises:
            ParameterError, CorruptFileError, UnsafeFileError: as `corpora` and `load_tokenizer`.
        """
        self.corpora()
        if self.tokenizer:
            load_tokenizer(self.tokenizer, vocab_size)

    def tokens(self, vocab_size: int) -> float:
        """About how many tokens are measured, all texts together: a token is a byte, or some four of them.

        Raises:
            ParameterError, CorruptFileError: as `corpora`.
        """
        return sum(held_out_tokens(corpus, vocab_size, self.most) for corpus in self.corpora().values())

    def name_tokenizer(self, model: models.RWKV_Dual) -> None:
        """Give a model the tokenizer.

        Raises:
            ParameterError: there is no such one, or it does not fit the vocabulary.
        """
        if self.tokenizer:
            model.tokenizer = self.tokenizer

    def tokenizer_of(self, vocab_size: int) -> Tokenizer | None:
        """The tokenizer that reads the data; None where the size of the vocabulary does not tell.

        Raises:
            ParameterError, CorruptFileError, UnsafeFileError: as `load_tokenizer`.
        """
        if self.tokenizer:
            return load_tokenizer(self.tokenizer, vocab_size)
        try:
            return tokenizer_for(vocab_size)
        except ParameterError:
            return None

    def why_unread(self, model: models.RWKV_Dual, error: ParameterError) -> str:
        """Why a model cannot read the data, in a sentence."""
        if not self.tokenizer and not _tells_tokenizer(model):
            return (
                f"Not read: a vocabulary of {model.layout.vocab_size:,} tokens does not tell its tokenizer. Give it as "
                'tokenizer: "world", "bytes" or the path of a vocabulary or tokenizer.json.'
            )
        what = str(error).splitlines()[0]
        if "ctx_len" in what:  # as training calls the window
            return f"Not read: {what.replace('ctx_len', 'window')} Give a larger window."
        return f"Not read: {what}"


def _tells_tokenizer(model: models.RWKV_Dual) -> bool:
    try:
        return model.tokenizer is not None
    except ParameterError:
        return False


STANDARD = Reading()


@checked
def held_out_text(data: str | AnyCorpus, tokenizer: Tokenizer | None = None) -> bytes:
    """What a corpus holds out; of examples, prompts and responses one after the other.

    Args:
        data: a corpus, or what `load_corpus` takes.
        tokenizer: of data that are tokens.

    Raises:
        ParameterError: tokens without a tokenizer; see `load_corpus`.
    """
    corpus = load_corpus(data) if isinstance(data, str) else data
    if isinstance(corpus, TokenCorpus):
        if tokenizer is None:
            raise ParameterError(f"{corpus.name} holds tokens; to read them as text their tokenizer is needed.")
        corpus.check(tokenizer.vocab_size)
        return tokenizer.decode_bytes(corpus.held_out.tolist())
    if isinstance(corpus, Examples):
        return b"\n".join(example.text for example in corpus.held_out)
    return corpus.held_out


@checked
def excerpts(text: bytes, count: Count, size: Count) -> list[bytes]:
    """Parts of a text, spread over it, that begin where lines do; one file of a corpus is no sample of it.

    Args:
        size: bytes of each; fewer where the text ends before.
    """
    starts = [i * len(text) // count for i in range(count)]
    lines = [start and text.find(b"\n", start) + 1 for start in starts]  # 0 where no line begins any more
    return [text[start : start + size] for start in lines]


@checked
def held_out_excerpts(
    data: str | AnyCorpus, count: Count = 16, size: Count = 512, tokenizer: Tokenizer | None = None
) -> bytes:
    """Excerpts from all over what a corpus holds out, one after the other: `count` of `size` bytes; all where that is
    less.

    Raises:
        ParameterError: as `held_out_text`.
    """
    text = held_out_text(data, tokenizer)
    return text if len(text) <= count * size else b"".join(excerpts(text, count, size))


@checked
def fixed_tokens(vocab_size: Annotated[int, Ge(1), Le(2**24)]) -> torch.Tensor:
    """64 tokens `[1,64]` that are the same every time: any will do where models only have to read the same."""
    return torch.arange(1, 65, device="cpu")[None] * 7919 % vocab_size


@checked
def held_out_tokens(corpus: AnyCorpus, vocab_size: Count, most: Count | None = None) -> float:
    """About how many tokens a corpus holds out: a token is a byte, or some four of them.

    Args:
        most: bytes that count; None for all.
    """
    each = 1 if vocab_size <= _BYTES else 4
    if isinstance(corpus, TokenCorpus):
        size = each * len(corpus.held_out)
    elif isinstance(corpus, Corpus):
        size = len(corpus.held_out)
    else:
        size = sum(len(part) for example in corpus.held_out for turn in example.turns for part in turn)
    return (size if most is None else min(size, most)) / each


@checked
def tokens_to_read(
    model: models.RWKV_Dual, batch: Count, length: Count, data: str | AnyCorpus = "english"
) -> tuple[torch.Tensor, str]:
    """Tokens `[B,T]` of held-out text, each row from another place of it, where the vocabulary tells its tokenizer,
    else fixed ones drawn at random; and where they come from, in words.

    Raises:
        ParameterError: see `load_corpus`.
    """
    try:
        tokenizer = model.tokenizer
    except ParameterError:
        vocab = model.layout.vocab_size
        drawn = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0), device="cpu")
        return drawn, f"drawn at random from {vocab:,}, the same each time (the vocabulary does not tell its tokenizer)"
    rows = []
    for text in excerpts(held_out_text(data, tokenizer), batch, _LONGEST * length):
        if not text:
            raise ParameterError(f"The data holds out no text, or too little of it to read {counted(batch, 'part')}.")
        ids = torch.tensor(tokenizer.encode(text), device="cpu")
        rows.append(ids.repeat(-(-length // len(ids)))[:length])  # a long wish is read from the start again
    name = data if isinstance(data, str) else data.name
    return torch.stack(rows), f"held-out text of the corpus {name!r}"
