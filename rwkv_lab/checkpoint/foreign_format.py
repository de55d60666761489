"""What a foreign format is: a table of our tensor names and theirs, read in both directions.

Each module of `rwkv_lab.checkpoint.formats` that describes one registers it. `open_checkpoint` presents tensors under
BlinkDL's names by its table, `rwkv_lab.convert` writes by the same table. A row is a pair of torch functions; where the
inverse only views its argument, reading a tensor costs what reading it under its own name costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from rwkv_lab.checkpoint.dimensions import Layout, Shape
from rwkv_lab.checkpoint.source import Derived, TensorInfo, dense_stride
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.text import counted

LAYER = "{i}"  # stands in a row's names for the number of the layer


@dataclass(frozen=True)
class Place:
    """What a transform may depend on beside values."""

    layer: int = 0  # 0 outside the layers, too
    head_size: int = 0  # 0 where the other format does not state it
    rescale_every: int = 0  # layers after which weights are stored halved, again and again; 0: never


@dataclass(frozen=True)
class Transform:
    """How tensors of ours become one of theirs, and back.

    Attributes:
        described: for tables, "transposed".
        forward: our tensors in BlinkDL's shapes -> theirs.
        inverse: theirs -> our tensors, in BlinkDL's shapes. Views where it can be: then nothing is copied.
        unit: whether `inverse` takes flat runs of elements one by one, so that large tensors pass in blocks.
    """

    described: str
    forward: Callable[[Sequence[torch.Tensor], Place], torch.Tensor]
    inverse: Callable[[torch.Tensor, Place], Sequence[torch.Tensor]]
    unit: bool = False


SAME = Transform("as it is", lambda ours, at: ours[0], lambda theirs, at: [theirs])
TRANSPOSED = Transform(
    "last two dimensions transposed",
    lambda ours, at: ours[0].transpose(-1, -2),
    lambda theirs, at: [theirs.transpose(-1, -2)],
)
FLAT = Transform(
    "[1, 1, C] as [C]",
    lambda ours, at: ours[0].reshape(-1),
    lambda theirs, at: [theirs.reshape(1, 1, -1)],
)


def stacked(tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Tensors of one size in one, each in this shape. For shapes alone, torch.stack would import a large part of torch
    that nothing else here needs."""
    out = tensors[0].new_empty((len(tensors), *shape))
    for k, tensor in enumerate(tensors):
        out[k] = tensor.reshape(shape)
    return out


def _halvings(at: Place) -> int:
    return at.layer // at.rescale_every if at.rescale_every else 0


HALVED = Transform(
    "as it is; halved after every few layers where rescale asks for it",
    lambda ours, at: ours[0] / 2 ** _halvings(at) if _halvings(at) else ours[0],
    lambda theirs, at: [theirs * 2 ** _halvings(at) if _halvings(at) else theirs],
    unit=True,
)


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and the tensor (or tensors) of ours in it. `{i}` stands for the layer."""

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform = SAME

    @property
    def names(self) -> tuple[str, ...]:
        """Ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


FORMAT_NOTE = "rwkv_lab.format"  # in the metadata of files whose names do not tell the format: its name
RESCALED = "weights_rescaled_every"  # what `Place.rescale_every` is recorded as, in config.json or the metadata


def stated(facts: Facts) -> Place:
    """What rwkv_lab records.

    Raises:
        CorruptFileError: a record that is no number of layers.
    """
    every = facts.rescaled or 0
    try:
        return Place(rescale_every=max(int(every), 0))
    except (TypeError, ValueError) as e:
        raise CorruptFileError(
            f"{facts.path}: {RESCALED} is recorded as {every!r}; a number of layers is expected."
        ) from e


GROUP_NORM_EPS = "group_norm_eps"  # as it is recorded in config.json


def recorded_eps(facts: Facts, head_size: int) -> float | None:
    """What rwkv_lab records.

    Raises:
        CorruptFileError: a record that is no positive number.
    """
    eps = facts.config.get(GROUP_NORM_EPS)
    if eps is not None and (not isinstance(eps, int | float) or not 0 < eps < 1):
        raise CorruptFileError(
            f"{facts.path}: {GROUP_NORM_EPS} is recorded as {eps!r}; a number between 0 and 1 is expected."
        )
    return eps


