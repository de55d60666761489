"""RWKV of every generation: merged by `rwkv_lab.merge`, written by `rwkv_lab.convert` and `export_onnx`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import ModelMergeError, ParameterError
from rwkv_lab.export.checkpoint_detector import CheckpointInfo
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.family import (
    ONNX_WEIGHTS,
    Encode,
    Read,
    Text,
    WholeModel,
    read_in_turn,
    refuse_options,
    seconds_in_turn,
)
from rwkv_lab.export.layer_by_layer import LayerByLayer
from rwkv_lab.export.onnx.export import export_onnx
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.export.optimization_processor import OptimizationProcessor, training_artifacts
from rwkv_lab.export.samples import tokenizer_of
from rwkv_lab.export.weight_storage import Level, bytes_of, stored_as
from rwkv_lab.merge import merge, verify_merge
from rwkv_lab.model import RWKV_Dual

_SHOWN = 5  # names in a sentence
WHOLE = 256 * 2**20  # bytes in float32 up to which a model to compare with is loaded

# Options of graphs -> why RWKV's have none.
_REFUSED = {
    "onnx_dynamic_axes": "a state has no mask, so that a piece of another length cannot be padded; step.onnx takes one "
    "token",
    "onnx_exporter": "the old exporter has no translation of the recurrence, and writes one node per token",
    "attention_implementation": "it has no attention",
}


class Rwkv:
    """RWKV-4 to 7."""

    name = "RWKV"
    varies: tuple[str, ...] = ("onnx_opset_version", "onnx_optimize_graph", "use_external_data_format")

    def recognises(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> bool:
        """Its base is an RWKV model, or it is one itself."""
        path = configuration.base_model_name or checkpoint.path
        with open_checkpoint(path) as ck:
            return ck.layout is not None

    def check_options(self, configuration: ExportConfiguration) -> None:
        """See `Family.check_options`."""
        if configuration.export_onnx:
            refuse_options(configuration, _REFUSED, "Hugging Face", "RWKV")

    def merge(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo, folder: Path) -> WholeModel:
        """See `Family.merge`."""
        if checkpoint.kind == "model":
            return _whole(configuration, checkpoint.path, folder)
        base: str | Path = configuration.base_model_name
        if checkpoint.kind == "unmerged" and not base:
            base = checkpoint.path  # it holds its base
        if not base:
            raise ModelMergeError(
                f"{checkpoint.path} is of kind {checkpoint.kind}, no whole model.\n"
                "Give the model that it was tuned from as base_model_name."
            )
        out = folder / "merged.safetensors"
        alpha = configuration.alpha if checkpoint.kind == "lora" else None
        result = merge(base, checkpoint.path, out, alpha=alpha)
        checks = [*result.checks, *verify_merge(result)]
        if wrong := [check for check in checks if isinstance(check, Check) and not check.passed]:
            raise ModelMergeError(f"The merge of {checkpoint.path} does not stand its check: {wrong[0]}")
        return WholeModel(out, out.stat().st_size, [*checks], list(result.notes))

    def pytorch_name(self, configuration: ExportConfiguration, name: str) -> str:
        """See `Family.pytorch_name`."""
        return f"{name}.{configuration.pytorch_format}"

    def pytorch_bytes(self, configuration: ExportConfiguration, tensors: Mapping[str, TensorInfo]) -> int:
        """See `Family.pytorch_bytes`."""
        level = configuration.quantization_level if configuration.compress_weights else "none"
        return sum(_pytorch_bytes(name, tensor, level) for name, tensor in tensors.items())

    def write_pytorch(self, configuration: ExportConfiguration, model: WholeModel, out: Path) -> list[str]:
        """See `Family.write_pytorch`."""
        level = configuration.quantization_level if configuration.compress_weights else "none"
        processor = OptimizationProcessor(level, model.choice if level != "none" else None)
        _, said = processor.compress_model_weights(model.path, out, configuration.pytorch_format)
        if level != configuration.quantization_level:
            said.append(f"{out.name} is in the dtype of its checkpoint: compress_weights is False.")
        return said

    def write_onnx(self, configuration: ExportConfiguration, model: WholeModel, folder: Path) -> list[Check]:
        """See `Family.write_onnx`."""
        written = export_onnx(
            model.path,
            folder,
            ONNX_WEIGHTS[configuration.quantization_level],
            configuration.onnx_opset_version,
            external_data=configuration.use_external_data_format,
            tokenizer=configuration.tokenizer or None,
            optimise_graph=configuration.onnx_optimize_graph,
            choice=model.choice or None,
            recurrence=configuration.onnx_recurrence,
        )
        return written.checks

    def reference(self, configuration: ExportConfiguration, model: WholeModel) -> "RwkvReference | RwkvFileReference":
        """See `Family.reference`. A large model is not loaded: it would be the most that an export has in memory."""
        with open_checkpoint(model.path) as ck:
            size = 4 * sum(info.numel for info in ck.info.values())
        if size > WHOLE:
            return RwkvFileReference(model.path, configuration.tokenizer)
        return RwkvReference(
            RWKV_Dual.from_pretrained(model.path, mode="rnn", weights="dense"), configuration.tokenizer
        )

    def in_memory(self, configuration: ExportConfiguration, model: WholeModel) -> tuple[RWKV_Dual, Encode | None]:
        """See `Family.in_memory`."""
        loaded = RWKV_Dual.from_pretrained(model.path, weights="dense")
        if configuration.tokenizer:
            loaded.tokenizer = configuration.tokenizer
        try:
            return loaded, loaded.tokenizer.encode
        except ParameterError:  # the vocabulary does not tell
            return loaded, None


class RwkvReference:
    """A model in torch, float32, in memory: see `rwkv_lab.export.family.Reference`."""

    context: int | None = None

    def __init__(self, model: RWKV_Dual, tokenizer: str):
        self.model, self.vocab_size = model.eval().requires_grad_(False), model.layout.vocab_size
        if tokenizer:
            self.model.tokenizer = tokenizer

    def run(self, tokens: np.ndarray, state: Any | None = None) -> tuple[np.ndarray, Any]:
        """int64 `[B,T]` and an `RWKVState` -> logits float32 `[B,T,V]`, and the state."""
        step = tokens.shape[1] == 1  # in the model's own mode: token by token where it is loaded for that
        with torch.inference_mode():
            logits, after = (self.model if step else self.model.parallel)(torch.from_numpy(tokens), state)
        return logits.numpy(), after

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """An `RWKVState` as arrays, float32."""
        return {name: part.contiguous().numpy() for name, part in state.tensors().items()}

    def read(self, texts: Sequence[Text]) -> Read:
        """See `Reference.read`."""
        return read_in_turn(self, texts)

    def seconds(self, pieces: Sequence[np.ndarray]) -> list[float]:
        """See `Reference.seconds`."""
        return seconds_in_turn(self, pieces)

    def own_checks(self, graph: OnnxModel, limit: float | None) -> list[Check]:
        """None: the state is compared with all others."""
        return []

    def tokens_of(self, text: str) -> list[int] | None:
        """Tokens of a text; None where the size of the vocabulary tells no tokenizer."""
        try:
            return self.model.tokenizer.encode(text)
        except ParameterError:
            return None


class RwkvFileReference:
    """A model in torch, float32, layer by layer from its file: see `rwkv_lab.export.family.Reference`."""

    context: int | None = None

    def __init__(self, path: Path, tokenizer: str):
        self.model = LayerByLayer(path)
        self.vocab_size = self.model.layout.vocab_size
        self._tokenizer = tokenizer_of(tokenizer, self.vocab_size)

    def run(self, tokens: np.ndarray, state: Any | None = None) -> tuple[np.ndarray, Any]:
        """int64 `[B,T]` and an `RWKVState` -> logits float32 `[B,T,V]`, and the state."""
        logits, after = self.model.run(tokens, state)
        return logits.numpy(), after

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """An `RWKVState` as arrays, float32."""
        return {name: part.contiguous().numpy() for name, part in state.tensors().items()}

    def read(self, texts: Sequence[Text]) -> Read:
        """See `Reference.read`: the file is read once for all texts."""
        for pieces in self.model.read(texts):
            yield ((logits.numpy(), {} if state is None else self.arrays(state)) for logits, state in pieces)

    def seconds(self, pieces: Sequence[np.ndarray]) -> list[float]:
        """See `Reference.seconds`; without what reading the file takes."""
        return self.model.seconds(pieces)

    def own_checks(self, graph: OnnxModel, limit: float | None) -> list[Check]:
        """None: the state is compared with all others."""
        return []

    def tokens_of(self, text: str) -> list[int] | None:
        """Tokens of a text; None where the size of the vocabulary tells no tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.encode(text)


