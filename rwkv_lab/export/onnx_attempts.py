"""ONNX graphs of a family's model, written with recovery: an attempt is a configuration with some values changed."""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import ONNXExportError
from rwkv_lab.export.attempt import Attempt, Work
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.families import FAMILIES
from rwkv_lab.export.family import Family, WholeModel
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.export.profiles import choose_profile, earlier_failures
from rwkv_lab.export.recovery import write_with_recovery

log = logging.getLogger(__name__)

WRITER = f"{__name__}:write_in_process"
_UNTRACED = ((3, 7), (1, 1))  # batch and length at which graphs have to run


def with_chosen_profile(configuration: ExportConfiguration, model: WholeModel) -> ExportConfiguration:
    """The configuration with the values of its profile, which is chosen here where it is "auto"."""
    if configuration.profile != "auto":
        return configuration.with_profile(configuration.profile)
    with open_checkpoint(model.path) as ck:
        parameters = sum(math.prod(info.shape) for info in ck.info.values())
    earlier = earlier_failures(configuration.output_directory, configuration.checkpoint_path)
    name, why = choose_profile(parameters, earlier)
    log.info("profile %s: %s", name, why)
    return configuration.with_profile(name, why)


def write_onnx(
    configuration: ExportConfiguration, family: Family, model: WholeModel, folder: Path, attempts: list[Attempt]
) -> list[Check]:
    """Have a family write its graphs into `folder`, in a process of its own; with what was checked of them.

    Args:
        attempts: is filled with what was tried, also where an error is raised.

    Raises:
        ONNXExportError, TracerWarningError, UnorderedMapError, DeviceError: nothing helped; says the cause.
    """
    options = {name: _json(getattr(configuration, name)) for name in type(configuration).model_fields}
    work = Work(
        WRITER,
        {
            "family": family.name,
            "options": options,
            "model": {"path": str(model.path), "bytes": model.bytes, "choice": model.choice},
        },
    )
    asked = {name: options[name] for name in family.varies}
    if configuration.export_tensorrt:
        asked.pop("onnx_dynamic_axes", None)  # engines have sizes of their own
    most, limit = configuration.max_attempts, configuration.attempt_time_limit
    return [Check(**one) for one in write_with_recovery(work, asked, folder, most, limit, attempts)]


def write_in_process(
    settings: dict[str, Any], folder: Path, *, family: str, options: dict[str, Any], model: dict[str, Any]
) -> list[dict[str, Any]]:
    """One attempt: write, and run what was written at sizes that were not traced.

    Raises:
        ONNXExportError: it cannot be written, or does not run.
    """
    configuration = ExportConfiguration.read(options).changed(**settings)
    writer = next(one for one in FAMILIES if one.name == family)
    whole = WholeModel(Path(model["path"]), model["bytes"], choice=model["choice"])
    checks = writer.write_onnx(configuration, whole, folder)
    graph = OnnxModel(folder, low_memory=True)
    for shape in _UNTRACED:
        try:
            graph.run(np.zeros(shape, np.int64))
        except Exception as e:  # onnxruntime has no class of its own for them
            raise ONNXExportError(f"onnxruntime does not run the graphs at {shape[0]}x{shape[1]}: {e}") from e
    return [asdict(check) for check in checks]


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
