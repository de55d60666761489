"""What a model writes before and after training, after prompts that go with the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_lab import model as models
from rwkv_lab.arguments import checked
from rwkv_lab.train.data import Corpus
from rwkv_lab.train.examples import Examples
from rwkv_lab.train.token_files import TokenCorpus

_PROMPTS = {"english": ("The ", "If the value of "), "python": ("def ", "import ")}
_LENGTH = 120  # tokens
_EXAMPLES = 2  # of those that are held out
_LONGEST = 1000  # characters of a prompt that is shown


@dataclass(frozen=True)
class Continuation:
    """What the model wrote after a prompt, with the same seed, before and after training."""

    prompt: str
    before: str
    after: str
    expected: str = ""  # what stands there in the data, where it is the response of an example


@dataclass(frozen=True)
class Question:
    """What a model is asked to continue, and what stands there in the data; "" where it is no response."""

    prompt: str
    expected: str = ""


@checked
def questions(corpus: Corpus | Examples | TokenCorpus, model: models.RWKV_Dual) -> list[Question]:
    """Prompts for a corpus: of examples those of the first that are held out, else the beginning of held-out text.

    Raises:
        ParameterError: tokens of a vocabulary whose size does not tell its tokenizer.
    """
    if isinstance(corpus, TokenCorpus):
        return [Question(model.tokenizer.decode(corpus.held_out[:8].tolist()))]
    if isinstance(corpus, Corpus):
        known = _PROMPTS.get(corpus.name) or (corpus.held_out[:20].decode("utf-8", errors="replace"),)
        return [Question(prompt) for prompt in known]
    if corpus.are_texts:
        return [Question(corpus.held_out[0].text[:20].decode("utf-8", errors="replace"))]
    asked = {e.prompt.decode(): e.turns[0][1] for e in reversed(corpus.held_out) if 0 < len(e.prompt) <= _LONGEST}
    found = [Question(prompt, answer.decode("utf-8", errors="replace")) for prompt, answer in asked.items()]
    return found[::-1][:_EXAMPLES]


def samples(corpus: Corpus | Examples | TokenCorpus, model: models.RWKV_Dual, seed: int) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs, as the model is now. Answers end where those of the examples do.

    Raises:
        NumericsError: NaN or infinity in the logits.
    """
    stop: Sequence[str] = corpus.stop if isinstance(corpus, Examples) else ()
    return [
        (q.prompt, model.generate_with_streaming(q.prompt, _LENGTH, 1.0, 0.95, seed, stop=stop))
        for q in questions(corpus, model)
    ]
