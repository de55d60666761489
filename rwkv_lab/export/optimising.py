"""The stage of an export that decides how the model is stored: what is left out, which level, where a scan is asked for
what each part has."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.export.calibration import load_calibration
from rwkv_lab.export.checkpoint_detector import CheckpointDetector
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.family import Family, WholeModel
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.export.optimization_processor import OptimizationProcessor, by_storage, described
from rwkv_lab.export.result import ExportResult
from rwkv_lab.export.scanned_model import scanned
from rwkv_lab.export.sensitivity import propose, scan_sensitivity
from rwkv_lab.train import CORPORA

log = logging.getLogger(__name__)


def optimised(
    configuration: ExportConfiguration,
    model: WholeModel,
    checkpoint: Path,
    result: ExportResult,
    folder: Path,
    family: Family,
) -> WholeModel:
    """The model as it will be written: without tensors that no layer reads, where that is asked for, and with a choice
    for each matrix, where a scan is. What was found goes into the result.

    Args:
        checkpoint: that is exported: it may state what it was trained on.
        folder: for what has to be written on the way.

    Raises:
        FormatExportError: a matrix that the level cannot store.
        ParameterError: calibration data that cannot be read, or a budget that no choice is within.
    """
    processor = OptimizationProcessor(configuration.quantization_level)
    if configuration.optimise_structure:
        reduced = processor.optimize_model_structure(model.path, folder / "read.safetensors")
        result.left_out = list(reduced.left_out)
        model = replace(model, path=reduced.path)
    if configuration.sensitivity_scan:
        model = replace(model, choice=_scan(configuration, model, checkpoint, result, family))
        with open_checkpoint(model.path) as ck:  # a head that is tied to the embedding is in no file
            stored: dict[str, Weights] = {name: way for name, way in model.choice.items() if name in ck}
        processor = OptimizationProcessor(configuration.quantization_level, stored)
    if configuration.export_onnx or _is_packed(configuration, model.path):
        tensors = processor.plan_quantisation(model.path)
        result.storage = by_storage(tensors)
        for line in described(tensors):
            log.info("%s", line)
    return model


def _is_packed(configuration: ExportConfiguration, path: Path) -> bool:
    """Whether the PyTorch model is written with packed matrices: one of RWKV, in few bits."""
    if not configuration.compress_weights or configuration.pytorch_format == "gguf":
        return False
    with open_checkpoint(path) as ck:
        return configuration.quantization_level in ("int8", "int4", "nf4") and ck.layout is not None


def _scan(
    configuration: ExportConfiguration, whole: WholeModel, checkpoint: Path, result: ExportResult, family: Family
) -> dict[str, Weights]:
    """How each matrix is stored, by the scan and the budgets."""
    level = configuration.quantization_level
    assert level in ("int8", "int4"), "refused by ExportConfiguration"
    with torch.inference_mode(False):
        model, encode = family.in_memory(configuration, whole)
    data = _calibration_data(configuration, checkpoint)
    read = load_calibration(data, scanned(model).vocab_size, encode, configuration.calibration_samples)
    result.calibration = {"data": read.data, "texts": len(read.texts), **asdict(read.statistics), "notes": read.notes}
    found = scan_sensitivity(model, read.texts, level)
    proposal = propose(model, read.texts, found, configuration.size_budget, configuration.kl_budget)
    result.sensitivity = replace(found, proposal=proposal)
    log.info("KL %.3g measured on %d tokens, %d bytes of weights", proposal.kl, found.tokens, proposal.bytes)
    return proposal.choice


def _calibration_data(configuration: ExportConfiguration, checkpoint: Path) -> str:
    if configuration.calibration_data:
        return configuration.calibration_data
    # A training states the names of its data, not their folder: those that Python brings are found again.
    training = CheckpointDetector(checkpoint).get_checkpoint_metadata(checkpoint)["training"] or {}
    return training["data"] if training.get("data") in CORPORA else CORPORA[0]
