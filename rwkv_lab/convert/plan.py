"""What a conversion will do, tensor by tensor, from headers alone; and what it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.checkpoint.unchanged import FileState, refuse_changed, refuse_changed_header
from rwkv_lab.checks import Check
from rwkv_lab.convert.containers import Container, Content
from rwkv_lab.convert.hub import Pushed
from rwkv_lab.convert.spec import ConvertOptions, ConvertSpec
from rwkv_lab.lazy_torch import torch
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted


def place_of(info: TensorInfo) -> str:
    """Where the bytes of a tensor lie: file, offset and how many."""
    return f"{info.file.path}:{info.offset}:{info.nbytes}"


@dataclass(frozen=True)
class ConvertRow:
    """One tensor of the output."""

    name: str  # in the output
    sources: tuple[str, ...]  # BlinkDL's names of what it is made from
    action: str  # "copy": the same bytes; "cast": another dtype; else what the transform does
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    quantised: str = ""  # the type of its blocks, "Q8_0"; dtype is uint8 then


@dataclass(frozen=True)
class Dropped:
    """A tensor of the source that the output does not have."""

    name: str
    why: str


@dataclass(frozen=True)
class ConvertPlan:
    """What `write_convert` carries out: this very object, now or later, as long as the source has not changed."""

    spec: ConvertSpec
    options: ConvertOptions
    out: Path
    layout: Layout | None  # of a model; None of states and adapters
    kind: str  # of the source: "model", "state", …
    as_adapter: bool  # whether the source is taken for what it changes, and not tensor by tensor
    format: ForeignFormat | None  # None: BlinkDL's own names
    container: Container
    source: FileFacts
    rows: tuple[ConvertRow, ...]  # in the order of the output
    dropped: tuple[Dropped, ...]
    output_bytes: int
    disk_free: int  # bytes free where the output goes
    memory_needed: int  # bytes of anonymous memory, an upper bound
    memory_free: int  # bytes that the machine has available
    notes: tuple[str, ...]  # what the conversion means for who reads the output, in words
    checkpoint: Checkpoint = field(kw_only=True, repr=False, compare=False)
    states: tuple[FileState, ...] = field(kw_only=True, repr=False, compare=False)  # of its files
    content: Content = field(kw_only=True, repr=False, compare=False)  # its tensors are as the rows

    @contextmanager
    def source_opened(self) -> Iterator[None]:
        """The source, open for the time of the block; where it is open, it stays it.

        Raises:
            ParameterError: it has changed since: its size, time of change or header.
            CorruptFileError: it cannot be opened any more.
        """
        refuse_changed(self.states)
        if not self.checkpoint.closed:
            yield
            return
        refuse_changed_header(self.checkpoint)
        self.checkpoint.reopen()
        try:
            yield
        finally:
            self.checkpoint.close()

    def __str__(self) -> str:
        what = str(self.layout) if self.layout else f"{self.kind} {self.checkpoint.path.name}"
        changed = sum(row.action != "copy" for row in self.rows)
        return (
            f"{what} to {self.spec.to}: {counted(len(self.rows), 'tensor')}, {changed} of them not copied as they are, "
            f"{len(self.dropped)} dropped; output {human_bytes(self.output_bytes)}, "
            f"memory at most {human_bytes(self.memory_needed)}"
        )


@dataclass(frozen=True)
class Rounding:
    """What became of the values of one tensor in a smaller dtype."""

    name: str  # in the output
    values: int
    rounded: int = 0  # differ from what they were, and are neither of the following
    overflow: int = 0  # finite before, Inf now
    flushed: int = 0  # not zero before, zero now


@dataclass(frozen=True)
class ConvertResult:
    plan: ConvertPlan
    outputs: tuple[FileFacts, ...] = ()  # the checkpoint; empty after a dry run
    checks: tuple[Check, ...] = ()
    rounding: tuple[Rounding, ...] = ()  # of tensors that were cast
    nonfinite: tuple[str, ...] = ()  # tensors of the output with NaN, Inf or overflow, and how many, where allowed
    seconds: dict[str, float] = field(default_factory=dict)  # "plan", "write", "verify", "upload"
    checksums: Mapping[str, int] = field(default_factory=dict, repr=False)  # by `place_of`, of what was copied
    pushed: Pushed | None = None  # what was uploaded to the Hugging Face Hub

    @property
    def out(self) -> Path:
        return self.plan.out

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        return self.plan.dropped

    @property
    def notes(self) -> tuple[str, ...]:
        """The plan's, and what the values turned out to be, in words with numbers."""
        totals = {name: sum(getattr(r, name) for r in self.rounding) for name in ("rounded", "overflow", "flushed")}
        values = sum(r.values for r in self.rounding)
        what = {"rounded": "were rounded", "overflow": "overflowed to infinity", "flushed": "were flushed to zero"}
        spec = self.plan.spec
        where = f"halved by rescale={spec.rescale}" if spec.rescale and not spec.dtype else "in the new dtype"
        seen = [f"{n:,} of {values:,} values {what[name]}, {where}." for name, n in totals.items() if n]
        if self.nonfinite:
            seen.append(
                f"{counted(len(self.nonfinite), 'tensor holds', 'tensors hold')} NaN or Inf: "
                f"{', '.join(self.nonfinite[:5])}."
            )
        if self.pushed is not None:
            seen += self.pushed.notes
        elif self.plan.options.push_to_hub and self.outputs:
            seen.append(f"Nothing was uploaded to {self.plan.options.model_name}: not every check has passed.")
        return (*self.plan.notes, *seen)
