"""The World vocabulary of RWKV-4 World to RWKV-7: byte strings, the longest that fits is taken.

A vocabulary file has one line per token: its id, a Python literal (text or bytes) and the number of bytes in it. Id 0
is in no file: it ends a text. pyrwkv-tokenizer brings the vocabulary and encodes all but a few short texts. It decodes
whole texts only and takes the process down at an id that is padding, so decoding is done here.
"""

import ast
import warnings
from functools import lru_cache
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.errors import CorruptFileError, ParameterError, UnsafeFileError
from rwkv_lab.tokenizer.decoding import ByteDecoding, utf8

_HIGHEST = 65535  # id that the library can hold
_LONGEST_LINE = 10_000  # characters; the longest in the World vocabulary has 520
_FEW = 256_000  # bytes of text that are encoded as fast without the library, whose tables take 240 MB


class WorldTokenizer(ByteDecoding):
    """Takes the longest token at every place, from left to right; text is neither normalised nor split beforehand.

    Args:
        path: a vocabulary file; None for the one of 2023-04-24, which all World models use.

    Raises:
        UnsafeFileError, CorruptFileError: code in a line, or a line that is no token. Names the line.
        ParameterError: pyrwkv-tokenizer is not installed.
    """

    @checked
    def __init__(self, path: Path | None = None):
        self._path = _packaged() if path is None else path
        bytes_of = _read_vocabulary(self._path, _stamp(self._path))
        super().__init__(bytes_of, max(bytes_of) + 1, end_of_text=0)
        self._few = _FEW  # bytes to encode without the library

    @property
    def path(self) -> Path:
        """The vocabulary file."""
        return self._path

    @checked
    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text; bytes need not be valid UTF-8."""
        data = utf8(text) if isinstance(text, str) else text
        self._few -= len(data)
        if self._few >= 0:
            return self._longest_matches(data)
        try:
            return self._by_library(data.decode())
        except UnicodeDecodeError:  # the library takes text only
            return self._longest_matches(data)

    def _by_library(self, text: str) -> list[int]:
        return _encoder(self._path, _stamp(self._path)).encode(text)

    def _longest_matches(self, data: bytes) -> list[int]:
        ids, lengths = _by_bytes(self._path, _stamp(self._path))
        found, at = [], 0
        while at < len(data):
            n = next((n for n in lengths.get(data[at : at + 2], ()) if data[at : at + n] in ids), 1)
            found.append(ids[data[at : at + n]])
            at += n
        return found

    def __deepcopy__(self, memo: dict) -> "WorldTokenizer":
        return self  # a model's copy shares its vocabulary


def _library():
    try:
        import pyrwkv_tokenizer
    except ImportError as e:
        raise ParameterError(
            "The World vocabulary needs the package pyrwkv-tokenizer.\nInstall it: pip install 'rwkv_lab[text]'"
        ) from e
    return pyrwkv_tokenizer


@lru_cache(maxsize=1)
def _packaged() -> Path:
    library = _library()
    beside = Path(library.__file__).with_name("rwkv_vocab_v20230424.txt")
    # To tell its path the library has to read the file first, into 240 MB.
    return beside if beside.is_file() else Path(library.RWKVTokenizer().vocab_filepath)


def _stamp(path: Path) -> tuple[int, int]:
    """Changes with the file, so that what was read from another version of it is not used."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _encoder(path: Path, stamp):
    return _library().RWKVTokenizer(vocab_filepath=str(path))


@lru_cache(maxsize=4)
def _by_bytes(path: Path, stamp) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
    """Ids by their bytes, and the lengths of tokens that begin with two bytes, longest first."""
    ids = {token: i for i, token in _read_vocabulary(path, stamp).items()}
    lengths: dict[bytes, set[int]] = {}
    for token in ids:
        lengths.setdefault(token[:2], set()).add(len(token))
    return ids, {head: sorted(found, reverse=True) for head, found in lengths.items()}


@lru_cache(maxsize=4)
def _read_vocabulary(path: Path, stamp) -> dict[int, bytes]:
    """Bytes of every token in the file, by its id."""
    bytes_of: dict[int, bytes] = {}
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        raise CorruptFileError(f"{path} is no vocabulary: byte {e.start} is not UTF-8.") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # unknown escapes in a literal; the length tells whether it fits
        for number, line in enumerate(lines, 1):
            token_id, token = _read_line(line.removesuffix("\r"), f"{path}, line {number}")
            if token_id in bytes_of:
                raise CorruptFileError(f"{path}, line {number}: the id {token_id} stands in an earlier line too.")
            bytes_of[token_id] = token
    lost = set(range(256)) - {token[0] for token in bytes_of.values() if len(token) == 1}
    if lost:
        raise CorruptFileError(f"{path} is no whole vocabulary: it has no token for the single byte {min(lost)}.")
    return bytes_of


def _plain(literal: str) -> str:
    """The text in a literal that quotes nothing but itself; "" for any other. Parsing 65,525 of them takes long."""
    quote, text = literal[0], literal[1:-1]
    plain = quote in "'\"" and literal[-1] == quote and not {quote, "\\", "\0", "\r"} & set(text)
    return text if plain else ""


def _read_line(line: str, where: str) -> tuple[int, bytes]:
    head, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not (head.isdecimal() and length.isdecimal() and literal) or len(line) > _LONGEST_LINE:
        raise CorruptFileError(f"{where}: {line[:60]!r} is not: id, text or bytes in quotes, number of bytes.")
    try:
        value = _plain(literal) or ast.literal_eval(literal)
    except ValueError as e:
        raise UnsafeFileError(f"{where}: {literal[:60]!r} is code, not a text in quotes; nothing was run.") from e
    except (SyntaxError, RecursionError, MemoryError) as e:
        raise CorruptFileError(f"{where}: {literal[:60]!r} is no text in quotes.") from e
    token = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if not isinstance(token, bytes) or not token or len(token) != int(length) or not 0 < int(head) <= _HIGHEST:
        raise CorruptFileError(f"{where}: {line[:60]!r} is no token of {length} bytes with an id of 1 to {_HIGHEST}.")
    return int(head), token
