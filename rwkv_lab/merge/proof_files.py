"""Files as a proof reads them: by the formats' own libraries, with names understood here once more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rwkv_lab.checkpoint import Checkpoint, open_checkpoint
from rwkv_lab.checkpoint.gguf_types import MAGIC, require_gguf
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.proof import Tensors

# What wrappers put before names, and in the middle of them.
_LEADING = re.compile(r"^((module|model|base_model|_orig_mod|_forward_module|_\w+_wrapped_module)\.)+")
_INNER = re.compile(r"(?<=\.)(_orig_mod|_forward_module|_\w+_wrapped_module)\.")
# How the parts of an adapter are called after the name of their layer.
_LORA = (".lora_A", ".lora_B", ".init_lora_A", ".init_lora_B", ".lora_magnitude_vector")
_MARKS = (*_LORA, ".disha", ".bone_block", ".bone", ".miss_block")


def model_and_tuned(
    base: Path, tuned: Sequence[Path], adapter: str | list[str] | None
) -> tuple[Tensors, list[Tensors]]:
    """The base and the tuned files of a merge. Of a tuned file that holds the model that its adapter belongs to, that
    model is the base.

    Args:
        adapter: which of such a file's adapters is meant, for all tuned files or each; None: there is one.
    """
    model, files = read(base), [read(path) for path in tuned]
    for i, tensors in enumerate(files):
        if _holds_its_model(tensors):
            name = adapter[i] if isinstance(adapter, list) else adapter
            model, files[i] = _Renamed(tensors, _frozen), _Renamed(tensors, lambda n, name=name: _in_adapter(n, name))
    return model, files


def _holds_its_model(tensors: Tensors) -> bool:
    """Whether a file has an adapter's parts beside the weights that they change."""
    adapted = {n[: n.index(m)] for n in tensors for m in _MARKS if m in n}
    return bool(adapted) and all({f"{x}.weight", f"{x}.base_layer.weight"} & set(tensors) for x in adapted)


def _frozen(name: str) -> str | None:
    """The name in the frozen model; None of an adapter's parts."""
    if any(m in name for m in _MARKS) or ".modules_to_save." in name or name.endswith(".alpha"):
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _in_adapter(name: str, adapter: str | None) -> str | None:
    """The name in a file of that adapter alone; None of the rest."""
    of_an_adapter = any(m in name for m in _MARKS) or name.endswith(".alpha")
    if adapter is not None and adapter not in name.split("."):
        return None
    if ".modules_to_save." in name:
        layer, _, end = name.partition(".modules_to_save.")
        return f"{layer}.{end.rpartition('.')[2]}"
    if not of_an_adapter:
        return None
    layer, part, *_ = next(name.partition(m) for m in (*_MARKS, ".alpha") if m in name)
    return f"{layer}{part}"


class _Renamed(Mapping[str, "torch.Tensor"]):
    """Some tensors of a file, under other names."""

    def __init__(self, tensors: Tensors, rename: Callable[[str], str | None]):
        self.tensors = tensors
        self.names = {new: n for n in tensors if (new := rename(n)) is not None}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Safetensors(Mapping[str, "torch.Tensor"]):
    """The tensors of .safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]):
        self.home: dict[str, tuple[Any, str]] = {}
        for file in files:
            opened = safe_open(file, "pt")
            self.home |= {_bare(name): (opened, name) for name in opened.keys()}

    def __getitem__(self, name: str) -> torch.Tensor:
        opened, stored = self.home[name]
        return opened.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)

    def __contains__(self, name: object) -> bool:
        return name in self.home


class _Gguf(Mapping[str, "torch.Tensor"]):
    """The tensors of a GGUF file, each read, and where it is quantised dequantised, when it is asked for."""

    def __init__(self, path: Path):
        require_gguf("The proof of a merge with a GGUF file")
        from gguf import GGUFReader

        self.tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        found = self.tensors[name]
        shape = [int(size) for size in reversed(found.shape)]
        if found.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return torch.tensor(found.data, device="cpu").reshape(shape)
        if found.tensor_type == GGMLQuantizationType.BF16:
            return torch.tensor(found.data, device="cpu").view(torch.bfloat16).reshape(shape)
        return torch.tensor(dequantize(found.data, found.tensor_type), device="cpu").reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read(path: Path) -> Tensors:
    """The tensors of a checkpoint, by the format's own library: mapped or read one by one, never all in memory. Those
    of a foreign format come under BlinkDL's names, by the inverse of its table."""
    tensors = _read_as_stored(path)
    with open_checkpoint(path) as ck:
        return tensors if ck.foreign_format is None else _ByTable(tensors, ck)


class _ByTable(Mapping[str, "torch.Tensor"]):
    """Tensors of a foreign format under BlinkDL's names."""

    def __init__(self, tensors: Tensors, ck: Checkpoint):
        self.tensors, self.inverses = tensors, ck.inverses
        self.stored = {name: _bare(stored) for name, stored in ck.names_in_file.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[self.stored[name]]
        return self.inverses[name](tensor).contiguous() if name in self.inverses else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _read_as_stored(path: Path) -> Tensors:
    files = _files_of(path)
    if _begins_with(files[0], MAGIC):
        return _Gguf(files[0])
    if not is_zip(files[0]):
        return _Safetensors(files)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":  # which torch takes for its word, unless it does not see the name
            with open(file, "rb") as f:
                loaded = torch.load(f, map_location="cpu", weights_only=True)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found |= {_bare(n): t.detach() for n, t in loaded.items() if isinstance(t, torch.Tensor)}
    return found


def _bare(name: str) -> str:
    """The name in a model."""
    return _INNER.sub("", _LEADING.sub("", name))


def _files_of(path: Path) -> list[Path]:
    """The file itself, or those of a Hugging Face folder."""
    if not path.is_dir():
        return [path]
    if (path / "adapter_config.json").is_file():
        singles = ("adapter_model.safetensors", "adapter_model.bin")
        return [next(path / name for name in singles if (path / name).is_file())]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            return [path / shard for shard in dict.fromkeys(json.loads(index.read_bytes())["weight_map"].values())]
    return [next(f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file())]


def is_zip(path: Path) -> bool:
    return _begins_with(path, b"PK\3\4")


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as f:
        return f.read(len(magic)) == magic
