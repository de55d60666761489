"""What a training would do, from the headers of the base alone: what is trained, and about how much memory it takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Layout, expected_tensors, open_checkpoint
from rwkv_lab.checkpoint.unchanged import FileState, file_states
from rwkv_lab.errors import LayoutError
from rwkv_lab.model.rwkv7 import fresh_layout
from rwkv_lab.names import is_block_matrix
from rwkv_lab.train.kinds.whole import FRESH_VOCABULARY
from rwkv_lab.train.spec import KINDS, Planned, ResolvedSpec, TrainSpec

# Numbers kept for the backward pass, per token and channel of one layer: counted in RWKV-7 with the chunked operator.
_KEPT_PER_CHANNEL = 66
_BITS = {"nf4": 4 + 32 / 64, "int8": 8}  # per value; NF4 with a float32 scale per 64


@dataclass(frozen=True, repr=False)
class TrainPlan:
    """What would be trained, in numbers of values and of bytes. `run_training` trains what stands here."""

    spec: ResolvedSpec
    base_files: tuple[FileState, ...]  # as they were when their headers were read
    layout: Layout
    trained: Sequence[Planned]
    frozen: int
    weights_bytes: int  # of the model and its adapters in memory
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int  # about; of one batch

    @property
    def count(self) -> int:
        return sum(values for _, _, values in self.trained)

    @property
    def memory_bytes(self) -> int:
        """About; in all."""
        return self.weights_bytes + self.gradients_bytes + self.optimiser_bytes + self.activations_bytes

    def __repr__(self) -> str:
        return f"TrainPlan({self.spec.kind} of {self.layout}: {self.count:,} trained, {self.frozen:,} frozen)"


def plan_training(kind: str, base: str | Path | None = None, **options: Any) -> TrainPlan:
    """The plan of `train` with these arguments; only headers are read.

    Args:
        options: those of `TrainSpec`, which are keywords of `train`.

    Raises:
        ParameterError: as `train`.
        LayoutError: a base that is no whole model.
    """
    return make_plan(TrainSpec.read({"kind": kind, "base": base, **options}))


def make_plan(spec: TrainSpec) -> TrainPlan:
    """The plan of a training; only headers are read.

    Raises:
        ParameterError: targets that match nothing, a rank larger than a layer.
        LayoutError: a base that is no whole model.
        CorruptFileError, UnsafeFileError: of the base.
    """
    resolved = spec.resolved()
    layout, shapes, files = _described(resolved)
    trained = KINDS[spec.kind].planned(resolved, layout, shapes)
    size = spec.torch_dtype.itemsize
    whole = {name for name, shape, values in trained if name in shapes and math.prod(shape) == values}
    frozen = {name: math.prod(shape) for name, shape in shapes.items() if name not in whole}
    packed = sum(n for name, n in frozen.items() if is_block_matrix(name, shapes[name])) if spec.quant != "none" else 0
    new = sum(values for name, _, values in trained if name not in whole)
    kept = sum(math.prod(shapes[name]) for name in whole)
    weights = (sum(frozen.values()) - packed + kept) * size + packed * _BITS.get(spec.quant, 0) / 8
    wide = max(size, 4)  # of what is added to the model
    gradients = kept * size + new * wide
    return TrainPlan(
        spec=resolved,
        base_files=files,
        layout=layout,
        trained=trained,
        frozen=sum(frozen.values()),
        weights_bytes=round(weights + new * wide),
        gradients_bytes=gradients,
        optimiser_bytes=2 * gradients,
        activations_bytes=_activations(resolved, layout) * (2 if size == 2 or spec.autocast else size),
    )


def _activations(spec: ResolvedSpec, layout: Layout) -> int:
    """Numbers kept for the backward pass."""
    layers = layout.n_layer * _KEPT_PER_CHANNEL
    if spec.gradient_checkpointing:
        layers = layout.n_layer * 2 + _KEPT_PER_CHANNEL
    return spec.batch_size * spec.ctx_len * (layers * layout.n_embd + 3 * layout.vocab_size)


def _described(spec: TrainSpec) -> tuple[Layout, Mapping[str, tuple[int, ...]], tuple[FileState, ...]]:
    """(layout, shapes by name, files) of the base or of a fresh model."""
    if not spec.base:
        layout = fresh_layout(spec.n_embd, spec.n_layer, FRESH_VOCABULARY, spec.head_size)
        return layout, expected_tensors(layout)[0], ()
    with open_checkpoint(spec.base) as ck:
        if ck.kind != "model" or ck.layout is None:
            raise LayoutError(f"{ck.path} is {ck.kind}, no whole model to start from: {ck.reason}")
        shapes = {name: tuple(t.shape) for name, t in ck.info.items()}
        return ck.layout, shapes, file_states(ck)
