"""RWKV's vocabularies of byte strings for transformers: the longest token that fits is taken, from left to right.

A vocabulary file has one line per token: its id, a Python literal (text or bytes) and the number of bytes in it. Text
is neither normalised nor split beforehand, nothing is added before or after it, and no text stands for a special
token: `<|endoftext|>` in a prompt is text, and the end of a text is its id.
"""

import ast
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

END_OF_TEXT = "<|endoftext|>"


class RwkvWorldTokenizer(PreTrainedTokenizer):
    """The World vocabulary. Id 0, which is in no file, ends a text.

    Tokens are shown as their bytes, each as the character of that number: "\\xe4\\xbd\\xa0" is three bytes of UTF-8.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **settings: Any):
        self.vocab_file = vocab_file
        self._bytes_of = _read(vocab_file)
        self._ids = {token: i for i, token in self._bytes_of.items()}
        lengths = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        end = settings.pop("end_of_text_id", 0)
        self._end = (END_OF_TEXT, end)
        settings.setdefault("split_special_tokens", True)
        settings.setdefault("clean_up_tokenization_spaces", False)
        settings.setdefault("padding_side", "left")
        if end is not None:
            for name in ("bos_token", "eos_token", "pad_token"):
                settings.setdefault(name, END_OF_TEXT)
        super().__init__(end_of_text_id=end, **settings)

    @property
    def vocab_size(self) -> int:
        ids = [*self._bytes_of, *([] if self._end[1] is None else [self._end[1]])]
        return max(ids) + 1

    def get_vocab(self) -> dict[str, int]:
        vocab = {token.decode("latin-1"): i for i, token in self._bytes_of.items()}
        if self._end[1] is not None:
            vocab[self._end[0]] = self._end[1]
        return vocab | self.added_tokens_encoder

    def _tokenize(self, text, **ignored):
        data, tokens, at = text.encode("utf-8"), [], 0
        while at < len(data):
            n = next((n for n in self._lengths.get(data[at : at + 2], ()) if data[at : at + n] in self._ids), 1)
            tokens.append(data[at : at + n].decode("latin-1"))
            at += n
        return tokens

    def _convert_token_to_id(self, token):
        if token == self._end[0]:
            return self._end[1]
        try:
            return self._ids.get(token.encode("latin-1"))
        except UnicodeEncodeError:
            return None

    def _convert_id_to_token(self, index):
        if index == self._end[1]:
            return self._end[0]
        return self._bytes_of.get(index, b"").decode("latin-1")  # rows of the embedding without a token: nothing

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        found = b""
        for token in tokens:
            if token in self.added_tokens_encoder:
                found += token.encode("utf-8")
            else:
                found += token.encode("latin-1")
        return found.decode("utf-8", errors="replace")

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **ignored):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return list(token_ids_0) + list(token_ids_1 or [])

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        ids = list(token_ids_0) + list(token_ids_1 or [])
        return [int(already_has_special_tokens and i == self._end[1]) for i in ids]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


class RwkvByteTokenizer(RwkvWorldTokenizer):
    """One token per byte."""

    vocab_files_names = {"vocab_file": "byte_vocab.txt"}


def _read(path):
    """The bytes of every token by its id."""
    bytes_of = {}
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            head, _, rest = line.rstrip("\r\n").partition(" ")
            literal, _, length = rest.rpartition(" ")
            value = ast.literal_eval(literal)  # literals only: nothing is run
            token = value.encode("utf-8") if isinstance(value, str) else value
            if len(token) != int(length):
                raise ValueError(f"{path}: token {head} has {len(token)} bytes, not {length}")
            bytes_of[int(head)] = token
    return bytes_of
