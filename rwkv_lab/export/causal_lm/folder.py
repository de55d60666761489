"""Folders of causal language models in Hugging Face's layout: recognised, opened, and what lies in them beside weights.

Nothing here loads a model: config.json and the headers of the weights tell all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_lab.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_INPUT = ("embed_tokens", "wte", "embed_in", "word_embeddings")  # what models call their embedding …
_OUTPUT = ("lm_head", "embed_out", "output_layer")  # … and their head
_LARGEST = 64_000_000  # bytes of a tokenizer.json


@dataclass(frozen=True)
class CausalLmFolder:
    """An open folder of a model.

    tensors: by their names in the files.
    tied: whether the head is the embedding, of which the folder has one then.
    """

    path: Path
    ck: Checkpoint
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    tied: bool
    embedding: str
    head: str

    @property
    def context(self) -> int | None:
        """Tokens that a text may have, None where the configuration states none."""
        stated = self.config.get("max_position_embeddings")
        return stated if isinstance(stated, int) and stated > 0 else None


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names, where it is one of a causal language model."""
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return next((name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))), None)


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder, None where there is none.

    Raises:
        CorruptFileError: it is no JSON object.
    """
    path = folder / CONFIG
    return read_object(path) if path.is_file() else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CorruptFileError: it does not.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptFileError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__}, not an object.")
    return found


def open_folder(path: Path) -> CausalLmFolder:
    """Open a model in a folder of config.json and safetensors, whole or in shards.

    Raises:
        ParameterError: nothing is there.
        LayoutError: no causal language model, or a quantised one, whose weights cannot be changed.
        CorruptFileError, UnsafeFileError: as `open_checkpoint`.
    """
    ck = open_checkpoint(path)
    try:
        return _opened(path, ck)
    except BaseException:
        ck.close()
        raise


def _opened(path: Path, ck: Checkpoint) -> CausalLmFolder:
    config = ck.config
    if ck.format != "folder" or architecture(config) is None:
        raise LayoutError(
            f"{path} is no folder of a causal language model: its config.json names "
            f"{config.get('architectures') or 'no architecture'}."
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LayoutError(
            f"{path} is quantised ({method}): an adapter added to its weights would be rounded away.\n"
            "Give the model that it was made from."
        )
    tensors = ck.stored
    embedding = _named(tensors, _INPUT)
    if embedding is None:
        raise LayoutError(f"{path} has no embedding that is known: {', '.join(_INPUT)} with .weight.")
    head = _named(tensors, _OUTPUT)
    tied = bool(config.get("tie_word_embeddings", head is None))
    if tied and head is not None:
        _refuse_other_head(path, tensors[embedding], tensors[head])
        tensors = {name: info for name, info in tensors.items() if name != head}
    if head is None and not tied:
        raise LayoutError(f"{path} has no {_OUTPUT[0]}.weight, and its config.json does not tie it to the embedding.")
    return CausalLmFolder(path, ck, config, tensors, tied, embedding, head or f"{_OUTPUT[0]}.weight")


def _named(tensors: Mapping[str, TensorInfo], words: tuple[str, ...]) -> str | None:
    ends = tuple(f"{word}.weight" for word in words)
    return next((name for name in tensors if name.endswith(ends)), None)


def _refuse_other_head(path: Path, embedding: TensorInfo, head: TensorInfo) -> None:
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    if not same or any(not (a == b).all() for a, b in zip(embedding.blocks(), head.blocks(), strict=True)):
        raise LayoutError(
            f"{path}: config.json ties {head.name} to {embedding.name}, and the files hold another {head.name}.\n"
            "State tie_word_embeddings in config.json as it was in training."
        )


def files_beside(model: Path, adapter: Path | None = None, tokenizer: str = "") -> dict[str, bytes]:
    """Tokenizer, chat template and generation settings, by file name.

    The tokenizer is that of the adapter's folder where it has one, since tokens may have been added in training.

    Args:
        tokenizer: a tokenizer.json, or a folder with one, that goes before both.

    Raises:
        ParameterError: there is no tokenizer.
    """
    places = [place for place in (Path(tokenizer) if tokenizer else None, adapter, model) if place is not None]
    found: dict[str, bytes] = {}
    home = next((place for place in places if tokenizer_file(place).is_file()), None)
    if home is None or tokenizer and home != places[0]:
        raise ParameterError(
            f"There is no {TOKENIZER} in {' or '.join(map(str, places if not tokenizer else places[:1]))}.\n"
            "Save it there (AutoTokenizer.from_pretrained(…).save_pretrained(folder)), or give its path as tokenizer."
        )
    if home.is_file():
        found[TOKENIZER] = _content(home)
    else:
        found |= {name: _content(home / name) for name in _TOKENIZER_FILES if (home / name).is_file()}
    for name in (*_TEMPLATES, GENERATION):
        here = next((place / name for place in places if (place / name).is_file()), None)
        if here is not None:
            found[name] = _content(here)
    return found


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json of a folder, or the file itself."""
    return place / TOKENIZER if place.is_dir() else place


def _content(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST:
        raise CorruptFileError(f"{path} has {path.stat().st_size} bytes; {_LARGEST} are the limit")
    return path.read_bytes()
