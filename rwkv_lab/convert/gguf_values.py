"""What the header of a GGUF file states of a model beside its tensors: dimensions, vocabulary, provenance."""

from rwkv_lab.checkpoint import Layout
from rwkv_lab.checkpoint.foreign_format import RESCALED
from rwkv_lab.checkpoint.gguf_facts import RANK_KEYS
from rwkv_lab.checkpoint.gguf_layout import tensor_type
from rwkv_lab.convert.containers import Content
from rwkv_lab.convert.gguf_vocabulary import Values, vocabulary
from rwkv_lab.text import counted

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's, by the type of most bytes
_CONTEXT = 1 << 20  # RWKV has no limit; llama.cpp wants one, and its own converter states this


def header_values(content: Content) -> Values:
    """Everything that llama.cpp asks for of a model, and the notes."""
    layout, tensors, notes = content.layout, content.tensors, content.notes
    assert layout is not None, "only models become GGUF files"
    name = "rwkv" + layout.version[0]
    bytes_of: dict[str, int] = {}
    for t in tensors:
        kind = tensor_type(t).name
        bytes_of[kind] = bytes_of.get(kind, 0) + t.nbytes
    most = max(bytes_of, key=lambda kind: bytes_of[kind])
    values: Values = [
        ("general.architecture", name),
        ("general.type", "model"),
        (
            "general.name",
            f"RWKV-{layout.version[0]}, {counted(layout.n_layer, 'layer')} of {counted(layout.n_embd, 'channel')}",
        ),
        ("general.file_type", _FILE_TYPES.get(most, 0)),
        ("general.quantization_version", 2),
        (f"{name}.context_length", _CONTEXT),
        (f"{name}.embedding_length", layout.n_embd),
        (f"{name}.block_count", layout.n_layer),
        (f"{name}.feed_forward_length", layout.dim_ffn),
        (f"{name}.attention.head_count", 0),  # asked for, not used: heads follow from their size
        (f"{name}.attention.layer_norm_epsilon", 1e-5),
        (f"{name}.wkv.head_size", layout.head_size),
        (f"{name}.vocab_size", layout.vocab_size),
        *_by_generation(name, layout, int(notes.get(RESCALED, 0))),
        *vocabulary(content.tokenizer, layout.vocab_size, content.chat_template),
    ]
    return [*values, *notes.items()]


def _by_generation(name: str, layout: Layout, rescale: int) -> Values:
    ranks = {"v": layout.ranks.get("a", 0)} | dict(layout.ranks)  # one layer of RWKV-7 has no v
    values: Values = [(f"{name}.{key}", ranks[rank]) for rank, key in RANK_KEYS[layout.version].items()]
    return [*values, (f"{name}.rescale_every_n_layers", rescale)] if layout.version == "6.0" else values