def _allowed(layout: Layout) -> str:
    return ""


def _no_details(names: Collection[str]) -> dict[str, Any]:
    return {}


def _nothing(layout: Layout) -> Sequence[str]:
    return ()


def _none(layout: Layout) -> Mapping[str, Shape]:
    return {}


def _as_wanted(name: str, shape: Shape, wanted: torch.dtype) -> torch.dtype:
    return wanted


@dataclass(frozen=True)
class Facts:
    """What a file or folder states beside the values of its tensors."""

    config: Mapping[str, Any] = field(default_factory=dict)  # config.json of a folder
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the header
    path: str = "the file"  # for messages
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of the tensors, under the names in the file

    @property
    def rescaled(self) -> Any:
        """What rwkv_lab records of rescaled weights; None where it records nothing."""
        return self.config.get(RESCALED, self.metadata.get(RESCALED))


@dataclass(frozen=True, repr=False)
class ForeignFormat:
    """A foreign format.

    Attributes:
        name: as `Checkpoint.foreign_format` has it, such as "fla-rwkv7".
        described: what it is called in a sentence.
        target: what `convert` is asked for: "transformers", "fla", "world", "web-rwkv", ….
        versions: of `Layout`, that it can hold.
        rows: the table.
        recognise: `(tensor names, facts)` -> whether it is this one. By names: a configuration may be missing.
        dropped: a name of ours -> why it is not written. What nothing reads, or the consumer has no place for.
        ignored: a name of theirs -> why it is not read.
        older: rows that only older files have; read, never written.
        state_rows: of a file with a tuned state alone, for readers that take one.
        container: what holds the tensors: "folder" (safetensors with a config.json), "safetensors", ….
        config: `(layout, dtype)` -> config.json of a folder.
        details: our names that are there -> what of config.json follows from them.
        code: files of `rwkv_lab/convert/written` that a folder needs to be loaded.
        stated: what the facts state that tensors do not.
        refused: `layout` -> why its readers cannot take such a model; "" if they can.
        group_norm_eps: of `att.ln_x` by the facts and the head size; None where they do not state it.
        notes: `layout` -> what its readers do otherwise than the checkpoint means, in words.
        dtype: torch's name of the only one that its readers take; None for any.
        dtype_of: `(name of theirs, shape, wanted dtype)` -> the one that its readers take for this tensor.
        unread: `layout` -> name and shape of what its readers ask for and make no use of: zeros are written.
        quantised: names of theirs that may be written in blocks of fewer bits.
        read_by: the programs that read it.
        use: Python that loads it with one of them; `{path}` stands for where it lies. "" where nothing more is known.
    """

    name: str
    described: str
    target: str
    versions: tuple[str, ...]
    rows: tuple[Row, ...]
    recognise: Callable[[Sequence[str], Facts], bool]
    dropped: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    older: tuple[Row, ...] = ()
    state_rows: tuple[Row, ...] = ()
    container: str = "folder"
    config: Callable[[Layout, torch.dtype], dict[str, Any]] | None = None
    details: Callable[[Collection[str]], dict[str, Any]] = _no_details
    code: tuple[str, ...] = ()
    stated: Callable[[Facts], Place] = stated
    refused: Callable[[Layout], str] = _allowed
    group_norm_eps: Callable[[Facts, int], float | None] = recorded_eps
    notes: Callable[[Layout], Sequence[str]] = _nothing
    dtype: str | None = None
    dtype_of: Callable[[str, Shape, torch.dtype], torch.dtype] = _as_wanted
    unread: Callable[[Layout], Mapping[str, Shape]] = _none
    quantised: Collection[str] = ()
    read_by: str = ""
    use: str = ""

    def __repr__(self) -> str:
        return f"ForeignFormat({self.name!r})"

    @property
    def rescales(self) -> bool:
        """Whether its weights may lie halved after every few layers."""
        return any(row.transform is HALVED for row in self.rows)

    def why_dropped(self, name: str) -> str | None:
        """Why a tensor of ours is not written; None where nothing says so."""
        return self.dropped.get(name) or self.dropped.get(general_name(name)[0])


