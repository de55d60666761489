"""JSONL: one example a line, `{"text": …}`, or `{"prompt": …, "response": …}` of which the response is learned."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.errors import ParameterError

_KEYS = {"text", "prompt", "response"}


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and what is learned to follow it."""

    prompt: bytes
    response: bytes
    line: int  # in its file, from 1


@dataclass(frozen=True)
class Examples:
    """Examples to train on and examples never trained on."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    split: str  # in words, for reports


def load_examples(path: Path) -> Examples:
    """Read a JSONL file. One line in ten is held out, by the hash of its text: the same lines stay together wherever
    they stand.

    Raises:
        ParameterError: a line that is no such object, with its number, or too few lines.
    """
    by_hash: dict[bytes, list[Example]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                example = _example(line, f"{path}, line {number}", number)
                key = hashlib.sha256(example.prompt + b"\0" + example.response).digest()
                by_hash.setdefault(key, []).append(example)
    if len(by_hash) < 2:
        raise ParameterError(f"{path} has {len(by_hash)} different examples; two at least: to train, and to hold out.")
    held = {key for key in by_hash if int.from_bytes(key[-8:]) % 10 == 0}
    if not held or len(held) == len(by_hash):
        held = {min(by_hash)}
    train = [e for key, same in by_hash.items() if key not in held for e in same]
    held_out = [e for key, same in by_hash.items() if key in held for e in same[:1]]
    return Examples(path.name, tuple(train), tuple(held_out), "lines of the file, one in ten held out")


def begins_with_object(path: Path) -> bool:
    """Whether the first line that is not empty is a whole JSON object."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _example(line: bytes, where: str, number: int) -> Example:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ParameterError(f"{where}: this is no JSON ({e}).\nEach line must be one whole object.") from None
    if not isinstance(found, dict) or not _KEYS & set(found):
        raise ParameterError(f'{where}: it must be an object with "text", or with "prompt" and "response".')
    if "text" in found and ("prompt" in found or "response" in found):
        raise ParameterError(f'{where} has "text" beside "prompt" or "response"; only one of the two can be meant.')
    for name in ("text",) if "text" in found else ("prompt", "response"):
        if not isinstance(found.get(name), str):
            missing = "is missing" if name not in found else "is no text"
            raise ParameterError(f'{where}: "{name}" {missing}; a prompt goes with a response, both are texts.')
    learned = found["text"] if "text" in found else found["response"]
    if not learned:
        raise ParameterError(f"{where}: there is nothing to learn, the text to be learned is empty.")
    try:
        return Example(found.get("prompt", "").encode(), learned.encode(), number)
    except UnicodeEncodeError:
        raise ParameterError(f"{where}: it holds half a surrogate pair, which is no text.") from None
