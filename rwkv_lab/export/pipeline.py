"""An export from a checkpoint to files that were compared with the model. They appear whole or not at all."""

import logging
import resource
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.atomic import atomic_folder, by_final_names, check_target, remove_stale, work_folder
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.checks import Check
from rwkv_lab.errors import (
    CheckpointValidationError,
    ExportError,
    FormatExportError,
    ModelMergeError,
    OutputError,
    ParameterError,
    RwkvLabError,
    ValidationError,
)
from rwkv_lab.export.checkpoint_detector import CheckpointDetector, CheckpointInfo
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.families import FAMILIES
from rwkv_lab.export.family import Family, Reference, WholeModel
from rwkv_lab.export.format_exporter import FormatExporter
from rwkv_lab.export.monitoring_logger import MonitoringLogger
from rwkv_lab.export.onnx_attempts import with_chosen_profile
from rwkv_lab.export.optimising import optimised
from rwkv_lab.export.optimization_processor import OptimizationProcessor
from rwkv_lab.export.result import FAILED, RESULT, ExportResult
from rwkv_lab.export.samples import check_samples, samples_of
from rwkv_lab.export.validation_tester import ValidationTester

log = logging.getLogger(__name__)

PYTORCH, ONNX, TENSORRT = "pytorch", "onnx", "tensorrt"  # in the folder of an export
REPORT, LOG = "validation.json", "export.log"
_WORK = "work"  # in it while it is made. Files are never written beside it: their writers lock the folder they are in
_SHARED = "merged"  # what the model is called that several exports share, while they are made
_SOURCE = ("checkpoint_path", "checkpoint_name", "base_model_name", "alpha", "remove_training_artifacts")
_MB = 1e6


@dataclass
class _Merged:
    """The whole model: several exports of it share one, which the first makes.

    folder: where it is kept; None: in the folder of the export.
    """

    folder: Path | None = None
    model: WholeModel | None = None


@dataclass
class _Job:
    """One export under way."""

    configuration: ExportConfiguration
    result: ExportResult
    checkpoint: CheckpointInfo
    family: Family
    monitor: MonitoringLogger
    merged: _Merged
    out: Path  # where the folder will be
    inside: Path  # where it is made
    reference: Reference | None = None  # the model that what is written is compared with, once it is read


@checked
def run(configuration: ExportConfiguration) -> ExportResult:
    """Detect, merge, write and compare, as the configuration states.

    The folder `<output_directory>/<naming_pattern>` has `pytorch/`, `onnx/`, `validation.json`, `export.log`
    and `result.json`. After an error there is none; `<naming_pattern>.failed.json` beside it says why.

    Returns:
        The result. Where quantisation costs more than its limit allows, the files are there, `validation_passed` is
        False and the verdict is FAIL.

    Raises:
        CheckpointValidationError: the checkpoint is missing, damaged, still being written, or packed in 8 or 4 bits.
        ModelMergeError: there is no base, it is another's or packed, or the merge does not stand its checks.
        FormatExportError, ONNXExportError: a format cannot be written.
        ValidationError: what was written does not compute what the model does.
        OutputError: the folder is there already, or cannot be written.
    """
    return _run(configuration, _Merged())


@checked
def run_levels(configurations: Sequence[ExportConfiguration]) -> Iterator[ExportResult]:
    """Exports of one model whose weights are stored differently, one after the other; it is merged once.

    Args:
        configurations: as `ConfigurationManager.resolve_levels` gives them.

    Returns:
        The results, each as soon as it is there.

    Raises:
        ParameterError: they are of different models.
        For the others see `run`.
    """
    sources = {tuple(getattr(one, name) for name in _SOURCE) for one in configurations}
    if len(sources) > 1:
        raise ParameterError(f"The configurations are of different models: one of {', '.join(_SOURCE)} differs.")
    return _run_levels(configurations)


def _run_levels(configurations: Sequence[ExportConfiguration]) -> Iterator[ExportResult]:
    if len(configurations) < 2:
        yield from map(run, configurations)
        return
    folder = configurations[0].output_directory
    _make_folder(folder)
    with work_folder(folder / _SHARED) as kept:
        merged = _Merged(kept)
        for configuration in configurations:
            yield _run(configuration, merged)


def _run(configuration: ExportConfiguration, merged: _Merged) -> ExportResult:
    now = datetime.now(UTC)
    result = ExportResult(secrets.token_hex(6), now.isoformat(timespec="seconds"))
    _state(configuration, result)
    stamp = now.strftime("%Y%m%d-%H%M%S-%f")  # two exports may start in the same second
    name = folder_name(configuration, result.export_id, stamp)
    try:
        _export(configuration, result, configuration.output_directory / name, merged)
    except BaseException as e:
        result.success, result.error_message = False, f"{type(e).__name__}: {e}"
        result.pytorch_model_path = result.onnx_model_path = result.tensorrt_model_path = None
        result.validation_report_path = None
        _write_failed(result, configuration.output_directory, name)
        raise
    (configuration.output_directory / f"{name}{FAILED}").unlink(missing_ok=True)  # of an earlier try
    return result


