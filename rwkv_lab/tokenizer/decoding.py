"""From tokens to text where a token stands for bytes: whole texts, or token by token in whole characters."""

import codecs
from collections.abc import Iterable, Mapping

from rwkv_lab.arguments import whole_numbers
from rwkv_lab.errors import ParameterError


class ByteDecoding:
    """What vocabularies of byte strings share. A token without bytes (the end of text, padding) stands for none."""

    def __init__(self, bytes_of: Mapping[int, bytes], vocab_size: int, end_of_text: int | None):
        self._bytes_of, self.vocab_size, self.end_of_text = bytes_of, vocab_size, end_of_text

    def byte_strings(self) -> list[bytes]:
        """What each id stands for, in order of ids; b"" for the end of text and padding."""
        return [self._bytes_of.get(i, b"") for i in range(self.vocab_size)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind token ids; the end of text and padding stand for no byte.

        Raises:
            ParameterError: an id outside the vocabulary.
        """
        return b"".join(self._bytes_of.get(i, b"") for i in checked(ids, self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "ByteStream":
        """A decoder that takes one token at a time."""
        return ByteStream(self)


class ByteStream:
    """Decodes tokens as they come; a character is given out when its last byte is there, never in parts."""

    def __init__(self, tokenizer: ByteDecoding):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text that this token completes, often empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def close(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as ints, all inside the vocabulary; a tensor or an array is taken too.

    Raises:
        ParameterError: not a list of whole numbers, or one outside the vocabulary, by its value.
    """
    ids = whole_numbers(ids, "ids")
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ParameterError(f"Token {wrong} is outside the vocabulary of {vocab_size} tokens.")
    return ids


def utf8(text: str) -> bytes:
    """The text in UTF-8.

    Raises:
        ParameterError: half a surrogate pair, which no text should hold.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise ParameterError(f"Character {e.start} of the text, {text[e.start]!r}, is half a character.") from e
