"""Examples: what is learned, and what is read before it; out of files of records, some of them held out."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab.errors import ParameterError
from rwkv_lab.text import counted
from rwkv_lab.train import tables
from rwkv_lab.train.sources import ARRAY, PARQUET, TABLE, Source, is_json

RECORDS = ("JSON lines", ARRAY, TABLE, PARQUET)  # kinds of files that hold records


@dataclass(frozen=True)
class Example:
    """What is read and what is learned, in turn: a prompt, which may be empty, and the response to it; in a
    conversation what follows, and the next response."""

    turns: tuple[tuple[bytes, bytes], ...]  # (not learned, learned)
    line: int  # line or row in its file, from 1
    place: str = field(default="", compare=False)  # file and line, for messages

    @property
    def prompt(self) -> bytes:
        """What is read before the first of what is learned."""
        return self.turns[0][0]

    @property
    def response(self) -> bytes:
        """All that is learned."""
        return b"".join(learned for _, learned in self.turns)

    @property
    def text(self) -> bytes:
        """All of it, as a model reads it."""
        return b"".join(read + learned for read, learned in self.turns)


@dataclass(frozen=True)
class Examples:
    """Examples to train on and examples never trained on."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    split: str  # in words, for reports
    notes: tuple[str, ...] = ()  # what was ignored and skipped, a sentence each
    stop: tuple[str, ...] = ()  # what ends an answer, where a chat template wrote them

    @property
    def are_texts(self) -> bool:
        """Whether none of them has a prompt."""
        return not any(read for e in (*self.train, *self.held_out) for read, _ in e.turns)


def read_examples(source: Source, example: Callable[[Any, int, str], Example | None]) -> list[Example]:
    """The examples in a file of records, in its order.

    Args:
        example: makes one of a record, its line, and file and line in words; None where there is nothing to learn.

    Raises:
        ParameterError: a record that is none, with its line.
        CorruptFileError: broken Parquet.
    """
    path, what = source.path, "row" if source.kind == PARQUET else "line"
    found = (example(record, n, f"{path}, {what} {n}") for n, record in records(source))
    return [one for one in found if one is not None]


def split_examples(
    name: str,
    examples: Sequence[Example],
    notes: Sequence[str] = (),
    unit: str = "lines of the file",
    stop: tuple[str, ...] = (),
) -> Examples:
    """One in ten is held out, by the hash of its text: equal ones stay together wherever they stand.

    Raises:
        ParameterError: fewer than two that differ.
    """
    by_hash: dict[bytes, list[Example]] = {}
    for example in examples:
        parts = [part for turn in example.turns for part in turn]
        by_hash.setdefault(hashlib.sha256(b"\0".join(parts)).digest(), []).append(example)
    if len(by_hash) < 2:
        raise ParameterError(
            f"{name} has {counted(len(by_hash), 'different example')}; two at least: to train, and to hold out."
        )
    held = {key for key in by_hash if int.from_bytes(key[-8:]) % 10 == 0}
    if not held or len(held) == len(by_hash):
        held = {min(by_hash)}
    train = [e for key, same in by_hash.items() if key not in held for e in same]
    held_out = [e for key, same in by_hash.items() if key in held for e in same[:1]]
    return Examples(Path(name).name, tuple(train), tuple(held_out), f"{unit}, one in ten held out", tuple(notes), stop)


def records(source: Source) -> Iterator[tuple[int, Any]]:
    """What stands in a file of records, each with its line, or its row in Parquet, from 1.

    Raises:
        ParameterError: what is no record, with its line.
        CorruptFileError: broken Parquet.
    """
    if source.kind == PARQUET:
        return tables.parquet_rows(source.path, source.content)
    if source.kind == TABLE:
        return tables.csv_rows(source.path, source.content)
    return _array(source) if source.kind == ARRAY else _lines(source)


def _lines(source: Source) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(io.BytesIO(source.content), 1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as e:
                if is_json(source.content):
                    raise ParameterError(
                        f"{source.path}, line {number}: it holds one JSON object over several lines.\n"
                        "Write the records alone, one object a line or as an array: [{…}, {…}]."
                    ) from None
                raise ParameterError(
                    f"{source.path}, line {number}: this is no JSON ({e}).\n"
                    'Each line must be one whole object: {"text": …} or {"prompt": …, "response": …}.'
                ) from None


def _array(source: Source) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, each with the line that it begins in."""
    text, decoder = source.content.decode(), json.JSONDecoder(object_pairs_hook=_object)
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _next(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and not text[at + 1 :].strip():
            return
        try:
            value, at = decoder.raw_decode(text, at)
            following = _next(text, at)
            if text[following : following + 1] not in (",", "]"):
                raise ValueError("a comma or ] is expected after it")
        except (ValueError, RecursionError) as e:
            raise ParameterError(
                f"{source.path}, line {line}: this is no JSON ({e}).\n"
                'Write one object a line, {"text": …} or {"prompt": …, "response": …}, or an array of such objects.'
            ) from None
        yield line, value
        at = following + (text[following] == ",")


def _next(text: str, at: int) -> int:
    """Where the next character stands that is no blank."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in [n for n, _ in pairs[:i]])
        raise ValueError(f"the field {twice!r} stands twice")
    return found
