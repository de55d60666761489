"""safetensors: a JSON header, then the data."""

from rwkv_lab.checkpoint.format import Format, Header, register
from rwkv_lab.checkpoint.safetensors_header import looks_like_safetensors, read_safetensors_header
from rwkv_lab.checkpoint.source import SourceFile


def _read(file: SourceFile) -> Header:
    tensors, metadata = read_safetensors_header(file)
    return Header(tensors, metadata=metadata)


register(
    Format(
        name="safetensors",
        described="safetensors",
        suffixes=(".safetensors",),
        recognise=looks_like_safetensors,
        read=_read,
    )
)
