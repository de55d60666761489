"""What a merge will do, tensor by tensor, before a byte of tensor data is read; and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import FileFacts, Layout
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checks import Check
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.effect import MergeEffect, Meter
from rwkv_lab.merge.inputs import InputFile, MergeInputs
from rwkv_lab.merge.spec import MergeOptions, MergeSpec
from rwkv_lab.merge.states import ZEROS
from rwkv_lab.progress import human_bytes
from rwkv_lab.text import counted

UNCHANGED = ("copy", "cast", ZEROS)  # actions on tensors whose values come from the base, or from nowhere


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the output."""

    name: str
    # "copy": the base's bytes; "cast"; "overlay": tuned's tensor; "add": new in the output; "blend"; "mix"; "lora",
    # "pissa", "miss", "adapters": a matrix that was adapted; "unmerge"; "quantise": as training stored it;
    # "zeros": the state of a layer without one, beside states of others;
    # "layer": a tensor of a layer that was renumbered, or comes from another model
    action: str
    source: str  # "base", "tuned", "base + tuned" or "zeros"; of a layer also its name there
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the output
    nbytes: int  # in the output


@dataclass(frozen=True)
class MergePlan:
    """What `write_merge` carries out: this very object, now or later, as long as its inputs have not changed."""

    spec: MergeSpec  # everything filled in that was left open; `spec.recipe()` is written into the output
    options: MergeOptions
    out: Path
    inputs: tuple[InputFile, ...]  # base, then each tuned, then what PiSSA adapters started from
    layout: Layout  # of the output: the base's, but for its depth where layers are stacked
    rows: tuple[PlanRow, ...]  # in the order of the output file
    skipped: tuple[str, ...]  # tensors of `tuned` that include/exclude keep out
    output_bytes: int  # exact size of the output file
    disk_free: int  # bytes free where the output goes
    memory_needed: int  # bytes of anonymous memory, an upper bound
    memory_free: int  # bytes the machine has available
    notes: tuple[str, ...] = ()  # what such a merge means for an RWKV model, in words
    contains: Sequence[Mapping[str, Any]] = field(default=(), repr=False)  # adapters, as of `contained_adapters`
    files: MergeInputs = field(kw_only=True, repr=False, compare=False)
    tensors: Sequence[OutTensor] = field(kw_only=True, repr=False, compare=False)  # as the rows; they read `files`
    # What the inputs' values say, read right before writing: (what the output contains, as `contains`; notes).
    look: Callable[[], tuple[Sequence[Mapping[str, Any]], Sequence[str]]] = field(
        kw_only=True, repr=False, compare=False
    )
    meters: Sequence[Meter] = field(kw_only=True, repr=False, compare=False)  # what the tensors are watched by

    @property
    def method(self) -> str:
        """Never "auto"."""
        return self.spec.method

    @property
    def changed(self) -> tuple[PlanRow, ...]:
        """The rows whose values do not simply come from the base."""
        return tuple(row for row in self.rows if row.action not in UNCHANGED)

    def __str__(self) -> str:
        return (
            f"{self.method} into {self.layout}: {len(self.changed)} of "
            f"{counted(len(self.rows), 'tensor changes', 'tensors change')}, "
            f"{len(self.skipped)} kept out; output {human_bytes(self.output_bytes)}, "
            f"memory at most {human_bytes(self.memory_needed)}"
        )


@dataclass(frozen=True)
class MergeResult:
    plan: MergePlan
    recipe: dict[str, Any]  # what decides the output's bytes, as the output records it
    inputs: tuple[InputFile, ...]  # as of the plan, with the fingerprints that the options ask for
    outputs: tuple[FileFacts, ...] = ()  # the checkpoint and its provenance; empty after a dry run
    checks: tuple[Check, ...] = ()  # made while streaming; empty after a dry run
    seconds: dict[str, float] = field(default_factory=dict)  # "plan", "hash", "merge"
    effect: MergeEffect = MergeEffect()  # measured while streaming; empty after a dry run
    seen: tuple[str, ...] = ()  # notes on the inputs' values; empty after a dry run

    @property
    def notes(self) -> tuple[str, ...]:
        """The plan's, and what the merge did and did not do."""
        return (*self.plan.notes, *self.seen, *self.effect.notes())

    @property
    def base(self) -> Path:
        return self.plan.spec.base

    @property
    def tuned(self) -> tuple[Path, ...]:
        return self.plan.spec.tuned

    @property
    def out(self) -> Path:
        return self.plan.out
