"""What a data file is, decided by its bytes and never by its name; and its content as UTF-8.

Text, JSON lines, JSON arrays and tables may be compressed (gzip, zstd, bz2, xz), in UTF-8, UTF-16 or UTF-32. Parquet,
`.npy` and pairs of `.bin` and `.idx` are binary kinds of their own. Any other binary is refused; nothing is unpickled.
"""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.train.encoding import BOMS, as_utf8
from rwkv_lab.train.names import KNOWN, plain
from rwkv_lab.train.tables import delimiter_of

TEXT, LINES, ARRAY, TABLE, PARQUET, NPY, INDEX = "text", "JSON lines", "JSON array", "table", "Parquet", "npy", "binidx"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SKIPPED_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.S)  # of zstd
_BINARY = {b"PAR1": PARQUET, b"\x93NUMPY": NPY, b"MMIDIDX\0\0": INDEX}
# What else people have under their hands, for the message only.
_OTHERS = {
    b"PK\x03\x04": "a zip archive (a .pth, .npz, .docx or .zip); unpack it",
    b"PK\x05\x06": "a zip archive with nothing in it",
    b"%PDF": "a PDF; extract its text",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database; export a table of it as CSV",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF model",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream, as datasets.save_to_disk writes it; save it with to_parquet or to_json",
    b"TNTIDX": "the index of an older token format; write it again as MMIDIDX",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed by LZ4; unpack it",
    b"\x1f\x9d": "compressed by compress; unpack it",
    b"]\0\0": "compressed by lzma; unpack it",
    b"LZIP\x01": "compressed by lzip; unpack it",
    b"\xff\x06\0\0sNaPpY": "compressed by snappy; unpack it",
    b"Obj\x01": "an Avro file; save it as Parquet or JSON lines",
    b"\xd0\xcf\x11\xe0": "a document of an older Office; save it as plain text or CSV",
    b"{\\rtf": "an RTF document; save it as plain text",
    **{bytes([0x80, version]): "a pickle, which may run code and is never opened" for version in (2, 3, 4, 5)},
}
_JSON = re.compile(rb"\s*(\{\s*[\"}]|\[\s*[{\"])")  # an object, or an array of objects or of texts
_PYTHON = re.compile(rb"\s*\{\s*'([A-Za-z_]+)'\s*:")  # an object as Python prints it
_HEAD, _LINES = 1 << 16, 20  # bytes and lines that tell whether a text is JSON lines
_JSON_NAMES = {".json", ".jsonl", ".ndjson", ".jsonlines"}
_TABLE_NAMES = {".csv", ".tsv"}
_COMPRESSED_NAMES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A data file of a known kind.

    content: UTF-8 of text, JSON and tables; the bytes of a compressed Parquet or npy file; else empty, since those are
        read from the file.
    """

    path: Path
    kind: str
    content: bytes = b""
    notes: tuple[str, ...] = ()  # how it was stored, where that is not plain UTF-8

    @property
    def described(self) -> str:
        """Its kind, and how it was stored."""
        return ", ".join((self.kind, *self.notes))


def open_source(path: Path) -> Source:
    """The kind of a file, and its content where that is text.

    Raises:
        ParameterError: binary of no known kind, text that is neither UTF-8 nor UTF-16, or that does not fit in memory.
        CorruptFileError: compressed data that are broken or end too early.
        OSError: it cannot be read.
    """
    if path.suffix in (".bin", ".idx") and (index := path.with_suffix(".idx")).is_file():
        path = index if _head(index).startswith(b"MMIDIDX\0\0") else path  # a .bin has no header of its own
    head, notes, content = _head(path), [], None
    if compression := _compression(head):
        content = _decompressed(path, compression)
        head = content[: len(head) or 512]
        notes.append(compression)
    binary = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None)
    if binary:
        return Source(path, binary, content or b"", tuple(notes))
    _refuse_other(path, head)
    content, encoding = as_utf8(path, path.read_bytes() if content is None else content)
    return Source(path, _text_kind(path, content), content, (*notes, *([] if encoding == "utf-8" else [encoding])))


def _compression(head: bytes) -> str:
    if _SKIPPED_FRAME.match(head):  # what some programs write before the first frame of data
        return "zstd"
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _refuse_other(path: Path, head: bytes) -> None:
    known = next((words for magic, words in _OTHERS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        known = "a tar archive; unpack it"
    if _compression(head):
        known = "compressed twice; unpack it once"
    if known and not any(head.startswith(bom) for bom in BOMS):
        raise ParameterError(f"{path} is {known}: it is no training data.")


def _decompressed(path: Path, compression: str) -> bytes:
    limit = memory_free()
    parts, size = [], 0
    try:
        for part in _parts(path, compression):
            parts.append(part)
            size += len(part)
            if 2 * size > limit:
                raise ParameterError(
                    f"{path} ({compression}) holds more than {size:,} bytes; {limit:,} bytes of memory are free.\n"
                    "Split it, or give tokens as a pair of .bin and .idx, which is read from the disk."
                )
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as e:
        raise CorruptFileError(f"{path} is broken: {compression} says: {e}.") from e
    except OSError as e:
        if e.errno is not None:
            raise
        raise CorruptFileError(f"{path} is broken: {compression} says: {e}.") from e  # bz2 raises OSError for data too
    return b"".join(parts)


def _parts(path: Path, compression: str) -> Iterator[bytes]:
    if compression == "gzip":
        with gzip.open(path, "rb") as unpacked:
            while part := unpacked.read(_CHUNK):
                yield part
        return
    with open(path, "rb") as file:
        if compression == "zstd":
            yield from _zstd_parts(file, path)
        else:
            yield from _streams(file, bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor)


def _streams(file: IO[bytes], begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> Iterator[bytes]:
    """Stream after stream to the end of the file. What follows the last one and is no stream, which Python's own files
    pass over, is refused; zeros are padding.

    Args:
        begin: makes a decompressor of one stream.
    """
    stream, chunk, ended = None, b"", False
    while chunk or (stream and not stream.needs_input) or (chunk := file.read(_CHUNK)):
        if stream is None:
            chunk = chunk.lstrip(b"\0") if ended else chunk
            if not chunk:
                continue
            stream = begin()
        try:
            part, chunk = stream.decompress(chunk, _CHUNK), b""
        except (OSError, lzma.LZMAError) as e:
            raise ValueError(f"what follows its data is no more of it ({e})" if ended else str(e)) from e
        yield part
        if stream.eof:
            stream, chunk, ended = None, stream.unused_data, True
    if stream is not None:
        raise EOFError("it ends before the end of its data")


def _zstd_parts(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Frame after frame. A file that ends inside a frame is refused, which zstandard's own stream passes over."""
    try:
        import zstandard
    except ImportError as e:
        raise ParameterError(
            f"{path} is compressed by zstd, which needs the package zstandard.\n"
            "Install it: pip install 'rwkv_lab[train]'"
        ) from e
    frame = None
    while chunk := file.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as e:
                raise ValueError(str(e)) from e
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends before the end of its data")


