"""The vocabulary of a tokenizer.json in a GGUF file, as the package gguf reads it; what it means, llama.cpp tests."""

import json
import re

import pytest
from bpe_files import BLANKS, END, write_bpe
from models import random_model

from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.convert import to_gguf
from rwkv_lab.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
TEXT = ["the rwkv reads 1234 words, the other 56 words  and\n    blanks; größer"] * 3


def written(folder, tokens, **options):
    """(header, notes) of a model with so many tokens."""
    write_checkpoint(
        folder / "m.pth", random_model(Layout("7.0", 1, 32, 32, 32, tokens, 1, 32, {"w": 1, "a": 1, "g": 1}))
    )
    result = to_gguf(folder / "m.pth", folder / "m.gguf", tokenizer=folder / "tokenizer.json", **options)
    assert all(check.passed for check in result.checks)
    fields = gguf.GGUFReader(result.out).fields
    return {name.removeprefix("tokenizer.ggml."): f.contents() for name, f in fields.items()}, result.notes


def about(notes):
    return [note for note in notes if "vocabulary" in note or "NFC" in note]


@pytest.mark.parametrize("digits", [False, True])
def test_tokens_merges_and_kinds(digits, tmp_path):
    size = write_bpe(tmp_path / "tokenizer.json", TEXT, digits=digits)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    header, notes = written(tmp_path, size + 3)
    assert (header["model"], header["pre"]) == ("gpt2", "starcoder" if digits else "gpt-2") and not about(notes)
    for token, i in content["model"]["vocab"].items():
        assert header["tokens"][i] == token and header["token_type"][i] == (3 if token == END else 1)
    of_blanks = {header["tokens"][i]: header["token_type"][i] for i in range(size - len(BLANKS), size)}
    assert of_blanks == dict.fromkeys(BLANKS, 4)
    assert (
        header["tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
        and header["token_type"][size:] == [5] * 3
    )
    assert header["merges"] == [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    assert header["merges"] and header["bos_token_id"] == header["eos_token_id"] == content["model"]["vocab"][END]
    assert header["add_bos_token"] is False


def test_merges_as_older_versions_write_them(tmp_path):
    size = write_bpe(tmp_path / "tokenizer.json", TEXT)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    header, _ = written(tmp_path, size)
    assert header["merges"] == content["model"]["merges"]


def test_texts_that_are_not_composed_are_noted(tmp_path):
    size = write_bpe(tmp_path / "tokenizer.json", TEXT, nfc=True)
    header, notes = written(tmp_path, size)
    assert header["pre"] == "gpt-2" and any("NFC" in note and "has other tokens there" in note for note in notes)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, r"none of llama.cpp's pre-tokenizers .* \(ByteLevel\)"),
        ({"pre_tokenizer": BYTES | {"use_regex": False}}, r"none of llama.cpp's pre-tokenizers .* \(ByteLevel\)"),
        ({"pre_tokenizer": None}, r"pre-tokenizers .* \(nothing\)"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}},
            r"pre-tokenizers .* \(Whitespace, ByteLevel\)",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({"ignore_merges": True}, "BPE has ignore_merges True"),
        ({"byte_fallback": True}, "BPE has byte_fallback True"),
        ({"added_tokens": []}, "no end of text, and llama.cpp would take token 11"),
        ({"decoder": {"type": "Fuse"}}, "not those of a byte-level tokenizer.json"),
    ],
)
def test_what_llama_cpp_cannot_have_is_named(changed, why, tmp_path):
    size = write_bpe(tmp_path / "tokenizer.json", TEXT, **changed)
    if "added_tokens" in changed:
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["vocab"] = {t if t != END else "<none>": i for t, i in content["model"]["vocab"].items()}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    header, notes = written(tmp_path, size)
    assert header["model"] == "none" and "tokens" not in header
    assert any(re.search(f"The file has no vocabulary, .*{why}", note) for note in notes), notes


def test_tokens_that_take_the_blanks_beside_them(tmp_path):
    size = write_bpe(tmp_path / "tokenizer.json", TEXT)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][-1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    header, notes = written(tmp_path, size)
    assert header["model"] == "none" and any("takes the blanks beside it" in note for note in notes)


def test_the_definition_is_that_of_the_file(tmp_path):
    write_bpe(tmp_path / "tokenizer.json", TEXT)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert load_tokenizer(tmp_path / "tokenizer.json").definition()["model"]["vocab"] == content["model"]["vocab"]
