"""Held-out texts and tokens of them."""

import json

import numpy as np
import pytest
import torch
from random_models import load_model

from rwkv_lab import RWKV_Dual
from rwkv_lab.analysis.texts import Reading, excerpts, held_out_excerpts, held_out_text, tokens_to_read
from rwkv_lab.errors import ParameterError
from rwkv_lab.tokenizer import load_tokenizer
from rwkv_lab.train import load_corpus


def test_excerpts_begin_where_lines_do():
    text = b"".join(b"line %03d\n" % i for i in range(100))
    found = excerpts(text, 7, 20)
    assert len(found) == 7 and all(x.startswith(b"line ") and len(x) == 20 for x in found) and len(set(found)) == 7
    assert excerpts(b"one line without an end", 2, 8) == [b"one line"] * 2
    assert held_out_excerpts("english", 3, 50) == b"".join(excerpts(held_out_text("english"), 3, 50))


def test_what_examples_hold_out(tmp_path):
    lines = [json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    found = held_out_text(str(tmp_path / "sums.jsonl")).decode().split("\n")
    assert 1 <= len(found) < 20 and all(eval(x.replace("=", "==")) for x in found)
    with pytest.raises(ParameterError, match=r"none\.txt"):
        held_out_text(str(tmp_path / "none.txt"))


def test_tokens_of_text_and_tokens_drawn_at_random(base, tmp_path):
    model = RWKV_Dual.from_pretrained(base)
    tokens, source = tokens_to_read(model, 2, 30, "english")
    assert tokens.shape == (2, 30)
    assert model.tokenizer.decode_bytes(tokens[0].tolist()) == held_out_text("english")[:30]
    assert source == "held-out text of the corpus 'english'"
    tokens, source = tokens_to_read(load_model(tmp_path, "7.0"), 2, 30)
    assert tokens.shape == (2, 30) and tokens.max() < 70 and "drawn at random from 70" in source
    assert torch.equal(tokens, tokens_to_read(load_model(tmp_path, "7.0"), 2, 30)[0])


def test_tokens_are_read_with_their_tokenizer(base, tmp_path):
    np.save(tmp_path / "t.npy", np.arange(6000) % 257)
    corpus = load_corpus(tmp_path / "t.npy")
    with pytest.raises(ParameterError, match="t.npy holds tokens; .* their tokenizer is needed"):
        held_out_text(corpus)
    tokenizer = load_tokenizer("bytes", 257)
    assert held_out_text(corpus, tokenizer) == tokenizer.decode_bytes(corpus.held_out.tolist())
    assert held_out_excerpts(corpus, 16, 512, tokenizer) == held_out_text(corpus, tokenizer)  # shorter than 16 of 512
    assert tokens_to_read(RWKV_Dual.from_pretrained(base), 1, 20, corpus)[1] == "held-out text of the corpus 't.npy'"


def test_why_nothing_was_read_is_in_the_words_of_what_reads(base):
    model = RWKV_Dual.from_pretrained(base)
    error = ParameterError("a.jsonl, line 1: with ctx_len=8 nothing is left to learn.\nPass long=.")
    why = Reading().why_unread(model, error)
    assert why == "Not read: a.jsonl, line 1: with window=8 nothing is left to learn. Give a larger window."
