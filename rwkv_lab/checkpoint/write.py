"""Writes checkpoints: .pth and .safetensors, whole or in shards; streamed, and whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.atomic import atomic_file, atomic_folder
from rwkv_lab.checkpoint.file_layout import FileLayout, file_layout
from rwkv_lab.checkpoint.stream import Findings, OutFile, OutTensor, stream
from rwkv_lab.errors import OutputError, ParameterError
from rwkv_lab.lazy_torch import torch

SINGLE = "model.safetensors"  # a folder of one file
SUFFIXES = {".pth": "pth", ".safetensors": "safetensors"}


def file_kind(path: Path) -> str:
    """ "pth" or "safetensors", from the suffix of an output.

    Raises:
        ParameterError: another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise ParameterError(f"the output {path} must end in .pth or .safetensors: that decides its format")
    return SUFFIXES[path.suffix]


def write_stream(
    path: Path,
    tensors: Sequence[OutTensor],
    layout: FileLayout,
    overwrite: bool,
    scan: Callable[[OutTensor], bool],
    refuse: bool = True,
    before_publishing: Callable[[], None] = lambda: None,
) -> list[Findings]:
    """Write `tensors` as `layout` (from `file_layout`) arranges them; `path` appears when all is there.

    Args:
        before_publishing: called when all is written and `path` is about to appear.
    Raises: as `stream` and `atomic_file`.
    """
    with atomic_file(path, overwrite) as fd:
        findings = stream([OutFile(fd, layout, tensors)], scan, refuse, f"writing {path.name}")
        os.fsync(fd)  # here, because other processes may have to wait from now on
        before_publishing()
        return findings


@checked
def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> None:
    """Write tensors to a `.pth` or `.safetensors`, or, with `max_shard_size`, to a folder of safetensors shards.

    Args:
        tensors: any layout in memory, on any device; tied ones are written once each.
        metadata: short texts that travel in the file.
        max_shard_size: bytes of tensor data per shard; a tensor larger than that gets a shard of its own.
    Raises:
        OutputError: the target exists (unless `overwrite`), cannot be written, or the disk is full.
        ParameterError: a suffix that is neither, or a shard size below 1.
    """
    path, notes = Path(path), dict(metadata or {})
    out = [_out_tensor(name, t.detach()) for name, t in tensors.items()]
    if max_shard_size is None:
        layout = file_layout(file_kind(path), out, notes)
        write_stream(path, out, layout, overwrite, scan=lambda t: False, refuse=False)
    else:
        _write_shards(path, out, notes, overwrite, max_shard_size)


def _out_tensor(name: str, tensor: torch.Tensor) -> OutTensor:
    return OutTensor(name, tuple(tensor.shape), tensor.dtype, compute=lambda: [_dense(tensor)])


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().resolve_conj().resolve_neg().contiguous().flatten()


def _write_shards(folder: Path, tensors: list[OutTensor], notes: dict[str, str], overwrite: bool, limit: int) -> None:
    if limit < 1:
        raise ParameterError(f"max_shard_size is {limit}; it must be at least 1 byte")
    shards = split_shards(tensors, limit)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    write_folder(folder, dict(zip(names, shards, strict=True)), notes, {}, overwrite, lambda t: False, refuse=False)


def write_folder(
    folder: Path,
    shards: Mapping[str, Sequence[OutTensor]],
    notes: dict[str, str],
    others: Mapping[str, bytes],
    overwrite: bool,
    scan: Callable[[OutTensor], bool],
    refuse: bool = True,
) -> list[Findings]:
    """Write a folder of safetensors; it appears when all is there.

    Args:
        shards: by file name; the index of several comes last.
        notes: short texts that travel in each of them.
        others: files beside them, by name.
    Raises: as `stream` and `atomic_folder`.
    """
    with atomic_folder(folder, overwrite) as temporary:
        fds = [os.open(temporary / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666) for name in shards]
        try:
            files = [
                OutFile(fd, file_layout("safetensors", shard, notes), shard)
                for fd, shard in zip(fds, shards.values(), strict=True)
            ]
            findings = stream(files, scan, refuse, f"writing {folder.name}")
            for fd in fds:
                os.fsync(fd)
        finally:
            for fd in fds:
                os.close(fd)
        for name, data in others.items():
            _write_small(temporary / name, data)
        if len(shards) > 1 or _is_shard(next(iter(shards))):
            _write_small(temporary / f"{SINGLE}.index.json", shard_index(shards))
    return findings


def shard_files(tensors: Sequence[OutTensor], limit: int) -> dict[str, list[OutTensor]]:
    """Tensors by the name of the file that they go to: one file where all fit into it, else shards of at most `limit`
    bytes; a tensor larger than that gets a shard of its own."""
    shards = split_shards(tensors, limit)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {_shard_name(i, len(shards)): shard for i, shard in enumerate(shards)}


def shard_index(shards: Mapping[str, Sequence[OutTensor]]) -> bytes:
    """The index file of shards."""
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }
    return json.dumps(index, indent=1).encode()


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _is_shard(name: str) -> bool:
    return name.startswith("model-")


def _write_small(path: Path, data: bytes) -> None:
    with open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def split_shards(tensors: Sequence[OutTensor], limit: int) -> list[list[OutTensor]]:
    """Tensors in order, in runs of at most `limit` bytes where they are not larger than that themselves."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


@checked
def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        OutputError: as `atomic_file`.
    """
    data = text.encode()
    with atomic_file(path, overwrite) as fd:
        if os.write(fd, data) != len(data):
            raise OutputError(f"cannot write {path}: the disk took only a part of it")
