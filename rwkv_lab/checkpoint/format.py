"""What a file format is: recognised by its bytes, described by its header alone.

Each module of `rwkv_lab.checkpoint.formats` registers one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab.checkpoint.source import SourceFile, TensorInfo
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError, RwkvLabError, UnsafeFileError


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


def no_checkpoint(path: Path, head: bytes, size: int) -> RwkvLabError:
    """What a file of none of the formats is, and what to do about it, from the first 512 bytes and its size."""
    text = head.lstrip().lower()
    if size == 0:
        return CorruptFileError(f"{path} is empty (0 bytes); download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        return CorruptFileError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return CorruptFileError(f"{path} is a web page, probably an error message of the site; download it again")
    if text.startswith(b"{") and (path.name.endswith(".index.json") or b'"weight_map"' in head):
        return LayoutError(f"{path} is the index of a model's shards, and no tensors.\nPass the folder: {path.parent}")
    if text.startswith(b"{"):
        return CorruptFileError(f"{path} is a JSON text, which holds no tensors; give the folder that it lies in")
    if head[257:262] == b"ustar":
        return UnsafeFileError(f"{path} is in torch's legacy tar format, which can run code when it is read; refused")
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return UnsafeFileError(
            f"{path} is a bare pickle, which can run code when it is read; nothing was run.\n"
            "Save it again with a current torch.save(model.state_dict(), ...) where it comes from."
        )
    return CorruptFileError(f"{path} is neither a torch zip (.pth), safetensors nor GGUF; it begins with {head[:8]!r}")