FOREIGN_FORMATS: dict[str, ForeignFormat] = {}  # by name


def register_foreign_format(known: ForeignFormat) -> None:
    """Make a foreign format known.

    Raises:
        ParameterError: there is one of that name, or one for the same target and generation.
    """
    if known.name in FOREIGN_FORMATS:
        raise ParameterError(f"There is a foreign format {known.name!r} already.")
    for other in FOREIGN_FORMATS.values():
        if other.target == known.target and set(other.versions) & set(known.versions):
            raise ParameterError(f"{other.name} is the format of target {known.target!r} for such a model already.")
    FOREIGN_FORMATS[known.name] = known


@dataclass(frozen=True)
class Presented:
    """Tensors of a foreign format under BlinkDL's names."""

    format: ForeignFormat
    tensors: dict[str, TensorInfo]
    theirs: dict[str, str]  # our name -> the name in the file
    inverses: dict[str, Callable[[torch.Tensor], torch.Tensor]]  # our name -> our tensor from the one in the file
    ignored: dict[str, str]  # their name -> why it is not read


def present(tensors: Mapping[str, TensorInfo], facts: Facts) -> Presented | None:
    """The tensors under BlinkDL's names; None where their names are of no foreign format.

    A name that the table does not have is kept as it is: what does not belong there is found like in other files.

    Raises:
        LayoutError: two tensors that mean the same one.
        CorruptFileError: a tensor that is too small for what it should hold.
    """
    names, facts = list(tensors), replace(facts, shapes={name: info.shape for name, info in tensors.items()})
    noted = FOREIGN_FORMATS.get(str(facts.metadata.get(FORMAT_NOTE)))
    if noted is not None and noted.container != "safetensors":  # of others no file is noted: names tell them
        noted = None
    known = noted or _format_of(names, facts)
    if known is None:
        return None
    place, rows = known.stated(facts), {row.theirs: row for row in (*known.older, *known.rows, *known.state_rows)}
    found = Presented(known, {}, {}, {}, {})
    for name, info in tensors.items():
        general, layer = general_name(name)
        why = known.ignored.get(name) or known.ignored.get(general)
        if why:
            found.ignored[name] = why
            continue
        row, at = rows.get(name) or rows.get(general), replace(place, layer=layer)
        made = [info] if row is None else ours_of(row, info, at)
        for k, our_info in enumerate(made):
            our_name = name if row is None else row.names[k].replace(LAYER, str(layer))
            if our_name in found.tensors:
                raise LayoutError(
                    f"{info.file.path}: {found.theirs[our_name]} and {name} both mean {our_name}; only one of them can."
                )
            found.tensors[our_name], found.theirs[our_name] = replace(our_info, name=our_name), name
            found.inverses[our_name] = _same if row is None else partial(_inverse, row, at, k)
    return found


def _format_of(names: list[str], facts: Facts) -> ForeignFormat | None:
    """The format of whole models by what only it has; of states, and parts of models, by all of their names."""
    formats = list(reversed(FOREIGN_FORMATS.values()))
    whole = next((f for f in formats if f.recognise(names, facts)), None)
    return whole or next((f for f in formats if _holds_states(f, names) or _holds_a_part(f, names)), None)


def _holds_a_part(known: ForeignFormat, names: list[str]) -> bool:
    """Whether all names are of its table, some of them of layers and none of them BlinkDL's."""
    theirs, around = _names_of_parts(tuple(FOREIGN_FORMATS))[known.name]
    layered = False
    for name in names:
        if name in around:
            continue
        general = general_name(name)[0]
        if general not in theirs and general not in around:
            return False
        layered = layered or (general in theirs and LAYER in general)
    return layered


@lru_cache(maxsize=1)
def _names_of_parts(formats: tuple[str, ...]) -> dict[str, tuple[set[str], set[str]]]:
    """Of each format (the names that it has and BlinkDL has not, its names outside the layers); asked for every file
    that is opened."""
    known = [FOREIGN_FORMATS[name] for name in formats]
    blinkdl = {name for one in known for row in one.rows for name in row.names}
    return {
        one.name: (
            {row.theirs for row in (*one.rows, *one.older)} - blinkdl,
            {row.theirs for row in one.rows if LAYER not in row.theirs},
        )
        for one in known
    }