def _pytorch_bytes(name: str, tensor: TensorInfo, level: Level) -> int:
    """Bytes of a tensor in a file for PyTorch; what is not quantised keeps its dtype."""
    if level == "fp16":
        return 2 * tensor.numel
    stored = stored_as(name, tensor.shape, level)
    return tensor.nbytes if stored == "fp32" else bytes_of(tensor.shape, stored)


def _whole(configuration: ExportConfiguration, path: Path, folder: Path) -> WholeModel:
    """A checkpoint that is a model; without what does not belong to it."""
    said = []
    if configuration.base_model_name:
        said.append(f"{path.name} is a whole model, so base_model_name is not used.")
    with open_checkpoint(path) as ck:
        beside = training_artifacts(ck)
    if not beside:
        return WholeModel(path, ck.bytes, [], said)
    if not configuration.remove_training_artifacts:
        more = f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else ""
        raise ModelMergeError(
            f"{path} holds {len(beside)} things beside the model: {', '.join(beside[:_SHOWN])}{more}.\n"
            "remove_training_artifacts=True leaves them out."
        )
    reduced = OptimizationProcessor().remove_training_artifacts(path, folder / "model-alone.safetensors")
    said.append(f"left out of {path.name}, beside its model: {reduced}.")
    return WholeModel(reduced.path, reduced.path.stat().st_size, [], said)
