"""Text that is tokens already: `.npy`, and pairs of `.bin` and `.idx` as Megatron and RWKV-LM write them (MMIDIDX).

Both are mapped, not read: they may be larger than memory. The end of what they hold is held out, from where a document
begins.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.text import counted
from rwkv_lab.train.sources import INDEX, Source

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, entries of the list of documents
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_MAX_HELD_OUT = 16 * 1024  # tokens, about as much as is held out of text
_AT_ONCE = 1 << 24  # tokens; bounds the memory of a check


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one file, and where its documents begin.

    ids: `[N]`, of any whole dtype, as it is in the file.
    starts: `[documents]`, ascending, the first one 0.
    row: tokens of a row of a table of tokens; 0 where there is none.
    """

    path: Path
    ids: np.ndarray
    starts: np.ndarray
    row: int = 0

    def place(self, at: int) -> str:
        """Where a token stands, in words."""
        if self.row:
            return f"row {at // self.row:,}, column {at % self.row:,}"
        document = int(np.searchsorted(self.starts, at, side="right")) - 1
        return f"position {at:,}" + (f", in document {document:,}" if len(self.starts) > 1 else "")


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Tokens to train on and tokens never trained on, of one file or several."""

    name: str
    files: tuple[Tokens, ...]
    train: np.ndarray  # [N], whole numbers of any dtype
    held_out: np.ndarray
    split: str  # in words, for reports
    notes: tuple[str, ...] = ()

    def check(self, vocab_size: int) -> None:
        """Refuse tokens that are not in a vocabulary.

        Raises:
            ParameterError: names the first, with its position.
        """
        for tokens in self.files:
            for first in range(0, len(tokens.ids), _AT_ONCE):
                part = tokens.ids[first : first + _AT_ONCE]
                if int(part.min()) < 0 or int(part.max()) >= vocab_size:
                    at = first + int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
                    raise ParameterError(
                        f"{tokens.path}: token {int(tokens.ids[at])} at {tokens.place(at)} is outside the model's "
                        f"vocabulary of {vocab_size} tokens.\nIt was written with the tokenizer of another model."
                    )


def is_pair(path: Path) -> bool:
    """Whether this is the stem of a pair of `.bin` and `.idx`: the path without either."""
    return all(path.with_name(path.name + suffix).is_file() for suffix in (".bin", ".idx"))


def read_tokens(source: Source) -> Tokens:
    """The tokens of a file.

    Raises:
        ParameterError: no whole numbers, objects that would have to be unpickled, three dimensions, no `.bin`.
        CorruptFileError: broken.
    """
    return _pair(source.path) if source.kind == INDEX else _npy(source)


def split_tokens(name: str, files: list[Tokens], notes: tuple[str, ...] = ()) -> TokenCorpus:
    """The last tenth of every file is held out, from where a document begins if one begins there; of all files together
    no more than 16,384 tokens.

    Raises:
        ParameterError: no tokens.
    """
    train, held_out = [], []
    for tokens in files:
        if len(tokens.ids) == 0:
            raise ParameterError(f"{tokens.path} has no tokens.")
        cut = len(tokens.ids) * 9 // 10
        later = tokens.starts[(tokens.starts >= cut) & (tokens.starts < len(tokens.ids))]
        cut = int(later[0]) if len(later) else cut
        train.append(tokens.ids[:cut])
        held_out.append(tokens.ids[cut:][: _MAX_HELD_OUT // len(files)])
    split = f"the last tenth of {'the file' if len(files) == 1 else 'every file'} held out"
    return TokenCorpus(name, tuple(files), _joined(train), _joined(held_out), split, notes)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([part.astype(np.int64) for part in parts])


def _npy(source: Source) -> Tokens:
    path = source.path
    try:
        if source.content:
            stream = io.BytesIO(source.content)
            ids = np.load(stream, allow_pickle=False)
            left = len(source.content) - stream.tell()
        else:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            left = path.stat().st_size - ids.offset - ids.nbytes
    except (ValueError, EOFError, OSError) as e:
        if "bject" in str(e):
            raise ParameterError(
                f"{path} holds Python objects, which would be unpickled and could run code; it is not opened.\n"
                "Save an array of whole numbers."
            ) from None
        raise CorruptFileError(f"{path} is a broken .npy: {str(e).splitlines()[0][:200]}") from None
    if left:
        raise CorruptFileError(
            f"{path} has {left:,} bytes behind its array: a second array, or what another file left.\n"
            "Save one array per file."
        )
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ParameterError(
            f"{path} is {ids.dtype} {list(ids.shape)}; tokens are whole numbers, [N] or [rows, tokens of each]."
        )
    row = ids.shape[1] if ids.ndim == 2 else 0
    starts = np.arange(0, max(ids.size, 1), row) if row else np.zeros(1, np.int64)
    return Tokens(path, ids.reshape(-1), starts, row)


def _pair(index: Path) -> Tokens:
    """The tokens that an `.idx` describes, in the `.bin` beside it."""
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise ParameterError(f"{index} is the index of tokens in {data.name}, which is not beside it.")
    dtype, sizes, pointers = _read_index(index)
    size = np.dtype(dtype).itemsize
    expected = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if not np.array_equal(pointers, expected[:-1] * size):
        raise CorruptFileError(f"{index}: its sequences do not lie one after the other in {data.name}.")
    if data.stat().st_size != expected[-1] * size:
        raise CorruptFileError(
            f"{data} has {data.stat().st_size:,} bytes; {index.name} describes {int(expected[-1]):,} tokens of {size} "
            "bytes.\nThe two are not of one pair, or one is cut short."
        )
    ids = np.memmap(data, dtype, "r") if expected[-1] else np.zeros(0, dtype)
    return Tokens(data, ids, expected[:-1] if len(sizes) else np.zeros(1, np.int64))


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(dtype, tokens of each sequence, bytes before each)."""
    content = index.read_bytes()
    if len(content) < _HEADER.size:
        raise CorruptFileError(f"{index} ends inside its header.")
    _, version, code, count, documents = _HEADER.unpack_from(content)
    if version != 1:
        raise ParameterError(f"{index} is of version {version}; version 1 is known.")
    if code not in _DTYPES:
        raise ParameterError(f"{index} describes data of dtype {code}, which are no tokens (whole numbers).")
    wanted = _HEADER.size + 12 * count + 8 * documents
    if len(content) not in (wanted, wanted + count):  # newer ones have a byte of mode for each sequence
        raise CorruptFileError(
            f"{index} has {len(content):,} bytes; {counted(count, 'sequence takes', 'sequences take')} {wanted:,}."
        )
    sizes = np.frombuffer(content, "<i4", count, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", count, _HEADER.size + 4 * count)
    if len(sizes) and int(sizes.min()) < 0:
        raise CorruptFileError(f"{index} has a sequence of {counted(int(sizes.min()), 'token')}.")
    return np.dtype(_DTYPES[code]).newbyteorder("<"), sizes, pointers
