"""Tables whose columns have names, as records: CSV and its relatives, and Parquet."""

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.train.names import is_record

_HINT = re.compile(rb"sep=[,;\t|]\r?\n", re.I)
_DELIMITERS = (",", "\t", ";", "|")

Row = tuple[int, dict[str, Any]]  # line or row in its file, from 1, and what stands there by column


def delimiter_of(text: bytes) -> str:
    """What stands between the columns of a table, whose first line names a text, a prompt and response, or messages;
    "" for what is no such table. A single column has no delimiter: it is taken for a comma."""
    first, _, rest = text[len(_hint(text)) :].lstrip(b"\r\n").partition(b"\n")
    first = first.strip(b"\r")
    if not first or len(first) > 10_000 or not rest.strip():
        return ""
    try:
        line = first.decode()
        likely = (d for d in _DELIMITERS if not line.startswith(d))  # tables of Markdown begin with a bar
        return next((d for d in likely if is_record(next(csv.reader([line], delimiter=d)))), "")
    except (csv.Error, UnicodeDecodeError):
        return ""


def _hint(text: bytes) -> bytes:
    """The line before the first that tells spreadsheets the delimiter; empty where there is none."""
    found = _HINT.match(text)
    return found[0] if found else b""


def csv_rows(path: Path, content: bytes) -> Iterator[Row]:
    """The rows of a table, each with the line that it begins in.

    Raises:
        ParameterError: no column that is known, two of one name, a row with another number of cells. Names the line.
    """
    delimiter = delimiter_of(content) or ("\t" if b"\t" in content.split(b"\n", 1)[0] else ",")
    hint = _hint(content)
    before = csv.field_size_limit(sys.maxsize)  # the limit is one for the whole process
    try:
        reader = csv.reader(io.StringIO(content[len(hint) :].decode(), newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        line = above = 1 + bool(hint)
        try:
            for cells in reader:
                if header and cells:
                    if len(cells) != len(header):
                        raise ParameterError(
                            f"{path}, line {line}: it has {len(cells)} cells, the first line names {len(header)} "
                            "columns.\nPut texts with a delimiter or a line break in them into double quotes. If it is "
                            "plain text, change its first line, which reads as the names of columns."
                        )
                    yield line, dict(zip(header, cells, strict=True))
                elif cells:
                    header = _checked(path, [cell.strip() for cell in cells])
                line = reader.line_num + above
        except csv.Error as e:
            raise ParameterError(f"{path}, line {line}: this is no row of a table ({e}).") from None
    finally:
        csv.field_size_limit(before)


def parquet_rows(path: Path, content: bytes) -> Iterator[Row]:
    """The rows of a Parquet file, from 1.

    Raises:
        ParameterError: no column that is known, two of one name, or pyarrow is not installed.
        CorruptFileError: broken.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as e:
        raise ParameterError(
            f"{path} is Parquet, which needs the package pyarrow.\nInstall it: pip install 'rwkv_lab[train]'"
        ) from e
    number = 0
    try:
        with parquet.ParquetFile(io.BytesIO(content) if content else path) as file:
            _checked(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as e:
        raise CorruptFileError(f"{path} is broken Parquet: {str(e).splitlines()[0][:200]}") from e


def _checked(path: Path, header: list[str]) -> list[str]:
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise ParameterError(f"{path} has two columns named {twice!r}; rename or remove one.")
    if not is_record(header):
        raise ParameterError(
            f"{path} has the columns {', '.join(map(repr, header))[:300]}; none of them is known.\n"
            'Name them "text"; "prompt" and "response"; "instruction", "input" and "output"; or "messages".'
        )
    return header
