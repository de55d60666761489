"""The texts that an exported model is compared with the model on."""

from pathlib import Path

import numpy as np

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import FormatExportError, ParameterError, RwkvLabError, ValidationError
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.family import Reference
from rwkv_lab.tokenizer import Tokenizer, load_tokenizer, tokenizer_for

LONGEST = 1024  # tokens of a sample that are compared
_BYTES = 1000  # of a built-in sample: never more than LONGEST tokens
_NO_TOKENIZER = "test_input_samples are texts, and the model has no tokenizer: name it as tokenizer."
_TOO_SHORT = "test_input_samples hold no text of two tokens or more; give longer ones."


def check_samples(configuration: ExportConfiguration, path: Path) -> None:
    """Refuse texts that an RWKV cannot be compared on, and a tokenizer that is not its own, before anything is written.

    Args:
        path: the model, or what it is merged from; nothing is checked of other families, nor of what is no path.

    Raises:
        ValidationError: there is no tokenizer, or no text of two tokens or more.
        FormatExportError: the tokenizer that is named is not there, or not the model's.
    """
    if not configuration.export_onnx or not path.exists():
        return
    with open_checkpoint(path) as ck:
        layout = ck.layout
    if layout is None:
        return
    try:
        tokenizer = tokenizer_of(configuration.tokenizer, layout.vocab_size)
    except RwkvLabError as e:
        raise FormatExportError(f"tokenizer: {e}") from e
    texts = configuration.test_input_samples
    if isinstance(texts, int) or not configuration.run_validation_tests:
        return
    if tokenizer is None:
        raise ValidationError(_NO_TOKENIZER)
    if all(len(tokenizer.encode(text)) < 2 for text in texts):
        raise ValidationError(_TOO_SHORT)


def tokenizer_of(which: str | Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that is named, else the one that the size of the vocabulary tells; None where it tells none.

    Raises:
        ParameterError, UnsafeFileError, CorruptFileError: the one that is named; see `load_tokenizer`.
    """
    if which:
        return load_tokenizer(which, vocab_size)
    try:
        return tokenizer_for(vocab_size)
    except ParameterError:
        return None


def samples_of(configuration: ExportConfiguration, reference: Reference) -> tuple[list[list[int]], list[str]]:
    """What is compared on, as tokens, and what should be known of it.

    Raises:
        ValidationError: there is no tokenizer, no text of two tokens or more, or one beyond the model's context.
    """
    given = configuration.test_input_samples
    texts = _built_in(given) if isinstance(given, int) else given
    samples = [reference.tokens_of(text) for text in texts]
    found = [ids for ids in samples if ids is not None]
    if not found:
        if not isinstance(given, int):
            raise ValidationError(_NO_TOKENIZER)
        draw = np.random.default_rng(0)
        random = [draw.integers(0, reference.vocab_size, 200).tolist() for _ in texts]
        return random, ["the model has no tokenizer, so it was compared on random tokens, not on text."]
    longest = LONGEST if reference.context is None else min(LONGEST, reference.context)
    if not isinstance(given, int) and reference.context is not None:
        _refuse_longer(found, reference.context)
    long = sum(len(ids) > longest for ids in found)
    said = [f"{long} sample{'s were' if long > 1 else ' was'} cut to {longest} tokens."] if long else []
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise ValidationError(_TOO_SHORT)
    return found, said


def _refuse_longer(samples: list[list[int]], context: int) -> None:
    for number, ids in enumerate(samples, 1):
        if len(ids) > context:
            raise ValidationError(
                f"Text {number} of test_input_samples has {len(ids)} tokens; the model's context ends at {context}.\n"
                "Give a shorter one."
            )


def _built_in(count: int) -> list[str]:
    """Parts of the English text that rwkv_lab brings, spread over what trainings hold out of it."""
    from rwkv_lab.train import load_corpus  # not needed where a graph is written

    text = load_corpus("english").held_out
    assert isinstance(text, bytes)
    starts = [i * len(text) // count for i in range(count)]
    return [text[start : start + _BYTES].decode(errors="ignore") for start in starts]
