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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.machine import memory_free
from rwkv_lab.train.tables import delimiter_of

TEXT, LINES, ARRAY, TABLE, PARQUET, NPY, INDEX = "text", "JSON lines", "JSON array", "table", "Parquet", "npy", "binidx"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BINARY = {b"PAR1": PARQUET, b"\x93NUMPY": NPY, b"MMIDIDX\0\0": INDEX}
# What else people have under their hands, for the message only.
_OTHERS = {
    b"PK\x03\x04": "a zip archive (a .pth, .npz, .docx or .zip); unpack it",
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
    b"{\\rtf": "an RTF document; save it as plain text",
    **{bytes([0x80, version]): "a pickle, which may run code and is never opened" for version in (2, 3, 4, 5)},
}
_BOMS = {  # the longer ones first: that of UTF-32 begins as that of UTF-16
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
_CONTROLS = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1a\x1b"})  # these stand in no text
_JSON = re.compile(rb"\s*(\{\s*[\"}]|\[\s*[{\"])")  # an object, or an array of objects or of texts
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
    if compression := next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None):
        content = _decompressed(path, compression)
        head = content[: len(head) or 512]
        notes.append(compression)
    binary = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None)
    if binary:
        return Source(path, binary, content or b"", tuple(notes))
    _refuse_other(path, head)
    content, encoding = _as_utf8(path, path.read_bytes() if content is None else content)
    return Source(path, _text_kind(path, content), content, (*notes, *([] if encoding == "utf-8" else [encoding])))


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _refuse_other(path: Path, head: bytes) -> None:
    known = next((words for magic, words in _OTHERS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        known = "a tar archive; unpack it"
    if any(head.startswith(magic) for magic in _COMPRESSED):
        known = "compressed twice; unpack it once"
    if known and not any(head.startswith(bom) for bom in _BOMS):
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
    if compression == "zstd":
        with open(path, "rb") as file:
            yield from _zstd_parts(file, path)
        return
    opener = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression]
    with opener(path, "rb") as unpacked:
        while part := unpacked.read(_CHUNK):
            yield part


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


def _as_utf8(path: Path, content: bytes) -> tuple[bytes, str]:
    """(the text in UTF-8 without a byte order mark, the encoding it was in)."""
    bom, encoding = next(((bom, name) for bom, name in _BOMS.items() if content.startswith(bom)), (b"", ""))
    encoding = encoding or _utf_16_without_mark(content[: 1 << 16]) or "utf-8"
    try:
        text = content[len(bom) :].decode(encoding)
    except UnicodeDecodeError as e:
        at = len(bom) + e.start
        if bom or encoding != "utf-8":
            raise ParameterError(f"{path} begins as {encoding}, and byte {at:,} is none; save it as UTF-8.") from None
        if e.reason == "unexpected end of data":
            raise ParameterError(
                f"{path} ends inside a character, at byte {at:,}: it was cut short.\n"
                f"Copy or download it again, or leave that character out: iconv -c -t utf-8 {path.name} > whole.txt"
            ) from None
        if path.suffix == ".bin":
            raise ParameterError(
                f"{path} is binary. Tokens in a .bin are described by an .idx, and {path.with_suffix('.idx').name} is "
                "not beside it.\nPut it there, or save the tokens as .npy."
            ) from None
        raise ParameterError(
            f"{path} is neither text in UTF-8 or UTF-16 nor data of a known kind: byte {at:,} is {content[at]:#04x}.\n"
            f"If it is text, convert it: iconv -f latin1 -t utf-8 {path.name} > utf8.txt"
        ) from None
    utf8 = content[len(bom) :] if encoding == "utf-8" else text.encode()
    controls = len(utf8) - len(utf8.translate(None, _CONTROLS))
    if b"\0" in utf8 or controls * 1000 > len(utf8):
        raise ParameterError(
            f"{path} is binary of no known kind: it has {controls:,} control characters in {len(utf8):,} bytes.\n"
            "Training data are text, JSON lines, CSV, Parquet, or tokens as .npy or .bin and .idx."
        )
    return utf8, encoding


def _utf_16_without_mark(head: bytes) -> str:
    """Text of mostly Latin letters in UTF-16 has a zero in every other byte; "" for anything else."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    some, few = len(head) // 6, len(head) // 100
    return "utf-16-le" if odd > some and even <= few else "utf-16-be" if even > some and odd <= few else ""


def _text_kind(path: Path, text: bytes) -> str:
    """Text, JSON or a table. A name that promises JSON or a table is held to it: its braces are not trained on."""
    suffixes = [s.lower() for s in path.suffixes]
    last = suffixes[-2:-1] if suffixes and suffixes[-1] in _COMPRESSED_NAMES else suffixes[-1:]
    stripped = text.lstrip()
    if _JSON.match(text) or _JSON_NAMES & {*last}:
        if not stripped.startswith(b"["):
            return LINES
        return LINES if is_json(stripped.split(b"\n", 1)[0]) and b"\n" in stripped.rstrip() else ARRAY
    if delimiter_of(text) or (_TABLE_NAMES & {*last} and stripped):
        return TABLE
    return TEXT


def is_json(line: bytes) -> bool:
    """Whether this is one whole JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
