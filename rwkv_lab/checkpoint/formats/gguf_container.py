"""GGUF, the container of llama.cpp and its relatives. Quantised tensors are read as float32, block by block."""

from __future__ import annotations

from rwkv_lab.checkpoint.format import Format, Header, register
from rwkv_lab.checkpoint.gguf_header import GgufTensor, read_gguf_header
from rwkv_lab.checkpoint.gguf_types import MAGIC, TensorType, require_gguf
from rwkv_lab.checkpoint.source import Derived, SourceFile, TensorInfo
from rwkv_lab.errors import CorruptFileError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch

ARCHITECTURES = ("rwkv6", "rwkv7")


def _read(file: SourceFile) -> Header:
    tensors, values = read_gguf_header(file, ARCHITECTURES)
    head_size = values.get(f"{values['general.architecture']}.wkv.head_size")
    if head_size is None or not head_size.isdecimal() or int(head_size) == 0:
        raise CorruptFileError(f"{file.path}: its header states wkv.head_size as {head_size}; a number is expected.")
    return Header({t.name: _info(t, file) for t in tensors}, metadata=values)


def _info(t: GgufTensor, file: SourceFile) -> TensorInfo:
    if t.type.dtype is not None:
        return TensorInfo(t.name, t.shape, t.type.dtype, file, t.offset)
    raw = TensorInfo(t.name, (t.nbytes,), "uint8", file, t.offset)
    unit = (t.type.nbytes, t.type.elements)
    derived = Derived(raw, lambda values: dequantised(values, t.type), unit, t.type.name)
    return TensorInfo(t.name, t.shape, "float32", file, t.offset, derived=derived)


def dequantised(data: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Flat float32 values of whole blocks, which are given as flat uint8.

    Raises:
        ParameterError: the package gguf is not installed.
    """
    require_gguf(f"Reading {kind.name} tensors of a GGUF file")
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(invalid="ignore", over="ignore"):  # steps that are no numbers; what becomes of them is found later
        return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType(kind.number)).reshape(-1))


register(
    Format(
        name="gguf",
        described="a GGUF model",
        suffixes=(".gguf",),
        recognise=lambda head, size: head.startswith(MAGIC),
        read=_read,
    )
)
