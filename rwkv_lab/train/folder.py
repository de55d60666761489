"""A folder as training data: which of its files are data, and why the others are not."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.train.examples import RECORDS, records
from rwkv_lab.train.names import is_record
from rwkv_lab.train.sources import LINES, TEXT, Source, is_json, is_named_as_records, open_source

_CARDS = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct)\b.*", re.I)
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"}
_SUMS = re.compile(r"(md5|sha\d*)sums?(\.txt)?|checksums?(\.txt)?|.*\.(md5|sha1|sha256|sha512|crc32)", re.I)
_SUM_LINES = re.compile(rb"(?:\\?[0-9a-fA-F]{32,128} [ *]\S[^\n]*\n?)+")
_APART = re.compile(r"(^|[^a-z])(test|valid|validation|val|eval|dev)([^a-z]|$)", re.I)
_SHOWN = 6


@dataclass(frozen=True)
class Folder:
    """The data files of a folder, all of one sort, in the order of their names."""

    path: Path
    sources: dict[str, Source]  # by path below the folder
    skipped: dict[str, str]  # path below the folder -> why

    @property
    def are_texts(self) -> bool:
        return all(source.kind == TEXT for source in self.sources.values())

    def notes(self) -> tuple[str, ...]:
        """What was skipped, and what is named as if it were to be kept apart, a sentence each."""
        apart = [name for name in self.sources if not self.are_texts and _APART.search(name)]
        words = f"By their names these are for testing, and they are trained on too: {_some(apart)}." if apart else ""
        return tuple(filter(None, (self._skipped(), words)))

    def _skipped(self) -> str:
        if not self.skipped:
            return ""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        listed = "; ".join(f"{_some(names)} ({reason})" for reason, names in by_reason.items())
        return f"{len(self.skipped):,} of {len(self.skipped) + len(self.sources):,} files were skipped: {listed}."


def open_folder(path: Path) -> Folder:
    """The data files in a folder and those below it, behind links too; a file under two names is read once.

    Raises:
        ParameterError: texts beside records or tokens, of which only one sort can be meant; no data at all; a file that
            is named as one of records and is none.
        CorruptFileError: a file of data that is broken.
        OSError: a folder that cannot be read.
    """
    sources: dict[str, Source] = {}
    skipped: dict[str, str] = {}
    known: dict[tuple[int, int], str] = {}  # device and inode -> name
    for name, file in _files(path):
        reason = _no_data(name, file)
        if not reason:
            status = file.stat()
            first = known.setdefault((status.st_dev, status.st_ino), name)
            reason = f"the same file as {first}" if first != name else ""
        if not reason:
            try:
                source = open_source(file)
                reason = _no_records(source) if source.kind in RECORDS else ""
            except ParameterError as e:
                if is_named_as_records(file):
                    raise
                reason = _short(e, file)
            else:
                if not reason:
                    name = source.path.relative_to(path).as_posix()  # of a pair of .bin and .idx: the .idx
                    sources[name] = source
                    continue
        skipped[name] = reason
    return Folder(path, _of_one_sort(path, sources, skipped), skipped)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """What is below a folder, by name; links come last, and a folder behind several is entered once."""
    found: dict[str, Path] = {}
    entered: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(at, name)), name))
        found |= {(Path(at) / name).relative_to(path).as_posix(): Path(at) / name for name in names}
    return iter(sorted(found.items(), key=lambda item: (item[1].is_symlink(), item[0])))


def _raise(error: OSError) -> None:
    raise error


def _no_data(name: str, file: Path) -> str:
    """Why a file is no data, as far as its name tells; "" if it may be."""
    if any(part.startswith(".") for part in Path(name).parts) or "__pycache__" in Path(name).parts:
        return "hidden"
    if not file.is_file():
        return "no file, or a link that leads nowhere"
    if _CARDS.fullmatch(file.name):
        return "a card, licence or the like"
    if file.name in _METADATA:
        return "describes the data"
    if _SUMS.fullmatch(file.name):
        return "checksums"
    return ""


def _no_records(source: Source) -> str:
    """Why JSON or a table is no data, such as a file of settings; "" for records, and for what is broken: reading it
    tells where."""
    if source.content and not source.content.strip() or source.kind == LINES and not source.content:
        return "empty"
    try:
        _, first = next(records(source), (0, None))
    except (ParameterError, CorruptFileError):
        whole = source.kind == LINES and is_json(source.content)
        return "one JSON object, no records" if whole else ""
    return "" if isinstance(first, dict) and is_record(first) else f"a {source.kind} without known fields"


def _short(error: Exception, file: Path) -> str:
    """The first sentence of a refusal, without the path that stands before it."""
    return str(error).splitlines()[0].removeprefix(str(file)).removeprefix(" is ").strip(" :.")[:120]


def _of_one_sort(path: Path, sources: dict[str, Source], skipped: dict[str, str]) -> dict[str, Source]:
    """The sources without checksums, and without empty files where records are meant; refuses mixtures."""
    for name, source in list(sources.items()):
        if source.kind == TEXT and _SUM_LINES.fullmatch(source.content):
            skipped[name] = "checksums"
            del sources[name]
    sorts: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source.kind != TEXT or source.content.strip():
            sort = "text" if source.kind == TEXT else "records" if source.kind in RECORDS else "tokens"
            sorts.setdefault(sort, []).append(name)
    if len(sorts) > 1:
        listed = ", ".join(f"{len(names):,} of {sort} ({_some(names, 2)})" for sort, names in sorted(sorts.items()))
        raise ParameterError(
            f"{path} mixes files {listed}; only one sort can be meant.\nPut each sort into a folder of its own."
        )
    if sorts and "text" not in sorts:
        for name in [n for n, source in sources.items() if source.kind == TEXT]:
            skipped[name] = "empty"
            del sources[name]
    return sources


def _some(names: list[str], shown: int = _SHOWN) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
