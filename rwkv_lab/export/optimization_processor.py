"""Makes a model smaller: fewer bits for its weights, and nothing in the file that no layer reads. What was quantised,
kept and left out is listed by name, with bytes."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, TensorInfo, file_facts, open_checkpoint
from rwkv_lab.checkpoint.contents import kept_notes
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.packed import NOTE, PARTS, VERSION, part_shapes
from rwkv_lab.checkpoint.provenance import RECORD, as_text, provenance
from rwkv_lab.checkpoint.rounding import from_int4, from_int8, int4, int8
from rwkv_lab.checkpoint.stream import OutTensor, computed_together
from rwkv_lab.checkpoint.tensors import expected_tensors
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.convert import convert
from rwkv_lab.errors import FormatExportError, NumericsError, ParameterError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.weight_storage import Choice, Level, PytorchFormat, Stored, bytes_of, fault_of, stored_as
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft.quantised import quantised_and_back, quantize_nf4

_GGUF = {"none": None, "fp16": "fp16", "int8": "Q8_0", "int4": "Q4_0"}
_SHOWN = 5  # names in a sentence


@dataclass(frozen=True)
class StoredTensor:
    """How a tensor of a model is stored.

    original_bytes: in the checkpoint, or in memory.
    """

    name: str
    shape: tuple[int, ...]
    stored: Stored
    original_bytes: int
    bytes: int

    @property
    def is_quantised(self) -> bool:
        """Whether it has fewer bits than float32."""
        return self.stored != "fp32"


@dataclass(frozen=True)
class Quantised:
    """A model in float32 whose weights are those that quantisation leaves, and how each is stored."""

    model: Any
    tensors: list[StoredTensor]

    def described(self) -> str:
        """A line per way of storing: how many tensors, and bytes before and after."""
        return "\n".join(described(self.tensors))


@dataclass(frozen=True)
class Reduced:
    """A checkpoint without what its model does not need.

    path: what was written; the source itself where there was nothing to leave out.
    left_out: names of tensors and of other entries.
    saved_bytes: of those tensors.
    """

    path: Path
    left_out: tuple[str, ...] = ()
    saved_bytes: int = 0

    def __str__(self) -> str:
        more = f" and {len(self.left_out) - _SHOWN} more" if len(self.left_out) > _SHOWN else ""
        return f"{len(self.left_out)} things, {self.saved_bytes:,} bytes: {', '.join(self.left_out[:_SHOWN])}{more}"


@dataclass(frozen=True)
class SizeReduction:
    """Bytes before and after. The percentage is negative where it grew."""

    original_bytes: int
    optimised_bytes: int

    @property
    def original_mb(self) -> float:
        """MB of 10^6 bytes."""
        return self.original_bytes / 1e6

    @property
    def optimised_mb(self) -> float:
        """MB of 10^6 bytes."""
        return self.optimised_bytes / 1e6

    @property
    def percentage(self) -> float:
        """By how much it became smaller."""
        return 100 * (1 - self.optimised_bytes / self.original_bytes) if self.original_bytes else 0.0


class OptimizationProcessor:
    """Quantises, and leaves out what is not needed.

    Args:
        level: "none", "fp16", "int8", "int4", or "nf4", which checkpoints have and ONNX graphs do not.
        choice: how single matrices are stored ("fp32", "fp16", "int8", "int4"), by name, whatever the level says.

    Raises:
        ParameterError: no such level, or no such way of storing.
    """

    @checked
    def __init__(self, level: Level = "none", choice: Choice | None = None):
        self.level: Level = level
        self.choice: dict[str, Weights] = dict(choice or {})
        if level == "nf4" and self.choice:
            raise ParameterError("choice is of ONNX graphs; checkpoints in nf4 have one level for all matrices.")

    # ------------------------------------------------------------------ quantisation

    @checked
    def plan_quantisation(self, source: str | Path | RWKV_Dual) -> list[StoredTensor]:
        """How every tensor would be stored, from names and shapes alone.

        Args:
            source: a checkpoint, or a model in memory.

        Raises:
            FormatExportError: a matrix that cannot be stored so: for int4 its inputs must be a multiple of 32.
            ParameterError: a name in `choice` that the model does not have.
        """
        if isinstance(source, RWKV_Dual):
            return self._plan((n, tuple(p.shape), p.nbytes) for n, p in source.named_parameters())
        with open_checkpoint(source) as ck:
            return self._plan((name, info.shape, info.span) for name, info in ck.info.items())

    def _plan(self, tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> list[StoredTensor]:
        planned, names = [], set()
        for name, shape, nbytes in tensors:
            stored = stored_as(name, shape, self.level, self.choice)
            if fault := fault_of(name, shape, stored):
                raise FormatExportError(fault)
            planned.append(StoredTensor(name, shape, stored, nbytes, bytes_of(shape, stored)))
            names.add(name)
        if unknown := [name for name in self.choice if name not in names]:
            raise ParameterError(f"choice names {unknown[0]}, which is no tensor of the model.")
        return planned

    @checked
    def apply_quantization(self, model: RWKV_Dual) -> Quantised:
        """A copy of a float32 model whose weights are those of the exported one, restored to float32, bit for bit; and
        how each tensor is stored.

        Raises:
            FormatExportError: a matrix that cannot be stored so: for int4 its inputs must be a multiple of 32.
            ParameterError: a name in `choice` that the model does not have.
            NumericsError: a value that float16 cannot hold.
        """
        tensors = self.plan_quantisation(model)
        quantised = copy.deepcopy(model).requires_grad_(False)
        by_name = dict(quantised.named_parameters())
        for t in tensors:
            by_name[t.name].copy_(restored(t.name, by_name[t.name], t.stored))
        return Quantised(quantised, tensors)

    # ------------------------------------------------------------------ files

    @checked
    def remove_training_artifacts(self, source: str | Path, out: str | Path) -> Reduced:
        """Write a checkpoint without what does not belong to its model: optimiser states, steps, other tensors.
        Nothing is written where there is nothing of the kind.

        Raises:
            OutputError: `out` is there, or cannot be written.
        """
        with open_checkpoint(source) as ck:
            return _without(ck, training_artifacts(ck), Path(out))

    @checked
    def optimize_model_structure(self, source: str | Path, out: str | Path) -> Reduced:
        """Write a checkpoint without tensors that no layer reads: v0, v1 and v2 of RWKV-7's first layer. ONNX graphs
        never have them. Nothing is written where there is nothing of the kind.

        Raises:
            OutputError: `out` is there, or cannot be written.
        """
        with open_checkpoint(source) as ck:
            return _without(ck, unread_tensors(ck), Path(out))

    @checked
    def compress_model_weights(
        self, source: str | Path, out: str | Path, pytorch_format: PytorchFormat = "safetensors"
    ) -> tuple[list[StoredTensor], list[str]]:
        """Write a model for PyTorch at this level, which `open_checkpoint` and `RWKV_Dual.from_pretrained` read.

        int8, int4 and nf4 in .pth and .safetensors: matrices in the form of `rwkv_lab.checkpoint.packed`, all else in
        its own dtype. In GGUF, of RWKV-6 and 7, int8 is Q8_0 and int4 Q4_0.

        Returns:
            How each tensor is stored in a packed file (else none), and what should be known of the file.

        Raises:
            FormatExportError: it cannot be written, or is not what was to be written.
            OutputError: `out` is there, or cannot be written.
        """
        if self.choice and (pytorch_format == "gguf" or self.level not in ("int8", "int4")):
            raise ParameterError("choice is for int8 and int4 in .pth and .safetensors; other files have one level.")
        if self.level in ("int8", "int4", "nf4") and pytorch_format != "gguf":
            return self._pack(Path(source), Path(out), pytorch_format)
        if self.level not in _GGUF:
            raise FormatExportError(f"GGUF has no {self.level}: export int4, or choose pth or safetensors.")
        result = convert(source, pytorch_format, out, dtype=_GGUF[self.level])
        if wrong := [check for check in result.checks if not check.passed]:
            raise FormatExportError(f"{Path(out).name} is not what was to be written: {wrong[0]}")
        return [], list(result.notes)

    def _pack(self, source: Path, out: Path, kind: str) -> tuple[list[StoredTensor], list[str]]:
        facts = file_facts(source)
        with open_checkpoint(source) as ck:
            planned = self._plan((name, info.shape, info.span) for name, info in ck.info.items())
            parts, tensors = [], []
            for t in planned:
                info = ck.info[t.name]
                if t.stored == "fp32":
                    parts.append(OutTensor(t.name, info.shape, info.dtype, source=info))
                    tensors.append(StoredTensor(t.name, t.shape, "fp32", t.original_bytes, info.nbytes))
                elif t.stored == "fp16":
                    parts.append(OutTensor(t.name, info.shape, torch.float16, compute=info.blocks))
                    tensors.append(t)
                else:
                    parts += _packed_parts(t.name, info, t.stored)
                    tensors.append(t)
            notes = {NOTE: VERSION, RECORD: as_text(provenance({"level": self.level}, [facts], job="export"))}
            write_stream(out, parts, file_layout(kind, parts, notes), False, scan=lambda t: True)
            if wrong := [t.name for t in tensors if t.is_quantised and not _is_written(ck, out, t)]:
                raise FormatExportError(f"{out.name} is not what was to be written: {wrong[0]} differs.")
        return tensors, []

    @checked
    def calculate_size_reduction(self, original: int | str | Path, optimised: int | str | Path) -> SizeReduction:
        """Compare sizes: of files, of folders with all in them, or given in bytes.

        Raises:
            ParameterError: there is no such file or folder.
        """
        return SizeReduction(_bytes_at(original), _bytes_at(optimised))


def training_artifacts(ck: Checkpoint) -> list[str]:
    """Names of what lies beside a model in its checkpoint: tensors of no layer, and entries that are no tensors."""
    misfit = ck.identity.misfit
    return [*(misfit.extra if misfit else ()), *map(str, ck.others)]


def unread_tensors(ck: Checkpoint) -> list[str]:
    """Names of tensors that belong to a model's generation and that no layer reads."""
    if ck.layout is None:
        return []
    optional = expected_tensors(ck.layout)[1]
    return [name for name in ck.info if name in optional and not name.endswith(".time_state")]


