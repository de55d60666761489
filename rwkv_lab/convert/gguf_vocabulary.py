"""The vocabulary of a model in a GGUF file, as llama.cpp reads it: byte strings of World and bytes, or the tokens and
merges of a byte-level tokenizer.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_lab.checkpoint.gguf_layout import Value
from rwkv_lab.convert.left_beside import GGUF_TEMPLATE, world_template
from rwkv_lab.tokenizer import ByteLevelTokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

Values = list[tuple[str, Value]]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
_BLANK_LINE = rb"\n\n"  # as the token is written
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
_WORDS = _BYTE_LEVEL | {"use_regex": True}  # GPT-2's words
_PRE_TOKENIZERS = {  # as llama.cpp calls it -> the steps of a tokenizer.json
    "gpt-2": [_WORDS],
    "starcoder": [{"type": "Digits", "individual_digits": True}, _WORDS],
}
# Of a BPE, what llama.cpp does not do.
_OTHER_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")


def vocabulary(tokenizer: Tokenizer | None, vocab_size: int, template: str | None = None) -> Values:
    """Values of the header. Without a vocabulary that llama.cpp knows the file has numbers of tokens only.

    Args:
        template: the source's own chat template; None for the World models' in their vocabulary.
    """
    if template is None and isinstance(tokenizer, WorldTokenizer):
        template = world_template()
    templates: Values = [] if template is None else [(GGUF_TEMPLATE, template)]
    if isinstance(tokenizer, WorldTokenizer | ByteTokenizer):
        values = _byte_strings(tokenizer, vocab_size)
    elif isinstance(tokenizer, ByteLevelTokenizer) and not why_none(tokenizer):
        values = _byte_level(tokenizer.definition(), vocab_size)
    else:
        return [("tokenizer.ggml.model", "none"), *templates]
    values += [*templates, ("tokenizer.ggml.add_bos_token", False)]
    if tokenizer.end_of_text is not None:
        values += [(f"tokenizer.ggml.{name}_token_id", tokenizer.end_of_text) for name in ("bos", "eos")]
    return values


def why_none(tokenizer: Tokenizer) -> str:
    """Why llama.cpp cannot have this vocabulary, "" where it can."""
    if isinstance(tokenizer, WorldTokenizer | ByteTokenizer):
        return ""
    if not isinstance(tokenizer, ByteLevelTokenizer):
        return "its tokens are not those of a byte-level tokenizer.json"
    definition = tokenizer.definition()
    model, normalizer = definition["model"], definition["normalizer"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    other = next((name for name in _OTHER_BPE if model.get(name)), None)
    if other:
        return f"its BPE has {other} {model[other]!r}"
    if normalizer not in (None, {"type": "NFC"}):
        return f"it normalises text by {normalizer.get('type')}"
    if _pre_tokenizer(definition) is None:
        steps = ", ".join(str(step.get("type")) for step in _steps(definition)) or "nothing"
        return f"none of llama.cpp's pre-tokenizers that are known here is its own ({steps})"
    odd = next((t for t in definition["added_tokens"] if t["single_word"] or t["lstrip"] or t["rstrip"]), None)
    if odd:
        return f"its token {odd['content']!r} takes the blanks beside it, or whole words only"
    if tokenizer.end_of_text is None:
        return "it has no end of text, and llama.cpp would take token 11 for it"
    return ""


def other_tokens(tokenizer: Tokenizer) -> str:
    """In which texts llama.cpp finds other tokens than the tokenizer, in words; "" where in none."""
    if not isinstance(tokenizer, ByteLevelTokenizer) or not tokenizer.definition()["normalizer"]:
        return ""
    return (
        "The tokenizer composes letters and marks (NFC), llama.cpp does not: a text where they stand apart, such as "
        "e and U+0301 for \u00e9, has other tokens there."
    )


def _byte_strings(tokenizer: WorldTokenizer | ByteTokenizer, vocab_size: int) -> Values:
    """Tokens as llama.cpp's RWKV vocabulary has them: byte strings, written like Python's literals.

    Ids without bytes are the end of text, 0, and padding.
    """
    tokens, kinds = [], []
    known = tokenizer.byte_strings()
    for i in range(vocab_size):
        data = known[i] if i < len(known) else b""
        special = (b"<s>", _CONTROL) if i == tokenizer.end_of_text else _padding(i)
        text, kind = (repr(data)[2:-1].encode(), _NORMAL) if data else special
        tokens.append(text)
        kinds.append(kind)
    values: Values = [
        ("tokenizer.ggml.model", "rwkv"),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", kinds),
    ]
    if _BLANK_LINE in tokens:
        values.append(("tokenizer.ggml.eot_token_id", tokens.index(_BLANK_LINE)))
    return values


def _byte_level(definition: Mapping[str, Any], vocab_size: int) -> Values:
    """Tokens in GPT-2's alphabet as the file writes them, added ones as plain text, and the merges in their order."""
    of_id = {i: (token.encode(), _NORMAL) for token, i in definition["model"]["vocab"].items()}
    for token in definition["added_tokens"]:
        of_id[token["id"]] = token["content"].encode(), _CONTROL if token["special"] else _USER_DEFINED
    tokens, kinds = zip(*(of_id.get(i) or _padding(i) for i in range(vocab_size)), strict=True)
    merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]  # by version
    pre = _pre_tokenizer(definition)
    assert pre is not None, "others have no vocabulary"
    return [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", pre),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", kinds),
        ("tokenizer.ggml.merges", [m.encode() for m in merges]),
    ]


def _padding(i: int) -> tuple[bytes, int]:
    return b"[PAD%d]" % i, _UNUSED


def _pre_tokenizer(definition: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a text is cut before the merges; None where it has none such."""
    steps = _steps(definition)
    for name, known in _PRE_TOKENIZERS.items():
        if len(steps) == len(known) and all(_does(step, k) for step, k in zip(steps, known, strict=True)):
            return name
    return None


def _does(step: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    return all(step.get(name, True if name == "use_regex" else None) == value for name, value in known.items())


def _steps(definition: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    pre = definition["pre_tokenizer"]
    if pre is None:
        return ()
    return pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