def _holds_states(known: ForeignFormat, names: list[str]) -> bool:
    """Whether it is a file with nothing but states, under names that tell the format."""
    theirs = {row.theirs for row in known.state_rows if row.theirs != row.ours}
    return bool(names) and all(general_name(name)[0] in theirs for name in names)


_NUMBER = re.compile(r"(^|\.)(\d{1,4})(\.|$)")


def general_name(name: str) -> tuple[str, int]:
    """(the name with `{i}` for its first number, that number): which is the layer in every format."""
    found = _NUMBER.search(name)
    if found is None:
        return name, 0
    return f"{name[: found.start(2)]}{LAYER}{name[found.end(2) :]}", int(found[2])


def _same(theirs: torch.Tensor) -> torch.Tensor:
    return theirs


def _inverse(row: Row, at: Place, k: int, theirs: torch.Tensor) -> torch.Tensor:
    return row.transform.inverse(theirs, at)[k]


def ours_of(row: Row, info: TensorInfo, at: Place) -> list[TensorInfo]:
    """The tensors of ours in one of theirs, not read.

    Raises:
        CorruptFileError: it has not the dimensions that it should.
    """
    whole = torch.empty_strided(info.shape, info.stride or _dense(info.shape), dtype=info.dtype, device="meta")
    try:
        parts = list(row.transform.inverse(whole, at))
        if len(parts) != len(row.names):
            raise ValueError(f"{counted(len(parts), 'part')}")
    except (RuntimeError, ValueError, IndexError) as e:
        names = ", ".join(row.names).replace(LAYER, str(at.layer))
        wanted = f"it should hold {names} ({row.transform.described})"
        raise CorruptFileError(f"{info.file.path}: {info.name} has shape {list(info.shape)}; {wanted}.") from e
    return [_part(row, info, at, whole, part, k) for k, part in enumerate(parts)]


def _part(row: Row, info: TensorInfo, at: Place, whole: torch.Tensor, part: torch.Tensor, k: int) -> TensorInfo:
    shape = tuple(part.shape)
    same_order = part is whole or (part._base is whole and part.is_contiguous() and part.numel() == whole.numel())
    if info.derived is not None and same_order:
        return replace(info, shape=shape)
    if info.derived is None and (part is whole or part._base is whole):
        stride = None if dense_stride(shape, part.stride()) else part.stride()
        view = replace(
            info,
            shape=shape,
            stride=stride,
            offset=info.offset + part.storage_offset() * info.itemsize,
        )
        whole_record = view.offset == info.offset and view.span == info.span
        return view if whole_record else replace(view, crc32=None)
    derived = Derived(info, partial(_inverse, row, at, k), (1, 1) if row.transform.unit else None)
    return replace(
        info,
        shape=shape,
        dtype_name=str(part.dtype).removeprefix("torch."),
        stride=None,
        crc32=None,
        storage=None,
        derived=derived,
    )


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for d in reversed(shape):
        stride.insert(0, step)
        step *= max(d, 1)
    return tuple(stride)


@dataclass(frozen=True)
class PlacedRow:
    """A row with a layer's number in its names."""

    row: Row
    ours: tuple[str, ...]
    theirs: str
    layer: int  # 0 outside the layers


def placed_rows(known: ForeignFormat, names: Collection[str], n_layer: int) -> Iterator[PlacedRow]:
    """The rows all of whose tensors are among `names`, in the order of the table, layer by layer."""
    layered = [row for row in known.rows if any(LAYER in name for name in row.names)]
    for layer in range(-1, n_layer):
        for row in layered if layer >= 0 else (row for row in known.rows if row not in layered):
            ours = tuple(name.replace(LAYER, str(layer)) for name in row.names)
            if all(name in names for name in ours):
                yield PlacedRow(row, ours, row.theirs.replace(LAYER, str(layer)), max(layer, 0))
