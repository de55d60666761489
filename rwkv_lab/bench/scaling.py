"""What jobs take, as formulas in parameters, tokens and files: memory, disk and time. docs/scaling.md explains them.

Memory and disk are what the plans of the jobs state, for a model that need not be there. Time is work at rates that are
measured on a machine: bytes that a copy of a file moves, multiply-adds of a matrix product, bytes read from memory. How
many times that work a job takes is a factor here, and `scaling_runs` measures it again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_lab.bench.models import SHAPES
from rwkv_lab.checkpoint import Layout, expected_tensors
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.convert import planning as convert_planning
from rwkv_lab.export.planning import memory_of_graphs
from rwkv_lab.merge import planning as merge_planning
from rwkv_lab.merge.adapted_matrices import PIECES
from rwkv_lab.progress import human_bytes
from rwkv_lab.train.planning import TrainNeeds, needs
from rwkv_lab.train.spec import ResolvedSpec, TrainSpec

# Released shapes that are too large to be measured everywhere.
LARGE = {
    "v7-2.9b": Layout("7.0", 32, 2560, 2560, 10240, 65536, 40, 64, {"w": 96, "a": 96, "v": 64, "g": 320}),
    "v7-7b": Layout("7.0", 32, 4096, 4096, 16384, 65536, 64, 64, {"w": 128, "a": 128, "v": 96, "g": 480}),
    "v7-14b": Layout("7.0", 61, 4096, 4096, 16384, 65536, 64, 64, {"w": 128, "a": 128, "v": 96, "g": 480}),
}
ALL = {name: layout for name, layout in SHAPES.items() if name.startswith("v7")} | LARGE
TOKENS = 128  # of a prompt, and of a step of training
RANK = 16
PROCESS = 500_000_000  # bytes that Python and torch take before they have done anything
_PEFT, _MODES = 8, 24  # bytes per parameter: two models in float32, three in float64; a test asks the jobs themselves


@dataclass(frozen=True)
class Rates:
    """What a machine does, measured.

    copy: bytes per second of a file that is copied, until the disk has them.
    multiply: multiply-adds, each counted as two, per second of float32 matrix products on all threads.
    read: bytes per second that all threads read from memory.
    """

    copy: float
    multiply: float
    read: float


@dataclass(frozen=True)
class Job:
    """One job, for a model of a layout.

    memory, disk: bytes: anonymous memory at the peak beside an idle process, and what is written.
    unit: what its work is counted in: "copy", "multiply" or "read".
    work: of that unit: bytes or multiply-adds.
    factor: seconds of the job over seconds of that work, as measured at 0.1B (docs/scaling.md); of exports, modes and
        tunings it is a guess.
    in_words: memory, disk and work as docs have them; P parameters, T tokens, N files.
    """

    name: str
    memory: Callable[[Layout], float]
    disk: Callable[[Layout], float]
    unit: str
    work: Callable[[Layout], float]
    factor: float
    in_words: tuple[str, str, str]

    def seconds(self, layout: Layout, rates: Rates) -> float:
        """About how long it takes on a machine of these rates."""
        return self.factor * self.work(layout) / getattr(rates, self.unit)


def parameters(layout: Layout) -> int:
    """P: the values of a model."""
    return sum(math.prod(shape) for shape in expected_tensors(layout)[0].values())


def _largest(layout: Layout) -> int:
    """Values of the largest tensor."""
    return max(math.prod(shape) for shape in expected_tensors(layout)[0].values())


def file_bytes(layout: Layout) -> int:
    """Of a checkpoint in bfloat16."""
    return 2 * parameters(layout)


def training_spec(kind: str, base: str | Path) -> ResolvedSpec:
    """One text of `TOKENS` tokens at a time, of a base that need not be there."""
    given = {"kind": kind, "base": str(base), "data": "english", "batch_size": 1, "ctx_len": TOKENS}
    return TrainSpec.read(given | ({"rank": RANK} if kind == "lora" else {})).resolved()


def training(kind: str, layout: Layout) -> TrainNeeds:
    """What such a training takes, as its plan would state it."""
    return needs(training_spec(kind, "base.pth"), layout, expected_tensors(layout)[0])


def _trained(kind: str) -> Callable[[Layout], float]:
    return lambda layout: training(kind, layout).memory_bytes


def _trained_values(kind: str) -> Callable[[Layout], float]:
    """Bytes of the output: what is trained, in float32."""
    return lambda layout: 4 * training(kind, layout).count


def _multiplies(per_parameter: float) -> Callable[[Layout], float]:
    """Two for each weight and token that is read, and twice as many for gradients with respect to what they read."""
    return lambda layout: per_parameter * parameters(layout) * TOKENS


def _packing(layout: Layout) -> float:
    """Codes and scales, 8.25 bits to a value, and what stays in bfloat16: a few per cent."""
    return 1.06 * parameters(layout)


def _nothing(layout: Layout) -> float:
    return 0.0


def _times(factor: float) -> Callable[[Layout], float]:
    return lambda layout: factor * parameters(layout)


_BLOCKS = "blocks, whatever the size"
JOBS = {
    job.name: job
    for job in (
        Job("merge a state", lambda _: merge_planning.memory_of_blocks(), file_bytes, "copy", file_bytes, 0.8,
            (_BLOCKS, "2 P", "a copy of 2 P bytes")),
        Job("merge a LoRA", lambda x: merge_planning.memory_of_blocks(beside=_adapter_block(x)), file_bytes, "copy",
            file_bytes, 1.7,
            (f"{_BLOCKS}; an adapter's parts", "2 P", "a copy of 2 P bytes")),
        Job("mix two models", lambda _: merge_planning.memory_of_blocks(1), file_bytes, "copy",
            lambda x: 2 * file_bytes(x), 1.7, ("blocks of N files", "2 P", "N copies of 2 P bytes")),
        Job("convert", lambda _: convert_planning.memory_of_blocks(), file_bytes, "copy", file_bytes, 1.3,
            (_BLOCKS, "2 P", "a copy of 2 P bytes")),
        Job("inspect values", lambda _: convert_planning.memory_of_blocks(), _nothing, "copy", file_bytes, 6,
            (_BLOCKS, "0", "a copy of 2 P bytes")),
        Job("export to ONNX, float32", lambda x: memory_of_graphs(_largest(x)), _times(4), "copy", _times(4), 12,
            ("0.23 G + 6 × the largest tensor", "4 P", "a copy of 4 P bytes")),
        Job("load in float32", _times(4), _nothing, "copy", file_bytes, 3.5, ("4 P", "0", "a copy of 2 P bytes")),
        Job("load in bfloat16", _times(2), _nothing, "copy", file_bytes, 2, ("2 P", "0", "a copy of 2 P bytes")),
        Job("pack to int8", _packing, _nothing, "copy", file_bytes, 1.8,
            ("1.06 P", "0", "a copy of 2 P bytes")),
        Job(f"read {TOKENS} tokens", _times(4), _nothing, "multiply", _multiplies(2), 1.4,
            ("4 P", "0", "2 P T multiplications and additions")),
        Job("write one token", _times(4), _nothing, "read", _times(4), 1.6, ("4 P", "0", "4 P bytes read")),
        Job("train all weights, a step", _trained("full"), _trained_values("full"), "multiply", _multiplies(6), 3.4,
            ("16 P, and activations per T", "4 P", "6 P T multiplications and additions")),
        Job("train a LoRA, a step", _trained("lora"), _trained_values("lora"), "multiply", _multiplies(4), 2.3,
            ("4 P, 16 A, and activations per T", "4 A", "4 P T multiplications and additions")),
        Job("train a state, a step", _trained("state"), _trained_values("state"), "multiply", _multiplies(4), 2.3,
            ("4 P, 16 S, and activations per T", "4 S", "4 P T multiplications and additions")),
        Job("compare modes", _times(_MODES), _nothing, "multiply", _multiplies(12), 4,
            ("24 P", "0", "2 P T for each mode, backend and dtype")),
        Job("look into a tuning", _times(_PEFT), _nothing, "copy", file_bytes, 20,
            ("8 P", "0", "SVDs of what is adapted")),
    )
}  # fmt: skip


def _adapter_block(layout: Layout) -> int:
    """Bytes that a thread holds: the largest matrix's halves, in the file's dtype and twice in float64; and pieces."""
    return RANK * (layout.n_embd + layout.dim_ffn) * (2 + 2 * 8) + PIECES * BLOCK


@dataclass(frozen=True)
class Reach:
    """How far a job goes on a machine.

    largest: the largest of `ALL` that fits; "" where none does.
    memory, disk: bytes that it takes.
    beyond: why the next one does not fit, in words; "" where all do.
    """

    largest: str
    memory: float
    disk: float
    beyond: str


def reach(name: str, memory_free: float, disk_free: float) -> Reach:
    """How large a model a job of `JOBS` can take where so many bytes are free."""
    job, found = JOBS[name], Reach("", 0, 0, "")
    for size, layout in ALL.items():
        memory, disk = job.memory(layout), job.disk(layout)
        short = [
            f"{human_bytes(needed)} of {what}, {human_bytes(free)} are free"
            for what, needed, free in (("memory", memory + PROCESS, memory_free), ("disk", disk, disk_free))
            if needed > free
        ]
        if short:
            return replace(found, beyond=f"{size} needs {' and '.join(short)}")
        found = Reach(size, memory, disk, "")
    return found
