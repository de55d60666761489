"""Text that models read while they are looked at, none of it trained on."""

import torch

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import load_corpus
from rwkv_lab.train.examples import Examples


def held_out_text(data: str) -> bytes:
    """What a corpus holds out; of examples, prompts and responses one after the other.

    Raises:
        ParameterError: see `load_corpus`.
    """
    corpus = load_corpus(data)
    if isinstance(corpus, Examples):
        return b"\n".join(example.prompt + example.response for example in corpus.held_out)
    return corpus.held_out


def tokens_to_read(model: RWKV_Dual, batch: int, length: int, data: str = "english") -> tuple[torch.Tensor, str]:
    """Tokens `[B,T]` of held-out text where the vocabulary tells its tokenizer, else fixed ones drawn at random; and
    where they come from, in words.

    Raises:
        ParameterError: see `load_corpus`.
    """
    try:
        tokenizer = model.tokenizer
    except ParameterError:
        vocab = model.layout.vocab_size
        drawn = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
        return drawn, f"drawn at random from {vocab:,}, the same each time (the vocabulary does not tell its tokenizer)"
    ids = torch.tensor(tokenizer.encode(held_out_text(data)))
    ids = ids.repeat(-(-batch * length // len(ids)))  # a long wish is read from the start again
    return ids[: batch * length].view(batch, length), f"held-out text of the corpus {data!r}"
