"""Examples that are longer than the context: counted before training, and split, cut, dropped or refused."""

import json
import logging

import pytest
from tiny_training import SHORT

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import Fit, load_corpus, plan_training, train
from rwkv_lab.train.batches import SKIP, in_batches
from rwkv_lab.train.material import tokenise

SETTINGS = SHORT | {"ctx_len": 32}


@pytest.fixture
def data(tmp_path):
    """20 examples of 10 + 8 tokens and the end of text, and 5 of 10 + 90."""
    sizes = [8] * 20 + [90] * 5
    lines = [{"prompt": f"{i:02} is it: ", "response": "ab" * (size // 2)} for i, size in enumerate(sizes)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "x.jsonl")


@pytest.fixture
def tokenizer(small):
    return RWKV_Dual.from_pretrained(small).tokenizer


COUNTS = dict(ctx_len=32, examples=25, tokens=20 * 19 + 5 * 101, longer=5, needed=100)


@pytest.mark.parametrize(
    ("long", "fit", "ends"),
    [
        (None, Fit("cut", lost=5 * 68, pieces=5, **COUNTS), 5),
        ("cut", Fit("cut", lost=5 * 68, pieces=5, **COUNTS), 5),
        ("drop", Fit("drop", lost=5 * 101, pieces=0, **COUNTS), 5),
        ("split", Fit("split", lost=0, pieces=20, **COUNTS), 0),
    ],
)
def test_what_the_context_cuts_is_in_plan_log_and_result(long, fit, ends, data, small, tmp_path, caplog):
    plan = plan_training("lora", small, data=data, long=long, **{n: SETTINGS[n] for n in ("steps", "ctx_len")})
    assert plan.fit == fit and str(fit) in plan.notes and fit.lost_ends == ends
    with caplog.at_level(logging.INFO):
        result = train("lora", tmp_path / "o.pth", data, small, long=long, log_folder=tmp_path / "log", **SETTINGS)
    assert result.fit == fit and str(fit) in result.notes
    assert str(fit) in caplog.text and str(fit) in json.loads((tmp_path / "log" / "log.json").read_text())["notes"]
    assert "5 of 25 examples" in str(fit) and "ctx_len=100" in str(fit)


def test_with_the_context_that_is_named_nothing_is_cut(data, small):
    fit = plan_training("lora", small, data=data, ctx_len=100).fit
    assert fit.longer == fit.lost == 0 and str(fit) == "All 25 examples fit into ctx_len=100; ctx_len=100 would do."
    assert plan_training("lora", small, data=data, ctx_len=99).fit.longer == 5


def test_pieces_train_on_every_token_once(data, tokenizer):
    corpus = load_corpus(data)
    whole, pieces = (in_batches(corpus, tokenizer, T, 0, "split") for T in (200, 32))
    totals = []
    for rows in (whole, pieces):
        _, targets = rows.draw(len(rows._train))
        totals.append(sorted(t for t in targets.flatten().tolist() if t != SKIP))
    assert totals[0] == totals[1]
    assert pieces.held_out_bytes == whole.held_out_bytes


def test_pieces_of_prompts_alone_are_left_out(tmp_path, tokenizer):
    lines = [{"prompt": "p" * 101, "response": f"answer {i}"} for i in range(4)]
    (tmp_path / "x").write_text("\n".join(map(json.dumps, lines)))
    material = tokenise(load_corpus(str(tmp_path / "x")), tokenizer, 50, "split")
    assert all(row.learned.any() for row in material.train)
    assert (material.fit.pieces, material.fit.lost) == (4, 4 * 100)


def test_too_long_is_an_error_where_that_is_wished(data, small, tmp_path):
    with pytest.raises(ParameterError) as refusal:
        train("lora", tmp_path / "o.pth", data, small, long="error", **SETTINGS)
    words = str(refusal.value)
    assert "has 101 tokens; 5 of 25 are longer than ctx_len=32" in words and "ctx_len=100 would fit all" in words
    assert "x.jsonl, line 2" in words and not (tmp_path / "o.pth").exists()


def test_nothing_left_is_refused(data, small, tmp_path):
    with pytest.raises(ParameterError, match="25 of 25 examples are longer .* too little"):
        train("lora", tmp_path / "o.pth", data, small, long="drop", **SETTINGS | {"ctx_len": 12})
    with pytest.raises(ParameterError, match=r"nothing of it.*\n.*25 of 25 examples .*ctx_len=100"):
        train("lora", tmp_path / "o.pth", data, small, **SETTINGS | {"ctx_len": 8})


def test_texts_are_never_cut_and_say_so(small, texts, tmp_path):
    lines = [json.dumps({"text": "the cat sat " * i}) for i in range(1, 30)]
    (tmp_path / "x").write_text("\n".join(lines))
    assert plan_training("lora", small, data=str(tmp_path / "x"), ctx_len=32).fit is None
    for long in ("cut", "drop", "error"):
        for data in (str(texts), "python"):
            with pytest.raises(ParameterError, match=f"long='{long}' is for examples"):
                plan_training("lora", small, data=data, long=long)
    fit = plan_training("lora", small, data=str(tmp_path / "x"), ctx_len=250, long="drop").fit
    assert fit.examples == 29 and fit.longer == 9
