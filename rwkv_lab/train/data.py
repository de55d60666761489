"""Text to train on and text that is held out. Nothing is downloaded: Python brings two corpora.

* "english": the reference texts of Python's `help()`, `pydoc_data.topics`. Topics repeat each other, so every longer
  paragraph is kept once; the rest is cut at paragraph ends into pieces of about 2,000 bytes, the unit of the split.
* "python": the source files of the standard library, without tests and data tables. A file is held out as a whole.
* a `.jsonl`, or a `.json` with an object on its first line: see `rwkv_lab.train.examples`. Other `.json` is refused.
* a folder: its texts (`.txt`, `.md`, `.rst`, `.py`) and those below it. A file is held out as a whole.
* any other file, read as bytes. The last tenth is held out.

The hash is SHA-256 of the piece's name (`topic/number`, or the file's path below the library): one in ten is held out.
Both parts are in the order of that hash, so neither depends on the order in which a folder lists its files.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.errors import ParameterError
from rwkv_lab.train.examples import Examples, begins_with_object, load_examples

CORPORA = ("english", "python")
_PIECE = 2000  # characters of English per piece
_LONG = 60  # characters; shorter paragraphs ("Example:") repeat as they do in any text
_MAX_HELD_OUT = 64 * 1024  # bytes; scoring more would take longer than it tells
_TEXTS = (".txt", ".md", ".rst", ".py")
_NOT_CODE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never trained on."""

    name: str
    train: bytes
    held_out: bytes
    split: str  # in words, for reports


def load_corpus(data: str) -> Corpus | Examples:
    """The corpus of a name in `CORPORA`, of a file or of a folder.

    Raises:
        ParameterError: neither a name nor a path, what cannot be read, a folder of fewer than two texts, a file of less
            than 10,000 bytes, a line of a `.jsonl` that is no example, a `.json` that has no example a line.
    """
    if data == "english":
        return _split_by_hash(
            data, _english_pieces(), "pieces of 2,000 characters of pydoc_data.topics, one in ten held out"
        )
    if data == "python":
        return _split_by_hash(data, _library_files(), "files of the standard library, one in ten held out as a whole")
    try:
        return _of_files(Path(data))
    except OSError as e:
        raise ParameterError(f"{e.filename or data} cannot be read: {e.strerror or e}.") from e


def data_path(data: str) -> Path | None:
    """The file or folder that `data` names; None where it is one of `CORPORA`."""
    return None if data in CORPORA else Path(data)


def _of_files(path: Path) -> Corpus | Examples:
    if path.is_dir():
        texts = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.suffix in _TEXTS and p.is_file()}
        pieces = {name: p.read_bytes() for name, p in texts.items()}
        if len(pieces) < 2:
            raise ParameterError(f"{path} has {len(pieces)} files in {', '.join(_TEXTS)}; two are needed at least.")
        return _split_by_hash(path.name, pieces, "files of the folder, one in ten held out as a whole")
    if not path.is_file():
        raise ParameterError(f"data={str(path)!r} is neither one of {', '.join(CORPORA)} nor a file or folder.")
    if path.suffix.lower() == ".json" and not begins_with_object(path):
        raise ParameterError(
            f"{path} is JSON, and its first line is no object; its braces would be trained on.\n"
            'Write JSONL: one object a line, {"text": …} or {"prompt": …, "response": …}.'
        )
    if path.suffix.lower() in (".jsonl", ".json"):
        return load_examples(path)
    text = path.read_bytes()
    if len(text) < 10_000:
        raise ParameterError(f"{path} has {len(text)} bytes; at least 10,000 are needed to train and to hold some out.")
    cut = len(text) * 9 // 10
    return Corpus(path.name, text[:cut], text[cut:][:_MAX_HELD_OUT], "the last tenth of the file held out")


def _split_by_hash(name: str, pieces: dict[str, bytes], split: str) -> Corpus:
    by_hash = sorted((hashlib.sha256(key.encode()).digest(), key) for key in pieces)
    held = {key for digest, key in by_hash if _held_out(digest)} or {by_hash[0][1]}  # a few pieces may all have missed
    if len(held) == len(pieces):
        held = {by_hash[0][1]}
    train = b"\n".join(pieces[key] for _, key in by_hash if key not in held)
    held_out = b"\n".join(pieces[key] for _, key in by_hash if key in held)
    return Corpus(name, train, held_out[:_MAX_HELD_OUT], split)


def _held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[-8:]) % 10 == 0  # the last bytes: the order goes by the first ones


def _english_pieces() -> dict[str, bytes]:
    from pydoc_data.topics import topics

    pieces, seen = {}, set()
    for topic, text in sorted(topics.items()):
        paragraphs: list[str] = []
        count = 0
        for paragraph in text.split("\n\n"):
            if len(paragraph) > _LONG and paragraph in seen:
                continue
            seen.add(paragraph)
            paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) >= _PIECE:
                pieces[f"{topic}/{count}"] = "\n\n".join(paragraphs).encode()
                paragraphs, count = [], count + 1
        pieces[f"{topic}/{count}"] = "\n\n".join(paragraphs).encode()
    return pieces


def _library_files() -> dict[str, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not _NOT_CODE & set(name.parts) and not name.name.startswith("_sysconfigdata"):
            files[name.as_posix()] = path.read_bytes()
    return files
