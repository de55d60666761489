"""Text that models read while they are looked at, none of it trained on."""

import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import Examples, TokenCorpus, load_corpus

_LONGEST = 16  # bytes of a token, as a mean over a text


def held_out_text(data: str) -> bytes:
    """What a corpus holds out; of examples, prompts and responses one after the other.

    Raises:
        ParameterError: see `load_corpus`.
    """
    corpus = load_corpus(data)
    if isinstance(corpus, TokenCorpus):
        raise ParameterError(f"data={data!r} holds tokens; what is read here is text. Name a text or records.")
    if isinstance(corpus, Examples):
        return b"\n".join(example.text for example in corpus.held_out)
    return corpus.held_out


def excerpts(text: bytes, count: int, size: int) -> list[bytes]:
    """Parts of a text, spread over it, that begin where lines do; one file of a corpus is no sample of it.

    Args:
        size: bytes of each; fewer where the text ends before.
    """
    starts = [i * len(text) // count for i in range(count)]
    lines = [start and text.find(b"\n", start) + 1 for start in starts]  # 0 where no line begins any more
    return [text[start : start + size] for start in lines]


def held_out_excerpts(data: str, count: int = 16, size: int = 512) -> bytes:
    """Excerpts from all over what a corpus holds out, one after the other: `count` of `size` bytes.

    Raises:
        ParameterError: see `load_corpus`.
    """
    return b"".join(excerpts(held_out_text(data), count, size))


def fixed_tokens(vocab_size: int) -> torch.Tensor:
    """64 tokens `[1,64]` that are the same every time: any will do where models only have to read the same."""
    return torch.arange(1, 65)[None] * 7919 % vocab_size


def tokens_to_read(model: RWKV_Dual, batch: int, length: int, data: str = "english") -> tuple[torch.Tensor, str]:
    """Tokens `[B,T]` of held-out text, each row from another place of it, where the vocabulary tells its tokenizer,
    else fixed ones drawn at random; and where they come from, in words.

    Raises:
        ParameterError: see `load_corpus`.
    """
    try:
        tokenizer = model.tokenizer
    except ParameterError:
        vocab = model.layout.vocab_size
        drawn = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
        return drawn, f"drawn at random from {vocab:,}, the same each time (the vocabulary does not tell its tokenizer)"
    rows = []
    for text in excerpts(held_out_text(data), batch, _LONGEST * length):
        ids = torch.tensor(tokenizer.encode(text))
        rows.append(ids.repeat(-(-length // len(ids)))[:length])  # a long wish is read from the start again
    return torch.stack(rows), f"held-out text of the corpus {data!r}"