def _text_kind(path: Path, text: bytes) -> str:
    """Text, JSON or a table. A name that promises JSON or a table is held to it: its braces are not trained on."""
    suffix, stripped = _suffix(path), text.lstrip()
    if _JSON.match(text) or suffix in _JSON_NAMES or _are_records(text):
        if not stripped.startswith(b"["):
            return LINES
        return LINES if is_json(stripped.split(b"\n", 1)[0]) and b"\n" in stripped.rstrip() else ARRAY
    if delimiter_of(text) or (suffix in _TABLE_NAMES and stripped):
        return TABLE
    return TEXT


def _suffix(path: Path) -> str:
    """In small letters, that of compression left out."""
    suffixes = ["", *(s.lower() for s in path.suffixes)]
    return suffixes[-2] if suffixes[-1] in _COMPRESSED_NAMES else suffixes[-1]


def is_named_as_records(path: Path) -> bool:
    """Whether its name promises JSON or a table."""
    return _suffix(path) in {*_JSON_NAMES, *_TABLE_NAMES, ".parquet"}


def _are_records(text: bytes) -> bool:
    """Whether most lines at the beginning are JSON objects, though the first is not, or objects in Python's spelling:
    as text their braces would be trained on. Reading them names the line that is wrong."""
    lines = [line for line in text[:_HEAD].splitlines() if line.strip()][:_LINES]
    objects = sum(line.lstrip().startswith(b"{") and is_json(line) for line in lines)
    names = _PYTHON.match(lines[0]) if lines else None
    return objects > max(1, len(lines) // 2) or (names is not None and plain(names[1].decode()) in KNOWN)


def is_json(line: bytes) -> bool:
    """Whether this is one whole JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
