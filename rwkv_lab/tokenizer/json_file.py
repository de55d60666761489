"""Tokenizers in a Hugging Face `tokenizer.json`, such as the 20B one of RWKV-4 Pile, read by `tokenizers`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.tokenizer.decoding import ByteDecoding, checked, utf8

_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


def json_tokenizer(path: Path) -> "ByteLevelTokenizer | TextTokenizer":
    """The tokenizer of a file. In a byte-level one (20B, GPT-2) a token stands for bytes, in others for text.

    Raises:
        CorruptFileError: no tokenizer.json.
        ParameterError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise ParameterError(f"{path} needs the package tokenizers.\nInstall it: pip install 'rwkv_lab[text]'") from e
    try:
        text = path.read_text("utf-8")
        decoder = (json.loads(text).get("decoder") or {}).get("type")
        library = Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise CorruptFileError(f"{path} is no tokenizer.json: {str(e)[:200]}") from e
    library.no_truncation()
    library.no_padding()
    return ByteLevelTokenizer(library) if decoder == "ByteLevel" else TextTokenizer(library)


class ByteLevelTokenizer(ByteDecoding):
    """A tokenizer whose tokens are written in GPT-2's alphabet of 256 letters, one for each byte."""

    def __init__(self, library: Any):
        self._library = library
        letters = _byte_of_letter()
        added = library.get_added_tokens_decoder()
        bytes_of = {i: token.content.encode() for i, token in added.items() if not token.special}
        for token, i in library.get_vocab(with_added_tokens=True).items():
            if i not in added and set(token) <= letters.keys():
                bytes_of[i] = bytes(letters[letter] for letter in token)
        super().__init__(bytes_of, _size(library), _end_of_text(library))

    def definition(self) -> dict[str, Any]:
        """What a tokenizer.json of it holds: "model", "added_tokens", "pre_tokenizer", "normalizer", …"""
        return json.loads(self._library.to_str())

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text; bytes must be UTF-8."""
        return _encode(self._library, text)


class TextTokenizer:
    """Any other tokenizer: what a token means can depend on its neighbours, so only runs of them are decoded."""

    def __init__(self, library: Any):
        self._library = library
        self.vocab_size, self.end_of_text = _size(library), _end_of_text(library)

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text; bytes must be UTF-8."""
        return _encode(self._library, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids, special tokens left out. ParameterError for an id outside the vocabulary."""
        return self._library.decode(checked(ids, self.vocab_size), skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text behind token ids in UTF-8."""
        return self.decode(ids).encode()

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self)


class TextStream:
    """Decodes tokens as they come, each run of them behind the one before it, on which its spaces can depend.

    A text that ends in U+FFFD may end inside a character: it is held back until a token decides.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the run given out last
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """Text that this token completes, often empty."""
        self._held.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self._given, self._held = self._held, []
        return text

    def close(self) -> str:
        """What is left at the end, which was held back."""
        return self._new()

    def _new(self) -> str:
        return self._tokenizer.decode(self._given + self._held)[len(self._tokenizer.decode(self._given)) :]


def _encode(library, text: str | bytes) -> list[int]:
    if isinstance(text, str):
        utf8(text)
    else:
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            raise ParameterError(f"Byte {e.start} of the text is not UTF-8; this tokenizer reads text only.") from e
    return library.encode(text, add_special_tokens=False).ids


def _size(library) -> int:
    return 1 + max(library.get_vocab(with_added_tokens=True).values(), default=0)


def _end_of_text(library) -> int | None:
    return next((i for i in map(library.token_to_id, _ENDS) if i is not None), None)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: a byte that Latin-1 prints is its own letter, the others take those from U+0100 on in turn."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    others = (byte for byte in range(256) if byte not in printed)
    return {chr(byte): byte for byte in printed} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