def _export(configuration: ExportConfiguration, result: ExportResult, out: Path, merged: _Merged) -> None:
    stages, enabled = _stages(configuration), configuration.enable_progress_monitoring
    with MonitoringLogger(stages, configuration.log_level, enabled) as monitor:
        result.monitoring = monitor.found
        with _stage(monitor, "detect", CheckpointValidationError):
            detector = CheckpointDetector(configuration.checkpoint_path)
            checkpoint = detector.detect_latest_checkpoint(configuration.checkpoint_name)
            result.warnings += checkpoint.passed_over
        family = family_of(configuration, checkpoint)
        check_source(configuration, checkpoint, family)
        _make_folder(out.parent)
        remove_stale(out.with_name(_SHARED))  # of a killed export of several levels; its own is removed below
        _refuse_around(out, checkpoint.path)
        check_target(out, configuration.overwrite)
        with atomic_folder(out, configuration.overwrite) as inside:
            job = _Job(configuration, result, checkpoint, family, monitor, merged, out, inside)
            try:
                with monitor.writing(inside, LOG):
                    _write(job)
            except RwkvLabError as e:
                raise type(e)(_finally_named(str(e), job)) from e
            finally:
                for attempt in result.attempts:
                    attempt.error = attempt.error and _finally_named(attempt.error, job)
            result.seconds = monitor.seconds
            result.success = True
            result.write(inside / RESULT)


def _finally_named(text: str, job: _Job) -> str:
    """A message by the names that the folder and what is in it will have, not those of work folders."""
    return by_final_names(text.replace(str(job.inside), str(job.out)))


def _stages(configuration: ExportConfiguration) -> list[str]:
    validated = configuration.run_validation_tests and configuration.export_onnx
    asked = {name: getattr(configuration, f"export_{name}") for name in (PYTORCH, ONNX, TENSORRT)}
    asked["validate"] = validated
    return ["detect", "merge", "optimise", *(name for name, wanted in asked.items() if wanted)]


def _write(job: _Job) -> None:
    """All that the folder of an export holds, but its result."""
    configuration, result = job.configuration, job.result
    with _stage(job.monitor, "merge", ModelMergeError):
        (job.inside / _WORK).mkdir()
        merged = job.merged
        if merged.model is None:
            merged.model = job.family.merge(configuration, job.checkpoint, merged.folder or job.inside / _WORK)
        model = merged.model
    job.configuration = with_chosen_profile(configuration, model)
    _state(job.configuration, result)
    result.checks += model.checks
    result.warnings += model.warnings
    with _stage(job.monitor, "optimise", FormatExportError):
        model = optimised(configuration, model, job.checkpoint.path, result, job.inside / _WORK, job.family)
    _write_formats(job, model)
    if configuration.run_validation_tests and configuration.export_onnx:
        with _stage(job.monitor, "validate", ValidationError):
            _validate(job, model)
    elif configuration.run_validation_tests and (of_merge := [c for c in result.checks if isinstance(c, Check)]):
        result.validation_passed = all(check.passed for check in of_merge)
    shutil.rmtree(job.inside / _WORK)
    used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result.memory_usage_mb = max(used) * 1024 / _MB


def _state(configuration: ExportConfiguration, result: ExportResult) -> None:
    """Put the configuration, and where its values come from, into the result."""
    result.configuration = {
        name: {"value": getattr(configuration, name), "from": where} for name, where in configuration.origins.items()
    }


def _write_formats(job: _Job, model: WholeModel) -> None:
    configuration, result, inside = job.configuration, job.result, job.inside
    exporter, written = FormatExporter(job.family, configuration, model), inside
    if configuration.export_pytorch:
        name = job.family.pytorch_name(configuration, _model_name(configuration, job.checkpoint.path))
        name = f"{PYTORCH}/{name}"
        (inside / PYTORCH).mkdir()
        with _stage(job.monitor, "pytorch", FormatExportError):
            result.warnings += exporter.export_pytorch_model(inside / name)
        result.pytorch_model_path = str(job.out / name)
        written = inside / name
    if configuration.export_onnx:
        with _stage(job.monitor, "onnx", FormatExportError):
            result.attempts = exporter.attempts  # those that fail stay there
            result.checks += exporter.export_onnx_model(inside / ONNX)
            result.degraded += result.attempts[-1].lost
        result.onnx_model_path = str(job.out / ONNX)
        written = inside / ONNX
    if configuration.export_tensorrt:
        with _stage(job.monitor, "tensorrt", FormatExportError):
            reference = _reference(job, model) if configuration.run_validation_tests else None
            engines = exporter.export_tensorrt_model(inside / ONNX, inside / TENSORRT, reference)
        result.checks += engines.checks
        if engines.built:
            result.tensorrt_model_path = str(job.out / TENSORRT)
        if engines.reason:
            result.warnings.insert(0, f"{engines}; {TENSORRT}/README.md says how to build on another machine.")
    sizes = OptimizationProcessor().calculate_size_reduction(model.bytes, written)
    result.original_size_mb, result.optimized_size_mb = sizes.original_mb, sizes.optimised_mb
    result.size_reduction_percentage = sizes.percentage


