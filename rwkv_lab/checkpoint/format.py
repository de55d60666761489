"""What a file format is: recognised by its bytes, described by its header alone.

Each module of `rwkv_lab.checkpoint.formats` registers one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rwkv_lab.checkpoint.source import SourceFile, TensorInfo
from rwkv_lab.errors import ParameterError


@dataclass(frozen=True)
class Header:
    """What a file states about its content."""

    tensors: Mapping[str, TensorInfo]  # by name, in file order
    others: Mapping[str, object] = field(default_factory=dict)  # entries that are no tensors
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: as `Checkpoint.format` has it.
        described: what such a file is called in a sentence.
        suffixes: what the names of such files end in; a file of another name is opened all the same, and logged.
        recognise: `(first 512 bytes, size of the file)` -> whether it is one. Formats are tried from the newest to
            safetensors, which has no magic number.
        read: the header. It is checked to the last byte: a file may be damaged, or made to do harm. Nothing in it is
            ever run. Raises CorruptFileError, UnsafeFileError or LayoutError.
    """

    name: str
    described: str
    suffixes: tuple[str, ...]
    recognise: Callable[[bytes, int], bool]
    read: Callable[[SourceFile], Header]


FORMATS: dict[str, Format] = {}  # by name


def register(known: Format) -> None:
    """Make a format known.

    Raises:
        ParameterError: there is one of that name.
    """
    if known.name in FORMATS:
        raise ParameterError(f"There is a format {known.name!r} already.")
    FORMATS[known.name] = known


def format_of(head: bytes, size: int) -> Format | None:
    """The format of a file that begins with `head`; None where none is recognised."""
    return next((known for known in reversed(FORMATS.values()) if known.recognise(head, size)), None)
