"""Text to tokens and back. Bytes only: a token is a byte."""

import codecs

from rwkv_lab.errors import ParameterError


class ByteTokenizer:
    """One token per byte of UTF-8.

    vocab_size 257: token 0 ends the text and byte b is token b + 1, as in the World vocabulary.
    vocab_size 256: a token is the byte's value, and nothing ends the text.
    """

    def __init__(self, vocab_size: int):
        if vocab_size not in (256, 257):
            raise ParameterError(
                f"There is no tokenizer for a vocabulary of {vocab_size} tokens: only bytes (256 or 257) so far.\n"
                "Pass token ids to the model instead of text."
            )
        self.vocab_size = vocab_size
        self.end_of_text = 0 if vocab_size == 257 else None
        self._first = vocab_size - 256  # token of byte 0

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text; bytes need not be valid UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return [byte + self._first for byte in data]

    def decode_bytes(self, ids) -> bytes:
        """The bytes behind token ids; the end of text stands for no byte.

        Raises:
            ParameterError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ParameterError(f"Token {wrong} is outside the vocabulary of {self.vocab_size} tokens.")
        return bytes(i - self._first for i in ids if i != self.end_of_text)

    def decode(self, ids) -> str:
        """The text behind token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "ByteStream":
        """A decoder that takes one token at a time."""
        return ByteStream(self)


class ByteStream:
    """Decodes tokens as they come; a character is given out when its last byte is there, never in parts."""

    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int, last: bool = False) -> str:
        """Text that this token completes, often empty; with `last`, also what an unfinished character leaves."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]), final=last)
