"""Models of Hugging Face in torch, read from the disk alone: no download, and no code out of a folder is run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rwkv_lab.errors import CorruptFileError, LayoutError, ONNXExportError, ParameterError
from rwkv_lab.export.onnx_folder import Attention

Quantisation = Literal["none", "8bit", "4bit"]
_BLOCK = 64  # values that share a scale in bitsandbytes' 4 bits
_CHANGING = ("dynamic", "longrope")  # rotations, of which a graph would have one
_NOISY = ("transformers", "peft", "accelerate", "torchao")


def need(package: str, what: str) -> None:
    """Refuse a job whose package is not installed.

    Raises:
        ParameterError: it is not; says how to install it.
    """
    if find_spec(package) is None:
        extra = package if package == "bitsandbytes" else "'rwkv_lab[huggingface]'"
        raise ParameterError(f"{what} needs the package {package}.\nInstall it: pip install {extra}")


def load_causal_lm(folder: Path, quantisation: Quantisation = "none", attention: Attention = "eager") -> Any:
    """A model for inference on the CPU: float32, or with matrices in 8 or 4 bits by bitsandbytes.

    Args:
        attention: what transformers computes it by.

    In 4 bits, matrices whose inputs are no multiple of 64 stay in float32, and so does the head.

    Raises:
        ParameterError: transformers or bitsandbytes is not installed.
        LayoutError: transformers has no causal language model of this type.
        ONNXExportError: transformers has no such attention for this model.
        CorruptFileError: its files cannot be loaded.
    """
    need("transformers", f"{folder}")
    if quantisation != "none":
        need("bitsandbytes", f"quantisation={quantisation!r}")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    known_type(folder)
    if quantisation == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": four_bits(folder).kept}
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    elif quantisation == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        with quiet(), torch.inference_mode(False):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as e:  # transformers raises errors of many kinds
        if "attn_implementation" in str(e):
            raise ONNXExportError(f"{folder}: transformers has no {attention} attention for this model.") from e
        raise CorruptFileError(f"transformers cannot load {folder}: {str(e).splitlines()[0][:300]}") from e
    model, said = loaded
    if missing := sorted(said["missing_keys"]):
        raise CorruptFileError(
            f"{folder} has no {missing[0]}, which its config.json asks for ({len(missing)} missing)."
        )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class FourBits:
    """Names of the linear layers of a model, by whether bitsandbytes holds them in 4 bits."""

    stored: list[str]
    kept: list[str]


def four_bits(folder: Path) -> FourBits:
    """Which layers are held in 4 bits, from config.json alone.

    Kept are the head, and what bitsandbytes 0.50 loads, and fails to compute on processors with AVX-512: "shape … is
    invalid for input of size …". It takes a scale for 64 values of a matrix, and has them row by row there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_type(folder))
    found = FourBits([], [])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            fits = type(module) is nn.Linear and module is not model.get_output_embeddings()
            (found.stored if fits and module.weight.shape[1] % _BLOCK == 0 else found.kept).append(name)
    return found


def known_type(folder: Path) -> Any:
    """The configuration of a folder, whose model_type transformers has a causal language model for.

    Raises:
        LayoutError: it has none; code that lies in the folder is not run.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from rwkv_lab.export.causal_lm.folder import read_config

    named = (read_config(folder) or {}).get("model_type")
    if named not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LayoutError(f"{folder}: transformers has no causal language model of type {named!r}.")
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise LayoutError(f"{folder}/config.json is not taken by transformers: {str(e).splitlines()[0][:300]}") from e


def refuse_attention(config: Any) -> None:
    """Refuse a model whose attention one ONNX graph cannot have.

    Raises:
        LayoutError: it does not see a whole text, or sees it by a rotation that changes with its length.
    """
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or window and not hasattr(config, "layer_types"):
        what = ", ".join(sorted(kinds)) or f"a sliding window of {window} tokens"
        raise LayoutError(f"A {config.model_type} with {what} is not exported: its cache is not the whole text.")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind in _CHANGING:
        raise LayoutError(f"rope_type {kind!r} changes with the length of a text, so it is not exported.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers and peft, and without their bars."""
    from transformers.utils import logging as theirs

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels, bars = [logger.level for logger in loggers], theirs.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        theirs.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
