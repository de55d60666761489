"""The tokenizer of a model in the form that Hugging Face's libraries load: files of a folder.

A vocabulary of byte strings (World, bytes) needs code that takes the longest token that fits, which no tokenizer of
transformers does: it goes with the vocabulary, as `written/rwkv_vocabulary_tokenizer.py`, and is loaded by
`AutoTokenizer.from_pretrained(folder, trust_remote_code=True)`. A tokenizer.json goes as it is.
"""

import json
from importlib.resources import files
from pathlib import Path

from rwkv_lab.convert.left_beside import world_template
from rwkv_lab.errors import ParameterError
from rwkv_lab.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer, load_tokenizer, tokenizer_for
from rwkv_lab.tokenizer.chat_template import TEMPLATE

CODE = "rwkv_vocabulary_tokenizer"
END_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a configuration
_END_OF_TEXT = "<|endoftext|>"


def model_tokenizer(which: str, vocab_size: int) -> tuple[Tokenizer | None, str]:
    """(the tokenizer of a model, why there is none).

    Args:
        which: "world", "bytes" or the path of a file; "" for what the vocabulary's size tells.
    Raises:
        ParameterError, CorruptFileError, UnsafeFileError: a tokenizer that was named and does not fit or is none.
    """
    if which:
        return load_tokenizer(which, vocab_size), ""
    try:
        return tokenizer_for(vocab_size), ""
    except ParameterError as e:
        return None, str(e).partition("\n")[0]


def tokenizer_files(tokenizer: Tokenizer | None, which: str, template: str | None) -> dict[str, bytes]:
    """The files by name.

    Args:
        tokenizer: None for a chat template alone.
        which: as for `model_tokenizer`.
        template: the source's own; None for the usual one, where there is a usual one.
    """
    if tokenizer is None:
        return {} if template is None else {TEMPLATE: template.encode()}
    if isinstance(tokenizer, WorldTokenizer):
        template = world_template() if template is None else template
        return _vocabulary_files("RwkvWorldTokenizer", tokenizer.path.read_bytes(), 0, template)
    if isinstance(tokenizer, ByteTokenizer):
        first = tokenizer.vocab_size - 256
        lines = "".join(f"{first + byte} {bytes([byte])!r} 1\n" for byte in range(256))
        return _vocabulary_files("RwkvByteTokenizer", lines.encode(), tokenizer.end_of_text, template)
    end = {name: _END_OF_TEXT for name in ("bos_token", "eos_token", "unk_token")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= end if tokenizer.end_of_text is not None and _names_end(Path(which)) else {}
    config |= {} if template is None else {"chat_template": template}
    return {"tokenizer.json": Path(which).read_bytes(), "tokenizer_config.json": _as_json(config)}


def _names_end(path: Path) -> bool:
    added = json.loads(path.read_text("utf-8")).get("added_tokens") or []
    return any(token.get("content") == _END_OF_TEXT for token in added)


def _vocabulary_files(name: str, vocabulary: bytes, end: int | None, template: str | None) -> dict[str, bytes]:
    written = files("rwkv_lab.convert") / "written"
    config = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"{CODE}.{name}", None]},
        "end_of_text_id": end,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if end is not None:
        config |= {token: _END_OF_TEXT for token in ("bos_token", "eos_token", "pad_token")}
    if template is not None:
        config["chat_template"] = template
    return {
        "rwkv_vocab_v20230424.txt" if name == "RwkvWorldTokenizer" else "byte_vocab.txt": vocabulary,
        f"{CODE}.py": (written / f"{CODE}.py").read_bytes(),
        "tokenizer_config.json": _as_json(config),
    }


def generation_config(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """generation_config.json: the end of a text ends what is generated."""
    end = None if tokenizer is None else tokenizer.end_of_text
    ids = {} if end is None else {name: end for name in END_IDS}
    return {"generation_config.json": _as_json(ids)} if ids else {}


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
