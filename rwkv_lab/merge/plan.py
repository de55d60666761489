"""What a merge would do, tensor by tensor, before a byte of tensor data is read; and what it did."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_lab.checkpoint import FileFacts, Layout
from rwkv_lab.checks import Check
from rwkv_lab.progress import human_bytes


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the output."""

    name: str
    # "copy": the base's bytes; "cast"; "overlay": tuned's tensor; "add": new in the output; "blend"; "mix"; "lora",
    # "pissa", "miss", "adapters": a matrix that was adapted; "unmerge"; "quantise": as training stored it;
    # "layer": a tensor of a layer that was renumbered, or comes from another model
    action: str
    source: str  # "base", "tuned" or "base + tuned"; of a layer also its name there
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the output
    nbytes: int  # in the output


@dataclass(frozen=True)
class MergePlan:
    method: str  # never "auto"
    layout: Layout  # of the output: the base's, but for its depth where layers are stacked
    rows: tuple[PlanRow, ...]  # in the order of the output file
    skipped: tuple[str, ...]  # tensors of `tuned` that include/exclude keep out
    output_bytes: int  # exact size of the output file
    disk_free: int  # bytes free where the output goes
    memory_needed: int  # bytes of anonymous memory, an upper bound
    memory_free: int  # bytes the machine has available
    notes: tuple[str, ...] = ()  # what such a mix means for an RWKV model, in words

    @property
    def changed(self) -> tuple[PlanRow, ...]:
        """The rows whose values do not simply come from the base."""
        return tuple(row for row in self.rows if row.action not in ("copy", "cast"))

    def __str__(self) -> str:
        return (
            f"{self.method} into {self.layout}: {len(self.changed)} of {len(self.rows)} tensors change, "
            f"{len(self.skipped)} kept out; output {human_bytes(self.output_bytes)}, "
            f"memory at most {human_bytes(self.memory_needed)}"
        )


@dataclass(frozen=True)
class MergeResult:
    plan: MergePlan
    base: Path
    tuned: tuple[Path, ...]
    out: Path
    recipe: dict  # the arguments that decide the output's bytes
    inputs: tuple[FileFacts, ...]  # base, then each tuned, then files of PiSSA's start
    outputs: tuple[FileFacts, ...] = ()  # the checkpoint and its provenance; empty after a dry run
    checks: tuple[Check, ...] = ()  # made while streaming; empty after a dry run
    seconds: dict[str, float] = field(default_factory=dict)  # "plan", "merge"
    pissa_init: tuple[Path | None, ...] = ()  # one per adapter
