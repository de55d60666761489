"""Causal language models of Hugging Face, such as Qwen3, and adapters of peft for them."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from rwkv_lab.checkpoint import TensorInfo, open_checkpoint
from rwkv_lab.checkpoint.rounding import NF4_BLOCK
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import shard_files, write_folder
from rwkv_lab.checks import Check
from rwkv_lab.errors import FormatExportError, ModelMergeError
from rwkv_lab.export.causal_lm.folder import CONFIG, architecture, files_beside, open_folder, tokenizer_file
from rwkv_lab.export.causal_lm.loading import four_bits, known_type, load_causal_lm, need, refuse_attention
from rwkv_lab.export.causal_lm.merging import SHARD, config_file
from rwkv_lab.export.causal_lm.nf4 import nf4_config, nf4_parts
from rwkv_lab.export.causal_lm.onnx_folder import begin_tokens, export_causal_lm
from rwkv_lab.export.causal_lm.verifying import failed
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
from rwkv_lab.export.model_merger import ModelMerger
from rwkv_lab.export.onnx_fixed_sizes import FixedSizes
from rwkv_lab.export.onnx_folder import past_names
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.export.weight_storage import Choice, bytes_of, stored_as
from rwkv_lab.tokenizer import load_tokenizer

_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state", "training_args", "global_step")
_PADDED = (3, 11)  # rows and tokens of the comparison with padding
_SHOWN = 5  # names in a sentence


class HuggingFace:
    """Causal language models that transformers has a class for."""

    name = "Hugging Face"
    varies: tuple[str, ...] = (
        *("attention_implementation", "use_external_data_format", "onnx_optimize_graph", "onnx_opset_version"),
        *("onnx_exporter", "onnx_dynamic_axes"),
    )

    def recognises(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> bool:
        """It is a folder of such a model, or an adapter of one."""
        path = _base(configuration, checkpoint)
        if path is None or not (path / CONFIG).is_file():
            return False
        with open_checkpoint(path) as ck:
            return ck.layout is None and architecture(ck.config) is not None

    def check_options(self, configuration: ExportConfiguration) -> None:
        """See `Family.check_options`."""
        if configuration.export_onnx:
            refuse_options(configuration, {"onnx_recurrence": "they have none"}, "RWKV", "Hugging Face")
        if configuration.export_pytorch and configuration.pytorch_format == "gguf":
            raise FormatExportError(
                "pytorch_format='gguf' is for models of RWKV, not for Hugging Face, of which a folder is written."
            )

    def merge(self, configuration: ExportConfiguration, checkpoint: CheckpointInfo, folder: Path) -> WholeModel:
        """See `Family.merge`."""
        need("transformers", "A model of Hugging Face")
        base = _base(configuration, checkpoint)
        assert base is not None, "recognised by its base"
        config = known_type(base)
        if configuration.export_onnx:
            refuse_attention(config)
        if checkpoint.kind == "model":
            return _whole(configuration, checkpoint.path)
        merger = ModelMerger()
        planned = merger.merge_lora_weights(
            merger.load_base_model(base), merger.load_lora_adapter(checkpoint.path), configuration.alpha
        )
        merged = merger.save_merged_model(planned, folder / "merged", configuration.tokenizer)
        checks = merger.verify_merge_integrity(merged)
        if wrong := failed(checks):
            raise ModelMergeError(f"The merge of {checkpoint.path} does not stand its check: {wrong[0]}")
        said = list(merged.notes)
        if not configuration.base_model_name:
            said.append(f"the base is {base}, which the adapter names.")
        return WholeModel(merged.path, _bytes(merged.path), checks, said)

    def pytorch_name(self, configuration: ExportConfiguration, name: str) -> str:
        """A folder, whatever `pytorch_format` says."""
        return name

    def pytorch_bytes(self, configuration: ExportConfiguration, tensors: Mapping[str, TensorInfo]) -> int:
        """See `Family.pytorch_bytes`: in float16, but for "none" and "nf4"; of "nf4" the head keeps its dtype."""
        level = configuration.quantization_level
        if level == "none" or not configuration.compress_weights:
            return sum(tensor.nbytes for tensor in tensors.values())
        if level != "nf4":
            return sum(2 * tensor.numel for tensor in tensors.values())
        matrices = {name for name, t in tensors.items() if stored_as(name, t.shape, "nf4") == "nf4"}
        packed = {name for name in matrices if tensors[name].shape[1] % NF4_BLOCK == 0}
        return sum(bytes_of(t.shape, "nf4") if name in packed else t.nbytes for name, t in tensors.items())

    def write_pytorch(self, configuration: ExportConfiguration, model: WholeModel, out: Path) -> list[str]:
        """See `Family.write_pytorch`: a folder of safetensors that transformers loads."""
        level = configuration.quantization_level
        if level == "nf4" and configuration.compress_weights:
            return _write_nf4(configuration, model.path, out)
        half = level != "none" and configuration.compress_weights
        beside = files_beside(model.path, tokenizer=configuration.tokenizer)
        with (folder := open_folder(model.path)).ck:
            tensors = [_written(info, half) for info in folder.tensors.values()]
            config = folder.config | ({"dtype": "float16"} if half else {})
            files = {CONFIG: config_file(config), **beside}
            write_folder(out, shard_files(tensors, SHARD), {"format": "pt"}, files, False, scan=lambda t: True)
        if level in ("int8", "int4") or level != "none" and not half:
            kept = "float16" if half else "the dtype of its checkpoint"
            why = f"a folder for transformers holds no {level}" if half else "compress_weights is False"
            return [f"{out.name} is in {kept}: {why}."]
        return []

    def write_onnx(self, configuration: ExportConfiguration, model: WholeModel, folder: Path) -> list[Check]:
        """See `Family.write_onnx`."""
        rows, length, context = configuration.onnx_fixed_sizes
        return export_causal_lm(
            model.path,
            folder,
            ONNX_WEIGHTS[configuration.quantization_level],
            configuration.onnx_opset_version,
            configuration.use_external_data_format,
            configuration.tokenizer,
            configuration.onnx_optimize_graph,
            cast(Choice, model.choice),
            configuration.onnx_exporter,
            configuration.attention_implementation,
            None if configuration.onnx_dynamic_axes else FixedSizes(rows, length, context - 1),
        )

    def reference(self, configuration: ExportConfiguration, model: WholeModel) -> "CausalLmReference":
        """See `Family.reference`."""
        home = Path(configuration.tokenizer) if configuration.tokenizer else model.path
        return CausalLmReference(load_causal_lm(model.path), tokenizer_file(home))

    def in_memory(self, configuration: ExportConfiguration, model: WholeModel) -> tuple[nn.Module, Encode]:
        """See `Family.in_memory`."""
        reference = self.reference(configuration, model)
        return reference.model, reference.tokens_of


class CausalLmReference:
    """A model in torch, float32, with transformers' own cache and masks: see `rwkv_lab.export.family.Reference`."""

    def __init__(self, model: Any, tokenizer: Path):
        self.model, self.vocab_size = model, model.get_input_embeddings().weight.shape[0]
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._tokenizer, self._begin = load_tokenizer(tokenizer), begin_tokens(tokenizer)
        newer = "cache" in inspect.signature(model.forward).parameters
        self._cache = "cache" if newer else "past_key_values"  # what transformers calls it

    def run(self, tokens: np.ndarray, state: Any | None = None) -> tuple[np.ndarray, Any]:
        """int64 `[B,T]` and a cache -> logits float32 `[B,T,V]`, and the cache."""
        given = {} if state is None else {self._cache: copy.deepcopy(state)}  # it is written into
        with torch.inference_mode():
            out = self.model(input_ids=torch.from_numpy(tokens), use_cache=True, **given)
        return out.logits.numpy(), out[self._cache]

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """Keys and values of each layer, `[B,H,P,D]`."""
        parts = [part.numpy() for layer in state.layers for part in (layer.keys, layer.values)]
        return dict(zip(past_names(len(parts) // 2), parts, strict=True))

    def read(self, texts: Sequence[Text]) -> Read:
        """See `Reference.read`."""
        return read_in_turn(self, texts)

    def seconds(self, pieces: Sequence[np.ndarray]) -> list[float]:
        """See `Reference.seconds`."""
        return seconds_in_turn(self, pieces)

    def tokens_of(self, text: str | bytes) -> list[int]:
        """Tokens of a text, with those that begin one."""
        return self._begin + self._tokenizer.encode(text)

    def own_checks(self, graph: OnnxModel, limit: float | None) -> list[Check]:
        """Rows of unequal length, padded on the left: logits where there are tokens, beside each row by itself."""
        if limit is None:
            return []
        draw, worst = np.random.default_rng(0), 0.0
        tokens, mask = draw.integers(0, self.vocab_size, _PADDED), np.ones(_PADDED, np.int64)
        for row in range(_PADDED[0]):
            mask[row, : 2 * row] = 0
        whole, _ = graph.run(tokens, attention_mask=mask)
        for row, logits in enumerate(whole):
            expected, _ = self.run(tokens[row : row + 1, 2 * row :])
            error = np.abs(logits[2 * row :] - expected[0]).max() / max(1.0, float(np.abs(expected).max()))
            worst = max(worst, float(error))
        return [Check("rows padded on the left: largest relative error of logits", worst, limit, worst <= limit)]


def _base(configuration: ExportConfiguration, checkpoint: CheckpointInfo) -> Path | None:
    """The model that a checkpoint is, or goes with: the one that is given, else the one that an adapter names."""
    if checkpoint.kind == "model":
        return checkpoint.path
    if configuration.base_model_name:
        return Path(configuration.base_model_name).expanduser()
    if not (checkpoint.path / "adapter_config.json").is_file():
        return None
    with open_checkpoint(checkpoint.path) as ck:
        named = (ck.adapter_config or {}).get("base_model_name_or_path")
    path = Path(named) if isinstance(named, str) and named else None
    return path if path is not None and path.is_dir() else None


def _whole(configuration: ExportConfiguration, path: Path) -> WholeModel:
    """A folder that is a model; what a training left in it is not taken along."""
    with open_folder(path).ck as ck:
        size = ck.bytes
    files_beside(path, tokenizer=configuration.tokenizer)  # refuses now what has no tokenizer
    said = []
    if configuration.base_model_name:
        said.append(f"{path.name} is a whole model, so base_model_name is not used.")
    if left := sorted(entry.name for entry in path.iterdir() if entry.name.startswith(_OF_TRAINING)):
        named = f"{len(left)} things beside the model: {', '.join(left[:_SHOWN])}"
        if not configuration.remove_training_artifacts:
            raise ModelMergeError(f"{path} holds {named}.\nremove_training_artifacts=True leaves them out.")
        said.append(f"left out of {path.name} were {named}.")
    return WholeModel(path, size, [], said)


def _write_nf4(configuration: ExportConfiguration, source: Path, out: Path) -> list[str]:
    """A folder with matrices in NF4, and all else in its own dtype; says what transformers needs for it."""
    layers = four_bits(source)
    beside = files_beside(source, tokenizer=configuration.tokenizer)
    with (folder := open_folder(source)).ck:
        packed = {f"{name}.weight" for name in layers.stored} & {*folder.tensors}
        if not packed:
            raise FormatExportError(f"{source} has no layers that are known to be quantised; export fp16.")
        dtype = str(folder.tensors[min(packed)].dtype).removeprefix("torch.")
        tensors = [
            part
            for name, info in folder.tensors.items()
            for part in (nf4_parts(info) if name in packed else [_written(info, half=False)])
        ]
        config = folder.config | {"quantization_config": nf4_config(layers.kept, dtype)}
        files = {CONFIG: config_file(config), **beside}
        write_folder(out, shard_files(tensors, SHARD), {"format": "pt"}, files, False, scan=lambda t: True)
    odd = [name for name in layers.kept if f"{name}.weight" in folder.tensors and f"{name}.weight" != folder.head]
    said = [f"{out.name} is loaded by transformers with bitsandbytes and accelerate."]
    return said + ([f"{len(odd)} matrices, such as {odd[0]}, keep their dtype: nf4 takes blocks of 64."] if odd else [])


def _written(info: TensorInfo, half: bool) -> OutTensor:
    """As it is; with `half`, floats as float16."""
    if not half or not info.dtype.is_floating_point or info.dtype == torch.float16:
        return OutTensor(info.name, info.shape, info.dtype, source=info)

    def values() -> Iterator[torch.Tensor]:
        yield from info.blocks()

    return OutTensor(info.name, info.shape, torch.float16, compute=values)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
