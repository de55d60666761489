"""What holds the tensors of an output: a file of a kind, or a folder of safetensors with other files beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rwkv_lab.checkpoint import Layout
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.stream import Findings, OutTensor
from rwkv_lab.checkpoint.write import SINGLE, shard_files, shard_index, write_folder, write_stream
from rwkv_lab.errors import ParameterError
from rwkv_lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Content:
    """What goes into an output."""

    tensors: Sequence[OutTensor]
    notes: Mapping[str, str]  # short texts that travel with the tensors: the provenance
    others: Mapping[str, bytes] = field(default_factory=dict)  # files of a folder that hold no tensors
    max_shard_size: int = 1 << 62  # of a folder: bytes of tensor data per file
    layout: Layout | None = None  # of a model
    tokenizer: Tokenizer | None = None  # of a model, where it is known
    chat_template: str | None = None  # the source's own


@dataclass(frozen=True)
class Container:
    """A container.

    Attributes:
        name: as `ForeignFormat.container` has it.
        suffixes: what names of such files end in; none for a folder.
        size: bytes that `write` will write, exactly.
        write: `(path, content, overwrite, refuse)` -> what is wrong with the values. Streams; whole or not at all. With
            `refuse`, NaN, Inf and overflow raise NumericsError.
        notes: what such an output cannot hold of the content, in words.
        holds_vocabulary: whether the tokenizer of a model goes into it.
    """

    name: str
    suffixes: tuple[str, ...]
    size: Callable[[Content], int]
    write: Callable[[Path, Content, bool, bool], list[Findings]]
    notes: Callable[[Content], Sequence[str]] = lambda content: ()
    holds_vocabulary: bool = False

    @property
    def is_folder(self) -> bool:
        return not self.suffixes


CONTAINERS: dict[str, Container] = {}  # by name


def register_container(container: Container) -> None:
    """Make a container known.

    Raises:
        ParameterError: there is one of that name.
    """
    if container.name in CONTAINERS:
        raise ParameterError(f"There is a container {container.name!r} already.")
    CONTAINERS[container.name] = container


def _everything(tensor: OutTensor) -> bool:
    return True


def _file(kind: str, suffixes: tuple[str, ...]) -> Container:
    def size(content: Content) -> int:
        return file_layout(kind, content.tensors, dict(content.notes)).size

    def write(path: Path, content: Content, overwrite: bool, refuse: bool) -> list[Findings]:
        layout = file_layout(kind, content.tensors, dict(content.notes))
        return write_stream(path, content.tensors, layout, overwrite, _everything, refuse)

    return Container(
        kind, suffixes, lambda content: file_layout(kind, content.tensors, dict(content.notes)).size, write
    )


def _folder_size(content: Content) -> int:
    shards = shard_files(content.tensors, content.max_shard_size)
    size = sum(file_layout("safetensors", shard, dict(content.notes)).size for shard in shards.values())
    index = b"" if list(shards) == [SINGLE] else shard_index(shards)
    return size + len(index) + sum(map(len, content.others.values()))


def _write_folder(path: Path, content: Content, overwrite: bool, refuse: bool) -> list[Findings]:
    shards = shard_files(content.tensors, content.max_shard_size)
    return write_folder(path, shards, dict(content.notes), content.others, overwrite, _everything, refuse)


def _adapter_size(content: Content) -> int:
    size = file_layout("safetensors", content.tensors, dict(content.notes)).size
    return size + sum(map(len, content.others.values()))


def _write_adapter(path: Path, content: Content, overwrite: bool, refuse: bool) -> list[Findings]:
    shards = {"adapter_model.safetensors": content.tensors}
    return write_folder(path, shards, dict(content.notes), content.others, overwrite, _everything, refuse)


register_container(_file("pth", (".pth",)))
register_container(_file("safetensors", (".safetensors", ".st")))
register_container(replace(_file("pth", (".pth",)), name="state"))  # a tuned state alone
register_container(Container("folder", (), _folder_size, _write_folder, holds_vocabulary=True))
register_container(Container("adapter", (), _adapter_size, _write_adapter))  # as Hugging Face's peft holds one
