"""What the header of a GGUF file states of a model beside its tensors: dimensions, vocabulary, provenance."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from rwkv_lab.checkpoint import Layout
from rwkv_lab.checkpoint.foreign_format import RESCALED
from rwkv_lab.checkpoint.gguf_layout import Value, tensor_type
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer

Values = list[tuple[str, Value]]

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's, by the type of most bytes
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens
_CONTEXT = 1 << 20  # RWKV has no limit; llama.cpp wants one, and its own converter states this
VOCABULARIES = (WorldTokenizer, ByteTokenizer)  # that are byte strings, as llama.cpp's RWKV vocabulary
_BLANK_LINE = rb"\n\n"  # as the token is written


def header_values(
    layout: Layout, tensors: Sequence[OutTensor], tokenizer: Tokenizer | None, notes: Mapping[str, str]
) -> Values:
    """Everything that llama.cpp asks for, and the notes."""
    name = "rwkv" + layout.version[0]
    bytes_of: dict[str, int] = {}
    for t in tensors:
        kind = tensor_type(t).name
        bytes_of[kind] = bytes_of.get(kind, 0) + t.nbytes
    most = max(bytes_of, key=lambda kind: bytes_of[kind])
    values: Values = [
        ("general.architecture", name),
        ("general.type", "model"),
        ("general.name", f"RWKV-{layout.version[0]}, {layout.n_layer} layers of {layout.n_embd} channels"),
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
        *vocabulary(tokenizer, layout.vocab_size),
    ]
    return [*values, *notes.items()]


def _by_generation(name: str, layout: Layout, rescale: int) -> Values:
    ranks = layout.ranks
    if layout.version == "6.0":
        return [
            (f"{name}.time_mix_extra_dim", ranks["maa"]),
            (f"{name}.time_decay_extra_dim", ranks["decay"]),
            (f"{name}.rescale_every_n_layers", rescale),
        ]
    return [
        (f"{name}.attention.decay_lora_rank", ranks["w"]),
        (f"{name}.attention.iclr_lora_rank", ranks["a"]),
        (f"{name}.attention.value_residual_mix_lora_rank", ranks.get("v", ranks["a"])),  # one layer has no v
        (f"{name}.attention.gate_lora_rank", ranks["g"]),
    ]


def vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> Values:
    """Tokens as llama.cpp's RWKV vocabulary has them: byte strings, written like Python's literals.

    Ids without bytes are the end of text, 0, and padding. Without a tokenizer the file has numbers of tokens only.
    """
    if not isinstance(tokenizer, VOCABULARIES):
        return [("tokenizer.ggml.model", "none")]
    tokens, kinds = [], []
    for i in range(vocab_size):
        data = tokenizer.decode_bytes([i]) if i < tokenizer.vocab_size else b""
        special = (b"<s>", _CONTROL) if i == tokenizer.end_of_text else (b"[PAD%d]" % i, _UNUSED)
        text, kind = (repr(data)[2:-1].encode(), _NORMAL) if data else special
        tokens.append(text)
        kinds.append(kind)
    values: Values = [
        ("tokenizer.ggml.model", "rwkv"),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", kinds),
        ("tokenizer.ggml.add_bos_token", False),
    ]
    if tokenizer.end_of_text is not None:
        values += [(f"tokenizer.ggml.{name}_token_id", tokenizer.end_of_text) for name in ("bos", "eos")]
    if _BLANK_LINE in tokens:
        values.append(("tokenizer.ggml.eot_token_id", tokens.index(_BLANK_LINE)))
    if isinstance(tokenizer, WorldTokenizer):
        template = files("rwkv_lab.convert") / "written" / "chat_template.jinja"
        values.append(("tokenizer.chat_template", template.read_text("utf-8")))
    return values
