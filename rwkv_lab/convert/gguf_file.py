"""A GGUF file as a container of conversions."""

from pathlib import Path

from rwkv_lab.checkpoint.file_layout import FileLayout
from rwkv_lab.checkpoint.gguf_layout import gguf_layout
from rwkv_lab.checkpoint.stream import Findings
from rwkv_lab.checkpoint.write import write_stream
from rwkv_lab.convert.containers import Container, Content, register_container
from rwkv_lab.convert.gguf_values import header_values
from rwkv_lab.convert.gguf_vocabulary import other_tokens, why_none


def _layout(content: Content) -> FileLayout:
    values = header_values(content)
    return gguf_layout(content.tensors, values)


def _write(path: Path, content: Content, overwrite: bool, refuse: bool) -> list[Findings]:
    return write_stream(path, content.tensors, _layout(content), overwrite, lambda t: True, refuse)


def _notes(content: Content) -> list[str]:
    tokenizer = content.tokenizer
    why = "pass tokenizer=…" if tokenizer is None else why_none(tokenizer)
    if why:
        return [f"The file has no vocabulary, so its readers take numbers of tokens only: {why}."]
    return [other_tokens(tokenizer)] if tokenizer is not None and other_tokens(tokenizer) else []


register_container(
    Container("gguf", (".gguf",), lambda content: _layout(content).size, _write, _notes, holds_vocabulary=True)
)
