"""Text to train on and text that is held out. Nothing is downloaded: Python brings two corpora.

* "english": the reference texts of Python's `help()`, `pydoc_data.topics`. Topics repeat each other, so every longer
  paragraph is kept once; the rest is cut at paragraph ends into pieces of about 2,000 bytes, the unit of the split.
* "python": the source files of the standard library, without tests and data tables. A file is held out as a whole.
* a file: text, records or tokens, which its bytes decide (`rwkv_lab.train.sources`). The last tenth of a text is held
  out; of records (`rwkv_lab.train.records`) one in ten; of tokens (`rwkv_lab.train.token_files`) the last tenth.
* a folder: its data files and those below it (`rwkv_lab.train.folder`). A text is held out as a whole.

The hash is SHA-256 of the piece's name (`topic/number`, or the file's path below the library): one in ten is held out.
Both parts are in the order of that hash, so neither depends on the order in which a folder lists its files.
"""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import to_path, what_is_there
from rwkv_lab.text import counted
from rwkv_lab.train.examples import RECORDS, Example, Examples, read_examples, split_examples
from rwkv_lab.train.folder import Folder, open_folder
from rwkv_lab.train.records import RecordReader
from rwkv_lab.train.sources import TEXT, Source, open_source
from rwkv_lab.train.token_files import TokenCorpus, is_pair, read_tokens, split_tokens

