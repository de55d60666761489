"""Text to tokens and back: the World vocabulary, Hugging Face `tokenizers` files, bytes."""

import os
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.paths import what_is_there
from rwkv_lab.tokenizer.decoding import utf8
from rwkv_lab.tokenizer.json_file import ByteLevelTokenizer, TextTokenizer, json_tokenizer
from rwkv_lab.tokenizer.of_bytes import ByteTokenizer
from rwkv_lab.tokenizer.world import WorldTokenizer

__all__ = [
    "ByteLevelTokenizer",
    "ByteTokenizer",
    "Tokenizer",
    "WorldTokenizer",
    "load_tokenizer",
    "tokenizer_for",
    "utf8",
]

Tokenizer = ByteTokenizer | WorldTokenizer | ByteLevelTokenizer | TextTokenizer

_NEOX = (50277, 50304)  # GPT-NeoX's 20B vocabulary, bare and padded
_PADDING = 1024  # embeddings are padded to round numbers: World by 6 rows, 20B by up to 27, others to multiples of 512


@checked
def load_tokenizer(which: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer by its name, or from a file.

    Args:
        which: "world" (the vocabulary comes with pyrwkv-tokenizer), "bytes", or the path of a World vocabulary file or
            of a Hugging Face `tokenizer.json`; which of the two it is, its content decides.
        vocab_size: V of the model that it is for; None for the vocabulary's own size.

    Returns:
        An object with `encode(text) -> ids`, `decode(ids) -> str`, `decode_bytes(ids) -> bytes`, `stream()`,
        `vocab_size` and `end_of_text` (a token, or None). `stream().feed(token)` gives text in whole characters.

    Raises:
        ParameterError: no such name or file, a tokenizer that does not fit the model, a package that is missing.
        UnsafeFileError: code in a line of a vocabulary file.
        CorruptFileError: neither kind of file, or a broken one.
    """
    if which == "bytes":
        return ByteTokenizer(256 if vocab_size is None else vocab_size)
    if which == "world":
        tokenizer = WorldTokenizer()
    else:
        path = Path(os.path.expanduser(which))
        if not os.path.isfile(path):  # Path.is_file fails on names that are too long
            raise ParameterError(
                f'There is no tokenizer {str(which)!r}: name "world", "bytes" or the path of a file.\n'
                f"There is no file {path}{what_is_there(path)}"
            )
        tokenizer = json_tokenizer(path) if _begins_an_object(path) else WorldTokenizer(path)
    if vocab_size is not None:
        _check_fit(tokenizer, which, vocab_size)
        tokenizer.vocab_size = vocab_size
    return tokenizer


def tokenizer_for(vocab_size: int) -> Tokenizer:
    """The tokenizer that a vocabulary of this size tells: 65536 World, 256 and 257 bytes.

    Raises:
        ParameterError: the size tells none; says which file to name.
    """
    if vocab_size in (256, 257):
        return ByteTokenizer(vocab_size)
    if vocab_size == 65536:
        return load_tokenizer("world", vocab_size)
    if vocab_size in _NEOX:
        raise ParameterError(
            f"A vocabulary of {vocab_size} tokens is that of GPT-NeoX, whose 20B_tokenizer.json is not part of "
            "rwkv_lab.\nName the file: model.tokenizer = 'path/to/20B_tokenizer.json'"
        )
    raise ParameterError(
        f"A vocabulary of {vocab_size} tokens does not tell its tokenizer (65536 is World, 256 and 257 are bytes).\n"
        'Name it: model.tokenizer = "world", "bytes" or the path of a vocabulary or tokenizer.json'
    )


def _check_fit(tokenizer, which, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ParameterError(
            f"The tokenizer {which} has tokens up to {tokenizer.vocab_size - 1}, "
            f"the model only 0 to {vocab_size - 1}: they do not belong together."
        )
    if vocab_size - tokenizer.vocab_size >= _PADDING:
        raise ParameterError(
            f"The tokenizer {which} knows {tokenizer.vocab_size} tokens, the model {vocab_size}: "
            "it was not trained with this one,\nand what it writes would be read wrongly."
        )


def _begins_an_object(path: Path) -> bool:
    """Whether this is JSON, which begins with a brace; a World vocabulary begins with a number."""
    with open(path, "rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise CorruptFileError(f"{path} is empty; a vocabulary or a tokenizer.json is expected.")
    return head.startswith(b"{")
