"""What an export would do, from headers alone: what is read and written, and about what it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.atomic import check_target
from rwkv_lab.errors import CheckpointValidationError, ModelMergeError, OutputError, ParameterError, RwkvLabError
from rwkv_lab.export.checkpoint_detector import CheckpointDetector, CheckpointInfo
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.families.rwkv import WHOLE, Rwkv
from rwkv_lab.export.family import Family
from rwkv_lab.export.pipeline import ONNX, PYTORCH, check_source, family_of, folder_name
from rwkv_lab.export.weight_storage import bytes_of, stored_as
from rwkv_lab.machine import disk_free, memory_free
from rwkv_lab.model.dual import outline
from rwkv_lab.model.loading import open_model
from rwkv_lab.progress import human_bytes

# Matrices that are stored in 8 or 4 bits, by their names in RWKV models and in those of transformers.
_INSIDE = 16 * 2**20  # bytes of weights up to which each graph holds them itself
_PROCESS = 400_000_000  # bytes without a model: of a notebook's, or of an export's two, of which one writes graphs
_TRACED = 230_000_000  # bytes that tracing takes, whatever the model
_COMPARED = 450_000_000  # bytes of a layer, and of logits of 521 tokens twice, of a vocabulary of 65,536
_COPIED = 0.85  # bytes of a weight that onnxruntime copies in int4, of one graph at a time


@dataclass(frozen=True)
class PlannedOutput:
    """A part of what is written."""

    level: str
    format: str  # "pytorch" or "onnx"
    bytes: int  # about


@dataclass(frozen=True)
class ExportPlan:
    """What exports of one model would do.

    base: the model that the checkpoint is merged into; None where it is a whole model.
    source_bytes: tensors of the whole model as they are stored; None where no header tells.
    memory_needed: about, anonymous memory.
    disk_needed: about, work files included.
    """

    configurations: tuple[ExportConfiguration, ...]
    checkpoint: CheckpointInfo
    base: Path | None
    family: str
    described: str
    source_bytes: int | None
    outputs: tuple[PlannedOutput, ...]
    disk_needed: int
    disk_free: int
    memory_needed: int
    memory_free: int
    notes: list[str] = field(default_factory=list)


@checked
def plan_export(configurations: Sequence[ExportConfiguration]) -> ExportPlan:
    """Look at what exports need before they begin.

    Args:
        configurations: of one model, as `ConfigurationManager.resolve_levels` gives them.

    Raises:
        CheckpointValidationError: the checkpoint is missing, damaged, still being written, or packed in 8 or 4 bits.
        ModelMergeError: there is no base, it is of no family that is known, or packed.
        ValidationError: texts to compare on that the model has no tokenizer for, or of less than two tokens.
        FormatExportError: a tokenizer that is not there, or not the model's; an option that models of the family do not
            have.
        ParameterError: no configuration is given.
        OutputError: a folder of an export is there already, or the disk has not enough space.
    """
    if not configurations:
        raise ParameterError("configurations is empty: give one at least.")
    first = configurations[0]
    try:
        checkpoint = CheckpointDetector(first.checkpoint_path).detect_latest_checkpoint(first.checkpoint_name)
    except CheckpointValidationError:
        raise
    except RwkvLabError as e:
        raise CheckpointValidationError(str(e)) from e
    family = family_of(first, checkpoint)
    whole = checkpoint.kind == "model"
    for one in configurations:
        _check_folder(one)
        model = check_source(one, checkpoint, family)
    base = None if model == checkpoint.path else model
    described, tensors = _tensors(model)
    outputs = [output for one in configurations for output in _outputs(one, tensors, family)]
    source = sum(info.nbytes for info in tensors.values())
    merged = 0 if whole else source
    disk, free = merged + sum(output.bytes for output in outputs), disk_free(_existing(first.output_directory))
    if disk > free:
        raise OutputError(
            f"The export needs about {human_bytes(disk)} of disk, {human_bytes(free)} are free "
            f"where {first.output_directory} is.\nChoose another output_directory, or fewer levels and formats."
        )
    notes = list(checkpoint.passed_over)
    if whole and first.base_model_name:
        notes.append(f"{checkpoint.name} is a whole model, so base_model_name is not used.")
    memory, there = _memory(configurations, tensors, family), memory_free()
    if memory > there:
        notes.append(f"about {human_bytes(memory)} of memory are needed, and {human_bytes(there)} are free.")
    size = source if tensors else None
    return ExportPlan(
        tuple(configurations), checkpoint, base, family.name, described, size, tuple(outputs),
        disk, free, memory, there, notes,
    )  # fmt: skip


def _tensors(path: Path) -> tuple[str, Mapping[str, TensorInfo]]:
    """A model in words, and its tensors by name; nothing where it is no path, such as a name on a hub."""
    if not path.exists():
        return str(path), {}
    try:
        with open_checkpoint(path) as ck:
            architectures = (ck.config or {}).get("architectures") or [ck.kind]
            return str(ck.layout or architectures[0]), dict(ck.info)
    except RwkvLabError as e:
        raise ModelMergeError(f"base_model_name: {e}") from e


def _outputs(
    configuration: ExportConfiguration, tensors: Mapping[str, TensorInfo], family: Family
) -> list[PlannedOutput]:
    level = configuration.quantization_level
    found = []
    if configuration.export_pytorch:
        found.append(PlannedOutput(level, PYTORCH, family.pytorch_bytes(configuration, tensors)))
    if configuration.export_onnx:
        size = sum(bytes_of(t.shape, stored_as(name, t.shape, level)) for name, t in tensors.items())
        inside = size <= _INSIDE and not configuration.use_external_data_format
        found.append(PlannedOutput(level, ONNX, 2 * size if inside else size))  # of two graphs
    return found


def _memory(configurations: Sequence[ExportConfiguration], tensors: Mapping[str, TensorInfo], family: Family) -> int:
    """Bytes of anonymous memory at the peak, about; docs/export.md has what was measured."""
    sizes = [prod(t.shape) for t in tensors.values()] or [0]
    traced = [one for one in configurations if one.export_onnx]
    compared = [one for one in traced if one.run_validation_tests]
    weights = 4 * sum(sizes)
    if not traced:
        return _PROCESS
    if family.name != Rwkv.name:  # loaded in float32 to be traced, and to be compared
        return _PROCESS + weights * (5 if compared else 3)
    needed = _PROCESS + memory_of_graphs(max(sizes))
    if compared:
        levels = {one.quantization_level for one in compared}
        in_int4 = _COPIED * sum(sizes) if "int4" in levels else 0
        in_fp16 = 4 * max(sizes) if "fp16" in levels else 0  # the head, cast to float32
        copied = max(in_int4, in_fp16)  # one level is compared after the other
        needed = max(needed, _PROCESS + int(5 * weights if weights <= WHOLE else _COMPARED + 2 * max(sizes) + copied))
    return needed


def graphs_are_kept(plan: ExportPlan) -> bool:
    """Whether the graphs of an RWKV will not be traced, since an earlier export of a model of its shapes has kept them.

    Raises:
        RwkvLabError: the model cannot be opened.
    """
    try:
        from rwkv_lab.export.onnx.tracing import is_kept
    except ImportError:  # a plan needs none of the packages that write graphs
        return False
    with open_model(plan.base or plan.checkpoint.path) as (ck, layout):
        model = outline(ck, layout)
    if plan.checkpoint.kind == "state":
        model.add_time_state()
    return all(
        is_kept(model, one.onnx_opset_version, one.onnx_optimize_graph, one.onnx_recurrence)
        for one in plan.configurations
        if one.export_onnx
    )


def memory_of_graphs(largest: int) -> int:
    """Bytes of anonymous memory that writing the graphs of an RWKV takes beside an idle process, at the most of levels.

    Args:
        largest: values of its largest tensor, which is the embedding where the vocabulary is large.
    """
    return _TRACED + 6 * largest  # in float32, and what is made of it


def _check_folder(configuration: ExportConfiguration) -> None:
    """Refuse a folder that is there already; where its name depends on the time, it is new."""
    pattern, folder = configuration.naming_pattern, configuration.output_directory
    if "{timestamp" in pattern or "{export_id" in pattern or not folder.is_dir():
        return
    check_target(folder / folder_name(configuration, "", ""), configuration.overwrite)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next((one for one in (folder, *folder.parents) if one.is_dir()), Path("/"))