def by_storage(tensors: Iterable[StoredTensor]) -> dict[str, dict[str, Any]]:
    """Ways of storing -> names of the tensors, bytes before and after; "fp32" is what is kept. JSON-ready."""
    found: dict[str, dict[str, Any]] = {}
    for t in tensors:
        one = found.setdefault(t.stored, {"original_bytes": 0, "bytes": 0, "tensors": []})
        one["original_bytes"] += t.original_bytes
        one["bytes"] += t.bytes
        one["tensors"].append(t.name)
    return found


def described(tensors: Iterable[StoredTensor]) -> list[str]:
    """A line per way of storing: how many tensors, and bytes before and after."""
    return [
        f"{len(one['tensors'])} tensors are {'kept' if stored == 'fp32' else f'stored in {stored}'}: "
        f"{one['original_bytes']:,} bytes before, {one['bytes']:,} after."
        for stored, one in by_storage(tensors).items()
    ]


def restored(name: str, weight: torch.Tensor, stored: Stored) -> torch.Tensor:
    """What is left of a weight, `[out,in]` where it is quantised: float32, bit for bit what the exported model has.

    Raises:
        NumericsError: a value that float16 cannot hold.
    """
    if stored == "fp32":
        return weight
    if stored == "fp16":
        half = weight.half()
        if (half.isinf() & weight.isfinite()).any():
            raise NumericsError(f"{name} holds {float(weight.abs().max()):.4g}; float16 ends at 65504.")
        return half.float()
    if stored == "nf4":
        return quantised_and_back(weight, "nf4")
    transposed = weight.detach().float().numpy().T
    back = from_int8(*int8(transposed)) if stored == "int8" else from_int4(*int4(transposed))
    return torch.from_numpy(np.ascontiguousarray(back.T))