CORPORA = ("english", "python")
_PIECE = 2000  # characters of English per piece
_LONG = 60  # characters; shorter paragraphs ("Example:") repeat as they do in any text
_MAX_HELD_OUT = 64 * 1024  # bytes; scoring more would take longer than it tells
_NOT_CODE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never trained on."""

    name: str
    train: bytes
    held_out: bytes
    split: str  # in words, for reports
    notes: tuple[str, ...] = ()  # how it was stored and what was skipped, a sentence each


@checked
def load_corpus(
    data: str | Path, ignore: Sequence[str] = (), template: str = "world"
) -> Corpus | Examples | TokenCorpus:
    """The corpus of a name in `CORPORA`, of a file or of a folder.

    Args:
        data: a name, or a path in which `~` is expanded.
        ignore: names of fields of records, or patterns of them, that need not be used.
        template: of conversations in records; see `rwkv_lab.train.records.read_template`.

    Raises:
        ParameterError: neither a name nor a path, what cannot be read, binary of no known kind, a folder of fewer than
            two texts or of several sorts, a text of less than 10,000 bytes, a record that is no example, a field of
            records that would not be used.
        CorruptFileError: compressed, tokens or Parquet that are broken.
    """
    if data == "english":
        return _english()
    if data == "python":
        return _python()
    try:
        return _of_files(to_path(data, "data"), RecordReader(ignore, template))
    except OSError as e:
        raise ParameterError(f"{e.filename or data} cannot be read: {e.strerror or e}.") from e


def check_data(data: str | Path) -> None:
    """Refuse a path that leads to no file and no folder; nothing is read.

    Raises:
        ParameterError: as `load_corpus`.
    """
    if data not in CORPORA:
        path = to_path(data, "data")
        if not (path.exists() or is_pair(path)):
            raise _no_data(path)


def data_files(data: str | Path) -> list[Path]:
    """The file, the files of a pair, or the folder that `data` names; none where it is one of `CORPORA`."""
    if data in CORPORA:
        return []
    path = to_path(data, "data")
    pair = [path.with_suffix(".bin"), path.with_suffix(".idx")] if path.suffix in (".bin", ".idx") else []
    pair = pair or [path.with_name(path.name + suffix) for suffix in (".bin", ".idx")]
    return [p for p in dict.fromkeys((path, *pair)) if p.exists()]


def _of_files(path: Path, reader: RecordReader) -> Corpus | Examples | TokenCorpus:
    if path.is_dir():
        return _of_folder(open_folder(path), reader)
    if not path.is_file() and is_pair(path):
        path = path.with_name(path.name + ".idx")
    if not path.is_file():
        raise _no_data(path)
    source = open_source(path)
    notes = (f"{path.name} was read as {source.described}.",) if source.kind != TEXT or source.notes else ()
    if source.kind == TEXT:
        return _of_text(source, (*notes, *reader.notes()))
    if source.kind in RECORDS:
        examples = read_examples(source, reader.example)
        reader.check_rest(str(path), examples)
        unit = "rows" if source.kind == "Parquet" else "records" if source.kind == "JSON array" else "lines"
        return split_examples(str(path), examples, (*notes, *reader.notes()), f"{unit} of the file", reader.stop)
    return split_tokens(path.name, [read_tokens(source)], (*notes, *reader.notes()))


def _no_data(path: Path) -> ParameterError:
    """What is wrong with a path that leads to no file and no folder."""
    pair = [path.with_suffix(suffix) for suffix in (".bin", ".idx")]
    pair = pair if path.suffix in (".bin", ".idx") else [path.with_name(path.name + p.suffix) for p in pair]
    if any(p.is_file() for p in pair):
        there, lost = pair if pair[0].is_file() else pair[::-1]
        return ParameterError(f"There is {there}, and no {lost.name} beside it; tokens are a pair of both.")
    if path.exists():
        return ParameterError(f"data={str(path)!r} is a device, a pipe or the like. Save it as a file.")
    return ParameterError(
        f"data={str(path)!r} is neither one of {', '.join(CORPORA)} nor a file or folder.\n"
        f"There is no file {path}{what_is_there(path)}"
    )


def _of_text(source: Source, notes: tuple[str, ...]) -> Corpus:
    path, text = source.path, source.content
    if text and not text.strip():
        raise ParameterError(f"{path} holds nothing but {len(text):,} blanks and line ends.")
    if len(text) < 10_000:
        raise ParameterError(f"{path} has {len(text)} bytes; at least 10,000 are needed to train and to hold some out.")
    cut = _character(text, len(text) * 9 // 10)
    return Corpus(path.name, text[:cut], _at_most(text[cut:]), "the last tenth of the file held out", notes)


def _of_folder(folder: Folder, reader: RecordReader) -> Corpus | Examples | TokenCorpus:
    path, sources, notes = folder.path, folder.sources, folder.notes()
    if folder.are_texts:
        if len(sources) < 2:
            hint = f"\n{notes[0]}" if notes else ""
            raise ParameterError(f"{path} has {counted(len(sources), 'file')} of text; two are needed at least.{hint}")
        pieces = {name: source.content for name, source in sources.items()}
        notes += tuple(reader.notes())
        return _split_by_hash(path.name, pieces, "files of the folder, one in ten held out as a whole", notes)
    notes += (
        f"{counted(len(sources), 'file was', 'files were')} read: {', '.join([*sources][:10])}"
        f"{', …' if len(sources) > 10 else ''}.",
    )
    if all(source.kind in RECORDS for source in sources.values()):
        examples: list[Example] = []
        for source in sources.values():
            examples += read_examples(source, reader.example)
        reader.check_rest(str(path), examples)
        return split_examples(str(path), examples, (*notes, *reader.notes()), "records of the folder", reader.stop)
    return split_tokens(path.name, [read_tokens(source) for source in sources.values()], (*notes, *reader.notes()))


def _character(text: bytes, at: int) -> int:
    """The first place from `at` on where a character of UTF-8 begins."""
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _at_most(text: bytes) -> bytes:
    """The beginning of a text, in whole characters, that is measured."""
    end = _MAX_HELD_OUT
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]


def _split_by_hash(name: str, pieces: dict[str, bytes], split: str, notes: tuple[str, ...] = ()) -> Corpus:
    by_hash = sorted((hashlib.sha256(key.encode()).digest(), key) for key in pieces)
    held = {key for digest, key in by_hash if _held_out(digest)} or {by_hash[0][1]}  # a few pieces may all have missed
    if len(held) == len(pieces):
        held = {by_hash[0][1]}
    train = b"\n".join(pieces[key] for _, key in by_hash if key not in held)
    held_out = b"\n".join(pieces[key] for _, key in by_hash if key in held)
    return Corpus(name, train, _at_most(held_out), split, notes)


def _held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[-8:]) % 10 == 0  # the last bytes: the order goes by the first ones


# What Python brings stays the same while it runs, and is asked for by every plan.
@cache
def _english() -> Corpus:
    split = "pieces of 2,000 characters of pydoc_data.topics, one in ten held out"
    return _split_by_hash("english", _english_pieces(), split)


@cache
def _python() -> Corpus:
    split = "files of the standard library, one in ten held out as a whole"
    return _split_by_hash("python", _library_files(), split)


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
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_CODE]  # what is installed is not even listed
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder) / name
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files
