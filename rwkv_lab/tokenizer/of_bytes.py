"""Bytes as tokens: for the demo model and others of 256 or 257 tokens."""

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.tokenizer.decoding import ByteDecoding, utf8


class ByteTokenizer(ByteDecoding):
    """One token per byte of UTF-8.

    vocab_size 257: token 0 ends the text and byte b is token b + 1, as in the World vocabulary.
    vocab_size 256: a token is the byte's value, and nothing ends the text.

    Raises:
        ParameterError: another vocab_size.
    """

    @checked
    def __init__(self, vocab_size: int):
        if vocab_size not in (256, 257):
            raise ParameterError(f"Bytes make a vocabulary of 256 or 257 tokens; the model has {vocab_size}.")
        self._first = vocab_size - 256  # token of byte 0
        bytes_of = {byte + self._first: bytes([byte]) for byte in range(256)}
        super().__init__(bytes_of, vocab_size, end_of_text=0 if vocab_size == 257 else None)

    @checked
    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text; bytes need not be valid UTF-8."""
        return [byte + self._first for byte in (utf8(text) if isinstance(text, str) else text)]