def _packed_parts(name: str, info: TensorInfo, kind: str) -> list[OutTensor]:
    shapes = part_shapes(kind, info.shape)
    taken = 4 * info.numel * 3  # bytes that rounding takes
    parts = [OutTensor(f"{name}.{end}", shapes[end][0], getattr(torch, shapes[end][1])) for end in PARTS[kind]]
    return computed_together(parts, lambda: _rounded(info.read(), kind), taken)


def _rounded(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """The parts of a matrix `[out,in]`."""
    if not weight.isfinite().all():
        raise NumericsError("The weight holds NaN or infinity; not quantised.")
    if kind == "nf4":
        return quantize_nf4(weight)
    transposed = weight.float().numpy().T
    parts = int8(transposed) if kind == "int8" else int4(transposed)
    made = [torch.from_numpy(part) for part in parts]
    return (made[0].T.contiguous(), *made[1:]) if kind == "int8" else tuple(made)


def _is_written(ck: Checkpoint, out: Path, t: StoredTensor) -> bool:
    with open_checkpoint(out) as written:
        return torch.equal(written[t.name], restored(t.name, ck[t.name].float(), t.stored))


def _without(ck: Checkpoint, names: list[str], out: Path) -> Reduced:
    if not names:
        return Reduced(ck.path)
    left_out = {*names}
    kept = [OutTensor(n, t.shape, t.dtype, source=t) for n, t in ck.info.items() if n not in left_out]
    notes = kept_notes(ck, "export", is_changed=False)
    write_stream(out, kept, file_layout(file_kind(out), kept, notes), False, scan=lambda t: True)
    saved = sum(t.nbytes for n, t in ck.info.items() if n in left_out)
    return Reduced(out, tuple(names), saved)


def _bytes_at(place: int | str | Path) -> int:
    if isinstance(place, int):
        return place
    path = Path(place)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise ParameterError(f"There is no file or folder {path}.")
    return path.stat().st_size