def _validate(job: _Job, model: WholeModel) -> None:
    configuration, result = job.configuration, job.result
    reference = _reference(job, model)
    samples, said = samples_of(configuration, reference)
    result.warnings += said
    tester = ValidationTester(reference, job.inside / ONNX, samples)
    checks = tester.test_model_functionality()
    found = tester.compare_model_outputs()
    checks += [*tester.checks(found), *reference.own_checks(tester.graph, tester.gate.error)]
    speed, memory = tester.benchmark_inference_speed(), tester.measure_memory_usage()
    tester.generate_validation_report(job.inside / REPORT, found, checks, speed, memory)
    result.checks += checks
    result.inference_speed_ms = speed.decode_ms
    result.validation_report_path = str(job.out / REPORT)
    result.validation_passed = all(check.passed for check in checks if isinstance(check, Check))
    for check in checks:
        log.info("%s", check)


def _reference(job: _Job, model: WholeModel) -> Reference:
    if job.reference is None:
        job.reference = job.family.reference(job.configuration, model)
    return job.reference


def family_of(configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> Family:
    """The family that a checkpoint, or the base that it goes with, is of.

    Raises:
        ModelMergeError: there is no base, or it is of none that is known.
    """
    try:
        found = next((f for f in FAMILIES if f.recognises(configuration, checkpoint)), None)
    except RwkvLabError as e:  # of the base
        raise ModelMergeError(f"base_model_name: {e}" if configuration.base_model_name else str(e)) from e
    if found is None and not configuration.base_model_name:
        raise ModelMergeError(
            f"{checkpoint.path} is of kind {checkpoint.kind}, no whole model.\n"
            "Give the model that it was tuned from as base_model_name."
        )
    if found is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise ModelMergeError(f"{configuration.base_model_name} is no model of a family that is exported: {known}.")
    return found


def check_source(configuration: ExportConfiguration, checkpoint: CheckpointInfo, family: Family) -> Path:
    """Refuse before any work what cannot be exported as the configuration says; the model that is read, or its base.

    Raises:
        CheckpointValidationError, ModelMergeError: the model or the base is packed in 8 or 4 bits.
        FormatExportError, ValidationError: an option, tokenizer or text that does not go with the model.
    """
    family.check_options(configuration)
    path = model_or_base(configuration, checkpoint)
    if path.exists():
        try:
            with open_checkpoint(path) as ck:
                refuse_packed(ck.path, ck.info.values(), "An export")
        except RwkvLabError as e:
            error = CheckpointValidationError if path == checkpoint.path else ModelMergeError
            raise error(str(e)) from e
    check_samples(configuration, path)
    return path


def model_or_base(configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> Path:
    """The checkpoint where it is a whole model, else what it is merged into, which an adapter of peft may name."""
    if checkpoint.kind == "model":
        return checkpoint.path
    if configuration.base_model_name:
        return Path(configuration.base_model_name).expanduser()
    with open_checkpoint(checkpoint.path) as ck:
        named = (ck.adapter_config or {}).get("base_model_name_or_path")
    return Path(named) if named else checkpoint.path


# ------------------------------------------------------------------ names, folders, logs


def _model_name(configuration: ExportConfiguration, path: Path) -> str:
    return configuration.model_name or path.stem.lstrip(".") or "model"


def folder_name(configuration: ExportConfiguration, export_id: str, timestamp: str) -> str:
    """The name of an export's folder."""
    return configuration.naming_pattern.format(
        model_name=_model_name(configuration, Path(configuration.checkpoint_name or configuration.checkpoint_path)),
        timestamp=timestamp,
        quantization_level=configuration.quantization_level,
        export_id=export_id,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"output_directory {folder} cannot be made: {e.strerror or e}") from e


def _refuse_around(out: Path, source: Path) -> None:
    """An output that would replace the folder that its checkpoint lies in."""
    if source.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out} holds the checkpoint {source}; choose another output_directory or naming_pattern.")


@contextmanager
def _stage(monitor: MonitoringLogger, name: str, error: type[ExportError]) -> Iterator[None]:
    """A stage of an export; its errors are of the exporter's tree."""
    try:
        with monitor.stage(name):
            yield
    except (ExportError, OutputError):
        raise
    except RwkvLabError as e:
        raise error(str(e)) from e


def _write_failed(result: ExportResult, folder: Path, name: str) -> None:
    """Say beside the place of the folder why it is not there; where that cannot be written, the error says it."""
    try:
        if folder.is_dir():
            result.write(folder / f"{name}{FAILED}")
    except (OSError, RwkvLabError):
        log.warning("the result of the failed export could not be written into %s", folder)
